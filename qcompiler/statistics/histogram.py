"""A histogram that grows with what it counts, and the choice of a range from one.

A bin's width is a power of two, 2**exponent, and bin 0 begins at 0. So a histogram can be made coarser exactly, by
adding neighbours, and two of them can be merged exactly: the result is the same however the data was cut into shards.
`counts` has 2·bins entries for the bins -bins … bins-1, `bins` a power of two; at least half of one side is in use.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

Counts = npt.NDArray[np.int64]

TURNS = 2  # of the search for each end of a range
# The width of bins before anything but 0 was seen: finer than float32 ever needs.
FINEST_EXPONENT = -200

# Ratios that the MSE search shrinks a range by: 1 … 1/1024 in steps of 1/8 octave, then ±1/8 octave around the best.
_COARSE_RATIOS = 2.0 ** (-np.arange(81) / 8)
_FINE_RATIOS = 2.0 ** (np.arange(-7, 8) / 64)


def exponent_for(magnitude: float, bins: int) -> int:
    """The least exponent with which `bins` bins hold all values of at most `magnitude`."""
    if magnitude == 0:
        return FINEST_EXPONENT
    return math.frexp(magnitude)[1] - (bins.bit_length() - 1)


def coarsened(counts: Counts, steps: int) -> Counts:
    """The histogram with bins 2**steps as wide."""
    if steps == 0:
        return counts
    bins = counts.size // 2
    coarse = np.zeros_like(counts)
    np.add.at(coarse, bins + (np.arange(-bins, bins) >> min(steps, 62)), counts)
    return coarse


def counted(
    values: npt.NDArray[np.float32], exponent: int, bins: int, weights: npt.NDArray[np.float64] | None = None
) -> npt.NDArray[Any]:
    """The histogram of values that all fit, each counted once or by its weight."""
    places = np.floor(values.astype(np.float64) * 2.0**-exponent).astype(np.int64)
    found = np.bincount(places + bins, weights, minlength=2 * bins)
    return found.astype(np.int64) if weights is None else found


def quantile_range(counts: Counts, width: float, percent: float) -> tuple[float, float]:
    """The range that holds `percent` % of the values, with equal shares cut off at both ends, linear within a bin."""
    bins, total = counts.size // 2, int(counts.sum())
    below = np.concatenate([[0], np.cumsum(counts)])
    cut = total * (100 - percent) / 200
    first = int(np.searchsorted(below, cut, side="right")) - 1
    last = int(np.searchsorted(below, total - cut, side="left")) - 1
    lo = first + (cut - below[first]) / counts[first] - bins
    hi = last + (total - cut - below[last]) / counts[last] - bins
    return float(lo * width), float(hi * width)


def entropy_bins(counts: Counts, levels: int) -> int:
    """How many of the leading bins of a histogram of magnitudes to keep, for the least loss of information.

    For each number of bins i, the reference P is the first i bins, with all that lies beyond added to the last of them;
    the candidate Q is the first i bins merged into `levels` levels, each spread evenly over its non-empty bins. The
    answer is the i with the least KL(P‖Q) (Migacz, "8-bit inference with TensorRT", GTC 2017).
    """
    used = int(np.flatnonzero(counts)[-1]) + 1
    if used <= levels:
        return used
    beyond = counts.sum() - np.cumsum(counts)
    divergences = [_divergence(counts[:i], int(beyond[i - 1]), levels) for i in range(levels, used + 1)]
    return levels + int(np.argmin(divergences))


def _divergence(kept: Counts, beyond: int, levels: int) -> float:
    """KL(P‖Q) of `entropy_bins`; infinite where Q has nothing at a bin in which P has something."""
    if beyond and kept[-1] == 0:
        return math.inf
    filled = kept > 0
    if not filled.any():
        return math.inf
    level = np.arange(kept.size) * levels // kept.size
    mass = np.bincount(level, kept, levels)
    share = np.bincount(level, filled, levels)
    candidate = (mass / np.maximum(share, 1))[level][filled]
    reference = kept[filled].astype(np.float64)
    if beyond:
        reference[-1] += beyond
    reference /= reference.sum()
    return float(reference @ np.log(reference * (candidate.sum() / candidate)))


def least_error_range(
    lo: float, hi: float, symmetric: bool, error: Callable[[float, float], float]
) -> tuple[float, float]:
    """The part of lo ≤ 0 ≤ hi whose `error(lo, hi)` is least: both ends shrunk together, then in turns by themselves.

    Each turn looks at all of its end again: where one side alone is loud, both together are shrunk too far.
    """
    ratio = _least(lambda ratio: error(lo * ratio, hi * ratio))
    best_lo, best_hi = lo * ratio, hi * ratio
    for _ in range(0 if symmetric else TURNS):
        best_hi = hi * _least(lambda ratio, lo=best_lo: error(lo, hi * ratio))  # type: ignore[misc]
        best_lo = lo * _least(lambda ratio, hi=best_hi: error(lo * ratio, hi))  # type: ignore[misc]
    return best_lo, best_hi


def _least(error: Callable[[float], float]) -> float:
    """The ratio of least error, to 1/64 octave around the best 1/8."""
    best = min(_COARSE_RATIOS, key=error)
    return float(min(np.minimum(best * _FINE_RATIOS, 1.0), key=error))
