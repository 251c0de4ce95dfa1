"""Rounds weights with the scales and zero points that suit most of each group, not its outliers. Needs no data.

**Before**  y = x W            **After**  y = x · DequantizeLinear(Q, s, z),  Q = clip(round(W / s) + z)

Round-to-nearest with the largest magnitude as its scale lets a few outliers set the grid for all others. Half-quadratic
quantization asks for the smallest Σ |W - s (Q - z)|^p of each group instead, with p < 1 (``norm``), which counts many
small errors more than a few large ones.

Source: Badri and Shaji 2023, "Half-Quadratic Quantization". An auxiliary E takes over what the outliers miss, and two
steps with closed forms alternate while β grows (equations 5 to 8; D = W - s (Q - z) is the error):

    E = sign(D) · max(|D| - |D|^(p-1) / β, 0)         the generalised soft threshold
    z = mean(Q - (W - E) / s)                         or, with z fixed,  s = ⟨W - E, Q - z⟩ / ⟨Q - z, Q - z⟩

A group stops as soon as its error grows, or after ``iterations`` rounds, and keeps the best that it saw.

What differs from the paper, and why. Its zero point is a real number; ONNX's DequantizeLinear has whole ones of the
codes' type, and simply rounding the result loses all that was won. Therefore the real zero point only says which two
whole ones to try: with each of them, and with that of round-to-nearest, the same iteration goes on over the scale,
which the paper holds fixed. Each group takes the best of the three, measured with the numbers as they are stored, but
only where its squared error is not larger than round-to-nearest's (on the range of ``search``): a layer's output feels
the squared error, and p < 1 alone would give up outliers freely once the scale may shrink. So no group gets worse in
either measure. D is counted in steps of the grid, so that β means the same for weights of any size. Symmetric schemes
fit the scale alone.

Expect a modest gain over ``quantize-weights`` with ``search: mse`` in small groups (2 % of the demo model's KL
divergence in groups of 32) and none in groups of 128; over the whole range (``search: minmax`` there) it is 8 to 11 %
at 4 bits. It costs up to 80 roundings of every weight, and no run of the model.

Skipped: constants in forms that no pass handles (inside If or Loop bodies, batched weights, …), each with its reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from pydantic import Field
from pydantic.dataclasses import dataclass as options

from qcompiler.errors import SchemeError
from qcompiler.formats.arithmetic import Quantized, quantize, slices
from qcompiler.formats.scheme import NumberFormat, Scheme, find_format
from qcompiler.formats.search import Search, quantize_weight
from qcompiler.graph.lazy import read
from qcompiler.graph.rewriter import Rewriter
from qcompiler.rewriting.contract import OPTIONS, Changes, Kind
from qcompiler.rewriting.staged import Computed, StagedPass, Unit
from qcompiler.rewriting.weights import LayerKind, WeightConstant, WeightPass
from qcompiler.statistics import StatisticsStore

Array = npt.NDArray[Any]

BETA, KAPPA = 1.0, 1.01  # β of the first round, in steps of the grid, and its growth from round to round
TINY = np.float32(1e-10)  # steps; |D|^(p-1) stays finite where the error is zero


@options(frozen=True, config=OPTIONS)
class Hqq(StagedPass, WeightPass):
    name: ClassVar[str] = "hqq"
    kind: ClassVar[Kind] = "rounding"

    format: str = "uint4"
    """Number format of the codes: uint4, int4, uint8, int8, uint3, uint2, …"""
    granularity: Literal["tensor", "channel", "group"] = "group"
    """What shares one scale: an output channel, or `group_size` input features of a channel (tensor is refused)."""
    symmetric: bool = False
    """Without a zero point of its own for each scale: then only the scale is fitted."""
    layers: tuple[LayerKind, ...] = ("linear",)
    """Kinds of layers to work on; a head is a linear layer with one output for each row of an embedding (logits)."""
    norm: float = Field(default=0.7, gt=0, le=1)
    """p, the exponent of the error: the smaller, the less outliers count."""
    iterations: int = Field(default=20, ge=1)
    """Rounds at the most, for the zero point and then for each scale."""
    search: Literal["minmax", "mse"] = "mse"
    """The range that round-to-nearest starts from: the whole one, or that with the smallest squared error."""

    def __post_init__(self) -> None:
        WeightPass.__post_init__(self)
        if self.granularity == "tensor":
            raise SchemeError("hqq.granularity: one scale for the whole tensor is not fitted; choose channel or group.")
        number_format = find_format(self.format)
        if number_format.kind != "integer" or number_format.bits > 8:
            raise SchemeError(f"hqq.format: {self.format} has no grid to fit; choose an integer format up to 8 bits.")

    def units(self, model: ir.Model, changes: Changes) -> Sequence[Unit]:
        constants = self.constants(model, changes)
        return [Unit(str(found.value.name), number, (), found) for number, found in enumerate(constants)]

    def compute(self, unit: Unit, statistics: StatisticsStore) -> Computed:
        constant: WeightConstant = unit.work
        fit = partial(
            hqq, scheme=constant.scheme, channel_axis=constant.channel_axis, norm=self.norm,
            iterations=self.iterations, search=self.search, name=constant.name,
        )  # fmt: skip
        quantized, before, after = read(constant.tensor, fit)
        return Computed.of({unit.name: quantized}, before=before, after=after)

    def write(self, unit: Unit, computed: Computed, rw: Rewriter, changes: Changes) -> None:
        before, after = computed.facts["before"], computed.facts["after"]
        gain = f"Σ|error|^{self.norm:g} {after / before - 1:+.1%} against round-to-nearest" if before > 0 else ""
        details = {site.name: gain for site in unit.work.readers}
        self.install(unit.work, computed.quantized(unit.name), rw, changes, details=details, nearest=True)


def hqq(
    weight: Array, scheme: Scheme, channel_axis: int, *, norm: float = 0.7, iterations: int = 20,
    search: Search = "mse", name: str = "the weight",
) -> tuple[Quantized, float, float]:  # fmt: skip
    """The weight with fitted scales and zero points, and Σ |error|^norm of round-to-nearest and of the result.

    `scheme` is an integer format per channel or group; the arguments and what is raised are those of
    `search.quantize_weight`. Scales have the weight's type. Works on slices of channels in float32.
    """
    start = quantize_weight(
        weight, scheme, channel_axis=channel_axis, search=search, scale_dtype=weight.dtype, name=name
    )
    fit = _Fit(scheme, norm, iterations)
    by_channel = np.moveaxis(weight, channel_axis, 0)
    channels = by_channel.shape[0]
    turned = start.block_size is not None and channel_axis == 1  # scales [blocks, channels]

    def as_rows(parameter: Array) -> Array:
        """A view [channels, blocks] of scales or zero points."""
        return parameter.T if turned else parameter.reshape(channels, -1)

    scale = start.scale.copy()
    zero_point = None if start.zero_point is None else start.zero_point.copy()
    scales, zeros = as_rows(scale), None if zero_point is None else as_rows(zero_point)
    totals = np.zeros(2)
    for part in slices(by_channel.shape):
        rows = by_channel[part].astype(np.float32).reshape(by_channel[part].shape[0], -1)
        for columns, blocks in _blocks(rows.shape[1], start.block_size):
            cells = rows[:, columns].reshape(-1, (columns.stop - columns.start) // (blocks.stop - blocks.start))
            old = scales[part, blocks]
            zero = np.zeros(old.size, np.float32) if zeros is None else zeros[part, blocks].reshape(-1)
            found_scale, found_zero, losses = fit(cells, old.reshape(-1), zero.astype(np.float32))
            scales[part, blocks] = found_scale.reshape(old.shape)
            if zeros is not None:
                zeros[part, blocks] = found_zero.reshape(old.shape)
            totals += losses
    codes = quantize(weight, scale, zero_point, scheme.format, start.axis, start.block_size)
    return replace(start, codes=codes, scale=scale, zero_point=zero_point), float(totals[0]), float(totals[1])


def _blocks(inputs: int, size: int | None) -> Iterator[tuple[slice, slice]]:
    """Columns and the blocks that they fill: the whole blocks together, then the shorter last one."""
    size = size or inputs
    whole = inputs // size
    if whole:
        yield slice(0, whole * size), slice(0, whole)
    if whole * size < inputs:
        yield slice(whole * size, inputs), slice(whole, whole + 1)


class _Fit:
    """Fits scales [groups] and zero points [groups] to groups of weights [groups, size]."""

    def __init__(self, scheme: Scheme, norm: float, iterations: int) -> None:
        self.format: NumberFormat = scheme.number_format
        self.symmetric, self.norm, self.iterations = scheme.symmetric, norm, iterations

    def __call__(self, cells: Array, scale: Array, zero: Array) -> tuple[Array, Array, Array]:
        """Scales, zero points, and the errors Σ |error|^norm [2] of the start and of the result."""
        best_scale, best_zero = scale, zero
        before, most = self._errors(cells, scale, zero)
        least = before
        steps = cells / scale.astype(np.float32)[:, None]
        for candidate in self._zeros(steps, zero):
            with np.errstate(over="ignore"):
                fitted = (scale.astype(np.float32) * self._factor(steps, candidate)).astype(scale.dtype)
            error, square = self._errors(cells, fitted, candidate)
            better = (error < least) & (square <= most)
            best_scale, best_zero = np.where(better, fitted, best_scale), np.where(better, candidate, best_zero)
            least = np.where(better, error, least)
        return best_scale, best_zero, np.array([before.sum(), least.sum()])

    def _zeros(self, steps: Array, zero: Array) -> list[Array]:
        """The zero points to try: the start's, and the neighbours of the best real one."""
        if self.symmetric:
            return [zero]
        qmin, qmax = self.format.qmin, self.format.qmax

        def codes(steps: Array, zero: Array, groups: Array) -> tuple[Array, Array]:
            found = np.clip(np.rint(steps + zero), qmin, qmax)
            return found, found - zero

        real = self._descend(steps, zero, codes, lambda wanted, codes: np.mean(codes - wanted, axis=-1))
        return [zero, np.clip(np.floor(real), qmin, qmax), np.clip(np.ceil(real), qmin, qmax)]

    def _factor(self, steps: Array, zero: Array) -> Array:
        """What to multiply the scale with, given a whole zero point."""

        def levels(steps: Array, factor: Array, groups: Array) -> tuple[Array, Array]:
            offset = zero[groups, None]
            found = np.clip(np.rint(steps / factor), self.format.qmin - offset, self.format.qmax - offset)
            return found, found * factor

        def solve(wanted: Array, levels: Array) -> Array:
            power = np.einsum("gn,gn->g", levels, levels)
            return np.where(power > 0, np.einsum("gn,gn->g", wanted, levels) / np.maximum(power, 1), 1)

        return self._descend(steps, np.ones_like(zero), levels, solve)

    def _descend(
        self, steps: Array, parameter: Array, restore: Callable[[Array, Array, Array], tuple[Array, Array]],
        solve: Callable[[Array, Array], Array],
    ) -> Array:  # fmt: skip
        """The best parameter [groups] that the iteration meets; a group that gets worse is done.

        `restore(steps, parameter [groups, 1], groups)` gives what `solve` needs and the restored steps.
        """
        best, least = parameter.copy(), np.full(parameter.shape, np.inf, np.float32)
        groups = np.arange(len(steps))
        for turn in range(self.iterations):
            grid, restored = restore(steps, parameter[:, None], groups)
            error = steps - restored
            size = np.abs(error) + TINY
            slope = np.exp((self.norm - 1) * np.log(size))  # |D|^(p-1); np.power takes three times as long
            loss = np.einsum("gn,gn->g", size, slope)
            better = loss < least[groups]
            groups, parameter = groups[better], parameter[better]
            best[groups], least[groups] = parameter, loss[better]
            if not groups.size:
                break
            if not better.all():
                steps, grid, error, size, slope = (array[better] for array in (steps, grid, error, size, slope))
            outliers = np.copysign(np.maximum(size - slope / np.float32(BETA * KAPPA**turn), 0), error)
            parameter = solve(steps - outliers, grid).astype(np.float32)
        return best

    def _errors(self, cells: Array, scale: Array, zero: Array) -> tuple[Array, Array]:
        """Σ |error|^norm and Σ error² [groups] with the scales as they are stored, rounded as `quantize` rounds."""
        wide, offset = scale.astype(np.float32)[:, None], zero[:, None]
        with np.errstate(divide="ignore", invalid="ignore"):  # a scale may have become 0 or infinite in half precision
            levels = np.clip(np.rint(cells / wide), self.format.qmin - offset, self.format.qmax - offset)
            error = np.abs(cells - levels * wide)
        power: Array = error**self.norm
        return power.sum(axis=-1, dtype=np.float64), np.einsum("gn,gn->g", error, error, dtype=np.float64)
