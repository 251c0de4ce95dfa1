"""How the codes of a weight lie in a constant, and what numbers they are: all at once, or some rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.formats.arithmetic import dequantize
from qcompiler.functions.binary import is_binary, unpacked_signs
from qcompiler.functions.library import codebook_format

Array = npt.NDArray[Any]
PIECE = 1 << 20
"""Numbers of a weight that are worked on together."""


@dataclass(frozen=True)
class Layout:
    """numbers = (codes - zero point) · scale, with each scale repeated over what shares it."""

    shape: tuple[int, ...]
    """Of the numbers; [their count] where blocks run over the ends of rows."""
    axis: int | None = None
    """Along which scales lie, as DequantizeLinear counts it; None where there is one for all."""
    block: int = 0
    """Numbers along the axis that share a scale; 0 where each place has its own."""
    packing: Literal["", "low first", "high first", "signs"] = ""
    """How bytes hold several codes: the first in the lowest bits, in the highest ones, or signs, a bit each."""
    bits: int = 8
    """Of a packed code."""
    codebook: str = ""
    """The table whose entries the codes count; empty where they are numbers."""
    middle: int = 0
    """The zero point where none is given."""

    @property
    def scales(self) -> tuple[int, ...]:
        """The shape of the scales."""
        if self.axis is None:
            return ()
        if not self.block:
            return (self.shape[self.axis],)
        return tuple(-(-size // self.block) if at == self.axis else size for at, size in enumerate(self.shape))

    def fits(self, scale: tuple[int, ...]) -> bool:
        """Whether a scale of this shape goes with the layout."""
        if prod(scale) == prod(self.scales):
            return True
        return prod(scale) == 1 or (len(scale) == len(self.scales) and all(
            size in (1, whole) for size, whole in zip(scale, self.scales, strict=True)
        ))  # fmt: skip

    def pieces(self, codes: Array | PackedRows, scale: Array, zero_point: Array | None) -> Iterator[Array]:
        """The numbers, float32, some rows of `shape` at a time."""
        scales = self.spread(scale)
        zeros = None if zero_point is None else self.spread(self.points(zero_point))
        if zeros is None and self.middle:
            zeros = np.full(scales.shape, self.middle, np.float32)
        for part in self._parts():
            yield dequantize(
                self._codes(codes, part), self._of(scales, part), None if zeros is None else self._of(zeros, part),
                self.axis, self.block or None, format=self.codebook or None,
            )  # fmt: skip

    def numbers(self, codes: Array, scale: Array, zero_point: Array | None) -> Array:
        """All of them, float32."""
        if not self.shape:
            return next(self.pieces(codes, scale, zero_point))
        whole, start = np.empty(self.shape, np.float32), 0
        for part in self.pieces(codes, scale, zero_point):
            whole[start : start + len(part)] = part
            start += len(part)
        return whole

    def points(self, zero_point: Array) -> Array:
        """Zero points one an element: bytes hold several of them where they hold several codes."""
        if self.packing != "low first" or zero_point.dtype != np.uint8:
            return zero_point
        rows = zero_point.reshape(*self.scales[:-1], -1)
        return unpacked(rows, self.bits)[..., : self.scales[-1]]

    def spread(self, values: Array) -> Array:
        """Scales or zero points in the shape of the scales."""
        if values.size == prod(self.scales):
            return values.reshape(self.scales)
        return np.broadcast_to(values.reshape(()) if values.size == 1 else values, self.scales)

    def _parts(self) -> Iterator[slice]:
        rows = max(1, PIECE // max(1, prod(self.shape[1:])))
        if self.block and self.axis == 0:
            rows = -(-rows // self.block) * self.block  # whole blocks
        count = self.shape[0] if self.shape else 1
        yield from (slice(start, min(start + rows, count)) for start in range(0, count, rows))

    def _of(self, values: Array, part: slice) -> Array:
        """The scales or zero points of some rows."""
        if self.axis is None or (self.axis and not self.block):
            return values
        if self.block and self.axis == 0:
            return values[part.start // self.block : -(-part.stop // self.block)]
        return values[part]

    def _codes(self, codes: Array | PackedRows, part: slice) -> Array:
        """Codes of some rows, one an element."""
        if isinstance(codes, PackedRows):
            found = codes[part]
        elif self.packing == "low first":
            found = unpacked(codes.reshape(*self.shape[:-1], -1)[part], self.bits)[..., : self.shape[-1]]
        elif self.packing == "high first":
            found = _high_first(codes.reshape(-1), part)
        elif self.packing == "signs":
            found = unpacked_signs(codes[part], self.shape[-1])
        else:
            found = codes.reshape(self.shape)[part] if self.shape else codes
        return found.astype(np.uint8, copy=False) if self.codebook else found


class PackedRows:
    """Codes of fewer than 8 bits, which ONNX packs into bytes: rows of `shape` are unpacked as they are asked for."""

    def __init__(self, tensor: ir.ExternalTensor | ir.PackedTensor[Any], shape: tuple[int, ...]) -> None:
        self._dtype, self._shape = tensor.dtype, shape
        if isinstance(tensor, ir.PackedTensor):
            self._bytes = tensor.numpy_packed().reshape(-1)
        else:
            self._bytes = ir.ExternalTensor(
                tensor.location, tensor.offset, tensor.length, ir.DataType.UINT8, shape=ir.Shape([tensor.nbytes]),
                name=str(tensor.name), base_dir=tensor.base_dir,
            ).numpy()  # fmt: skip

    def __getitem__(self, part: slice) -> Array:
        bits, row = self._dtype.bitwidth, prod(self._shape[1:])
        first, last = part.start * row, part.stop * row
        start = first * bits // 8
        codes = unpacked(self._bytes[start : -(-last * bits // 8)], bits)[first - start * 8 // bits :][: last - first]
        return codes.view(self._dtype.numpy()).reshape(-1, *self._shape[1:])


def rows_of(tensor: ir.TensorProtocol, shape: tuple[int, ...]) -> Array | PackedRows:
    """Codes whose rows can be read by themselves, from the file where the tensor lies in one."""
    if tensor.dtype.bitwidth in (2, 4) and isinstance(tensor, ir.ExternalTensor | ir.PackedTensor):
        return PackedRows(tensor, shape)
    return tensor.numpy()


def unpacked(data: Array, bits: int) -> Array:
    """Codes that bytes hold along the last axis, the first in the lowest bits; 8 must be a multiple of `bits`."""
    if bits == 8:
        return data
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    return ((data[..., None] >> shifts) & ((1 << bits) - 1)).reshape(*data.shape[:-1], -1)


def _high_first(data: Array, part: slice) -> Array:
    """Some of the codes of 4 bits, the first of two in the high half of a byte."""
    pairs = data[part.start // 2 : -(-part.stop // 2)]
    codes = np.stack([pairs >> 4, pairs & 15], axis=1).reshape(-1)
    return codes[part.start % 2 :][: part.stop - part.start]


def decodes(node: ir.Node) -> bool:
    """Whether a node turns codes into floats: DequantizeLinear, or a function of ours."""
    return (
        (node.domain, node.op_type) == ("", "DequantizeLinear") or codebook_format(node) is not None or is_binary(node)
    )


def decoder_layout(node: ir.Node, codes: tuple[int, ...], scale: tuple[int, ...]) -> Layout | None:
    """How a node that decodes reads codes and scales of these shapes; None where they do not go together."""
    size = node.attributes.get_int("block_size", 0) or 0
    if is_binary(node):
        features = node.attributes.get_int("in_features", 0) or 0
        layout = Layout((codes[0], features), 1, size or features, "signs")
    elif (book := codebook_format(node)) is not None:
        layout = Layout((prod(codes),), 0, size, codebook=book)
    elif prod(scale) == 1 and not size:
        layout = Layout(codes)
    else:
        axis = node.attributes.get_int("axis", 1) or 0
        if not -len(codes) <= axis < len(codes):
            return None
        layout = Layout(codes, axis % len(codes), size)
    return layout if layout.fits(scale) else None
