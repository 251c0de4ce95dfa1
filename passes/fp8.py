"""Rounds the weights and inputs of linear layers to 8-bit floating point.

**Before**  y = x W
**After**   y = (s_x · fp8(x / s_x)) (s_w · fp8(W / s_w)),  s = max |…| / 448 (E4M3) or / 57344 (E5M2)

Where eight bits of an integer are a grid of equal steps, those of a float are steps that grow with the number: E4M3
keeps three bits after the leading one (1/16 of a number at the most is lost), E5M2 two. So a few large numbers do not
take all codes from the small ones, and outliers of activations cost little. Rounding is to nearest, ties to even, and
what is too large saturates.

``granularity: row`` is the scheme of Llama 3 (Grattafiori et al. 2024, "The Llama 3 Herd of Models", section 6.2): a
scale for each token, found at run time, times a scale for each output channel. Three measures of the paper keep the
quality, and each is an option here:

- ``scale_cap``: no scale is made for a magnitude above 1200. Rare tokens with huge activations would otherwise push the
  token's other numbers below the smallest code; instead, the huge ones saturate. (The paper bounds "the dynamic scaling
  factors to 1200"; its kernels, FBGEMM's, bound the row's largest magnitude, and so does this pass.)
- ``first_and_last_block``: false leaves the linear layers of the first and the last block as they are.
- ``attention``: false leaves attention's projections (q, k, v, o, or packed ones) as they are.

``granularity: tensor`` has a scale for a whole weight and one for a whole input: static ones from the largest magnitude
that calibration meets, or (``dynamic``) the input's own each time. ``activations: false`` rounds weights alone.

ONNX Runtime has no fp8 matrix product on CPUs: there the layers compute in float, on rounded numbers, slower than
before. What fp8 costs in quality can be measured there.

Left out, with the reason in the report: see above. Skipped: weights that are quantized already, and constants in forms
that no pass handles (inside If or Loop bodies, batched weights, …).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir
from pydantic import Field
from pydantic.dataclasses import dataclass as options

from qcompiler.errors import RecipeError
from qcompiler.formats.arithmetic import scale_and_zero_point
from qcompiler.formats.scheme import PerTensor, PerToken, Scheme
from qcompiler.formats.search import quantize_weight
from qcompiler.graph.lazy import read
from qcompiler.graph.operators import has
from qcompiler.graph.rewriter import Rewriter
from qcompiler.rewriting.contract import OPTIONS, Changed, Changes, Kind, Pass, Skipped, Tap
from qcompiler.rewriting.pairs import Build, Pairs, float8_tensor_pair, float8_token_pair
from qcompiler.rewriting.weights import Reader, WeightPass
from qcompiler.sites.activations import is_quantized
from qcompiler.sites.analyses import sites_of
from qcompiler.sites.attention_layers import find_attention_projections
from qcompiler.sites.find import Linear
from qcompiler.sites.kinds import Sites
from qcompiler.statistics import ChannelRange, StatisticsStore

Format = Literal["fp8_e4m3", "fp8_e5m2"]

IN_ATTENTION = "it is a projection of attention (attention: true rounds it, too)"
AT_AN_END = "it is in the first or last block (first_and_last_block: true rounds it, too)"


@options(frozen=True, config=OPTIONS)
class Fp8(Pass):
    name: ClassVar[str] = "fp8"
    kind: ClassVar[Kind] = "rounding"

    format: Format = "fp8_e4m3"
    """Number format of the weights: more precision (E4M3) or more range (E5M2)."""
    activation_format: Format | None = None
    """Number format of the activations; open: that of the weights."""
    granularity: Literal["row", "tensor"] = "row"
    """What shares one scale: a token, and an output channel (row); or an input, and a weight, as a whole (tensor)."""
    activations: bool = True
    """Round the inputs of the layers, too."""
    dynamic: bool | None = None
    """Find the scales of inputs at run time, and not by calibration; open: with granularity row, which needs it."""
    scale_cap: float | None = Field(default=1200.0, gt=0)
    """The largest magnitude that a dynamic scale is made for; what is above saturates. null: none."""
    first_and_last_block: bool = False
    """Round the layers of the first and the last block, too."""
    attention: bool = False
    """Round attention's projections, too."""
    layers: tuple[Literal["linear", "head"], ...] = ("linear",)
    """Kinds of layers to work on; a head is a linear layer with one output for each row of an embedding (logits)."""

    def __post_init__(self) -> None:
        self.activation_scheme()

    def activation_scheme(self) -> Scheme:
        """What inputs are rounded to; raises `SchemeError` where the options do not go together."""
        per_token = self.granularity == "row"
        return Scheme(
            format=self.activation_format or self.format,
            granularity=PerToken() if per_token else PerTensor(),
            dynamic=per_token if self.dynamic is None else self.dynamic,
        )

    def taps(self, model: ir.Model) -> Sequence[Tap]:
        if not self.activations or self.activation_scheme().dynamic:
            return ()
        constants = self._weights(self._left_out(sites_of(model), model)).constants(model, Changes())
        inputs = dict.fromkeys(str(linear.input.name) for constant in constants for linear in constant.linears)
        return [Tap(value, ChannelRange()) for value in inputs]

    def apply(self, model: ir.Model, statistics: StatisticsStore) -> Changes:
        sites = sites_of(model)
        left_out = self._left_out(sites, model)
        changes = self._weights(left_out).apply(model, statistics)
        named = self._weights({}).wanted(sites)
        changes.excluded = [Skipped(site.name, left_out[site.name]) for site in named if site.name in left_out]
        if self.activations:
            self._round_inputs(model, statistics, changes)
        return changes

    def _weights(self, left_out: Mapping[str, str]) -> _Weights:
        return _Weights(
            targets=self.targets, ignore=self.ignore, format=self.format, layers=self.layers,
            granularity="channel" if self.granularity == "row" else "tensor", left_out=frozenset(left_out),
        )  # fmt: skip

    def _left_out(self, sites: Sites, model: ir.Model) -> dict[str, str]:
        """The layers that stay as they are, by name, and why. Raises RecipeError where no layer is in a block."""
        projections = find_attention_projections(model, sites.linears)
        reasons: dict[str, str] = {}
        if not self.first_and_last_block:
            ends = _ends(sites.linears, projections)
            reasons |= {linear.name: AT_AN_END for linear in sites.linears if linear.block in ends}
        if not self.attention:
            reasons |= {linear.name: IN_ATTENTION for linear in projections}
        return reasons

    def _round_inputs(self, model: ir.Model, statistics: StatisticsStore, changes: Changes) -> None:
        """Put pairs before the layers whose weights were rounded."""
        rounded = {changed.site for changed in changes.changed}
        rw = Rewriter(model, self.name)
        pairs = Pairs(rw)
        for site in sites_of(model).linears:
            if site.name not in rounded:
                continue
            if is_quantized(site.input):
                changes.skipped.append(Skipped(site.name, "its input is quantized already"))
                continue
            pairs.read(site, self._pair(statistics, rw))
            changes.changed.append(Changed(site.name, activation=self.activation_scheme()))

    def _pair(self, statistics: StatisticsStore, rw: Rewriter) -> Build:
        scheme = self.activation_scheme()
        if not scheme.dynamic:
            return lambda source, dtype: self._static_pair(source, dtype, statistics, rw)
        build = float8_token_pair if self.granularity == "row" else float8_tensor_pair
        to, qmax = ir.DataType[scheme.number_format.storage], scheme.number_format.qmax
        cap = math.inf if self.scale_cap is None else self.scale_cap
        return lambda source, dtype: build(source, dtype, rw, to, qmax, cap)

    def _static_pair(
        self, source: ir.Value, dtype: ir.DataType, statistics: StatisticsStore, rw: Rewriter
    ) -> list[ir.Node]:
        scheme, base = self.activation_scheme(), str(source.name)
        bounds = statistics.get(base, ChannelRange()).tensor_range()
        scale, _ = scale_and_zero_point(bounds.lo, bounds.hi, scheme, scale_dtype=dtype.numpy())
        zero = np.zeros((), scheme.number_format.dtype)  # QuantizeLinear takes the type of the codes from it
        s = rw.constant(f"{base}.scale", np.asarray(scale))
        z = rw.constant(f"{base}.zero_point", zero)
        nodes = []
        if _is_clipped(source):
            # ONNX Runtime drops a Relu before QuantizeLinear, taking the zero point for the least code, and cannot open
            # a model with a Clip there. A Max of one value is that value, and stands between.
            nodes.append(rw.node("Max", [source], f"{base}.kept", dtype=dtype, shape=source.shape))
            source = nodes[-1].outputs[0]
        quantize = rw.node("QuantizeLinear", [source, s, z], f"{base}.quantized",
                           dtype=z.dtype, shape=source.shape)  # fmt: skip
        dequantize = rw.node("DequantizeLinear", [quantize.outputs[0], s, z], f"{base}.dequantized",
                             dtype=dtype, shape=source.shape)  # fmt: skip
        return [*nodes, quantize, dequantize]


@options(frozen=True, config=OPTIONS)
class _Weights(WeightPass):
    """The half of the pass that rounds weights."""

    name: ClassVar[str] = "fp8"
    kind: ClassVar[Kind] = "rounding"

    left_out: frozenset[str] = frozenset()
    """Names of layers that stay as they are."""

    def wanted(self, sites: Sites) -> list[Reader]:
        return [site for site in WeightPass.wanted(self, sites) if site.name not in self.left_out]

    def apply(self, model: ir.Model, statistics: StatisticsStore) -> Changes:
        changes, rw = Changes(), Rewriter(model, self.name)
        for constant in self.constants(model, changes):
            choose = partial(
                quantize_weight, scheme=constant.scheme, channel_axis=constant.channel_axis,
                scale_dtype=constant.tensor.dtype.numpy(), name=constant.name,
            )  # fmt: skip
            self.install(constant, read(constant.tensor, choose), rw, changes, nearest=True)
        return changes


def _is_clipped(value: ir.Value) -> bool:
    """Whether a Relu or Clip made the value, or what it was moved from."""
    node = value.producer()
    while node is not None and has(node, "propagates") and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    return node is not None and node.domain == "" and node.op_type in ("Relu", "Clip")


def _ends(linears: Sequence[Linear], projections: Sequence[Linear]) -> set[str]:
    """The first and the last block of each stack of blocks that attend; none where nothing attends.

    A stack is what blocks have in common but their number: encoder.layers, decoder.layers.
    """
    stacks = {_stack(linear) for linear in projections if linear.block}
    if projections and not stacks:
        raise RecipeError(
            "fp8.first_and_last_block: the names of the layers do not say to which block they belong; set it to true, "
            "and name the layers to leave out in ignore"
        )
    ends: set[str] = set()
    for stack in stacks:
        blocks = {linear.block for linear in linears if linear.block and _stack(linear) == stack}
        ends |= {min(blocks, key=_number), max(blocks, key=_number)}
    return ends


def _stack(linear: Linear) -> str:
    return linear.block.rpartition(".")[0]


def _number(block: str) -> int:
    return int(block.rpartition(".")[2])
