"""nf4: codes and scales against a float64 oracle, in every layout; the function in ONNX Runtime and on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from passes.nf4 import Nf4, quantize_scales, restore_scales
from qcompiler.errors import QCompilerError
from qcompiler.formats.codebooks import CODEBOOKS, FP4_TABLE, NF4_TABLE
from qcompiler.functions.library import block_scales, codebook_format
from qcompiler.graph import files as model_io
from qcompiler.graph.session import session
from qcompiler.rewriting.contract import Changes
from qcompiler.sessions import segments
from qcompiler.sites.canonicalize import canonicalize
from qcompiler.sites.find import find_sites
from qcompiler.statistics import StatisticsStore
from tests import tiny
from tests.oracles import nf4 as oracle
from tests.there import held, there

MATMUL = "g (float[B,S,{K}] x, float[{K},{N}] W) => (float[B,S,{N}] y) {{ [fc] y = MatMul(x, W) }}"
GEMM = "g (float[M,{K}] x, float[{N},{K}] W) => (float[M,{N}] y) {{ [fc] y = Gemm<transB=1>(x, W) }}"
TURNED = "g (float[M,{K}] x, float[{N},{K}] W) => (float[M,{N}] y) {{ T = Transpose(W)  [fc] y = MatMul(x, T) }}"
TABLES = {"nf4": oracle.normal_float(), "fp4": oracle.FP4}


def quantize(model: ir.Model, **options: Any) -> tuple[ir.Model, Changes]:
    after = model.clone()
    (changes,) = tiny.compile(after, [Nf4(**options)], [])
    return after, changes


def effective_weight(model: ir.Model, optimized: bool = False) -> np.ndarray:
    """The matrix [N, K] that the only layer really multiplies by."""
    return tiny.multiplied(model, optimized=optimized).T


def test_the_tables() -> None:
    np.testing.assert_allclose(NF4_TABLE, TABLES["nf4"], atol=2e-7)
    np.testing.assert_allclose(FP4_TABLE, TABLES["fp4"], rtol=1e-7)


@pytest.mark.parametrize(("table", "quant_type"), [("fp4", 0), ("nf4", 1)])
def test_the_tables_are_those_of_onnxruntime(table: str, quant_type: int) -> None:
    """Row n of B is code n throughout, so that the answer to the first unit vector is the table."""
    codes = np.repeat(np.arange(16, dtype=np.uint8), 16)
    model = tiny.build(
        "g (float[M,16] x, uint8[128] B, float[16] s) => (float[M,16] y) { y = com.microsoft.MatMulBnb4"
        f"<K = 16, N = 16, block_size = 16, quant_type = {quant_type}>(x, B, s) }}",
        B=codes[0::2] << 4 | codes[1::2], s=np.ones(16, np.float32),
    )  # fmt: skip
    got = tiny.run(model, {"x": np.eye(16, dtype=np.float32)})[0][0]
    np.testing.assert_array_equal(got, {"nf4": NF4_TABLE, "fp4": FP4_TABLE}[table])


@pytest.mark.parametrize(("table", "double"), [("nf4", True), ("fp4", False)])
@pytest.mark.parametrize(("N", "K", "block"), [(6, 32, 16), (5, 24, 16), (7, 13, 16), (3, 5, 64), (40, 33, 2)])
@pytest.mark.parametrize("text", [MATMUL, GEMM, TURNED], ids=["matmul", "gemm", "turned"])
def test_linear(text: str, N: int, K: int, block: int, table: str, double: bool) -> None:
    model = tiny.build(text.format(K=K, N=N), W="normal")
    after, changes = quantize(model, table=table, block_size=block, double_quantization=double)
    assert [c.site for c in changes.changed] == ["fc"]
    assert not changes.skipped
    W = tiny.data(model, "W")
    expected = oracle.restored(W.T if text is MATMUL else W, TABLES[table], block, double)
    for optimized in (False, True):
        np.testing.assert_allclose(effective_weight(after, optimized), expected, rtol=1e-5, atol=1e-6)
    onnx.checker.check_model(ir.to_proto(after), full_check=True)

    (site,) = find_sites(after).linears
    assert (site.in_features, site.out_features, site.transposed) == (K, N, True)
    assert site.weight.dtype == ir.DataType.UINT4
    decoder = there(site.dequantize)
    codes = held(site.weight).astype(np.uint8).reshape(-1)
    entries = CODEBOOKS[there(codebook_format(decoder))].table[codes]
    decoded = entries * np.repeat(there(block_scales(decoder)), block)[: N * K]
    np.testing.assert_allclose(decoded.reshape(N, K), expected, rtol=1e-5, atol=1e-6)


@given(
    shape=st.tuples(st.integers(1, 12), st.integers(2, 40)),
    block=st.integers(1, 70),
    table=st.sampled_from(["nf4", "fp4"]),
    double=st.booleans(),
    magnitude=st.sampled_from([1e-6, 1.0, 1e4]),
    zeros=st.sampled_from([0.0, 0.5, 0.97, 1.0]),
    seed=st.integers(0, 100),
)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_size(
    shape: tuple[int, ...], block: int, table: str, double: bool, magnitude: float, zeros: bool, seed: int
) -> None:
    (N, K), rng = shape, np.random.default_rng(seed)
    W = (magnitude * rng.normal(size=shape) * (rng.random(shape) >= zeros)).astype(np.float32)
    after, _ = quantize(tiny.build(GEMM.format(K=K, N=N), W=W), table=table, block_size=block,
                        double_quantization=double)  # fmt: skip
    expected = oracle.restored(W, TABLES[table], block, double)
    # Between two entries that are equally near, float32 may choose the other one.
    got, error = effective_weight(after), np.abs(expected - W)
    assert (np.abs(got - W) <= error * (1 + 1e-4) + 1e-6 * magnitude).all()
    assert (got[W == 0] == 0).all()


def test_zero_blocks_stay_zero_when_their_scale_is_rounded() -> None:
    W = np.random.default_rng(0).normal(size=(8, 64)).astype(np.float32)
    W[3], W[5, 16:48] = 0, 1e-9
    after, _ = quantize(tiny.build(GEMM.format(K=64, N=8), W=W), block_size=16)
    got = effective_weight(after)
    assert (got[3] == 0).all()
    assert np.abs(got[5, 16:48]).max() < 1e-2


def test_scales_are_restored_above_zero_and_near() -> None:
    scales = np.abs(np.random.default_rng(0).normal(size=1000)).astype(np.float32)
    scales[::7] = 0
    codes, step, mean = quantize_scales(scales)
    assert (codes.dtype, codes.shape, step.shape) == (np.dtype(np.int8), (1000,), (4,))
    restored = restore_scales(codes, step, mean)
    assert (restored > 0).all()
    assert (np.abs(restored - scales) <= np.repeat(step, 256)[:1000] * 1.01).all()


def test_half_precision() -> None:
    model = tiny.build(GEMM.replace("float", "float16").format(K=20, N=6), W="normal")
    after, _ = quantize(model, block_size=16)
    expected = oracle.restored(tiny.data(model, "W").astype(np.float32), TABLES["nf4"], 16, True)
    got = effective_weight(after)
    assert got.dtype == np.float16
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-4)


def test_bits_a_weight() -> None:
    model = tiny.build(GEMM.format(K=512, N=64), W="normal")
    assert quantize(model)[1].changed[0].detail == "4.13 bits a weight, scales in 8 bits"
    assert quantize(model, double_quantization=False)[1].changed[0].detail == "4.50 bits a weight"


TIED = """g (int64[B,S] ids, float[12,16] E, float[16,16] W) => (float[B,S,12] logits) {
    [embed] x = Gather(E, ids)  [fc] h = MatMul(x, W)
    T = Transpose<perm=[1,0]>(E)  [lm_head] logits = MatMul(h, T) }"""


def test_a_tied_head_stays_float_unless_it_is_asked_for() -> None:
    model = tiny.build(TIED, E="normal", W="normal")
    after, changes = quantize(model)
    assert [c.site for c in changes.changed] == ["fc"]
    after, changes = quantize(model, layers=("head",), double_quantization=False)
    assert [c.site for c in changes.changed] == ["lm_head"]
    E, W = tiny.data(model, "E"), tiny.data(model, "W")
    expected = (E @ W) @ oracle.restored(E, TABLES["nf4"], 64, False).T
    logits = tiny.run(after, {"ids": np.arange(12)[None]})[0][0]
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


def test_a_weight_read_in_both_directions() -> None:
    model = tiny.build(
        """g (float[M,16] x, float[16,16] W) => (float[M,16] z) {
        [first] y = MatMul(x, W)  [second] h = Gemm<transB=1>(y, W)  [third] z = MatMul(h, W) }""",
        W="normal",
    )  # fmt: skip
    after, changes = quantize(model, block_size=32)
    assert [c.site for c in changes.changed] == ["first", "third", "second"]
    assert tiny.operators(after).count("DequantizeNF4") == 2
    W, x = tiny.data(model, "W"), tiny.feeds(model)[0]["x"]
    columns, rows = (oracle.restored(w, TABLES["nf4"], 32, True) for w in (W.T, W))
    np.testing.assert_allclose(tiny.run(after, {"x": x})[0], x @ columns.T @ rows.T @ columns.T, rtol=1e-3, atol=1e-3)


def test_module_paths_survive() -> None:
    text = 'g (float[M,32] x, float[32,8] "layers.0.up.weight") => (float[M,8] y) {y = MatMul(x, "layers.0.up.weight")}'
    model = tiny.build(text, **{"layers.0.up.weight": "normal"})
    after, _ = quantize(model)
    for each in (model, after):
        assert find_sites(each).linears[0].module_path == "layers.0.up"


def test_quantized_twice() -> None:
    after, _ = quantize(tiny.build(MATMUL.format(K=32, N=8), W="normal"))
    _, changes = quantize(after)
    assert tiny.reasons(changes) == {"fc": "its weight is quantized already"}


def test_a_weight_with_nan() -> None:
    W = np.ones((8, 32), np.float32)
    W[1, 1] = np.nan
    with pytest.raises(QCompilerError, match="fc contains NaN"):
        quantize(tiny.build(GEMM.format(K=32, N=8), W=W))


@pytest.mark.parametrize("opset", [18, 21, 23, 25])
def test_saved_loaded_and_canonicalized(tmp_path: Path, opset: int) -> None:
    """The function survives the disk, and canonicalizing leaves it be: the model is the same one and still runs."""
    model = tiny.build(MATMUL.format(K=600, N=500), opset=opset, W="normal")
    after, _ = quantize(model)
    expected = effective_weight(after)
    model_io.save(after, tmp_path / "out")
    loaded = model_io.load(tmp_path / "out")
    canonicalize(loaded)
    assert tiny.operators(loaded) == ["DequantizeLinear", "Add", "DequantizeNF4", "Transpose", "MatMul"]
    assert [function.opset_imports[""] for function in loaded.functions.values()] == [max(opset, 21)]
    (site,) = find_sites(loaded).linears
    assert site.dequantize is not None
    answer = session(loaded).run(None, {"x": np.eye(600, dtype=np.float32)[None]})[0][0]
    np.testing.assert_allclose(answer.T, expected, rtol=1e-6, atol=1e-7)


def test_segments_run_it() -> None:
    """Cut into pieces, each piece has the function, and codes count as the constants of the layer that reads them."""
    model = tiny.build(
        """g (float[M,16] x, float[16,16] V, float[16,16] W) => (float[M,16] z) {
        [first] y = MatMul(x, V)  h = Relu(y)  [second] z = MatMul(h, W) }""",
        V="normal", W="normal",
    )  # fmt: skip
    after, _ = quantize(model)
    sample, seen = tiny.feeds(model)[0], {}
    pieces = segments.plan(after.graph, ["z"], budget=500)
    assert [piece.outputs for piece in pieces] == [("h",), ("z",)]
    segments.run(after, [sample], ["z"], lambda name, _, array: seen.update({name: array}), memory_limit=2000)
    np.testing.assert_allclose(seen["z"], tiny.run(after, sample)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("double", [True, False])
def test_a_weight_in_slices_is_the_weight_in_one(monkeypatch: pytest.MonkeyPatch, double: bool) -> None:
    """Blocks of 16 run on from row to row of 24: a slice must not end within one."""
    model = tiny.build(GEMM.format(K=24, N=20), W="normal")
    expected = oracle.restored(tiny.data(model, "W"), TABLES["nf4"], 16, double)
    monkeypatch.setattr("qcompiler.formats.arithmetic._ELEMENTS_AT_ONCE", 3 * 24)
    after, _ = quantize(model, block_size=16, double_quantization=double)
    np.testing.assert_allclose(effective_weight(after), expected, rtol=1e-5, atol=1e-6)


def test_a_weight_of_a_type_that_nothing_is_restored_to_is_skipped() -> None:
    model = tiny.build(
        "g (float8e4m3fn[M,32] x, float8e4m3fn[32,6] W) => (float8e4m3fn[M,6] y) { [fc] y = MatMul(x, W) }", W="normal"
    )
    changes = Nf4().apply(model, StatisticsStore())
    assert tiny.reasons(changes) == {"fc": "its weight is FLOAT8E4M3FN, which is no type to restore it to"}
    assert tiny.operators(model) == ["MatMul"]
