"""The arithmetic of quantization: choose a scale, quantize, dequantize. The one place where rounding is defined.

    code = saturate(round(x / scale) + zero_point)        x̂ = (code - zero_point) · scale

`quantize` and `dequantize` agree with ONNX Runtime's QuantizeLinear and DequantizeLinear on the CPU in every bit:

- `x / scale` is a float32 division (float16 input is widened first), rounded half to even. From opset 23 on,
  QuantizeLinear divides float16 by float16 *in* float16: `precision=np.float16` does the same.
- Infinities and values out of range saturate. NaN becomes the lowest code of an integer format and stays NaN in fp8.
- `x̂` is float32. With float16 scales DequantizeLinear answers in float16: `dequantize(…).astype(np.float16)`.

Formats that QuantizeLinear does not have: 3-bit integers are 4-bit ones with fewer codes; int32 (biases) divides in
float64, because float32 cannot hold its codes; nf4 and fp4_bnb take the nearest entry of a table (`codebooks`), binary
takes the sign.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from qcompiler.errors import DataError
from qcompiler.formats.codebooks import CODEBOOKS
from qcompiler.formats.scheme import (
    NumberFormat,
    Scheme,
    find_format,
)

Array = npt.NDArray[Any]

# Elements that are worked on at once: 2 MiB of float32, so that the dozen temporaries stay in the cache.
_ELEMENTS_AT_ONCE = 1 << 19


@dataclass(frozen=True)
class Quantized:
    """A quantized tensor, laid out as DequantizeLinear wants it.

    `codes` has the tensor's shape, one element a code. `scale` has shape [] (per tensor, `axis` None), [channels] (per
    channel, along `axis`), or the tensor's shape with `axis` divided into blocks of `block_size`, the last one perhaps
    shorter. `zero_point` has the shape of `scale` and the dtype of `codes`; None stands for 0.
    """

    codes: Array
    scale: Array
    zero_point: Array | None
    axis: int | None
    block_size: int | None
    format: str

    def dequantize(self) -> npt.NDArray[np.float32]:
        """The float32 tensor that the codes stand for."""
        return dequantize(self.codes, self.scale, self.zero_point, self.axis, self.block_size, format=self.format)


def scale_and_zero_point(
    lo: npt.ArrayLike,
    hi: npt.ArrayLike,
    scheme: Scheme,
    scale_dtype: npt.DTypeLike = np.float32,
    *,
    either_sign: bool = False,
) -> tuple[Array, Array | None]:
    """The scale and zero point with which `scheme` covers the range lo … hi, element by element over any shape.

    The range is widened to hold 0, which is always exactly representable. A range of nothing but 0 has scale 1. A scale
    is never 0 or infinite: it is kept between the smallest and the largest number of `scale_dtype` (the smallest
    *normal* one of float32 and bfloat16, as processors may flush what is below; the smallest subnormal of float16, but
    the smallest normal one where the codes are floats: these have exponents to spare, and subnormal scales are coarse).
    The scale is rounded to `scale_dtype` here, before anything is quantized with it. The zero point is None where the
    scheme has none (symmetric signed, float formats). Raises `DataError` where the range is not finite or upside down.

    `either_sign` lets the symmetric scales of few-bit integers be negative where the upper end is the larger one: int4
    has a code more below 0 than above, and so the larger end gets it, and is represented exactly. A scheme whose scales
    are to be positive has none of these.
    """
    lows, highs = np.asarray(lo, np.float64), np.asarray(hi, np.float64)
    if not (np.isfinite(lows).all() and np.isfinite(highs).all()):
        raise DataError("the range to quantize is not finite: measure it on data without NaN and infinity.")
    if (lows > highs).any():
        raise DataError("the lower end of the range to quantize is above its upper end.")
    lows, highs = np.minimum(lows, 0), np.maximum(highs, 0)
    number_format = scheme.number_format
    if scheme.symmetric:
        few_bits = number_format.kind == "integer" and number_format.bits < 8
        either_sign = either_sign and few_bits and not scheme.positive
        divisor = number_format.middle - number_format.qmin if either_sign else number_format.symmetric_divisor
        scale = _storable(np.maximum(-lows, highs) / divisor, scale_dtype, normal=number_format.kind == "float")
        if either_sign:
            scale = np.where(highs > -lows, -scale, scale)
        if number_format.middle == 0:
            return scale, None
        return scale, np.full(scale.shape, number_format.middle, number_format.dtype)
    scale = _storable((highs - lows) / (number_format.qmax - number_format.qmin), scale_dtype)
    zero_point = np.rint(number_format.qmin - lows / scale.astype(np.float64))
    zero_point = np.asarray(np.clip(zero_point, number_format.qmin, number_format.qmax))
    return scale, zero_point.astype(number_format.dtype)


def quantize(
    x: Array,
    scale: Array,
    zero_point: Array | None,
    format: str,
    axis: int | None = None,
    block_size: int | None = None,
    *,
    precision: npt.DTypeLike = np.float32,
) -> Array:
    """The codes of `x`, shape of `x`, dtype `FORMATS[format].dtype`: QuantizeLinear, see the module's docstring.

    `scale` is laid out as in `Quantized`. `precision` is the type that `x / scale` is computed in. Raises `DataError`
    where the shapes of `x` and `scale` do not go together.
    """
    x = np.asarray(x)
    view, scale, zero_point = _aligned(x, scale, zero_point, axis, block_size)
    number_format = find_format(format)
    work = partial(encode, number_format=number_format, precision=precision)
    return _in_slices(work, view, scale, zero_point, number_format.dtype).reshape(x.shape)


def dequantize(
    codes: Array,
    scale: Array,
    zero_point: Array | None,
    axis: int | None = None,
    block_size: int | None = None,
    *,
    format: str | None = None,
) -> npt.NDArray[np.float32]:
    """The float32 values of `codes`: DequantizeLinear. `format` is needed where codes are indices (nf4, fp4_bnb)."""
    codes = np.asarray(codes)
    view, scale, zero_point = _aligned(codes, scale, zero_point, axis, block_size)
    return _in_slices(partial(decode, format=format), view, scale, zero_point, np.dtype(np.float32)).reshape(
        codes.shape
    )


def _in_slices(
    work: Callable[[Array, Array, Array | None], Array],
    x: Array,
    scale: Array,
    zero_point: Array | None,
    dtype: np.dtype[Any],
) -> Array:
    """work(x, scale, zero_point), done in slices of the first axis, so that its temporaries stay small."""
    if x.size <= _ELEMENTS_AT_ONCE:
        return np.asarray(work(x, scale, zero_point))
    out = np.empty(x.shape, dtype)
    scale, zero_point = both(lambda p: np.broadcast_to(p, x.shape), scale, zero_point)
    for part in slices(x.shape):
        out[part] = work(x[part], *both(lambda p, part=part: p[part], scale, zero_point))  # type: ignore[misc]
    return out


def encode(
    x: Array,
    scale: Array,
    zero_point: Array | None,
    number_format: NumberFormat,
    precision: npt.DTypeLike = np.float32,
) -> Array:
    """The codes of x; scale and zero point broadcast against it."""
    wide = np.float64 if number_format.name == "int32" else precision
    with np.errstate(over="ignore", invalid="ignore", divide="ignore", under="ignore"):
        ratio: Array = np.divide(x.astype(wide, copy=False), scale.astype(wide, copy=False))
    if ratio.dtype == np.float16:
        ratio = ratio.astype(np.float32)
    dtype: np.dtype[Any] = number_format.dtype
    if number_format.kind == "sign":
        return np.where(ratio < 0, -1, 1).astype(dtype)
    if number_format.kind == "codebook":
        return CODEBOOKS[number_format.name].encode(ratio)
    if number_format.kind == "float":
        clipped: Array = np.clip(ratio, number_format.qmin, number_format.qmax)
        return clipped.astype(dtype)
    offset = ratio.dtype.type(0) if zero_point is None else zero_point.astype(ratio.dtype)
    np.rint(ratio, out=ratio)
    # fmax and fmin take the bound where maximum and minimum would pass a NaN on.
    np.fmax(ratio, number_format.qmin - offset, out=ratio)
    np.fmin(ratio, number_format.qmax - offset, out=ratio)
    ratio += offset
    return ratio.astype(dtype)


def decode(codes: Array, scale: Array, zero_point: Array | None, format: str | None) -> npt.NDArray[np.float32]:
    values = CODEBOOKS[format].table[codes] if format in CODEBOOKS else codes.astype(np.float32)
    if zero_point is not None:
        values -= zero_point.astype(np.float32)
    with np.errstate(over="ignore", under="ignore"):
        values *= scale.astype(np.float32)
    return values


def both(change: Callable[[Array], Array], scale: Array, zero_point: Array | None) -> tuple[Array, Array | None]:
    return change(scale), None if zero_point is None else change(zero_point)


def _aligned(
    x: Array, scale: Array, zero_point: Array | None, axis: int | None, block_size: int | None
) -> tuple[Array, Array, Array | None]:
    """x, scale and zero point reshaped so that they broadcast; nothing is copied where all blocks are whole."""
    scale, zero_point = both(np.asarray, scale, zero_point)
    if zero_point is not None and zero_point.shape != scale.shape:
        raise DataError(f"the zero point's shape {zero_point.shape} is not the scale's, {scale.shape}.")
    if axis is None:
        if scale.size != 1:
            raise DataError(f"a scale of shape {scale.shape} needs an axis to lie along.")
        return x, *both(lambda p: p.reshape(()), scale, zero_point)
    if not -x.ndim <= axis < x.ndim:
        raise DataError(f"axis {axis} is outside of a tensor of shape {x.shape}.")
    axis %= x.ndim
    before, length, after = x.shape[:axis], x.shape[axis], x.shape[axis + 1 :]
    if block_size is None:
        if scale.shape != (length,):
            raise DataError(f"scales of shape {scale.shape} do not go with axis {axis} of a tensor of shape {x.shape}.")
        return x, *both(lambda p: p.reshape(-1, *[1] * len(after)), scale, zero_point)
    blocks = -(-length // block_size)
    if scale.shape != (*before, blocks, *after):
        raise DataError(
            f"scales of shape {scale.shape} do not go with blocks of {block_size} along axis {axis} "
            f"of a tensor of shape {x.shape}."
        )
    if length == blocks * block_size:
        split = x.reshape(*before, blocks, block_size, *after)
        return split, *both(lambda p: np.expand_dims(p, axis + 1), scale, zero_point)
    block_of = np.arange(length) // block_size
    return x, *both(lambda p: np.take(p, block_of, axis), scale, zero_point)


def _storable(scale: npt.NDArray[np.float64], dtype: npt.DTypeLike, *, normal: bool = False) -> Array:
    """`scale` rounded to `dtype`, never 0 or infinite; where the range is empty, 1. `normal`: never subnormal."""
    info = ml_dtypes.finfo(dtype)
    least = info.smallest_subnormal if np.dtype(dtype) == np.float16 and not normal else info.smallest_normal
    bounded = np.clip(scale, float(least), float(info.max))
    return np.asarray(np.where(scale == 0, 1.0, bounded)).astype(dtype)


def slices(shape: tuple[int, ...], multiple: int | None = None) -> list[slice]:
    """Slices of axis 0 of about `_ELEMENTS_AT_ONCE` elements each; their starts are multiples of `multiple`."""
    size = math.prod(shape)
    step = max(_ELEMENTS_AT_ONCE * shape[0], size) // size
    if multiple is not None:
        step = -(-step // multiple) * multiple
    return [slice(start, min(start + step, shape[0])) for start in range(0, shape[0], step)]
