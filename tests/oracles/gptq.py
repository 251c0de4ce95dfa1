"""GPTQ in float64, from Frantar et al. 2022, "GPTQ", equations 2 and 3: one weight at a time, H⁻¹ shrunk after each.

No Cholesky factor, no blocks: the inverse of the remaining Hessian is updated by eliminating one row and column.
"""

from __future__ import annotations

import numpy as np

from tests.oracles.quantized_linear import affine


def grid(part: np.ndarray, bounds: tuple[int, int], symmetric: bool) -> tuple[np.ndarray, np.ndarray]:
    """Scale and zero point [N] of the rows of part [N, k], as the library stores them (float32)."""
    qmin, qmax = bounds
    if symmetric:
        divisor = (qmax - qmin) / 2 if qmax - qmin < 255 else qmax - qmin >> 1
        peak = np.abs(part).max(1)
        return np.where(peak > 0, peak / divisor, 1.0).astype(np.float32), np.full(len(part), (qmin + qmax + 1) // 2)
    found = [affine(row.min(), row.max(), qmin, qmax) for row in part]
    return np.array([scale for scale, _ in found], np.float32), np.array([zero for _, zero in found])


def gptq(
    W: np.ndarray, H: np.ndarray, bounds: tuple[int, int], *,
    symmetric: bool = False, group: int | None = None, damping: float = 0.01, act_order: bool = False,
) -> np.ndarray:  # fmt: skip
    """The dequantized weight [N, K] for W [N, K] and H = E[x xᵀ] [K, K] of inputs x that are all alive."""
    W = W.astype(np.float64).copy()
    K, size = W.shape[1], group or W.shape[1]
    remaining = np.linalg.inv(H.astype(np.float64) + damping * np.mean(np.diag(H)) * np.eye(K))
    grids = {start: grid(W[:, start : start + size], bounds, symmetric) for start in range(0, K, size)}
    out = np.empty_like(W)
    for q in np.argsort(-np.diag(H), kind="stable") if act_order else range(K):
        start = q - q % size
        if start == q and not act_order:
            grids[start] = grid(W[:, start : start + size], bounds, symmetric)
        scale, zero = grids[start]
        codes = np.clip(np.round(W[:, q] / scale) + zero, *bounds)
        out[:, q] = (codes - zero) * scale
        error = (W[:, q] - out[:, q]) / remaining[q, q]  # equation 2
        W -= np.outer(error, remaining[q])
        remaining -= np.outer(remaining[:, q], remaining[q]) / remaining[q, q]  # equation 3
        W[:, q] = out[:, q]  # done, and out of the reach of the columns still to come
        remaining[q] = remaining[:, q] = 0.0
    return out
