"""Model-local functions that quantize activations while the model runs, most with one scale for each row (token).

    codes, scale = DynamicQuantizePerToken(x)          integers: scale = max |row| / qmax, codes = round(x / scale)
      x              float, float16 or bfloat16 [..., K]; a row is what shares all indices but the last
      codes          int8 [..., K], in -qmax … qmax
      scale          float32 [..., 1]
      qmax           the largest code, a float: 127 for 8 bits, 7 for 4

    codes, scale = DynamicQuantizeFloat8PerToken(x)    float8: the same with scale = min(max |row|, cap) / qmax
      to             the type of the codes, as a number of onnx.TensorProto; what is beyond its range saturates
      qmax           its largest number: 448 (E4M3) or 57344 (E5M2)
      cap            the largest magnitude that counts for the scale; infinity for none

    codes, scale = DynamicQuantizeFloat8(x)            float8 with one scale [] for the whole value, else as above

    y = DequantizePerToken(codes, scale)               codes · scale, computed in float32
      output_dtype   the type of y, as a number of onnx.TensorProto

A scale is never 0 (a row of zeros has codes 0), and always a normal number. What is not finite harms no other row: an
infinity makes its whole row NaN, and NaN stays NaN in float8. Integers have no code for NaN, so it becomes some number
of the row's range, as with QuantizeLinear.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from qcompiler.functions.library import DOMAIN, register

QUANTIZE = "DynamicQuantizePerToken"
QUANTIZE_FLOAT8 = "DynamicQuantizeFloat8PerToken"
QUANTIZE_FLOAT8_TENSOR = "DynamicQuantizeFloat8"
DEQUANTIZE = "DequantizePerToken"
SMALLEST_SCALE = float(np.finfo(np.float32).smallest_normal)


def add_token_function(model: ir.Model, name: str) -> str:
    """Give the model one of the functions above (`QUANTIZE`, `QUANTIZE_FLOAT8`, …), and return its name."""
    return register(model, name, _SCRIPTS[name])


def is_token_function(node: ir.Node | None, *names: str) -> bool:
    """Whether a node calls one of the functions of these names."""
    return node is not None and node.domain == DOMAIN and node.op_type in names


def _quantize() -> Callable[..., Any]:
    from onnxscript import opset21 as op

    def Quantize(x, qmax: float):  # type: ignore[no-untyped-def]  # noqa: N802
        wide = op.Cast(x, to=onnx.TensorProto.FLOAT)
        largest = op.Constant(value_float=qmax)
        absmax = op.ReduceMax(op.Abs(wide), op.Constant(value_ints=[-1]), keepdims=1)
        scale = op.Max(op.Div(absmax, largest), op.Constant(value_float=SMALLEST_SCALE))
        rounded = op.Round(op.Div(wide, scale))
        codes = op.Cast(op.Clip(rounded, op.Neg(largest), largest), to=onnx.TensorProto.INT8)
        return codes, scale

    return Quantize


def _quantize_float8() -> Callable[..., Any]:
    from onnxscript import opset21 as op

    def Quantize(x, qmax: float, cap: float, to: int):  # type: ignore[no-untyped-def]  # noqa: N802
        wide = op.Cast(x, to=onnx.TensorProto.FLOAT)
        absmax = op.ReduceMax(op.Abs(wide), op.Constant(value_ints=[-1]), keepdims=1)
        capped = op.Min(absmax, op.Constant(value_float=cap))
        scale = op.Max(op.Div(capped, op.Constant(value_float=qmax)), op.Constant(value_float=SMALLEST_SCALE))
        codes = op.Cast(op.Div(wide, scale), to=to, saturate=1)
        return codes, scale

    return Quantize


def _quantize_float8_tensor() -> Callable[..., Any]:
    from onnxscript import opset21 as op

    def Quantize(x, qmax: float, cap: float, to: int):  # type: ignore[no-untyped-def]  # noqa: N802
        wide = op.Cast(x, to=onnx.TensorProto.FLOAT)
        capped = op.Min(op.ReduceMax(op.Abs(wide), keepdims=0), op.Constant(value_float=cap))
        scale = op.Max(op.Div(capped, op.Constant(value_float=qmax)), op.Constant(value_float=SMALLEST_SCALE))
        codes = op.Cast(op.Div(wide, scale), to=to, saturate=1)
        return codes, scale

    return Quantize


def _dequantize() -> Callable[..., Any]:
    from onnxscript import opset21 as op

    def Dequantize(codes, scale, output_dtype: int):  # type: ignore[no-untyped-def]  # noqa: N802
        return op.Cast(op.Mul(op.Cast(codes, to=onnx.TensorProto.FLOAT), scale), to=output_dtype)

    return Dequantize


_SCRIPTS = {
    QUANTIZE: _quantize,
    QUANTIZE_FLOAT8: _quantize_float8,
    QUANTIZE_FLOAT8_TENSOR: _quantize_float8_tensor,
    DEQUANTIZE: _dequantize,
}
