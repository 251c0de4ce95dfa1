"""The numbers that quantized constants stand for, as float constants again."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qcompiler.formats.arithmetic import dequantize
from qcompiler.graph.edit import add_constant, array, constant
from qcompiler.graph.lazy import derived
from qcompiler.graph.rewriter import Rewriter


class FloatConstants:
    """Makes each constant once for all that read it, so that tied weights stay tied."""

    def __init__(self, rw: Rewriter) -> None:
        self._rw = rw
        self._made: dict[object, ir.Value] = {}

    def of(
        self, codes: ir.Value, scale: ir.Value, points: ir.Value | None, axis: int, block: int, dtype: ir.DataType,
        graph: ir.Graph, turn: bool = False,
    ) -> ir.Value:  # fmt: skip
        """A float constant in the shape of the codes, or (`turn`) with its two axes exchanged."""
        key = codes, scale, points, axis, block, dtype, turn
        if key not in self._made:
            tensor = constant(codes)
            assert tensor is not None
            numbers, zeros = array(scale), None if points is None else array(points)
            single = numbers.size == 1 and not block

            def decoded(data: np.ndarray) -> np.ndarray:
                found = dequantize(data, numbers, zeros, None if single else axis, block or None).astype(dtype.numpy())
                return np.ascontiguousarray(found.T) if turn else found

            shape = tuple(int(size) for size in tensor.shape.numpy())
            name = self._rw.fresh(f"{codes.name}.float")
            self._made[key] = add_constant(
                graph, name, derived(tensor, decoded, dtype, shape[::-1] if turn else shape, name)
            )
        return self._made[key]
