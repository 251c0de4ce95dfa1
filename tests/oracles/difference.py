"""Definitions in float64, written plainly, which what the engine sums up piece by piece is held against."""

from __future__ import annotations

import numpy as np


def sqnr_db(reference: np.ndarray, candidate: np.ndarray) -> float:
    """−10 log10 of the mean over rows of Σ error² / Σ reference², no row fainter than 30 dB below the usual."""
    rows = reference.reshape(-1, reference.shape[-1]).astype(np.float64)
    errors = candidate.reshape(rows.shape).astype(np.float64) - rows
    energy = (rows**2).sum(-1)
    energy = np.maximum(energy, 1e-3 * np.median(energy[energy > 0]))
    return float(-10 * np.log10(((errors**2).sum(-1) / energy).mean()))
