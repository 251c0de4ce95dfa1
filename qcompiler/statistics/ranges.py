"""Statistics that choose one range for a whole tensor: what static activation scales are made of."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Self

import numpy as np
import numpy.typing as npt

from qcompiler.errors import SchemeError
from qcompiler.formats.arithmetic import dequantize, quantize, scale_and_zero_point
from qcompiler.formats.scheme import PerTensor, Scheme
from qcompiler.statistics import histogram
from qcompiler.statistics.rows import token_weights
from qcompiler.statistics.statistic import Array, Range, Statistic, finite

# Values that a histogram counts at once: it bounds the indices, 8 bytes each.
_VALUES_AT_ONCE = 1 << 20


@dataclass(eq=False)
class MinMax(Statistic):
    """The least and the largest value of the tensor → `Range`."""

    lo: float | None = field(default=None, init=False)
    hi: float | None = field(default=None, init=False)

    def update(self, batch: Array) -> None:
        values = finite(batch)
        if values.size:
            self._widen(float(values.min()), float(values.max()))

    def merge(self, other: Self) -> None:
        if (seen := other._seen()) is not None:
            self._widen(*seen)

    def _widen(self, lo: float, hi: float) -> None:
        self.lo = lo if self.lo is None else min(self.lo, lo)
        self.hi = hi if self.hi is None else max(self.hi, hi)

    def _seen(self) -> tuple[float, float] | None:
        if self.lo is None:
            return None
        assert self.hi is not None  # both or none
        return self.lo, self.hi

    def result(self) -> Range:
        if (seen := self._seen()) is None:
            raise self.no_data()
        return Range(*seen)


@dataclass(eq=False)
class MovingAverageMinMax(Statistic):
    """Exponential moving averages of each batch's least and largest value → `Range`.

    average ← momentum · average + (1 - momentum) · batch, beginning with the first batch. It depends on how the data is
    batched and on its order; merging with a shard of *later* batches gives what one pass over all of them would.
    """

    momentum: float = 0.9
    average: Array | None = field(default=None, init=False)  # [lo, hi]
    first: Array | None = field(default=None, init=False)  # [lo, hi] of the first batch, which came in at full weight
    batches: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise SchemeError(f"MovingAverageMinMax takes a momentum from 0 to below 1, not {self.momentum}.")

    def update(self, batch: Array) -> None:
        values = finite(batch)
        if values.size == 0:
            return
        ends = np.array([values.min(), values.max()], np.float64)
        if self.average is None:
            self.first = self.average = ends
        else:
            self.average = self.momentum * self.average + (1 - self.momentum) * ends
        self.batches += 1

    def merge(self, other: Self) -> None:
        if other.average is None:
            return
        assert other.first is not None  # both or none
        if self.average is None:
            self.average, self.first, self.batches = other.average, other.first, other.batches
            return
        # Had `other` gone on from here, its first batch would have met this average and not stood for it.
        self.average = other.average + self.momentum**other.batches * (self.average - other.first)
        self.batches += other.batches

    def result(self) -> Range:
        if self.average is None:
            raise self.no_data()
        return Range(float(self.average[0]), float(self.average[1]))


@dataclass(eq=False)
class _HistogramStatistic(Statistic):
    """What Percentile, Entropy and MSE share: counts in 16 bytes × bins, which widen as values grow."""

    bins: int = field(default=8192, kw_only=True)
    counts: Array | None = field(default=None, init=False)
    exponent: int = field(default=histogram.FINEST_EXPONENT, init=False)
    lo: float = field(default=math.inf, init=False)
    hi: float = field(default=-math.inf, init=False)

    def __post_init__(self) -> None:
        if self.bins < 16 or self.bins.bit_count() != 1:
            raise SchemeError(f"{type(self).__name__} takes a power of two of at least 16 for bins, not {self.bins}.")

    def update(self, batch: Array) -> None:
        values = finite(batch).reshape(-1)
        for start in range(0, values.size, _VALUES_AT_ONCE):
            self._count(values[start : start + _VALUES_AT_ONCE])

    def _count(self, values: npt.NDArray[np.float32], weights: npt.NDArray[np.float64] | None = None) -> None:
        lo, hi = float(values.min()), float(values.max())
        exponent = histogram.exponent_for(max(-lo, hi), self.bins)
        self._add(lo, hi, max(exponent, self.exponent), lambda e: histogram.counted(values, e, self.bins, weights))

    def merge(self, other: Self) -> None:
        counts = other.counts
        if counts is None:
            return
        exponent = max(self.exponent, other.exponent)
        self._add(other.lo, other.hi, exponent, lambda e: histogram.coarsened(counts, e - other.exponent))

    def _add(self, lo: float, hi: float, exponent: int, counts_at: Callable[[int], Array]) -> None:
        added = counts_at(exponent)
        mine = 0 if self.counts is None else histogram.coarsened(self.counts, exponent - self.exponent)
        self.counts, self.exponent = mine + added, exponent
        self.lo, self.hi = min(self.lo, lo), max(self.hi, hi)

    def _measured(self) -> tuple[Array, float]:
        """The counts and the width of a bin; raises where nothing was counted."""
        if self.counts is None:
            raise self.no_data()
        return self.counts, math.ldexp(1.0, self.exponent)


@dataclass(eq=False)
class Percentile(_HistogramStatistic):
    """The range that holds `percent` % of the values, equal shares cut off at both ends → `Range`."""

    percent: float = 99.99

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.percent <= 100:
            raise SchemeError(f"Percentile takes a percent above 0 and up to 100, not {self.percent}.")

    def result(self) -> Range:
        counts, width = self._measured()
        lo, hi = histogram.quantile_range(counts, width, self.percent)
        return Range(max(lo, self.lo), min(hi, self.hi))


@dataclass(eq=False)
class Entropy(_HistogramStatistic):
    """The symmetric range whose `bits`-bit histogram diverges least from the float one → `Range`.

    KL divergence over the magnitudes, after Migacz, "8-bit inference with TensorRT" (GTC 2017): see
    `histogram.entropy_bins`. Exact zeros are not counted: they are exact whatever the range, and a heap of them (after
    a ReLU) would pull the range towards 0. The answer is cut to the values that occur: 0 … t where none is negative.
    """

    bins: int = field(default=2048, kw_only=True)
    bits: int = 8
    zeros: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 2 <= self.bits <= 8 or self.bins < 4 * 2**self.bits:
            raise SchemeError(
                f"Entropy takes 2 to 8 bits and at least {4 * 2**self.bits} bins for {self.bits} bits, not {self.bins}."
            )

    def _count(self, values: npt.NDArray[np.float32], weights: npt.NDArray[np.float64] | None = None) -> None:
        super()._count(values, weights)
        self.zeros += int((values == 0).sum())

    def merge(self, other: Self) -> None:
        super().merge(other)
        self.zeros += other.zeros

    def result(self) -> Range:
        counts, width = self._measured()
        magnitudes = counts[self.bins :] + counts[: self.bins][::-1]
        # Bin 0 holds exact zeros and the smallest values alike; `zeros` says how many of the former there are.
        magnitudes[0] -= self.zeros
        lo, hi = min(self.lo, 0.0), max(self.hi, 0.0)
        if not magnitudes.any():
            return Range(lo, hi)
        threshold = (histogram.entropy_bins(magnitudes, 2 ** (self.bits - 1)) + 0.5) * width
        return Range(max(lo, -threshold), min(hi, threshold))


@dataclass(eq=False)
class MSE(_HistogramStatistic):
    """The range with which quantizing the values to `format` gives the least mean squared error → `Range`.

    `per_token` takes the mean over tokens of relative errors: a value counts by 1 / Σ x² of its row (`rows.py`).
    """

    format: str = "uint8"
    symmetric: bool = False
    per_token: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._scheme()

    def _scheme(self) -> Scheme:
        return Scheme(self.format, PerTensor(), self.symmetric)

    def update(self, batch: Array) -> None:
        if not self.per_token:
            super().update(batch)
            return
        rows = np.atleast_2d(finite(batch))
        rows = rows.reshape(-1, rows.shape[-1])
        step = max(1, _VALUES_AT_ONCE // max(1, rows.shape[1]))
        for start in range(0, rows.shape[0] if rows.size else 0, step):
            part = rows[start : start + step]
            self._count(part.reshape(-1), np.repeat(token_weights(part), part.shape[1]))

    def result(self) -> Range:
        counts, width = self._measured()
        scheme, filled = self._scheme(), np.flatnonzero(counts)
        weights = counts[filled].astype(np.float64)
        centres = np.clip((filled - self.bins + 0.5) * width, self.lo, self.hi).astype(np.float32)

        def error(lo: float, hi: float) -> float:
            scale, zero_point = scale_and_zero_point(lo, hi, scheme)
            codes = quantize(centres, scale, zero_point, scheme.format)
            restored = dequantize(codes, scale, zero_point, format=scheme.format)
            return float(weights @ np.square(restored.astype(np.float64) - centres))

        lo, hi = min(self.lo, 0.0), max(self.hi, 0.0)
        return Range(*histogram.least_error_range(lo, hi, self.symmetric, error))
