"""Rounds the constants of linear layers, convolutions and embeddings to a low-bit format (round-to-nearest).

**Before**  y = x W            **After**  y = x · DequantizeLinear(Q, s, z),  Q = clip(round(W / s) + z)

Linear layers and convolutions get their weight through one DequantizeLinear; an embedding gathers codes and scales and
multiplies the few rows it gathered. A constant that several nodes share (tied embeddings) is quantized once and stored
once; a reader that the recipe excludes keeps the float constant.

Scales are those of the largest magnitude (``search: minmax``), or of the shrunken range with the smallest squared error
(``search: mse``), per tensor, per output channel, or per group of input features. The rounding is that of ONNX's
QuantizeLinear (to nearest, ties to even). Embeddings always have one scale for each row.

``saturation_safe`` is for recipes that quantize activations as well: on x86 CPUs without VNNI, ONNX Runtime's uint8 ×
int8 kernel adds the products of two neighbouring inputs in 16 bits and saturates without a word. The scale of an output
channel is raised until two neighbouring codes never add up to more than 128 (about 1.3 × on Gaussian weights), and
convolutions are stored as uint8, whose kernel is exact.

Skipped: constants in forms that no pass handles (inside If or Loop bodies, batched weights, …), each with its reason.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np
import onnx
import onnx_ir as ir
from pydantic import Field
from pydantic.dataclasses import dataclass as options

from qcompiler.errors import SchemeError
from qcompiler.graph import (
    Names,
    add_constant,
    add_provenance,
    constant,
    inherit,
    insert_before,
    new_node,
    node_graph,
    remove_node_if_unused,
    remove_unused_constant,
    replace_output,
)
from qcompiler.match import Convolution, Embedding, Linear, find_sites
from qcompiler.quantize import Quantized, quantize, quantize_weight
from qcompiler.rewrite import OPTIONS, Changed, Changes, Kind, Pass, Skipped
from qcompiler.saturation import saturation_safe_scale
from qcompiler.scheme import FORMATS, PerChannel, Scheme
from qcompiler.statistics import StatisticsStore
from qcompiler.tensors import derived, read

Reader = Linear | Convolution | Embedding


@options(frozen=True, config=OPTIONS)
class QuantizeWeights(Pass):
    name: ClassVar[str] = "quantize-weights"
    kind: ClassVar[Kind] = "rounding"

    format: str = "int8"
    """Number format of the codes: int8, uint8 (the same with zero point 128), int4, uint4, int3, int16, fp8_e4m3, …"""
    granularity: Literal["tensor", "channel", "group"] = "channel"
    """What shares one scale: the whole tensor, an output channel, or `group_size` input features of a channel."""
    group_size: int | None = Field(default=None, ge=1)
    """Input features in a group (granularity group)."""
    symmetric: bool = True
    """Without a zero point of its own for each scale."""
    search: Literal["minmax", "mse"] = "minmax"
    """How a range is chosen: the whole range, or the one with the smallest squared error."""
    saturation_safe: bool = False
    """Keep sums of two int8 products within 16 bits (symmetric weights, scales per tensor or channel): see above."""
    layers: tuple[Literal["linear", "convolution", "embedding"], ...] = ("linear", "convolution", "embedding")
    """Kinds of layers to work on."""

    def scheme(self) -> Scheme:
        """The options as a scheme; raises `SchemeError` where they do not go together."""
        return Scheme.from_options(self.format, self.granularity, self.group_size, self.symmetric)

    def __post_init__(self) -> None:
        self.scheme()
        if self.format in ("nf4", "int32"):
            raise SchemeError(f"quantize-weights.format: DequantizeLinear cannot decode weights in {self.format}.")

    def apply(self, model: ir.Model, statistics: StatisticsStore) -> Changes:
        operators = _Operators(model.opset_imports[""], FORMATS[self.format].storage)
        operators.check(self.format)
        changes = Changes()
        sites = find_sites(model)
        changes.skipped.extend(Skipped(site.name, site.reason) for site in self.selected(sites.unsupported))
        wanted: list[Reader] = []
        wanted += [site for site in self.selected(sites.linears) if "linear" in self.layers]
        wanted += [site for site in self.selected(sites.convolutions) if "convolution" in self.layers]
        wanted += [site for site in self.selected(sites.embeddings) if "embedding" in self.layers]

        by_constant: dict[ir.Value, list[Reader]] = {}
        for site in wanted:
            by_constant.setdefault(_weight(site), []).append(site)
        names = Names(model.graph)
        for weight, readers in by_constant.items():
            fitting: list[Reader] = []
            for site in readers:
                obstacle = self._obstacle(site, fitting or [site], operators)
                if obstacle is None:
                    fitting.append(site)
                else:
                    changes.skipped.append(Skipped(site.name, obstacle))
            if fitting:
                self._quantize_constant(weight, fitting, names, changes)
        return changes

    def _obstacle(self, site: Reader, before: list[Reader], operators: _Operators) -> str | None:
        """Why this reader of a constant, which the layers `before` it read as well, cannot have codes; or None."""
        dtype = _tensor(_weight(site)).dtype
        if not isinstance(site, Embedding) and site.dequantize is not None:
            return "its weight is quantized already"
        if not operators.scales_can_be(dtype):
            return f"its weight is {dtype.name}, and DequantizeLinear has no scales of that type"
        if isinstance(site, Convolution) and self.granularity == "group":
            return "convolutions have no groups of input features: use granularity channel"
        if isinstance(site, Embedding) and not operators.codes_can_be_gathered:
            return f"Gather does not take {self.format} codes: choose int8 or uint8 for embeddings"
        if site.channel_axis != before[0].channel_axis:
            return f"{before[0].name} shares its constant and needs scales along the other axis"
        return None

    def _quantize_constant(self, weight: ir.Value, fitting: list[Reader], names: Names, changes: Changes) -> None:
        axis = fitting[0].channel_axis
        scheme = self._scheme_for(fitting)
        name = fitting[0].module_path
        safe = self.saturation_safe and any(isinstance(site, Linear) for site in fitting)

        def choose(data: np.ndarray) -> Quantized:
            found = quantize_weight(
                data, scheme, channel_axis=axis, search=self.search, scale_dtype=data.dtype, name=name
            )
            if safe and scheme.format == "int8" and scheme.symmetric and found.block_size is None:
                return replace(found, scale=saturation_safe_scale(data, found.scale, axis))
            return found

        quantized = read(_tensor(weight), choose)
        codes = _Codes(fitting[0].node, weight, quantized, names)
        for site in fitting:
            if isinstance(site, Embedding):
                codes.gather_for(site, names, self.name)
            else:
                codes.dequantize_for(site, names, self.name)
            changes.changed.append(Changed(site.name, scheme=str(scheme)))
        remove_unused_constant(weight)

    def _scheme_for(self, readers: list[Reader]) -> Scheme:
        """Embeddings are dequantized row by row, so a constant that one of them reads has a scale for each row."""
        if any(isinstance(site, Embedding) for site in readers):
            return Scheme(self.format, PerChannel(), self.symmetric)
        if self.saturation_safe and self.format == "int8" and any(isinstance(site, Convolution) for site in readers):
            return Scheme("uint8", self.scheme().granularity, self.symmetric)
        return self.scheme()


@dataclass(frozen=True)
class _Operators:
    """What the standard operators of an opset can do with codes of a type."""

    opset: int
    storage: str

    def check(self, format: str) -> None:
        """Raise `SchemeError` where no DequantizeLinear decodes the codes."""
        if _type(self.storage) not in self._types("DequantizeLinear", 0):
            raise SchemeError(
                f"quantize-weights.format: DequantizeLinear of opset {self.opset} has no {self.storage} for {format}; "
                "choose another format, or export the model with a newer opset."
            )

    def scales_can_be(self, dtype: ir.DataType) -> bool:
        return _type(dtype.name) in self._types("DequantizeLinear", 1)

    @property
    def codes_can_be_gathered(self) -> bool:
        return _type(self.storage) in self._types("Gather", 0)

    def _types(self, operator: str, index: int) -> Collection[str]:
        types: Collection[str] = onnx.defs.get_schema(operator, self.opset).inputs[index].types
        return types


def _type(name: str) -> str:
    return f"tensor({name.lower()})"


class _Codes:
    """The quantized constant in the graph: codes (computed when written), scale, zero point, one DequantizeLinear."""

    def __init__(self, anchor: ir.Node, weight: ir.Value, quantized: Quantized, names: Names) -> None:
        tensor, graph, base = _tensor(weight), node_graph(anchor), str(weight.name)
        storage = ir.DataType[FORMATS[quantized.format].storage]
        scale, zero_point = quantized.scale, quantized.zero_point
        format, axis, block_size = quantized.format, quantized.axis, quantized.block_size  # the lambda keeps no codes
        codes = derived(
            tensor, lambda data: quantize(data, scale, zero_point, format, axis, block_size), storage,
            tuple(int(size) for size in tensor.shape.numpy()), f"{base}.codes",
        )  # fmt: skip
        self.codes = add_constant(graph, names.fresh(f"{base}.codes"), codes)
        self.scale = add_constant(graph, names.fresh(f"{base}.scale"), scale)
        self.zero_point: ir.Value | None = None
        if zero_point is not None:
            stored = ir.Tensor(np.ascontiguousarray(zero_point), dtype=storage, shape=ir.Shape(zero_point.shape))
            self.zero_point = add_constant(graph, names.fresh(f"{base}.zero_point"), stored)
        self.base, self.axis, self.block_size, self.dtype = base, axis, block_size, tensor.dtype
        self._dequantized: ir.Value | None = None
        self._transposed: ir.Value | None = None

    def dequantize_for(self, site: Linear | Convolution, names: Names, pass_name: str) -> None:
        """Let the layer read the dequantized constant; the first layer in graph order brings the node."""
        if self._dequantized is None:
            settings: dict[str, object] = {"axis": self.axis, "block_size": self.block_size}
            node = new_node(
                "DequantizeLinear",
                [self.codes, self.scale, *([self.zero_point] if self.zero_point is not None else [])],
                names.fresh(f"{self.base}.dequantized"), dtype=self.dtype, shape=self.codes.shape,
                attributes={key: value for key, value in settings.items() if value is not None},
            )  # fmt: skip
            inherit([node], site.node, pass_name)
            insert_before(site.node, [node])
            self._dequantized = node.outputs[0]
        transpose = site.transpose if isinstance(site, Linear) else None
        source = self._dequantized if transpose is None else self._transposed_for(site, transpose, names, pass_name)
        site.node.replace_input_with(1, source)
        add_provenance(site.node, pass_name)
        if transpose is not None and transpose.graph is not None:
            remove_node_if_unused(transpose)

    def _transposed_for(self, site: Reader, old: ir.Node, names: Names, pass_name: str) -> ir.Value:
        """A Transpose of its own: excluded layers may read the old one, and it may stand before all of the layers."""
        if self._transposed is None:
            turned = new_node("Transpose", [self._dequantized], names.fresh(f"{self.base}.dequantized.transposed"),
                              like=old.outputs[0], attributes={"perm": [1, 0]})  # fmt: skip
            inherit([turned], old, pass_name)
            insert_before(site.node, [turned])
            self._transposed = turned.outputs[0]
        return self._transposed

    def gather_for(self, site: Embedding, names: Names, pass_name: str) -> None:
        """Gather(table, ids) becomes (Gather(codes, ids) - Gather(zero points, ids)) * Gather(scales, ids)."""
        gather, rows = site.node, site.output
        base = site.name

        def of_row(vector: ir.Value, kind: str) -> list[ir.Node]:
            picked = new_node(
                "Gather", [vector, site.ids], names.fresh(f"{base}.{kind}"), dtype=vector.dtype, shape=site.ids.shape
            )
            wide = new_node(
                "Unsqueeze", [picked.outputs[0], last], names.fresh(f"{base}.{kind}.column"), dtype=vector.dtype
            )
            return [picked, wide]

        def as_float(value: ir.Value, kind: str) -> ir.Node:
            return new_node("Cast", [value], names.fresh(f"{base}.{kind}.float"), dtype=self.dtype, shape=value.shape,
                            attributes={"to": int(self.dtype)})  # fmt: skip

        last = add_constant(node_graph(gather), names.fresh(f"{base}.last_axis"), np.array([-1], np.int64))
        new: list[ir.Node] = []
        if site.transpose is not None:
            turned = new_node("Transpose", [self.codes], names.fresh(f"{base}.codes.transposed"),
                              dtype=self.codes.dtype, attributes={"perm": [1, 0]})  # fmt: skip
            new.append(turned)
        codes = new[0].outputs[0] if new else self.codes
        picked = new_node(
            "Gather", [codes, site.ids], names.fresh(f"{base}.codes"), dtype=self.codes.dtype, shape=rows.shape
        )
        result = as_float(picked.outputs[0], "codes")
        new += [picked, result]
        if self.zero_point is not None:
            columns = of_row(self.zero_point, "zero_point")
            middle = as_float(columns[-1].outputs[0], "zero_point")
            shifted = new_node("Sub", [result.outputs[0], middle.outputs[0]], names.fresh(f"{base}.centred"), like=rows)
            new += [*columns, middle, shifted]
            result = shifted
        columns = of_row(self.scale, "scale")
        scaled = new_node(
            "Mul", [result.outputs[0], columns[-1].outputs[0]], names.fresh(f"{base}.dequantized"), like=rows
        )
        new += [*columns, scaled]
        inherit(new, gather, pass_name)
        insert_before(gather, new)
        replace_output(gather, scaled.outputs[0])


def _weight(site: Reader) -> ir.Value:
    return site.table if isinstance(site, Embedding) else site.weight


def _tensor(weight: ir.Value) -> ir.TensorProtocol:
    tensor = constant(weight)
    assert tensor is not None  # recognisers only report constants
    return tensor
