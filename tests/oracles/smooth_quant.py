"""SmoothQuant in float64, from Xiao et al. 2023, "SmoothQuant", section 4 and equation 4."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def scales(X: np.ndarray, Ws: Sequence[np.ndarray], alpha: float) -> np.ndarray:
    """s_j = max|X_j|^α / max|W_j|^(1-α), where W_j is row j of all the weights [K, N_i] that read X [M, K]."""
    x_max = np.abs(X.astype(np.float64)).max(axis=0)
    w_max = np.abs(np.concatenate([W.astype(np.float64) for W in Ws], axis=1)).max(axis=1)
    return np.asarray(x_max**alpha / w_max ** (1 - alpha))


def smoothed(X: np.ndarray, Ws: Sequence[np.ndarray], s: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """X diag(s)^-1 and diag(s) W (equation 3)."""
    return X.astype(np.float64) / s, [W.astype(np.float64) * s[:, None] for W in Ws]


def rounded_activation(X: np.ndarray, bits: int = 8, measured: np.ndarray | None = None) -> np.ndarray:
    """Per tensor, asymmetric: the integer grid that covers min … max of what was measured (X itself) and holds 0."""
    seen = X if measured is None else measured
    lo, hi = min(seen.min(), 0.0), max(seen.max(), 0.0)
    step = (hi - lo) / (2**bits - 1)
    zero = np.round(-lo / step)
    return np.asarray((np.clip(np.round(X / step) + zero, 0, 2**bits - 1) - zero) * step)


def rounded_weight(W: np.ndarray, bits: int = 8) -> np.ndarray:
    """Per output channel (column), symmetric."""
    top = 2 ** (bits - 1) - 1
    step = np.abs(W).max(axis=0) / top
    step[step == 0] = 1.0
    return np.asarray(np.clip(np.round(W / step), -top, top) * step)


def product_error(X: np.ndarray, Ws: Sequence[np.ndarray], s: np.ndarray) -> float:
    """Σ_i ‖X W_i - X̂ Ŵ_i‖² / ‖X W_i‖², with the smoothed X and W_i really rounded to 8 bits."""
    X_s, Ws_s = smoothed(X, Ws, s)
    total = 0.0
    for W, W_s in zip(Ws, Ws_s, strict=True):
        exact = X.astype(np.float64) @ W.astype(np.float64)
        total += np.sum((rounded_activation(X_s) @ rounded_weight(W_s) - exact) ** 2) / np.sum(exact**2)
    return float(total)


def unseen_error(X: np.ndarray, new: np.ndarray, Ws: Sequence[np.ndarray], s: np.ndarray) -> float:
    """`product_error` of new rows, whose range was measured on X."""
    total = 0.0
    for W in Ws:
        exact = new.astype(np.float64) @ W.astype(np.float64)
        rounded = rounded_activation(new / s, measured=X / s) @ rounded_weight(W * s[:, None])
        total += np.sum((rounded - exact) ** 2) / np.sum(exact**2)
    return float(total)
