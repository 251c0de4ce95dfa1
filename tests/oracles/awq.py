"""AWQ in float64, from Lin et al. 2023, "AWQ", section 3.2, with the magnitude of a channel as its root mean square.

Every mean is over tokens, each weighed by 1 / Σ (x / usual)², where usual is (mean √|x|)² of the channel, and
none more than the median token: no loud token decides alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def weighed(X: np.ndarray) -> np.ndarray:
    """X [M, K] with each row times the root of its weight, the weights having the mean 1."""
    usual = np.mean(np.sqrt(np.abs(X.astype(np.float64))), axis=0) ** 2
    energies = np.sum((X / usual) ** 2, axis=1)
    weights = 1 / np.maximum(energies, np.median(energies))
    return np.asarray(X * np.sqrt(weights / weights.mean())[:, None])


def scales(X: np.ndarray, alpha: float) -> np.ndarray:
    """s_j = rms(X_j)^α / √(max s · min s) for the channels of X [M, K]."""
    s = np.sqrt(np.mean(weighed(X) ** 2, axis=0)) ** alpha
    return np.asarray(s / np.sqrt(s.max() * s.min()))


def rounded(W: np.ndarray, group_size: int, bits: int = 4, symmetric: bool = True) -> np.ndarray:
    """W [K, N] rounded to the nearest of 2^bits levels, a group of inputs of an output channel at a time."""
    W = W.astype(np.float64)
    out = np.empty_like(W)
    for start in range(0, W.shape[0], group_size):
        part = W[start : start + group_size]
        if symmetric:
            step = np.abs(part).max(axis=0) / ((2**bits - 1) / 2)
            zero = np.zeros_like(step)
            least, most = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        else:
            lo, hi = np.minimum(part.min(axis=0), 0), np.maximum(part.max(axis=0), 0)
            step = (hi - lo) / (2**bits - 1)
            zero = np.round(-lo / np.where(step == 0, 1, step))
            least, most = 0, 2**bits - 1
        step = np.where(step == 0, 1, step)
        out[start : start + group_size] = (np.clip(np.round(part / step) + zero, least, most) - zero) * step
    return out


def output_error(X: np.ndarray, Ws: Sequence[np.ndarray], s: np.ndarray, group_size: int, **scheme: Any) -> list[float]:
    """‖X W_i - (X / s) Q(s ⊙ W_i)‖² / ‖X W_i‖² of each layer, the layers really run."""
    X = weighed(X)
    errors = []
    for W in Ws:
        exact = X @ W.astype(np.float64)
        approximate = (X / s) @ rounded(W * s[:, None], group_size, **scheme)
        errors.append(float(np.sum((exact - approximate) ** 2) / np.sum(exact**2)))
    return errors


def search(
    X: np.ndarray, Ws: Sequence[np.ndarray], group_size: int, grid: int = 20, **scheme: int
) -> tuple[float, np.ndarray]:
    """The α of the grid with the least sum of relative output errors, and its scales."""
    alphas = [step / grid for step in range(grid + 1)]
    errors = [sum(output_error(X, Ws, scales(X, alpha), group_size, **scheme)) for alpha in alphas]
    best = alphas[int(np.argmin(errors))]
    return best, scales(X, best)
