"""Statistics of a weight, computed piece by piece, so that one that lies in a file never comes into memory whole."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qcompiler.graph.edit import constant
from qcompiler.sites.stored import StoredWeight

OUTLIER = 6.0


@dataclass(frozen=True)
class WeightStatistics:
    """What the numbers of a weight are like; of codes, what they stand for."""

    absmax: float
    mean: float
    std: float
    kurtosis: float
    """E[(w - mean)⁴] / std⁴: 3 for normal numbers, 1.8 for uniform ones; the more, the longer the tails."""
    outliers: float
    """The share, 0 to 1, of weights that are at least 6 times the root mean square of the first million."""
    zeros: float
    """The share of exact zeros."""
    not_finite: int
    """How many are NaN or infinite; the others' statistics stand beside it."""


def statistics_of(weight: StoredWeight) -> WeightStatistics | None:
    """Of a weight; pages of a file are given back afterwards. None where it is empty, or its numbers are not known."""
    parts = weight.pieces()
    found = None if parts is None else _statistics(parts)
    for value in weight.constants:
        tensor = constant(value)
        if isinstance(tensor, ir.ExternalTensor):
            # Where somebody else reads the same mapping, its pages can be reclaimed anyway.
            with contextlib.suppress(BufferError):
                tensor.release()
    return found


def _statistics(parts: Iterable[np.ndarray]) -> WeightStatistics | None:
    count = outliers = zeros = broken = 0
    sums = np.zeros(4)
    largest, loud, shift = 0.0, math.inf, 0.0
    for part in parts:
        data = part.reshape(-1).astype(np.float64)
        finite = np.isfinite(data)
        if not finite.all():
            broken += int(data.size - finite.sum())
            data = data[finite]
        if not data.size:
            continue
        if not count:  # moments about a number near the mean lose no digits
            shift, loud = float(data.mean()), OUTLIER * float(np.sqrt((data * data).mean()))
        magnitude = np.abs(data)
        largest = max(largest, float(magnitude.max()))
        outliers += int((magnitude > loud).sum())
        zeros += int((data == 0).sum())
        centred = data - shift
        square = centred * centred
        sums += [centred.sum(), square.sum(), (square * centred).sum(), (square * square).sum()]
        count += data.size
    if not count:
        return None if not broken else WeightStatistics(math.nan, math.nan, math.nan, math.nan, 0.0, 0.0, broken)
    first, second, third, fourth = sums / count
    variance = max(0.0, second - first**2)
    central = fourth - 4 * first * third + 6 * first**2 * second - 3 * first**4
    return WeightStatistics(
        absmax=largest, mean=shift + first, std=math.sqrt(variance),
        kurtosis=central / variance**2 if variance > 0 else math.nan,
        outliers=outliers / count, zeros=zeros / count, not_finite=broken,
    )  # fmt: skip
