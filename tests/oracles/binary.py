"""Binary weights in float64, from Rastegari et al. 2016, "XNOR-Net", section 3.1: one filter at a time.

J(B, α) = ‖W - αB‖² = α²n - 2α WᵀB + WᵀW is least for B = sign(W) and α = WᵀB / n = ‖W‖₁ / n (eq. 3 to 6).
"""

from __future__ import annotations

from itertools import product

import numpy as np


def binarized(filter: list[float], importance: list[float] | None = None) -> tuple[list[int], float]:
    """B and α of one filter. With importances h the error is Σ h (w - αb)², whose α is Σ h w b / Σ h."""
    h = importance or [1.0] * len(filter)
    B = [-1 if w < 0 else 1 for w in filter]
    weight = sum(h)
    return B, sum(i * w * b for i, w, b in zip(h, filter, B, strict=True)) / weight if weight else 0.0


def restored(rows: np.ndarray, size: int | None = None, importance: np.ndarray | None = None) -> np.ndarray:
    """The matrix [N, K] that signs and magnitudes stand for; `size` inputs share a magnitude, all of a row if None."""
    out = np.empty(rows.shape)
    step = size or rows.shape[1]
    for n, row in enumerate(rows.astype(np.float64)):
        for start in range(0, row.size, step):
            part = slice(start, start + step)
            B, alpha = binarized(row[part].tolist(), None if importance is None else importance[part].tolist())
            out[n, part] = [alpha * b for b in B]
    return out


def least_error(filter: list[float]) -> float:
    """min over all 2ⁿ sign vectors, each with its best α, of ‖W - αB‖²."""
    W, errors = np.array(filter), []
    for signs in product((-1, 1), repeat=len(filter)):
        B = np.array(signs)
        errors.append(float(((W - W @ B / W.size * B) ** 2).sum()))
    return min(errors)
