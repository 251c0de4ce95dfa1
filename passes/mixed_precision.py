"""Decides how many bits each layer's weight gets, within a budget; the rounding pass that follows obeys.

**Before**  all layers in the bits that the rounding pass says     **After**  each layer in bits of its own

A few layers of a model suffer much more from few bits than the others. For each layer and each of ``choices`` the
weight is rounded to nearest, and the error of the layer's output relative to the output is computed with the measured
E[x²] of its inputs, each token weighing the less the louder it is, L(b) = Σ_nj E[x_j²] (W_nj - Ŵ_nj)² / Σ_nj E[x_j²]
W_nj². Among all assignments whose mean number of stored bits is within ``budget``, the one with the least sum of these
errors is taken: a multiple-choice knapsack, solved exactly on a grid of 4096 steps of the budget. The model is not run
again.

Stored bits are codes, scales and zero points as kernels have them (int4 in groups of 128 with float32 scales: 4.25); 3
bits are stored in 4. Give the same format, granularity and symmetry as to the pass that rounds: ``quantize-weights``,
``gptq``, ``hqq``, any that has the option ``bits``, which this one fills in.

Skipped: convolutions, and embeddings that share no constant with a linear layer, which keep the rounding pass's bits;
what cannot be rounded is for the rounding pass to report.

Source: the knapsack is that of Yao et al. 2021, "HAWQ-V3", with the output error in the place of the Hessian's trace.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir
from pydantic import Field
from pydantic.dataclasses import dataclass as options

from qcompiler.errors import SchemeError
from qcompiler.formats.arithmetic import Quantized
from qcompiler.formats.scheme import FORMATS
from qcompiler.formats.search import quantize_weight
from qcompiler.graph.lazy import read
from qcompiler.rewriting.contract import OPTIONS, Changed, Changes, Kind, Pass, Skipped, Tap
from qcompiler.rewriting.weights import LayerKind, WeightConstant, WeightPass, with_bits
from qcompiler.statistics import ChannelMoments, StatisticsStore

STEPS = 4096
CHANNELS = 512  # output channels of a layer that are looked at
NO_ERROR = "only of linear layers the error is known beforehand: it keeps the bits that the rounding pass says"


@options(frozen=True, config=OPTIONS)
class MixedPrecision(WeightPass):
    name: ClassVar[str] = "mixed-precision"
    kind: ClassVar[Kind] = "analysis"

    format: str = "int4"
    """Number format of the rounding pass; its bits are replaced by the choices."""
    granularity: Literal["tensor", "channel", "group"] = "group"
    """Of the rounding pass: what shares one scale."""
    layers: tuple[LayerKind, ...] = ("linear",)
    """Kinds of layers to decide on."""
    budget: float = Field(default=4.5, gt=0)
    """Stored bits for each weight, on the average over the layers."""
    choices: tuple[int, ...] = (2, 4, 8)
    """Bits that a layer can get."""

    def __post_init__(self) -> None:
        WeightPass.__post_init__(self)
        if self.bits:
            raise SchemeError("mixed-precision.bits: say them to the pass that rounds, which keeps to them.")
        for bits in self.choices:
            with_bits(self.scheme(), bits)

    def decided(self, bits: Mapping[str, int]) -> Pass:
        return self

    def taps(self, model: ir.Model) -> Sequence[Tap]:
        found = self._constants(model, Changes())
        inputs = dict.fromkeys(str(linear.input.name) for constant in found for linear in constant.linears)
        return [Tap(name, ChannelMoments(per_token=True)) for name in inputs]

    def apply(self, model: ir.Model, statistics: StatisticsStore) -> Changes:
        changes = Changes()
        constants = self._constants(model, changes)
        if not constants:
            return changes
        tried = [[self._tried(constant, bits, statistics) for bits in self.choices] for constant in constants]
        total = sum(_size(constant) for constant in constants)
        chosen = assign(
            np.array([[cost for cost, _ in row] for row in tried]),
            np.array([[error for _, error in row] for row in tried]),
            self.budget * total,
        )
        if chosen is None:
            least = sum(min(cost for cost, _ in row) for row in tried) / total
            raise SchemeError(
                f"mixed-precision.budget: {self.budget:g} bits a weight are less than the {least:.3g} that the fewest "
                "bits of choices take with their scales; raise the budget, or widen the groups"
            )
        for constant, row, index in zip(constants, tried, chosen, strict=True):
            bits, (_, error) = self.choices[index], row[index]
            for reader in constant.readers:
                changes.bits[reader.name] = bits
                detail = f"{bits} bits, expected output error {error:.3g}"
                changes.changed.append(Changed(reader.name, detail=detail))
        return changes

    def _constants(self, model: ir.Model, changes: Changes) -> list[WeightConstant]:
        found = self.constants(model, Changes())  # what cannot be rounded is for the rounding pass to say
        others = [reader for constant in found if not constant.linears for reader in constant.readers]
        changes.skipped += [Skipped(reader.name, NO_ERROR) for reader in others]
        return [constant for constant in found if constant.linears]

    def _tried(self, constant: WeightConstant, bits: int, statistics: StatisticsStore) -> tuple[float, float]:
        """Stored bits in all, and the relative error of the output."""
        axis, scheme = constant.channel_axis, with_bits(constant.scheme, bits)
        energy = sum(
            statistics.get(str(linear.input.name), ChannelMoments(per_token=True)).result()
            for linear in constant.linears
        )

        def compute(data: np.ndarray) -> tuple[float, float]:
            channels = data.shape[axis]
            some = np.arange(0, channels, -(-channels // CHANNELS))
            rows = np.moveaxis(data, axis, 0)[some].astype(np.float32)
            quantized = quantize_weight(rows, scheme, channel_axis=0, scale_dtype=data.dtype, name=constant.name)
            lost = float((np.square(quantized.dequantize() - rows, dtype=np.float64) @ energy).sum())
            signal = float((np.square(rows, dtype=np.float64) @ energy).sum())
            parameters = _parameter_bits(quantized) * channels / len(some)
            stored = _stored_bits(scheme.format)
            return stored * data.size + parameters, lost / signal if signal > 0 else 0.0

        return read(constant.tensor, compute)


def assign(costs: np.ndarray, losses: np.ndarray, budget: float) -> list[int] | None:
    """For each row the column to take, so that the losses add up to the least and the costs to `budget` at most.

    Costs are rounded up to 1 / STEPS of the budget, so the budget is kept; None where no choice keeps it.
    """
    steps = np.ceil(costs / budget * STEPS - 1e-9).astype(int)
    least = np.zeros(STEPS + 1)  # the least loss of the rows so far, by what they may cost
    picks = []
    for cost, loss in zip(steps, losses, strict=True):
        options_ = np.full((len(cost), STEPS + 1), np.inf)
        for column, (c, lost) in enumerate(zip(cost, loss, strict=True)):
            if c <= STEPS:
                options_[column, c:] = least[: STEPS + 1 - c] + lost
        picks.append(options_.argmin(axis=0))
        least = options_.min(axis=0)
    if not np.isfinite(least[STEPS]):
        return None
    chosen, left = [], STEPS
    for cost, pick in zip(steps[::-1], picks[::-1], strict=True):
        chosen.append(int(pick[left]))
        left -= cost[chosen[-1]]
    return chosen[::-1]


def _stored_bits(format: str) -> int:
    """Of one code in the kernels' packing."""
    return ir.DataType[FORMATS[format].storage].bitwidth or 0


def _size(constant: WeightConstant) -> int:
    return prod(int(size) for size in constant.tensor.shape.numpy())


def _parameter_bits(quantized: Quantized) -> float:
    """Of scales and zero points."""
    stored = quantized.scale.size * quantized.scale.itemsize * 8
    if quantized.zero_point is not None:
        stored += quantized.zero_point.size * _stored_bits(quantized.format)
    return float(stored)
