"""Binary weights against a float64 oracle, in every layout; in ONNX Runtime and on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from passes.quantize_weights import QuantizeWeights
from qcompiler.errors import QCompilerError, SchemeError
from qcompiler.formats.scheme import PerChannel, PerGroup, Scheme
from qcompiler.formats.search import quantize_weight
from qcompiler.functions import binary
from qcompiler.graph import files as model_io
from qcompiler.graph.session import session
from qcompiler.rewriting.contract import Changes
from qcompiler.sessions import segments
from qcompiler.sites.canonicalize import canonicalize
from qcompiler.sites.find import find_sites
from qcompiler.statistics import ChannelMoments
from tests import tiny
from tests.oracles import binary as oracle
from tests.there import held, numpy_type, tensors, there

MATMUL = "g (float[B,S,{K}] x, float[{K},{N}] W) => (float[B,S,{N}] y) {{ [fc] y = MatMul(x, W) }}"
GEMM = """g (float[M,{K}] x, float[{N},{K}] W, float[{N}] b) => (float[M,{N}] y) {{
    [fc] y = Gemm<transB=1>(x, W, b) }}"""
PLAIN_GEMM = "g (float[M,{K}] x, float[{K},{N}] W) => (float[M,{N}] y) {{ [fc] y = Gemm(x, W) }}"
TURNED = "g (float[M,{K}] x, float[{N},{K}] W) => (float[M,{N}] y) {{ T = Transpose(W)  [fc] y = MatMul(x, T) }}"
IN_COLUMNS = (MATMUL, PLAIN_GEMM)


def model_of(text: str, K: int, N: int, W: object = "normal", **settings: Any) -> ir.Model:
    bias = {"b": "zeros"} if text is GEMM else {}
    return tiny.build(text.format(K=K, N=N), W=W, **bias, **settings)


def rows_of(model: ir.Model, text: str) -> np.ndarray:
    W = tiny.data(model, "W")
    return W.T if text in IN_COLUMNS else W


def quantize(model: ir.Model, **options: Any) -> tuple[ir.Model, Changes]:
    after = model.clone()
    (changes,) = tiny.compile(after, [QuantizeWeights(format="binary", **options)], tiny.feeds(model))
    return after, changes


def effective_weight(model: ir.Model, optimized: bool = False) -> np.ndarray:
    """The matrix [N, K] that the only layer really multiplies by."""
    return tiny.multiplied(model, optimized=optimized).T


# ------------------------------------------------------------------------------------------------------- arithmetic


@given(filter=st.lists(st.floats(-4, 4, width=32), min_size=1, max_size=8))
@settings(max_examples=40, deadline=None)
def test_no_other_signs_and_magnitude_are_nearer(filter: list[float]) -> None:
    """Of all 2ⁿ sign vectors, each with its own best magnitude."""
    W = np.array([filter], np.float32)
    quantized = quantize_weight(W, Scheme("binary", PerChannel()), channel_axis=0)
    error = float(((quantized.dequantize().astype(np.float64) - W) ** 2).sum())
    assert error <= oracle.least_error(W[0].tolist()) * (1 + 1e-5) + 1e-9


@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 40)),
    size=st.none() | st.integers(1, 41),
    channel_axis=st.integers(0, 1),
    weighted=st.booleans(),
    zeros=st.sampled_from([0.0, 0.5, 0.97, 1.0]),
    magnitude=st.sampled_from([1e-6, 1.0, 1e4]),
    seed=st.integers(0, 100),
)
@settings(max_examples=40, deadline=None)
def test_any_shape(
    shape: tuple[int, ...], size: int, channel_axis: int, weighted: bool, zeros: bool, magnitude: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    rows = (magnitude * rng.normal(size=shape) * (rng.random(shape) >= zeros)).astype(np.float32)
    importance = (rng.random(shape[1]) * (rng.random(shape[1]) > 0.2)).astype(np.float32) if weighted else None
    scheme = Scheme("binary", PerChannel() if size is None else PerGroup(size))
    found = quantize_weight(
        rows if channel_axis == 0 else rows.T, scheme, channel_axis=channel_axis, importance=importance
    )
    got = found.dequantize() if channel_axis == 0 else found.dequantize().T
    np.testing.assert_allclose(got, oracle.restored(rows, size, importance), rtol=1e-5, atol=1e-37)


def test_a_channel_of_zeros_stays_zero() -> None:
    W = np.random.default_rng(0).normal(size=(4, 12)).astype(np.float32)
    W[2] = 0
    after, _ = quantize(model_of(GEMM, 12, 4, W))
    got = effective_weight(after)
    assert (got[2] == 0).all()
    assert (got[[0, 1, 3]] != 0).all()


def test_zeros_count_as_positive() -> None:
    W = np.array([[0.0, -0.0, -3.0, 1.0]], np.float32)
    np.testing.assert_array_equal(effective_weight(quantize(model_of(GEMM, 4, 1, W))[0]), [[1, 1, -1, 1]])


# --------------------------------------------------------------------------------------------------- the portable form


@pytest.mark.parametrize("size", [None, 4, 16])
@pytest.mark.parametrize(("N", "K"), [(6, 32), (5, 13), (1, 8), (3, 2), (40, 33)])
@pytest.mark.parametrize("text", [MATMUL, GEMM, PLAIN_GEMM, TURNED], ids=["matmul", "gemm", "plain-gemm", "turned"])
def test_linear(text: str, N: int, K: int, size: int | None) -> None:
    model = model_of(text, K, N)
    groups = {} if size is None else {"granularity": "group", "group_size": size}
    after, changes = quantize(model, **groups)
    assert [c.site for c in changes.changed] == ["fc"]
    assert not changes.skipped
    rows = rows_of(model, text)
    expected = oracle.restored(rows, size)
    for optimized in (False, True):
        np.testing.assert_allclose(effective_weight(after, optimized), expected, rtol=1e-5, atol=1e-6)
    onnx.checker.check_model(ir.to_proto(after), full_check=True)

    (site,) = find_sites(after).linears
    assert (site.in_features, site.out_features, site.transposed) == (K, N, True)
    assert binary.is_binary(site.dequantize)
    bits = held(site.weight)
    assert (bits.dtype, bits.shape) == (np.dtype(np.uint8), (N, -(-K // 8)))
    np.testing.assert_array_equal(binary.unpacked_signs(bits, K), np.where(rows < 0, -1, 1))
    scales = binary.channel_scales(there(site.dequantize))
    assert (scales is None) == (size is not None)


def test_the_first_sign_is_in_the_lowest_bit() -> None:
    W = -np.ones((1, 11), np.float32)
    W[0, [0, 3, 9]] = 1
    after, _ = quantize(model_of(GEMM, 11, 1, W))
    assert tiny.data(after, "W.codes").tolist() == [[0b00001001, 0b00000010]]


@pytest.mark.parametrize("dtype", ["float16", "double"])
def test_other_types(dtype: str) -> None:
    model = tiny.build(MATMUL.replace("float", dtype).format(K=20, N=6), W="normal")
    after, _ = quantize(model)
    got = effective_weight(after)
    assert got.dtype == numpy_type(model.graph.inputs[0])
    np.testing.assert_allclose(got, oracle.restored(tiny.data(model, "W").T), rtol=1e-3 if dtype == "float16" else 1e-6)


def test_bits_a_weight() -> None:
    model = model_of(MATMUL, 512, 64)
    assert quantize(model)[1].changed[0].detail == "1.06 bits a weight"
    assert quantize(model, granularity="group", group_size=64)[1].changed[0].detail == "1.50 bits a weight"
    after, _ = quantize(model)
    assert sum(constant.nbytes for constant in tensors(after).values()) == 512 * 64 / 8 + 4 * 64


def test_weights_that_loud_inputs_meet_count_more() -> None:
    model = model_of(MATMUL, 24, 5)
    after, _ = quantize(model, search="weighted")
    moments = ChannelMoments(per_token=True)
    for sample in tiny.feeds(model):
        moments.update(sample["x"])
    expected = oracle.restored(tiny.data(model, "W").T, importance=moments.result())
    np.testing.assert_allclose(effective_weight(after), expected, rtol=1e-4)


TIED = """g (int64[B,S] ids, float[12,16] E, float[16,16] W) => (float[B,S,12] logits) {
    [embed] x = Gather(E, ids)  [fc] h = MatMul(x, W)
    T = Transpose<perm=[1,0]>(E)  [lm_head] logits = MatMul(h, T) }"""


def test_a_tied_embedding_stays_float() -> None:
    model = tiny.build(TIED, E="normal", W="normal")
    after, changes = quantize(model)
    assert {c.site for c in changes.changed} == {"lm_head", "fc"}
    assert tiny.reasons(changes) == {
        "embed": "binary weights are decoded for linear layers alone: choose int8 or uint8 for this one"
    }
    E, W = tiny.data(model, "E"), tiny.data(model, "W")
    expected = (E @ oracle.restored(W.T).T) @ oracle.restored(E).T
    logits = tiny.run(after, {"ids": np.arange(12)[None]})[0][0]
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
    assert {site.name: site.in_features for site in find_sites(after).linears} == {"fc": 16, "lm_head": 16}


def test_layers_that_share_a_weight_share_its_bits() -> None:
    model = tiny.build(
        """g (float[M,16] x, float[16,16] W) => (float[M,16] z) {
        [first] y = MatMul(x, W)  [second] z = MatMul(y, W) }""",
        W="normal",
    )  # fmt: skip
    after, changes = quantize(model)
    assert [c.site for c in changes.changed] == ["first", "second"]
    assert tiny.operators(after) == ["DequantizeBinary", "Transpose", "MatMul", "MatMul"]
    rows, x = oracle.restored(tiny.data(model, "W").T), tiny.feeds(model)[0]["x"]
    np.testing.assert_allclose(tiny.run(after, {"x": x})[0], x @ rows.T @ rows.T, rtol=1e-3, atol=1e-3)


def test_an_excluded_layer_keeps_the_float_weight() -> None:
    model = tiny.build(
        """g (float[M,16] x, float[16,16] W) => (float[M,16] z) {
        [first] y = MatMul(x, W)  [second] z = MatMul(y, W) }""",
        W="normal",
    )  # fmt: skip
    after, changes = quantize(model, ignore=("second",))
    assert [c.site for c in changes.changed] == ["first"]
    W, x = tiny.data(model, "W"), tiny.feeds(model)[0]["x"]
    np.testing.assert_allclose(tiny.run(after, {"x": x})[0], x @ oracle.restored(W.T).T @ W, rtol=1e-3, atol=1e-3)


def test_nothing_to_do_leaves_no_function_behind() -> None:
    after, changes = quantize(model_of(MATMUL, 16, 4), ignore=("fc",))
    assert not changes.changed
    assert not after.functions


def test_convolutions_are_skipped() -> None:
    text = "g (float[1,2,5,5] x, float[3,2,3,3] W) => (float[1,3,3,3] y) { [conv] y = Conv(x, W) }"
    model = tiny.build(text, W="normal")
    _, changes = quantize(model)
    assert "linear layers alone" in tiny.reasons(changes)["conv"]


def test_module_paths_survive() -> None:
    text = 'g (float[M,32] x, float[32,8] "layers.0.up.weight") => (float[M,8] y) {y = MatMul(x, "layers.0.up.weight")}'
    model = tiny.build(text, **{"layers.0.up.weight": "normal"})
    after, _ = quantize(model)
    for each in (model, after):
        assert find_sites(each).linears[0].module_path == "layers.0.up"


def test_quantized_twice() -> None:
    after, _ = quantize(model_of(MATMUL, 32, 8))
    _, changes = quantize(after)
    assert tiny.reasons(changes) == {"fc": "its weight is quantized already"}


def test_a_weight_with_nan() -> None:
    W = np.ones((8, 32), np.float32)
    W[1, 1] = np.nan
    with pytest.raises(QCompilerError, match="contains NaN"):
        quantize(model_of(GEMM, 32, 8, W))


def test_a_scale_for_the_whole_tensor_is_refused() -> None:
    with pytest.raises(SchemeError, match="set granularity to channel or group"):
        QuantizeWeights(format="binary", granularity="tensor")


@pytest.mark.parametrize("opset", [18, 21, 23, 25])
def test_saved_loaded_and_canonicalized(tmp_path: Path, opset: int) -> None:
    after, _ = quantize(model_of(MATMUL, 600, 500, opset=opset))
    expected = effective_weight(after)
    model_io.save(after, tmp_path / "out")
    loaded = model_io.load(tmp_path / "out")
    canonicalize(loaded)
    assert tiny.operators(loaded) == ["DequantizeBinary", "Transpose", "MatMul"]
    (site,) = find_sites(loaded).linears
    assert (site.in_features, site.out_features) == (600, 500)
    answer = session(loaded).run(None, {"x": np.eye(600, dtype=np.float32)[None]})[0][0]
    np.testing.assert_allclose(answer.T, expected, rtol=1e-6, atol=1e-7)


def test_bits_that_are_computed_when_they_are_written(tmp_path: Path) -> None:
    """More than a MiB of bits: they stay a function of the float constant until the file is written."""
    rng = np.random.default_rng(0)
    W = rng.normal(size=(4100, 2056)).astype(np.float32)
    after, _ = quantize(model_of(MATMUL, 4100, 2056, W))
    assert isinstance(after.graph.initializers["W.codes"].const_value, ir.LazyTensor)
    model_io.save(after, tmp_path / "out")
    assert sum(file.stat().st_size for file in (tmp_path / "out").iterdir()) < 1.05 * W.size / 8
    bits = tiny.data(model_io.load(tmp_path / "out"), "W.codes")
    np.testing.assert_array_equal(binary.unpacked_signs(bits, 4100), np.where(W.T < 0, -1, 1))


def test_segments_run_it() -> None:
    model = tiny.build(
        """g (float[M,16] x, float[16,16] V, float[16,16] W) => (float[M,16] z) {
        [first] y = MatMul(x, V)  h = Relu(y)  [second] z = MatMul(h, W) }""",
        V="normal", W="normal",
    )  # fmt: skip
    after, _ = quantize(model)
    sample, seen = tiny.feeds(model)[0], {}
    segments.run(after, [sample], ["z"], lambda name, _, array: seen.update({name: array}), memory_limit=2000)
    np.testing.assert_allclose(seen["z"], tiny.run(after, sample)[0], rtol=1e-5, atol=1e-6)
