"""convert-float: numbers against float64, what stays in float32, types of inputs and outputs, shared constants."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from passes.convert_float import ConvertFloat
from passes.fuse_attention import FuseAttention
from passes.lower_weight_only import LowerWeightOnly
from passes.quantize_activations import QuantizeActivations
from passes.quantize_weights import QuantizeWeights
from qcompiler.compiler import compile
from qcompiler.errors import ModelError, TargetError
from qcompiler.half.constants import fit, mask_value, rounded
from qcompiler.half.emulation import emulated
from qcompiler.recipes import Recipe
from qcompiler.rewriting.contract import Changes
from qcompiler.statistics import StatisticsStore
from tests import tiny
from tests.there import operands, there

HALF, BRAIN, FLOAT = ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.FLOAT

NORM = """g (float[B,S,8] x, float[8] g, float two, float epsilon, int64[1] last, float[8,8] W) => (float[B,S,8] y) {
    square = Pow (x, two)
    mean = ReduceMean (square, last)
    shifted = Add (mean, epsilon)
    root = Sqrt (shifted)
    normed = Div (x, root)
    n = Mul (g, normed)
    [fc] y = MatMul (n, W)
}"""
NORM_CONSTANTS = {"g": "gain", "W": "normal", "two": np.float32(2), "epsilon": np.float32(1e-12),
                  "last": np.array([-1])}  # fmt: skip

MASKED = """g (int64[B,S] attention_mask, float[B,S,4] x, float one, float low, int64[1] inner) => (float[B,S,4] y) {
    turned = Transpose <perm = [0, 2, 1]> (x)
    scores = MatMul (x, turned)
    mask = Cast <to = 1> (attention_mask)
    seen = Unsqueeze (mask, inner)
    hidden = Sub (one, seen)
    bias = Mul (hidden, low)
    masked = Add (scores, bias)
    weights = Softmax <axis = -1> (masked)
    y = MatMul (weights, x)
}"""
LOW = np.float32(np.finfo(np.float32).min)


def converted(model: ir.Model, samples: Sequence[tiny.Feeds] | None = None, **options: Any) -> tuple[ir.Model, Changes]:
    after = model.clone()
    (changes,) = tiny.compile(after, [ConvertFloat(**options)], samples or [])
    return after, changes


def value(model: ir.Model, name: str) -> ir.Value:
    return next(item for node in model.graph for item in node.outputs if item.name == name)


# -------------------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize(("dtype", "error"), [("fp16", 2e-3), ("bf16", 1.5e-2)])
def test_a_norm_and_a_layer_are_near_float64(dtype: str, error: float) -> None:
    model = tiny.build(NORM, **NORM_CONSTANTS)
    after, _ = converted(model, dtype=dtype)
    x = np.random.default_rng(1).normal(size=(2, 5, 8)) * 300  # whose squares float16 does not hold
    root = np.sqrt((x**2).mean(-1, keepdims=True))
    expected = x / root * tiny.data(model, "g").astype(np.float64) @ tiny.data(model, "W").astype(np.float64)
    (got,) = tiny.run(emulated(after), {"x": x.astype(np.float32)})
    assert tiny.relative_error(got, expected) < error
    assert tiny.relative_error(got, expected) > 1e-5  # or else nothing was rounded


def test_float16_runs_as_it_is() -> None:
    model = tiny.build(NORM, **NORM_CONSTANTS)
    after, _ = converted(model)
    sample = tiny.feeds(model, 1)[0]
    (got,) = tiny.run(after, {"x": sample["x"].astype(np.float16)})
    assert got.dtype == np.float16
    assert tiny.relative_error(got, tiny.run(model, sample)[0]) < 2e-3


def test_a_small_input_survives_a_tiny_epsilon() -> None:
    after, _ = converted(tiny.build(NORM, **NORM_CONSTANTS))
    x = np.full((1, 1, 8), 1e-4, np.float32)  # x² underflows in float16, and so does ε
    (got,) = tiny.run(emulated(after), {"x": x})
    (expected,) = tiny.run(tiny.build(NORM, **NORM_CONSTANTS), {"x": x})
    assert tiny.relative_error(got, expected) < 5e-3


def test_emulation_rounds_between_nodes_where_the_cpu_does_not() -> None:
    text = "g (float[B,8] x, float big) => (float[B,8] y) { a = Mul (x, big) y = Div (a, big) }"
    after, _ = converted(tiny.build(text, big=np.float32(1000)))
    x = np.full((1, 8), 100.0)
    assert np.isinf(tiny.run(emulated(after), {"x": x.astype(np.float32)})[0]).all()


# ---------------------------------------------------------------------------------------------------------------- masks


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_rows_that_are_hidden_whole_stay_finite(dtype: str) -> None:
    model = tiny.build(MASKED, one=np.float32(1), low=LOW, inner=np.array([1]))
    after, _ = converted(model, dtype=dtype)
    x = np.random.default_rng(0).normal(size=(2, 5, 4)).astype(np.float32)
    mask = np.array([[1, 1, 1, 0, 0], [0, 0, 0, 0, 0]])
    (got,) = tiny.run(emulated(after), {"x": x, "attention_mask": mask})
    (expected,) = tiny.run(model, {"x": x, "attention_mask": mask})
    assert np.isfinite(got).all()
    assert tiny.relative_error(got[0], expected[0]) < (2e-3 if dtype == "fp16" else 2e-2)


def test_a_mask_chosen_from_two_numbers_is_made_in_16_bits() -> None:
    text = """g (bool[B,S] seen, float[B,S] x, float zero, float low) => (float[B,S] y) {
        bias = Where (seen, zero, low)
        y = Add (x, bias)
    }"""
    after, _ = converted(tiny.build(text, zero=np.float32(0), low=LOW))
    assert tiny.operators(after) == ["Where", "Add"]
    assert float(tiny.data(after, "low")) == -mask_value(HALF)


def test_constants_keep_minus_infinity_and_bound_masks() -> None:
    tensor = ir.tensor(np.array([-np.inf, LOW, -1e9, 1.5, 65504.0], np.float32))
    assert rounded(tensor, HALF, "c").numpy().tolist() == [-np.inf, -32752.0, -32752.0, 1.5, 65504.0]
    assert rounded(tensor, BRAIN, "c").numpy().astype(np.float32)[1] == np.float32(-mask_value(BRAIN))
    assert fit(tensor, HALF).masks
    assert fit(tensor, HALF).largest == 65504.0


# ------------------------------------------------------------------------------------------------------------ positions


def test_positions_are_exact_beyond_what_float16_holds() -> None:
    text = """g (int64[B,S] position_ids, float[B,S,4] x, float[4] rates, int64[1] last) => (float[B,S,4] y) {
        position = Cast <to = 1> (position_ids)
        column = Unsqueeze (position, last)
        angles = Mul (column, rates)
        cosine = Cos (angles)
        y = Mul (x, cosine)
    }"""
    model = tiny.build(text, rates=np.array([1, 0.1, 0.01, 0.001], np.float32), last=np.array([2]))
    after, _ = converted(model)
    sample = {"position_ids": np.array([[100_001, 131_071]]), "x": np.ones((1, 2, 4), np.float32)}
    (got,) = tiny.run(emulated(after), sample)
    assert np.abs(got - tiny.run(model, sample)[0]).max() < 1e-3


def test_data_times_counts_stays_in_float32() -> None:
    text = """g (int64[B] count, float[B] x) => (float[B] y) { n = Cast <to = 1> (count) y = Div (x, n) }"""
    after, _ = converted(tiny.build(text), keep_io=("y",))
    (got,) = tiny.run(after, {"count": np.array([100_000]), "x": np.array([5e4], np.float16)})
    assert got[0] == pytest.approx(0.5, rel=1e-3)


# ---------------------------------------------------------------------------------------------------------------- range

LOUD = """g (float[B,S,8] x, float[8,8] W, float[8,8] V, float loud) => (float[B,S,8] y) {
    [gate] g = MatMul (x, W)
    amplified = Mul (g, loud)
    [down] d = MatMul (amplified, V)
    y = Div (d, loud)
}"""
LOUD_CONSTANTS = {"W": "normal", "V": "normal", "loud": np.float32(3e4)}


def test_what_is_too_large_on_calibration_data_stays_in_float32_and_is_reported() -> None:
    model = tiny.build(LOUD, **LOUD_CONSTANTS)
    samples = tiny.feeds(model)
    after, changes = converted(model, samples, check_range=True)
    assert "too large for float16" in tiny.reasons(changes)["down"]
    assert "float16 ends at 65504" in tiny.reasons(changes)["amplified"]
    assert [changed.site for changed in changes.changed] == ["gate"]
    assert value(after, "d").dtype == FLOAT
    (got,) = tiny.run(emulated(after), samples[0])
    assert tiny.relative_error(got, tiny.run(model, samples[0])[0]) < 2e-3
    blind, _ = converted(model)
    assert not np.isfinite(tiny.run(emulated(blind), samples[0])[0]).all()


def test_headroom_decides() -> None:
    model = tiny.build("g (float[B,S,8] x, float[8,8] W) => (float[B,S,8] y) { [fc] y = MatMul (x, W) }", W="normal")
    samples = [{"x": np.full((1, 1, 8), 9000.0, np.float32)}]
    assert tiny.reasons(converted(model, samples, check_range=True, headroom=1.0)[1]) == {}
    assert "fc" in tiny.reasons(converted(model, samples, check_range=True, headroom=8.0)[1])


def test_bfloat16_needs_no_range() -> None:
    model = tiny.build(LOUD, **LOUD_CONSTANTS)
    assert not ConvertFloat(dtype="bf16", check_range=True).taps(model)


def test_a_past_whose_present_is_too_large_stays_in_float32_with_it() -> None:
    """What is appended is too large for float16, so it will not fit into the past of the next step either."""
    model = tiny.build(
        """g (float[B,2,S,4] k, float[B,2,P,4] past, float loud) => (float[B,2,T,4] present, float[B,2,T,4] y) {
        new = Mul (k, loud)  present = Concat <axis = 2> (past, new)  y = Div (present, loud) }""",
        loud=np.float32(3e4),
    )
    samples = [{**sample, "past": np.zeros((2, 2, 0, 4), np.float32)} for sample in tiny.feeds(model)]
    after, _ = converted(model, samples, check_range=True)
    assert value(after, "present").dtype == FLOAT
    assert {port.name: port.dtype for port in after.graph.inputs} == {"k": HALF, "past": FLOAT}


def test_masks_are_not_taken_for_large_values() -> None:
    model = tiny.build(MASKED, one=np.float32(1), low=LOW, inner=np.array([1]))
    samples = [{"attention_mask": np.array([[1, 1, 0, 0, 0]]), "x": np.ones((1, 5, 4), np.float32)}]
    after, changes = converted(model, samples, check_range=True)
    assert not changes.skipped
    assert value(after, "weights").dtype == HALF


def test_layers_whose_constants_do_not_fit_stay_in_float32() -> None:
    weight = np.eye(8, dtype=np.float32)
    weight[0, 0] = 1e5
    text = "g (float[B,8] x, float[8,8] W, float tiny) => (float[B,8] y) { [fc] z = MatMul (x, W) y = Max (x, tiny) }"
    _, changes = converted(tiny.build(text.replace("=> (", "=> (float[B,8] z, "), W=weight, tiny=np.float32(1e-9)))
    assert tiny.reasons(changes) == {
        "fc": "stays in float32: its constant 'W' does not fit the range of float16",
        "y": "stays in float32: its constant 'tiny' is too small for float16",
    }


# ------------------------------------------------------------------------------------------------------------ structure


def test_inputs_and_outputs_change_their_type_and_keep_their_names() -> None:
    text = """g (float[B,P,8] past, float[B,S,8] x, float[8,4] W) => (float[B,S,4] logits, float[B,L,8] present) {
        present = Concat <axis = 1> (past, x)
        logits = MatMul (x, W)
    }"""
    model = tiny.build(text, W="normal")
    for options, logits, cache in (
        ({}, HALF, HALF),
        ({"keep_io": ("logits",)}, FLOAT, HALF),
        ({"keep_io": ("*",)}, FLOAT, FLOAT),
        ({"dtype": "bf16"}, FLOAT, BRAIN),
        ({"dtype": "bf16", "keep_io": ()}, BRAIN, BRAIN),
    ):
        after, _ = converted(model, **options)
        types = {item.name: item.dtype for item in (*after.graph.inputs, *after.graph.outputs)}
        assert types == {"past": cache, "x": cache, "logits": logits, "present": cache}
        assert value(after, "logits").is_graph_output()


def test_a_constant_that_both_sides_read_is_kept_twice_and_one_that_is_converted_once() -> None:
    text = """g (float[B,8] x, float[8] c) => (float[B,8] y, float[B,8] z) {
        p = Pow (x, c)
        y = Mul (x, c)
        z = Neg (p)
    }"""
    after, _ = converted(tiny.build(text, c="gain"))
    assert {name: item.dtype for name, item in after.graph.initializers.items()} == {"c": FLOAT, "c.float16": HALF}


def test_tied_weights_stay_tied() -> None:
    text = """g (int64[B,S] input_ids, float[4,8] table) => (float[B,S,4] y) {
        x = Gather (table, input_ids)
        turned = Transpose <perm = [1, 0]> (table)
        y = MatMul (x, turned)
    }"""
    after, changes = converted(tiny.build(text, table="normal"))
    assert {name: item.dtype for name, item in after.graph.initializers.items()} == {"table": HALF}
    assert tiny.operators(after) == ["Gather", "Transpose", "MatMul"]
    assert changes.narrowed == 4 * 8 * 2


def test_large_weights_are_computed_when_they_are_written() -> None:
    text = "g (float[B,1024] x, float[1024,1024] W) => (float[B,1024] y) { y = MatMul (x, W) }"
    after, _ = converted(tiny.build(text, W="normal"))
    assert isinstance(after.graph.initializers["W"].const_value, ir.LazyTensor)


def test_graphs_inside_nodes_stay_in_float32_and_read_it() -> None:
    text = """g (bool c, float[B,8] x, float[8,8] W) => (float[B,8] y) {
        a = MatMul (x, W)
        y = If (c) <then_branch = t () => (float[B,8] u) { u = Neg (a) },
                    else_branch = e () => (float[B,8] v) { v = Exp (a) }>
    }"""
    model = tiny.build(text, W="normal")
    after, changes = converted(model, keep_io=("y",))
    assert "the graphs inside it" in tiny.reasons(changes)["y"]
    x = np.ones((1, 8), np.float32)
    (got,) = tiny.run(after, {"c": np.array(True), "x": x.astype(np.float16)})
    assert tiny.relative_error(got, tiny.run(model, {"c": np.array(True), "x": x})[0]) < 2e-3


def test_scales_of_a_cache_in_attention_stay_float32() -> None:
    model = tiny.build(
        """g (float[B,S,16] q, float[B,S,16] k, float[B,S,16] v, int8[B,2,P,8] past_k, int8[B,2,P,8] past_v,
            int32[B] lengths, int32 total, float[1] scale)
            => (float[B,S,16] y, int8[B,2,L,8] present_k, int8[B,2,L,8] present_v) {
            y, present_k, present_v = com.microsoft.GroupQueryAttention <num_heads = 2, kv_num_heads = 2,
                k_quant_type = "PER_TENSOR", v_quant_type = "PER_TENSOR", kv_cache_bit_width = 8>
                (q, k, v, past_k, past_v, lengths, total, , , , , , scale, scale)
        }""", scale=np.array([0.1], np.float32),
    )  # fmt: skip
    after, _ = converted(model)
    assert after.graph.initializers["scale"].dtype == FLOAT
    assert [item.dtype for item in after.graph.inputs[:3]] == [HALF] * 3
    assert after.graph.outputs[0].dtype == HALF


def test_a_model_in_float16_comes_out_as_it_was() -> None:
    once, _ = converted(tiny.build(NORM, **NORM_CONSTANTS))
    twice, changes = converted(once)
    assert ir.to_proto(once).SerializeToString() == ir.to_proto(twice).SerializeToString()
    assert not changes.changed


def test_bfloat16_is_not_made_of_float16() -> None:
    once, _ = converted(tiny.build(NORM, **NORM_CONSTANTS))
    with pytest.raises(ModelError, match="in float16 already"):
        ConvertFloat(dtype="bf16").apply(once, StatisticsStore())


# -------------------------------------------------------------------------------------------------------- with quantize

LAYERS = """g (float[B,S,64] x, float[64,64] W, float[64,64] V) => (float[B,S,64] y) {
    [up] u = MatMul (x, W)
    s = Sigmoid (u)
    a = Mul (u, s)
    [down] y = MatMul (a, V)
}"""


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_lowered_layers_compute_in_16_bits(dtype: Literal["fp16", "bf16"]) -> None:
    model = tiny.build(LAYERS, W="normal", V="normal")
    samples = tiny.feeds(model)
    after = model.clone()
    half = LowerWeightOnly(block_size=32, accuracy_level=0, half_precision=True, fused_kernel=True)
    weights = QuantizeWeights(format="int4", granularity="group", group_size=32)
    _, _, lowered = tiny.compile(after, [weights, ConvertFloat(dtype=dtype), half], samples)
    assert all("fpA_intB" in changed.detail for changed in lowered.changed)
    assert not any(node.op_type == "Cast" for node in after.graph)
    assert tiny.relative_error(tiny.run(emulated(after), samples[0])[0], tiny.run(model, samples[0])[0]) < 0.2


def test_a_layer_that_reads_codes_and_stays_in_float32_is_still_a_quantized_layer() -> None:
    model = tiny.build(LAYERS, W="normal", V="normal")
    steps = [QuantizeWeights(), QuantizeActivations(granularity="token"), ConvertFloat(ignore=("down",))]
    tiny.compile(model, steps, tiny.feeds(model))
    down = next(node for node in model.graph if node.name == "down")
    assert [there(item.producer()).op_type for item in operands(down)] == ["DequantizePerToken", "DequantizeLinear"]
    assert down.outputs[0].dtype == FLOAT


# --------------------------------------------------------------------------------------------------- the way through it


def test_compile_takes_a_type_and_looks_for_large_values(tmp_path: Path) -> None:
    model = tiny.build(LOUD, **LOUD_CONSTANTS)
    samples = [dict(sample) for sample in tiny.feeds(model, 4)]
    done = compile(model, Recipe.load("int8-weights"), calibration=samples, target="ort-cuda", dtype="fp16")
    skipped = {skip.site for item in done.report.passes if item.name == "convert-float" for skip in item.skipped}
    assert {"down", "amplified"} <= skipped
    assert done.model.graph.outputs[0].dtype == HALF
    assert done.report.outputs["y"]["sqnr_db"] > 20
    assert not any("65504" in warning for warning in done.report.warnings)
    done.save(tmp_path / "out")
    blind = compile(model, Recipe.load("int8-weights"), target="ort-cuda", dtype="fp16")
    assert any("65504" in warning for warning in blind.report.warnings)


def test_excluded_layers_are_converted_all_the_same() -> None:
    model = tiny.build(LAYERS, W="normal", V="normal")
    done = compile(model, Recipe.load("int8-weights"), target="ort-cuda", dtype="bf16", exclude=["down"])
    assert done.model.graph.initializers["V"].dtype == BRAIN
    assert done.report.sizes.quantized_bytes > 0
    assert done.report.sizes.quantized_bytes < done.report.sizes.quantized_float_bytes / 3


def test_cpus_are_refused() -> None:
    model = tiny.build(LAYERS, W="normal", V="normal")
    with pytest.raises(TargetError, match="no products in float16"):
        compile(model, Recipe.load("int8-weights"), target="ort-cpu", dtype="fp16")


def test_attention_is_fused_where_it_will_be_in_half_precision() -> None:
    recipe = Recipe.from_dict({"name": "r", "passes": ["fuse-attention"]}).for_target("ort-cuda")
    (step,) = recipe.resolved().build()
    assert isinstance(step, FuseAttention)
    assert step.half_precision_only
    fused, last = recipe.with_dtype("fp16", True).resolved().build()
    assert isinstance(fused, FuseAttention)
    assert not fused.half_precision_only
    assert isinstance(last, ConvertFloat)
    assert last.check_range


def test_a_recipe_may_name_the_pass_itself() -> None:
    recipe = Recipe.from_dict({"name": "r", "passes": ["quantize-weights", {"convert-float": {"headroom": 4}}]})
    assert recipe.with_dtype("bf16", False).passes[-1].options == {"check_range": False, "headroom": 4, "dtype": "bf16"}
    assert recipe.with_dtype(None, True).passes[-1].options == {"check_range": True, "headroom": 4}
    assert recipe.with_options(["convert-float.keep_io=[logits]"]).passes[-1].options["keep_io"] == ["logits"]


def test_numbers_in_both_types_have_the_ranges_that_are_said() -> None:
    assert mask_value(HALF) == 65504 / 2
    assert mask_value(BRAIN) == float(ml_dtypes.finfo(ml_dtypes.bfloat16).max) / 2


# ------------------------------------------------------------------------------------- what ONNX Runtime makes of it

CENTRED = """g (float[B,S,8] x, float[8] g, float[8] b, float two, float epsilon, int64[1] last, float[8,8] W)
    => (float[B,S,8] y, float[B,S,8] other) {{
    mean = ReduceMean (x, last)
    centred = Sub (x, mean)
    square = Pow (centred, two)
    variance = ReduceMean (square, last)
    shifted = Add (variance, epsilon)
    root = Sqrt (shifted)
    normed = Div (centred, root)
    n = Mul (normed, g)
    {bias}
    y = MatMul (m, W)
    other = {other} (x)
}}"""


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize(("bias", "other", "kept"), [
    ("m = Add (n, b)", "Neg", None),
    ("m = Add (n, b)", "Exp", FLOAT),  # reads float32, too, so that the Cast stays beside the operator
    ("m = Identity (n)", "Neg", FLOAT),
])  # fmt: skip
def test_a_gain_has_the_type_that_the_norm_is_read_in(bias: str, other: str, kept: ir.DataType, dtype: str) -> None:
    constants = {**NORM_CONSTANTS, "b": "normal"}
    if "b" not in bias:
        constants.pop("b")
    text = CENTRED.format(bias=bias, other=other)
    model = tiny.build(text if "b)" in bias else text.replace(" float[8] b,", ""), **constants)
    after, _ = converted(model, dtype=dtype)
    half = HALF if dtype == "fp16" else BRAIN
    assert after.graph.initializers["g"].dtype == (kept or half)
    assert value(after, "y").dtype == half
    samples = tiny.feeds(model)
    (got, _), (expected, _) = (tiny.run(item, samples[0]) for item in (emulated(after), model))
    assert tiny.relative_error(got, expected) < (2e-3 if dtype == "fp16" else 2e-2)
    if dtype == "fp16":
        tiny.session(after, optimized=True)  # with a gain of the other type LayerNormalization has none


def test_a_norm_of_an_input_that_stays_in_float32_has_its_gain_in_it() -> None:
    model = tiny.build(CENTRED.format(bias="m = Add (n, b)", other="Neg"), **{**NORM_CONSTANTS, "b": "normal"})
    after, _ = converted(model, keep_io=("x",))
    assert after.graph.initializers["g"].dtype == FLOAT
    tiny.session(after, optimized=True)


def test_an_operand_that_was_turned_in_float32_is_rounded_before() -> None:
    """Else ONNX Runtime exchanges Transpose and Cast, and its own Cast has no kernel."""
    text = """g (float[B,S,8] x, float[8,8] W) => (float[S,B,8] y) {
        e = Exp (x) t = Transpose <perm = [1, 0, 2]> (e) y = MatMul (t, W) }"""
    after, _ = converted(tiny.build(text, W="normal"))
    assert tiny.operators(after) == ["Cast", "Exp", "Cast", "Transpose", "MatMul"]


def test_operators_without_a_kernel_in_bfloat16_stay_in_float32() -> None:
    """Neither provider has one, so the model would not load."""
    text = """g (float[B,8] x, float[8,8] W, float[8,8,3,3] k, float[B,8,5,5] p)
        => (int64[B] best, float[B,8] y, float[B,8,5,5] z) {
        h = MatMul (x, W)
        best = ArgMax <axis = 1, keepdims = 0> (h)
        turned = Atan (h)
        y = Sign (turned)
        c = Conv <pads = [1, 1, 1, 1]> (p, k)
        z = MaxPool <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (c)
    }"""
    after, _ = converted(tiny.build(text, opset=22, W="normal", k="normal"), dtype="bf16")
    types = {node.op_type: [item.dtype for item in operands(node)] for node in after.graph if node.op_type != "Cast"}
    assert types == {
        "MatMul": [BRAIN] * 2, "ArgMax": [FLOAT], "Atan": [FLOAT], "Sign": [BRAIN], "Conv": [BRAIN] * 2,
        "MaxPool": [FLOAT],
    }  # fmt: skip


def test_weights_of_convolutions_are_decoded_in_float32_where_bfloat16_has_no_kernel() -> None:
    text = """g (float[B,8,5,5] x, float[8,8,3,3] W) => (float[B,8,3,3] y) { [conv] y = Conv (x, W) }"""
    types: dict[Literal["fp16", "bf16"], ir.DataType] = {"bf16": FLOAT, "fp16": HALF}
    for dtype, kind in types.items():
        model = tiny.build(text, opset=22, W="normal")
        tiny.compile(model, [QuantizeWeights(), ConvertFloat(dtype=dtype)], [])
        (decoder,) = (node for node in model.graph if node.op_type == "DequantizeLinear")
        assert decoder.outputs[0].dtype == kind
        (conv,) = (node for node in model.graph if node.op_type == "Conv")
        assert {item.dtype for item in operands(conv)} == {HALF if dtype == "fp16" else BRAIN}


def test_a_state_of_zeros_fits() -> None:
    text = (
        """g (float[B,8] x) => (float[L,8] y) { s = Shape (x) z = ConstantOfShape (s) y = Concat <axis = 0> (z, x) }"""
    )
    after, _ = converted(tiny.build(text))
    assert "Clip" not in tiny.operators(after)
