"""Outlier columns at run time: a model-local function that finds them, and the sum that puts a layer together again.

    columns, rest = SplitOutlierColumns(x)
      x              float, float16 or bfloat16 [..., K]
      columns        int64 [k]: the columns j with max |x_j| ≥ threshold over all rows, in order; k may be 0
      rest           x with these columns 0
      threshold      a float
      most           with more columns than this the loudest are taken (all of those that are equally loud)

A column that holds NaN is no outlier, and stays NaN in `rest`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import onnx
import onnx_ir as ir

from qcompiler.functions.library import register
from qcompiler.graph.edit import Names, inherit, insert_after, new_node
from qcompiler.sites.find import PART_OF, Linear

SPLIT = "SplitOutlierColumns"


def add_split_function(model: ir.Model) -> str:
    """Give the model the function above, and return its name."""
    return register(model, SPLIT, _split)


def add_product(linear: Linear, product: Sequence[ir.Node], names: Names, pass_name: str) -> None:
    """Add to a layer's output the result of the last of some nodes; the sum takes the output's place and name.

    The nodes must not be in the graph yet. They become a part of the layer, which no pass takes for a layer of its own.
    """
    last = linear.bias_node or linear.node
    output, name = linear.output, linear.output.name
    total = new_node("Add", [None, product[-1].outputs[0]], names.fresh(f"{linear.name}.sum"), like=output)
    output.replace_all_uses_with(total.outputs[0], replace_graph_outputs=True)
    total.replace_input_with(0, output)
    output.name = names.fresh(f"{name}.rest")
    total.outputs[0].name = name
    inherit([*product, total], linear.node, pass_name)
    for node in product:
        node.metadata_props[PART_OF] = linear.name
    insert_after(last, [*product, total])


def _split() -> Callable[..., Any]:
    from onnxscript import opset21 as op

    def Split(x, threshold: float, most: int):  # type: ignore[no-untyped-def]  # noqa: N802
        flat = op.Constant(value_ints=[-1])
        magnitude = op.Abs(op.Cast(x, to=onnx.TensorProto.FLOAT))
        rows = op.Reshape(magnitude, op.Concat(flat, op.Shape(x, start=-1), axis=0))
        peak = op.ReduceMax(rows, op.Constant(value_ints=[0]), keepdims=0)
        loudest, _ = op.TopK(peak, op.Reshape(op.Constant(value_int=most), flat))
        cut = op.Max(op.ReduceMin(loudest), op.Constant(value_float=threshold))
        loud = op.GreaterOrEqual(peak, cut)
        columns = op.Reshape(op.NonZero(loud), flat)
        rest = op.Mul(x, op.CastLike(op.Not(loud), x))
        return columns, rest

    return Split
