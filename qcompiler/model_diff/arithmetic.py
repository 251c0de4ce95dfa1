"""What a chain of nodes over constants gives: so that a weight can be compared, in whatever form a file stores it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.binary import UNPACK, unpacked_signs, weight_shape
from qcompiler.codebooks import CODEBOOKS
from qcompiler.functions import DOMAIN, codebook_format
from qcompiler.graph import constant
from qcompiler.quantize import dequantize, quantize

Array = npt.NDArray[Any]

PIECE = 1 << 18

MOVES = (
    *("Transpose", "Reshape", "Unsqueeze", "Squeeze", "Identity", "Cast", "Slice"),
    *("DequantizeLinear", "QuantizeLinear"),
)
"""Operators that leave the numbers of a constant about as they are, but for their place and type."""


def source(value: ir.Value | None) -> ir.Value | None:
    """The constant behind a value, through operators that only move, cast or quantize it; None where it is computed."""
    while value is not None and constant(value) is None:
        node = value.producer()
        moves = node is not None and (
            (node.domain == "" and node.op_type in MOVES) or (node.domain, node.op_type) == (DOMAIN, UNPACK)
        )
        value = node.inputs[0] if node is not None and moves else None
    return value


def evaluate(value: ir.Value | None) -> Array | None:
    """The numbers of a value that constants make up; None where it depends on the model's inputs.

    Also None for operators that no form of a weight needs: whoever compares then says that it cannot.
    """
    if value is None:
        return None
    tensor = constant(value)
    if tensor is not None:
        return tensor.numpy()  # a view of the file where it lies in one
    node = value.producer()
    if node is None:
        return None
    if codebook_format(node) is not None:
        return _codebook(node)
    rule = _RULES.get((node.domain, node.op_type))
    if rule is None:
        return None
    inputs = [evaluate(item) for item in node.inputs]
    given = [item is not None for item in node.inputs]
    if any(present and data is None for present, data in zip(given, inputs, strict=True)):
        return None
    return rule(node, inputs)


def _dequantize(node: ir.Node, inputs: list[Array | None]) -> Array | None:
    codes, scale, zero_point = (*inputs, None)[:3]
    if codes is None or scale is None:
        return None
    block = node.attributes.get_int("block_size", 0) or None
    axis = node.attributes.get_int("axis", 1) if scale.ndim else None
    if scale.size == 1:
        scale, axis = scale.reshape(()), None
        zero_point = None if zero_point is None else zero_point.reshape(())
    return dequantize(codes, scale, zero_point, axis, block)


def _quantize(node: ir.Node, inputs: list[Array | None]) -> Array | None:
    data, scale, zero_point = (*inputs, None)[:3]
    if data is None or scale is None:
        return None
    dtype = np.dtype(np.uint8) if zero_point is None else zero_point.dtype
    if dtype not in _FORMATS:
        return None
    axis = node.attributes.get_int("axis", 1) if scale.size > 1 else None
    if axis is None:
        scale, zero_point = scale.reshape(()), None if zero_point is None else zero_point.reshape(())
    return quantize(data, scale, zero_point, _FORMATS[dtype], axis, node.attributes.get_int("block_size", 0) or None)


_FORMATS = {np.dtype(np.int8): "int8", np.dtype(np.uint8): "uint8"}


def _codebook(node: ir.Node) -> Array | None:
    codes, scale = evaluate(node.inputs[0]), evaluate(node.inputs[1])
    if codes is None or scale is None:
        return None
    table = CODEBOOKS[str(codebook_format(node))].table
    return by_blocks(table[codes.astype(np.uint8)], scale, node.attributes.get_int("block_size", codes.size) or 1)


def by_blocks(numbers: Array, scale: Array, block_size: int) -> Array:
    """Numbers times the scale of their block; blocks follow one another through the rows."""
    flat = numbers.reshape(-1)
    scaled: Array = flat * np.repeat(scale.reshape(-1), block_size)[: flat.size]
    return scaled.reshape(numbers.shape)


def _binary(node: ir.Node, inputs: list[Array | None]) -> Array | None:
    bits, scale = inputs[:2]
    if bits is None or scale is None:
        return None
    rows, features = weight_shape(node)
    group = node.attributes.get_int("block_size", features) or features
    wide = np.repeat(scale.reshape(rows, -1), group, axis=1)[:, :features]
    weight: Array = unpacked_signs(bits, features) * wide
    return weight


def _unpack(node: ir.Node, inputs: list[Array | None]) -> Array | None:
    bits = inputs[0]
    return None if bits is None else unpacked_signs(bits, bits.shape[1] * 8).T


def _transpose(node: ir.Node, inputs: list[Array | None]) -> Array | None:
    permutation = node.attributes.get_ints("perm")
    return None if inputs[0] is None else np.transpose(inputs[0], permutation)


def _reshape(node: ir.Node, inputs: list[Array | None]) -> Array | None:
    data, shape = inputs[:2]
    if data is None or shape is None:
        return None
    sizes = [data.shape[i] if size == 0 else int(size) for i, size in enumerate(shape)]
    return data.reshape(sizes)


def _unsqueeze(node: ir.Node, inputs: list[Array | None]) -> Array | None:
    data, axes = inputs[0], _axes(node, inputs)
    return data if data is None or axes is None else np.expand_dims(data, axes)


def _squeeze(node: ir.Node, inputs: list[Array | None]) -> Array | None:
    data = inputs[0]
    return None if data is None else np.squeeze(data, _axes(node, inputs))


def _axes(node: ir.Node, inputs: list[Array | None]) -> tuple[int, ...] | None:
    """From the input, or from the attribute that opsets before 13 have."""
    if len(inputs) > 1 and inputs[1] is not None:
        return tuple(int(axis) for axis in inputs[1].reshape(-1))
    old = node.attributes.get_ints("axes")
    return None if old is None else tuple(old)


def _cast(node: ir.Node, inputs: list[Array | None]) -> Array | None:
    data, to = inputs[0], node.attributes.get_int("to")
    return None if data is None or to is None else data.astype(ir.DataType(to).numpy())


def _slice(node: ir.Node, inputs: list[Array | None]) -> Array | None:
    data, starts, ends, axes, steps = (*inputs, None, None)[:5]
    if data is None or starts is None or ends is None:
        return None
    index = [slice(None)] * data.ndim
    for place in range(starts.size):
        axis = place if axes is None else int(axes[place])
        index[axis] = slice(int(starts[place]), int(ends[place]), 1 if steps is None else int(steps[place]))
    return data[tuple(index)]


def _first(node: ir.Node, inputs: list[Array | None]) -> Array | None:
    return inputs[0]


def _pairwise(compute: Callable[[Array, Array], Array]) -> Callable[[ir.Node, list[Array | None]], Array | None]:
    def rule(node: ir.Node, inputs: list[Array | None]) -> Array | None:
        left, right = inputs[:2]
        return None if left is None or right is None else compute(left, right)

    return rule


_RULES: dict[tuple[str, str], Callable[[ir.Node, list[Array | None]], Array | None]] = {
    ("", "DequantizeLinear"): _dequantize,
    ("", "QuantizeLinear"): _quantize,
    (DOMAIN, "DequantizeBinary"): _binary,
    (DOMAIN, UNPACK): _unpack,
    ("", "Transpose"): _transpose,
    ("", "Reshape"): _reshape,
    ("", "Unsqueeze"): _unsqueeze,
    ("", "Squeeze"): _squeeze,
    ("", "Cast"): _cast,
    ("", "Slice"): _slice,
    ("", "Identity"): _first,
    ("", "Add"): _pairwise(np.add),
    ("", "Mul"): _pairwise(np.multiply),
}


def unpacked(data: Array, bits: int) -> Array:
    """Codes of fewer than 8 bits, the first in the lowest bits of a byte, packed along the last axis."""
    if bits == 8:
        return data
    if bits == 3:  # runs over the ends of bytes
        ones = np.unpackbits(data, axis=-1, bitorder="little")
        codes = ones[..., : ones.shape[-1] // 3 * 3].reshape(*data.shape[:-1], -1, 3)
        return codes @ np.array([1, 2, 4], np.uint8)
    per_byte = 8 // bits
    shifts = (np.arange(per_byte) * bits).astype(np.uint8)
    return ((data[..., None] >> shifts) & ((1 << bits) - 1)).reshape(*data.shape[:-1], -1)


def error_of(found: Array, expected: Array) -> float:
    """‖found - expected‖ / ‖expected‖; 0 where both are 0, infinite where only `expected` is. A few rows at a time."""
    noise = signal = 0.0
    found, expected = np.atleast_1d(found), np.atleast_1d(expected)
    rows = max(1, PIECE * len(expected) // max(1, expected.size))
    for start in range(0, len(expected), rows):
        wanted = expected[start : start + rows].astype(np.float64)
        noise += float(np.square(found[start : start + rows].astype(np.float64) - wanted).sum())
        signal += float(np.square(wanted).sum())
    if signal == 0:
        return 0.0 if noise == 0 else math.inf
    return math.sqrt(noise / signal)
