"""A linear layer in integers, float64, from Jacob et al. 2018, "Quantization and Training …", eq. 1 to 4."""

from __future__ import annotations

import numpy as np


def affine(lo: float, hi: float, qmin: int, qmax: int) -> tuple[float, int]:
    """Scale and zero point with which qmin … qmax cover lo … hi and 0 is exact: r = S (q - Z)."""
    lo, hi = min(lo, 0.0), max(hi, 0.0)
    scale = (hi - lo) / (qmax - qmin) or 1.0
    return scale, int(np.clip(np.round(qmin - lo / scale), qmin, qmax))


def codes(x: np.ndarray, scale: np.ndarray | float, zero_point: np.ndarray | int, qmin: int, qmax: int) -> np.ndarray:
    """q = clamp(round(r / S) + Z), ties to even; the division is float32, as QuantizeLinear defines it."""
    ratio = (x.astype(np.float32) / np.asarray(scale, np.float32)).astype(np.float64)
    return np.clip(np.round(ratio) + zero_point, qmin, qmax).astype(np.int64)


def product(
    q_x: np.ndarray, s_x: float, z_x: int, q_w: np.ndarray, s_w: np.ndarray | float, z_w: np.ndarray | int,
    bias: np.ndarray | None = None,
) -> np.ndarray:  # fmt: skip
    """y = S_x S_w Σ_k (q_x - Z_x)(q_w - Z_w) + b for codes [..., K] and [K, N]; S_w is one number, or one a column."""
    sums = (q_x.astype(np.int64) - z_x) @ (q_w.astype(np.int64) - z_w)
    y = sums.astype(np.float64) * s_x * np.asarray(s_w, np.float64)
    return y if bias is None else y + bias.astype(np.float64)


def rounded_rows(rows: np.ndarray, bounds: tuple[int, int], symmetric: bool, size: int | None) -> np.ndarray:
    """rows [channels, inputs], each rounded with one scale (or one for each `size` inputs) and dequantized.

    Symmetric: ±absmax is ±127 in 8 bits (±32767 in 16), and the middle of the whole range, ±7.5, in 4 bits and fewer.
    """
    qmin, qmax = bounds
    levels = qmax - qmin
    out = np.empty(rows.shape)
    for channel, row in enumerate(rows.astype(np.float64)):
        for start in range(0, row.size, size or row.size):
            part = row[start : start + (size or row.size)]
            if symmetric:
                scale = np.abs(part).max() / (levels / 2 if levels < 255 else levels // 2) or 1.0
                zero = (qmin + qmax + 1) // 2
            else:
                scale, zero = affine(part.min(), part.max(), qmin, qmax)
            stored = float(np.float32(scale))
            out[channel, start : start + part.size] = (codes(part, stored, zero, qmin, qmax) - zero) * stored
    return out
