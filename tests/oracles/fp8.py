"""Linear layers in 8-bit floats, float64: Micikevicius et al. 2022, "FP8 Formats for Deep Learning", section 3, for the
formats, and Grattafiori et al. 2024, "The Llama 3 Herd of Models", section 6.2, for scales of rows with an upper bound.
"""

from __future__ import annotations

import numpy as np

FORMATS = {"fp8_e4m3": (3, -6, 448.0), "fp8_e5m2": (2, -14, 57344.0)}
"""Bits after the leading one, the least exponent of a normal number, the largest number."""


def nearest(x: np.ndarray, format: str) -> np.ndarray:
    """The nearest number of the format, a tie to the even one; what is beyond the largest, infinity too, becomes it."""
    bits, least, largest = FORMATS[format]
    bounded = np.clip(x.astype(np.float64), -largest, largest)
    exponent = np.maximum(np.frexp(bounded)[1] - 1, least)  # |x| = 1.… × 2^exponent
    step = np.exp2(exponent - bits)
    return np.asarray(np.copysign(np.round(bounded / step) * step, bounded))


def rounded(x: np.ndarray, format: str, axis: int | None = None, cap: float = np.inf) -> np.ndarray:
    """x rounded with a scale for what lies along `axis` (all of x: None): s = min(max |x|, cap) / largest.

    Scales are float32 numbers, and x / s is, because ties are where these two put them.
    """
    absmax = np.minimum(np.abs(x.astype(np.float64)).max(axis=axis, keepdims=True), cap)
    scale = np.where(absmax == 0, 1.0, absmax / FORMATS[format][2]).astype(np.float32)
    return nearest(x.astype(np.float32) / scale, format) * scale.astype(np.float64)


def row_wise(x: np.ndarray, w: np.ndarray, format: str, activation_format: str, cap: float = np.inf) -> np.ndarray:
    """x [..., K] times w [K, N]: a scale for each row of x, bounded, times one for each column of w."""
    return np.asarray(rounded(x, activation_format, axis=-1, cap=cap) @ rounded(w, format, axis=0))


def tensor_wise(x: np.ndarray, w: np.ndarray, format: str, activation_format: str, absmax: float) -> np.ndarray:
    """The same with one scale for w and one for all inputs, made for the magnitude `absmax`."""
    scale = np.float32(absmax / FORMATS[activation_format][2])
    inputs = nearest(x.astype(np.float32) / scale, activation_format) * np.float64(scale)
    return np.asarray(inputs @ rounded(w, format))
