"""Half-quadratic quantization of one group in float64, from Badri and Shaji 2023, section 2."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

BETA, KAPPA, P = 1.0, 1.01, 0.7
Function = Callable[..., Any]


def shrink(x: np.ndarray, beta: float) -> np.ndarray:
    """Equation 6, the generalised soft threshold: sign(x) relu(|x| - |x|^(p-1) / β), 0 at 0."""
    safe = np.where(x == 0, 1.0, np.abs(x))
    return np.where(x == 0, 0.0, np.sign(x) * np.maximum(safe - safe ** (P - 1) / beta, 0))


def minimise(w: np.ndarray, start: float, levels: Function, restore: Function, solve: Function, rounds: int) -> float:
    """Alternate equations 5 and 7 or 8 until the error grows; the parameter with the least error."""
    best, least, parameter, beta = start, np.inf, start, BETA
    for _ in range(rounds):
        q = levels(parameter)
        error = w - restore(q, parameter)
        loss = np.sum(np.abs(error) ** P)
        if loss >= least:
            break
        best, least = parameter, loss
        parameter, beta = solve(w - shrink(error, beta), q), beta * KAPPA
    return best


def fit(group: np.ndarray, scale: float, zero: int, qmin: int, qmax: int, rounds: int = 20) -> tuple[float, int]:
    """Scale and whole zero point: the real one's neighbours and the start's, each with a scale fitted to it."""
    w = group.astype(np.float64) / scale
    real = minimise(w, zero, lambda z: np.clip(np.round(w + z), qmin, qmax), lambda q, z: q - z,
                    lambda wanted, q: np.mean(q - wanted), rounds)  # fmt: skip
    best = scale, zero
    for z in (zero, *(int(np.clip(f(real), qmin, qmax)) for f in (np.floor, np.ceil))):
        factor = minimise(w, 1.0, lambda s, z=z: np.clip(np.round(w / s), qmin - z, qmax - z), lambda q, s: q * s,
                          lambda wanted, q: (wanted @ q / (q @ q)) if np.any(q) else 1.0, rounds)  # fmt: skip
        candidate = float(np.float32(factor * scale)), z
        start, least, now = (errors(group, *item, qmin, qmax) for item in ((scale, zero), best, candidate))
        if now[0] < least[0] and now[1] <= start[1]:
            best = candidate
    return best


def errors(group: np.ndarray, scale: float, zero: int, qmin: int, qmax: int) -> tuple[float, float]:
    """Σ |error|^p and Σ error²."""
    error = np.abs(group - (np.clip(np.round(group / scale), qmin - zero, qmax - zero)) * scale)
    return float(np.sum(error**P)), float(np.sum(error**2))
