"""The weight of a layer as a diff tells and compares it: its form in a phrase, and its matrix."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import onnx_ir as ir

from qcompiler.sites.stored import StoredWeight, format_of, operand_weight
from qcompiler.sites.stored.constants import chain, evaluate, shape_of
from qcompiler.sites.stored.layout import Array

KINDS = {"float": "float32", "double": "float64"}


@dataclass(frozen=True, eq=False)
class Weight:
    stored: StoredWeight
    shape: tuple[int, ...]
    """[inputs, outputs]; [rows, features] of an embedding, [outputs, inputs / groups, …] of a convolution."""
    matrix: Callable[[], Array | None]
    """The numbers it stands for as [outputs, inputs] ([rows, features]); None where they cannot be told."""
    nodes: tuple[ir.Node, ...] = ()
    """The nodes between the constants and the layer."""

    @cached_property
    def form(self) -> str:
        return phrase(self.stored)

    @property
    def quantized(self) -> bool:
        return self.stored.quantized

    @property
    def constants(self) -> tuple[ir.Value, ...]:
        return self.stored.constants


def phrase(weight: StoredWeight) -> str:
    """The form in a story: ``float32``, ``int4 group(128) symmetric``, ``nf4 group(64) symmetric``."""
    return str(weight.scheme or KINDS.get(weight.format, weight.format))


def float_name(dtype: ir.DataType) -> str:
    """``float32``, ``float16``."""
    return KINDS.get(format_of(dtype), format_of(dtype))


def of_operand(value: ir.Value | None, *, outputs_first: bool) -> Weight | None:
    """What a plain operator multiplies by; None where it is computed.

    `outputs_first`: the operator reads [outputs, inputs], as Gemm with transB, Gather and Conv do.
    """
    stored = operand_weight(value)
    shape = shape_of(value) if stored is not None else None
    if stored is None or shape is None:
        return None
    return Weight(stored, _sizes(shape, outputs_first), lambda: _rows(evaluate(value), outputs_first), chain(value))


def of_codes(stored: StoredWeight | None, *, outputs_first: bool) -> Weight | None:
    """What a kernel multiplies by, or a table of codes."""
    if stored is None:
        return None
    shape = _sizes(stored.shape, outputs_first)
    return Weight(stored, shape, lambda: _rows(stored.numbers(), outputs_first), chain(stored.codes))


def as_table(weight: Weight | None) -> Weight | None:
    """A weight [inputs, outputs] as [rows, features] of what is looked up: each output is a row."""
    return None if weight is None else Weight(weight.stored, weight.shape[::-1], weight.matrix, weight.nodes)


def _sizes(shape: tuple[int, ...], outputs_first: bool) -> tuple[int, ...]:
    return shape[::-1] if outputs_first and len(shape) == 2 else shape


def _rows(data: Array | None, outputs_first: bool) -> Array | None:
    if data is None or data.ndim < 2 or not data.size:
        return None
    if outputs_first:
        return data.reshape(data.shape[0], -1)
    return np.swapaxes(data, -1, -2).reshape(-1, data.shape[-2])
