"""lower-tensorrt: what the codes stand for stays, the form is what NVIDIA's rules ask for, and the rest is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest

from passes.fp8 import Fp8
from passes.gptq import Gptq
from passes.lower_tensorrt import LowerTensorrt, _form
from passes.quantize_activations import QuantizeActivations
from passes.quantize_weights import QuantizeWeights
from qcompiler import compiler
from qcompiler.driver import inputs
from qcompiler.errors import TargetError
from qcompiler.lowering.tensorrt_rules import BLOCKS, violations
from qcompiler.recipes import recipe_names
from qcompiler.rewriting.contract import Changes, Pass
from qcompiler.sessions import runtime
from qcompiler.sites.activations import activation_of
from qcompiler.sites.canonicalize import canonicalize
from qcompiler.sites.find import Linear, find_sites
from qcompiler.statistics import StatisticsStore
from qcompiler.targets import Target
from tests import tiny
from tests.there import dims, held, operand, tensor_of, there

MATMUL = "g (float[B,S,256] x, float[256,6] W) => (float[B,S,6] y) { [fc] y = MatMul(x, W) }"
GEMM = "g (float[M,256] x, float[256,6] W, float[6] b) => (float[M,6] y) { [fc] y = Gemm(x, W, b) }"
GEMM_T = "g (float[M,256] x, float[6,256] W, float[6] b) => (float[M,6] y) { [fc] y = Gemm<transB=1>(x, W, b) }"
TURNED = """g (float[B,S,256] x, float[6,256] W) => (float[B,S,6] y) {
    T = Transpose<perm=[1,0]>(W)  [fc] y = MatMul(x, T) }"""
LAYERS = {"matmul": MATMUL, "gemm": GEMM, "gemm-transposed": GEMM_T, "transpose": TURNED}
CONVOLUTION = """g (float[B,3,8,8] x, float[4,3,3,3] W, float[4] b, float[5,4,3,3] V) => (float[B,5,4,4] y) {
    c = Conv(x, W, b)  [second] y = Conv(c, V) }"""
MODEL = """g (int64[B,S] ids, float[12,64] E, float[64,128] W, float[128,64] V) => (float[B,S,12] logits) {
    [embed] x = Gather(E, ids)  [up] h = MatMul(x, W)  r = Relu(h)  [down] d = MatMul(r, V)
    T = Transpose<perm=[1,0]>(E)  [lm_head] logits = MatMul(d, T) }"""
INT8 = QuantizeActivations(format="int8", symmetric=True)


def model_of(text: str, **constants: Any) -> ir.Model:
    names = [name for name in ("W", "V", "E", "b") if f"] {name}," in text or f"] {name})" in text]
    return tiny.build(text, **{name: constants.get(name, "normal") for name in names})


def lower(model: ir.Model, *steps: Pass) -> tuple[ir.Model, ir.Model, Changes]:
    """(portable, lowered, changes)."""
    portable = model.clone()
    tiny.compile(portable, steps, tiny.feeds(model))
    lowered = portable.clone()
    (changes,) = tiny.compile(lowered, [LowerTensorrt()], [])
    return portable, lowered, changes


def assert_same(portable: ir.Model, lowered: ir.Model, tolerance: float = 1e-6) -> None:
    for sample in tiny.feeds(portable):
        for now, then in zip(tiny.run(lowered, sample), tiny.run(portable, sample), strict=True):
            assert tiny.relative_error(now, then) <= tolerance


def weight_node(model: ir.Model) -> ir.Node:
    (node,) = [node for node in model.graph if node.op_type == "DequantizeLinear" and operand(node, 0).const_value]
    return node


# ------------------------------------------------------------------------------------------------- 8 bits on both sides


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("weights", [{}, {"format": "uint8"}, {"granularity": "tensor"}, {"format": "int4"}])
def test_int8_on_both_sides(layer: str, weights: dict[str, Any]) -> None:
    portable, lowered, changes = lower(model_of(LAYERS[layer]), QuantizeWeights(**weights), INT8)
    assert [changed.kernel for changed in changes.changed] == ["TensorRT int8"]
    node = weight_node(lowered)
    assert operand(node, 0).dtype == ir.DataType.INT8
    assert len(node.inputs) == 2
    assert node.outputs[0].consumers()[0].name == "fc"  # nothing stands between the pair and the layer
    axis = node.attributes.get_int("axis", 1)
    assert tensor_of(operand(node, 1)).size in (1, dims(operand(node, 0))[axis])
    assert_same(portable, lowered)


def test_convolutions_that_were_kept_from_saturating_become_int8() -> None:
    portable, lowered, changes = lower(model_of(CONVOLUTION), QuantizeWeights(saturation_safe=True), INT8)
    assert {changed.kernel for changed in changes.changed} == {"TensorRT int8"}
    assert not any(value.dtype == ir.DataType.UINT8 for value in lowered.graph.initializers.values())
    assert_same(portable, lowered)


def test_an_activation_with_a_zero_point_stays_float() -> None:
    model = model_of("""g (float[M,64] x, float[64,6] W, float[64,6] V) => (float[M,6] y, float[M,6] z) {
        [ours] y = MatMul(x, W)  [other] z = MatMul(x, V) }""")
    steps = QuantizeActivations(targets=("other",)), QuantizeWeights(targets=("ours",), format="int4")
    _, lowered, changes = lower(model, QuantizeWeights(targets=("other",)), *steps)
    assert tiny.reasons(changes)["other"].startswith("its activation has UINT8 codes, and TensorRT multiplies INT8")
    assert tiny.operators(lowered) == ["DequantizeLinear", "MatMul", "MatMul"]


# ------------------------------------------------------------------------------------------------- 4-bit weights


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(
    ("weights", "block"),
    [
        ({"format": "int4"}, 128),
        ({"format": "uint4", "granularity": "tensor"}, 128),
        ({"format": "int4", "granularity": "group", "group_size": 128}, 128),
        ({"format": "uint4", "granularity": "group", "group_size": 64}, 64),
        ({"format": "int4", "granularity": "group", "group_size": 192}, 64),
        ({"format": "uint3", "granularity": "group", "group_size": 256}, 128),
    ],
)
def test_four_bits_in_blocks(layer: str, weights: dict[str, Any], block: int) -> None:
    portable, lowered, changes = lower(model_of(LAYERS[layer]), QuantizeWeights(**weights))
    assert [(changed.kernel, changed.detail) for changed in changes.changed] == [
        ("TensorRT int4 weights", f"blocks of {block}")
    ]
    node = weight_node(lowered)
    rows = 0 if layer == "gemm-transposed" else 1
    assert operand(node, 0).dtype == ir.DataType.INT4
    assert node.attributes.get_int("block_size") == block
    assert node.attributes.get_int("axis") == 1 - rows
    assert dims(operand(node, 1))[rows] == 6
    assert dims(operand(node, 1))[1 - rows] == 256 // block
    assert_same(portable, lowered)


def test_a_negative_scale_changes_its_sign_with_its_codes() -> None:
    step = QuantizeWeights(format="int3", granularity="group", group_size=128, search="mse")
    portable, lowered, changes = lower(model_of(MATMUL), step)
    before = next(value for name, value in portable.graph.initializers.items() if name.endswith(".scale"))
    assert np.any(held(before) < 0)  # or the case shows nothing
    assert np.all(held(operand(weight_node(lowered), 1)) > 0)
    assert changes.changed
    assert_same(portable, lowered)


def test_a_negative_scale_of_the_least_code_is_no_symmetric_integer() -> None:
    model = model_of("""g (float[M,128] x, float[128,6] W, float[128,6] V) => (float[M,6] y, float[M,6] z) {
        [searched] y = MatMul(x, W)  [plain] z = MatMul(x, V) }""")
    settings: dict[str, Any] = {"format": "int4", "granularity": "group", "group_size": 128}
    searched = QuantizeWeights(targets=("searched",), search="mse", **settings)
    portable, lowered, changes = lower(model, searched, QuantizeWeights(targets=("plain",), **settings))
    assert "positive_scales" in tiny.reasons(changes)["searched"]
    assert_same(portable, lowered)


@pytest.mark.parametrize("search", ["minmax", "mse", "weighted"])
@pytest.mark.parametrize("cls", [QuantizeWeights, Gptq])
def test_positive_scales(cls: type[Any], search: str) -> None:
    model = model_of(MATMUL)
    step = cls(format="int4", granularity="group", group_size=128, search=search, positive_scales=True)
    _, lowered, changes = lower(model, step)
    assert np.all(held(operand(weight_node(lowered), 1)) > 0)
    assert changes.changed


# ------------------------------------------------------------------------------------------------- what is left out


def test_a_tied_head_shares_one_float_constant_with_the_embedding() -> None:
    steps = [
        QuantizeWeights(format="int4", granularity="group", group_size=64, layers=("linear",)),
        QuantizeWeights(format="uint8", layers=("head", "embedding")),
    ]
    portable, lowered, changes = lower(model_of(MODEL), *steps)
    assert {changed.site for changed in changes.changed} == {"up", "down"}
    assert set(tiny.reasons(changes)) == {"embed", "lm_head"}
    floats = [value for value in lowered.graph.initializers.values() if dims(value) == [12, 64]]
    assert len(floats) == 1
    assert floats[0].dtype == ir.DataType.FLOAT
    assert_same(portable, lowered)


def test_where_nothing_is_left_the_recipe_is_refused() -> None:
    with pytest.raises(TargetError) as caught:
        compiler.compile(model_of(MODEL), "int8-weights", target="tensorrt")
    assert "weight-only kernels for linear layers of 4 bits alone" in str(caught.value)
    assert "--recipe gptq-w4" in str(caught.value)
    assert "\n" not in str(caught.value)


REFUSED = {
    "binary": "unpacks signs",
    "fp8": "--recipe fp8-tensor",
    "gptq-w2": "--recipe gptq-w4",
    "gptq-w4-kv8": "KV-cache",
    "hqq-w4": "symmetrically",
    "int8-dynamic": "--recipe smoothquant",
    "int8-dynamic-tensor": "--recipe smoothquant",
    "kv-int4": "KV-cache",
    "kv-int4-fused": "GroupQueryAttention",
    "kv-int8": "KV-cache",
    "kv-int8-fused": "GroupQueryAttention",
    "llm-int8": "--recipe smoothquant",
    "nf4": "table of 16 numbers",
    "smoothquant-o1": "--recipe smoothquant",
    "smoothquant-o2": "--recipe smoothquant",
    "w4a8": "--recipe smoothquant",
}
BY_THE_PASS = ("int8-weights", "w8")


@pytest.mark.parametrize("recipe", [name for name in recipe_names() if name not in BY_THE_PASS])
def test_every_recipe_has_an_answer(recipe: str) -> None:
    if recipe not in REFUSED:
        inputs.plan(recipe, "tensorrt", (), (), None, None)
        return
    with pytest.raises(TargetError, match=REFUSED[recipe]) as caught:
        inputs.plan(recipe, "tensorrt", (), (), None, None)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("recipe", ["rtn-w4", "awq-gptq-w4", "gptq-w4-act-order", "smoothquant", "int8-static"])
def test_recipes_end_in_the_form(recipe: str, tmp_path: Path) -> None:
    model = model_of(MODEL)
    compiled = compiler.compile(model, recipe, target="tensorrt", calibration=tiny.feeds(model, count=4))
    kernels = {site.name: site.kernel for site in compiled.report.sites}
    assert kernels["up"] == kernels["down"] != ""
    assert violations(compiled.model) == []
    compiled.save(tmp_path / "out")
    session = runtime.load_session(tmp_path / "out")  # on CPUs, too
    assert session.get_outputs()[0].name == "logits"


def test_the_recorded_options_keep_biases_float(tmp_path: Path) -> None:
    """ONNX Runtime would quantize the bias of a convolution to int32 before any provider sees the graph."""
    _, lowered, _ = lower(model_of(CONVOLUTION), QuantizeWeights(), INT8)
    target, proto = Target.load("tensorrt"), ir.to_proto(lowered).SerializeToString()
    assert ir.DataType.INT32 in _types_of_codes(proto, tmp_path / "bare.onnx", [])  # or nothing has to be prevented
    kept = _types_of_codes(proto, tmp_path / "kept.onnx", list(target.disabled_optimizers))
    assert kept == {ir.DataType.INT8}


def _types_of_codes(proto: bytes, path: Path, disabled: list[str]) -> set[ir.DataType]:
    """Of the constants that DequantizeLinears read, in the graph that providers are offered."""
    import onnxruntime as ort

    settings = ort.SessionOptions()
    settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    settings.optimized_model_filepath = str(path)
    ort.InferenceSession(proto, settings, providers=["CPUExecutionProvider"], disabled_optimizers=disabled)
    graph = onnx.load(path).graph
    types = {item.name: ir.DataType(item.data_type) for item in graph.initializer}
    read = [node.input[0] for node in graph.node if node.op_type == "DequantizeLinear"]
    return {types[name] for name in read if name in types}


# ------------------------------------------------------------------------------------------------- the rules

PAIR = "[q] q = QuantizeLinear(x, s, z)  [d] y = DequantizeLinear(q, s, z)"
ONE, ZERO = np.float32(0.1), np.int8(0)
BROKEN: dict[str, tuple[str, dict[str, Any]]] = {
    "has a zero point that is not 0, or not a constant; TensorRT quantizes symmetrically": (
        f"g (float[M,8] x, float s, int8 z) => (float[M,8] y) {{ {PAIR} }}", {"s": ONE, "z": np.int8(3)}),
    "has UINT8 codes, and TensorRT knows int8, int4 and float8e4m3fn": (
        f"g (float[M,8] x, float s, uint8 z) => (float[M,8] y) {{ {PAIR} }}", {"s": ONE, "z": np.uint8(0)}),
    "not positive": (f"g (float[M,8] x, float s, int8 z) => (float[M,8] y) {{ {PAIR} }}", {"s": -ONE, "z": ZERO}),
    "several scales for an activation": (
        f"g (float[M,8] x, float[8] s, int8[8] z) => (float[M,8] y) {{ {PAIR} }}",
        {"s": np.full(8, ONE), "z": np.zeros(8, np.int8)},
    ),
    "has scales that are computed; TensorRT's are constants": (
        "g (float[M,8] x, float[1] t, int8 z) => (float[M,8] y) {"
        " [e] e = ReduceMax<keepdims=0>(x)  [q] q = QuantizeLinear(x, e, z)  [d] y = DequantizeLinear(q, e, z) }",
        {"z": ZERO},
    ),
    "does not know": (
        "g (float[M,8] x) => (float[M,8] y) { q, s, z = DynamicQuantizeLinear(x)  [d] y = DequantizeLinear(q, s, z) }",
        {},
    ),
    "another node than": (
        "g (float[M,8] x, float s, int8 z) => (float[M,8] y) {"
        " [q] q = QuantizeLinear(x, s, z)  [c] y = Cast<to=1>(q) }",
        {"s": ONE, "z": ZERO},
    ),
    "blocks of INT8": (
        "g (float[M,128] x, int8[128,4] W, float[1,4] t) => (float[M,4] y) {"
        " [w] w = DequantizeLinear<axis=0, block_size=128>(W, t)  y = MatMul(x, w) }",
        {"W": np.ones((128, 4), np.int8), "t": np.full((1, 4), ONE)},
    ),
    "has blocks of 32 along 64 inputs; whole blocks of 64 or 128 are due": (
        "g (float[M,64] x, int4[64,4] W, float[2,4] t) => (float[M,4] y) {"
        " [w] w = DequantizeLinear<axis=0, block_size=32>(W, t)  y = MatMul(x, w) }",
        {"W": ir.Tensor(np.ones((64, 4), np.int8), dtype=ir.DataType.INT4), "t": np.full((2, 4), ONE)},
    ),
    "without blocks": (
        "g (float[M,64] x, int4[64,4] W, float[4] t) => (float[M,4] y) {"
        " [w] w = DequantizeLinear<axis=1>(W, t)  y = MatMul(x, w) }",
        {"W": ir.Tensor(np.ones((64, 4), np.int8), dtype=ir.DataType.INT4), "t": np.full(4, ONE)},
    ),
    "quantizes an activation to int4, which TensorRT has for weights alone": (
        f"g (float[M,8] x, float s, int4 z) => (float[M,8] y) {{ {PAIR} }}",
        {"s": ONE, "z": ir.Tensor(np.array(0, np.int8), dtype=ir.DataType.INT4)},
    ),
    "has several scales for a float8 weight, which TensorRT gives one": (
        "g (float[M,64] x, float8e4m3fn[64,4] W, float[4] t) => (float[M,4] y) {"
        " [w] w = DequantizeLinear<axis=1>(W, t)  y = MatMul(x, w) }",
        {"W": np.ones((64, 4), ml_dtypes.float8_e4m3fn), "t": np.full(4, ONE)},
    ),
    "has an odd number of 4-bit codes": (
        "g (float[M,3] x, int4[3,3] W, float[1,3] t) => (float[M,3] y) {"
        " [w] w = DequantizeLinear<axis=0, block_size=3>(W, t)  y = MatMul(x, w) }",
        {"W": ir.Tensor(np.ones((3, 3), np.int8), dtype=ir.DataType.INT4), "t": np.full((1, 3), ONE)},
    ),
    "has 3 scales along an axis of 4": (
        "g (float[M,64] x, int8[64,4] W, float[3] t) => (float[M,4] y) {"
        " [w] w = DequantizeLinear<axis=1>(W, t)  y = MatMul(x, w) }",
        {"W": np.ones((64, 4), np.int8), "t": np.full(3, ONE)},
    ),
    "has scales whose shape is not that of its blocks": (
        "g (float[M,64] x, int4[64,4] W, float[2,4] t) => (float[M,4] y) {"
        " [w] w = DequantizeLinear<axis=0, block_size=64>(W, t)  y = MatMul(x, w) }",
        {"W": ir.Tensor(np.ones((64, 4), np.int8), dtype=ir.DataType.INT4), "t": np.full((2, 4), ONE)},
    ),
    "is of the domain com.microsoft, and TensorRT reads the standard one": (
        "g (float[M,8] x, float s, int8 z) => (float[M,8] y) {"
        " [q] q = com.microsoft.QuantizeLinear(x, s, z)  [d] y = DequantizeLinear(q, s, z) }",
        {"s": ONE, "z": ZERO},
    ),
    "INT32 codes": (
        "g (float[M,4] x, int32[4] b, float t) => (float[M,4] y) { [d] d = DequantizeLinear(b, t)  y = Add(x, d) }",
        {"b": np.ones(4, np.int32), "t": ONE},
    ),
}  # fmt: skip


@pytest.mark.parametrize("rule", BROKEN)
def test_a_broken_rule_is_named(rule: str) -> None:
    text, constants = BROKEN[rule]
    found = violations(_built(text, constants))
    assert any(rule in clause and "the node '" in clause for clause in found), found


def _built(text: str, constants: dict[str, Any]) -> ir.Model:
    model = ir.from_onnx_text(f'<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]> {text}')
    for value in list(model.graph.inputs):
        if value.name in constants:
            data = constants[value.name]
            value.const_value = data if isinstance(data, ir.Tensor) else ir.tensor(data, name=value.name)
            model.graph.inputs.remove(value)
            model.graph.register_initializer(value)
    canonicalize(model)
    return model


def test_a_model_that_came_with_a_broken_pair_is_refused_by_name() -> None:
    model = model_of("""g (float[M,64] x, float[64,6] W, float s, uint8 z) => (float[M,6] y, float[M,64] r) {
        [theirs] q = QuantizeLinear(x, s, z)  r = DequantizeLinear(q, s, z)  [fc] y = MatMul(x, W) }""")
    for name, data in (("s", ONE), ("z", np.uint8(128))):
        value = next(value for value in model.graph.inputs if value.name == name)
        value.const_value = ir.tensor(data, name=name)
        model.graph.inputs.remove(value)
        model.graph.register_initializer(value)
    tiny.compile(model, [QuantizeWeights(format="int4")], [])
    with pytest.raises(TargetError, match=r"'theirs' .*UINT8 codes"):
        tiny.compile(model, [LowerTensorrt()], [])


def test_float_models_break_no_rule_and_the_blocks_are_descending() -> None:
    assert violations(model_of(MODEL)) == []
    assert list(BLOCKS) == sorted(BLOCKS, reverse=True)
    assert find_sites(model_of(MODEL)).linears


# ------------------------------------------------------------------------------------------------- why a layer is float

GROUPS: dict[str, Any] = {"granularity": "group", "group_size": 128}


def turned(site: Linear, axis: int) -> None:
    there(site.dequantize).attributes["axis"] = ir.AttrInt64("axis", axis)


def with_scale(site: Linear, scale: np.ndarray) -> None:
    value = operand(site.dequantize, 1)
    value.const_value = ir.tensor(scale.astype(np.float32), name=value.name)


def with_points(site: Linear, point: int) -> None:
    value = operand(site.dequantize, 2)
    value.const_value = ir.tensor(np.full(tiny.sizes(value), point, np.uint8), name=value.name)


SQUARE = "g (float[B,S,128] x, float[128,128] W) => (float[B,S,128] y) { [fc] y = MatMul(x, W) }"
FP8 = Fp8(granularity="tensor", first_and_last_block=True, attention=True)
FLOAT_WEIGHTS: dict[str, tuple[str, list[Pass], Any, str]] = {
    "asymmetric activations": (MATMUL, [QuantizeWeights(), QuantizeActivations(format="int8", symmetric=False)], None,
                               "its activation has a zero point, and TensorRT quantizes symmetrically"),
    "e5m2": (MATMUL, [Fp8(granularity="tensor", format="fp8_e5m2", first_and_last_block=True, attention=True)], None,
             "its weight is FLOAT8E5M2, and TensorRT's float8 is FLOAT8E4M3FN"),
    "scales of float8": (MATMUL, [FP8], lambda site: with_scale(site, np.ones(6)),
                         "its float8 weight has several scales, and TensorRT's has one"),
    "groups": (MATMUL, [QuantizeWeights(**GROUPS), INT8], None,
               "its weight has groups, and TensorRT's 8-bit weights have a scale for each output channel"),
    "along the inputs": (SQUARE, [QuantizeWeights(), INT8], lambda site: turned(site, 0),
                         "its weight has scales along the inputs, and TensorRT's lie along the outputs"),
    "along the inputs alone": (
        SQUARE, [QuantizeWeights(format="int4")], lambda site: turned(site, 0),
        "its weight has scales along the inputs alone, and TensorRT's lie along the outputs, too"),
    "zero point": (MATMUL, [QuantizeWeights(format="uint4", symmetric=False, **GROUPS)],
                   lambda site: with_points(site, 3),
                   "its weight has the zero point 3, with which its codes are no symmetric integers"),
    "scale of 0": (MATMUL, [QuantizeWeights(), INT8], lambda site: with_scale(site, np.zeros(6)),
                   "its weight has a scale that is 0, and TensorRT's are positive"),
}  # fmt: skip


@pytest.mark.parametrize("form", FLOAT_WEIGHTS)
def test_a_layer_in_another_form_is_float_again_and_the_reason_is_told(form: str) -> None:
    text, steps, change, reason = FLOAT_WEIGHTS[form]
    model = model_of(text)
    tiny.compile(model, steps, tiny.feeds(model))
    (site,) = find_sites(model).linears
    if change is not None:
        change(site)
    with pytest.raises(TargetError) as caught:  # as it was the only layer
        LowerTensorrt().apply(model, StatisticsStore())
    assert reason in str(caught.value)


def test_computed_scales_are_constants_nowhere() -> None:
    """The layer is named to the pass, and the node that computes on codes to the user."""
    model = model_of(MATMUL)
    tiny.compile(model, [QuantizeWeights(format="int4", **GROUPS)], [])
    (site,) = find_sites(model).linears
    there(site.dequantize).replace_input_with(1, site.node.inputs[0])
    form = _form(site, activation_of(site.input))
    assert form == "the scales of its weight are computed, and TensorRT's are constants"
    with pytest.raises(TargetError, match="has scales that are computed; TensorRT's are constants"):
        LowerTensorrt().apply(model, StatisticsStore())
