"""What TensorRT's parser and builder take of quantized graphs: NVIDIA's documented rules, checked node by node.

    violations(model)       one clause for each node that breaks a rule; empty where TensorRT takes the graph

Where the rules come from (read 2026-11-24):

[guide]   TensorRT 10.11, "Working with Quantized Types": quantization is symmetric; INT8 and FP8 (E4M3) quantize
          activations and weights, INT4 weights alone.
[layers]  NvInfer.h, IQuantizeLayer and IDequantizeLayer: zero points are all zero; scales are constants, strictly
          positive, one for a tensor, one for each index of the axis, or of the rank of the data, with blocks along the
          last or the last but one dimension.
[logs]    Errors of the parser that its users reported: it takes no DequantizeLinear of int32.
[parser]  onnx-tensorrt, onnxOpImporters.cpp, QuantDequantLinearHelper: no uint8 (but on DLA), one blocked dimension
          whose size is a whole number of blocks, an even number of 4-bit elements.
[matrix]  TensorRT Model Optimizer, support matrix: INT8 has scales per tensor for activations and per channel for
          weights, FP8 one a tensor on both sides, INT4 blocks.
[opsets]  TensorRT 11, "ONNX Opset Guide": opsets 9 to 25. What the parser of 10.x takes at the most is not confirmed.

Blocks of 64 and 128: NVIDIA's pages that could be read name no sizes. Builders are reported to have no kernel for 32
("no tactics to implement operation"), so nothing but 64 and 128 is written; that these two build was not run here.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from qcompiler.functions.library import DOMAIN
from qcompiler.graph.edit import constant
from qcompiler.graph.operators import reads_codes

BLOCKS = (128, 64)
"""Inputs that share a scale of a 4-bit weight; the wider stores less."""
LAST_OPSET = 25
CODES = (ir.DataType.INT8, ir.DataType.INT4, ir.DataType.FLOAT8E4M3FN)
IMPORTED = ("QuantizeLinear", "DequantizeLinear")
"""The operators on codes that the parser has importers for."""


def violations(model: ir.Model) -> list[str]:
    """Every rule that a node breaks, as one clause that names the node, in graph order."""
    found = []
    opset = model.opset_imports.get("") or 0
    if opset > LAST_OPSET:
        found.append(f"the model is of opset {opset}, and TensorRT reads none above {LAST_OPSET}")
    for node in model.graph.all_nodes():
        reason = _reason(node)
        if reason is not None:
            found.append(f"the node {node.name!r} ({node.op_type}) {reason}")
    return found


def _reason(node: ir.Node) -> str | None:
    if node.domain == DOMAIN:
        return "is a function of qcompiler, which TensorRT would run step by step in float"
    if node.op_type not in IMPORTED:
        return "is an operator on codes that TensorRT does not know" if reads_codes(node) else None
    if node.domain:
        return f"is of the domain {node.domain}, and TensorRT reads the standard one"
    return next(_broken(node), None)


def _broken(node: ir.Node) -> Iterator[str]:
    """What is wrong with a QuantizeLinear or DequantizeLinear, in the order in which a person would mend it."""
    data, scale, zero_point = (*node.inputs, None)[:3]
    quantizes = node.op_type == "QuantizeLinear"
    codes = node.outputs[0] if quantizes else data
    assert codes is not None
    if codes.dtype not in CODES:
        yield f"has {codes.dtype} codes, and TensorRT knows int8, int4 and float8e4m3fn"
    if zero_point is not None and not _all_zero(zero_point):
        yield "has a zero point that is not 0, or not a constant; TensorRT quantizes symmetrically"
    tensor = constant(scale)
    if tensor is None:
        yield "has scales that are computed; TensorRT's are constants"
        return
    scales = tensor.numpy().astype(np.float32)
    if not np.all(scales > 0):
        yield "has a scale that is not positive"
    weight = None if quantizes else constant(data)
    if weight is None:
        yield from _broken_activation(codes, scales, quantizes)
    else:
        yield from _broken_weight(node, weight, scales)


def _broken_activation(codes: ir.Value, scales: np.ndarray, quantizes: bool) -> Iterator[str]:
    if codes.dtype == ir.DataType.INT4:
        yield "quantizes an activation to int4, which TensorRT has for weights alone"
    if scales.size > 1:
        yield "has several scales for an activation, which TensorRT gives one"
    if quantizes and any(use.node.op_type != "DequantizeLinear" for use in codes.uses()):
        yield "gives codes that another node than a DequantizeLinear reads"


def _broken_weight(node: ir.Node, weight: ir.TensorProtocol, scales: np.ndarray) -> Iterator[str]:
    shape = tuple(int(size) for size in weight.shape.numpy())
    axis, block = node.attributes.get_int("axis", 1) % max(len(shape), 1), node.attributes.get_int("block_size", 0)
    if weight.dtype == ir.DataType.FLOAT8E4M3FN and scales.size > 1:
        yield "has several scales for a float8 weight, which TensorRT gives one"
    if weight.dtype == ir.DataType.INT4 and (not block or len(shape) != 2):
        yield "has int4 codes without blocks, or that are no matrix; TensorRT has 4 bits in blocks of matrices"
    if weight.dtype == ir.DataType.INT4 and int(np.prod(shape)) % 2:
        yield "has an odd number of 4-bit codes"
    if block and weight.dtype != ir.DataType.INT4:
        yield f"has blocks of {weight.dtype} codes; TensorRT's explicit quantization has blocks of int4"
    if not block and scales.size > 1 and scales.size != shape[axis]:
        yield f"has {scales.size} scales along an axis of {shape[axis]}"
    if block and (block not in BLOCKS or shape[axis] % block):
        yield f"has blocks of {block} along {shape[axis]} inputs; whole blocks of {BLOCKS[1]} or {BLOCKS[0]} are due"
    if block and scales.shape != tuple(size // block if at == axis else size for at, size in enumerate(shape)):
        yield "has scales whose shape is not that of its blocks"


def _all_zero(zero_point: ir.Value) -> bool:
    tensor = constant(zero_point)
    return tensor is not None and not np.any(tensor.numpy().astype(np.float32))
