"""How the weight of a node is stored, read off the node: format, granularity, bytes; and its numbers, piece by piece.

It looks at operators and shapes alone, so it reads our models, portable and lowered, and those of other tools.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import numpy as np
import onnx_ir as ir

from qcompiler.binary import FORMAT as BINARY
from qcompiler.binary import is_binary, weight_shape
from qcompiler.codes import BITS
from qcompiler.functions import codebook_format
from qcompiler.graph import constant

# Operators that read codes: the inputs that hold codes, scale and zero point.
PLAIN: dict[str, tuple[int, int | None, int | None]] = {
    "ConvInteger": (1, None, 3),
    "DynamicQuantizeLSTM": (1, None, None),
    "DynamicQuantizeMatMul": (1, 2, 3),
    "GemmFloat8": (1, 4, None),
    "MatMulBlockQuantizedFp8Weight": (1, 2, None),
    "MatMulBnb4": (1, 2, None),
    "MatMulInteger": (1, None, 3),
    "MatMulIntegerToFloat": (1, 3, 5),
    "QAttention": (1, 4, 7),
    "QGemm": (3, 4, 5),
    "QLinearConv": (3, 4, 5),
    "QLinearMatMul": (3, 4, 5),
}
BLOCKED: dict[str, tuple[int, int, int]] = {"GatherBlockQuantized": (0, 2, 3), "MatMulNBits": (1, 2, 3)}
PIECE = 1 << 20
"""Numbers of a weight that are looked at together."""


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A weight of codes. `codes`, `scale` and `zero_point` are the values that the node reads."""

    node: ir.Node
    """DequantizeLinear (or a function of qcompiler that decodes), or the operator that multiplies by the codes."""
    format: str
    """int8, uint4, nf4, …"""
    bits: int
    granularity: str
    """per-tensor, per-channel, group(128); empty where the node does not tell."""
    symmetric: bool | None
    """Without zero points of its own; None where the node does not tell."""
    shape: tuple[int, ...]
    """Of the weight that the codes stand for."""
    codes: ir.Value
    scale: ir.Value | None
    zero_point: ir.Value | None
    axis: int | None = None
    """The axis of the codes along which scales lie; None where codes are packed, or in a table."""
    block_size: int = 0
    """Along that axis; 0 where there are no blocks."""

    @property
    def scheme(self) -> str:
        """As recipes' schemes are written: ``uint4 group(32) symmetric``."""
        symmetry = "" if self.symmetric is None else "symmetric" if self.symmetric else "asymmetric"
        return " ".join(part for part in (self.format, self.granularity, symmetry) if part)

    @property
    def bytes(self) -> int:
        tensors = (constant(value) for value in (self.codes, self.scale, self.zero_point))
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def quantized_weight(node: ir.Node) -> QuantizedWeight | None:
    """How the codes that a node decodes or multiplies by are stored; None where it reads no constant codes."""
    if node.domain == "" and node.op_type == "DequantizeLinear":
        return _decoded(node)
    if is_binary(node):
        return _binary(node)
    if codebook_format(node) is not None:
        codes = node.inputs[0]
        assert codes is not None
        shape, size = _shape(codes), node.attributes.get_int("block_size", 0)
        return QuantizedWeight(node, str(codebook_format(node)), 4, f"group({size})", True, shape, codes,
                               node.inputs[1], None)  # fmt: skip
    if node.op_type in BLOCKED:
        return _blocked(node)
    if node.op_type in PLAIN and node.domain in ("", "com.microsoft"):
        return _plain(node)
    return None


def numbers(weight: QuantizedWeight) -> Iterator[np.ndarray] | None:
    """What the codes stand for, float32, in pieces; None where the operator's layout is not known here."""
    if weight.axis is not None and constant(weight.scale) is not None:
        return _dequantized(weight, weight.axis, weight.block_size)
    if weight.node.op_type in BLOCKED and weight.bits in (2, 4, 8) and constant(weight.scale) is not None:
        return _unpacked(weight)
    return None


def float_numbers(tensor: ir.TensorProtocol) -> Iterator[np.ndarray]:
    """A float tensor, in pieces: a memory-mapped one never comes into memory whole."""
    flat = tensor.numpy().reshape(-1)
    for start in range(0, flat.size, PIECE):
        yield flat[start : start + PIECE].astype(np.float32)


def _decoded(node: ir.Node) -> QuantizedWeight | None:
    codes, scale = node.inputs[0], node.inputs[1]
    if codes is None or constant(codes) is None or constant(scale) is None or scale is None:
        return None
    zero = node.inputs[2] if len(node.inputs) > 2 else None
    size = node.attributes.get_int("block_size", 0)
    granularity = f"group({size})" if size else "per-channel" if prod(_shape(scale)) > 1 else "per-tensor"
    format, bits = _format(codes)
    if BITS in node.metadata_props:  # fewer bits than the type that stores them
        narrow = int(node.metadata_props[BITS])
        format, bits = f"{format.rstrip('0123456789')}{narrow}", narrow
    shape = _shape(codes)
    axis = node.attributes.get_int("axis", 1) % max(1, len(shape))
    return QuantizedWeight(node, format, bits, granularity, is_symmetric(zero), shape, codes, scale, zero, axis, size)


def _binary(node: ir.Node) -> QuantizedWeight | None:
    codes, scale = node.inputs[0], node.inputs[1]
    if codes is None or constant(codes) is None or scale is None:
        return None
    shape = weight_shape(node)
    size = node.attributes.get_int("block_size", shape[1]) or shape[1]
    granularity = "per-channel" if size >= shape[1] else f"group({size})"
    return QuantizedWeight(node, BINARY, 1, granularity, True, shape, codes, scale, None)


def _blocked(node: ir.Node) -> QuantizedWeight | None:
    codes, scale, zero = (_input(node, index) for index in BLOCKED[node.op_type])
    if codes is None or constant(codes) is None:
        return None
    size, bits = node.attributes.get_int("block_size", 0) or 0, node.attributes.get_int("bits", 4) or 4
    if node.op_type == "MatMulNBits":
        shape: tuple[int, ...] = (node.attributes.get_int("N", 0) or 0, node.attributes.get_int("K", 0) or 0)
    else:
        stored = _shape(codes)
        packed = 8 // bits if codes.dtype == ir.DataType.UINT8 else 1
        shape = (stored[0], prod(stored[1:]) * packed)
    granularity = "per-channel" if size >= shape[-1] else f"group({size})"
    return QuantizedWeight(node, f"uint{bits}", bits, granularity, is_symmetric(zero, 1 << (bits - 1)), shape, codes,
                           scale, zero)  # fmt: skip


def _plain(node: ir.Node) -> QuantizedWeight | None:
    read, scale, zero = (_input(node, index) for index in PLAIN[node.op_type])
    codes, turned = _stored(read)
    if codes is None or constant(codes) is None:
        return None
    format, bits = _format(codes)
    granularity = ""
    if scale is not None and constant(scale) is not None:
        granularity = "per-channel" if prod(_shape(scale)) > 1 else "per-tensor"
    shape, symmetric = _shape(codes), is_symmetric(zero, 128 if codes.dtype == ir.DataType.UINT8 else 0)
    if node.op_type == "MatMulBnb4":
        format, bits, symmetric = ("fp4_bnb", "nf4")[node.attributes.get_int("quant_type", 1) or 0], 4, True
        granularity = f"group({node.attributes.get_int('block_size', 0)})"
        shape = (node.attributes.get_int("N", 0) or 0, node.attributes.get_int("K", 0) or 0)
    if node.op_type == "MatMulBlockQuantizedFp8Weight" and scale is not None and len(_shape(scale)) > 1:
        rows, groups = _shape(scale)[0], _shape(scale)[-1]
        granularity = "per-channel" if groups == 1 else f"group({-(-shape[-1] // groups)})"
        granularity = granularity if rows == shape[0] else f"block({node.attributes.get_int('block_size', 0)})"
    packed = node.op_type in ("MatMulBnb4", "MatMulBlockQuantizedFp8Weight") or bits > 8
    axis = None if packed else _channel_axis(node, turned, len(shape))
    return QuantizedWeight(node, format, bits, granularity, symmetric, shape, codes, scale, zero, axis)


def _channel_axis(node: ir.Node, turned: bool, rank: int) -> int:
    """Where output channels lie in the constant, which the node may read turned."""
    rows = node.op_type in ("QLinearConv", "ConvInteger") or bool(node.attributes.get_int("transB", 0))
    return 0 if rows != turned else rank - 1


def _input(node: ir.Node, index: int | None) -> ir.Value | None:
    return node.inputs[index] if index is not None and index < len(node.inputs) else None


def _shape(value: ir.Value) -> tuple[int, ...]:
    tensor = constant(value)
    assert tensor is not None
    return tuple(int(size) for size in tensor.shape.numpy())


def _stored(codes: ir.Value | None) -> tuple[ir.Value | None, bool]:
    """The constant behind codes that are turned or cast when the session is made, and whether they are turned."""
    turned = False
    while codes is not None and (producer := codes.producer()) is not None:
        if producer.op_type not in ("Cast", "Transpose"):
            break
        turned ^= producer.op_type == "Transpose"
        codes = producer.inputs[0]
    return codes, turned


FLOAT8 = {"float8e4m3fn": "fp8_e4m3", "float8e5m2": "fp8_e5m2"}


def _format(codes: ir.Value) -> tuple[str, int]:
    dtype = codes.dtype or ir.DataType.UINT8
    name = dtype.name.lower()
    return FLOAT8.get(name, name), dtype.bitwidth


def is_symmetric(zero_point: ir.Value | None, middle: int = 0) -> bool | None:
    """Whether all zero points are the middle of the codes (unsigned ones of 8 bits: 128, too); None where computed."""
    if zero_point is None:
        return True
    tensor = constant(zero_point)
    if tensor is None:
        return None
    data = tensor.numpy()
    if data.dtype == np.uint8 and data.ndim and middle == 8:  # two points of 4 bits in a byte
        return bool(np.isin(data, (0x88, 0x08)).all())
    if data.dtype.kind == "f":
        return bool((data.astype(np.float32) == middle).all())
    allowed = {middle, 128} if zero_point.dtype == ir.DataType.UINT8 else {middle}
    if zero_point.dtype == ir.DataType.UINT4:
        allowed.add(8)
    return bool(np.isin(data.astype(np.int64), list(allowed)).all())


# ---------------------------------------------------------------------------------------------------- numbers


def _dequantized(weight: QuantizedWeight, axis: int, size: int) -> Iterator[np.ndarray]:
    """(codes - zero point) · scale, some rows of the first axis at a time."""
    codes, scale = constant(weight.codes), constant(weight.scale)
    assert codes is not None
    assert scale is not None
    zero = constant(weight.zero_point)
    whole, rank = codes.numpy(), len(weight.shape)
    scales = _spread(scale.numpy().astype(np.float32), rank, axis, size)
    zeros = None if zero is None else _spread(zero.numpy().astype(np.float32), rank, axis, size)
    rows = max(1, PIECE // max(1, prod(weight.shape[1:])))
    if size and axis == 0:
        rows = max(1, rows // size) * size  # whole blocks
    for start in range(0, weight.shape[0] if rank else 1, rows):
        part = whole[start : start + rows].astype(np.float32)
        if zeros is not None:
            part -= _rows_of(zeros, start, part, axis, size)
        yield part * _rows_of(scales, start, part, axis, size)


def _spread(numbers: np.ndarray, rank: int, axis: int, block: int) -> np.ndarray:
    """Scales in a shape that goes with the codes but for blocks."""
    if block or numbers.size == 1:
        return numbers if block else numbers.reshape([1] * rank)
    return numbers.reshape([-1 if at == axis else 1 for at in range(rank)])


def _rows_of(numbers: np.ndarray, start: int, part: np.ndarray, axis: int, block: int) -> np.ndarray:
    """The scales of the rows from `start` on, repeated along the blocks."""
    if block and axis == 0:
        groups = numbers[start // block : -(-(start + part.shape[0]) // block)]
        return np.repeat(groups, block, 0)[: part.shape[0]]
    rows = numbers if numbers.shape[0] == 1 else numbers[start : start + part.shape[0]]
    return np.repeat(rows, block, axis)[tuple(slice(0, size) for size in part.shape)] if block else rows


def _unpacked(weight: QuantizedWeight) -> Iterator[np.ndarray]:
    """The rows of an operator with blocks: codes lie low bits first."""
    codes, scale = constant(weight.codes), constant(weight.scale)
    assert codes is not None
    assert scale is not None
    size = weight.node.attributes.get_int("block_size", 1) or 1
    width, count = weight.shape[-1], prod(weight.shape[:-1])
    blocks = -(-width // size)
    scales, zeros = scale.numpy().reshape(count, blocks), _zero_points(weight, count, blocks)
    stored = codes.numpy().reshape(count, -1)
    rows = max(1, PIECE // max(1, width))
    for start in range(0, count, rows):
        part = stored[start : start + rows]
        if codes.dtype == ir.DataType.UINT8:
            part = _bits(part, weight.bits)
        part = part.astype(np.float32)[:, :width]
        points = zeros[start : start + rows]
        steps = scales[start : start + rows].astype(np.float32)
        part -= np.repeat(points.astype(np.float32), size, 1)[:, :width]
        yield part * np.repeat(steps, size, 1)[:, :width]


def _zero_points(weight: QuantizedWeight, rows: int, blocks: int) -> np.ndarray:
    zero = constant(weight.zero_point)
    if zero is None:
        # GatherBlockQuantized with signed 4-bit codes is the one operator here whose middle is 0.
        signed = weight.codes.dtype == ir.DataType.INT4
        return np.full((rows, blocks), 0 if signed else 1 << (weight.bits - 1), np.float32)
    data = zero.numpy()
    if data.dtype != np.uint8 or zero.dtype != ir.DataType.UINT8 or weight.bits == 8:
        return data.reshape(rows, -1)[:, :blocks]
    return _bits(data.reshape(rows, -1), weight.bits)[:, :blocks]


def _bits(data: np.ndarray, bits: int) -> np.ndarray:
    """The codes of some bits each that bytes hold, low bits first."""
    if bits == 8:
        return data
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    return ((data[..., None] >> shifts) & ((1 << bits) - 1)).reshape(*data.shape[:-1], -1)
