"""What a layer's activation is: float, or quantized with constant scales, or with scales found while the model runs.

    activation_of(value)        of what a plain operator reads: Float | Static | Dynamic
    operand_activation(node)    of what a product multiplies a weight by: codes, or what it rounds itself, too

`rewriting/pairs.py` writes the pairs of nodes that are recognised here.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qcompiler.formats.scheme import FORMATS, Granularity, PerChannel, PerGroup, PerTensor, PerToken, Scheme
from qcompiler.formats.scheme import UnknownGranularity as Unknown
from qcompiler.functions.library import DOMAIN
from qcompiler.functions.per_token import (
    DEQUANTIZE,
    QUANTIZE,
    QUANTIZE_FLOAT8,
    QUANTIZE_FLOAT8_TENSOR,
    is_token_function,
)
from qcompiler.graph.edit import constant
from qcompiler.graph.operators import QuantizedOperand, has, multiplied
from qcompiler.sites.stored.constants import evaluate, source
from qcompiler.sites.stored.weight import format_of

QUANTIZERS = ("QuantizeLinear", "DynamicQuantizeLinear")


@dataclass(frozen=True, eq=False)
class Float:
    """A value that no node rounds."""

    source: ir.Value | None

    @property
    def scheme(self) -> None:
        return None

    @property
    def nodes(self) -> tuple[ir.Node, ...]:
        return ()


@dataclass(frozen=True, eq=False)
class Static:
    """A value behind QuantizeLinear, as a plain operator reads it behind DequantizeLinear, or a kernel as codes.

    Scales are operands of the pair, constants but in models that other tools wrote.
    """

    source: ir.Value
    """What is quantized; the codes themselves where nothing of the model makes them by QuantizeLinear."""
    quantize: ir.Node | None
    """QuantizeLinear; None where another operator gives codes."""
    dequantize: ir.Node | None
    """DequantizeLinear; None where a kernel reads the codes."""
    scheme: Scheme

    @property
    def nodes(self) -> tuple[ir.Node, ...]:
        return tuple(node for node in (self.quantize, self.dequantize) if node is not None)


@dataclass(frozen=True, eq=False)
class Dynamic:
    """A value that is quantized with scales found while the model runs, by a pair of nodes or as a kernel's codes."""

    source: ir.Value
    """What is quantized, before a Cast to float32 where there is one."""
    quantize: ir.Node
    """DynamicQuantizeLinear, DynamicQuantizePerToken, DynamicQuantizeFloat8PerToken or DynamicQuantizeFloat8; of codes
    QuantizeLinear, too, and of what a kernel rounds itself the kernel."""
    dequantize: ir.Node | None
    """DequantizeLinear or DequantizePerToken; None where a kernel reads the codes."""
    scheme: Scheme

    @property
    def per_token(self) -> bool:
        return isinstance(self.scheme.granularity, PerToken)

    @property
    def float8(self) -> bool:
        return self.scheme.number_format.kind == "float"

    @property
    def qmax(self) -> float:
        """The largest code of a pair per token."""
        return _qmax(self.quantize)

    @property
    def nodes(self) -> tuple[ir.Node, ...]:
        return (self.quantize,) if self.dequantize is None else (self.quantize, self.dequantize)


Activation = Float | Static | Dynamic


def activation_of(value: ir.Value | None) -> Activation:
    """What a value is that a plain operator reads."""
    found = _dynamic_pair(value) or _static_pair(value)
    return Float(value) if found is None else found


def operand_activation(node: ir.Node) -> Activation:
    """What a product multiplies a weight by: what it reads rounded, reads as codes, or rounds itself."""
    value = node.inputs[0]
    if has(node, "rounds"):
        scheme = rounds_to(node)
        return Float(value) if scheme is None or value is None else Dynamic(value, node, None, scheme)
    codes = multiplied(node)
    return activation_of(value) if codes is None else coded_activation(node, codes)


def rounds_to(node: ir.Node) -> Scheme | None:
    """The scheme to which a kernel rounds its float input; None where it takes it as it is."""
    if node.op_type != "MatMulNBits":
        return Scheme("uint8", PerTensor(), symmetric=False, dynamic=True)
    if node.attributes.get_int("accuracy_level", 0) != 4:
        return None
    block, features = (node.attributes.get_int(name, 0) or 0 for name in ("block_size", "K"))
    return Scheme("int8", PerGroup(block), dynamic=True).over(features) if block else None


def is_quantized(value: ir.Value) -> bool:
    """Whether a value was quantized, in any of the ways above, and dequantized again; or is codes of a constant."""
    producer = value.producer()
    return (producer is not None and _is(producer, "DequantizeLinear")) or _dynamic_pair(value) is not None


# --------------------------------------------------------------------------------------------------------------- pairs


def _dynamic_pair(value: ir.Value | None) -> Dynamic | None:
    dequantize = _behind_cast(value)
    if dequantize is None or dequantize.inputs[0] is None:
        return None
    quantize = dequantize.inputs[0].producer()
    if quantize is None or quantize.inputs[0] is None:
        return None
    given, decodes = quantize.inputs[0], _is(dequantize, "DequantizeLinear")
    if is_token_function(dequantize, DEQUANTIZE) and is_token_function(quantize, QUANTIZE, QUANTIZE_FLOAT8):
        return Dynamic(given, quantize, dequantize, _of_quantizer(quantize))
    if decodes and is_token_function(quantize, QUANTIZE_FLOAT8_TENSOR):
        return Dynamic(given, quantize, dequantize, _of_quantizer(quantize))
    if decodes and _is(quantize, "DynamicQuantizeLinear"):
        cast = given.producer()
        if cast is not None and _is(cast, "Cast") and _is_half(cast.inputs[0]) and cast.inputs[0] is not None:
            given = cast.inputs[0]
        return Dynamic(given, quantize, dequantize, _of_quantizer(quantize))
    return None


def _static_pair(value: ir.Value | None) -> Static | None:
    dequantize = value.producer() if value is not None else None
    if dequantize is None or not _is(dequantize, "DequantizeLinear") or source(dequantize.inputs[0]) is not None:
        return None
    codes = dequantize.inputs[0]
    if codes is None:
        return None
    quantize = codes.producer()
    if quantize is not None and quantize.op_type == "Gather":
        return None  # rows of a quantized table
    made = quantize if quantize is not None and _is(quantize, "QuantizeLinear") else None
    given = made.inputs[0] if made is not None else None
    zero = dequantize.inputs[2] if len(dequantize.inputs) > 2 else None
    scheme = _of_codes(codes, dequantize.inputs[1], zero, made or dequantize)
    return None if scheme is None else Static(given if given is not None else codes, made, dequantize, scheme)


def _of_quantizer(quantize: ir.Node) -> Scheme:
    """The scheme of a node that finds scales while the model runs."""
    dtype = quantize.outputs[0].dtype
    if is_token_function(quantize, QUANTIZE):
        return Scheme(f"int{int(_qmax(quantize)).bit_length() + 1}", PerToken(), dynamic=True)
    if is_token_function(quantize, QUANTIZE_FLOAT8, QUANTIZE_FLOAT8_TENSOR):
        name = format_of(dtype if dtype is not None else ir.DataType(quantize.attributes.get_int("to", 0) or 0))
        return Scheme(name, PerToken() if is_token_function(quantize, QUANTIZE_FLOAT8) else PerTensor(), dynamic=True)
    return Scheme("uint8", PerTensor(), symmetric=False, dynamic=True)


def _qmax(quantize: ir.Node) -> float:
    return float(quantize.attributes.get_float("qmax", 127.0) or 127.0)


# --------------------------------------------------------------------------------------------------------------- codes


def coded_activation(node: ir.Node, read: QuantizedOperand) -> Activation:
    """What an operator reads as codes."""
    codes = read.codes.of(node)
    if codes is None:
        return Float(None)
    quantize = _quantizer(codes)
    scale, zero = (place.of(node) if place is not None else None for place in (read.scale, read.zero_point))
    if quantize is not None and _is(quantize, "QuantizeLinear"):
        scale = scale if scale is not None else quantize.inputs[1]
        zero = zero if zero is not None or len(quantize.inputs) < 3 else quantize.inputs[2]
    elif quantize is not None:
        given = quantize.inputs[0]
        return Dynamic(given if given is not None else codes, quantize, None, _of_quantizer(quantize))
    scheme = _of_codes(codes, scale, zero, quantize)
    if scheme is None:
        return activation_of(codes)
    given = quantize.inputs[0] if quantize is not None else None
    if scheme.dynamic and quantize is not None:
        return Dynamic(given if given is not None else codes, quantize, None, scheme)
    return Static(given if given is not None else codes, quantize, None, scheme)


def _of_codes(codes: ir.Value, scale: ir.Value | None, zero: ir.Value | None, node: ir.Node | None) -> Scheme | None:
    """The scheme of codes with these scales and zero points; None of what are no codes. `node` made or reads them."""
    dtype = codes.dtype or (zero.dtype if zero is not None else None) or ir.DataType.UINT8
    name = format_of(dtype)
    if name not in FORMATS:
        return None
    format, points = FORMATS[name], evaluate(zero)
    middle = format.middle if format.kind == "integer" else 0
    symmetric = zero is None and middle == 0 if points is None else bool((points.astype(np.float32) == middle).all())
    if format.kind != "integer":
        symmetric = True
    tensor = constant(source(scale))
    if tensor is not None:
        grain: Granularity = PerTensor() if int(np.prod(tensor.shape.numpy())) == 1 else PerChannel()
        return Scheme(name, grain, symmetric).numbers
    if scale is None:
        return Scheme(name, Unknown(), symmetric).numbers
    return Scheme(name, PerToken() if _per_row(scale, node) else PerTensor(), symmetric, dynamic=True).numbers


def _quantizer(codes: ir.Value) -> ir.Node | None:
    """The node that made the codes, perhaps shifted or reshaped since."""
    node = codes.producer()
    while node is not None and node.op_type in ("Reshape", "Cast") and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    if node is None or (node.domain == "" and node.op_type in QUANTIZERS):
        return node
    return node if is_token_function(node, QUANTIZE, QUANTIZE_FLOAT8, QUANTIZE_FLOAT8_TENSOR) else None


def _per_row(scale: ir.Value, quantize: ir.Node | None) -> bool:
    """A scale for each row: its shape says so, or the quantizer's axis or blocks do."""
    if scale.shape is not None:
        sizes = list(scale.shape)
        return bool(sizes) and sizes != [1]
    return quantize is not None and (quantize.attributes.get_int("block_size", 0) or 0) > 0


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


# ------------------------------------------------------------------------------------------------------ any quantizers


def through_quantization(value: ir.Value | None) -> ir.Value | None:
    """What a value was before it was quantized and dequantized, however often."""
    while value is not None:
        node = value.producer()
        if node is None or not quantizes(node) or constant(node.inputs[0]) is not None:
            return value
        value = node.inputs[0]
    return value


def quantizes(node: ir.Node) -> bool:
    """Whether a node quantizes or dequantizes a value that the model computes, or a constant."""
    return (node.domain == "" and node.op_type in (*QUANTIZERS, "DequantizeLinear")) or (
        node.domain == DOMAIN and (node.op_type == DEQUANTIZE or node.op_type.startswith("DynamicQuantize"))
    )
