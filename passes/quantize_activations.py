"""Quantizes the inputs of layers whose weights are quantized, with scales from calibration or found at run time.

**Before**  y = x · DequantizeLinear(Q_w, …)
**After**   static                y = DequantizeLinear(QuantizeLinear(x, s, z), s, z) · DequantizeLinear(Q_w, …)
            dynamic               y = DequantizeLinear(DynamicQuantizeLinear(x)) · DequantizeLinear(Q_w, …)
            dynamic, per token    y = DequantizePerToken(DynamicQuantizePerToken(x)) · DequantizeLinear(Q_w, …)

Each value gets one pair of nodes, whichever layers share it.

Static: the range comes from calibration: the extremes (``minmax``), their moving average, a percentile
(``percentile``), the range with the smallest mean over tokens of the relative squared error (``mse``) or with the
smallest Kullback-Leibler divergence (``entropy``). Scale and zero point follow from it as in ONNX's QuantizeLinear: s =
(hi - lo) / (levels - 1), z = round(qmin - lo / s), and 0 is always exact.

``outputs`` puts a pair behind each convolution, too (behind the Relu or Clip that follows it), because a kernel that
keeps integers from layer to layer needs to know the scale of its result.

``dynamic``: the range is that of the value itself, each time that the model runs, so nothing needs to be measured.
``granularity: tensor`` has one range for the whole value, and so for all samples of a batch: uint8, asymmetric.
``granularity: token`` has one scale for each row of x [..., K]: s = max |row| / 127, codes = round(row / s). Together
with weights that have a scale for each output channel that is vector-wise quantization, as a row's scale and a
column's multiply the integer product from the outside: y_ij ≈ s_i t_j Σ_k X_ik W_kj (Dettmers et al. 2022,
"LLM.int8()", section 2.2, eq. 3 and 4). It is always symmetric: a zero point for each row would need the sums of the
weight's columns multiplied in, and no kernel does that. With ``format: int4`` codes are -7 … 7.

Left out: layers whose weight is float, as there is nothing to win (a pass that quantizes weights comes first).
Skipped: inputs that are quantized already; convolutions where scales are per token, as their inputs have no rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import is_dataclass, replace
from difflib import get_close_matches
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import onnx_ir as ir
from pydantic import Field
from pydantic.dataclasses import dataclass as options

from qcompiler.errors import RecipeError, SchemeError, persons_code
from qcompiler.formats.arithmetic import scale_and_zero_point
from qcompiler.formats.scheme import PerTensor, PerToken, Scheme
from qcompiler.graph.rewriter import Rewriter
from qcompiler.recipes.registry import users_own
from qcompiler.rewriting.bias_room import make_room
from qcompiler.rewriting.contract import OPTIONS, Changed, Changes, Kind, Pass, Skipped, Tap
from qcompiler.rewriting.pairs import Build, Pairs, Quantizable, tensor_pair, token_pair
from qcompiler.sites.activations import activation_of, is_quantized
from qcompiler.sites.analyses import sites_of
from qcompiler.sites.find import Convolution, Linear
from qcompiler.statistics import (
    MSE,
    ChannelRange,
    Entropy,
    MinMax,
    MovingAverageMinMax,
    Percentile,
    Range,
    Statistic,
    StatisticsStore,
)

if TYPE_CHECKING:
    from qcompiler.targets import Target

FORMATS = ("uint8", "int8", "uint16", "int16")
TOKEN_FORMATS = ("int8", "int4")
RANGES = ("minmax", "moving-average", "percentile", "mse", "entropy")


@options(frozen=True, config=OPTIONS)
class QuantizeActivations(Pass):
    name: ClassVar[str] = "quantize-activations"
    kind: ClassVar[Kind] = "rounding"

    format: str | None = None
    """uint8, int8, uint16 or int16; int8 or int4 where scales are per token. Open: uint8, or int8 per token."""
    symmetric: bool | None = None
    """Without a zero point of its own (uint8 then has zero point 128); open: only where scales are per token."""
    granularity: Literal["tensor", "token"] = "tensor"
    """What shares one scale: the whole value, or a row of it (token), which is always dynamic."""
    dynamic: bool | None = None
    """Find scales at run time, and not by calibration; open: where they are per token."""
    range: str = "minmax"
    """How a static range is chosen: minmax, moving-average, percentile, mse, entropy, or `module:Class` (your own)."""
    percent: float = Field(default=99.999, gt=50, le=100)
    """Share of the values that `range: percentile` keeps."""
    outputs: bool = True
    """Quantize the outputs of convolutions, too, where scales are static."""

    def __post_init__(self) -> None:
        if self.range not in RANGES and ":" not in self.range:
            near = f" (did you mean {closest[0]!r}?)" if (closest := get_close_matches(self.range, RANGES, 1)) else ""
            raise SchemeError(
                f"range {self.range!r} is unknown{near}: choose one of {', '.join(RANGES)}, or module:Class."
            )
        if ":" in self.range:
            _own_statistic(self.range)  # a mistake shows at once, and saved statistics of the class can be read
        _check(self.scheme(), self.range)

    def scheme(self) -> Scheme:
        """The options as a scheme, with what they leave open; raises `SchemeError` where they do not go together."""
        per_token = self.granularity == "token"
        return Scheme(
            format=self.format or ("int8" if per_token else "uint8"),
            granularity=PerToken() if per_token else PerTensor(),
            symmetric=per_token if self.symmetric is None else self.symmetric,
            dynamic=per_token if self.dynamic is None else self.dynamic,
        )

    def for_target(self, target: Target) -> Pass:
        scheme = self.scheme()
        return replace(self, format=scheme.format, symmetric=scheme.symmetric, dynamic=scheme.dynamic)

    def taps(self, model: ir.Model) -> Sequence[Tap]:
        if self.scheme().dynamic:
            return ()
        taps: list[Tap] = []
        for site in self._sites(model):
            if not is_quantized(site.input):
                taps.append(Tap(str(site.input.name), self._statistic(site)))
            if self.outputs and isinstance(site, Convolution):
                taps.append(Tap(str(_end_of(site).name), self._statistic(site)))
        return list({(tap.value, tap.statistic.key): tap for tap in taps}.values())

    def apply(self, model: ir.Model, statistics: StatisticsStore) -> Changes:
        changes, scheme = Changes(), self.scheme()
        rw = Rewriter(model, self.name)
        pairs = Pairs(rw)
        sites = self._sites(model)
        for site in sites:
            if site.dequantize is None:
                changes.excluded.append(Skipped(site.name, "its weight is float"))
                continue
            obstacle = _obstacle(site, scheme)
            if obstacle is not None:
                changes.skipped.append(Skipped(site.name, obstacle))
                continue
            pairs.read(site, self._build(model, site, statistics, rw))
            told = activation_of(site.node.inputs[0]).scheme  # a range can have its zero point in the middle by itself
            symmetric = scheme.symmetric if told is None else told.symmetric
            changes.changed.append(Changed(site.name, activation=replace(scheme, symmetric=symmetric)))
        if self.outputs and not scheme.dynamic:
            for site in sites:
                if isinstance(site, Convolution) and site.dequantize is not None:
                    self._quantize_output(site, pairs, self._build(model, site, statistics, rw))
        for site in sites:
            make_room(site, rw)
        return changes

    def _sites(self, model: ir.Model) -> list[Quantizable]:
        found = sites_of(model)
        return [site for site in found if isinstance(site, Linear | Convolution) and self.selects(site)]

    def _statistic(self, site: Quantizable) -> Statistic:
        scheme = self.scheme()
        match self.range:
            case "minmax":
                # Per channel where that is possible: smoothing can rescale it, so that nothing is measured twice.
                return ChannelRange() if isinstance(site, Linear) else MinMax()
            case "moving-average":
                return MovingAverageMinMax()
            case "percentile":
                return Percentile(percent=self.percent)
            case "mse":
                tokens = isinstance(site, Linear)  # what a convolution reads has no rows
                return MSE(format=scheme.format, symmetric=bool(scheme.symmetric), per_token=tokens)
            case "entropy":
                return Entropy(bits=min(scheme.number_format.bits, 8))
            case path:
                return _own_statistic(path)

    def _build(self, model: ir.Model, site: Quantizable, statistics: StatisticsStore, rw: Rewriter) -> Build:
        """Makes the pair of nodes for a value that the site reads or writes."""
        scheme = self.scheme()
        if not scheme.dynamic:
            return lambda source, dtype: self._static_pair(model.graph, source, dtype, site, statistics, rw)
        if isinstance(scheme.granularity, PerToken):
            return lambda source, dtype: token_pair(source, dtype, rw, scheme.number_format.qmax)
        return lambda source, dtype: tensor_pair(source, dtype, rw)

    def _static_pair(
        self, graph: ir.Graph, source: ir.Value, dtype: ir.DataType, site: Quantizable, statistics: StatisticsStore,
        rw: Rewriter,
    ) -> list[ir.Node]:  # fmt: skip
        scheme = self.scheme()
        bounds = _bounds(statistics.get(str(source.name), self._statistic(site)))
        scale, zero_point = scale_and_zero_point(bounds.lo, bounds.hi, scheme, scale_dtype=dtype.numpy())
        number_format = scheme.number_format
        if zero_point is None:
            zero_point = np.zeros((), number_format.dtype)
        s = rw.constant(f"{source.name}.scale", np.asarray(scale), graph)
        z = rw.constant(f"{source.name}.zero_point", np.asarray(zero_point, number_format.dtype), graph)
        quantize = rw.node("QuantizeLinear", [source, s, z], f"{source.name}.quantized",
                           dtype=ir.DataType[number_format.storage], shape=source.shape)  # fmt: skip
        dequantize = rw.node("DequantizeLinear", [quantize.outputs[0], s, z],
                             f"{source.name}.dequantized", dtype=dtype, shape=source.shape)  # fmt: skip
        return [quantize, dequantize]

    def _quantize_output(self, site: Convolution, pairs: Pairs, build: Build) -> None:
        """Every reader of the convolution's result reads the pair behind it; readers that have one already stay."""
        end = _end_of(site)
        if end.is_graph_output():
            return
        if end not in pairs and any(use.node.op_type == "QuantizeLinear" for use in end.uses()):
            return  # the model came with a pair of its own
        pair = pairs.at(end, site, build)
        for use in list(end.uses()):
            if use.node.op_type != "QuantizeLinear":
                use.node.replace_input_with(use.idx, pair)


def _check(scheme: Scheme, range: str) -> None:
    """Raise `SchemeError` where activations cannot have the scheme, or a range is to be measured for nothing."""
    per_token = isinstance(scheme.granularity, PerToken)
    if scheme.dynamic and range != "minmax":
        raise SchemeError(f"range {range} is measured on calibration data, and dynamic scales need none: leave it out.")
    if scheme.dynamic and not per_token and (scheme.format != "uint8" or scheme.symmetric):
        raise SchemeError(
            "dynamic activations with one scale for the tensor are uint8 with a zero point, as DynamicQuantizeLinear "
            "makes them: leave format and symmetric out, or set granularity to token."
        )
    if per_token and not scheme.symmetric:
        raise SchemeError(
            "activations with a scale for each token are symmetric, as no kernel takes a zero point for each row: "
            "leave symmetric out, or set granularity to tensor."
        )
    formats = TOKEN_FORMATS if per_token else FORMATS
    if scheme.format not in formats:
        raise SchemeError(
            f"activations with a scale for each {'token' if per_token else 'tensor'} are {', '.join(formats[:-1])} or "
            f"{formats[-1]}, not {scheme.format}."
        )


def _obstacle(site: Quantizable, scheme: Scheme) -> str | None:
    """Why the input of a layer stays as it is, or None."""
    if is_quantized(site.input):
        return "its input is quantized already"
    if isinstance(site, Convolution) and isinstance(scheme.granularity, PerToken):
        return "the input of a convolution has no rows to scale: use granularity tensor"
    return None


def _end_of(site: Convolution) -> ir.Value:
    """The convolution's result after the activation function that a kernel can absorb."""
    uses = list(site.output.uses())
    if len(uses) == 1 and not site.output.is_graph_output() and uses[0].node.op_type in ("Relu", "Clip"):
        return uses[0].node.outputs[0]
    return site.output


def _own_statistic(path: str) -> Statistic:
    """The user's class named `module:Class`. Raises `RecipeError` where there is none."""
    with persons_code(RecipeError, f"quantize-activations.range: the import of {path}"):
        found = users_own(path)
    if not (isinstance(found, type) and issubclass(found, Statistic)):
        raise RecipeError(f"quantize-activations.range: {path!r} is no subclass of qcompiler.Statistic.")
    if not is_dataclass(found):
        raise RecipeError(f"quantize-activations.range: {path} is no dataclass, so what it measured cannot be saved.")
    with persons_code(RecipeError, f"quantize-activations.range: {path} cannot be made without arguments; it"):
        return found()


def _bounds(statistic: Statistic) -> Range:
    """The range of the whole tensor."""
    with persons_code(RecipeError, f"the statistic {statistic.key}"):
        result = statistic.tensor_range() if isinstance(statistic, ChannelRange) else statistic.result()
    if not isinstance(result, Range):
        raise RecipeError(f"{statistic.key} gives {type(result).__name__}, and a range of activations needs a Range.")
    return result
