"""How far one array is from another, row by row and in all, summed up sample by sample."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from qcompiler.graph.operators import has
from qcompiler.sites.analyses import caches_of
from qcompiler.sites.caches import Cache
from qcompiler.statistics.rows import judged_as

ELEMENTS_AT_ONCE = 1 << 20
"""Numbers turned into float64 at once, which bounds the memory."""
FEATURE_MAP_RANK = 4


@dataclass
class Difference:
    """Signal-to-noise ratio, largest error, cosine; accumulated in float64.

    A row is what a token is: the numbers along the last axis. Real decoders hold numbers a thousand times larger than
    all others at one token, and a ratio of sums over all tokens would be that token's alone.
    """

    signal: float = 0.0
    noise: float = 0.0
    product: float = 0.0
    other: float = 0.0
    largest: float = 0.0
    rows: int = 0
    """Rows with a signal or an error."""
    relative: float = 0.0
    """Sum over rows of their error's energy over their own."""
    strongest: float = field(default=0.0, repr=False)
    """Sum over samples of the energy of the strongest row."""

    def update(self, reference: np.ndarray, candidate: np.ndarray, *, whole: bool = False) -> None:
        """Two arrays of one shape; `whole` takes them as one row (a feature map has no tokens).

        Where both hold the same infinity they agree, and it counts for nothing.
        """
        if not reference.size:
            return
        width = reference.size if whole or reference.ndim < 2 else reference.shape[-1]
        rows, others = reference.reshape(-1, width), candidate.reshape(-1, width)
        signals, noises = np.zeros(len(rows)), np.zeros(len(rows))
        step = max(1, ELEMENTS_AT_ONCE // width)
        for start in range(0, len(rows), step):
            part = slice(start, start + step)
            a, b = rows[part].astype(np.float64), others[part].astype(np.float64)
            infinite = np.isinf(a) & (a == b)
            if infinite.any():
                a[infinite] = b[infinite] = 0
            error = b - a
            signals[part], noises[part] = np.einsum("rc,rc->r", a, a), np.einsum("rc,rc->r", error, error)
            self.product += float(np.einsum("rc,rc->", a, b))
            self.other += float(np.einsum("rc,rc->", b, b))
            self.largest = float(np.maximum(self.largest, np.abs(error).max()))
        self.signal += float(signals.sum())
        self.noise += float(noises.sum())
        self._add_rows(signals, noises)

    def _add_rows(self, signals: np.ndarray, noises: np.ndarray) -> None:
        told = (signals != 0) | (noises != 0)
        self.rows += int(told.sum())
        self.strongest += float(signals.max())
        with np.errstate(divide="ignore", invalid="ignore"):
            relative = noises / judged_as(signals)
        self.relative += float(np.where(np.isinf(noises), np.inf, relative)[told].sum())

    @property
    def relative_noise(self) -> float:
        """The mean over rows of Σ error² / Σ reference²; infinite where the candidate holds NaN."""
        if math.isnan(self.relative):
            return math.inf
        return self.relative / self.rows if self.rows else 0.0

    @property
    def sqnr_db(self) -> float:
        """−10 log10 of the relative noise; infinite where there is no error, NaN where the candidate holds NaN."""
        return _decibels(self.rows, self.relative)

    @property
    def total_sqnr_db(self) -> float:
        """10 log10(Σ reference² / Σ error²), both over all rows."""
        return _decibels(self.signal, self.noise)

    @property
    def share_of_strongest(self) -> float:
        """What share of the energy, 0 to 1, the strongest row of each sample has."""
        return self.strongest / self.signal if self.signal else 0.0

    @property
    def cosine(self) -> float:
        """Cosine of the angle between both, all elements taken as one vector; 1 where both are zero."""
        length = math.sqrt(self.signal) * math.sqrt(self.other)
        if length == 0:
            return 1.0 if self.signal == self.other else 0.0
        return self.product / length


def feature_maps(model: ir.Model) -> set[str]:
    """Names of values that have no rows of their own: what convolutions read and write, and outputs like those."""
    caches = {cache.present for cache in caches_of(model) if isinstance(cache, Cache)}
    found = {
        value for value in model.graph.outputs
        if value.shape is not None and value.shape.rank() >= FEATURE_MAP_RANK and value not in caches
    }  # fmt: skip
    for node in model.graph:
        if has(node, "convolution"):
            found.update(value for value in (node.inputs[0], *node.outputs) if value is not None)
    return {str(value.name) for value in found}


def _decibels(signal: float, noise: float) -> float:
    if noise == 0:
        return math.inf
    if math.isnan(noise) or math.isnan(signal):
        return math.nan
    if signal == 0 or math.isinf(noise):
        return -math.inf
    return 10 * math.log10(signal / noise)
