"""Statistics of channels: ranges, magnitudes and moments, which survive a rescaling of their value."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Self

import numpy as np
import numpy.typing as npt

from qcompiler.errors import DataError, SchemeError
from qcompiler.statistics.rows import Typical
from qcompiler.statistics.statistic import Array, Range, Statistic, finite

# Rows of X that SecondMoment multiplies at once, and the columns of its result that it updates at once: they bound the
# temporary product to 1024 × channels.
_ROWS_AT_ONCE = 4096
_COLUMNS_AT_ONCE = 1024


@dataclass(eq=False)
class ChannelRange(Statistic):
    """Least and largest value of each channel along `axis` → (lo [C], hi [C]), float32; `tensor_range()` → `Range`."""

    axis: int = -1
    lo: Array | None = field(default=None, init=False)
    hi: Array | None = field(default=None, init=False)

    def update(self, batch: Array) -> None:
        values = finite(batch)
        others = _other_axes(values, self.axis, self.key)
        if values.size:
            self._widen(values.min(others), values.max(others))

    def merge(self, other: Self) -> None:
        if other.lo is not None and other.hi is not None:
            self._widen(other.lo, other.hi)

    def _widen(self, lo: Array, hi: Array) -> None:
        if self.lo is None or self.hi is None:
            self.lo, self.hi = lo, hi
            return
        _check_channels(self.key, self.lo.size, lo.size)
        self.lo, self.hi = np.minimum(self.lo, lo), np.maximum(self.hi, hi)

    def result(self) -> tuple[Array, Array]:
        if self.lo is None or self.hi is None:
            raise self.no_data()
        return self.lo, self.hi

    def tensor_range(self) -> Range:
        lo, hi = self.result()
        return Range(float(lo.min()), float(hi.max()))

    def rescaled(self, divisor: Array) -> Self | None:
        if self.axis != -1:
            return None
        lo, hi = self.result()
        ends = np.stack([lo, hi]) / _checked_divisor(divisor, lo.size, self.key)
        rescaled = self.fresh()
        rescaled.lo, rescaled.hi = ends.min(0), ends.max(0)
        return rescaled


@dataclass(eq=False)
class ChannelFolds(Statistic):
    """`ChannelRange` of up to `folds` stretches of the data apart → (lo [F, C], hi [F, C]), float32; last axis.

    What one stretch holds beyond the range of all others tells how far data that nobody has seen yet may go beyond the
    range of all. Each batch begins as two stretches; neighbours are joined when there are too many, so that a stretch
    is a contiguous piece of the data, and two of them can be as different as two texts. At least two, unless the data
    is a single row.
    """

    folds: int = 16
    lo: Array | None = field(default=None, init=False)
    hi: Array | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if self.folds < 2:
            raise SchemeError(f"ChannelFolds takes two folds or more, not {self.folds}.")

    def update(self, batch: Array) -> None:
        for rows in _row_chunks(batch, self.key):
            middle = len(rows) // 2
            halves = [half for half in (rows[:middle], rows[middle:]) if len(half)]
            self._append(np.stack([half.min(0) for half in halves]), np.stack([half.max(0) for half in halves]))

    def merge(self, other: Self) -> None:
        if other.lo is not None and other.hi is not None:
            self._append(other.lo, other.hi)

    def _append(self, lo: Array, hi: Array) -> None:
        if self.lo is not None and self.hi is not None:
            _check_channels(self.key, self.lo.shape[1], lo.shape[1])
            lo, hi = np.concatenate([self.lo, lo]), np.concatenate([self.hi, hi])
        while len(lo) > self.folds:
            pairs = range(0, len(lo), 2)
            lo = np.stack([lo[i : i + 2].min(0) for i in pairs])
            hi = np.stack([hi[i : i + 2].max(0) for i in pairs])
        self.lo, self.hi = lo, hi

    def result(self) -> tuple[Array, Array]:
        if self.lo is None or self.hi is None:
            raise self.no_data()
        return self.lo, self.hi

    def rescaled(self, divisor: Array) -> Self | None:
        lo, hi = self.result()
        ends = np.stack([lo, hi]) / _checked_divisor(divisor, lo.shape[1], self.key)
        rescaled = self.fresh()
        rescaled.lo, rescaled.hi = ends.min(0), ends.max(0)
        return rescaled


@dataclass(eq=False)
class ChannelAbsMax(Statistic):
    """Largest magnitude of each channel along `axis` → [C], float32: what SmoothQuant's scales are made of."""

    axis: int = -1
    absmax: Array | None = field(default=None, init=False)

    def update(self, batch: Array) -> None:
        values = finite(batch)
        others = _other_axes(values, self.axis, self.key)
        if values.size:
            self._widen(np.maximum(values.max(others), -values.min(others)))

    def merge(self, other: Self) -> None:
        if other.absmax is not None:
            self._widen(other.absmax)

    def _widen(self, absmax: Array) -> None:
        if self.absmax is None:
            self.absmax = absmax
            return
        _check_channels(self.key, self.absmax.size, absmax.size)
        self.absmax = np.maximum(self.absmax, absmax)

    def result(self) -> Array:
        if self.absmax is None:
            raise self.no_data()
        return self.absmax

    def rescaled(self, divisor: Array) -> Self | None:
        if self.axis != -1:
            return None
        absmax = self.result()
        rescaled = self.fresh()
        rescaled.absmax = absmax / np.abs(_checked_divisor(divisor, absmax.size, self.key))
        return rescaled


@dataclass(eq=False)
class ChannelMoments(Statistic):
    """Mean square E[x²] of each channel along the last axis → [C], float64; `count` is the number of rows.

    `per_token` weighs each row by 1 / Σ (x / usual)², where usual is what the channel mostly holds (`rows.py`), the
    weights having the mean 1.
    """

    per_token: bool = False
    total: Array | None = field(default=None, init=False)
    count: int = field(default=0, init=False)
    weight: float = field(default=0.0, init=False)
    """Of all rows together."""
    roots: Array | None = field(default=None, init=False)
    """Σ √|x| [C], where rows have weights: see `Typical`."""

    def update(self, batch: Array) -> None:
        for rows in _row_chunks(batch, self.key):
            if self.total is not None:
                _check_channels(self.key, self.total.size, rows.shape[1])
            squares = np.square(rows, dtype=np.float64)
            if self.per_token:
                weights, self.roots = _weights(rows, self.roots, self.count)
                self._add(weights @ squares, rows.shape[0], float(weights.sum()))
            else:
                self._add(squares.sum(0), rows.shape[0], float(rows.shape[0]))

    def merge(self, other: Self) -> None:
        if other.total is not None:
            self._add(other.total, other.count, other.weight)
            self.roots = _joined(self.roots, other.roots)

    def _add(self, total: Array, count: int, weight: float) -> None:
        if self.total is not None:
            _check_channels(self.key, self.total.size, total.size)
            total = self.total + total
        self.total, self.count, self.weight = total, self.count + count, self.weight + weight

    def result(self) -> Array:
        if self.total is None:
            raise self.no_data()
        return self.total / (self.weight or 1.0)

    def rescaled(self, divisor: Array) -> Self | None:
        if self.total is None:
            raise self.no_data()
        rescaled = self.fresh()
        rescaled.total = self.total / np.square(_checked_divisor(divisor, self.total.size, self.key))
        rescaled.count, rescaled.weight = self.count, self.weight
        rescaled.roots = _divided(self.roots, divisor, self.key)
        return rescaled


@dataclass(eq=False)
class SecondMoment(Statistic):
    """XᵀX / count of the rows X along the last axis → [C, C]; `count` is the number of rows.

    GPTQ's Hessian is twice this (Frantar et al. 2022, eq. 3). Products and sums are in `precision`, float32 or float64;
    memory is C² of it, and 1024 · C more while a batch is added. `per_token` weighs rows as in `ChannelMoments`.
    """

    precision: str = "float32"
    per_token: bool = False
    total: Array | None = field(default=None, init=False)
    count: int = field(default=0, init=False)
    weight: float = field(default=0.0, init=False)
    """Of all rows together."""
    roots: Array | None = field(default=None, init=False)
    """As in `ChannelMoments`."""

    def __post_init__(self) -> None:
        if self.precision not in ("float32", "float64"):
            raise SchemeError(f"SecondMoment takes precision float32 or float64, not {self.precision!r}.")

    def update(self, batch: Array) -> None:
        for rows in _row_chunks(batch, self.key):
            if self.total is not None:
                _check_channels(self.key, self.total.shape[0], rows.shape[1])
            weights = np.ones(rows.shape[0])
            if self.per_token:
                weights, self.roots = _weights(rows, self.roots, self.count)
            X = rows.astype(self.precision, copy=False)
            if self.per_token:
                X = X * np.sqrt(weights)[:, None].astype(self.precision)
            channels = X.shape[1]
            if self.total is None:
                self.total = np.zeros((channels, channels), self.precision)
            for start in range(0, channels, _COLUMNS_AT_ONCE):
                stop = start + _COLUMNS_AT_ONCE
                self.total[start:stop] += X[:, start:stop].T @ X
            self.count += X.shape[0]
            self.weight += float(weights.sum())

    def merge(self, other: Self) -> None:
        if other.total is None:
            return
        if self.total is None:
            self.total = np.zeros_like(other.total)
        _check_channels(self.key, self.total.shape[0], other.total.shape[0])
        self.total += other.total
        self.count += other.count
        self.weight += other.weight
        self.roots = _joined(self.roots, other.roots)

    def result(self) -> Array:
        if self.total is None:
            raise self.no_data()
        mean: Array = self.total / self.total.dtype.type(self.weight or 1.0)
        return mean

    def rescaled(self, divisor: Array) -> Self | None:
        if self.total is None:
            raise self.no_data()
        d = _checked_divisor(divisor, self.total.shape[0], self.key).astype(self.precision)
        rescaled = self.fresh()
        rescaled.total, rescaled.count, rescaled.weight = self.total / d / d[:, None], self.count, self.weight
        rescaled.roots = _divided(self.roots, divisor, self.key)
        return rescaled


def _other_axes(values: Array, axis: int, key: str) -> tuple[int, ...]:
    if not -values.ndim <= axis < values.ndim:
        raise DataError(f"a batch of shape {values.shape} has no axis {axis}, which {key} measures along.")
    return tuple(i for i in range(values.ndim) if i != axis % values.ndim)


def _row_chunks(batch: Array, key: str) -> Iterator[npt.NDArray[np.float32]]:
    """The batch as rows [n, channels], some thousands at a time."""
    values = finite(batch)
    _other_axes(values, -1, key)
    if values.size == 0:
        return
    rows = values.reshape(-1, values.shape[-1])
    for start in range(0, rows.shape[0], _ROWS_AT_ONCE):
        yield rows[start : start + _ROWS_AT_ONCE]


def _weights(rows: Array, roots: Array | None, count: int) -> tuple[Array, Array]:
    """(weights of the rows, Σ √|x| with them), by what is usual in them and in all before."""
    usual = Typical(roots, count)
    usual.update(rows)
    assert usual.total is not None
    return usual.weights(rows), usual.total


def _joined(one: Array | None, other: Array | None) -> Array | None:
    return other if one is None else one if other is None else one + other


def _divided(roots: Array | None, divisor: Array, key: str) -> Array | None:
    return None if roots is None else roots / np.sqrt(np.abs(_checked_divisor(divisor, roots.size, key)))


def _check_channels(key: str, before: int, now: int) -> None:
    if before != now:
        raise DataError(f"a batch has {now} channels where earlier ones had {before}, which {key} cannot join.")


def _checked_divisor(divisor: Array, channels: int, key: str) -> npt.NDArray[np.float64]:
    """The divisor of each channel; a single one stands for all."""
    divisor = np.asarray(divisor, np.float64)
    if divisor.size not in (1, channels) or not np.isfinite(divisor).all() or (divisor == 0).any():
        raise DataError(f"{key} is rescaled by {channels} finite divisors that are not 0, one for each channel.")
    return np.broadcast_to(divisor.reshape(-1), (channels,)).astype(np.float64)
