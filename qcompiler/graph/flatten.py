"""Values of any rank as matrices of rows, for operators that multiply matrices of two dimensions only.

    matrix, rows = rows_of(x, K, rw, base)         x [..., K] → matrix [M, K]
    y = rows.restore(product, N, …)                   product [M, N] → y [..., N]

A value that is known to be a matrix stays as it is. The sizes of the others are read while the model runs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qcompiler.graph.edit import new_node
from qcompiler.graph.rewriter import Rewriter


@dataclass(frozen=True, eq=False)
class Rows:
    """A value as the rows of a matrix."""

    matrix: ir.Value
    """[M, K]"""
    leading: ir.Value | None
    """The sizes that were flattened into M, int64; None where the value was a matrix itself."""
    nodes: tuple[ir.Node, ...]
    """The nodes to insert, in order."""

    def restore(self, product: ir.Value, like: ir.Value, features: int, graph: ir.Graph, rw: Rewriter) -> list[ir.Node]:
        """The nodes that give a product [M, N] the leading sizes of the value; its shape is noted as that of `like`."""
        if self.leading is None:
            return []
        last = rw.constant(f"{product.name}.features", np.array([features], np.int64), graph)
        sizes = rw.node("Concat", [self.leading, last], f"{product.name}.sizes", dtype=ir.DataType.INT64,
                        shape=ir.Shape((None,)), attributes={"axis": 0})  # fmt: skip
        name = rw.fresh(f"{product.name}.shaped")
        return [sizes, new_node("Reshape", [product, sizes.outputs[0]], name, dtype=product.dtype, shape=like.shape)]


def rows_of(value: ir.Value, features: int, graph: ir.Graph, rw: Rewriter) -> Rows:
    """A value [..., K] as rows of K features."""
    if value.shape is not None and len(value.shape) == 2:
        return Rows(value, None, ())
    leading = rw.node("Shape", [value], f"{value.name}.leading", dtype=ir.DataType.INT64,
                      shape=ir.Shape((None,)), attributes={"end": -1})  # fmt: skip
    shape = rw.constant(f"{value.name}.rows.shape", np.array([-1, features], np.int64), graph)
    flat = rw.node("Reshape", [value, shape], f"{value.name}.rows", dtype=value.dtype,
                   shape=ir.Shape((None, features)))  # fmt: skip
    return Rows(flat.outputs[0], leading.outputs[0], (leading, flat))
