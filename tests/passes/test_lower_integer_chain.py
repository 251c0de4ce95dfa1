"""lower-integer-chain: the chain of CUDA gives what the portable graph means; all of its operators run on CPUs, too.

The portable graph is run without ONNX Runtime's optimizations, the chain with and without them. The float64 oracle
stands beside it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from passes.lower_integer_chain import LowerIntegerChain
from passes.quantize_activations import QuantizeActivations
from passes.quantize_weights import QuantizeWeights
from qcompiler.rewriting.contract import Changes
from qcompiler.sites.find import find_sites
from tests import tiny
from tests.oracles import quantized_linear as oracle
from tests.there import operand, tensor_of

MATMUL = "g (float[B,S,8] x, float[8,6] W) => (float[B,S,6] y) { [fc] y = MatMul(x, W) }"
FOUR = "g (float[B,2,S,8] x, float[8,6] W) => (float[B,2,S,6] y) { [fc] y = MatMul(x, W) }"
VECTOR = "g (float[8] x, float[8,6] W) => (float[6] y) { [fc] y = MatMul(x, W) }"
ADD_2D = "g (float[M,8] x, float[8,6] W, float[6] b) => (float[M,6] y) { [fc] p = MatMul(x, W)  y = Add(p, b) }"
ADD_3D = "g (float[B,S,8] x, float[8,6] W, float[1,1,6] b) => (float[B,S,6] y) { [fc] p = MatMul(x, W)  y = Add(b, p) }"
GEMM = "g (float[M,8] x, float[8,6] W, float[1,6] b) => (float[M,6] y) { [fc] y = Gemm(x, W, b) }"
GEMM_T = "g (float[M,8] x, float[6,8] W, float[6] b) => (float[M,6] y) { [fc] y = Gemm<transB=1>(x, W, b) }"
FUSED = "g (float[M,8] x, float[6,8] W) => (float[M,6] y) { [fc] y = com.microsoft.FusedMatMul<transB=1>(x, W) }"
SIBLINGS = """g (float[B,S,8] x, float[8,6] W, float[8,4] V) => (float[B,S,6] y, float[B,S,4] z) {
    h = Sigmoid(x)  [first] y = MatMul(h, W)  [second] z = MatMul(h, V) }"""
TIED = """g (int64[B,S] ids, float[12,8] E) => (float[B,S,12] logits) {
    [embed] x = Gather(E, ids)  T = Transpose<perm=[1,0]>(E)  [lm_head] logits = MatMul(x, T) }"""
LAYERS = {
    "matmul": MATMUL, "rank-4": FOUR, "rank-1": VECTOR, "add-2d": ADD_2D, "add-3d": ADD_3D, "gemm": GEMM,
    "gemm-transposed": GEMM_T, "fused": FUSED, "siblings": SIBLINGS, "tied": TIED,
}  # fmt: skip
ACTIVATIONS: dict[str, dict[str, Any]] = {
    "token": {"granularity": "token"},
    "token-int4": {"granularity": "token", "format": "int4"},
    "tensor": {"dynamic": True},
    "static-u8": {},
    "static-s8": {"format": "int8"},
    "static-s8-symmetric": {"format": "int8", "symmetric": True},
}
WEIGHTS: dict[str, dict[str, Any]] = {
    "s8": {"format": "int8"}, "u8": {"format": "uint8"}, "s4": {"format": "int4"}, "u4": {"format": "uint4"},
    "s8-tensor": {"format": "int8", "granularity": "tensor", "symmetric": False},
    "u8-tensor": {"format": "uint8", "granularity": "tensor", "symmetric": False},
}  # fmt: skip
# The CPU computes a Sigmoid in float32, and its result is not always rounded to float16 before it is quantized.
HALF_TOLERANCES = {"siblings": 0.02}


def model_of(text: str, half: bool = False, **constants: Any) -> ir.Model:
    names = [name for name in ("W", "V", "E", "b") if f"] {name}," in text or f"] {name})" in text]
    text = text.replace("float[", "float16[") if half else text
    return tiny.build(text, **{name: constants.get(name, "normal") for name in names})


def lower(
    model: ir.Model, weights: dict[str, Any] | None = None, activations: dict[str, Any] | None = None,
    samples: list[Any] | None = None, **options: Any,
) -> tuple[ir.Model, ir.Model, Changes]:  # fmt: skip
    """(portable, lowered, changes): the same codes, once in standard operators and once in the chain's."""
    portable = model.clone()
    steps = [QuantizeWeights(**(weights or {})), QuantizeActivations(**(activations or ACTIVATIONS["token"]))]
    tiny.compile(portable, steps, samples or tiny.feeds(model))
    lowered = portable.clone()
    (changes,) = tiny.compile(lowered, [LowerIntegerChain(**options)], [])
    return portable, lowered, changes


def assert_same(portable: ir.Model, lowered: ir.Model, samples: list[Any], tolerance: float = 1e-5) -> None:
    """Equal with and without ONNX Runtime's optimizations, and within the tolerance of the largest output."""
    for sample in samples:
        expected = tiny.run(portable, sample)
        for optimized in (False, True):
            for got, wanted in zip(tiny.run(lowered, sample, optimized=optimized), expected, strict=True):
                assert got.dtype == wanted.dtype
                assert got.shape == wanted.shape
                assert np.abs(got.astype(float) - wanted).max() <= tolerance * np.abs(wanted.astype(float)).max()


# An embedding has a scale and a zero point for each row, and its codes are no smaller than what Gather reads.
CASES = [(layer, kind) for layer in LAYERS for kind in WEIGHTS if layer != "tied" or kind in ("s8", "u8")]


@pytest.mark.parametrize("activations", ACTIVATIONS)
@pytest.mark.parametrize(("layer", "weights"), CASES)
def test_the_chain_gives_what_the_graph_means(layer: str, weights: str, activations: str) -> None:
    model = model_of(LAYERS[layer])
    portable, lowered, changes = lower(model, WEIGHTS[weights], ACTIVATIONS[activations])
    assert not changes.skipped
    assert {c.kernel for c in changes.changed} == {"MatMulInteger"}
    assert not find_sites(lowered).linears
    operators = tiny.operators(lowered)
    assert not {"MatMul", "Gemm", "DequantizeLinear", "FusedMatMul", "DynamicQuantizeLinear"} & set(operators)
    assert not lowered.functions
    assert operators.count("QuantizeLinear") == 1  # siblings share it
    for node in lowered.graph:
        if node.op_type == "MatMulInteger":
            assert [operand(node, i).dtype for i in (0, 1)] == [ir.DataType.INT8] * 2
    assert_same(portable, lowered, tiny.feeds(model))


@pytest.mark.parametrize("layer", ["matmul", "add-3d", "gemm", "gemm-transposed"])
def test_per_token_against_the_oracle(layer: str) -> None:
    """Vector-wise quantization in float64: a scale for each row of x and for each column of W."""
    model = model_of(LAYERS[layer])
    portable, lowered, _ = lower(model)
    (site,) = find_sites(portable).linears
    W = tiny.data(model, "W").T if site.transposed else tiny.data(model, "W")
    s_w = np.abs(W).max(0) / np.float32(127)
    q_w = oracle.codes(W, s_w, 0, -127, 127)
    bias = tiny.data(model, "b") if "b" in model.graph.initializers else None
    for sample in tiny.feeds(model):
        s_x = np.abs(sample["x"]).max(-1, keepdims=True) / np.float32(127)
        y = oracle.product(oracle.codes(sample["x"], s_x, 0, -127, 127), s_x, 0, q_w, s_w, 0, bias)
        np.testing.assert_allclose(tiny.run(lowered, sample)[0], y, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("activations", ["token", "tensor", "static-u8"])
@pytest.mark.parametrize("layer", LAYERS)
def test_half_precision(layer: str, activations: str) -> None:
    """The sums are float32 until the end, and so is the portable graph as it is run here: float16 rounds once."""
    model = model_of(LAYERS[layer], half=True)
    portable, lowered, changes = lower(model, {}, ACTIVATIONS[activations])
    assert not changes.skipped
    assert_same(portable, lowered, tiny.feeds(model), tolerance=HALF_TOLERANCES.get(layer, 2e-3))
    assert {value.dtype for value in lowered.graph.outputs} == {ir.DataType.FLOAT16}


def test_half_precision_does_not_overflow() -> None:
    """The integer sums are up to 127 · 127 · K, which float16 cannot hold."""
    model = tiny.build(
        "g (float16[M,64] x, float16[64,6] W) => (float16[M,6] y) { [fc] y = MatMul(x, W) }",
        W=np.full((64, 6), 0.5, np.float16),
    )
    samples = [{"x": np.full((3, 64), 0.25, np.float16)}]
    _, lowered, _ = lower(model, samples=samples)
    np.testing.assert_allclose(tiny.run(lowered, samples[0], optimized=True)[0], np.full((3, 6), 8.0), rtol=1e-3)


@pytest.mark.parametrize("cudnn", [True, False])
@pytest.mark.parametrize("activations", ["token", "tensor"])
@pytest.mark.parametrize("half", [False, True])
def test_without_cudnn_the_largest_comes_from_topk(activations: str, half: bool, cudnn: bool) -> None:
    model = model_of(SIBLINGS, half)
    portable, lowered, _ = lower(model, {}, ACTIVATIONS[activations], cudnn=cudnn)
    operators = set(tiny.operators(lowered))
    assert ("TopK" in operators) != cudnn
    assert bool({"ReduceMax", "ReduceMin"} & operators) == cudnn
    assert_same(portable, lowered, tiny.feeds(model), HALF_TOLERANCES["siblings"] if half else 1e-5)


@pytest.mark.parametrize("activations", ["token", "tensor"])
@pytest.mark.parametrize(
    "x",
    [
        np.zeros((2, 3, 8), np.float32),
        np.concatenate([np.zeros((1, 3, 8)), np.full((1, 3, 8), 3.0)]).astype(np.float32),
        np.full((2, 3, 8), -5.0, np.float32),
        np.geomspace(1e-30, 1e30, 48, dtype=np.float32).reshape(2, 3, 8),
        np.full((1, 1, 8), 1e-40, np.float32),
        np.zeros((0, 3, 8), np.float32),
    ],
    ids=["zeros", "a-row-of-zeros", "negative", "wide", "subnormal", "empty"],
)
def test_extremes(activations: str, x: np.ndarray) -> None:
    model = model_of(MATMUL)
    portable, lowered, _ = lower(model, {}, ACTIVATIONS[activations])
    if not x.size:
        if activations == "token":
            assert tiny.run(lowered, {"x": x})[0].shape == (0, 3, 6)
        return
    with np.errstate(under="ignore"):
        expected, got = tiny.run(portable, {"x": x})[0], tiny.run(lowered, {"x": x})[0]
    assert np.isfinite(got).all()
    assert np.abs(got - expected).max() <= 1e-5 * np.abs(expected).max() + 1e-35


def test_a_value_of_unknown_rank() -> None:
    """Shape inference stops at operators of ONNX Runtime."""
    model = tiny.build(
        """g (float[B,S,8] x, float[8] g, float[8,6] W) => (float[B,S,6] y) {
        n = com.microsoft.SkipSimplifiedLayerNormalization(x, x, g)  [fc] y = MatMul(n, W) }""",
        g="gain", W="normal",
    )  # fmt: skip
    for activations in ("token", "tensor", "static-s8"):
        portable, lowered, changes = lower(model, {}, ACTIVATIONS[activations])
        assert changes.changed
        assert_same(portable, lowered, tiny.feeds(model), tolerance=0.02)  # a code may differ: the norm's own rounding


def test_wide_layers_keep_their_sums_exact() -> None:
    W = np.full((4096, 8), 1.0, np.float32)
    model = tiny.build("g (float[M,4096] x, float[4096,8] W) => (float[M,8] y) { [fc] y = MatMul(x, W) }", W=W)
    samples = [{"x": np.full((2, 4096), 2.0, np.float32)}]
    for activations in ("token", "tensor", "static-u8"):
        _, lowered, _ = lower(model, {}, ACTIVATIONS[activations], samples)
        np.testing.assert_allclose(tiny.run(lowered, samples[0])[0], np.full((2, 8), 8192.0), rtol=1e-6)


def test_one_square_constant_read_in_both_directions() -> None:
    portable = tiny.build(
        """g (float[M,8] x, uint8[8,8] Q, float s, uint8 z) => (float[M,8] y1, float[M,8] y2) {
        q = QuantizeLinear(x, s, z)  d = DequantizeLinear(q, s, z)  w = DequantizeLinear(Q, s, z)
        [first] y1 = MatMul(d, w)  [second] y2 = Gemm<transB=1>(d, w) }""",
        Q=np.random.default_rng(0).integers(0, 256, (8, 8)).astype(np.uint8), s=np.float32(0.02), z=np.uint8(120),
    )  # fmt: skip
    lowered = portable.clone()
    (changes,) = tiny.compile(lowered, [LowerIntegerChain()], [])
    assert len(changes.changed) == 2
    assert_same(portable, lowered, tiny.feeds(portable))


def test_a_tied_embedding_keeps_its_codes() -> None:
    _, lowered, _ = lower(model_of(TIED), {"format": "int8"})
    assert [v.dtype for v in lowered.graph.initializers.values() if tensor_of(v).size == 96] == [ir.DataType.INT8]


def test_padded_operands_are_reported() -> None:
    _, _, changes = lower(model_of(MATMUL))
    assert changes.changed[0].detail.startswith("K = 8 and N = 6 not a multiple of 32")
    wide = tiny.build("g (float[M,64] x, float[64,32] W) => (float[M,32] y) { [fc] y = MatMul(x, W) }", W="normal")
    assert not lower(wide)[2].changed[0].detail


# ------------------------------------------------------------------------------------------------- what is not done


def test_static_activations_of_blocked_weights_are_float_again() -> None:
    model = model_of(MATMUL)
    groups: dict[str, Any] = {"granularity": "group", "group_size": 4}
    _, lowered, changes = lower(model, groups, ACTIVATIONS["static-s8"])
    assert "blocked" in tiny.reasons(changes)["fc"]
    assert tiny.operators(lowered) == ["DequantizeLinear", "MatMul"]
    weights_alone = model.clone()
    tiny.compile(weights_alone, [QuantizeWeights(**groups)], [])
    assert_same(weights_alone, lowered, tiny.feeds(model))


@pytest.mark.parametrize("activations", ["token", "tensor"])
def test_dynamic_activations_of_blocked_weights_are_left_to_lower_weight_only(activations: str) -> None:
    groups = {"granularity": "group", "group_size": 4}
    portable, lowered, changes = lower(model_of(MATMUL), groups, ACTIVATIONS[activations])
    assert not changes.changed
    assert not changes.skipped
    assert tiny.operators(lowered) == tiny.operators(portable)


def test_different_zero_points_are_skipped_with_the_reason() -> None:
    portable, lowered, changes = lower(model_of(MATMUL), {"format": "uint8", "symmetric": False})
    assert "zero points" in tiny.reasons(changes)["fc"]
    assert tiny.operators(lowered) == tiny.operators(portable)


def test_wide_codes_are_skipped_with_the_reason() -> None:
    _, _, changes = lower(model_of(MATMUL), {}, {"format": "uint16"})
    assert "8 bits" in tiny.reasons(changes)["fc"]
    _, _, changes = lower(model_of(MATMUL), {"format": "int16"})
    assert "8 bits" in tiny.reasons(changes)["fc"]


def test_weight_only_layers_are_left_to_others() -> None:
    _, lowered, changes = lower(model_of(SIBLINGS), {}, {"granularity": "token", "ignore": ("second",)})
    assert [c.site for c in changes.changed] == ["first"]
    assert not changes.skipped
    assert "DequantizeLinear" in tiny.operators(lowered)


def test_a_product_that_others_read_keeps_its_add() -> None:
    model = model_of(
        """g (float[M,8] x, float[8,6] W, float[6] b) => (float[M,6] p, float[M,6] y) {
        [fc] p = MatMul(x, W)  y = Add(p, b) }"""
    )
    portable, lowered, _ = lower(model)
    assert tiny.operators(lowered)[-1] == "Add"
    assert_same(portable, lowered, tiny.feeds(model))
