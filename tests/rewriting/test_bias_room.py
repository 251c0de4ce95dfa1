"""A channel that training switched off keeps its bias, whatever onnxruntime makes of it."""

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import qcompiler
from qcompiler.graph.rewriter import Rewriter
from qcompiler.rewriting.bias_room import BIAS_LIMIT, make_room
from qcompiler.sites.analyses import sites_of
from tests import tiny

DEAD = 2  # the channel


def convolution(weights: float) -> ir.Model:
    """Convolutions, plain and depthwise, and a Gemm, of whose channels one has weights × `weights`."""
    rng = np.random.default_rng(0)
    w1, w2 = rng.normal(size=(8, 3, 3, 3)) * 0.3, rng.normal(size=(8, 1, 3, 3)) * 0.3
    w3 = rng.normal(size=(8, 16)) * 0.3
    w1[DEAD] *= weights
    w2[DEAD] *= weights
    w3[:, DEAD] *= weights
    numbers: dict[str, Any] = {"w1": w1, "w2": w2, "w3": w3, "b": np.linspace(-5, 5, 8), "b3": np.linspace(-7, 7, 16)}
    return tiny.build(
        """m (float[B, 3, 12, 12] x, float[8, 3, 3, 3] w1, float[8, 1, 3, 3] w2, float[8, 16] w3, float[8] b,
              float[16] b3) => (float[B, 16] y, float[B, 8, 12, 12] c2) {
            c1 = Conv <pads = [1, 1, 1, 1]> (x, w1, b)
            r1 = Relu (c1)
            c2 = Conv <pads = [1, 1, 1, 1], group = 8> (r1, w2, b)
            p = GlobalAveragePool (c2)
            f = Flatten (p)
            y = Gemm (f, w3, b3)
        }""",
        **{name: array.astype(np.float32) for name, array in numbers.items()},
    )


@pytest.mark.parametrize("target", ["portable", "ort-cpu", "tensorrt"])
@pytest.mark.parametrize("weights", [1e-6, 1e-12, 0.0])
def test_switched_off_channels_keep_their_bias(target: str, weights: float) -> None:
    model = convolution(weights)
    data = [{"x": np.random.default_rng(seed).normal(size=(1, 3, 12, 12)).astype(np.float32)} for seed in range(8)]
    result = qcompiler.compile(model, "int8-static", target=target, calibration=data)
    feed = {"x": np.random.default_rng(9).normal(size=(2, 3, 12, 12)).astype(np.float32)}
    for optimized in (False, True):
        for expected, got in zip(tiny.run(model, feed), tiny.run(result.model, feed, optimized=optimized), strict=True):
            off = np.take(expected, DEAD, 1), np.take(got, DEAD, 1)
            for a, b in ((expected, got), off):
                assert 10 * np.log10((a**2).sum() / ((a - b) ** 2).sum()) > 30, (optimized, a.shape)
    assert min(measures["sqnr_db"] for measures in result.report.outputs.values()) > 30


def layer(scale: Any, codes: np.ndarray, bias: float, points: Any = None, step: float = 0.5) -> ir.Model:
    """A Gemm [4 → 3] whose input has scale `step`, in Q/DQ."""
    zero = f", {codes.dtype}[{np.size(points)}] z" if np.ndim(points) else f", {codes.dtype} z"
    shape = f"[{np.size(scale)}]" if np.ndim(scale) else ""
    constants = {
        "s": np.float32(step), "q0": np.uint8(128), "w": codes, "t": np.asarray(scale, np.float32),
        "b": np.full(3, bias, np.float32),
    }  # fmt: skip
    if points is not None:
        constants["z"] = np.asarray(points, codes.dtype)
    return tiny.build(
        f"""m (float[B, 4] x, float s, uint8 q0, {codes.dtype}[4, 3] w, float{shape} t, float[3] b
               {zero if points is not None else ""}) => (float[B, 3] y) {{
            xq = QuantizeLinear (x, s, q0)
            xd = DequantizeLinear (xq, s, q0)
            wd = DequantizeLinear <axis = 1> (w, t{", z" if points is not None else ""})
            y = Gemm (xd, wd, b)
        }}""",
        **constants,
    )


def room(model: ir.Model) -> tuple[bool, np.ndarray, np.ndarray]:
    """What `make_room` said, codes and scales."""
    (site,) = sites_of(model).linears
    told = make_room(site, Rewriter(model, "test"))
    decoder = next(node for node in model.graph if node.name == "wd")
    codes, scale = (
        value.const_value.numpy() for value in decoder.inputs[:2] if value is not None and value.const_value
    )
    return told, codes, scale


CODES = np.array([[127, 100, -127], [3, 50, 8], [-9, 20, 0], [0, -100, 7]], np.int8)


def test_only_the_scale_that_is_too_small_is_raised() -> None:
    told, codes, scale = room(layer([1e-3, 1e-12, 1e-3], CODES, bias=2.0))
    needed = 2.0 / (0.5 * BIAS_LIMIT)
    assert told
    np.testing.assert_allclose(scale, [1e-3, needed, 1e-3], rtol=1e-6)
    np.testing.assert_array_equal(codes[:, [0, 2]], CODES[:, [0, 2]])
    np.testing.assert_array_equal(codes[:, 1], np.rint(CODES[:, 1] * (1e-12 / needed)))


def test_codes_move_towards_their_zero_point() -> None:
    codes = (CODES.astype(np.int16) + 128).astype(np.uint8)
    needed = 2.0 / (0.5 * BIAS_LIMIT)
    points = [128, 120, 128]
    told, moved, _ = room(layer([1e-3, needed / 3, 1e-3], codes, bias=2.0, points=points))
    assert told
    expected = np.rint((codes[:, 1].astype(float) - 120) / 3 + 120)
    np.testing.assert_array_equal(moved[:, 1], expected)
    np.testing.assert_array_equal(moved[:, [0, 2]], codes[:, [0, 2]])
    assert moved.dtype == np.uint8


def test_one_scale_for_all_makes_room_for_the_largest_bias() -> None:
    needed = 2.0 / (0.5 * BIAS_LIMIT)
    told, codes, scale = room(layer(needed / 2, CODES, bias=-2.0))
    assert told
    assert scale == pytest.approx(needed, rel=1e-6)
    np.testing.assert_array_equal(codes, np.rint(CODES / 2))


def test_what_fits_is_left_alone() -> None:
    told, codes, _ = room(layer([1e-3, 1e-3, 1e-3], CODES, bias=2.0))
    assert not told
    np.testing.assert_array_equal(codes, CODES)


def test_weights_quantized_behind_a_quantized_input_have_room_too() -> None:
    model = tiny.build(
        """m (float[B, 4] x, float s, uint8 q0, float[4, 3] w, float[3] b) => (float[B, 3] y) {
            xq = QuantizeLinear (x, s, q0)
            xd = DequantizeLinear (xq, s, q0)
            y = Gemm (xd, w, b)
        }""",
        s=np.float32(0.5), q0=np.uint8(128), w=np.float32(1e-12 * CODES), b=np.full(3, 2, np.float32),
    )  # fmt: skip
    result = qcompiler.compile(model, "int8-weights", target="portable")
    scale = result.model.graph.initializers["w.scale"].const_value
    assert scale is not None
    assert scale.numpy().min() == pytest.approx(2.0 / (0.5 * BIAS_LIMIT), rel=1e-6)
