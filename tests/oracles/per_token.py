"""Products of activations and weights in integers with scales found at run time, float64.

`vector_wise` is from Dettmers et al. 2022, "LLM.int8()", section 2.2, eq. 3 and 4; `tensor_wise` from the definition of
ONNX's DynamicQuantizeLinear.
"""

from __future__ import annotations

import numpy as np


def absmax_codes(rows: np.ndarray, qmax: float = 127) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scaling constants c = qmax / max |row| along the last axis: Q = round(c x); c = 1 for zeros."""
    largest = np.abs(rows.astype(np.float64)).max(axis=-1, keepdims=True)
    constants = np.where(largest == 0, 1.0, qmax / np.where(largest == 0, 1.0, largest))
    return np.round(rows * constants), constants


def vector_wise(x: np.ndarray, w: np.ndarray, qmax: float = 127) -> np.ndarray:
    """x [..., K] times w [K, N]: C ≈ (Q_x Q_w) / (c_x ⊗ c_w), a constant for each row of x and each column of w."""
    q_x, c_x = absmax_codes(x, qmax)
    q_w, c_w = absmax_codes(w.T)
    return np.asarray((q_x @ q_w.T) / (c_x * c_w[:, 0]))


def tensor_wise(x: np.ndarray) -> np.ndarray:
    """x in uint8 and back, one scale and zero point: s = (max - min) / 255, z = round(-min / s), 0 in range."""
    low, high = min(0.0, float(x.min())), max(0.0, float(x.max()))
    scale = (high - low) / 255 or 1.0
    zero_point = np.clip(np.round(-low / scale), 0, 255)
    return np.asarray((np.clip(np.round(x.astype(np.float64) / scale) + zero_point, 0, 255) - zero_point) * scale)
