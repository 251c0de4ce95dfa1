"""split-outliers: the function stays, the columns are the paper's, and int8 on what is left errs as the oracle says."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import qcompiler
from models.export import CHECKPOINT, model_path
from passes.lower_dynamic_int8 import LowerDynamicInt8
from passes.quantize_activations import QuantizeActivations
from passes.quantize_weights import QuantizeWeights
from passes.smooth_quant import SmoothQuant
from passes.split_outliers import SplitOutliers
from qcompiler.errors import QCompilerError
from qcompiler.graph.metadata import PART_OF
from qcompiler.rewriting.contract import Changes
from qcompiler.sessions import segments
from qcompiler.sites.find import find_sites
from qcompiler.statistics import StatisticsStore
from tests import tiny
from tests.oracles import llm_int8 as oracle
from tests.there import there

PLAIN = """g (float[SHAPE8] x, float[8,6] W, float[8,4] V, float[6] b) => (float[SHAPE6] y, float[SHAPE4] z) {
    [q_proj] h = MatMul(x, W)  y = Add(h, b)  [k_proj] z = MatMul(x, V) }"""
GEMM = """g (float[M,8] x, float[6,8] W, float[6] b, float[8,4] V) => (float[M,6] y, float[M,4] z) {
    [q_proj] y = Gemm<transB=1>(x, W, b)  [k_proj] z = Gemm(x, V) }"""
TRANSPOSED = """g (float[B,S,8] x, float[6,8] W) => (float[B,S,6] y) {
    T = Transpose<perm=[1,0]>(W)  [fc] y = MatMul(x, T) }"""
FUSED = """g (float[B,S,8] x, float[6,8] W) => (float[B,S,6] y) {
    [fc] y = com.microsoft.FusedMatMul<transB=1>(x, W) }"""
TIED = """g (int64[B,S] ids, float[12,8] E, float[8] g) => (float[B,S,12] logits) {
    x = Gather(E, ids)  n = RMSNormalization<axis=-1>(x, g)  T = Transpose<perm=[1,0]>(E)
    [lm_head] logits = MatMul(n, T) }"""
CODES = "g (float[B,S,8] x, float[8,6] W) => (float[B,S,6] y) { [fc] y = MatMul(x, W) }"

LOUD = [2, 5]
INT8 = [QuantizeWeights(), QuantizeActivations(granularity="token")]


def plain(rank: int, **constants: Any) -> ir.Model:
    shape = {1: "", 2: "M,", 3: "B,S,", 4: "B,S,3,"}[rank]
    return tiny.build(PLAIN.replace("SHAPE", shape), W="normal", V="normal", b="normal", **constants)


def loud_feeds(model: ir.Model, columns: list[int] = LOUD, **options: int) -> list[dict[str, np.ndarray]]:
    """Normal numbers, with some columns of float inputs 30 times as loud."""
    samples = tiny.feeds(model, **options)
    for sample in samples:
        for array in sample.values():
            if array.dtype.kind == "f":
                np.clip(array, -3, 3, out=array)
                array[..., columns] = 30 * (array[..., columns] + np.copysign(1, array[..., columns]))
    return samples


def split(
    model: ir.Model, samples: list[dict[str, np.ndarray]], *, tolerance: float = 2e-6, **options: Any
) -> tuple[ir.Model, Changes]:
    """The split model, after a check that it computes what the original does and that nothing was rescaled."""
    after = model.clone()
    (changes,) = tiny.compile(after, [SplitOutliers(**options)], samples)
    assert not changes.rescaled
    assert [value.name for value in after.graph.outputs] == [value.name for value in model.graph.outputs]
    for sample in samples:
        for got, expected in zip(tiny.run(after, sample), tiny.run(model, sample), strict=True):
            assert got.dtype == expected.dtype
            assert tiny.relative_error(got, expected) < tolerance
    return after, changes


def columns_of(model: ir.Model, value: str = "x") -> list[int]:
    name = f"{value}.outlier_columns"
    return tiny.data(model, name).tolist() if name in model.graph.initializers else []


def details(changes: Changes) -> dict[str, str]:
    return {changed.site: changed.detail for changed in changes.changed}


def rows(samples: list[dict[str, np.ndarray]], name: str = "x") -> np.ndarray:
    return np.concatenate([sample[name].reshape(-1, sample[name].shape[-1]) for sample in samples])


# ----------------------------------------------------------------------------------------------- the function is kept


@pytest.mark.parametrize("rank", [1, 2, 3, 4])
def test_layers_that_read_one_value_share_its_split(rank: int) -> None:
    model = plain(rank)
    after, changes = split(model, loud_feeds(model), max_share=1.0)
    assert not changes.skipped
    assert columns_of(after) == LOUD
    operators = tiny.operators(after)
    assert operators.count("Gather") == operators.count("Mul") == 1
    assert operators.count("MatMul") == 4
    assert all("2 of 8 columns (25.0%: 2, 5) in float" in detail for detail in details(changes).values())


def test_layers_that_read_one_another() -> None:
    text = (
        "g (float[M,8] x, float[8,6] W, float[6,4] V) => (float[M,4] z) { [a] y = MatMul(x, W)  [b] z = MatMul(y, V) }"
    )
    model = tiny.build(text, W="normal", V="normal")
    after, changes = split(model, loud_feeds(model), max_share=1.0, top=2)
    assert columns_of(after) == LOUD
    assert len(columns_of(after, "y")) == 2
    assert details(changes).keys() == {"a", "b"}


def test_rows_of_the_weight_go_to_where_their_column_goes() -> None:
    model = plain(3)
    after, _ = split(model, loud_feeds(model), max_share=1.0)
    W, kept, taken = tiny.data(model, "W"), tiny.data(after, "W"), tiny.data(after, "W.outliers")
    assert not kept[LOUD].any()
    np.testing.assert_array_equal(np.delete(kept, LOUD, 0), np.delete(W, LOUD, 0))
    np.testing.assert_array_equal(taken, W[LOUD])


@pytest.mark.parametrize("text", [GEMM, TRANSPOSED, FUSED], ids=["gemm", "transposed", "fused"])
def test_layouts(text: str) -> None:
    constants = {name: "normal" for name in ("W", "V", "b") if f" {name}" in text.split("=>")[0]}
    model = tiny.build(text, **constants)
    after, changes = split(model, loud_feeds(model), max_share=1.0)
    assert not changes.skipped
    np.testing.assert_array_equal(tiny.data(after, "W.outliers"), tiny.data(model, "W")[:, LOUD].T)
    assert not tiny.data(after, "W")[:, LOUD].any()


def test_the_layer_stays_one_site_with_its_name_and_bias() -> None:
    model = plain(3)
    before = {site.name: site for site in find_sites(model).linears}
    after, _ = split(model, loud_feeds(model), max_share=1.0)
    sites = {site.name: site for site in find_sites(after).linears}
    assert sites.keys() == before.keys()
    for name, site in sites.items():
        assert (site.module_path, site.in_features, site.out_features) == (name, 8, before[name].out_features)
        assert (site.bias is None) == (before[name].bias is None)
        assert site.input.name == "x.rest"
    parts = [node.metadata_props[PART_OF] for node in after.graph if PART_OF in node.metadata_props]
    assert parts == list(sites)


def test_large_weights_are_computed_when_they_are_written() -> None:
    model = tiny.build("g (float[M,600] x, float[600,500] W) => (float[M,500] y) { [fc] y = MatMul(x, W) }", W="normal")
    after, _ = split(model, loud_feeds(model, list(range(550))), tolerance=1e-5, max_share=1.0)
    for name, rows_left in (("W", 50), ("W.outliers", 550)):
        tensor = after.graph.initializers[name].const_value
        assert isinstance(tensor, ir.LazyTensor)
        assert np.count_nonzero(tensor.numpy().any(axis=1)) == rows_left


@settings(max_examples=40, deadline=None)
@given(
    inputs=st.integers(2, 23), outputs=st.integers(1, 9), rank=st.integers(2, 4), threshold=st.floats(0.1, 60.0),
    max_share=st.floats(0.01, 1.0), loud=st.integers(0, 3), seed=st.integers(0, 9),
)  # fmt: skip
def test_any_shape_any_columns(
    inputs: int, outputs: int, rank: int, threshold: float, max_share: float, loud: int, seed: int
) -> None:
    shape = ",".join(["M", "B", "3"][: rank - 1])
    model = tiny.build(
        f"g (float[{shape},{inputs}] x, float[{inputs},{outputs}] W) => (float[{shape},{outputs}] y) "
        "{ [fc] y = MatMul(x, W) }",
        W=np.random.default_rng(seed).normal(size=(inputs, outputs)).astype(np.float32),
    )
    samples = loud_feeds(model, sorted({7 * i % inputs for i in range(loud)}), seed=seed)
    after, changes = split(model, samples, tolerance=1e-5, threshold=threshold, max_share=max_share)
    found, passing = columns_of(after), oracle.outlier_columns(rows(samples), threshold)
    most = max(1, int(max_share * inputs))
    assert len(found) == min(most, len(passing))
    assert set(found) <= set(passing)
    if found:
        peaks = np.abs(rows(samples)).max(axis=0)
        assert peaks[found].min() >= np.delete(peaks, found).max(initial=0.0)
    assert ("max_share" in details(changes)["fc"]) == (len(passing) > most)


def test_without_outliers_the_layer_is_left_as_it_is() -> None:
    model = plain(3)
    after, changes = split(model, loud_feeds(model, []))
    assert not changes.skipped
    assert tiny.operators(after) == tiny.operators(model)
    assert all("left as it is: no column reaches 6" in detail for detail in details(changes).values())


def test_the_threshold_is_reached_by_what_equals_it() -> None:
    model = plain(3)
    samples = loud_feeds(model, [])
    samples[1]["x"][0, 2, :3] = 6.0, -6.0, 5.999
    after, _ = split(model, samples, max_share=1.0)
    assert columns_of(after) == [0, 1]


def test_all_columns_can_be_outliers() -> None:
    model = plain(3)
    samples = loud_feeds(model, list(range(8)))
    after, _ = split(model, samples, max_share=1.0)
    assert columns_of(after) == list(range(8))
    assert not tiny.data(after, "W").any()
    tiny.compile(after, INT8, samples)  # nothing but zeros to round
    assert tiny.relative_error(tiny.run(after, samples[0])[0], tiny.run(model, samples[0])[0]) < 2e-6


def test_more_columns_than_max_share_are_cut_and_the_report_says_so() -> None:
    model = plain(3)
    samples = loud_feeds(model, [1, 3, 4, 6])
    peaks = np.abs(rows(samples)).max(axis=0)
    after, changes = split(model, samples, max_share=0.25)
    assert columns_of(after) == sorted(np.argsort(-peaks)[:2].tolist())
    assert "(4 columns reach 6: the loudest by max_share 0.25)" in details(changes)["q_proj"]


def test_top_takes_the_loudest_whatever_their_magnitude() -> None:
    model = plain(3)
    samples = loud_feeds(model, [])
    peaks = np.abs(rows(samples)).max(axis=0)
    after, _ = split(model, samples, top=3)
    assert columns_of(after) == sorted(np.argsort(-peaks)[:3].tolist())
    after, _ = split(model, samples, top=100)
    assert columns_of(after) == list(range(8))


def test_a_long_list_is_cut_in_the_report() -> None:
    model = tiny.build("g (float[M,40] x, float[40,3] W) => (float[M,3] y) { [fc] y = MatMul(x, W) }", W="normal")
    _, changes = split(model, loud_feeds(model, list(range(0, 40, 2))), max_share=0.5)
    assert "20 of 40 columns (50.0%: 0, 2, 4, 6, 8, 10, 12, 14, …)" in details(changes)["fc"]


@pytest.mark.parametrize("rank", [2, 3])
def test_half_precision(rank: int) -> None:
    text = PLAIN.replace("float[", "float16[").replace("SHAPE", {2: "M,", 3: "B,S,"}[rank])
    model = tiny.build(text, W="normal", V="normal", b="normal")
    after, changes = split(model, loud_feeds(model), tolerance=2e-3, max_share=1.0)
    assert columns_of(after) == LOUD
    assert not changes.skipped
    floats = [value for value in after.graph.initializers.values() if there(value.dtype).is_floating_point()]
    assert {value.dtype for value in floats} == {ir.DataType.FLOAT16}


def test_bfloat16_constants() -> None:
    """ONNX Runtime's CPU provider does not multiply bfloat16, so the constants are looked at."""
    model = tiny.build(CODES.replace("float[", "bfloat16["), W="normal")
    step = SplitOutliers(max_share=1.0)
    store = StatisticsStore()
    (tap,) = step.taps(model)
    statistic = tap.statistic.fresh()
    statistic.update(rows(loud_feeds(tiny.build(CODES, W="normal"))))
    store.put(tap.value, statistic)
    W = tiny.data(model, "W").copy()
    step.apply(model, store)
    tiny.check(model)
    assert tiny.data(model, "x.outlier_mask").tolist() == [1, 1, 0, 1, 1, 0, 1, 1]
    np.testing.assert_array_equal(tiny.data(model, "W.outliers"), W[LOUD])
    assert tiny.data(model, "W").dtype == W.dtype


# ------------------------------------------------------------------------------------------------ what is not split


def test_a_tied_weight_stays_as_it_is_and_stored_once() -> None:
    model = tiny.build(TIED, opset=23, E="normal", g="outliers")
    samples = tiny.feeds(model)
    after, changes = split(model, samples, max_share=1.0)
    assert not changes.skipped
    np.testing.assert_array_equal(tiny.data(after, "E"), tiny.data(model, "E"))
    columns = columns_of(after, "n")
    np.testing.assert_array_equal(tiny.data(after, "E.outliers"), tiny.data(model, "E")[:, columns].T)
    assert find_sites(after).embeddings[0].table is find_sites(after).linears[0].weight


def test_excluded_layers_read_the_value_as_it_is() -> None:
    model = plain(3)
    after, changes = split(model, loud_feeds(model), max_share=1.0, ignore=("k_proj",))
    assert list(details(changes)) == ["q_proj"]
    inputs = {site.name: site.input.name for site in find_sites(after).linears}
    assert inputs == {"q_proj": "x.rest", "k_proj": "x"}


@pytest.mark.parametrize("dynamic", [False, True])
def test_the_order_of_the_passes_is_told(dynamic: bool) -> None:
    model = plain(3)
    samples = loud_feeds(model)
    if not dynamic:
        tiny.compile(model, [QuantizeWeights()], samples)
    (changes,) = tiny.compile(model, [SplitOutliers(dynamic=dynamic)], samples)
    told = "comes after quantize-weights" if dynamic else "comes before the passes that quantize weights"
    assert set(tiny.reasons(changes)) == {"q_proj", "k_proj"}
    assert all(told in reason for reason in tiny.reasons(changes).values())


@pytest.mark.parametrize(
    "options", [{"threshold": 0}, {"threshold": float("nan")}, {"top": 0}, {"max_share": 0}, {"max_share": 1.5},
                {"top": 3, "dynamic": True}],
)  # fmt: skip
def test_options_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises((QCompilerError, ValueError)):
        SplitOutliers(**options)


# ---------------------------------------------------------------------------------------- what later passes make of it


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("loud", [[], [3], [3, 10, 40]])
def test_int8_errs_as_equation_8_does(loud: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    W = rng.normal(size=(64, 48)).astype(np.float32)
    model = tiny.build("g (float[M,64] x, float[64,48] W) => (float[M,48] y) { [fc] y = MatMul(x, W) }", W=W)
    samples = loud_feeds(model, loud, seed=seed, count=6)
    X = rows(samples)
    exact, expected = X.astype(np.float64) @ W, oracle.product(X, W, 6.0)
    tiny.compile(model, [SplitOutliers(max_share=1.0), *INT8], samples)
    assert columns_of(model) == loud
    got = rows([{"x": tiny.run(model, sample)[0]} for sample in samples])
    noise = oracle.predicted_error(X, W, 6.0)
    assert np.sum((got - expected) ** 2) < 0.02 * noise  # a few codes fall on the other side of a half
    assert 0.8 * noise < np.sum((got - exact) ** 2) < 1.25 * noise
    if loud:
        assert np.sum((oracle.vector_wise(X, W) - exact) ** 2) > 20 * noise


@pytest.mark.parametrize("loud", [[], LOUD])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("text", [PLAIN.replace("SHAPE", "B,S,"), GEMM], ids=["matmul", "gemm"])
def test_the_rest_runs_on_the_integer_kernel(text: str, dynamic: bool, loud: list[int]) -> None:
    model = tiny.build(text, W="normal", V="normal", b="normal")
    samples = loud_feeds(model, loud)
    step = SplitOutliers(max_share=1.0, dynamic=dynamic)
    weights = QuantizeWeights(saturation_safe=True)
    tiny.compile(model, [weights, step, INT8[1]] if dynamic else [step, weights, INT8[1]], samples)
    lowered = model.clone()
    (changes,) = tiny.compile(lowered, [LowerDynamicInt8()], samples)
    assert not changes.skipped
    assert {changed.site for changed in changes.changed} == {"q_proj", "k_proj"}
    assert tiny.operators(lowered).count("MatMul") == (2 if loud or dynamic else 0)
    for got, expected in zip(tiny.run(lowered, samples[0], optimized=True), tiny.run(model, samples[0]), strict=True):
        assert tiny.relative_error(got, expected) < 1e-5


def test_the_recipe_finds_the_planted_columns_and_is_near_the_float_model() -> None:
    kl = {}
    for recipe in ("llm-int8", "int8-dynamic"):
        report = qcompiler.compile(
            model_path("dynamo-outliers"), recipe, target="portable", calibration=str(CHECKPOINT / "calibration.txt"),
            tokenizer=CHECKPOINT / "tokenizer.json", samples=8, sequence_length=64,
        ).report  # fmt: skip
        kl[recipe] = report.outputs["logits"]["kl"]
        assert {site.status for site in report.sites} == {"quantized"}
        if recipe == "llm-int8":
            found = {site.module_path: site.details["split-outliers"] for site in report.sites if site.op != "Gather"}
            for layer in (0, 2, 3):  # nothing in layer 1 is loud enough
                assert "in float" in found[f"model.layers.{layer}.mlp.gate_proj"]
    assert kl["llm-int8"] < 0.003
    assert kl["llm-int8"] < 0.1 * kl["int8-dynamic"]


def test_later_exact_passes_keep_the_function_too() -> None:
    model = tiny.build(
        """g (float[B,S,8] x, float[8] g, float[8,6] W, float[8,4] V) => (float[B,S,6] y, float[B,S,4] z) {
        n = RMSNormalization<axis=-1>(x, g)  [q] y = MatMul(n, W)  [k] z = MatMul(n, V) }""",
        opset=23, g="outliers", W="normal", V="normal",
    )  # fmt: skip
    samples = tiny.feeds(model)
    after = model.clone()
    split_changes, smooth_changes = tiny.compile(
        after, [SplitOutliers(max_share=0.25), SmoothQuant(alpha=0.5)], samples
    )
    assert "in float" in details(split_changes)["q"]
    assert not smooth_changes.skipped
    for sample in samples:
        for got, expected in zip(tiny.run(after, sample), tiny.run(model, sample), strict=True):
            assert tiny.relative_error(got, expected) < 5e-6


def test_segments_are_cut_between_split_layers() -> None:
    """Calibration of a split model within a memory limit: cuts stay narrow, and the numbers are the same."""
    size, layers = 32, 5
    lines = [f"t_{i} = MatMul(h_{i}, W_{i})  a_{i} = Relu(t_{i})  h_{i + 1} = Add(a_{i}, h_{i})" for i in range(layers)]
    weights = [f"float[{size},{size}] W_{i}" for i in range(layers)]
    model = tiny.build(
        f"g (float[M,{size}] x, {', '.join(weights)}) => (float[M,{size}] h_{layers}) "
        f"{{ h_0 = Identity(x) {' '.join(lines)} }}",
        **{f"W_{i}": "normal" for i in range(layers)},
    )
    (changes,) = tiny.compile(model, [SplitOutliers(top=2)], loud_feeds(model))
    assert len(changes.changed) == layers
    budget = 2 * 3 * 4 * (size + 4) * size
    pieces = segments.plan(model.graph, [f"h_{layers}"], budget)
    assert len(pieces) >= 3
    assert max(len(piece.kept) for piece in pieces) == 1
    rests = [there(site.input.name) for site in find_sites(model).linears]

    def collected(limit: int | None) -> dict[tuple[str, int], np.ndarray]:
        found: dict[tuple[str, int], np.ndarray] = {}
        segments.run(
            model, loud_feeds(model), rests, lambda name, index, array: found.update({(name, index): array.copy()}),
            memory_limit=limit,
        )  # fmt: skip
        return found

    whole, cut = collected(None), collected(int(budget / segments.WEIGHT_SHARE))
    assert whole.keys() == cut.keys()
    for key, array in whole.items():
        np.testing.assert_array_equal(cut[key], array)


# ------------------------------------------------------------------------------------------------- columns at run time


@pytest.mark.parametrize("format", ["int8", "uint8"])
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("text", ["matmul", GEMM, TRANSPOSED])
def test_dynamic_keeps_the_function_of_quantized_weights(
    text: str, granularity: Literal["tensor", "channel"], format: str
) -> None:
    text = PLAIN.replace("SHAPE", "B,S,") if text == "matmul" else text
    model = tiny.build(text, **{name: "normal" for name in ("W", "V", "b") if f" {name}" in text.split("=>")[0]})
    step = QuantizeWeights(format=format, granularity=granularity)
    tiny.compile(model, [step], [])
    for loud in ([], LOUD, list(range(8))):
        after, changes = split(model, loud_feeds(model, loud), dynamic=True, max_share=1.0)
        assert not changes.skipped
        assert after.graph.num_nodes() > model.graph.num_nodes()
        for optimized in (False, True):
            sample = loud_feeds(model, loud)[0]
            got = tiny.run(after, sample, optimized=optimized)[0]
            assert tiny.relative_error(got, tiny.run(model, sample)[0]) < 5e-6


@pytest.mark.parametrize(("max_share", "loud", "expected"), [
    (1.0, [], []), (1.0, LOUD, LOUD), (0.25, LOUD, LOUD), (0.125, LOUD, [5]), (1.0, list(range(8)), list(range(8))),
])  # fmt: skip
def test_dynamic_finds_the_columns_of_each_batch(max_share: float, loud: list[int], expected: list[int]) -> None:
    model = tiny.build(CODES, W="normal")
    tiny.compile(model, [QuantizeWeights(), SplitOutliers(dynamic=True, max_share=max_share)], [])
    values = {value.name: value for node in model.graph for value in node.outputs}
    model.graph.outputs.extend(values[name] for name in ("x.outlier_columns", "x.rest"))
    sample = loud_feeds(model, loud)[0]
    if 5 in loud:
        sample["x"][0, 0, 5] = 1000.0
    _, columns, rest = tiny.run(model, sample)
    assert columns.tolist() == expected
    assert not rest[..., expected].any()
    others = np.delete(np.arange(8), expected)
    np.testing.assert_array_equal(rest[..., others], sample["x"][..., others])


def test_dynamic_in_half_precision() -> None:
    model = tiny.build(CODES.replace("float[", "float16["), W="normal")
    tiny.compile(model, [QuantizeWeights()], [])
    for loud in ([], LOUD):
        after, changes = split(model, loud_feeds(model, loud), tolerance=2e-3, dynamic=True, max_share=1.0)
        assert [changed.site for changed in changes.changed] == ["fc"]
        values = {value.name: value for node in after.graph for value in node.outputs}
        assert values["x.rest"].dtype == ir.DataType.FLOAT16
        after.graph.outputs.append(values["x.outlier_columns"])
        assert tiny.run(after, loud_feeds(model, loud)[0])[1].tolist() == loud


def test_dynamic_catches_outliers_that_calibration_has_not_seen() -> None:
    rng = np.random.default_rng(0)
    W = rng.normal(size=(64, 48)).astype(np.float32)
    text = "g (float[M,64] x, float[64,48] W) => (float[M,48] y) { [fc] y = MatMul(x, W) }"
    quiet, loud = loud_feeds(tiny.build(text, W=W), [])[0], loud_feeds(tiny.build(text, W=W), [7])[0]
    error = {}
    for dynamic in (False, True):
        model = tiny.build(text, W=W)
        steps = [SplitOutliers(), *INT8] if not dynamic else [INT8[0], SplitOutliers(dynamic=True), INT8[1]]
        tiny.compile(model, steps, [quiet])
        error[dynamic] = tiny.relative_error(tiny.run(model, loud)[0], loud["x"] @ W)
    assert error[True] < 0.5 * error[False]


def test_dynamic_comes_before_activations_are_quantized() -> None:
    model = tiny.build(CODES, W="normal")
    *_, changes = tiny.compile(model, [*INT8, SplitOutliers(dynamic=True)], [])
    assert tiny.reasons(changes) == {"fc": "its input is quantized already: split-outliers comes before that"}


@pytest.mark.parametrize(("options", "reason"), [
    ({"format": "int4"}, "its weight is not in 8 bits, and rows of other codes cannot be gathered"),
    ({"granularity": "group", "group_size": 4},
     "its weight has blocked scales, and rows of them are not gathered: use granularity channel"),
])  # fmt: skip
def test_dynamic_says_which_codes_it_cannot_gather(options: dict[str, Any], reason: str) -> None:
    model = tiny.build(CODES, W="normal")
    _, changes = tiny.compile(model, [QuantizeWeights(**options), SplitOutliers(dynamic=True)], [])
    assert tiny.reasons(changes) == {"fc": reason}


def test_dynamic_takes_no_scales_along_the_inputs() -> None:
    model = tiny.build(CODES.replace("8,6] W", "8,8] W").replace("S,6] y", "S,8] y"), W="normal")
    tiny.compile(model, [QuantizeWeights()], [])
    (site,) = find_sites(model).linears
    there(site.dequantize).attributes["axis"] = ir.AttrInt64("axis", 0)
    (changes,) = tiny.compile(model, [SplitOutliers(dynamic=True)], [])
    assert tiny.reasons(changes) == {"fc": "its weight has scales along the inputs, not for each output channel"}
