"""Constants that are larger than memory together: computed when they are written, and let go at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np
import onnx_ir as ir

Result = TypeVar("Result")
PIECE = 1 << 22


def read(tensor: ir.TensorProtocol, compute: Callable[[np.ndarray], Result]) -> Result:
    """`compute(array)`, whose result is no view of the array; then the pages of a mapped file are given back."""
    result = compute(tensor.numpy())
    if isinstance(tensor, ir.ExternalTensor):
        try:
            tensor.release()
        except BufferError:
            # Somebody else is reading the same mapping; the pages belong to the file and can be reclaimed anyway.
            return result
    return result


def pieces(tensor: ir.TensorProtocol) -> Iterator[bytes]:
    """The tensor's bytes as ONNX stores them; an external file is read in pieces instead of being mapped.

    Of strings, which have no such form, each with its length before it.
    """
    if isinstance(tensor, ir.StringTensor):
        for text in tensor.string_data():
            yield len(text).to_bytes(8, "little") + text
        return
    if not isinstance(tensor, ir.ExternalTensor):
        yield tensor.tobytes()
        return
    with Path(tensor.path).open("rb") as file:
        file.seek(tensor.offset or 0)
        left = tensor.nbytes
        while left and (piece := file.read(min(PIECE, left))):
            left -= len(piece)
            yield piece


def derived(
    source: ir.TensorProtocol, compute: Callable[[np.ndarray], np.ndarray], dtype: ir.DataType,
    shape: tuple[int, ...], name: str,
) -> ir.TensorProtocol:  # fmt: skip
    """A constant computed from another one each time it is asked for, so that it never has to stay in memory.

    `compute` must be pure: the tensor is evaluated once for the output file and once more by whoever looks at it.
    Small ones (up to 1 MiB) are computed at once.
    """
    if np.prod(shape) * dtype.itemsize <= 1 << 20:
        return ir.Tensor(np.ascontiguousarray(read(source, compute)), dtype=dtype, shape=ir.Shape(shape), name=name)

    def evaluate() -> ir.TensorProtocol:
        return ir.Tensor(np.ascontiguousarray(read(source, compute)), dtype=dtype, shape=ir.Shape(shape), name=name)

    return ir.LazyTensor(evaluate, dtype=dtype, shape=ir.Shape(shape), cache=False, name=name)
