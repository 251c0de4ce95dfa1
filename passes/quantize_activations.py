"""Quantizes the inputs of layers whose weights are quantized, with one static scale for each value.

**Before**  y = x · DequantizeLinear(Q_w, …)
**After**   y = DequantizeLinear(QuantizeLinear(x, s, z), s, z) · DequantizeLinear(Q_w, …)

Each value gets one QuantizeLinear/DequantizeLinear pair, whichever layers share it. The range comes from calibration:
the extremes (``minmax``), their moving average, a percentile (``percentile``), the range with the smallest squared
error (``mse``) or with the smallest Kullback-Leibler divergence (``entropy``). Scale and zero point follow from it as
in ONNX's QuantizeLinear: s = (hi - lo) / (levels - 1), z = round(qmin - lo / s), and 0 is always exact.

``outputs`` puts a pair behind each convolution, too (behind the Relu or Clip that follows it), because a kernel that
keeps integers from layer to layer needs to know the scale of its result.

Skipped: layers whose weight is float, as there is nothing to win, and inputs that are quantized already.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import is_dataclass
from difflib import get_close_matches
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir
from pydantic import Field
from pydantic.dataclasses import dataclass as options

from qcompiler.errors import RecipeError, SchemeError
from qcompiler.graph import Names, add_constant, inherit, insert_after, insert_before, new_node, node_graph
from qcompiler.match import Convolution, Linear, find_sites
from qcompiler.quantize import scale_and_zero_point
from qcompiler.registry import users_own
from qcompiler.rewrite import OPTIONS, Changed, Changes, Kind, Pass, Skipped, Tap
from qcompiler.scheme import FORMATS, PerTensor, Scheme
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

Quantizable = Linear | Convolution
RANGES = ("minmax", "moving-average", "percentile", "mse", "entropy")


@options(frozen=True, config=OPTIONS)
class QuantizeActivations(Pass):
    name: ClassVar[str] = "quantize-activations"
    kind: ClassVar[Kind] = "rounding"

    format: Literal["uint8", "int8", "uint16", "int16"] = "uint8"
    """Number format of the activations."""
    symmetric: bool = False
    """Without a zero point of its own (uint8 then has zero point 128)."""
    range: str = "minmax"
    """How the range is chosen: minmax, moving-average, percentile, mse, entropy, or `module:Class` (your Statistic)."""
    percent: float = Field(default=99.999, gt=50, le=100)
    """Share of the values that `range: percentile` keeps."""
    outputs: bool = True
    """Quantize the outputs of convolutions, too."""

    def __post_init__(self) -> None:
        if self.range not in RANGES and ":" not in self.range:
            near = f" (did you mean {closest[0]!r}?)" if (closest := get_close_matches(self.range, RANGES, 1)) else ""
            raise SchemeError(
                f"range {self.range!r} is unknown{near}: choose one of {', '.join(RANGES)}, or module:Class."
            )
        if ":" in self.range:
            _own_statistic(self.range)  # a mistake shows at once, and saved statistics of the class can be read

    def scheme(self) -> Scheme:
        return Scheme(self.format, PerTensor(), self.symmetric)

    def taps(self, model: ir.Model) -> Sequence[Tap]:
        taps: list[Tap] = []
        for site in self._sites(model):
            if not _is_dequantized(site.input):
                taps.append(Tap(str(site.input.name), self._statistic(site)))
            if self.outputs and isinstance(site, Convolution):
                taps.append(Tap(str(_end_of(site).name), self._statistic(site)))
        return list({(tap.value, tap.statistic.key): tap for tap in taps}.values())

    def apply(self, model: ir.Model, statistics: StatisticsStore) -> Changes:
        changes = Changes()
        names = Names(model.graph)
        pairs: dict[ir.Value, ir.Value] = {}
        sites = self._sites(model)
        for site in sites:
            if site.dequantize is None:
                changes.skipped.append(Skipped(site.name, "its weight is float (quantize-weights comes first)"))
                continue
            source = site.input
            if _is_dequantized(source):
                changes.skipped.append(Skipped(site.name, "its input is quantized already"))
                continue
            if source not in pairs:
                pairs[source] = self._insert_pair(source, site, statistics, names)
            site.node.replace_input_with(0, pairs[source])
            changes.changed.append(Changed(site.name, scheme=f"activations {self.scheme()}"))
        if self.outputs:
            for site in sites:
                if isinstance(site, Convolution) and site.dequantize is not None:
                    self._quantize_output(site, pairs, statistics, names)
        return changes

    def _sites(self, model: ir.Model) -> list[Quantizable]:
        found = find_sites(model)
        return [site for site in found if isinstance(site, Linear | Convolution) and self.selects(site)]

    def _statistic(self, site: Quantizable) -> Statistic:
        match self.range:
            case "minmax":
                # Per channel where that is possible: smoothing can rescale it, so that nothing is measured twice.
                return ChannelRange() if isinstance(site, Linear) else MinMax()
            case "moving-average":
                return MovingAverageMinMax()
            case "percentile":
                return Percentile(percent=self.percent)
            case "mse":
                return MSE(format=self.format, symmetric=self.symmetric)
            case "entropy":
                return Entropy(bits=min(FORMATS[self.format].bits, 8))
            case path:
                return _own_statistic(path)

    def _insert_pair(self, source: ir.Value, site: Quantizable, statistics: StatisticsStore, names: Names) -> ir.Value:
        """QuantizeLinear and DequantizeLinear right behind the producer of `source`, so before all readers."""
        assert site.dequantize is not None
        bounds = _bounds(statistics.get(str(source.name), self._statistic(site)))
        # Shape inference stops at operators of ONNX Runtime; the layer's other operand has the type, too.
        dtype = source.dtype or site.dequantize.outputs[0].dtype or ir.DataType.FLOAT
        scale, zero_point = scale_and_zero_point(bounds.lo, bounds.hi, self.scheme(), scale_dtype=dtype.numpy())
        number_format, graph = FORMATS[self.format], node_graph(site.node)
        if zero_point is None:
            zero_point = np.zeros((), number_format.dtype)
        s = add_constant(graph, names.fresh(f"{source.name}.scale"), np.asarray(scale))
        z = add_constant(graph, names.fresh(f"{source.name}.zero_point"), np.asarray(zero_point, number_format.dtype))
        quantize = new_node("QuantizeLinear", [source, s, z], names.fresh(f"{source.name}.quantized"),
                            dtype=ir.DataType[number_format.storage], shape=source.shape)  # fmt: skip
        dequantize = new_node("DequantizeLinear", [quantize.outputs[0], s, z],
                              names.fresh(f"{source.name}.dequantized"), dtype=dtype, shape=source.shape)  # fmt: skip
        inherit([quantize, dequantize], site.node, self.name)
        producer = source.producer()
        if producer is not None:
            insert_after(producer, [quantize, dequantize])
        else:
            insert_before(site.node, [quantize, dequantize])
        return dequantize.outputs[0]

    def _quantize_output(
        self, site: Convolution, pairs: dict[ir.Value, ir.Value], statistics: StatisticsStore, names: Names
    ) -> None:
        """Every reader of the convolution's result reads the pair behind it; readers that have one already stay."""
        end = _end_of(site)
        if end.is_graph_output():
            return
        if end not in pairs:
            if any(use.node.op_type == "QuantizeLinear" for use in end.uses()):
                return  # the model came with a pair of its own
            pairs[end] = self._insert_pair(end, site, statistics, names)
        pair = pairs[end]
        for use in list(end.uses()):
            if use.node.op_type != "QuantizeLinear":
                use.node.replace_input_with(use.idx, pair)


def _is_dequantized(value: ir.Value) -> bool:
    producer = value.producer()
    return producer is not None and producer.op_type == "DequantizeLinear"


def _end_of(site: Convolution) -> ir.Value:
    """The convolution's result after the activation function that a kernel can absorb."""
    uses = list(site.output.uses())
    if len(uses) == 1 and not site.output.is_graph_output() and uses[0].node.op_type in ("Relu", "Clip"):
        return uses[0].node.outputs[0]
    return site.output


def _own_statistic(path: str) -> Statistic:
    """The user's class named `module:Class`. Raises `RecipeError` where there is none."""
    try:
        found = users_own(path)
    except Exception as error:  # a user's module may raise anything
        raise RecipeError(
            f"quantize-activations.range: {path} cannot be imported ({type(error).__name__}: {error})."
        ) from error
    if not (isinstance(found, type) and issubclass(found, Statistic)):
        raise RecipeError(f"quantize-activations.range: {path!r} is no subclass of qcompiler.Statistic.")
    if not is_dataclass(found):
        raise RecipeError(f"quantize-activations.range: {path} is no dataclass, so what it measured cannot be saved.")
    try:
        return found()
    except TypeError as error:
        raise RecipeError(f"quantize-activations.range: {path} cannot be made without arguments: {error}.") from error


def _bounds(statistic: Statistic) -> Range:
    """The range of the whole tensor."""
    result = statistic.tensor_range() if isinstance(statistic, ChannelRange) else statistic.result()
    if not isinstance(result, Range):
        raise RecipeError(f"{statistic.key} gives {type(result).__name__}, and a range of activations needs a Range.")
    return result
