"""Model-local functions that store keys and values in few bits and read them back.

    codes = QuantizeCache(x, scale)                  round(x / scale), saturated to qmin … qmax
      x              float, float16 or bfloat16 [batch, …, channels]
      codes          int8, shape of x
      scale          of the type of x; broadcasts against it
      qmin, qmax     the codes' range as floats: -128, 127 for 8 bits; -8, 7 for 4

    codes, scale = DynamicQuantizeCache(x)           one scale for each row (the numbers of one head at one position)
      scale          max |row| / divisor, [batch, …, 1], in the type `scale_dtype`
      divisor        what the largest magnitude becomes, a float: 127 for 8 bits, 7 for 4
      scale_dtype    a number of onnx.TensorProto; codes are made with the scale as this type rounds it

    codes, scale, offset = DynamicQuantizeCacheOffset(x)      asymmetric: x ≈ codes · scale + offset
      scale          (max - min) / (qmax - qmin)
      offset         min - qmin · scale, in the type `scale_dtype`

    packed = PackInt4(codes)                         two codes in a byte
      packed         uint8 [batch, …, channels / 2]: 8 + code of an even channel in the low half, the next in the high
    codes = UnpackInt4(packed)                       the codes, as numbers of the float type `output_dtype`

    x = DequantizeCache(codes, scale)                codes · scale
    x = DequantizeCacheOffset(codes, scale, offset)  codes · scale + offset
      codes          int8, or already numbers of the float type
      output_dtype   the type of x, as a number of onnx.TensorProto

Division and rounding are done in float32. A scale is at least 2⁻²⁴, the least number of float16, so that rows of zeros
are read back as zeros. QuantizeLinear and DequantizeLinear would do for some of this; but ONNX Runtime on x86 moves
their int8 form past Reshape and Transpose and makes uint8 of it, which from opset 21 on fails to load. They also know
no scale for each head and channel. Packing uses float operators alone, as the CUDA provider has none for bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx
import onnx_ir as ir

from qcompiler.functions.library import DOMAIN, register

QUANTIZE = "QuantizeCache"
DYNAMIC = "DynamicQuantizeCache"
DYNAMIC_OFFSET = "DynamicQuantizeCacheOffset"
PACK, UNPACK = "PackInt4", "UnpackInt4"
DEQUANTIZE = "DequantizeCache"
DEQUANTIZE_OFFSET = "DequantizeCacheOffset"

SMALLEST_SCALE, LARGEST = 2.0**-24, 65504.0  # of float16
FLOAT, INT8, UINT8 = onnx.TensorProto.FLOAT, onnx.TensorProto.INT8, onnx.TensorProto.UINT8
ALL = 2**31 - 1


def add_cache_function(model: ir.Model, name: str) -> str:
    """Give the model one of the functions above (`QUANTIZE`, `DYNAMIC`, …), and return its name."""
    return register(model, name, _SCRIPTS[name])


def is_cache_function(node: ir.Node | None, *names: str) -> bool:
    """Whether a node calls one of the functions of these names; of any of this module where none is given."""
    return node is not None and node.domain == DOMAIN and node.op_type in (names or _SCRIPTS)


def _quantize() -> Callable[..., Any]:
    from onnxscript import opset21 as op

    def Quantize(x, scale, qmin: float, qmax: float):  # type: ignore[no-untyped-def]  # noqa: N802
        ratio = op.Div(op.Cast(x, to=FLOAT), op.Cast(scale, to=FLOAT))
        return op.Cast(op.Clip(op.Round(ratio), op.Constant(value_float=qmin), op.Constant(value_float=qmax)), to=INT8)

    return Quantize


def _dynamic() -> Callable[..., Any]:
    from onnxscript import opset21 as op

    def Quantize(x, qmin: float, qmax: float, divisor: float, scale_dtype: int):  # type: ignore[no-untyped-def]  # noqa: N802
        wide = op.Cast(x, to=FLOAT)
        absmax = op.ReduceMax(op.Abs(wide), op.Constant(value_ints=[-1]), keepdims=1)
        exact = op.Div(absmax, op.Constant(value_float=divisor))
        bounded = op.Clip(exact, op.Constant(value_float=SMALLEST_SCALE), op.Constant(value_float=LARGEST))
        scale = op.Cast(bounded, to=scale_dtype)
        rounded = op.Round(op.Div(wide, op.Cast(scale, to=FLOAT)))
        clipped = op.Clip(rounded, op.Constant(value_float=qmin), op.Constant(value_float=qmax))
        codes = op.Cast(clipped, to=INT8)
        return codes, scale

    return Quantize


def _dynamic_offset() -> Callable[..., Any]:
    from onnxscript import opset21 as op

    def Quantize(x, qmin: float, qmax: float, scale_dtype: int):  # type: ignore[no-untyped-def]  # noqa: N802
        wide = op.Cast(x, to=FLOAT)
        least, largest = op.Constant(value_float=qmin), op.Constant(value_float=qmax)
        top = op.Constant(value_float=LARGEST)
        high = op.ReduceMax(wide, op.Constant(value_ints=[-1]), keepdims=1)
        low = op.ReduceMin(wide, op.Constant(value_ints=[-1]), keepdims=1)
        exact = op.Div(op.Sub(high, low), op.Sub(largest, least))
        scale = op.Cast(op.Clip(exact, op.Constant(value_float=SMALLEST_SCALE), top), to=scale_dtype)
        step = op.Cast(scale, to=FLOAT)
        offset = op.Cast(op.Clip(op.Sub(low, op.Mul(least, step)), op.Neg(top), top), to=scale_dtype)
        rounded = op.Round(op.Div(op.Sub(wide, op.Cast(offset, to=FLOAT)), step))
        codes = op.Cast(op.Clip(rounded, least, largest), to=INT8)
        return codes, scale, offset

    return Quantize


def _pack() -> Callable[..., Any]:
    from onnxscript import opset21 as op

    def Pack(codes):  # type: ignore[no-untyped-def]  # noqa: N802
        shifted = op.Add(op.Cast(codes, to=FLOAT), op.Constant(value_float=8.0))
        last, two, end = op.Constant(value_ints=[-1]), op.Constant(value_ints=[2]), op.Constant(value_ints=[ALL])
        low = op.Slice(shifted, op.Constant(value_ints=[0]), end, last, two)
        high = op.Slice(shifted, op.Constant(value_ints=[1]), end, last, two)
        return op.Cast(op.Add(low, op.Mul(high, op.Constant(value_float=16.0))), to=UINT8)

    return Pack


def _unpack() -> Callable[..., Any]:
    from onnxscript import opset21 as op

    def Unpack(packed, output_dtype: int):  # type: ignore[no-untyped-def]  # noqa: N802
        both = op.Cast(packed, to=output_dtype)
        sixteen = op.CastLike(op.Constant(value_float=16.0), both)
        high = op.Floor(op.Mul(both, op.CastLike(op.Constant(value_float=0.0625), both)))
        low = op.Sub(both, op.Mul(high, sixteen))
        last = op.Constant(value_ints=[-1])
        pairs = op.Concat(op.Unsqueeze(low, last), op.Unsqueeze(high, last), axis=-1)
        rows = op.Shape(packed, end=-1)
        shifted = op.Reshape(pairs, op.Concat(rows, last, axis=0))
        return op.Sub(shifted, op.CastLike(op.Constant(value_float=8.0), both))

    return Unpack


def _dequantize() -> Callable[..., Any]:
    from onnxscript import opset21 as op

    def Dequantize(codes, scale, output_dtype: int):  # type: ignore[no-untyped-def]  # noqa: N802
        return op.Mul(op.Cast(codes, to=output_dtype), op.Cast(scale, to=output_dtype))

    return Dequantize


def _dequantize_offset() -> Callable[..., Any]:
    from onnxscript import opset21 as op

    def Dequantize(codes, scale, offset, output_dtype: int):  # type: ignore[no-untyped-def]  # noqa: N802
        scaled = op.Mul(op.Cast(codes, to=output_dtype), op.Cast(scale, to=output_dtype))
        return op.Add(scaled, op.Cast(offset, to=output_dtype))

    return Dequantize


_SCRIPTS = {
    QUANTIZE: _quantize,
    DYNAMIC: _dynamic,
    DYNAMIC_OFFSET: _dynamic_offset,
    PACK: _pack,
    UNPACK: _unpack,
    DEQUANTIZE: _dequantize,
    DEQUANTIZE_OFFSET: _dequantize_offset,
}
