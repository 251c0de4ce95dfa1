"""Rounds the weights of linear layers one input feature at a time, and makes the later features pay for the error.

**Before**  y = W x            **After**  y = Ŵ x,  Ŵ = DequantizeLinear(Q, s, z),  E‖(W - Ŵ) x‖² small

Round-to-nearest is best for each weight by itself. Inputs of a layer are correlated, though: what rounding column i of
W [N, K] did to the output can be undone in part by the columns that are still in floating point.

Source: Frantar et al. 2022, "GPTQ". With H = E[x xᵀ] (their Hessian, halved) and the upper Cholesky factor U of its
inverse, H⁻¹ = Uᵀ U (section 3.3, step 3), column i is rounded, e = (w_i - ŵ_i) / U_ii, and the columns j > i are moved,
w_j -= e U_ij, by *row* i of U. Columns are worked on in blocks of 128, and the rest of the matrix gets the errors of a
block in one product (step 2). H is damped by `damping` times the mean of its diagonal; layers that read the same value
share H and its factor.

Scales are chosen when their group is reached, on the columns as they are then. ``search: weighted`` counts the squared
error of a column times E[x²] of its input, which is what the output sees of it. With ``act_order: true`` the columns of
the loudest inputs come first; all scales are then chosen beforehand, on the original weight ("static groups"), and the
codes are written in their usual order, so that the layer costs the same at run time.

``refine: 4`` goes over the columns again when all are rounded, now that every column knows what the others became, and
fits the scales to the codes (`qcompiler/rewriting/quantease.py`; Behdin et al. 2023, "QuantEase", algorithm 1).

With ``sequential: true`` each block of the model is measured on what the rounded blocks before it answer.

An input that was never active during calibration says nothing: its column is rounded to nearest. (The paper sets it to
0, which is the same on the calibration data, and not for a user who reaches that input.) Where H cannot be factorised,
the damping is raised up to 1000 times, and after that the layer is rounded to nearest; the report says so.

Skipped: constants in forms that no pass handles (inside If or Loop bodies, batched weights, …), each with its reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import numpy as np
import onnx_ir as ir
from pydantic import Field
from pydantic.dataclasses import dataclass as options

from qcompiler.errors import SchemeError
from qcompiler.formats.arithmetic import Array, Quantized, quantize
from qcompiler.formats.scheme import find_format
from qcompiler.formats.search import quantize_weight
from qcompiler.graph.lazy import read
from qcompiler.graph.rewriter import Rewriter
from qcompiler.rewriting.contract import OPTIONS, Changes, Kind, Tap
from qcompiler.rewriting.gptq import RAISES, CholeskyFactor, Search, check_device, factorise, plain, solve
from qcompiler.rewriting.quantease import refine
from qcompiler.rewriting.staged import Computed, Measured, StagedPass, Unit
from qcompiler.rewriting.weights import WeightConstant, WeightPass
from qcompiler.sites.find import Linear
from qcompiler.statistics import SecondMoment, StatisticsStore

REPORTED_CHANNELS = 128  # that the errors in the report are taken from


@options(frozen=True, config=OPTIONS)
class Gptq(StagedPass, WeightPass):
    name: ClassVar[str] = "gptq"
    kind: ClassVar[Kind] = "rounding"

    format: str = "int4"
    """Number format of the codes: int4, uint4, int3, int2, int8, …"""
    granularity: Literal["tensor", "channel", "group"] = "group"
    """What shares one scale: the whole tensor, an output channel, or `group_size` input features of a channel."""
    layers: tuple[Literal["linear", "head"], ...] = ("linear", "head")
    """Kinds of layers to work on; a head is a linear layer with one output for each row of an embedding (logits)."""
    search: Search = "minmax"
    """How a range is chosen: the whole one, the one with the least squared error, or with the least weighted error."""
    damping: float = Field(default=0.01, ge=0)
    """What is added to the diagonal of the Hessian, in units of its mean."""
    act_order: bool = False
    """Round the columns of the loudest inputs first (with scales that are chosen beforehand)."""
    refine: int = Field(default=0, ge=0)
    """Sweeps of coordinate descent over codes and scales afterwards; each costs about four times the rounding."""
    sequential: bool = True
    """Calibrate each block of the model on the outputs of the rounded blocks before it."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where the linear algebra runs, in torch."""

    def __post_init__(self) -> None:
        WeightPass.__post_init__(self)
        if find_format(self.format).kind != "integer":
            raise SchemeError(f"gptq.format: gptq rounds to integers, not to {self.format}: choose int4, uint4 …")

    @property
    def measured(self) -> Measured:
        return "in turn" if self.sequential else "at once"

    def units(self, model: ir.Model, changes: Changes) -> Sequence[Unit]:
        """The constants that meet the same inputs, as one Hessian serves them all.

        A stage is a block of the model, or outside of blocks what reads one value; blocks that share a constant, and
        those between, are one stage.
        """
        check_device(self.device)
        constants = self.constants(model, changes)
        place = {node: index for index, node in enumerate(model.graph.all_nodes())}
        linears = [linear for found in constants for linear in found.linears]
        stage_of = _stages(sorted(linears, key=lambda linear: place[linear.node]))
        groups: dict[tuple[int, tuple[str, ...]], list[WeightConstant]] = {}
        for found in constants:
            groups.setdefault((stage_of[found.linears[0]], _inputs(found)), []).append(found)
        return [
            Unit(str(group[0].value.name), stage, tuple(Tap(name, SecondMoment()) for name in inputs), group)
            for (stage, inputs), group in groups.items()
        ]

    def compute(self, unit: Unit, statistics: StatisticsStore) -> Computed:
        """All constants of the unit, with one factor."""
        hessian = _hessian([tap.value for tap in unit.taps], statistics)
        factor = factorise(hessian, damping=self.damping, act_order=self.act_order, device=self.device)
        quantized, details = {}, {}
        for found in unit.work:
            name = str(found.value.name)
            quantized[name], details[name] = self._quantized(found, hessian, factor)
        return Computed.of(quantized, details=details)

    def write(self, unit: Unit, computed: Computed, rw: Rewriter, changes: Changes) -> None:
        for found in unit.work:
            name = str(found.value.name)
            details = {site.name: computed.facts["details"][name] for site in found.readers}
            self.install(found, computed.quantized(name), rw, changes, details=details)

    def _quantized(self, found: WeightConstant, hessian: Array, factor: CholeskyFactor | None) -> tuple[Quantized, str]:
        """Codes, and a line for the report."""

        def compute(data: Array) -> tuple[Quantized, str]:
            settings: dict[str, Any] = {
                "channel_axis": found.channel_axis, "scale_dtype": data.dtype, "name": found.name,
            }  # fmt: skip
            if factor is None:
                nearest = quantize_weight(data, found.scheme, search=plain(self.search), **settings)
                return nearest, (
                    f"rounded to nearest: the Hessian is singular, even with {RAISES[-1]:.0f} times the damping; "
                    "give more calibration samples"
                )
            quantized = solve(data, factor, found.scheme, search=self.search, **settings)
            if self.refine:
                quantized = refine(
                    data, quantized, hessian, found.scheme, channel_axis=found.channel_axis, damping=factor.damping,
                    sweeps=self.refine, device=self.device,
                )  # fmt: skip
            before, after = _output_errors(data, quantized, found, hessian, self.search, self.device)
            detail = f"output error {after:.3g}, round-to-nearest {before:.3g}"
            if factor.damping != self.damping:
                detail += f", damping raised to {factor.damping:g} as the Hessian is singular"
            return quantized, detail

        return read(found.tensor, compute)


def _inputs(found: WeightConstant) -> tuple[str, ...]:
    """The values that meet the constant, each once."""
    return tuple(dict.fromkeys(str(linear.input.name) for linear in found.linears))


def _hessian(inputs: Sequence[str], statistics: StatisticsStore) -> Array:
    """E[x xᵀ] of the rows of all the inputs together."""
    moments = [statistics.get(value, SecondMoment()) for value in inputs]
    if len(moments) == 1:
        return moments[0].result()
    joined = SecondMoment()
    for moment in moments:
        joined.merge(moment)
    return joined.result()


def _stages(linears: Sequence[Linear]) -> dict[Linear, int]:
    """Of layers in graph order: neighbours of one block share a stage, outside of blocks those that read one value."""
    runs: dict[tuple[object, ...], list[Linear]] = {}
    number, before = 0, None
    for linear in linears:
        number += linear.block != before
        before = linear.block
        runs.setdefault((linear.block, number) if linear.block else ("", linear.input), []).append(linear)
    last = {linear.weight: index for index, run in enumerate(runs.values()) for linear in run}
    stage_of: dict[Linear, int] = {}
    stage, until = -1, -1
    for index, run in enumerate(runs.values()):
        stage += index > until
        stage_of |= dict.fromkeys(run, stage)
        until = max([until, *(last[linear.weight] for linear in run)])
    return stage_of


def _output_errors(
    data: Array, quantized: Quantized, found: WeightConstant, hessian: Array, search: Search, device: str
) -> tuple[float, float]:
    """E‖(W - Ŵ) x‖² / E‖W x‖² = tr(D H Dᵀ) / tr(W H Wᵀ) of round-to-nearest and of `quantized`, on some channels."""
    import torch

    channels = data.shape[found.channel_axis]
    some = np.arange(0, channels, max(1, channels // REPORTED_CHANNELS))[:REPORTED_CHANNELS]
    W = np.moveaxis(data, found.channel_axis, 0)[some].astype(np.float32)
    if quantized.axis is None:
        codes = quantize(W, quantized.scale, quantized.zero_point, quantized.format)
        nearest = replace(quantized, codes=codes).dequantize()
    else:
        nearest = quantize_weight(
            W, found.scheme, channel_axis=0, search=plain(search), scale_dtype=data.dtype
        ).dequantize()
    solved = np.moveaxis(_of_channels(quantized, found.channel_axis, some).dequantize(), found.channel_axis, 0)
    H = torch.from_numpy(hessian).to(device)

    def energy(rows: Array) -> float:
        D = torch.from_numpy(np.ascontiguousarray(rows)).to(device)
        return float((D @ H).mul_(D).sum(dtype=torch.float64))

    signal = energy(W)
    return (energy(nearest - W) / signal, energy(solved - W) / signal) if signal > 0 else (0.0, 0.0)


def _of_channels(quantized: Quantized, channel_axis: int, some: Array) -> Quantized:
    def taken(parameter: Array) -> Array:
        return np.take(parameter, some, channel_axis if parameter.ndim == 2 else 0) if parameter.ndim else parameter

    return replace(
        quantized,
        codes=taken(quantized.codes),
        scale=taken(quantized.scale),
        zero_point=None if quantized.zero_point is None else taken(quantized.zero_point),
    )
