"""quantize-activations with scales found at run time: the numbers of the papers, on any shape, and no data needed."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from rich.console import Console

import qcompiler
from passes.quantize_activations import QuantizeActivations
from passes.quantize_weights import QuantizeWeights
from qcompiler.errors import SchemeError
from qcompiler.formats.scheme import PerTensor, PerToken
from qcompiler.graph.metadata import PART_OF
from qcompiler.model_diff.terminal import render_diff
from qcompiler.recipes import Recipe, Step
from qcompiler.rewriting.contract import Changes
from qcompiler.sites.activations import Dynamic, activation_of
from qcompiler.sites.find import find_sites
from tests import tiny
from tests.oracles import per_token as oracle
from tests.there import operand

LAYER = "g (float[B,S,9] x, float[9,5] W) => (float[B,S,5] y) { [fc] y = MatMul(x, W) }"
SIBLINGS = """g (float[B,S,8] x, float[8,6] W, float[8,4] V) => (float[B,S,6] y, float[B,S,4] z, float[B,S,8] r) {
    h = Sigmoid(x)  [first] y = MatMul(h, W)  [second] z = MatMul(h, V)  r = Neg(h) }"""
GEMM = "g (float[M,9] x, float[5,9] W, float[5] b) => (float[M,5] y) { [fc] y = Gemm<transB=1>(x, W, b) }"
CONVS = """g (float[B,3,9,9] x, float[4,3,3,3] W, float[4] b, float[5,4,3,3] V) => (float[B,5,5,5] y) {
    [conv1] c = Conv(x, W, b)  r = Relu(c)  [conv2] y = Conv(r, V) }"""


def quantize(model: ir.Model, weights: dict[str, Any] | None = None, **options: Any) -> tuple[ir.Model, Changes]:
    """Weights and activations rounded; no samples are given, as nothing may be measured."""
    after = model.clone()
    return after, tiny.compile(after, [QuantizeWeights(**(weights or {})), QuantizeActivations(**options)], [])[-1]


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# ------------------------------------------------------------------------------------------------------- per token


@pytest.mark.parametrize("opset", [18, 21, 23])
@pytest.mark.parametrize(("format", "qmax"), [(None, 127), ("int8", 127), ("int4", 7)])
@pytest.mark.parametrize("shape", [(9,), (1, 9), (7, 9), (2, 5, 9), (3, 1, 9), (2, 3, 4, 9)])
def test_the_paper_on_any_shape(shape: tuple[int, ...], format: str | None, qmax: float, opset: int) -> None:
    dims = ",".join(["B", "S", "T"][: len(shape) - 1])
    prefix = f"{dims}," if dims else ""
    model = tiny.build(
        f"g (float[{prefix}9] x, float[9,5] W) => (float[{prefix}5] y) {{ [fc] y = MatMul(x, W) }}",
        opset=opset, W="normal",
    )  # fmt: skip
    after, _ = quantize(model, granularity="token", format=format)
    x = normal(*shape)
    expected = oracle.vector_wise(x, tiny.data(model, "W"), qmax)
    # Of the portable graph ONNX Runtime's optimizer makes a MatMulNBits, which rounds the rows to int8 once more.
    for optimized in (False, True) if qmax == 127 else (False,):
        (got,) = tiny.run(after, {"x": x}, optimized=optimized)
        assert got.shape == expected.shape
        assert tiny.relative_error(got, expected) < 1e-6


@pytest.mark.parametrize("features", [1, 2, 3, 17, 64])
def test_odd_widths(features: int) -> None:
    """One input feature is an outer product, which is no layer; two are the fewest that have codes."""
    model = tiny.build(
        f"g (float[M,{features}] x, float[{features},5] W) => (float[M,5] y) {{ [fc] y = MatMul(x, W) }}", W="normal"
    )
    after, changes = quantize(model, granularity="token")
    x = normal(7, features)
    assert changes.modified == (features > 1)
    expected = oracle.vector_wise(x, tiny.data(model, "W")) if features > 1 else x @ tiny.data(model, "W")
    assert tiny.relative_error(tiny.run(after, {"x": x})[0], expected) < 1e-6


def test_gemm_with_a_transposed_weight_and_a_bias() -> None:
    model = tiny.build(GEMM, W="normal", b="normal")
    after, _ = quantize(model, granularity="token")
    x = normal(7, 9)
    expected = oracle.vector_wise(x, tiny.data(model, "W").T) + tiny.data(model, "b")
    assert tiny.relative_error(tiny.run(after, {"x": x})[0], expected) < 1e-6


@pytest.mark.parametrize("magnitude", [1e-44, 1e-38, 1e-30, 1.0, 1e30, 1e36])
def test_each_row_keeps_its_own_precision(magnitude: float) -> None:
    """Rows of any magnitude beside a row of ones; below the normal numbers all are multiples of the least."""
    model = tiny.build("g (float[M,9] x, float[9,9] W) => (float[M,9] y) { [fc] y = MatMul(x, W) }",
                       W=np.eye(9, dtype=np.float32))  # fmt: skip
    after, _ = quantize(model, granularity="token")
    x = normal(3, 9)
    x[1] *= magnitude
    with np.errstate(all="ignore"):
        (got,) = tiny.run(after, {"x": x})
    expected = oracle.vector_wise(x, np.eye(9))
    assert np.allclose(got[[0, 2]], expected[[0, 2]], rtol=1e-5)
    smallest = float(np.finfo(np.float32).smallest_normal)
    step = max(float(np.abs(x[1]).max()) / 127, smallest)
    assert np.all(np.abs(got[1].astype(np.float64) - x[1]) <= 0.5001 * step)


def test_rows_of_zeros() -> None:
    model = tiny.build(GEMM, W="normal", b="normal")
    after, _ = quantize(model, granularity="token")
    x = normal(4, 9)
    x[2] = 0
    (got,) = tiny.run(after, {"x": x})
    assert np.array_equal(got[2], tiny.data(model, "b"))
    assert np.array_equal(tiny.run(after, {"x": np.zeros_like(x)})[0], np.tile(got[2], (4, 1)))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_harms_no_other(bad: float) -> None:
    """An infinity makes its row NaN; integers have no code for NaN itself."""
    model = tiny.build(LAYER, W="normal")
    after, _ = quantize(model, granularity="token")
    x = normal(2, 3, 9)
    (good,) = tiny.run(after, {"x": x})
    x[1, 0, 4] = bad
    (got,) = tiny.run(after, {"x": x})
    assert np.isnan(got[1, 0]).all() or np.isnan(bad)
    got[1, 0] = good[1, 0]
    assert np.array_equal(got, good)


def test_a_loud_row_costs_the_others_nothing_per_token_and_much_per_tensor() -> None:
    model = tiny.build(LAYER, W="normal")
    x = normal(1, 6, 9)
    x[0, 3] *= 1000
    (expected,) = tiny.run(model, {"x": x})
    others = [0, 1, 2, 4, 5]
    errors = {}
    for granularity in ("token", "tensor"):
        after, _ = quantize(model, granularity=granularity, dynamic=True)
        (got,) = tiny.run(after, {"x": x})
        errors[granularity] = tiny.relative_error(got[0, others], expected[0, others])
    assert errors["token"] < 0.02
    assert errors["tensor"] > 0.5


# ------------------------------------------------------------------------------------------------------- per tensor


@pytest.mark.parametrize("shift", [0.0, 3.0, -3.0])
def test_per_tensor(shift: float) -> None:
    model = tiny.build(LAYER, W=np.eye(9, 5, dtype=np.float32))
    after, changes = quantize(model, dynamic=True)
    assert [changed.scheme for changed in changes.changed] == ["activations uint8 per-tensor asymmetric dynamic"]
    x = normal(2, 5, 9) + np.float32(shift)
    assert tiny.relative_error(tiny.run(after, {"x": x})[0], oracle.tensor_wise(x)[..., :5]) < 1e-6


def test_convolutions_per_tensor() -> None:
    model = tiny.build(CONVS, W="normal", b="normal", V="normal")
    after, changes = quantize(model, dynamic=True)
    assert [changed.site for changed in changes.changed] == ["conv1", "conv2"]
    assert tiny.operators(after).count("DynamicQuantizeLinear") == 2  # `outputs` is about static scales
    sample = tiny.feeds(model)[0]
    assert tiny.relative_error(tiny.run(after, sample)[0], tiny.run(model, sample)[0]) < 0.03


def test_convolutions_have_no_tokens() -> None:
    model = tiny.build(CONVS, W="normal", b="normal", V="normal")
    after, changes = quantize(model, granularity="token")
    assert set(tiny.reasons(changes)) == {"conv1", "conv2"}
    assert "use granularity tensor" in tiny.reasons(changes)["conv1"]
    assert not changes.modified
    assert not after.functions


# --------------------------------------------------------------------------------------------------------- the graph


@pytest.mark.parametrize("granularity", ["tensor", "token"])
def test_siblings_share_a_pair_and_others_read_the_float(granularity: str) -> None:
    after, changes = quantize(tiny.build(SIBLINGS, W="normal", V="normal"), granularity=granularity, dynamic=True)
    assert [changed.site for changed in changes.changed] == ["first", "second"]
    first, second = find_sites(after).linears
    assert first.input is second.input
    pair = activation_of(first.input)
    assert isinstance(pair, Dynamic)
    assert (pair.source.name, pair.per_token) == ("h", granularity == "token")
    (negative,) = [node for node in after.graph if node.op_type == "Neg"]
    assert operand(negative, 0).name == "h"


@pytest.mark.parametrize("granularity", ["tensor", "token"])
@pytest.mark.parametrize("type", ["float", "float16"])
def test_twice_is_once(granularity: str, type: str) -> None:
    after, _ = quantize(
        tiny.build(LAYER.replace("float[", f"{type}["), W="normal"), granularity=granularity, dynamic=True
    )
    before = tiny.operators(after)
    for again in (QuantizeActivations(granularity="token"), QuantizeActivations(dynamic=True)):
        (changes,) = tiny.compile(after, [again], [])
        assert tiny.operators(after) == before
        assert "already" in tiny.reasons(changes)["fc"]
    assert not QuantizeActivations().taps(after)


def test_float_weights_are_left_out_and_static_inputs_stay() -> None:
    model = tiny.build(SIBLINGS, W="normal", V="normal")
    after = model.clone()
    steps = [QuantizeWeights(ignore=("second",)), QuantizeActivations(targets=("first",)),
             QuantizeActivations(granularity="token")]  # fmt: skip
    changes = tiny.compile(after, steps, tiny.feeds(model))[-1]
    assert "already" in tiny.reasons(changes)["first"]
    assert [left.site for left in changes.excluded] == ["second"]


def test_half_precision() -> None:
    model = tiny.build(LAYER.replace("float[", "float16["), W="normal")
    x = normal(2, 5, 9).astype(np.float16)
    x[0, 0] *= 1e4
    x[0, 1] *= 1e-6  # below the normal numbers of float16
    expected = oracle.vector_wise(x, tiny.data(model, "W"))
    after, _ = quantize(model, granularity="token")
    (got,) = tiny.run(after, {"x": x})
    assert got.dtype == np.float16
    for row, right in zip(got.reshape(-1, 5)[[0, *range(2, 10)]], expected.reshape(-1, 5)[[0, *range(2, 10)]],
                          strict=True):  # fmt: skip
        assert tiny.relative_error(row, right) < 4e-3
    after, _ = quantize(model, dynamic=True)
    assert tiny.operators(after).count("Cast") == 2
    x = normal(2, 5, 9).astype(np.float16)
    assert tiny.relative_error(tiny.run(after, {"x": x})[0], tiny.run(model, {"x": x})[0]) < 0.03


@pytest.mark.parametrize("granularity", ["tensor", "token"])
def test_bfloat16_has_the_right_types(granularity: str) -> None:
    """ONNX Runtime's CPU provider multiplies no bfloat16, so the types are checked alone (by `tiny.check`)."""
    model = tiny.build(LAYER.replace("float[", "bfloat16["), W=ir.tensor(normal(9, 5)).numpy().astype("bfloat16"))
    after, changes = quantize(model, granularity=granularity, dynamic=True)
    assert changes.modified
    assert find_sites(after).linears[0].input.dtype == ir.DataType.BFLOAT16


@pytest.mark.parametrize("granularity", ["tensor", "token"])
def test_behind_an_operator_of_unknown_type(granularity: str) -> None:
    """Shape inference stops at ONNX Runtime's own operators, so the value has neither type nor shape."""
    model = tiny.build(
        """g (float16[B,S,8] x, float16[B,S,8] r, float16[8] g, float16[8,6] W) => (float16[B,S,6] y) {
        n = com.microsoft.SkipSimplifiedLayerNormalization(x, r, g)  [fc] y = MatMul(n, W) }""",
        g="gain", W="normal",
    )  # fmt: skip
    after, _ = quantize(model, granularity=granularity, dynamic=True)
    sample = tiny.feeds(model)[0]
    assert tiny.relative_error(tiny.run(after, sample)[0], tiny.run(model, sample)[0]) < 0.03


def test_a_node_that_is_part_of_a_layer_is_no_site() -> None:
    model = tiny.build(SIBLINGS, W="normal", V="normal")
    (part,) = [node for node in model.graph if node.name == "second"]
    part.metadata_props[PART_OF] = "first"
    assert [site.name for site in find_sites(model)] == ["first"]
    _, changes = quantize(model, granularity="token")
    assert [changed.site for changed in changes.changed] == ["first"]


# ---------------------------------------------------------------------------------------------- options and recipes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"granularity": "token", "symmetric": False}, "symmetric"),
        ({"granularity": "token", "format": "uint8"}, "int8 or int4, not uint8"),
        ({"granularity": "token", "format": "int16"}, "int8 or int4, not int16"),
        ({"granularity": "token", "dynamic": False}, "set dynamic to true"),
        ({"granularity": "token", "range": "mse"}, "need none"),
        ({"dynamic": True, "range": "percentile"}, "need none"),
        ({"dynamic": True, "format": "int8"}, "set granularity to token"),
        ({"dynamic": True, "symmetric": True}, "set granularity to token"),
        ({"format": "int4"}, "not int4"),
        ({"format": "fp8_e4m3", "symmetric": True}, "not fp8_e4m3"),
        ({"format": "int9"}, "did you mean"),
    ],
)
def test_schemes_that_do_not_go_together(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SchemeError, match=message):
        QuantizeActivations(**options)


@pytest.mark.parametrize("target", ["portable", "ort-cpu"])
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ("uint8", False, False, "tensor")),
        ({"dynamic": True}, ("uint8", False, True, "tensor")),
        ({"granularity": "token"}, ("int8", True, True, "token")),
        ({"granularity": "token", "format": "int4"}, ("int4", True, True, "token")),
        ({"format": "int8", "symmetric": True}, ("int8", True, False, "tensor")),
    ],
)
def test_what_is_open_is_written_out(target: str, options: dict[str, Any], expected: tuple[Any, ...]) -> None:
    """The same whatever the target prefers; a recipe that was written out is read as it is."""
    recipe = Recipe(name="r", passes=(Step(name="quantize-activations", options=options),)).resolved(target)
    (built,) = recipe.build()
    assert isinstance(built, QuantizeActivations)
    assert (built.format, built.symmetric, built.dynamic, built.granularity) == expected
    assert recipe.resolved(target).passes == recipe.passes


def test_the_schemes() -> None:
    assert QuantizeActivations().scheme().granularity == PerTensor()
    assert QuantizeActivations(granularity="token").scheme().granularity == PerToken()
    assert str(QuantizeActivations(granularity="token").scheme()) == "int8 per-token symmetric dynamic"


@pytest.mark.parametrize(
    ("recipe", "activations"),
    [
        ("int8-dynamic", "int8 per-token symmetric dynamic"),
        ("int8-dynamic-tensor", "uint8 per-tensor asymmetric dynamic"),
    ],
)
def test_compiled_without_data_saved_and_compared(recipe: str, activations: str, tmp_path: Path) -> None:
    model = tiny.build(SIBLINGS, W="normal", V="normal")
    compiled = qcompiler.compile(model, recipe, target="portable")
    assert {site.scheme for site in compiled.report.sites} == {f"int8 per-channel symmetric, activations {activations}"}
    compiled.save(tmp_path / "out")
    session = qcompiler.load_session(tmp_path / "out")
    sample = tiny.feeds(model)[0]
    for got, expected in zip(session.run(None, sample), tiny.run(model, sample), strict=True):
        assert tiny.relative_error(got, expected) < 0.02
    again = qcompiler.compile(tmp_path / "out", recipe, target="portable")  # nothing is left to do
    assert {site.status for site in again.report.sites} == {"skipped"}

    stream = io.StringIO()
    difference = qcompiler.diff(model, tmp_path / "out")
    render_diff(difference, Console(file=stream, width=200, color_system=None), details=True)
    functions = {"int8-dynamic": "qcompiler.DynamicQuantizePerToken", "int8-dynamic-tensor": "DynamicQuantizeLinear"}
    assert f"+ 1 × {functions[recipe]} by quantize-weights,quantize-activations: h.quantized" in stream.getvalue()
    (item,) = [item for item in difference.quantization if item.value == "h.quantized"]
    assert (item.scale, item.scales) == (None, 0 if recipe == "int8-dynamic" else 1)
    assert "computed at run time" in stream.getvalue()


@pytest.mark.parametrize("recipe", ["smoothquant-o1", "smoothquant-o2", "smoothquant-o3"])
def test_the_three_levels_of_smoothquant(recipe: str) -> None:
    model = tiny.build(
        """g (float[B,S,8] x, float[8] g, float[8,6] W) => (float[B,S,6] y) {
        n = RMSNormalization<axis=-1>(x, g)  [fc] y = MatMul(n, W) }""",
        opset=23, g="outliers", W="normal",
    )  # fmt: skip
    compiled = qcompiler.compile(model, recipe, target="portable", calibration=tiny.feeds(model))
    (site,) = compiled.report.sites
    wanted = {"o1": "int8 per-token symmetric dynamic", "o2": "uint8 per-tensor asymmetric dynamic",
              "o3": "uint8 per-tensor asymmetric"}  # fmt: skip
    assert site.scheme.endswith(f"activations {wanted[recipe[-2:]]}")
    assert "alpha 0.50" in site.details["smooth-quant"]
