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

from collections.abc import Callable
from typing import Any

import onnx
import onnx_ir as ir

from qcompiler.functions.library import register

SPLIT = "SplitOutlierColumns"


def add_split_function(model: ir.Model) -> str:
    """Give the model the function above, and return its name."""
    return register(model, SPLIT, _split)


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
