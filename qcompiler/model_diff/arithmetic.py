"""How far apart two arrays are."""

from __future__ import annotations

import math

import numpy as np

from qcompiler.sites.stored.layout import Array

PIECE = 1 << 18


def error_of(found: Array, expected: Array) -> float:
    """‖found - expected‖ / ‖expected‖; 0 where both are 0, infinite where only `expected` is. A few rows at a time."""
    noise = signal = 0.0
    found, expected = np.atleast_1d(found), np.atleast_1d(expected)
    rows = max(1, PIECE * len(expected) // max(1, expected.size))
    for start in range(0, len(expected), rows):
        wanted = expected[start : start + rows].astype(np.float64)
        noise += float(np.square(found[start : start + rows].astype(np.float64) - wanted).sum())
        signal += float(np.square(wanted).sum())
    if signal == 0:
        return 0.0 if noise == 0 else math.inf
    return math.sqrt(noise / signal)
