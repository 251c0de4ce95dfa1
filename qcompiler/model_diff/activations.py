"""How the activation of a layer is quantized: by a pair of nodes before it, or by the operands of its kernel."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qcompiler.functions.library import DOMAIN
from qcompiler.functions.per_token import DEQUANTIZE
from qcompiler.graph.edit import constant
from qcompiler.sites.activations import dynamic_pair
from qcompiler.sites.stored.constants import source

QUANTIZERS = ("QuantizeLinear", "DynamicQuantizeLinear")


@dataclass(frozen=True, eq=False)
class Activation:
    type: str
    """``uint8``, ``int4``, ``fp8 e4m3``."""
    form: str
    """``static per tensor``, ``dynamic per token`` …"""
    nodes: tuple[ir.Node, ...] = ()

    def __str__(self) -> str:
        return f"activations {self.type} {self.form}".rstrip()


def of_value(value: ir.Value | None) -> Activation | None:
    """How a value was rounded that a plain operator reads; None where it was not."""
    pair = dynamic_pair(value)
    if pair is not None:
        kind = _type(pair.quantize.outputs[0].dtype)
        if pair.per_token and not pair.float8:
            kind = f"int{int(pair.qmax).bit_length() + 1}"
        elif kind == "" and pair.quantize.op_type == "DynamicQuantizeLinear":
            kind = "uint8"
        grain = "per token" if pair.per_token else "per tensor"
        return Activation(kind, f"dynamic {grain}", (pair.quantize, pair.dequantize))
    dequantize = value.producer() if value is not None else None
    if dequantize is None or dequantize.op_type != "DequantizeLinear" or source(dequantize.inputs[0]) is not None:
        return None
    codes = dequantize.inputs[0]
    quantize = codes.producer() if codes is not None else None
    if quantize is not None and quantize.op_type == "Gather":
        return None  # rows of a quantized table
    nodes = (quantize, dequantize) if quantize is not None and quantize.op_type in QUANTIZERS else (dequantize,)
    zero = dequantize.inputs[2] if len(dequantize.inputs) > 2 else None
    kind = _type(codes.dtype if codes is not None else None) or _type(zero.dtype if zero is not None else None)
    return Activation(kind or "int8", f"static {_grain(dequantize.inputs[1])}", nodes)


def of_operand(node: ir.Node, scale_place: int, zero_place: int, place: int = 0) -> Activation | None:
    """How the operand of a kernel at `place` is quantized; None where the kernel takes it as float."""
    if node.op_type == "DynamicQuantizeMatMul":
        return Activation("uint8", "dynamic per tensor")
    if scale_place < 0 and zero_place < 0:
        return of_value(node.inputs[place])
    codes = node.inputs[place]
    quantize = _quantizer(codes)
    if codes is None:
        return None
    zero = node.inputs[zero_place] if 0 <= zero_place < len(node.inputs) else None
    kind = _type(codes.dtype) or _type(zero.dtype if zero is not None else None) or "int8"
    scale = node.inputs[scale_place] if 0 <= scale_place < len(node.inputs) else None
    if scale is None and quantize is not None and quantize.op_type == "QuantizeLinear":
        scale = quantize.inputs[1]
    nodes = (quantize,) if quantize is not None else ()
    if constant(source(scale)) is not None:
        return Activation(kind, f"static {_grain(scale)}", nodes)
    if quantize is not None and quantize.op_type == "DynamicQuantizeLinear":
        return Activation(kind if kind != "int8" else "uint8", "dynamic per tensor", nodes)
    return Activation(kind, "dynamic per token" if _per_row(scale, quantize) else "dynamic per tensor", nodes)


def _quantizer(codes: ir.Value | None) -> ir.Node | None:
    """The node that made the codes, perhaps shifted or reshaped since."""
    node = codes.producer() if codes is not None else None
    while node is not None and node.op_type in ("Reshape", "Cast") and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    return node if node is not None and (node.op_type in QUANTIZERS or node.domain == DOMAIN) else None


def _per_row(scale: ir.Value | None, quantize: ir.Node | None) -> bool:
    """A scale for each row: its shape says so, or the quantizer's axis or blocks do."""
    if scale is not None and scale.shape is not None:
        sizes = list(scale.shape)
        return bool(sizes) and sizes != [1]
    return quantize is not None and (quantize.attributes.get_int("block_size", 0) or 0) > 0


def _grain(scale: ir.Value | None) -> str:
    tensor = constant(source(scale))
    if tensor is None:
        return ""
    return "per tensor" if int(np.prod(tensor.shape.numpy())) == 1 else "per channel"


def _type(dtype: ir.DataType | None) -> str:
    if dtype is None:
        return ""
    names = {"FLOAT8E4M3FN": "fp8 e4m3", "FLOAT8E5M2": "fp8 e5m2"}
    return names.get(dtype.name, dtype.name.lower())


def through_quantization(value: ir.Value | None) -> ir.Value | None:
    """What a value was before it was quantized and dequantized, however often."""
    while value is not None:
        node = value.producer()
        if node is None:
            return value
        quantizes = node.domain in ("", DOMAIN) and (
            node.op_type in (*QUANTIZERS, "DequantizeLinear", DEQUANTIZE) or node.op_type.startswith("DynamicQuantize")
        )
        if not quantizes or constant(node.inputs[0]) is not None:
            return value
        value = node.inputs[0]
    return value


def quantizes(node: ir.Node) -> bool:
    """Whether a node quantizes or dequantizes a value that the model computes, or a constant."""
    return (node.domain == "" and node.op_type in (*QUANTIZERS, "DequantizeLinear")) or (
        node.domain == DOMAIN and (node.op_type == DEQUANTIZE or node.op_type.startswith("DynamicQuantize"))
    )
