"""Weights in few bits: the scales of a tensor, of output channels, of groups or blocks, and the nearest codes.

What rounding to a scale means is `quantize.py`'s business; here the scales are chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Literal

import ml_dtypes
import numpy as np
import numpy.typing as npt

from qcompiler.errors import DataError, SchemeError
from qcompiler.formats.arithmetic import Array, Quantized, both, decode, encode, quantize, scale_and_zero_point, slices
from qcompiler.formats.scheme import Granularity, PerBlock, PerChannel, PerGroup, PerTensor, Scheme

Search = Literal["minmax", "mse"]

# The MSE search tries ranges of 100 % … 20 % in steps of 5 %, then ± 4 % around the best in steps of 1 %.
_COARSE_STEPS = -0.05 * np.arange(1, 17)
_FINE_STEPS = 0.01 * np.array([-4, -3, -2, -1, 1, 2, 3, 4])


def quantize_weight(
    weight: Array,
    scheme: Scheme,
    *,
    channel_axis: int,
    search: Search = "minmax",
    importance: Array | None = None,
    scale_dtype: npt.DTypeLike = np.float32,
    name: str = "the weight",
) -> Quantized:
    """Round a weight to the nearest codes of `scheme`.

    The weight is float16, bfloat16, float32 or float64, of any rank from 1; `channel_axis` is the axis of its output
    channels (0 for Conv's OIHW and Gemm's transposed B, 1 for MatMul's B). Groups and blocks need a matrix and run
    along its other axis. A block's scale is repeated for each of its rows, so that a blocked DequantizeLinear can say
    it.

    `search="minmax"` covers the whole range; `"mse"` shrinks it, per scale, to where the squared error is least, by a
    search over a grid (and lets symmetric scales of few bits be negative, see `scale_and_zero_point`). With
    `importance` [inputs] a squared error counts as often as its input says: E[x²] makes the sum the error of the
    output, were inputs independent (scales per channel or group of a matrix). Binary has a best scale in closed form,
    mean |w| (Rastegari et al. 2016, eq. 6), and needs none; where all weights are 0 it is 0.
    The work is done in slices of channels: what is needed besides weight and result stays below 64 MB for a matrix of
    4096 × 11008. Raises `DataError` for NaN, infinity or an empty weight, `SchemeError` where the scheme does not fit.
    """
    weight = np.asarray(weight)
    channel_axis = _check_weight(weight, scheme, channel_axis, search, name)
    granularity = scheme.granularity
    if importance is not None and (weight.ndim != 2 or not isinstance(granularity, PerChannel | PerGroup)):
        raise SchemeError(f"{name}: errors are weighted by input for scales per channel or group of a matrix only.")
    by_channel = np.moveaxis(weight, channel_axis, 0)
    parts = slices(by_channel.shape, granularity.rows if isinstance(granularity, PerBlock) else None)

    def read(part: slice) -> npt.NDArray[np.float32]:
        """The channels of one slice as rows, in float32."""
        rows = by_channel[part].astype(np.float32, order="C").reshape(by_channel[part].shape[0], -1)
        if not np.isfinite(rows).all():
            raise DataError(f"{name} contains NaN or infinity: repair it before it is quantized.")
        return rows

    # A tensor's scale is chosen on all slices together, any other on the slice that its channels are in.
    together = [parts] if isinstance(granularity, PerTensor) else [[part] for part in parts]
    chosen = [
        _choose([partial(read, part) for part in group], scheme, search, importance, scale_dtype) for group in together
    ]
    scale = np.concatenate([found for found, _ in chosen])
    zero_points = [found for _, found in chosen if found is not None]
    zero_point = np.concatenate(zero_points) if zero_points else None

    scale, zero_point, axis, block_size = laid_out(scale, zero_point, granularity, channel_axis)
    codes = quantize(weight, scale, zero_point, scheme.format, axis, block_size)
    return Quantized(codes, scale, zero_point, axis, block_size, scheme.format)


def _check_weight(weight: Array, scheme: Scheme, channel_axis: int, search: str, name: str) -> int:
    """The channel axis, counted from 0; raises where weight and scheme do not go together."""
    if search not in ("minmax", "mse"):
        raise SchemeError(f"search {search!r} is unknown: choose minmax or mse.")
    if scheme.dynamic:
        raise SchemeError(f"{name} cannot be quantized as {scheme}: a weight's scales are static.")
    if not (weight.dtype.kind == "f" or weight.dtype == ml_dtypes.bfloat16):
        raise DataError(f"{name} has dtype {weight.dtype}: only floating-point weights can be quantized.")
    if weight.ndim == 0 or weight.size == 0:
        raise DataError(f"{name} of shape {weight.shape} has no channels to quantize.")
    if not -weight.ndim <= channel_axis < weight.ndim:
        raise DataError(f"{name} of shape {weight.shape} has no channel axis {channel_axis}.")
    if isinstance(scheme.granularity, PerGroup | PerBlock) and weight.ndim != 2:
        raise SchemeError(f"{name} has rank {weight.ndim}, and {scheme.granularity} needs a matrix: choose channel.")
    return channel_axis % weight.ndim


def _block_size(granularity: Granularity) -> int | None:
    if isinstance(granularity, PerGroup):
        return granularity.size
    return granularity.columns if isinstance(granularity, PerBlock) else None


def laid_out(
    scale: Array, zero_point: Array | None, granularity: Granularity, channel_axis: int
) -> tuple[Array, Array | None, int | None, int | None]:
    """Parameters [channels, blocks] (per tensor [1, 1]) as scale, zero point, axis and block size of `Quantized`."""
    if isinstance(granularity, PerTensor):
        return *both(lambda p: p.reshape(()), scale, zero_point), None, None
    if isinstance(granularity, PerChannel):
        return *both(lambda p: p.reshape(-1), scale, zero_point), channel_axis, None
    turned = both(lambda p: np.ascontiguousarray(p if channel_axis == 0 else p.T), scale, zero_point)
    return *turned, 1 - channel_axis, _block_size(granularity)


def _cells(rows: Array, granularity: Granularity) -> Array:
    """rows [channels, inputs] → [channels or tiles, blocks, elements that share a scale], padded with 0.

    Padding changes neither a range, which holds 0 anyway, nor an error, as 0 is exact.
    """
    channels, inputs = rows.shape
    if isinstance(granularity, PerTensor):
        return rows.reshape(1, 1, -1)
    if isinstance(granularity, PerChannel):
        return rows.reshape(channels, 1, inputs)
    tile_rows = granularity.rows if isinstance(granularity, PerBlock) else 1
    columns = _block_size(granularity)
    assert columns is not None  # of a group or a block
    padded = np.pad(rows, ((0, -channels % tile_rows), (0, -inputs % columns)))
    tiles = padded.reshape(padded.shape[0] // tile_rows, tile_rows, padded.shape[1] // columns, columns)
    return tiles.swapaxes(1, 2).reshape(tiles.shape[0], tiles.shape[2], tile_rows * columns)


def _choose(
    reads: Sequence[Callable[[], Array]],
    scheme: Scheme,
    search: Search,
    importance: Array | None,
    scale_dtype: npt.DTypeLike,
) -> tuple[Array, Array | None]:
    """Scale and zero point [channels, blocks] (per tensor [1, 1]) for rows that are read piece by piece."""
    granularity, number_format = scheme.granularity, scheme.number_format
    kept = _cells(reads[0](), granularity) if len(reads) == 1 else None
    weights = (
        np.ones((), np.float32) if importance is None else _cells(importance[None].astype(np.float32), granularity)
    )

    parameters = partial(scale_and_zero_point, scheme=scheme, scale_dtype=scale_dtype, either_sign=search == "mse")

    def pieces() -> Iterator[Array]:
        return iter([kept]) if kept is not None else (_cells(read(), granularity) for read in reads)

    if number_format.kind == "sign":
        mean = _mean_magnitude(reads, granularity, weights)
        lo, hi = -mean, mean
    else:
        ranges = [(cells.min(-1), cells.max(-1)) for cells in pieces()]
        lo = np.minimum(np.min([low for low, _ in ranges], axis=0), 0.0)
        hi = np.maximum(np.max([high for _, high in ranges], axis=0), 0.0)

    def error(lo: Array, hi: Array) -> Array:
        scale, zero_point = both(lambda p: p[..., None], *parameters(lo, hi))
        total = np.zeros(lo.shape)
        for cells in pieces():
            codes = encode(cells, scale, zero_point, number_format)
            difference = decode(codes, scale, zero_point, scheme.format)
            difference -= cells
            np.square(difference, out=difference)
            difference *= weights
            total += difference.sum(-1, dtype=np.float64)
        return total

    if search == "mse" and number_format.kind != "sign":
        lo, hi = least_error_range(lo, hi, error)
    chosen = parameters(lo, hi)
    if number_format.kind == "sign":  # no code stands for 0, so that what is all zeros needs the scale 0
        chosen = np.where(hi == 0, np.zeros_like(chosen[0]), chosen[0]), None
    if not isinstance(granularity, PerBlock):
        return chosen
    channels = reads[0]().shape[0]  # one slice: only a tensor's scale is chosen on several
    return both(lambda p: np.repeat(p, granularity.rows, axis=0)[:channels], *chosen)


def _mean_magnitude(reads: Sequence[Callable[[], Array]], granularity: Granularity, weights: Array) -> Array:
    """mean |w| [channels or tiles, blocks], each as often as its weight says, the padding not counted."""
    total, count = np.zeros((1, 1)), np.zeros((1, 1))
    for read in reads:
        rows = read()
        total = total + (np.abs(_cells(rows, granularity)) * weights).sum(-1, dtype=np.float64)
        count = count + (_cells(np.ones_like(rows), granularity) * weights).sum(-1, dtype=np.float64)
    return np.divide(total, count, out=np.zeros_like(total), where=count > 0)


def least_error_range(lo: Array, hi: Array, error: Callable[[Array, Array], Array]) -> tuple[Array, Array]:
    """lo and hi, shrunk by the ratio of a grid that gives the least error, for each element by itself."""
    ratio, least = np.ones(lo.shape), error(lo, hi)
    for steps in (_COARSE_STEPS, _FINE_STEPS):
        centre = ratio
        for step in steps:
            candidate = np.minimum(centre + step, 1.0)
            found = error(lo * candidate, hi * candidate)
            ratio, least = np.where(found < least, candidate, ratio), np.minimum(found, least)
    return lo * ratio, hi * ratio
