"""The arithmetic: equal to ONNX Runtime in every bit, near to a float64 oracle, and sound at the extremes."""

import tracemalloc
from functools import cache
from itertools import pairwise
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from qcompiler.errors import DataError, SchemeError
from qcompiler.formats.arithmetic import dequantize, quantize, scale_and_zero_point
from qcompiler.formats.codebooks import NF4_TABLE
from qcompiler.formats.scheme import FORMATS, Granularity, PerBlock, PerChannel, PerGroup, PerTensor, PerToken, Scheme
from qcompiler.formats.search import Search, least_error_range, quantize_weight
from tests.oracles import arithmetic as oracle

ONNX_INTEGERS = ["int8", "uint8", "int16", "uint16", "int4", "uint4", "int2", "uint2"]
FP8 = ["fp8_e4m3", "fp8_e5m2"]
WEIGHT_FORMATS = [name for name in FORMATS if name not in ("int32",)]


@cache
def session(
    op: str, format: str, x_type: int, axis: int | None, block: int | None, opset: int, with_zero: bool
) -> onnxruntime.InferenceSession:
    """Quantize: x, scale[, zero point] → codes as int32 (fp8: float). Dequantize: codes as int32 … → values.

    The codes go in and out through Cast, because numpy has none of the narrow types.
    """
    storage = TensorProto.DataType.Value(FORMATS[format].storage)
    wide = TensorProto.FLOAT if format in FP8 else TensorProto.INT32
    attributes = {k: v for k, v in (("axis", axis), ("block_size", block)) if v is not None}
    nodes, inputs = [], ["in", "scale"]
    types = {"in": x_type if op == "QuantizeLinear" else wide, "scale": x_type}
    if op == "DequantizeLinear":
        nodes.append(helper.make_node("Cast", ["in"], ["codes"], to=storage))
        inputs[0] = "codes"
    if with_zero:
        nodes.append(helper.make_node("Cast", ["zero"], ["z"], to=storage))
        inputs.append("z")
        types["zero"] = wide
    if op == "QuantizeLinear":
        if not with_zero:
            attributes["output_dtype"] = storage
        nodes.append(helper.make_node(op, inputs, ["q"], **attributes))
        nodes.append(helper.make_node("Cast", ["q"], ["out"], to=wide))
        out_type = wide
    else:
        nodes.append(helper.make_node(op, inputs, ["out"], **attributes))
        out_type = x_type
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info(n, t, None) for n, t in types.items()],
        [helper.make_tensor_value_info("out", out_type, None)],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=11)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def opset_of(format: str) -> int:
    return 25 if format in ("int2", "uint2") else 21


def run(
    op: str, format: str, values: Any, scale: Any, zero: Any, axis: int | None, block: int | None, opset: int
) -> np.ndarray:
    x_type = helper.np_dtype_to_tensor_dtype(scale.dtype)
    wide = np.float32 if format in FP8 else np.int32
    feeds = {"in": values if op == "QuantizeLinear" else values.astype(wide), "scale": np.asarray(scale)}
    if zero is not None:
        feeds["zero"] = np.asarray(zero).astype(wide)
    return np.asarray(session(op, format, x_type, axis, block, opset, zero is not None).run(None, feeds)[0])


LAYOUTS = st.sampled_from(["tensor", "channel", "block"])


@st.composite
def problems(draw: st.DrawFn, format: str, dtype: Any = np.float32) -> tuple[Any, Any, Any, int | None, int | None]:
    """x, scale, zero point, axis, block size: small shapes; ties, zeros, subnormals and values far out of range."""
    shape = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    layout = draw(LAYOUTS)
    along = draw(st.integers(0, len(shape) - 1))
    axis = None if layout == "tensor" else along
    block = None
    scale_shape: tuple[int, ...] = ()
    if layout == "channel":
        scale_shape = (shape[along],)
    elif layout == "block":
        block = draw(st.integers(1, shape[along] + 1))
        scale_shape = (*shape[:along], -(-shape[along] // block), *shape[along + 1 :])
    if scale_shape == (1,):  # ONNX Runtime takes one scale for per-tensor, and then wants no block_size
        axis, block, scale_shape = None, None, ()
    exponents = (-14, 6) if dtype == np.float16 else draw(st.sampled_from([(-8, 4), (-126, -100), (60, 90)]))
    scale = np.exp2(random.uniform(*exponents, scale_shape)).astype(dtype)
    if draw(st.booleans()):
        scale = np.exp2(np.round(np.log2(scale.astype(np.float64)))).astype(dtype)  # so that ties are exact
    number_format = FORMATS[format]
    zero_point = None
    if number_format.kind == "integer" and (not number_format.signed or draw(st.booleans())):
        low, high = int(number_format.qmin), int(number_format.qmax)
        zero_point = random.integers(low, high + 1, scale_shape).astype(number_format.dtype)
    steps = random.choice([0, 0.5, 1, 1.5, -2.5, 3.25, 1e-3, -0.49999997, 7.5, -8.5, 126.5, -128.5, 1e6, -1e6], shape)
    steps = np.where(random.random(shape) < 0.5, steps, random.standard_normal(shape) * number_format.qmax)
    spread = np.broadcast_to(
        scale if scale_shape == () else np.resize(scale, shape), shape
    )  # only an order of magnitude: the layout of the scale does not matter here
    with np.errstate(over="ignore", under="ignore"):
        x = (steps * spread).astype(dtype)
    x[random.random(shape) < 0.05] = np.finfo(dtype).smallest_subnormal
    return np.nan_to_num(x, posinf=np.finfo(dtype).max, neginf=np.finfo(dtype).min), scale, zero_point, axis, block


@pytest.mark.parametrize("format", ONNX_INTEGERS + FP8)
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_quantize_is_bit_exact(format: str, data: st.DataObject) -> None:
    x, scale, zero, axis, block = data.draw(problems(format))
    expected = run("QuantizeLinear", format, x, scale, zero, axis, block, opset_of(format))
    codes = quantize(x, scale, zero, format, axis, block)
    assert codes.dtype == FORMATS[format].dtype
    np.testing.assert_array_equal(codes.astype(expected.dtype), expected)


@pytest.mark.parametrize("opset", [21, 23])
@pytest.mark.parametrize("format", ["int8", "uint8", "int16", "int4", "uint4", *FP8])
@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_quantize_of_float16_is_bit_exact_before_and_since_opset_23(
    format: str, opset: int, data: st.DataObject
) -> None:
    x, scale, zero, axis, block = data.draw(problems(format, np.float16))
    expected = run("QuantizeLinear", format, x, scale, zero, axis, block, opset)
    codes = quantize(x, scale, zero, format, axis, block, precision=np.float32 if opset < 23 else np.float16)
    np.testing.assert_array_equal(codes.astype(expected.dtype), expected)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("format", ONNX_INTEGERS + FP8)
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_dequantize_is_bit_exact(format: str, dtype: Any, data: st.DataObject) -> None:
    x, scale, zero, axis, block = data.draw(problems(format, dtype))
    codes = quantize(x, scale, zero, format, axis, block)
    expected = run("DequantizeLinear", format, codes, scale, zero, axis, block, opset_of(format))
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(dequantize(codes, scale, zero, axis, block).astype(dtype), expected)


def test_int32_dequantizes_like_onnxruntime_and_quantizes_what_float32_cannot_hold() -> None:
    codes = np.array([2**31 - 1, -(2**31), 16777217, -1], np.int32)
    node = helper.make_node("DequantizeLinear", ["q", "s"], ["y"])
    graph = helper.make_graph(
        [node], "g", [helper.make_tensor_value_info("q", TensorProto.INT32, [4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])], [numpy_helper.from_array(np.float32(0.3), "s")],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model)
    (expected,) = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"q": codes})
    np.testing.assert_array_equal(dequantize(codes, np.array(0.3, np.float32), None), expected)

    assert quantize(np.array([1e30, -1e30]), np.array(1, np.float32), None, "int32").tolist() == [2**31 - 1, -(2**31)]
    assert quantize(np.array([16777217.0]), np.array(1, np.float32), None, "int32").tolist() == [16777217]


@pytest.mark.parametrize("format", ONNX_INTEGERS + FP8)
def test_nan_and_infinity_come_out_as_onnxruntime_has_them(format: str) -> None:
    x = np.array([np.nan, np.inf, -np.inf] * 7, np.float32)  # long enough for its vector code and its remainder
    zero = None if format in FP8 else np.array(1, FORMATS[format].dtype)
    scale = np.array(0.5, np.float32)
    expected = run("QuantizeLinear", format, x, scale, zero, None, None, opset_of(format))
    np.testing.assert_array_equal(quantize(x, scale, zero, format).astype(expected.dtype), expected)


def test_large_tensors_are_worked_on_in_slices_with_the_same_result() -> None:
    random = np.random.default_rng(0)
    x = random.standard_normal((1100, 1001), dtype=np.float32)
    scale = random.uniform(0.01, 0.02, (1100, 11)).astype(np.float32)
    codes = quantize(x, scale, None, "int8", 1, 96)
    for row in (0, 523, 524, 1099):
        np.testing.assert_array_equal(codes[row], quantize(x[row], scale[row], None, "int8", 0, 96))


# -- the oracle ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["int8", "uint8", "int4", "int3", "uint3", "int2", "int16"])
def test_integers_against_the_oracle(format: str) -> None:
    number_format = FORMATS[format]
    x = np.random.default_rng(1).integers(-600, 600, 400).astype(np.float32) / 16  # exact in float32, ties included
    zero = int(number_format.qmax) // 2
    codes = quantize(x, np.array(0.125, np.float32), np.array(zero, number_format.dtype), format)
    low, high = int(number_format.qmin), int(number_format.qmax)
    assert codes.tolist() == [oracle.quantize(float(v), 0.125, zero, low, high) for v in x]


@pytest.mark.parametrize(
    ("format", "values"),
    [
        ("fp8_e4m3", oracle.float_values(4, 3, 7, 448.0)),
        ("fp8_e5m2", oracle.float_values(5, 2, 15, 57344.0)),
        ("fp4", oracle.float_values(2, 1, 1, 6.0)),
    ],
)
def test_small_floats_against_the_oracle(format: str, values: list[float]) -> None:
    middles = [(a + b) / 2 for a, b in pairwise(values)]
    random = np.random.default_rng(2).standard_normal(200) * values[-1] / 3
    x = np.array([*values, *middles, *(-m for m in middles), *random], np.float32)
    restored = dequantize(quantize(x, np.array(1, np.float32), None, format), np.array(1, np.float32), None)
    np.testing.assert_array_equal(restored, [oracle.nearest_float(float(v), values) for v in x])


def test_nf4_against_the_oracle() -> None:
    x = np.random.default_rng(3).uniform(-1.2, 1.2, 500).astype(np.float32)
    codes = quantize(x, np.array(1, np.float32), None, "nf4")
    assert codes.tolist() == [oracle.nearest_nf4(float(v)) for v in x]
    np.testing.assert_array_equal(dequantize(codes, np.array(2, np.float32), None, format="nf4"), 2 * NF4_TABLE[codes])


def test_binary_takes_the_sign_and_the_mean_magnitude() -> None:
    weight = np.array([[0.5, -1.5, 0.0, 2.0, -1.0], [1, 1, 1, 1, 6]], np.float32)
    quantized = quantize_weight(weight, Scheme("binary", PerGroup(2)), channel_axis=0)
    np.testing.assert_array_equal(quantized.codes, [[1, -1, 1, 1, -1], [1, 1, 1, 1, 1]])
    np.testing.assert_allclose(quantized.scale, [[1.0, 1.0, 1.0], [1.0, 1.0, 6.0]])


FLOATS = st.floats(-(2.0**100), 2.0**100, width=32)


@pytest.mark.parametrize("format", ["int8", "uint8", "int4", "uint4", "uint16"])
@given(ends=st.tuples(FLOATS, FLOATS))
@settings(max_examples=80, deadline=None)
def test_asymmetric_scales_against_the_oracle(format: str, ends: tuple[float, float]) -> None:
    lo, hi = sorted(ends)
    scale, zero = scale_and_zero_point(lo, hi, Scheme(format, PerTensor(), symmetric=False))
    assert zero is not None
    low, high = int(FORMATS[format].qmin), int(FORMATS[format].qmax)
    if max(abs(lo), abs(hi)) > 1e-30 or lo == hi == 0:  # below, the scale is kept at the least normal number
        expected_scale, expected_zero = oracle.asymmetric_parameters(lo, hi, low, high)
        assert float(scale) == pytest.approx(expected_scale, rel=2e-7)
        assert abs(int(zero) - expected_zero) <= 1
    assert dequantize(quantize(np.zeros(1), scale, zero, format), scale, zero).tolist() == [0.0]
    ends_back = dequantize(quantize(np.array([lo, hi], np.float32), scale, zero, format), scale, zero)
    tolerance = float(scale) * 1.001  # half a step for the zero point, half for the value
    assert abs(ends_back - [lo, hi]).max() <= tolerance


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("format", WEIGHT_FORMATS)
@given(magnitude=st.one_of(st.just(0.0), st.floats(1e-45, 3e38)))
@settings(max_examples=25, deadline=None)
def test_scales_are_never_zero_or_infinite(format: str, dtype: Any, magnitude: float) -> None:
    scale, zero = scale_and_zero_point(-magnitude, magnitude, Scheme(format, PerTensor()), dtype)
    assert scale.dtype == dtype
    assert 0 < float(scale) < np.inf
    assert magnitude > 0 or float(scale) == 1
    middle = FORMATS[format].middle
    assert (zero is None) if middle == 0 else (zero is not None and int(zero) == middle)


def test_symmetric_int8_maps_absmax_to_127_and_int4_covers_all_sixteen_codes() -> None:
    x = np.array([-3.0, 3.0], np.float32)
    scale, zero = scale_and_zero_point(-3.0, 2.0, Scheme("int8", PerTensor()))
    assert quantize(x, scale, zero, "int8").tolist() == [-127, 127]
    scale, zero = scale_and_zero_point(-3.0, 2.0, Scheme("int4", PerTensor()))
    assert quantize(x, scale, zero, "int4").tolist() == [-8, 7]


def test_symmetric_uint8_is_int8_moved_up_by_128() -> None:
    weight = np.random.default_rng(4).standard_normal((9, 33)).astype(np.float32)
    signed = quantize_weight(weight, Scheme("int8", PerChannel()), channel_axis=0)
    unsigned = quantize_weight(weight, Scheme("uint8", PerChannel()), channel_axis=0)
    np.testing.assert_array_equal(unsigned.codes.astype(int) - 128, signed.codes)
    np.testing.assert_array_equal(unsigned.dequantize(), signed.dequantize())


@pytest.mark.parametrize(("lo", "hi"), [(np.nan, 1.0), (-1.0, np.inf), (2.0, 1.0)])
def test_a_range_that_is_none_is_refused(lo: float, hi: float) -> None:
    with pytest.raises(DataError):
        scale_and_zero_point(lo, hi, Scheme("int8", PerTensor()))


# -- weights ---------------------------------------------------------------------------------------------------------


def expected_layout(shape: tuple[int, ...], granularity: Granularity, channel_axis: int) -> tuple[Any, Any, Any]:
    if isinstance(granularity, PerTensor):
        return (), None, None
    if isinstance(granularity, PerChannel):
        return (shape[channel_axis],), channel_axis, None
    if isinstance(granularity, PerGroup):
        size = granularity.size
    else:
        assert isinstance(granularity, PerBlock)
        size = granularity.columns
    axis = 1 - channel_axis
    return tuple(-(-n // size) if i == axis else n for i, n in enumerate(shape)), axis, size


@pytest.mark.parametrize("search", ["minmax", "mse"])
@pytest.mark.parametrize("format", WEIGHT_FORMATS)
@pytest.mark.parametrize("channel_axis", [0, 1, -1])
@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(), PerGroup(4), PerGroup(7), PerBlock(4, 5)], ids=str)
def test_every_scheme_lays_its_scales_out_for_dequantizelinear(
    granularity: Granularity, channel_axis: int, format: str, search: Any
) -> None:
    weight = np.random.default_rng(5).standard_normal((11, 18)).astype(np.float32)
    weight[3] = 0
    quantized = quantize_weight(weight, Scheme(format, granularity), channel_axis=channel_axis, search=search)
    layout = (quantized.scale.shape, quantized.axis, quantized.block_size)
    assert layout == expected_layout(weight.shape, granularity, channel_axis % 2)
    assert quantized.codes.shape == weight.shape
    assert quantized.codes.dtype == FORMATS[format].dtype
    again = quantize(weight, quantized.scale, quantized.zero_point, format, quantized.axis, quantized.block_size)
    np.testing.assert_array_equal(again, quantized.codes)
    # Half a step of the coarsest part of each format, relative to the largest weight of its scale.
    step = {"binary": 2.2, "fp8_e4m3": 0.04, "fp8_e5m2": 0.08, "fp4": 0.17, "fp4_bnb": 0.17, "nf4": 0.16}.get(
        format, 0.51 / FORMATS[format].symmetric_divisor
    )
    if search == "minmax":
        assert abs(quantized.dequantize() - weight).max() <= step * abs(weight).max()
    own = isinstance(granularity, PerChannel | PerGroup) and channel_axis == 0  # the row has scales of its own
    if format != "binary" or own:
        assert (quantized.dequantize()[3] == 0).all()


@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 40)),
    size=st.integers(1, 41),
    channel_axis=st.integers(0, 1),
    seed=st.integers(0, 1000),
)
@settings(max_examples=40, deadline=None)
def test_groups_are_what_a_loop_over_them_gives(
    shape: tuple[int, int], size: int, channel_axis: int, seed: int
) -> None:
    weight = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    scheme = Scheme("uint4", PerGroup(size), symmetric=False)
    quantized = quantize_weight(weight, scheme, channel_axis=channel_axis)
    rows = weight if channel_axis == 0 else weight.T
    assert quantized.zero_point is not None
    scales, zeros = (p if channel_axis == 0 else p.T for p in (quantized.scale, quantized.zero_point))
    for channel, row in enumerate(rows):
        for group, start in enumerate(range(0, row.size, size)):
            part = row[start : start + size]
            scale, zero = oracle.asymmetric_parameters(float(part.min()), float(part.max()), 0, 15)
            assert (float(scales[channel, group]), int(zeros[channel, group])) == (scale, zero)


@pytest.mark.parametrize("format", ["int4", "int3", "int2"])
def test_mse_search_finds_what_an_exhaustive_search_finds(format: str) -> None:
    number_format = FORMATS[format]
    weight = np.random.default_rng(6).standard_t(4, (6, 96)).astype(np.float32)
    scheme = Scheme(format, PerGroup(48))
    errors = {}
    for search in ("minmax", "mse"):
        difference = quantize_weight(weight, scheme, channel_axis=0, search=search).dequantize() - weight
        errors[search] = np.square(difference.astype(np.float64)).reshape(6, 2, 48).sum(-1)
    assert (errors["mse"] <= errors["minmax"]).all()
    assert errors["mse"].sum() < 0.95 * errors["minmax"].sum()
    low, high = int(number_format.qmin), int(number_format.qmax)
    for channel in range(6):
        for group in range(2):
            values = weight[channel, 48 * group :][:48].astype(float).tolist()
            best = oracle.grid_search(values, number_format.symmetric_divisor, low, high)
            assert errors["mse"][channel, group] <= 1.05 * best


@pytest.mark.parametrize("granularity", [PerChannel(), PerGroup(40)], ids=str)
@pytest.mark.parametrize("channel_axis", [0, 1])
def test_weighted_search_has_the_least_weighted_error(granularity: Granularity, channel_axis: int) -> None:
    generator = np.random.default_rng(9)
    weight = generator.standard_t(4, (6, 96) if channel_axis == 0 else (96, 6)).astype(np.float32)
    importance = np.exp(2 * generator.standard_normal(96))
    errors = {}
    for weights in (None, importance):
        quantized = quantize_weight(
            weight, Scheme("int4", granularity), channel_axis=channel_axis, search="mse", importance=weights
        )
        difference = np.moveaxis(quantized.dequantize() - weight, channel_axis, 0).astype(np.float64)
        weighted = np.square(difference) * importance
        starts = [0] if isinstance(granularity, PerChannel) else [0, 40, 80]
        errors[weights is None] = np.add.reduceat(weighted, starts, axis=1)
    assert (errors[False] <= errors[True] * (1 + 1e-6)).mean() > 0.9  # the search is a grid, refined around its best
    assert errors[False].sum() < 0.97 * errors[True].sum()


def test_a_number_alone_has_no_channels() -> None:
    with pytest.raises(DataError, match=r"the weight of shape \(\) has no channels to quantize"):
        quantize_weight(np.array(1.0, np.float32), Scheme("int8", PerTensor()), channel_axis=0)


def test_weights_of_errors_need_scales_of_channels() -> None:
    weight = np.ones((4, 8), np.float32)
    with pytest.raises(SchemeError, match="per channel or group"):
        quantize_weight(weight, Scheme("int8", PerTensor()), channel_axis=0, search="mse", importance=np.ones(8))


@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel()], ids=str)
@pytest.mark.parametrize("channel_axis", [0, 1])
def test_convolution_weights_of_rank_four(granularity: Granularity, channel_axis: int) -> None:
    weight = np.random.default_rng(7).standard_normal((6, 4, 3, 3)).astype(np.float32)
    quantized = quantize_weight(weight, Scheme("int8", granularity), channel_axis=channel_axis)
    others = tuple(i for i in range(4) if i != channel_axis)
    absmax = abs(weight).max() if isinstance(granularity, PerTensor) else abs(weight).max(others)
    np.testing.assert_allclose(quantized.scale, absmax / 127, rtol=1e-6)
    np.testing.assert_array_equal(
        quantized.dequantize(), dequantize(quantized.codes, quantized.scale, None, quantized.axis)
    )


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_weights_of_any_float_type_and_float16_scales_that_the_codes_match(dtype: Any) -> None:
    weight = (np.random.default_rng(8).standard_normal((5, 20)) * 1e-3).astype(dtype)
    weight[2] *= np.asarray(1e-3, dtype)  # its scale is a subnormal float16
    quantized = quantize_weight(weight, Scheme("int8", PerChannel()), channel_axis=0, scale_dtype=np.float16)
    assert quantized.scale.dtype == np.float16
    error = abs(quantized.dequantize() - weight.astype(np.float32))
    assert (error <= quantized.scale.astype(np.float32)[:, None] * 0.5001).all()


def test_a_block_shares_one_scale_among_its_rows() -> None:
    weight = np.arange(1, 61, dtype=np.float32).reshape(6, 10)
    quantized = quantize_weight(weight, Scheme("int8", PerBlock(4, 5)), channel_axis=0)
    expected = np.array([[35, 40], [35, 40], [35, 40], [35, 40], [55, 60], [55, 60]], np.float32) / 127
    np.testing.assert_allclose(quantized.scale, expected, rtol=1e-6)


def test_slices_of_channels_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = np.random.default_rng(9).standard_normal((23, 50)).astype(np.float32)
    schemes = [Scheme("int4", g) for g in (PerTensor(), PerChannel(), PerGroup(16), PerBlock(4, 16))]
    whole = [quantize_weight(weight, s, channel_axis=1, search="mse") for s in schemes]
    monkeypatch.setattr("qcompiler.formats.arithmetic._ELEMENTS_AT_ONCE", 100)
    for scheme, expected in zip(schemes, whole, strict=True):
        sliced = quantize_weight(weight, scheme, channel_axis=1, search="mse")
        np.testing.assert_array_equal(sliced.codes, expected.codes)
        np.testing.assert_array_equal(sliced.scale, expected.scale)


def test_the_memory_that_a_large_matrix_needs_besides_its_codes() -> None:
    weight = np.random.default_rng(10).standard_normal((1024, 11008), dtype=np.float32)
    tracemalloc.start()
    quantized = quantize_weight(weight, Scheme("int8", PerChannel()), channel_axis=1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak - quantized.codes.nbytes < 24e6  # the whole matrix in float32 is 45 MB


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused_by_name(value: float) -> None:
    weight = np.ones((4, 4), np.float32)
    weight[1, 2] = value
    with pytest.raises(DataError, match=r"^layers\.0\.weight contains NaN or infinity"):
        quantize_weight(weight, Scheme("int8", PerChannel()), channel_axis=0, name="layers.0.weight")


@pytest.mark.parametrize(
    ("weight", "scheme", "arguments", "error"),
    [
        (np.ones((2, 2, 2), np.float32), Scheme("int4", PerGroup(2)), {}, SchemeError),
        (np.ones((2, 2), np.float32), Scheme("int8", PerToken(), dynamic=True), {}, SchemeError),
        (np.ones((2, 2), np.float32), Scheme("int8", PerTensor(), dynamic=True), {}, SchemeError),
        (np.ones((2, 2), np.float32), Scheme("int8", PerChannel()), {"search": "best"}, SchemeError),
        (np.ones((2, 2), np.int8), Scheme("int8", PerChannel()), {}, DataError),
        (np.ones((0, 2), np.float32), Scheme("int8", PerChannel()), {}, DataError),
        (np.ones((2, 2), np.float32), Scheme("int8", PerChannel()), {"channel_axis": 2}, DataError),
        (np.ones((2, 2, 1), np.float32), Scheme("int8", PerChannel()), {"importance": np.ones(2)}, SchemeError),
    ],
)
def test_weights_and_schemes_that_do_not_go_together(
    weight: Any, scheme: Scheme, arguments: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error):
        quantize_weight(weight, scheme, **{"channel_axis": 0, **arguments})


def test_a_zero_point_has_the_shape_of_its_scale() -> None:
    scale, zero = np.ones((), np.float32), np.zeros(1, np.int8)
    with pytest.raises(DataError, match=r"the zero point's shape \(1,\) is not the scale's, \(\)"):
        quantize(np.ones(4, np.float32), scale, zero, "int8")


@pytest.mark.parametrize("format", ["int8", "uint8", "int16", "fp4", "fp8_e4m3", "nf4", "binary"])
def test_only_integers_of_few_bits_have_scales_of_either_sign(format: str) -> None:
    scheme = Scheme(format, PerTensor())
    for lo, hi in ((-1, 3), (-3, 1)):
        one, _ = scale_and_zero_point(lo, hi, scheme)
        other, _ = scale_and_zero_point(lo, hi, scheme, either_sign=True)
        assert one == other == np.float32(3 / FORMATS[format].symmetric_divisor)


@pytest.mark.parametrize(("format", "least"), [("int4", -8), ("uint4", -8), ("int3", -4), ("int2", -2)])
def test_the_larger_end_gets_the_code_that_the_other_has_not(format: str, least: int) -> None:
    scheme = Scheme(format, PerTensor())
    for lo, hi, expected in ((-1, 4, 4 / least), (-4, 1, -4 / least), (-4, 4, -4 / least)):
        scale, zero = scale_and_zero_point(lo, hi, scheme, either_sign=True)
        assert float(scale) == expected
        assert zero is None or int(zero) == -least
    for either_sign, chosen in ((True, Scheme(format, PerTensor(), positive=True)), (False, scheme)):
        scale, _ = scale_and_zero_point(-1, 4, chosen, either_sign=either_sign)
        assert float(scale) == pytest.approx(4 / FORMATS[format].symmetric_divisor)


@pytest.mark.parametrize("target", [0.16, 0.17, 0.2, 0.33, 0.5, 0.94, 0.95, 0.96, 0.99, 1.0])
def test_the_search_for_a_range_tries_every_percent_around_its_best(target: float) -> None:
    def error(lo: Any, hi: Any) -> Any:
        return np.abs(hi - target)

    lo, hi = least_error_range(np.array([-2.0]), np.array([1.0]), error)
    np.testing.assert_allclose([lo[0], hi[0]], [-2 * target, target], rtol=1e-9)


@pytest.mark.parametrize("percent", [-4, -3, -2, -1, 1, 2, 3, 4])
def test_the_search_for_a_range_goes_four_percent_from_its_best_of_the_coarse_grid(percent: int) -> None:
    def error(lo: Any, hi: Any) -> Any:
        return np.where(np.isclose(hi, 0.55 + percent / 100), 0, np.where(np.isclose(hi, 0.55), 1, 2))

    _, hi = least_error_range(np.zeros(1), np.ones(1), error)
    assert hi[0] == pytest.approx(0.55 + percent / 100)


def test_the_search_for_a_range_shrinks_none_by_more_than_to_16_percent_and_none_without_need() -> None:
    _, hi = least_error_range(np.zeros(2), np.ones(2), lambda lo, hi: np.stack([hi[0], 0 * hi[1]]))
    np.testing.assert_allclose(hi, [0.16, 1.0])


def test_binary_weights_need_no_search_and_inputs_without_importance_no_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qcompiler.formats.search.least_error_range", None)
    weight, importance = np.array([[1, -3, 5, 7]], np.float32), np.array([3, 1, 0, 0], np.float32)
    scheme = Scheme("binary", PerGroup(2))
    found = quantize_weight(weight, scheme, channel_axis=0, search="mse", importance=importance)
    np.testing.assert_array_equal(found.scale, [[1.5, 0]])
    each = quantize_weight(weight, Scheme("binary", PerGroup(1)), channel_axis=0, search="mse")
    np.testing.assert_array_equal(each.scale, np.abs(weight))


@pytest.mark.parametrize("work", ["quantize", "dequantize"])
def test_scales_of_whole_blocks_are_not_spread_over_the_tensor(work: str) -> None:
    x = np.ones((512, 4096), np.float32 if work == "quantize" else np.int8)
    scale = np.ones((512, 64), np.float32)
    tracemalloc.start()
    found = quantize(x, scale, None, "int8", 1, 64) if work == "quantize" else dequantize(x, scale, None, 1, 64)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak - found.nbytes < 7e6  # a scale for each number is 8.4 MB


def test_a_tensor_in_two_slices_has_the_scale_of_both(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = np.random.default_rng(11).standard_normal((8, 50)).astype(np.float32)
    searches: tuple[Search, ...] = ("minmax", "mse")
    for search in searches:
        whole = quantize_weight(weight, Scheme("int4", PerTensor()), channel_axis=0, search=search)
        with monkeypatch.context() as patched:
            patched.setattr("qcompiler.formats.arithmetic._ELEMENTS_AT_ONCE", 200)
            halves = quantize_weight(weight, Scheme("int4", PerTensor()), channel_axis=0, search=search)
            patched.setattr("qcompiler.formats.arithmetic._ELEMENTS_AT_ONCE", 1)  # less than a channel
            rows = quantize_weight(weight, Scheme("int4", PerTensor()), channel_axis=0, search=search)
        assert halves.scale == rows.scale == whole.scale


@pytest.mark.parametrize(
    ("scale", "axis", "block"),
    [(np.ones(3), None, None), (np.ones(3), 1, None), (np.ones((3, 3)), 1, 2), (np.ones(3), 2, None)],
)
def test_scales_that_do_not_fit_are_refused(scale: Any, axis: int | None, block: int | None) -> None:
    with pytest.raises(DataError):
        quantize(np.ones((3, 4), np.float32), scale.astype(np.float32), None, "int8", axis, block)


@pytest.mark.parametrize("format", ["int8", "uint4", *FP8])
def test_a_scale_of_16_bits_is_never_zero(format: str) -> None:
    """Of float formats it is a normal number: a subnormal one has few digits left."""
    scheme = Scheme(format, PerTensor())
    scale, _ = scale_and_zero_point(-1e-7, 1e-7, scheme, scale_dtype=np.float16)
    least = 2.0**-14 if format in FP8 else 2.0**-24  # the smallest normal number, and the smallest of all
    assert float(scale) == least
