"""Quantized activations in the graph: the pairs of nodes that quantize a value and dequantize it, for layers to read.

    static                 x → QuantizeLinear → DequantizeLinear → layer
    dynamic, per tensor    x → DynamicQuantizeLinear → DequantizeLinear → layer
    dynamic, per token     x → DynamicQuantizePerToken → DequantizePerToken → layer
    float8, per tensor     x → DynamicQuantizeFloat8 → DequantizeLinear → layer
    float8, per token      x → DynamicQuantizeFloat8PerToken → DequantizePerToken → layer

DynamicQuantizeLinear takes and gives float32 alone, so where x is of half precision a Cast stands on either side.

    pairs = Pairs(rw)
    pairs.read(site, lambda source, dtype: token_pair(source, dtype, rw))     one pair for each value
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import onnx_ir as ir

from qcompiler.functions.library import DOMAIN
from qcompiler.functions.per_token import (
    DEQUANTIZE,
    QUANTIZE,
    QUANTIZE_FLOAT8,
    QUANTIZE_FLOAT8_TENSOR,
    add_token_function,
)
from qcompiler.graph.edit import insert_after, insert_before, new_node
from qcompiler.graph.rewriter import Rewriter
from qcompiler.sites.find import Convolution, Linear

Quantizable = Linear | Convolution
Build = Callable[[ir.Value, ir.DataType], Sequence[ir.Node]]
"""Makes the nodes for a value of a float type, in order; the only output of the last one is what layers then read."""


class Pairs:
    """Inserts pairs, one for each value, and lets layers read them."""

    def __init__(self, rw: Rewriter) -> None:
        self._rw = rw
        self._dequantized: dict[ir.Value, ir.Value] = {}

    def __contains__(self, source: ir.Value) -> bool:
        return source in self._dequantized

    def at(self, source: ir.Value, site: Quantizable, build: Build) -> ir.Value:
        """The dequantized value of `source`; made where there is none, right behind the producer of `source`."""
        if source not in self._dequantized:
            nodes = build(source, _dtype(source, site))
            self._rw.inherit(nodes, site.node)
            producer = source.producer()
            if producer is not None:
                insert_after(producer, nodes)
            else:
                insert_before(site.node, nodes)
            self._dequantized[source] = nodes[-1].outputs[0]
        return self._dequantized[source]

    def read(self, site: Quantizable, build: Build) -> None:
        """Let a layer read the pair of its input."""
        site.node.replace_input_with(0, self.at(site.input, site, build))


def _dtype(source: ir.Value, site: Quantizable) -> ir.DataType:
    """Shape inference stops at operators of ONNX Runtime; the layer's other operand has the type, too."""
    weight = site.node.inputs[1]
    return source.dtype or (weight.dtype if weight is not None else None) or ir.DataType.FLOAT


# ------------------------------------------------------------------------------------------------------- dynamic pairs


def tensor_pair(source: ir.Value, dtype: ir.DataType, rw: Rewriter) -> list[ir.Node]:
    """Codes uint8 with one scale and zero point for the whole value, found each time that the model runs."""
    nodes, value = [], source
    if dtype != ir.DataType.FLOAT:
        nodes.append(_cast(value, ir.DataType.FLOAT, rw.fresh(f"{source.name}.float")))
        value = nodes[-1].outputs[0]
    codes, scale, zero_point = (
        ir.Value(name=rw.fresh(f"{source.name}.{kind}"), type=ir.TensorType(type), shape=shape)
        for kind, type, shape in (
            ("quantized", ir.DataType.UINT8, source.shape),
            ("scale", ir.DataType.FLOAT, ir.Shape([])),
            ("zero_point", ir.DataType.UINT8, ir.Shape([])),
        )
    )
    nodes.append(ir.Node("", "DynamicQuantizeLinear", [value], outputs=[codes, scale, zero_point], name=codes.name))
    name = rw.fresh(f"{source.name}.dequantized")
    nodes.append(new_node("DequantizeLinear", [codes, scale, zero_point], name,
                          dtype=ir.DataType.FLOAT, shape=source.shape))  # fmt: skip
    if dtype != ir.DataType.FLOAT:
        nodes.append(_cast(nodes[-1].outputs[0], dtype, rw.fresh(f"{name}.{dtype.name.lower()}")))
    return nodes


def token_pair(source: ir.Value, dtype: ir.DataType, rw: Rewriter, qmax: float = 127.0) -> list[ir.Node]:
    """Codes int8 in -qmax … qmax with one scale for each row."""
    return _row_pair(source, dtype, rw, QUANTIZE, ir.DataType.INT8, {"qmax": float(qmax)})


def float8_token_pair(
    source: ir.Value, dtype: ir.DataType, rw: Rewriter, to: ir.DataType, qmax: float, cap: float
) -> list[ir.Node]:
    """Codes in float8 with one scale for each row; `cap` bounds the magnitude that the scale is made for."""
    attributes: dict[str, object] = {"qmax": float(qmax), "cap": float(cap), "to": int(to)}
    return _row_pair(source, dtype, rw, QUANTIZE_FLOAT8, to, attributes)


def float8_tensor_pair(
    source: ir.Value, dtype: ir.DataType, rw: Rewriter, to: ir.DataType, qmax: float, cap: float
) -> list[ir.Node]:  # fmt: skip
    """Codes in float8 with one float32 scale for the whole value; `cap` as in `float8_token_pair`."""
    add_token_function(rw.model, QUANTIZE_FLOAT8_TENSOR)
    codes = ir.Value(name=rw.fresh(f"{source.name}.quantized"), type=ir.TensorType(to), shape=source.shape)
    scale = ir.Value(name=rw.fresh(f"{source.name}.scale"), type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([]))
    attributes = [ir.AttrFloat32("qmax", qmax), ir.AttrFloat32("cap", cap), ir.AttrInt64("to", int(to))]
    quantize = ir.Node(DOMAIN, QUANTIZE_FLOAT8_TENSOR, [source], attributes, outputs=[codes, scale], name=codes.name)
    name = rw.fresh(f"{source.name}.dequantized")
    nodes = [quantize, new_node("DequantizeLinear", [codes, scale], name, dtype=scale.dtype, shape=source.shape)]
    if dtype != ir.DataType.FLOAT:
        nodes.append(_cast(nodes[-1].outputs[0], dtype, rw.fresh(f"{name}.{dtype.name.lower()}")))
    return nodes


def _row_pair(
    source: ir.Value, dtype: ir.DataType, rw: Rewriter, function: str, stored: ir.DataType,
    attributes: dict[str, object],
) -> list[ir.Node]:  # fmt: skip
    add_token_function(rw.model, function)
    add_token_function(rw.model, DEQUANTIZE)
    rows = ir.Shape([*source.shape[:-1], 1]) if source.shape is not None else None
    codes = ir.Value(name=rw.fresh(f"{source.name}.quantized"), type=ir.TensorType(stored), shape=source.shape)
    scale = ir.Value(name=rw.fresh(f"{source.name}.scale"), type=ir.TensorType(ir.DataType.FLOAT), shape=rows)
    attrs = [ir.convenience.convert_attribute(key, item) for key, item in attributes.items()]
    quantize = ir.Node(DOMAIN, function, [source], attrs, outputs=[codes, scale], name=codes.name)
    dequantize = rw.node(DEQUANTIZE, [codes, scale], f"{source.name}.dequantized", domain=DOMAIN,
                         dtype=dtype, shape=source.shape, attributes={"output_dtype": int(dtype)})  # fmt: skip
    return [quantize, dequantize]


def _cast(value: ir.Value, to: ir.DataType, name: str) -> ir.Node:
    return new_node("Cast", [value], name, dtype=to, shape=value.shape, attributes={"to": int(to)})
