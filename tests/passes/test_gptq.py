"""gptq: the solver against a float64 oracle that knows neither factors nor blocks; the pass in every layout."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import passes.gptq
from passes.gptq import Gptq
from qcompiler.calibration.calibrator import Calibrator
from qcompiler.calibration.samples import from_python
from qcompiler.driver import pipeline
from qcompiler.errors import DataError, SchemeError
from qcompiler.formats.scheme import PerChannel, PerGroup, PerTensor, Scheme
from qcompiler.formats.search import quantize_weight
from qcompiler.rewriting import gptq as gptq_solver
from qcompiler.rewriting.contract import Changes
from qcompiler.rewriting.gptq import CholeskyFactor, factorise, solve
from qcompiler.rewriting.staged import Unit, stages
from qcompiler.statistics import StatisticsStore
from tests import tiny
from tests.oracles import gptq as oracle
from tests.there import held, numpy_type, there

BOUNDS = {"int2": (-2, 1), "uint2": (0, 3), "int3": (-4, 3), "uint3": (0, 7), "int4": (-8, 7), "uint4": (0, 15),
          "int8": (-128, 127), "uint8": (0, 255)}  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny matrices gain nothing from a second thread, and wait for it on a busy machine."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def correlated(rows: int, K: int, seed: int = 0) -> np.ndarray:
    """Inputs that lie near a subspace, as those of a language model do."""
    rng = np.random.default_rng(seed)
    directions = rng.normal(size=(max(1, K // 8), K))
    inputs = rng.normal(size=(rows, len(directions))) @ directions / np.sqrt(len(directions))
    return np.asarray(inputs + 0.1 * rng.normal(size=(rows, K)), np.float32)


def hessian(X: np.ndarray) -> np.ndarray:
    return np.asarray(X.T @ X / len(X), np.float32)


def weights(N: int, K: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(N, K)).astype(np.float32)


def factor_of(H: np.ndarray, act_order: bool = False, damping: float = 0.01) -> CholeskyFactor:
    found = factorise(H, damping=damping, act_order=act_order)
    assert found is not None
    return found


def error(W: np.ndarray, rounded: np.ndarray, H: np.ndarray) -> float:
    """E‖(W - Ŵ) x‖² / E‖W x‖²."""
    D, W, H = rounded.astype(np.float64) - W, W.astype(np.float64), H.astype(np.float64)
    return float(np.sum((D @ H) * D) / np.sum((W @ H) * W))


def decibels(relative_error: float) -> float:
    return float(-10 * np.log10(relative_error))


# ---------------------------------------------------------------------------------------------------------- quality


@pytest.mark.parametrize("act_order", [False, True])
def test_as_good_as_the_paper_on_correlated_inputs(act_order: bool) -> None:
    """A factor that is read by column passes no error on, and gives round-to-nearest: 10 dB less."""
    W, H = weights(256, 512), hessian(correlated(2048, 512))
    scheme = Scheme("uint4", PerGroup(32), symmetric=False)
    ours = solve(W, factor_of(H, act_order), scheme, channel_axis=0).dequantize()
    theirs = oracle.gptq(W, H, BOUNDS["uint4"], group=32, act_order=act_order)
    nearest = quantize_weight(W, scheme, channel_axis=0).dequantize()
    assert abs(decibels(error(W, ours, H)) - decibels(error(W, theirs, H))) < 0.3
    assert decibels(error(W, ours, H)) > decibels(error(W, nearest, H)) + 8


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("act_order", [False, True])
def test_hardly_worse_than_nearest_on_independent_inputs(act_order: bool, symmetric: bool) -> None:
    """There is next to nothing to gain, and errors that are passed on make the ranges of later groups wider."""
    X = np.random.default_rng(3).normal(size=(8192, 256)).astype(np.float32)
    W, H = weights(128, 256), np.eye(256, dtype=np.float32)
    scheme = Scheme("uint4", PerGroup(32), symmetric)
    ours = solve(W, factor_of(hessian(X), act_order), scheme, channel_axis=0).dequantize()
    nearest = quantize_weight(W, scheme, channel_axis=0).dequantize()
    assert decibels(error(W, ours, H)) > decibels(error(W, nearest, H)) - 0.5


@pytest.mark.parametrize("act_order", [False, True])
def test_searched_ranges_are_better(act_order: bool) -> None:
    loud = np.exp(np.random.default_rng(5).normal(size=256)).astype(np.float32)
    W, H = weights(128, 256), hessian(correlated(1024, 256) * loud)
    scheme = Scheme("int3", PerGroup(64))
    found = {
        search: error(W, solve(W, factor_of(H, act_order), scheme, channel_axis=0, search=search).dequantize(), H)
        for search in ("minmax", "mse", "weighted")
    }
    assert found["mse"] < found["minmax"]
    assert found["weighted"] < 0.95 * found["mse"]


# -------------------------------------------------------------------------------------------------------- the solver


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    N=st.integers(1, 9), K=st.integers(1, 70), group=st.sampled_from([None, 1, 3, 16, 40, 100]),
    format=st.sampled_from(sorted(BOUNDS)), act_order=st.booleans(), block=st.sampled_from([4, 16, 128]),
    seed=st.integers(0, 3),
)  # fmt: skip
def test_agrees_with_the_paper(
    N: int, K: int, group: int | None, format: str, act_order: bool, block: int, seed: int
) -> None:
    """Weight by weight. A row in which float32 puts one weight beyond a boundary goes its own way from there."""
    W, H = weights(N, K, seed), hessian(correlated(4 * K, K, seed))
    before = W.copy()
    symmetric = format.endswith("8")  # with fewer bits the largest weight lies on the boundary of two codes
    scheme = Scheme(format, PerGroup(group) if group else PerChannel(), symmetric)
    found = solve(W, factor_of(H, act_order), scheme, channel_axis=0, block_columns=block)
    theirs = oracle.gptq(W, H, BOUNDS[format], symmetric=symmetric, group=group, act_order=act_order)
    assert found.codes.min() >= BOUNDS[format][0]
    assert found.codes.max() <= BOUNDS[format][1]
    same = np.isclose(found.dequantize(), theirs, rtol=1e-3, atol=1e-4).all(axis=1)
    assert np.sum(~same) <= max(1, N // 5)
    np.testing.assert_array_equal(W, before)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("group", [None, 20, 32, 200])
@pytest.mark.parametrize("format", ["int2", "uint3", "int4", "uint8"])
def test_symmetric_schemes_are_as_good_as_the_paper(format: str, group: int | None, act_order: bool) -> None:
    W, H = weights(96, 70), hessian(correlated(512, 70))
    scheme = Scheme(format, PerGroup(group) if group else PerChannel())
    ours = solve(W, factor_of(H, act_order), scheme, channel_axis=0, block_columns=48).dequantize()
    theirs = oracle.gptq(W, H, BOUNDS[format], symmetric=True, group=group, act_order=act_order)
    assert abs(decibels(error(W, ours, H)) - decibels(error(W, theirs, H))) < 0.3


def test_the_factor() -> None:
    """H⁻¹ = Uᵀ U in the order of the features, damping included; more than 256 columns are inverted in pieces."""
    H = hessian(correlated(2000, 600))
    damped = H.astype(np.float64) + 0.02 * np.mean(np.diag(H)) * np.eye(600)
    for act_order in (False, True):
        factor = factor_of(H, act_order, damping=0.02)
        U = factor.upper.double().numpy()
        order = np.arange(600) if factor.order is None else factor.order
        assert (np.tril(U, -1) == 0).all()
        np.testing.assert_allclose(U.T @ U @ damped[order][:, order], np.eye(600), atol=1e-3)
    assert (np.diff(np.diag(H)[order]) <= 0).all()


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(), PerGroup(24)])
@pytest.mark.parametrize("symmetric", [False, True])
def test_layouts_and_slices(
    granularity: PerChannel | PerGroup | PerTensor, symmetric: bool, act_order: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    W, factor = weights(200, 64), factor_of(hessian(correlated(256, 64)), act_order)
    scheme = Scheme("uint4", granularity, symmetric)
    rows = solve(W, factor, scheme, channel_axis=0, search="weighted")
    columns = solve(np.ascontiguousarray(W.T), factor, scheme, channel_axis=1, search="weighted")
    nearest = quantize_weight(W, scheme, channel_axis=0)
    for found, like in ((rows, nearest), (columns, quantize_weight(W.T, scheme, channel_axis=1))):
        assert (found.axis, found.block_size, found.format) == (like.axis, like.block_size, like.format)
        assert found.codes.dtype == like.codes.dtype
        assert found.codes.shape == like.codes.shape
        assert found.scale.shape == like.scale.shape
        assert found.zero_point is not None
        assert found.zero_point.shape == found.scale.shape
    np.testing.assert_array_equal(columns.dequantize().T, rows.dequantize())
    monkeypatch.setattr(gptq_solver, "SLICE_ELEMENTS", 1)  # 64 channels at once
    sliced = solve(W, factor, scheme, channel_axis=0, search="weighted").dequantize()
    assert (sliced == rows.dequantize()).mean() > 0.95
    assert np.isclose(error(W, sliced, np.eye(64)), error(W, rows.dequantize(), np.eye(64)), rtol=0.05)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_float_types(dtype: Any) -> None:
    """Scales have the type of the weight, and the codes are those for the scales as stored."""
    W, H = weights(16, 64).astype(dtype), hessian(correlated(256, 64))
    scheme = Scheme("int4", PerGroup(16))
    found = solve(W, factor_of(H), scheme, channel_axis=0, scale_dtype=W.dtype)
    assert found.scale.dtype == W.dtype
    nearest = quantize_weight(W, scheme, channel_axis=0, scale_dtype=W.dtype).dequantize()
    assert error(W.astype(np.float32), found.dequantize(), H) < 0.5 * error(W.astype(np.float32), nearest, H)


@pytest.mark.parametrize("act_order", [False, True])
def test_silent_inputs_are_rounded_to_nearest_and_change_nothing_else(act_order: bool) -> None:
    X, dead = correlated(256, 48), np.array([0, 5, 6, 20, 47])
    X[:, dead] = 0
    W, alive = weights(8, 48), np.setdiff1d(np.arange(48), dead)
    scheme = Scheme("uint4", PerGroup(1), symmetric=False)
    found = solve(W, factor_of(hessian(X), act_order), scheme, channel_axis=0).dequantize()
    nearest = quantize_weight(W, scheme, channel_axis=0).dequantize()
    np.testing.assert_array_equal(found[:, dead], nearest[:, dead])
    others = solve(W[:, alive], factor_of(hessian(X[:, alive]), act_order), scheme, channel_axis=0).dequantize()
    np.testing.assert_allclose(found[:, alive], others, rtol=1e-3, atol=1e-4)


def test_inputs_that_are_all_silent() -> None:
    W, scheme = weights(4, 8), Scheme("int4", PerGroup(4))
    found = solve(W, factor_of(np.zeros((8, 8), np.float32)), scheme, channel_axis=0)
    np.testing.assert_array_equal(found.codes, quantize_weight(W, scheme, channel_axis=0).codes)


def test_a_singular_hessian_is_damped_more() -> None:
    X = correlated(4, 32)  # 4 rows: rank 4 of 32
    factor = factorise(hessian(X), damping=0.0, act_order=False)
    assert factor is not None
    assert factor.damping > 0
    assert bool(factor.upper.isfinite().all())
    assert factor_of(hessian(X)).damping == 0.01


def test_a_hessian_without_a_factor() -> None:
    H = hessian(correlated(64, 8))
    assert factorise(-H + 0.5 * np.diag(np.diag(H)) * 3, damping=1e-9, act_order=False) is None
    H[2, 3] = H[3, 2] = np.inf
    assert factorise(H, damping=0.01, act_order=False) is None


def test_a_weight_that_is_not_finite() -> None:
    W = weights(4, 8)
    W[1, 2] = np.nan
    with pytest.raises(DataError, match="fc contains NaN"):
        solve(W, factor_of(np.eye(8, dtype=np.float32)), Scheme("int4", PerGroup(4)), channel_axis=0, name="fc")


# ---------------------------------------------------------------------------------------------------------- the pass

MATMUL = "g (float[B,S,16] x, float[16,6] W) => (float[B,S,6] y) { [fc] y = MatMul(x, W) }"
HALF = "g (float16[B,S,16] x, float16[16,6] W) => (float16[B,S,6] y) { [fc] y = MatMul(x, W) }"
GEMM = "g (float[M,16] x, float[6,16] W, float[6] b) => (float[M,6] y) { [fc] y = Gemm<transB=1>(x, W, b) }"
TURNED = """g (float[M,16] x, float[6,16] W) => (float[M,6] y) {
    T = Transpose<perm=[1,0]>(W)  [fc] y = MatMul(x, T) }"""


def inputs(model: ir.Model, count: int = 4) -> list[dict[str, np.ndarray]]:
    """Correlated rows for the graph's only input, in its shape."""
    (value,) = model.graph.inputs
    *lead, width = tiny.sizes(value)
    rows = correlated(count * int(np.prod(lead)), width).astype(numpy_type(value))
    return [{there(value.name): part} for part in rows.reshape(count, *lead, -1)]


def compiled(text: str, samples: int = 4, **options: Any) -> tuple[ir.Model, ir.Model, Changes]:
    model = tiny.build(text, W="normal", **({"b": "zeros"} if text is GEMM else {}))
    after = model.clone()
    (changes,) = tiny.compile(after, [Gptq(**options)], inputs(model, samples))
    return model, after, changes


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize(("granularity", "size"), [("tensor", None), ("channel", None), ("group", 5)])
@pytest.mark.parametrize("text", [MATMUL, HALF, GEMM, TURNED], ids=["matmul", "half", "gemm", "turned"])
def test_layouts_of_a_layer(text: str, granularity: str, size: int | None, act_order: bool) -> None:
    options: dict[str, Any] = {"granularity": granularity, "group_size": size, "act_order": act_order}
    model, after, changes = compiled(text, **options)
    assert not changes.skipped
    (changed,) = changes.changed
    assert changed.site == "fc"
    assert "W" not in after.graph.initializers
    W = tiny.data(model, "W").astype(np.float32)
    W = W.T if text in (MATMUL, HALF) else W
    X = np.concatenate([sample["x"].reshape(-1, 16) for sample in inputs(model)]).astype(np.float32)
    expected = oracle.gptq(W, hessian(X), BOUNDS["int4"], symmetric=True, group=16 if size is None else size,
                           act_order=act_order)  # fmt: skip
    got = tiny.multiplied(after).T
    nearest = quantize_weight(W, Gptq(**options).scheme(), channel_axis=0).dequantize()
    assert error(W, got, hessian(X)) < 0.8 * error(W, nearest, hessian(X))
    if granularity != "tensor" and text is not HALF:
        assert error(W, got, hessian(X)) <= 1.05 * error(W, expected, hessian(X))
    if text is not HALF:
        assert f"output error {error(W, got, hessian(X)):.3g}, round-to-nearest" in changed.detail
        assert changed.detail.endswith(f"{error(W, nearest, hessian(X)):.3g}")


SHARED = """g (float[M,16] x, float[16,6] W, float[16,8] V, float[8,6] U) => (float[M,6] y, float[M,6] z) {
    [a] y = MatMul(x, W)  [b] v = MatMul(x, V)  h = Relu(v)  [c] z = MatMul(h, U) }"""


def test_layers_that_read_one_value_share_the_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def counted(H: np.ndarray, **options: Any) -> CholeskyFactor | None:
        made.append(len(H))
        return factorise(H, **options)

    monkeypatch.setattr(passes.gptq, "factorise", counted)
    model = tiny.build(SHARED, W="normal", V="normal", U="normal")
    (changes,) = tiny.compile(model, [Gptq(group_size=8)], inputs(model))
    assert made == [16, 8]
    assert [changed.site for changed in changes.changed] == ["a", "b", "c"]


def test_a_constant_that_meets_two_values() -> None:
    """It is rounded once, for the rows of both."""
    model = tiny.build(
        """g (float[M,16] x, float[16,16] W) => (float[M,16] z) {
        [a] y = MatMul(x, W)  h = Tanh(y)  [b] z = MatMul(h, W) }""",
        W="normal",
    )
    W, samples = tiny.data(model, "W").T, inputs(model)
    X = np.concatenate([sample["x"] for sample in samples])
    both = np.concatenate([X, np.tanh(X @ W.T)])
    expected = solve(W, factor_of(hessian(both)), Scheme("int4", PerGroup(8)), channel_axis=0)
    after = model.clone()
    tiny.compile(after, [Gptq(group_size=8)], samples)
    (codes,) = [held(value) for name, value in after.graph.initializers.items() if name.endswith("codes")]
    assert (expected.codes == np.asarray(codes, np.int8).T).mean() > 0.95
    assert len(Gptq().units(model, Changes())) == 1


def test_a_layer_whose_hessian_has_no_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes.gptq, "factorise", lambda H, **options: None)
    model, after, changes = compiled(MATMUL, group_size=8, search="weighted")
    assert "rounded to nearest: the Hessian is singular" in changes.changed[0].detail
    W = tiny.data(model, "W")
    nearest = quantize_weight(W, Scheme("int4", PerGroup(8)), channel_axis=1, search="mse").dequantize()
    np.testing.assert_allclose(tiny.multiplied(after), nearest, rtol=1e-5, atol=1e-6)


def test_the_report_says_when_the_damping_was_raised() -> None:
    _, _, changes = compiled(GEMM, samples=1, group_size=8, damping=0.0)  # 7 rows of 16 numbers
    assert "damping raised to" in changes.changed[0].detail


def test_nothing_is_rounded_without_statistics() -> None:
    model = tiny.build(MATMUL, W="normal")
    with pytest.raises(DataError, match="calibrate"):
        Gptq().apply(model, StatisticsStore())


def test_embeddings_and_convolutions_are_left_alone() -> None:
    model = tiny.build(
        """g (int64[B,S] ids, float[4,16] E, float[16,6] W) => (float[B,S,6] y) {
        [embed] x = Gather(E, ids)  [fc] y = MatMul(x, W) }""",
        E="normal", W="normal",
    )  # fmt: skip
    (changes,) = tiny.compile(model, [Gptq(group_size=8)], tiny.feeds(model))
    assert [changed.site for changed in changes.changed] == ["fc"]
    assert [tap.value for tap in Gptq().taps(tiny.build(MATMUL, W="normal"))] == ["x"]


@pytest.mark.parametrize("format", ["fp8_e4m3", "nf4", "binary"])
def test_only_integers(format: str) -> None:
    with pytest.raises(SchemeError):
        Gptq(format=format)


# ------------------------------------------------------------------------------------------------------------ stages

BLOCKS = """g (float[M,16] x, float[16,16] A, float[16,16] B, float[16,16] C, float[16,16] D, float[16,16] E,
           float[16,16] F, float[16,16] G) => (float[M,16] y, float[M,16] w) {
    [in_proj] a = MatMul(x, A)
    ["/model/layers.0/q/MatMul"] q = MatMul(a, B)
    ["/model/layers.0/k/MatMul"] k = MatMul(a, C)
    s = Add(q, k)
    ["/model/layers.0/o/MatMul"] o = MatMul(s, D)
    ["/model/layers.1/q/MatMul"] p = MatMul(o, E)
    [head] y = MatMul(p, F)
    t = Tanh(y)
    [other] v = MatMul(t, G)
    [also] u = MatMul(p, G)
    w = Add(u, v) }"""
CONSTANTS = dict.fromkeys("ABCDEFG", "normal")
FIRST = {"/model/layers.0/q/MatMul", "/model/layers.0/k/MatMul", "/model/layers.0/o/MatMul"}
SECOND = {"/model/layers.1/q/MatMul"}


def units_of(text: str, **options: Any) -> list[Unit]:
    model = tiny.build(text, **{name: how for name, how in CONSTANTS.items() if f"] {name}" in text})
    return list(Gptq(group_size=8, **options).units(model, Changes()))


def stages_of(text: str, **options: Any) -> list[set[str]]:
    """The layers of each stage."""
    return [
        {linear.name for unit in stage for found in unit.work for linear in found.linears}
        for stage in stages(units_of(text, **options))
    ]


def test_one_stage_for_each_block_and_for_each_value_outside() -> None:
    separate = BLOCKS.replace("MatMul(p, G)", "MatMul(p, F)")
    assert stages_of(separate) == [{"in_proj"}, FIRST, SECOND, {"head", "also"}, {"other"}]
    without = stages_of(separate, ignore=("head", "*.k"))
    assert without == [{"in_proj"}, FIRST - {"/model/layers.0/k/MatMul"}, SECOND, {"other"}, {"also"}]


def test_layers_that_share_a_constant_are_in_one_stage() -> None:
    assert stages_of(BLOCKS) == [{"in_proj"}, FIRST, SECOND, {"head", "also", "other"}]
    tied = BLOCKS.replace("MatMul(o, E)", "MatMul(o, B)").replace(", float[16,16] E", "")
    assert stages_of(tied) == [{"in_proj"}, FIRST | SECOND, {"head", "also", "other"}]


def test_a_unit_is_what_one_hessian_serves() -> None:
    names = [[str(found.value.name) for found in unit.work] for unit in units_of(BLOCKS)]
    assert names == [["A"], ["B", "C"], ["D"], ["E"], ["F"], ["G"]]
    assert [tap.value for tap in units_of(BLOCKS)[-1].taps] == ["t", "p"]  # G meets two values


@pytest.mark.parametrize(("sequential", "measured"), [(True, "in turn"), (False, "at once")])
def test_how_it_is_measured(sequential: bool, measured: str) -> None:
    assert Gptq(sequential=sequential).measured == measured


def test_stages_together_do_what_the_pass_does() -> None:
    """All layers, each once, and a reason for each that none of them takes."""
    text = """g (float[M,16] x, float[16,16] A, float[1,16,16] B, float[16,6] C) => (float[M,6] y) {
        [fc] a = MatMul(x, A)  [batched] b = Einsum<equation="mi,bij->mj">(a, B)  [last] y = MatMul(b, C) }"""
    model = tiny.build(text, A="normal", B="normal", C="normal")
    store, samples = StatisticsStore(), inputs(model)
    (run,) = pipeline.run(model, [Gptq(group_size=8)], store, Calibrator(from_python(samples, model=model)))
    assert [changed.site for changed in run.changes.changed] == ["fc", "last"]
    assert list(tiny.reasons(run.changes)) == ["batched"]
    assert not len(store)
