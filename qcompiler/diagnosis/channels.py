"""What channels and tokens of a value tell: how loud the loudest is, and whether a pass has rescaled them."""

from __future__ import annotations

import numpy as np

from qcompiler.evaluation.difference import Difference
from qcompiler.statistics.rows import token_weights

FITS = 0.1
"""A value counts as rescaled where a factor for each channel leaves less than this share of the error."""


class Outliers:
    """The largest magnitude of each channel (last axis), and of each token."""

    def __init__(self) -> None:
        self._channels: np.ndarray | None = None
        self._tokens: list[float] = []

    def update(self, array: np.ndarray) -> None:
        rows = np.abs(array.reshape(-1, array.shape[-1]).astype(np.float32)) if array.ndim else np.zeros((1, 1))
        if rows.size == 0:
            return
        largest = rows.max(0)
        self._channels = largest if self._channels is None else np.maximum(self._channels, largest)
        self._tokens.extend(rows.max(1).tolist())

    @property
    def channels(self) -> float:
        """Loudest channel over the median one; 1 where nothing was seen."""
        return 1.0 if self._channels is None else _over_median(self._channels)

    @property
    def loud(self) -> int:
        """Channels that are at least 6 times as loud as the median one."""
        if self._channels is None:
            return 0
        return int((self._channels > 6 * np.median(self._channels)).sum())

    @property
    def tokens(self) -> float:
        """Loudest token over the median one."""
        return _over_median(np.array(self._tokens)) if self._tokens else 1.0


def _over_median(magnitudes: np.ndarray) -> float:
    typical = float(np.median(magnitudes))
    return float(magnitudes.max()) / typical if typical > 0 else 1.0


class Rescaling:
    """The factor of each channel (last axis) between a value of two models, by least squares.

    With float values x and x' = f ⊙ x + error, f = Σ x x' / Σ x². Passes such as smooth-quant rescale values exactly,
    and a compiled model does not say by what.
    """

    def __init__(self) -> None:
        # Σ x², Σ x x', Σ x'² over rows, and the same with each row over its energy  [6, channels]
        self._sums: np.ndarray | None = None
        self._rows = 0
        self._factor: np.ndarray | None = None

    def update(self, reference: np.ndarray, candidate: np.ndarray) -> None:
        if not reference.ndim or reference.dtype.kind != "f":
            return
        a, b = (array.reshape(-1, array.shape[-1]).astype(np.float64) for array in (reference, candidate))
        products, weights = (a * a, a * b, b * b), token_weights(a)
        sums = np.stack([*(item.sum(0) for item in products), *(weights @ item for item in products)])
        if self._sums is not None and self._sums.shape != sums.shape:
            return  # the last axis is no channels: positions of a sequence, say
        self._sums = sums if self._sums is None else self._sums + sums
        self._rows += int((weights > 0).sum())
        self._factor = None

    @property
    def factor(self) -> np.ndarray:
        """[channels]; 1 for a channel that is always zero."""
        if self._factor is None:
            assert self._sums is not None
            own, both = self._sums[:2]
            self._factor = np.where((own > 0) & (both > 0), both / np.where(own > 0, own, 1.0), 1.0)
        return self._factor

    @property
    def found(self) -> bool:
        """Whether the value was rescaled, by more than what is lost in rounding."""
        if self._sums is None:
            return False
        own, both, other = self._sums[:3]
        plain = float((own - 2 * both + other).sum())
        return plain > 1e-4 * float(own.sum()) and self.difference().noise < FITS * plain

    def difference(self) -> Difference:
        """The error in the scale of the first model; the largest one is not known."""
        assert self._sums is not None
        factor = self.factor
        noise, relative = (
            float(np.maximum(own - 2 * both / factor + other / factor**2, 0).sum())
            for own, both, other in (self._sums[:3], self._sums[3:])
        )
        own, both, other = self._sums[:3]
        return Difference(
            signal=float(own.sum()), noise=noise, product=float((both / factor).sum()),
            other=float((other / factor**2).sum()), rows=self._rows, relative=relative,
        )  # fmt: skip
