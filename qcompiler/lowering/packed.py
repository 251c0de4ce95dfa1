"""Quantized matrices as the operators with blocks store them: rows of unsigned codes in blocks that share a scale.

What DequantizeLinear says in several ways (signed or unsigned codes, along either axis, a scale for the tensor, for a
channel or for a group) comes down to one form here: a row for each output channel (or token of an embedding), unsigned
codes, a scale for each block, and a zero point for each block or none where all are the middle, 2^(bits - 1).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.errors import PassError
from qcompiler.functions.binary import SMALLEST_BITS, unpacked_signs, weight_shape
from qcompiler.graph.edit import array, constant
from qcompiler.graph.lazy import derived

Array = npt.NDArray[Any]
SIGNED = {
    ir.DataType.INT2: True,
    ir.DataType.UINT2: False,
    ir.DataType.INT4: True,
    ir.DataType.UINT4: False,
    ir.DataType.INT8: True,
    ir.DataType.UINT8: False,
}
"""The types of codes that there are operators for, and which of them are signed."""


@dataclass(frozen=True, eq=False)
class CodeMatrix:
    """A constant of integer codes, and what its rows stand for: (code - zero point) · scale."""

    tensor: ir.TensorProtocol
    """The codes as they are stored: [rows, features], or [features, rows]."""
    row_axis: int
    rows: int
    features: int
    bits: int
    """2, 4 or 8; fewer than the type's where the codes are known to be smaller than it allows."""
    offset: int
    """What makes the stored codes the unsigned ones that are meant here, added in bytes that wrap around."""
    group: int
    """Features that share a scale; all of them where a row, or the whole tensor, has one."""
    scale: Array
    """[rows, groups], in the type of the model's constant."""
    zero_point: Array | None
    """[rows, groups], uint8, unsigned as the codes are here; None where all are the middle."""

    def scales(self, block: int) -> Array:
        """[rows, blocks]; `block` divides `group`, or there is one group."""
        return np.ascontiguousarray(self.scale[:, self._groups(block)])

    def zero_points(self, block: int) -> Array | None:
        """[rows, blocks], one byte each, or None."""
        return None if self.zero_point is None else np.ascontiguousarray(self.zero_point[:, self._groups(block)])

    def packed(self, block: int, name: str) -> ir.TensorProtocol:
        """uint8 [rows, blocks, block · bits / 8], low bits first; what fills the last block up stands for zero."""
        blocks = -(-self.features // block)

        def arrange(data: Array) -> Array:
            return pack(self._padded(data, blocks * block).reshape(self.rows, blocks, block), self.bits)

        shape = (self.rows, blocks, block * self.bits // 8)
        return derived(self.tensor, arrange, ir.DataType.UINT8, shape, name)

    def table(self, name: str) -> ir.TensorProtocol:
        """uint8 [rows, bytes], low bits first; the last byte of a row is filled up with zeros."""
        shape = (self.rows, -(-self.features * self.bits // 8))
        return derived(self.tensor, lambda data: pack(self._unsigned(data), self.bits), ir.DataType.UINT8, shape, name)

    def stored_zero_points(self, block: int) -> Array:
        """[rows, blocks] as DequantizeLinear has them beside the codes, in bytes."""
        points = self.zero_points(block)
        if points is None:
            points = np.full((self.rows, -(-self.features // block)), 1 << (self.bits - 1), np.uint8)
        stored: Array = points - np.uint8(self.offset % 256)
        if SIGNED[self.tensor.dtype]:
            stored = stored.view(np.int8)
        return stored

    def _groups(self, block: int) -> npt.NDArray[np.int64]:
        """The group that each block lies in."""
        groups: npt.NDArray[np.int64] = np.arange(0, self.features, block) // self.group
        return groups

    def _padded(self, data: Array, width: int) -> Array:
        """[rows, width] uint8, filled up with the zero point of the last group."""
        codes = self._unsigned(data)
        if width == self.features:
            return codes
        full = np.empty((self.rows, width), np.uint8)
        full[:, : self.features] = codes
        full[:, self.features :] = 1 << (self.bits - 1) if self.zero_point is None else self.zero_point[:, -1:]
        return full

    def _unsigned(self, data: Array) -> Array:
        """[rows, features] uint8."""
        codes = _unsigned(data if self.row_axis == 0 else data.T, self.offset)
        if self.bits < 8 and codes.size and codes.max() >= 1 << self.bits:
            raise PassError(f"the codes of {self.tensor.name!r} need more than the {self.bits} bits that they are said "
                            "to have; quantize the layer anew")  # fmt: skip
        return codes


def pack(codes: Array, bits: int) -> Array:
    """Unsigned codes along the last axis packed into bytes, the first in the lowest bits; the last byte is filled up
    with zeros."""
    per_byte = 8 // bits
    if per_byte == 1:
        return codes.astype(np.uint8, copy=False)
    short = -codes.shape[-1] % per_byte
    if short:
        codes = np.concatenate([codes, np.zeros((*codes.shape[:-1], short), codes.dtype)], axis=-1)
    packed = codes[..., 0::per_byte].astype(np.uint8)
    for place in range(1, per_byte):
        packed |= codes[..., place::per_byte].astype(np.uint8, copy=False) << np.uint8(place * bits)
    return packed


def code_matrix(
    codes: ir.Value, scale: ir.Value | None, zero_point: ir.Value | None, *, row_axis: int, axis: int, block_size: int,
    bits: int | None = None,
) -> CodeMatrix | str:  # fmt: skip
    """What a DequantizeLinear of these inputs and attributes means, or one clause on why it cannot be read as rows.

    `row_axis` is the axis of the codes along which output channels (tokens) lie, `bits` the bits of the codes where
    these are fewer than their type has.
    """
    tensor = constant(codes)
    if tensor is None or tensor.dtype not in SIGNED:
        return f"its weight has {codes.dtype} codes, and the operator knows integers of 2, 4 and 8 bits"
    if scale is None or constant(scale) is None or (zero_point is not None and constant(zero_point) is None):
        return "the scales of its weight are computed, and the operator's are constants"
    shape = tuple(int(size) for size in tensor.shape.numpy())
    rows, features = shape[row_axis], shape[1 - row_axis]
    by_row = _by_row(array(scale), rows, row_axis, axis, block_size)
    if by_row is None:
        return "the scales of its weight lie along its inputs, and the operator's along the outputs"
    points = np.zeros(by_row.shape, np.int8)
    if zero_point is not None:
        given = _by_row(array(zero_point), rows, row_axis, axis, block_size)
        if given is None or given.shape != by_row.shape:
            return "the zero points of its weight do not have the shape of its scales"
        points = given
    width = 2 if bits == 2 else tensor.dtype.bitwidth  # 3 bits are stored in 4
    offset = _offset(points, width, width if bits is None else bits, SIGNED[tensor.dtype])
    unsigned = _unsigned(points, offset)
    return CodeMatrix(
        tensor=tensor, row_axis=row_axis, rows=rows, features=features, bits=width, offset=offset,
        group=min(block_size or features, features), scale=by_row,
        zero_point=None if np.all(unsigned == 1 << (width - 1)) else unsigned,
    )  # fmt: skip


def _offset(points: Array, width: int, bits: int, signed: bool) -> int:
    """What to add to codes of `bits` bits stored in `width`: the middle where they are signed.

    Codes that do not fill their type (3 bits in 4) may be moved within it, so that one zero point for all of them comes
    to lie in the middle and need not be stored: unsigned ones with zero point 4 are moved up by 4.
    """
    middle = 1 << (width - 1)
    first = -(1 << (bits - 1)) if signed else 0
    moved = middle - int(points.flat[0])
    if np.all(points == points.flat[0]) and first + moved >= 0 and first + moved + (1 << bits) <= 1 << width:
        return moved
    return middle if signed else 0


def _unsigned(codes: Array, offset: int) -> Array:
    # In bytes that wrap around, an addition is all that is needed: -8 + 8 = 0, and 248 + 8 = 0, too.
    plain = codes.astype(np.int8 if codes.dtype.name.startswith("int") else np.uint8, copy=False)
    return plain.view(np.uint8) + np.uint8(offset % 256)


def _by_row(data: Array, rows: int, row_axis: int, axis: int, block_size: int) -> Array | None:
    """[rows, groups] of a scale or zero point, or None where it lies along the features."""
    if block_size:
        return None if data.ndim != 2 or axis % 2 == row_axis else (data if row_axis == 0 else data.T)
    if data.size == 1:
        return np.broadcast_to(data.reshape(1, 1), (rows, 1))
    return data.reshape(rows, 1) if axis % 2 == row_axis and data.size == rows else None


def two_bit_matrix(node: ir.Node) -> CodeMatrix | str:
    """A DequantizeBinary in the fewest bits that MatMulNBits takes, with codes 1 and 3 about its zero point 2."""
    scale = constant(node.inputs[1])
    if scale is None:
        return "the scales of its weight are computed, and the operator's are constants"
    bits, (rows, features) = constant(node.inputs[0]), weight_shape(node)
    assert bits is not None
    dtype = ir.DataType(node.attributes.get_int("output_dtype", int(ir.DataType.FLOAT)))
    signs = derived(bits, lambda data: unpacked_signs(data, features), ir.DataType.INT8, (rows, features), "signs")
    return CodeMatrix(
        tensor=signs, row_axis=0, rows=rows, features=features, bits=SMALLEST_BITS, offset=1 << (SMALLEST_BITS - 1),
        group=min(node.attributes.get_int("block_size", features), features),
        scale=scale.numpy().reshape(rows, -1).astype(dtype.numpy()), zero_point=None,
    )  # fmt: skip
