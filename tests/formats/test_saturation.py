"""int8 weights whose sums of two products fit in 16 bits: what makes the fast kernel of every x86 CPU exact."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from qcompiler.formats.arithmetic import quantize
from qcompiler.formats.saturation import is_saturation_safe, saturation_safe_scale
from qcompiler.formats.scheme import PerChannel, PerTensor, Scheme
from qcompiler.formats.search import quantize_weight

INT8 = Scheme("int8", PerChannel())


def integer_product(activation: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """uint8 [M, K] times int8 [K, N] by ONNX Runtime."""
    graph = helper.make_graph(
        [helper.make_node("MatMulIntegerToFloat", ["x", "w", "one", "one"], ["y"], domain="com.microsoft")], "g",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, ["m", weight.shape[0]])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["m", weight.shape[1]])],
        [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(np.float32(1), "one")],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    onnx.checker.check_model(model)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": activation})[0])


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(1, 33), st.integers(1, 9), st.integers(0, 1), st.booleans(), st.integers(0, 99))
def test_codes_are_safe_whatever_the_weight(k: int, n: int, axis: int, half: bool, seed: int) -> None:
    dtype = np.float16 if half else np.float32
    generator = np.random.default_rng(seed)
    weight = (generator.standard_normal((n, k)) * generator.choice([0.01, 1, 30], (n, 1))).astype(dtype)
    weight = weight if axis == 0 else weight.T.copy()
    chosen = quantize_weight(weight, INT8, channel_axis=axis, scale_dtype=dtype)
    scale = saturation_safe_scale(weight, chosen.scale, axis)
    codes = quantize(weight, scale, None, "int8", axis)
    assert scale.dtype == dtype
    assert np.all(scale >= chosen.scale)
    assert is_saturation_safe(codes, axis)
    # The price is bounded: two equal neighbours at the very edge double the step, nothing does more.
    assert np.all(scale.astype(np.float64) <= 2.01 * chosen.scale.astype(np.float64))


def test_one_scale_for_the_tensor() -> None:
    weight = np.array([[1.0, 1.0], [0.1, 0.1]], np.float32)
    chosen = quantize_weight(weight, Scheme("int8", PerTensor()), channel_axis=0)
    scale = saturation_safe_scale(weight, chosen.scale, 0)
    assert scale.shape == ()
    assert scale == pytest.approx(2 / 127)


def test_neighbours_of_opposite_sign_cost_nothing() -> None:
    weight = np.tile(np.array([[1.0, -1.0]], np.float32), (3, 8))
    chosen = quantize_weight(weight, INT8, channel_axis=0)
    assert np.array_equal(saturation_safe_scale(weight, chosen.scale, 0), chosen.scale)


@pytest.mark.parametrize("tokens", [1, 2, 5, 40])
def test_the_kernel_is_exact_at_the_extremes(tokens: int) -> None:
    generator = np.random.default_rng(0)
    weight = np.abs(generator.standard_normal((256, 64))).astype(np.float32)  # all neighbours add up
    scale = saturation_safe_scale(weight, quantize_weight(weight, INT8, channel_axis=1).scale, 1)
    codes = quantize(weight, scale, None, "int8", 1)
    activation = generator.integers(250, 256, (tokens, 256)).astype(np.uint8)
    exact = activation.astype(np.int64) @ codes.astype(np.int64)
    np.testing.assert_allclose(integer_product(activation, codes), exact, rtol=1e-6)


def test_unsafe_codes_are_seen() -> None:
    assert not is_saturation_safe(np.array([[100, 29]], np.int8), 0)
    assert is_saturation_safe(np.array([[100, 28]], np.int8), 0)
    assert not is_saturation_safe(np.array([[-100], [-29]], np.int8), 1)
    assert is_saturation_safe(np.array([[7, 127, -128, 127]], np.int8)[:, 2:], 0)
