"""Statistics of a weight, computed piece by piece, so that one that lies in a file never comes into memory whole."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qcompiler.quantized_weights import QuantizedWeight, float_numbers, numbers

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


def statistics_of_tensor(tensor: ir.TensorProtocol) -> WeightStatistics | None:
    """Of a float constant; its pages are given back afterwards. None where it is empty or no number."""
    if not tensor.dtype.is_floating_point():
        return None
    found = _statistics(float_numbers(tensor))
    if isinstance(tensor, ir.ExternalTensor):
        try:
            tensor.release()
        except BufferError:
            return found  # somebody else reads the same mapping; its pages can be reclaimed anyway
    return found


def statistics_of(weight: QuantizedWeight) -> WeightStatistics | None:
    """Of what codes stand for; None where the layout of the operator is not known."""
    found = numbers(weight)
    return None if found is None else _statistics(found)


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
