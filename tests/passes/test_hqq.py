"""hqq: scales and zero points against a float64 oracle of the paper, and never a group worse than round-to-nearest."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from passes.hqq import Hqq, hqq
from qcompiler.errors import QCompilerError
from qcompiler.formats.arithmetic import Quantized
from qcompiler.formats.scheme import FORMATS, PerChannel, PerGroup, Scheme
from qcompiler.formats.search import quantize_weight
from qcompiler.rewriting.contract import Changes
from qcompiler.sites.find import find_sites
from tests import tiny
from tests.oracles import hqq as oracle
from tests.there import there

Search = Literal["minmax", "mse"]

MATMUL = "g (float[B,S,16] x, float[16,6] W) => (float[B,S,6] y) { [fc] y = MatMul(x, W) }"
GEMM = "g (float[M,16] x, float[6,16] W, float[6] b) => (float[M,6] y) { [fc] y = Gemm<transB=1>(x, W, b) }"
TIED = """g (int64[B,S] ids, float[12,16] E, float[16,16] W) => (float[B,S,12] logits) {
    [embed] x = Gather(E, ids)  [fc] h = MatMul(x, W)
    T = Transpose<perm=[1,0]>(E)  [lm_head] logits = MatMul(h, T) }"""


def run(model: ir.Model, **options: Any) -> tuple[ir.Model, Changes]:
    after = model.clone()
    (changes,) = tiny.compile(after, [Hqq(**options)], [])
    return after, changes


def heavy_tailed(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return (0.02 * np.random.default_rng(seed).standard_t(4, shape)).astype(np.float32)


def group_errors(weight: np.ndarray, quantized: Quantized, channel_axis: int, power: float) -> np.ndarray:
    """Σ |error|^power of each group."""
    error = np.abs(weight.astype(np.float64) - quantized.dequantize().astype(np.float64)) ** power
    rows = error if channel_axis == 0 else error.T
    size = quantized.block_size or rows.shape[1]
    return np.add.reduceat(rows, np.arange(0, rows.shape[1], size), axis=1)


@pytest.mark.parametrize("channel_axis", [0, 1])
@pytest.mark.parametrize("format", ["uint4", "int4", "uint3", "int8"])
@pytest.mark.parametrize("search", ["minmax", "mse"])
def test_against_the_oracle(search: Search, format: str, channel_axis: int) -> None:
    weight = heavy_tailed((24, 40))
    scheme = Scheme(format, PerGroup(16), symmetric=False)
    found, before, after = hqq(weight, scheme, channel_axis, search=search)
    start = quantize_weight(weight, scheme, channel_axis=channel_axis, search=search)
    arrays = weight, start.scale, there(start.zero_point)
    rows, scales, zeros = (array if channel_axis == 0 else array.T for array in arrays)
    bounds = int(FORMATS[format].qmin), int(FORMATS[format].qmax)
    expected = 0.0
    for channel, group in np.ndindex(scales.shape):
        part = rows[channel, group * 16 : group * 16 + 16].astype(np.float64)
        scale, zero = oracle.fit(part, float(scales[channel, group]), int(zeros[channel, group]), *bounds)
        expected += oracle.errors(part, scale, zero, *bounds)[0]
    # Single groups may stop a round earlier or later in float32.
    assert after == pytest.approx(expected, rel=2e-3)
    assert after == pytest.approx(group_errors(weight, found, channel_axis, 0.7).sum(), rel=1e-5)
    assert before == pytest.approx(group_errors(weight, start, channel_axis, 0.7).sum(), rel=1e-5)


def test_it_is_worth_it() -> None:
    weight = heavy_tailed((64, 256))
    for size, most in ((32, 0.975), (128, 0.975)):
        _, before, after = hqq(weight, Scheme("uint4", PerGroup(size), False), 0, search="minmax")
        assert after < most * before


@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 40)),
    size=st.one_of(st.none(), st.integers(1, 41)),
    channel_axis=st.integers(0, 1),
    format=st.sampled_from(["uint4", "int4", "uint2", "int3", "uint8"]),
    symmetric=st.booleans(),
    dtype=st.sampled_from([np.float32, np.float16]),
    search=st.sampled_from(["minmax", "mse"]),
    magnitude=st.sampled_from([1e-7, 1.0, 3e3]),
    norm=st.sampled_from([0.3, 0.7, 1.0]),
    seed=st.integers(0, 100),
)
@settings(max_examples=60, deadline=None)
def test_no_group_gets_worse(
    shape: tuple[int, ...],
    size: int,
    channel_axis: int,
    format: str,
    symmetric: bool,
    dtype: str,
    search: Search,
    magnitude: float,
    norm: float,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    weight = (magnitude * rng.standard_t(3, shape) * (rng.random(shape) > 0.2)).clip(-6e4, 6e4).astype(dtype)
    weight[0] = 0
    scheme = Scheme(format, PerChannel() if size is None else PerGroup(size), symmetric)
    start = quantize_weight(weight, scheme, channel_axis=channel_axis, search=search, scale_dtype=dtype)
    found, _, _ = hqq(weight, scheme, channel_axis, search=search, norm=norm)
    assert (found.scale.shape, found.scale.dtype, found.axis) == (start.scale.shape, start.scale.dtype, start.axis)
    assert np.isfinite(found.dequantize()).all()
    assert (found.dequantize()[0] == 0).all()
    if symmetric and start.zero_point is not None:
        np.testing.assert_array_equal(found.zero_point, start.zero_point)
    for power in (norm, 2.0):
        now, then = (group_errors(weight, quantized, channel_axis, power) for quantized in (found, start))
        assert (now <= then * (1 + 1e-4) + 1e-300).all()


def test_slices_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, scheme = heavy_tailed((20, 48)), Scheme("uint4", PerGroup(20), False)
    whole = hqq(weight, scheme, 1)[0]
    monkeypatch.setattr("qcompiler.formats.arithmetic._ELEMENTS_AT_ONCE", 100)
    sliced = hqq(weight, scheme, 1)[0]
    for name in ("codes", "scale", "zero_point"):
        np.testing.assert_array_equal(getattr(sliced, name), getattr(whole, name))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("granularity", "size"), [("channel", None), ("group", 8), ("group", 5)])
@pytest.mark.parametrize("text", [MATMUL, GEMM], ids=["matmul", "gemm"])
def test_the_graph_computes_with_the_codes(text: str, granularity: str, size: int | None, symmetric: bool) -> None:
    model = tiny.build(text, W="normal", b="normal") if text is GEMM else tiny.build(text, W="normal")
    after, changes = run(model, granularity=granularity, group_size=size, symmetric=symmetric)
    assert [c.site for c in changes.changed] == ["fc"]
    assert "against round-to-nearest" in changes.changed[0].detail
    (site,) = find_sites(after).linears
    assert site.dequantize is not None
    scheme = Scheme("uint4", PerChannel() if size is None else PerGroup(size), symmetric)
    W = hqq(tiny.data(model, "W"), scheme, 0 if text is GEMM else 1)[0].dequantize()
    sample = tiny.feeds(model)[0]
    expected = sample["x"] @ W.T + tiny.data(model, "b") if text is GEMM else sample["x"] @ W
    np.testing.assert_allclose(tiny.run(after, sample)[0], expected, rtol=1e-5, atol=1e-6)


def test_tied_weights_stay_float_unless_the_head_is_asked_for() -> None:
    model = tiny.build(TIED, E="normal", W="normal")
    after, changes = run(model)
    assert [c.site for c in changes.changed] == ["fc"]
    assert "E" in after.graph.initializers
    after, changes = run(model, layers=("linear", "head"), group_size=8)
    assert [c.site for c in changes.changed] == ["fc", "lm_head"]
    assert "E" in after.graph.initializers  # the embedding reads it


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"granularity": "tensor"}, "channel or group"),
        ({"format": "fp8_e4m3", "symmetric": True}, "no grid"),
        ({"format": "int16"}, "no grid"),
        ({"format": "nf4", "symmetric": True}, "DequantizeLinear"),
    ],
)
def test_options_that_do_not_go_together(options: dict[str, Any], said: str) -> None:
    with pytest.raises(QCompilerError, match=said):
        Hqq(**options)


def test_a_weight_with_nan() -> None:
    weight = heavy_tailed((4, 8))
    weight[1, 2] = np.nan
    with pytest.raises(QCompilerError, match="fc contains NaN"):
        hqq(weight, Scheme("uint4", PerGroup(4), False), 0, name="fc")
