"""lower-int8: the integer kernel gives what the portable graph means, bias and extremes included.

The portable graph is run without ONNX Runtime's optimizations, so in float: its own fusions would use integer kernels,
and its uint8 × int8 kernel saturates on x86 CPUs without VNNI. The float64 oracle stands beside it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from passes.lower_int8 import LowerInt8
from passes.quantize_activations import QuantizeActivations
from passes.quantize_weights import QuantizeWeights
from qcompiler.rewriting.contract import Changes
from qcompiler.sites.find import find_sites
from qcompiler.statistics import StatisticsStore
from tests import tiny
from tests.oracles import quantized_linear as oracle
from tests.there import dims, operand, tensor_of, there

MATMUL = "g (float[B,S,8] x, float[8,6] W) => (float[B,S,6] y) { [fc] y = MatMul(x, W) }"
ADD_2D = "g (float[M,8] x, float[8,6] W, float[6] b) => (float[M,6] y) { [fc] p = MatMul(x, W)  y = Add(p, b) }"
ADD_3D = "g (float[B,S,8] x, float[8,6] W, float[1,1,6] b) => (float[B,S,6] y) { [fc] p = MatMul(x, W)  y = Add(b, p) }"
GEMM = "g (float[M,8] x, float[8,6] W, float[1,6] b) => (float[M,6] y) { [fc] y = Gemm(x, W, b) }"
GEMM_T = "g (float[M,8] x, float[6,8] W, float[6] b) => (float[M,6] y) { [fc] y = Gemm<transB=1>(x, W, b) }"
FUSED = "g (float[M,8] x, float[6,8] W) => (float[M,6] y) { [fc] y = com.microsoft.FusedMatMul<transB=1>(x, W) }"
SIBLINGS = """g (float[B,S,8] x, float[8,6] W, float[8,4] V) => (float[B,S,6] y, float[B,S,4] z) {
    h = Sigmoid(x)  [first] y = MatMul(h, W)  [second] z = MatMul(h, V) }"""
TIED = """g (int64[B,S] ids, float[12,8] E) => (float[B,S,12] logits) {
    [embed] x = Gather(E, ids)  T = Transpose<perm=[1,0]>(E)  [lm_head] logits = MatMul(x, T) }"""
TIED_GEMM = """g (int64[M] ids, float[12,8] E, float[12] b) => (float[M,12] logits) {
    [embed] x = Gather(E, ids)  [lm_head] logits = Gemm<transB=1>(x, E, b) }"""
LAYERS = {"matmul": MATMUL, "add-2d": ADD_2D, "add-3d": ADD_3D, "gemm": GEMM, "gemm-transposed": GEMM_T, "fused": FUSED}
ALL = {**LAYERS, "siblings": SIBLINGS, "tied": TIED, "tied-gemm": TIED_GEMM}


def model_of(text: str, half: bool = False, **constants: Any) -> ir.Model:
    names = [name for name in ("W", "V", "E", "b") if f"] {name}," in text or f"] {name})" in text]
    text = text.replace("float[", "float16[") if half else text
    return tiny.build(text, **{name: constants.get(name, "normal") for name in names})


def lower(
    model: ir.Model,
    weights: dict[str, Any] | None = None,
    activations: dict[str, Any] | None = None,
    samples: list[Any] | None = None,
) -> tuple[ir.Model, ir.Model, Changes]:
    """(portable, lowered, changes): the same codes, once in standard operators and once in the kernel's."""
    portable = model.clone()
    steps = [QuantizeWeights(**(weights or {})), QuantizeActivations(**(activations or {}))]
    tiny.compile(portable, steps, samples or tiny.feeds(model))
    lowered = portable.clone()
    (changes,) = tiny.compile(lowered, [LowerInt8()], [])
    return portable, lowered, changes


def assert_same(portable: ir.Model, lowered: ir.Model, samples: list[Any], tolerance: float = 1e-5) -> None:
    """Equal with and without ONNX Runtime's optimizations, and within the tolerance of the largest output."""
    for sample in samples:
        expected = tiny.run(portable, sample)
        for optimized in (False, True):
            for got, wanted in zip(tiny.run(lowered, sample, optimized=optimized), expected, strict=True):
                assert got.dtype == wanted.dtype
                assert np.abs(got.astype(float) - wanted).max() <= tolerance * np.abs(wanted.astype(float)).max()


@pytest.mark.parametrize("activations", [{}, {"format": "int8"}, {"symmetric": True}], ids=["u8", "s8", "u8-symmetric"])
@pytest.mark.parametrize(
    "weights",
    [
        {"format": "int8"},
        {"format": "uint8"},
        {"format": "uint8", "symmetric": False},
        {"format": "int8", "symmetric": False},
    ],
    ids=["s8", "u8", "u8-asymmetric", "s8-asymmetric"],
)
@pytest.mark.parametrize("layer", ALL)
def test_the_kernel_gives_what_the_graph_means(
    layer: str, weights: dict[str, Any], activations: dict[str, Any]
) -> None:
    model = model_of(ALL[layer])
    portable, lowered, changes = lower(model, weights, activations)
    assert not changes.skipped
    assert {c.kernel for c in changes.changed} == {"MatMulIntegerToFloat"}
    assert not find_sites(lowered).linears
    operators = tiny.operators(lowered)
    assert not {"MatMul", "Gemm", "DequantizeLinear", "FusedMatMul"} & set(operators)
    assert operators.count("QuantizeLinear") == 1
    for node in lowered.graph:
        if node.op_type == "MatMulIntegerToFloat":
            assert [operand(node, i).dtype for i in (0, 1, 4, 5)] == [ir.DataType.UINT8] * 4
    assert_same(portable, lowered, tiny.feeds(model))


@pytest.mark.parametrize("layer", [name for name in ALL if name not in ("siblings", "tied", "tied-gemm")])
def test_against_the_oracle(layer: str) -> None:
    model = model_of(ALL[layer])
    samples = tiny.feeds(model)
    portable, lowered, _ = lower(model, {"format": "uint8"})
    (site,) = find_sites(portable).linears
    W = tiny.data(model, "W").T if site.transposed else tiny.data(model, "W")
    x = np.concatenate([s["x"].reshape(-1, 8) for s in samples])
    s_x, z_x = oracle.affine(float(x.min()), float(x.max()), 0, 255)
    s_w = np.abs(W).max(0) / np.float32(127)
    q_w = oracle.codes(W, s_w, 128, 0, 255)
    bias = tiny.data(model, "b") if "b" in model.graph.initializers else None
    for sample in samples:
        y = oracle.product(oracle.codes(sample["x"], s_x, z_x, 0, 255), s_x, z_x, q_w, s_w, 128, bias)
        np.testing.assert_allclose(tiny.run(lowered, sample, optimized=True)[0], y, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("layer", ["matmul", "gemm", "gemm-transposed"])
def test_scales_of_a_tensor(layer: str, granularity: str) -> None:
    model = model_of(ALL[layer])
    portable, lowered, changes = lower(model, {"granularity": granularity})
    assert not changes.skipped
    assert_same(portable, lowered, tiny.feeds(model))


@pytest.mark.parametrize("weights", [{"format": "int8"}, {"format": "uint8"}], ids=["s8", "u8"])
@pytest.mark.parametrize("layer", ALL)
def test_half_precision(layer: str, weights: dict[str, Any]) -> None:
    """The sums are float32 in the kernel; the portable graph is run by the same rule, so float16 rounds once."""
    model = model_of(ALL[layer], half=True)
    portable, lowered, changes = lower(model, weights)
    assert not changes.skipped
    assert_same(portable, lowered, tiny.feeds(model), tolerance=2e-3)
    outputs = {value.name: value.dtype for value in lowered.graph.outputs}
    assert set(outputs.values()) == {ir.DataType.FLOAT16}


def test_half_precision_behind_an_operator_of_unknown_type() -> None:
    model = tiny.build(
        """g (float16[B,S,8] x, float16[B,S,8] r, float16[8] g, float16[8,8] W, float16[8,6] V) => (float16[B,S,6] y) {
        n = com.microsoft.SkipSimplifiedLayerNormalization(x, r, g)  [first] h = MatMul(n, W)
        m = com.microsoft.SkipSimplifiedLayerNormalization(h, x, g)  [second] y = MatMul(m, V) }""",
        g="gain", W="normal", V="normal",
    )  # fmt: skip
    portable, lowered, changes = lower(model)
    assert len(changes.changed) == 2
    assert_same(portable, lowered, tiny.feeds(model), tolerance=0.02)  # a code of the second input may differ


@pytest.mark.parametrize("code", [127, -127])
@pytest.mark.parametrize("format", ["int8", "uint8"])
@pytest.mark.parametrize("features", [64, 1024])
def test_extreme_codes_do_not_saturate(format: str, code: int, features: int) -> None:
    """All activations at 255 and all weights at ±127: every pair of products overflows 16 bits."""
    W = np.full((features, 32), code / 127, np.float32)
    text = f"g (float[M,{features}] x, float[{features},32] W) => (float[M,32] y) {{ [fc] y = MatMul(x, W) }}"
    model = tiny.build(text, W=W)
    samples = [{"x": np.ones((3, features), np.float32)}]
    portable, lowered, _ = lower(model, {"format": format}, samples=samples)
    expected = np.full((3, 32), features * np.sign(code), np.float32)
    for optimized in (False, True):
        np.testing.assert_allclose(tiny.run(lowered, samples[0], optimized=optimized)[0], expected, rtol=1e-5)
    assert_same(portable, lowered, samples)


def test_random_codes_of_full_range_do_not_saturate() -> None:
    rng = np.random.default_rng(0)
    W = rng.choice([-1.0, 1.0, 0.9], size=(256, 48)).astype(np.float32)
    model = tiny.build("g (float[M,256] x, float[256,48] W) => (float[M,48] y) { [fc] y = MatMul(x, W) }", W=W)
    samples = [{"x": rng.choice([0.0, 1.0, 0.97], size=(9, 256)).astype(np.float32)}]
    portable, lowered, _ = lower(model, {"format": "int8"}, samples=samples)
    assert_same(portable, lowered, samples)


# ------------------------------------------------------------------------------------------------- what is stored


def matrices(model: ir.Model, size: int) -> list[ir.Value]:
    return [value for value in model.graph.initializers.values() if tensor_of(value).size == size]


def test_a_transposed_weight_of_one_layer_is_stored_transposed() -> None:
    _, lowered, _ = lower(model_of(GEMM_T))
    (stored,) = matrices(lowered, 48)
    assert dims(stored) == [8, 6]
    assert "Transpose" not in tiny.operators(lowered)


@pytest.mark.parametrize("text", [TIED, TIED_GEMM], ids=["transpose", "gemm"])
def test_a_tied_embedding_is_stored_once(text: str) -> None:
    _, lowered, _ = lower(model_of(text), {"format": "uint8"})
    assert len(matrices(lowered, 96)) == 1


@pytest.mark.parametrize("text", [TIED, TIED_GEMM], ids=["transpose", "gemm"])
def test_a_tied_weight_is_turned_when_the_session_is_made(text: str, tmp_path: Path) -> None:
    """ONNX Runtime folds the Transpose, so that the kernel gets a constant (which it packs once)."""
    _, lowered, _ = lower(model_of(text), {"format": "uint8"})
    nodes = tiny.optimized_nodes(lowered, tmp_path / "optimized.onnx")
    assert [node.op_type for node in nodes if node.op_type in ("Transpose", "MatMulIntegerToFloat")] == [
        "MatMulIntegerToFloat"
    ]


def test_siblings_share_the_quantized_activation() -> None:
    _, lowered, _ = lower(model_of(SIBLINGS), activations={"format": "int8"})
    kernels = [node for node in lowered.graph if node.op_type == "MatMulIntegerToFloat"]
    for index in (0, 2, 4):
        assert kernels[0].inputs[index] is kernels[1].inputs[index]


def test_layers_that_share_a_weight_share_it_lowered() -> None:
    model = tiny.build(
        """g (float[B,S,8] x, float[8,8] W) => (float[B,S,8] z) {
        [first] y = MatMul(x, W)  h = Relu(y)  [second] z = MatMul(h, W) }""",
        W="normal",
    )  # fmt: skip
    portable, lowered, changes = lower(model)
    assert len(changes.changed) == 2
    assert len(matrices(lowered, 64)) == 1
    assert_same(portable, lowered, tiny.feeds(model))


def test_one_square_constant_read_in_both_directions() -> None:
    """With one scale for the tensor a MatMul and a Gemm can share codes, which one of them reads transposed."""
    portable = tiny.build(
        """g (float[M,8] x, uint8[8,8] Q, float s, uint8 z) => (float[M,8] y1, float[M,8] y2) {
        q = QuantizeLinear(x, s, z)  d = DequantizeLinear(q, s, z)  w = DequantizeLinear(Q, s, z)
        [first] y1 = MatMul(d, w)  [second] y2 = Gemm<transB=1>(d, w) }""",
        Q=np.random.default_rng(0).integers(0, 256, (8, 8)).astype(np.uint8), s=np.float32(0.02), z=np.uint8(128),
    )  # fmt: skip
    lowered = portable.clone()
    (changes,) = tiny.compile(lowered, [LowerInt8()], [])
    assert len(changes.changed) == 2
    assert_same(portable, lowered, tiny.feeds(portable))


# ------------------------------------------------------------------------------------------------- what is not done


def test_blocked_scales_are_skipped_with_the_reason() -> None:
    """The activation is read as float: ONNX Runtime would fuse the pair into a kernel that fails at the first run."""
    model = model_of(MATMUL)
    _, lowered, changes = lower(model, {"granularity": "group", "group_size": 4})
    assert "blocked" in tiny.reasons(changes)["fc"]
    assert tiny.operators(lowered) == ["DequantizeLinear", "MatMul"]
    weights_alone = model.clone()
    tiny.compile(weights_alone, [QuantizeWeights(granularity="group", group_size=4)], [])
    assert_same(weights_alone, lowered, tiny.feeds(model))


def test_wide_activations_are_skipped_with_the_reason() -> None:
    _, _, changes = lower(model_of(MATMUL), activations={"format": "uint16"})
    assert "UINT16 codes" in tiny.reasons(changes)["fc"]


def test_wide_weights_are_skipped_with_the_reason() -> None:
    _, _, changes = lower(model_of(MATMUL), {"format": "int16"})
    assert "8 bits or fewer" in tiny.reasons(changes)["fc"]


@pytest.mark.parametrize("weights", [{"format": "int4"}, {"format": "uint4", "symmetric": False}], ids=["s4", "u4"])
@pytest.mark.parametrize("layer", LAYERS)
def test_weights_of_four_bits_are_cast_when_the_session_is_made(
    layer: str, weights: dict[str, Any], tmp_path: Path
) -> None:
    model = model_of(ALL[layer])
    portable, lowered, changes = lower(model, weights)
    assert not changes.skipped
    assert "Cast" in tiny.operators(lowered)
    nodes = tiny.optimized_nodes(lowered, tmp_path / "optimized.onnx")
    assert "Cast" not in {node.op_type for node in nodes}
    assert_same(portable, lowered, tiny.feeds(model))


def test_scales_along_the_inputs_are_skipped_with_the_reason() -> None:
    """A quantized model from elsewhere can have one scale for each row of [K, N], which the kernel cannot take."""
    portable, _, _ = lower(model_of("g (float[M,8] x, float[8,8] W) => (float[M,8] y) { [fc] y = MatMul(x, W) }"))
    (site,) = find_sites(portable).linears
    there(site.dequantize).attributes["axis"] = ir.AttrInt64("axis", 0)
    (changes,) = tiny.compile(portable, [LowerInt8()], [])
    assert tiny.reasons(changes)["fc"] == (
        "its weight has scales along the inputs, and the integer kernel takes one for each output channel"
    )
    there(site.dequantize).replace_input_with(1, portable.graph.inputs[0])
    changes = LowerInt8().apply(portable, StatisticsStore())
    assert (
        tiny.reasons(changes)["fc"] == "the scales of its weight are computed, and the integer kernel's are constants"
    )


def test_weight_only_layers_are_left_to_others() -> None:
    model = model_of(SIBLINGS)
    _, lowered, changes = lower(model, activations={"ignore": ("second",)})
    assert [c.site for c in changes.changed] == ["first"]
    assert not changes.skipped
    assert "DequantizeLinear" in tiny.operators(lowered)


def test_a_product_that_others_read_keeps_its_add() -> None:
    model = model_of(
        """g (float[M,8] x, float[8,6] W, float[6] b) => (float[M,6] p, float[M,6] y) {
        [fc] p = MatMul(x, W)  y = Add(p, b) }"""
    )
    portable, lowered, _ = lower(model)
    assert tiny.operators(lowered) == ["QuantizeLinear", "MatMulIntegerToFloat", "Add"]
    assert_same(portable, lowered, tiny.feeds(model))


def test_convolutions_run_as_integers_in_onnxruntime(tmp_path: Path) -> None:
    """They stay in standard operators, which ONNX Runtime fuses; with uint8 codes of weights its kernel is exact."""
    model = tiny.build(
        """g (float[B,3,9,9] x, float[4,3,3,3] W, float[4] b, float[5,4,3,3] V) => (float[B,5,5,5] z) {
        [conv1] c = Conv(x, W, b)  r = Relu(c)  [conv2] y = Conv(r, V)  z = Relu(y) }""",
        W="normal", b="normal", V="normal",
    )  # fmt: skip
    portable, lowered, changes = lower(model, {"format": "uint8"})
    assert not changes.changed
    names = [node.op_type for node in tiny.optimized_nodes(lowered, tmp_path / "optimized.onnx")]
    assert names.count("QLinearConv") >= 1
    sample = tiny.feeds(model)[0]
    expected, got = tiny.run(portable, sample)[0], tiny.run(lowered, sample, optimized=True)[0]
    assert tiny.relative_error(got, expected) < 0.01


def test_signs_with_computed_scales_are_skipped_with_the_reason() -> None:
    model = model_of(MATMUL)
    tiny.compile(model, [QuantizeWeights(format="binary"), QuantizeActivations()], tiny.feeds(model))
    (site,) = find_sites(model).linears
    there(site.dequantize).replace_input_with(1, model.graph.inputs[0])
    changes = LowerInt8().apply(model, StatisticsStore())
    assert tiny.reasons(changes) == {
        "fc": "its weight has no constant scale for each output channel, so its activation stays float"
    }
