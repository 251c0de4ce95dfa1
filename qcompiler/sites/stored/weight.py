"""A weight as a file stores it: the fields that describe its form, the constants behind it, and its numbers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import prod

import numpy as np
import onnx_ir as ir

from qcompiler.formats.scheme import (
    FORMATS,
    Granularity,
    PerChannel,
    PerGroup,
    PerTensor,
    ScaleType,
    Scheme,
    UnknownGranularity,
)
from qcompiler.graph.edit import constant
from qcompiler.sites.stored.constants import chain, constants_behind, evaluate
from qcompiler.sites.stored.layout import PIECE, Array, Layout, rows_of

SCALE_TYPES: dict[str, ScaleType] = {"FLOAT8E8M0": "e8m0", "FLOAT8E4M3FN": "e4m3"}
_FLOATS = {format.storage: format.name for format in FORMATS.values() if format.kind == "float"}


def format_of(dtype: ir.DataType) -> str:
    """``int8``, ``fp8_e4m3``; ``float``, ``float16`` of what is not quantized."""
    return _FLOATS.get(dtype.name, dtype.name.lower())


@dataclass(frozen=True, eq=False)
class StoredWeight:
    node: ir.Node | None
    """What decodes it or multiplies by its codes; None where it is stored as floats."""
    codes: ir.Value
    """As `node` reads them; floats where there is none."""
    shape: tuple[int, ...]
    """Of the weight, as `node` decodes or reads it."""
    format: str
    """int8, uint4, nf4, …; float, float16, … where it is no code."""
    bits: int
    granularity: Granularity | None = None
    """None where the scales are not known, or lie in no way that has a name."""
    scale: ir.Value | None = None
    zero_point: ir.Value | None = None
    layout: Layout | None = None
    """None of floats, and where it is not known."""

    @property
    def quantized(self) -> bool:
        return self.node is not None

    @cached_property
    def constants(self) -> tuple[ir.Value, ...]:
        """Codes, scales, zero points: what is stored, each once, that of the codes first."""
        return constants_behind(self.codes, self.scale, self.zero_point)

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for value in self.constants if (tensor := constant(value)) is not None)

    @property
    def is_integer(self) -> bool:
        return self.format in FORMATS and FORMATS[self.format].kind == "integer"

    @cached_property
    def symmetric(self) -> bool | None:
        """Whether every zero point is the middle of the codes, 0 or of uint8 128; None where that is not known."""
        if not self.is_integer:
            return True
        if self.layout is None:
            return None
        middles = [FORMATS[self.format].middle]
        if self.layout.packing and self.bits < self.layout.bits:
            middles.append(1 << (self.layout.bits - 1))  # of the wider codes that hold them
        if self.zero_point is None:
            return self.layout.middle in middles
        points = evaluate(self.zero_point)
        if points is None:
            return None
        return any(bool((self.layout.points(points).astype(np.float32) == middle).all()) for middle in middles)

    @cached_property
    def scheme(self) -> Scheme | None:
        """What the numbers are quantized to, as passes say it; None of floats."""
        if not self.quantized or self.format not in FORMATS:
            return None
        scale = self.scale.dtype if self.scale is not None else None
        return Scheme(
            self.format, self._shared() or self.granularity or UnknownGranularity(), self.symmetric,
            scale_type=SCALE_TYPES.get(scale.name, "") if scale is not None else "", scales=_of_scales(self.scale),
        ).numbers  # fmt: skip

    def _shared(self) -> Granularity | None:
        """Channels, or the tensor, where a kernel that has blocks alone repeats their scale for each; else None."""
        layout = self.layout
        if layout is None or not layout.block or layout.axis is None or layout.codebook:
            return None
        scale, points = evaluate(self.scale), evaluate(self.zero_point)
        parts = [layout.spread(scale)] if scale is not None else []
        parts += [layout.spread(layout.points(points))] if points is not None else []
        if not parts or not all(_same(part, layout.axis) for part in parts):
            return None
        return (
            PerTensor()
            if layout.scales[layout.axis] > 1 and all(_same(part, None) for part in parts)
            else (PerChannel() if isinstance(self.granularity, PerGroup) else None)
        )

    def pieces(self) -> Iterator[Array] | None:
        """The numbers, float32, some at a time: what lies in a file never comes into memory whole. None: not known."""
        if not self.quantized:
            return _floats(evaluate(self.codes))
        scale, zero_point = evaluate(self.scale), evaluate(self.zero_point)
        if self.layout is None or scale is None or (zero_point is None) != (self.zero_point is None):
            return None
        tensor = constant(self.codes)
        codes = rows_of(tensor, self.layout.shape) if tensor is not None else evaluate(self.codes)
        return None if codes is None else self.layout.pieces(codes, scale, zero_point)

    def numbers(self) -> Array | None:
        """All of them, in `shape`; None where they are not known."""
        if not self.quantized:
            return evaluate(self.codes)
        pieces = self.pieces()
        if pieces is None:
            return None
        whole, start = np.empty(prod(self.shape), np.float32), 0
        for piece in pieces:
            whole[start : start + piece.size] = piece.reshape(-1)
            start += piece.size
        return whole.reshape(self.shape)


def _floats(data: Array | None) -> Iterator[Array] | None:
    flat = None if data is None else data.reshape(-1)
    if flat is None:
        return None
    return (flat[start : start + PIECE].astype(np.float32) for start in range(0, flat.size, PIECE))


def _same(values: Array, axis: int | None) -> bool:
    """Whether all values are equal, or those along an axis."""
    first = values.reshape(-1)[:1].reshape((1,) * values.ndim) if axis is None else values.take([0], axis)
    return bool((values == first).all())


def _of_scales(scale: ir.Value | None) -> Scheme | None:
    """The scheme of scales that are quantized themselves; None of floats."""
    node = next((node for node in chain(scale) if node.op_type == "DequantizeLinear"), None)
    codes = node.inputs[0] if node is not None else None
    if node is None or codes is None or codes.dtype is None or format_of(codes.dtype) not in FORMATS:
        return None
    size = node.attributes.get_int("block_size", 0) or 0
    return Scheme(format_of(codes.dtype), PerGroup(size) if size else PerTensor())
