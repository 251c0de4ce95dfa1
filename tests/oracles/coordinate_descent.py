"""Coordinate descent on a quantized weight in float64, from Behdin et al. 2023, "QuantEase", algorithm 1.

The error is written down again for every step; nothing is carried from one column to the next.
"""

from __future__ import annotations

import numpy as np


def error(W: np.ndarray, approximation: np.ndarray, H: np.ndarray) -> np.ndarray:
    """(w - ŵ) H (w - ŵ)ᵀ of each row."""
    D = W - approximation
    return np.asarray(np.einsum("nk,kl,nl->n", D, H, D))


def sweep(
    W: np.ndarray, codes: np.ndarray, scale: np.ndarray, zero: np.ndarray, H: np.ndarray, bounds: tuple[int, int],
    group: int,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Codes [N, K] and scales [N, groups] after one sweep; H [K, K] is damped already."""
    codes, scale = codes.astype(np.float64), scale.astype(np.float64).copy()
    K = W.shape[1]
    group_of = np.arange(K) // group

    def weight() -> np.ndarray:
        return np.asarray((codes - zero[:, group_of]) * scale[:, group_of])

    for g in range(scale.shape[1]):
        members = np.flatnonzero(group_of == g)
        for j in members:
            others = np.delete(np.arange(K), j)
            best = W[:, j] + (W - weight())[:, others] @ H[others, j] / H[j, j]
            codes[:, j] = np.clip(np.round(best / scale[:, g]) + zero[:, g], *bounds)
        for n in range(len(W)):
            # The error as a polynomial in the scale: a s² + b s + c, least at -b / 2a.
            direction = np.zeros(K)
            direction[members] = codes[n, members] - zero[n, g]
            rest = W[n] - weight()[n] + direction * scale[n, g]
            if direction.any():
                scale[n, g] = np.float32((direction @ H @ rest) / (direction @ H @ direction))
    return codes, scale
