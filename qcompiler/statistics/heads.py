"""The ranges of keys and values: what static scales of a cache are made of."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Self

import numpy as np
import numpy.typing as npt

from qcompiler.errors import DataError, SchemeError
from qcompiler.statistics.statistic import Array, Statistic, finite

PAIRS = ("", "half", "interleaved")


@dataclass(eq=False)
class HeadRange(Statistic):
    """Least and largest value of each channel of each head → (lo [H, D], hi [H, D]), float32.

    Batches are [batch, heads, positions, channels] with `heads_axis` 1, [batch, positions, heads, channels] with 2.

    `pairs` says which channels rotary positions turn together: ``half`` (i and i + r/2), ``interleaved`` (2i and
    2i + 1), or none; `rotary_dim` is r, 0 for all channels. A turned pair keeps its length, so that ± the greatest
    length of a pair, which then stands for the range of both channels, holds at every position, seen or not.
    """

    heads_axis: int = 1
    pairs: str = ""
    rotary_dim: int = 0
    lo: Array | None = field(default=None, init=False)
    hi: Array | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if self.heads_axis not in (1, 2) or self.pairs not in PAIRS or self.rotary_dim < 0:
            raise SchemeError(
                "HeadRange takes heads_axis 1 or 2, pairs '', 'half' or 'interleaved' and a rotary_dim of at least 0, "
                f"not {self.heads_axis!r}, {self.pairs!r} and {self.rotary_dim!r}."
            )

    def update(self, batch: Array) -> None:
        values = finite(batch)
        if values.ndim != 4:
            raise DataError(f"a batch of shape {values.shape} has no heads, positions and channels ({self.key}).")
        if not values.size:
            return
        others = (0, 3 - self.heads_axis)
        lo, hi = values.min(others), values.max(others)
        if self.pairs:
            bound = self._bound(values).max(others)
            turned = bound.shape[-1]
            lo[:, :turned], hi[:, :turned] = -bound, bound
        self._widen(lo, hi)

    def _bound(self, values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """The lengths of the pairs, for both of their channels: [..., rotary_dim]."""
        turned = values[..., : self.rotary_dim or None]
        count = turned.shape[-1]
        if count % 2:
            raise DataError(f"{count} channels cannot be turned in pairs ({self.key}): set another rotary_dim.")
        if self.pairs == "half":
            lengths = np.hypot(turned[..., : count // 2], turned[..., count // 2 :])
            return np.concatenate([lengths, lengths], -1)
        return np.repeat(np.hypot(turned[..., 0::2], turned[..., 1::2]), 2, -1)

    def merge(self, other: Self) -> None:
        if other.lo is not None and other.hi is not None:
            self._widen(other.lo, other.hi)

    def _widen(self, lo: Array, hi: Array) -> None:
        if self.lo is None or self.hi is None:
            self.lo, self.hi = lo, hi
            return
        if lo.shape != self.lo.shape:
            raise DataError(
                f"a batch has heads and channels {lo.shape} where earlier ones had {self.lo.shape}, "
                f"which {self.key} cannot join."
            )
        self.lo, self.hi = np.minimum(self.lo, lo), np.maximum(self.hi, hi)

    def result(self) -> tuple[Array, Array]:
        if self.lo is None or self.hi is None:
            raise self.no_data()
        return self.lo, self.hi
