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

from qcompiler.errors import DataError
from qcompiler.formats.arithmetic import dequantize, quantize, scale_and_zero_point
from qcompiler.formats.codebooks import NF4_TABLE
from qcompiler.formats.scheme import FORMATS, PerTensor, Scheme
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


@pytest.mark.parametrize(("lo", "hi"), [(np.nan, 1.0), (-1.0, np.inf), (2.0, 1.0)])
def test_a_range_that_is_none_is_refused(lo: float, hi: float) -> None:
    with pytest.raises(DataError):
        scale_and_zero_point(lo, hi, Scheme("int8", PerTensor()))


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


@pytest.mark.parametrize("work", ["quantize", "dequantize"])
def test_scales_of_whole_blocks_are_not_spread_over_the_tensor(work: str) -> None:
    x = np.ones((512, 4096), np.float32 if work == "quantize" else np.int8)
    scale = np.ones((512, 64), np.float32)
    tracemalloc.start()
    found = quantize(x, scale, None, "int8", 1, 64) if work == "quantize" else dequantize(x, scale, None, 1, 64)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak - found.nbytes < 7e6  # a scale for each number is 8.4 MB


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
