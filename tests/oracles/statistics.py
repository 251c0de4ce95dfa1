"""Every statistic in float64 on all the data at once, from its definition or paper."""

from __future__ import annotations

import math

import numpy as np

from tests.oracles.arithmetic import asymmetric_parameters


def moving_average(batches: list[np.ndarray], momentum: float) -> tuple[float, float]:
    """average ← momentum · average + (1 - momentum) · batch, beginning with the first batch."""
    lo, hi = float(batches[0].min()), float(batches[0].max())
    for batch in batches[1:]:
        lo = momentum * lo + (1 - momentum) * float(batch.min())
        hi = momentum * hi + (1 - momentum) * float(batch.max())
    return lo, hi


def percentile_brackets(values: np.ndarray, percent: float) -> tuple[tuple[float, float], tuple[float, float]]:
    """The neighbouring samples between which each end lies, whichever usual definition of a quantile is meant."""
    ordered = np.sort(values.astype(np.float64))
    cut = int(ordered.size * (100 - percent) / 200)
    inner = ordered[min(cut + 1, ordered.size - 1)], ordered[max(ordered.size - 2 - cut, 0)]
    outer = ordered[max(cut - 1, 0)], ordered[min(ordered.size - cut, ordered.size - 1)]
    return (float(outer[0]), float(inner[0])), (float(inner[1]), float(outer[1]))


def entropy_threshold(values: np.ndarray, levels: int, bins: int, width: float) -> float:
    """The pseudocode of Migacz, "8-bit inference with TensorRT" (GTC 2017), with loops in the place of its words."""
    histogram = [0.0] * bins
    for value in np.abs(values.astype(np.float64)):
        if value != 0:
            histogram[min(int(value / width), bins - 1)] += 1
    used = max(i for i, count in enumerate(histogram) if count) + 1
    best, best_divergence = used, math.inf
    for i in range(levels, used + 1):
        reference = histogram[:i]
        reference[i - 1] += sum(histogram[i:])
        candidate = [0.0] * i
        for level in range(levels):
            members = [j for j in range(i) if j * levels // i == level]
            filled = [j for j in members if histogram[j]]
            for j in filled:
                candidate[j] = sum(histogram[k] for k in members) / len(filled)
        if sum(candidate) == 0:
            continue
        divergence = 0.0
        for p, q in zip(reference, candidate, strict=True):
            if p:
                p, q = p / sum(reference), q / sum(candidate)
                divergence += p * math.log(p / q) if q else math.inf
        if divergence < best_divergence:
            best, best_divergence = i, divergence
    return (best + 0.5) * width


def rounding_error(values: np.ndarray, lo: float, hi: float, bits: int, symmetric: bool) -> float:
    """Mean squared error of rounding to `bits` bits over the range lo … hi."""
    x, top = values.astype(np.float64), 2**bits - 1
    if symmetric:
        scale, zero = max(-lo, hi) / (2 ** (bits - 1) - 1 if bits >= 8 else top / 2), 2 ** (bits - 1)
    else:
        scale, zero = asymmetric_parameters(lo, hi, 0, top)
    codes = np.clip(np.rint(x / scale) + zero, 0, top)
    return float(np.mean(((codes - zero) * scale - x) ** 2))


def least_rounding_error(values: np.ndarray, bits: int, symmetric: bool) -> float:
    """The least of `rounding_error` over a dense grid of ranges, both ends by themselves."""
    lo, hi = min(0.0, float(values.min())), max(0.0, float(values.max()))
    ratios = np.geomspace(0.005, 1, 60)
    pairs = [(r, r) for r in np.geomspace(0.005, 1, 400)] if symmetric else [(a, b) for a in ratios for b in ratios]
    return min(rounding_error(values, lo * a, hi * b, bits, symmetric) for a, b in pairs)
