"""How an activation was quantized: the pairs of nodes that quantize a value and dequantize it, and codes in kernels.

`rewriting/pairs.py` writes the pairs that are recognised here.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from qcompiler.functions.library import DOMAIN
from qcompiler.functions.per_token import (
    DEQUANTIZE,
    QUANTIZE,
    QUANTIZE_FLOAT8,
    QUANTIZE_FLOAT8_TENSOR,
    is_token_function,
)
from qcompiler.graph.edit import constant


@dataclass(frozen=True, eq=False)
class DynamicPair:
    """A dynamic pair in the graph."""

    source: ir.Value
    """What is quantized, before a Cast to float32 where there is one."""
    quantize: ir.Node
    """DynamicQuantizeLinear, DynamicQuantizePerToken, DynamicQuantizeFloat8PerToken or DynamicQuantizeFloat8."""
    dequantize: ir.Node
    """DequantizeLinear or DequantizePerToken."""

    @property
    def per_token(self) -> bool:
        return is_token_function(self.quantize, QUANTIZE, QUANTIZE_FLOAT8)

    @property
    def float8(self) -> bool:
        return is_token_function(self.quantize, QUANTIZE_FLOAT8, QUANTIZE_FLOAT8_TENSOR)

    @property
    def qmax(self) -> float:
        """The largest code of a pair per token."""
        return float(self.quantize.attributes.get_float("qmax", 127.0) or 127.0)


def dynamic_pair(value: ir.Value | None) -> DynamicPair | None:
    """The dynamic pair that gives a value, or None where it comes from elsewhere."""
    dequantize = _behind_cast(value)
    if dequantize is None or dequantize.inputs[0] is None:
        return None
    quantize = dequantize.inputs[0].producer()
    if quantize is None or quantize.inputs[0] is None:
        return None
    if is_token_function(dequantize, DEQUANTIZE) and is_token_function(quantize, QUANTIZE, QUANTIZE_FLOAT8):
        return DynamicPair(quantize.inputs[0], quantize, dequantize)
    if _is(dequantize, "DequantizeLinear") and is_token_function(quantize, QUANTIZE_FLOAT8_TENSOR):
        return DynamicPair(quantize.inputs[0], quantize, dequantize)
    if _is(dequantize, "DequantizeLinear") and _is(quantize, "DynamicQuantizeLinear"):
        source = quantize.inputs[0]
        cast = source.producer()
        if cast is not None and _is(cast, "Cast") and _is_half(cast.inputs[0]) and cast.inputs[0] is not None:
            source = cast.inputs[0]
        return DynamicPair(source, quantize, dequantize)
    return None


def is_quantized(value: ir.Value) -> bool:
    """Whether a value was quantized, in any of the ways above, and dequantized again."""
    producer = value.producer()
    return (producer is not None and _is(producer, "DequantizeLinear")) or dynamic_pair(value) is not None


def _behind_cast(value: ir.Value | None) -> ir.Node | None:
    """The producer of a value; where it is a Cast to half precision, the producer of what that reads."""
    node = value.producer() if value is not None else None
    if node is not None and _is(node, "Cast") and node.inputs[0] is not None and _is_half(node.outputs[0]):
        return node.inputs[0].producer()
    return node


def _is_half(value: ir.Value | None) -> bool:
    return value is not None and value.dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def _is(node: ir.Node, op_type: str) -> bool:
    return node.domain == "" and node.op_type == op_type


def activation_scheme(value: ir.Value | None) -> str:
    """How a value was rounded before a layer reads it, e.g. ``uint8 per-tensor``; empty where it was not."""
    producer = value.producer() if value is not None else None
    if producer is None:
        return ""
    pair = dynamic_pair(value)
    if pair is not None:
        return coded_scheme(pair.quantize.outputs[0])
    if producer.op_type == "DequantizeLinear" and producer.inputs[0] is not None:
        return coded_scheme(producer.inputs[0])
    return ""


def coded_scheme(codes: ir.Value) -> str:
    """The scheme of codes, by what makes them."""
    node = codes.producer()
    if node is None or constant(codes) is not None:
        return ""
    dtype = codes.dtype.name.lower() if codes.dtype is not None else "uint8"
    if node.domain == DOMAIN:
        return f"{dtype} {'per-token' if 'PerToken' in node.op_type else 'per-tensor'} dynamic"
    if node.op_type == "DynamicQuantizeLinear":
        return "uint8 per-tensor dynamic"
    if node.op_type != "QuantizeLinear":
        return dtype
    if constant(node.inputs[1]) is None:
        return f"{dtype} {'per-token' if node.attributes.get_int('block_size', 0) else 'per-tensor'} dynamic"
    return f"{dtype} per-tensor"
