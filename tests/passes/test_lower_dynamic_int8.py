"""lower-dynamic-int8: one integer kernel a layer, with the numbers of the portable graph, whatever the model's form.

The portable graph is run without ONNX Runtime's optimizations, so in float; the float64 oracle stands beside it.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from passes.lower_dynamic_int8 import LowerDynamicInt8
from passes.lower_weight_only import LowerWeightOnly
from passes.quantize_activations import QuantizeActivations
from passes.quantize_weights import QuantizeWeights
from qcompiler.rewriting.contract import Changes
from qcompiler.sites.find import find_sites
from tests import tiny
from tests.there import dims, operand, tensor_of, tensors, there

MATMUL = "g (float[B,S,8] x, float[8,6] W) => (float[B,S,6] y) { [fc] y = MatMul(x, W) }"
ADD_2D = "g (float[M,8] x, float[8,6] W, float[6] b) => (float[M,6] y) { [fc] p = MatMul(x, W)  y = Add(p, b) }"
ADD_3D = "g (float[B,S,8] x, float[8,6] W, float[1,1,6] b) => (float[B,S,6] y) { [fc] p = MatMul(x, W)  y = Add(b, p) }"
GEMM = "g (float[M,8] x, float[8,6] W, float[1,6] b) => (float[M,6] y) { [fc] y = Gemm(x, W, b) }"
GEMM_T = "g (float[M,8] x, float[6,8] W, float[6] b) => (float[M,6] y) { [fc] y = Gemm<transB=1>(x, W, b) }"
FUSED = "g (float[M,8] x, float[6,8] W) => (float[M,6] y) { [fc] y = com.microsoft.FusedMatMul<transB=1>(x, W) }"
RANK_1 = "g (float[8] x, float[8,6] W, float[6] b) => (float[6] y) { [fc] p = MatMul(x, W)  y = Add(p, b) }"
RANK_4 = "g (float[B,2,S,8] x, float[8,6] W) => (float[B,2,S,6] y) { [fc] y = MatMul(x, W) }"
HEADS = """g (float[B,S,2,4] x, float[8,6] W, int64[3] joined) => (float[B,S,6] y) {
    t = Transpose<perm=[1,0,2,3]>(x)  u = Transpose<perm=[1,0,2,3]>(t)  r = Reshape(u, joined)
    [fc] y = MatMul(r, W) }"""
SIBLINGS = """g (float[B,S,8] x, float[8,6] W, float[8,4] V, float[4] b) => (float[B,S,6] y, float[B,S,4] z) {
    h = Sigmoid(x)  [first] y = MatMul(h, W)  [second] p = MatMul(h, V)  z = Add(p, b) }"""
CHAIN = """g (float[M,8] x, float[8,8] W, float[8,6] V, float[6] b) => (float[M,6] z) {
    [first] y = MatMul(x, W)  [second] p = MatMul(y, V)  z = Add(p, b) }"""
TIED = """g (int64[B,S] ids, float[12,8] E) => (float[B,S,12] logits) {
    [embed] x = Gather(E, ids)  T = Transpose<perm=[1,0]>(E)  [lm_head] logits = MatMul(x, T) }"""
TIED_GEMM = """g (int64[M] ids, float[12,8] E, float[12] b) => (float[M,12] logits) {
    [embed] x = Gather(E, ids)  [lm_head] logits = Gemm<transB=1>(x, E, b) }"""
ALL = {
    "matmul": MATMUL, "add-2d": ADD_2D, "add-3d": ADD_3D, "gemm": GEMM, "gemm-transposed": GEMM_T, "fused": FUSED,
    "rank-1": RANK_1, "rank-4": RANK_4, "heads": HEADS, "siblings": SIBLINGS, "chain": CHAIN, "tied": TIED,
    "tied-gemm": TIED_GEMM,
}  # fmt: skip
TENSOR, TOKEN = {"dynamic": True, "granularity": "tensor"}, {"dynamic": True, "granularity": "token"}
KERNELS = {"MatMulIntegerToFloat", "DynamicQuantizeMatMul"}


def model_of(text: str, half: bool = False, opset: int = 21, **constants: Any) -> ir.Model:
    names = [name for name in ("W", "V", "E", "b") if f"] {name}," in text or f"] {name})" in text]
    if "joined" in text:
        constants["joined"] = np.array([0, 0, 8], np.int64)
    text = text.replace("float[", "float16[") if half else text
    given = {name: constants.pop(name, "normal") for name in names}
    return tiny.build(text, opset=opset, **given, **constants)


def feeds(model: ir.Model) -> list[dict[str, np.ndarray]]:
    """Rows of very different size, one of them zeros."""
    rng, samples = np.random.default_rng(1), tiny.feeds(model)
    for sample in samples:
        for name, data in sample.items():
            if data.dtype.kind == "f" and data.ndim > 1:
                rows = np.exp(2 * rng.normal(size=(*data.shape[:-1], 1)))
                rows.reshape(-1)[1] = 0
                sample[name] = (data * rows).astype(data.dtype)
    return samples


def lower(
    model: ir.Model,
    activations: dict[str, Any],
    weights: dict[str, Any] | None = None,
    samples: list[Any] | None = None,
) -> tuple[ir.Model, ir.Model, Changes]:
    """(portable, lowered, changes): the same codes, once in the portable form and once in the kernel's."""
    portable = model.clone()
    steps = [QuantizeWeights(**(weights or {})), QuantizeActivations(**activations)]
    tiny.compile(portable, steps, samples or feeds(model))
    lowered = portable.clone()
    (changes,) = tiny.compile(lowered, [LowerDynamicInt8()], [])
    return portable, lowered, changes


def assert_same(portable: ir.Model, lowered: ir.Model, samples: list[Any], tolerance: float = 1e-5) -> None:
    """Row by row equal, with and without ONNX Runtime's optimizations, within the tolerance of each row's largest."""
    for sample in samples:
        expected = tiny.run(portable, sample)
        for optimized in (False, True):
            for got, wanted in zip(tiny.run(lowered, sample, optimized=optimized), expected, strict=True):
                assert got.dtype == wanted.dtype
                assert got.shape == wanted.shape
                largest = np.abs(wanted.astype(float)).max(axis=-1, keepdims=True)
                assert np.all(np.abs(got.astype(float) - wanted) <= tolerance * largest + 1e-30)


@pytest.mark.parametrize(
    "weights",
    [
        {"format": "int8"},
        {"format": "int8", "saturation_safe": True},
        {"format": "uint8"},
        {"format": "uint8", "symmetric": False},
        {"format": "int4"},
        {"format": "uint4", "symmetric": False},
        {"format": "int8", "granularity": "tensor"},
    ],
    ids=["s8", "s8-safe", "u8", "u8-asymmetric", "s4", "u4-asymmetric", "s8-tensor"],
)
@pytest.mark.parametrize("activations", [TENSOR, TOKEN], ids=["tensor", "token"])
@pytest.mark.parametrize("layer", ALL)
def test_the_kernel_gives_what_the_graph_means(
    layer: str, activations: dict[str, Any], weights: dict[str, Any]
) -> None:
    model = model_of(ALL[layer])
    if "embed" in ALL[layer] and weights["format"].endswith("4"):
        weights = {**weights, "layers": ("head",)}  # no Gather takes 4 bits
    portable, lowered, changes = lower(model, activations, weights)
    assert not changes.skipped
    sites = find_sites(portable).linears
    assert len(changes.changed) == len(sites)
    assert not find_sites(lowered).linears
    counts = Counter(tiny.operators(lowered))
    assert counts["MatMulIntegerToFloat"] + counts["DynamicQuantizeMatMul"] == len(sites)
    assert not {"MatMul", "Gemm", "FusedMatMul", "DynamicQuantizePerToken", "DequantizePerToken"} & set(counts)
    assert not lowered.functions
    assert_same(portable, lowered, feeds(model))


@pytest.mark.parametrize("weights", [{"saturation_safe": True}, {"format": "uint8"}, {"format": "int4"}], ids=str)
@pytest.mark.parametrize("activations", [TENSOR, TOKEN], ids=["tensor", "token"])
@pytest.mark.parametrize("layer", ALL)
def test_half_precision(layer: str, activations: dict[str, Any], weights: dict[str, Any]) -> None:
    """The sums are float32 in the kernel, and the portable graph rounds the dequantized activation to float16."""
    model = model_of(ALL[layer], half=True)
    if "embed" in ALL[layer] and weights.get("format") == "int4":
        weights = {**weights, "layers": ("head",)}
    portable, lowered, changes = lower(model, activations, weights)
    assert not changes.skipped
    tolerance = 0.05 if layer == "chain" else 4e-3  # a code of the second input may differ
    assert_same(portable, lowered, feeds(model), tolerance)
    assert {value.dtype for value in lowered.graph.outputs} == {ir.DataType.FLOAT16}


@pytest.mark.parametrize("opset", [18, 24])
@pytest.mark.parametrize("activations", [TENSOR, TOKEN], ids=["tensor", "token"])
def test_opsets(activations: dict[str, Any], opset: int) -> None:
    model = model_of(SIBLINGS, opset=opset)
    portable, lowered, changes = lower(model, activations)
    assert len(changes.changed) == 2
    assert_same(portable, lowered, feeds(model))


@pytest.mark.parametrize("shape", [(1, 1, 8), (1, 3, 8), (4, 1, 8), (0, 3, 8)], ids=str)
@pytest.mark.parametrize("activations", [TENSOR, TOKEN], ids=["tensor", "token"])
def test_one_session_takes_any_number_of_rows(shape: tuple[int, ...], activations: dict[str, Any]) -> None:
    if shape[0] == 0 and activations is TENSOR:
        pytest.skip("no range without values")
    model = model_of(ADD_3D)
    portable, lowered, _ = lower(model, activations)
    sample = {"x": np.random.default_rng(0).normal(size=shape).astype(np.float32)}
    if 0 in shape:
        assert tiny.run(lowered, sample, optimized=True)[0].shape == (*shape[:-1], 6)
    else:
        assert_same(portable, lowered, [sample])


def test_against_the_oracle() -> None:
    """y_ij = s_i t_j Σ_k q_ik c_kj + b_j in float64, from float32 scales."""
    model = model_of(ADD_2D, W=10 * np.random.default_rng(3).normal(size=(8, 6)).astype(np.float32))
    W, b = tiny.data(model, "W"), tiny.data(model, "b")
    _, lowered, _ = lower(model, TOKEN, {"format": "uint8"})
    t = np.abs(W).max(0) / np.float32(127)
    c = np.rint(W / t).astype(np.float64)
    for sample in feeds(model):
        s = np.maximum(
            np.abs(sample["x"]).max(1, keepdims=True) / np.float32(127), np.finfo(np.float32).smallest_normal
        )
        q = np.rint(sample["x"] / s).astype(np.float64)
        np.testing.assert_allclose(
            tiny.run(lowered, sample, optimized=True)[0], s * t * (q @ c) + b, rtol=2e-5, atol=2e-5
        )


def test_int4_activations_and_weights() -> None:
    model = model_of(MATMUL)
    portable, lowered, changes = lower(model, {**TOKEN, "format": "int4"}, {"format": "int4"})
    assert not changes.skipped
    assert_same(portable, lowered, feeds(model))
    assert tiny.relative_error(tiny.run(lowered, feeds(model)[0])[0], tiny.run(model, feeds(model)[0])[0]) > 0.01


def test_extreme_values() -> None:
    """Rows of denormal, tiny and huge numbers keep to themselves, and their scales do not become zero."""
    model = model_of(ADD_2D, b="zeros")
    portable, lowered, _ = lower(model, TOKEN)
    x = np.random.default_rng(0).normal(size=(6, 8)).astype(np.float32)
    x *= np.array([1e-44, 1e-38, 1e-30, 1.0, 1e30, 0.0], np.float32)[:, None]
    assert_same(portable, lowered, [{"x": x}])


@pytest.mark.parametrize("bad", [np.inf, -np.inf])
def test_a_row_that_is_not_finite_harms_no_other(bad: float) -> None:
    model = model_of(ADD_2D)
    _, lowered, _ = lower(model, TOKEN)
    x = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)
    expected = tiny.run(lowered, {"x": x}, optimized=True)[0]
    x[2, 3] = bad
    got = tiny.run(lowered, {"x": x}, optimized=True)[0]
    assert not np.isfinite(got[2]).any()
    np.testing.assert_array_equal(np.delete(got, 2, 0), np.delete(expected, 2, 0))


@pytest.mark.parametrize("code", [127, -127])
@pytest.mark.parametrize("activations", [TENSOR, TOKEN], ids=["tensor", "token"])
@pytest.mark.parametrize("saturation_safe", [False, True])
def test_extreme_codes_do_not_saturate(saturation_safe: bool, activations: dict[str, Any], code: int) -> None:
    features = 512
    W = np.full((features, 32), code / 127, np.float32)
    text = f"g (float[M,{features}] x, float[{features},32] W) => (float[M,32] y) {{ [fc] y = MatMul(x, W) }}"
    model = tiny.build(text, W=W)
    samples = [{"x": np.ones((3, features), np.float32)}]
    portable, lowered, _ = lower(model, activations, {"saturation_safe": saturation_safe}, samples)
    (kernel,) = [node for node in lowered.graph if node.op_type in KERNELS]
    assert operand(kernel, 1).dtype == (ir.DataType.INT8 if saturation_safe else ir.DataType.UINT8)
    assert_same(portable, lowered, samples)


# --------------------------------------------------------------------------------------------- what ONNX Runtime runs


def ran(model: ir.Model, path: Path) -> Counter[str]:
    return Counter(node.op_type for node in tiny.optimized_nodes(model, path / "optimized.onnx"))


@pytest.mark.parametrize("layer", ["add-2d", "add-3d", "gemm-transposed"])
def test_the_bias_is_no_input_of_a_kernel_with_a_scale_for_each_row(layer: str, tmp_path: Path) -> None:
    """ONNX Runtime would multiply it by the row's scale; neither this pass nor its own fusions may put it there."""
    model = model_of(ALL[layer])
    _, lowered, _ = lower(model, TOKEN)
    for nodes in (list(ir.to_proto(lowered).graph.node), tiny.optimized_nodes(lowered, tmp_path / "optimized.onnx")):
        (kernel,) = [node for node in nodes if node.op_type == "MatMulIntegerToFloat"]
        assert len(kernel.input) == 6
        assert [node.op_type for node in nodes].count("Add") == 1


@pytest.mark.parametrize("layer", ["add-2d", "add-3d", "gemm-transposed"])
def test_the_bias_is_an_input_of_a_kernel_with_a_single_scale(layer: str, tmp_path: Path) -> None:
    model = model_of(ALL[layer])
    _, lowered, _ = lower(model, TENSOR)
    assert ran(lowered, tmp_path) == {"DynamicQuantizeMatMul": 1}


def test_rows_are_quantized_once_for_all_layers_that_read_them(tmp_path: Path) -> None:
    _, lowered, _ = lower(model_of(SIBLINGS), TOKEN)
    counts = ran(lowered, tmp_path)
    assert counts == Counter({
        "Sigmoid": 1, "Abs": 1, "ReduceMax": 1, "Div": 1, "Max": 1, "Shape": 1, "ConstantOfShape": 1,
        "QuantizeLinear": 1, "MatMulIntegerToFloat": 2, "Add": 1,
    })  # fmt: skip


def test_a_value_is_quantized_once_for_all_layers_that_read_it(tmp_path: Path) -> None:
    _, lowered, changes = lower(model_of(SIBLINGS), TENSOR)
    assert {changed.kernel for changed in changes.changed} == {"MatMulIntegerToFloat"}
    assert ran(lowered, tmp_path) == {"Sigmoid": 1, "DynamicQuantizeLinear": 1, "MatMulIntegerToFloat": 2}


@pytest.mark.parametrize("layer", ["tied", "tied-gemm", "gemm-transposed", "matmul"])
@pytest.mark.parametrize("format", ["int4", "uint8"])
@pytest.mark.parametrize("activations", [TENSOR, TOKEN], ids=["tensor", "token"])
def test_weights_are_constants_when_the_session_is_made(
    activations: dict[str, Any], format: str, layer: str, tmp_path: Path
) -> None:
    """ONNX Runtime folds the Cast of 4-bit codes and the Transpose of tied ones, so that it packs the weight once."""
    layers = {"layers": ("head", "linear")} if format == "int4" else {}
    _, lowered, _ = lower(model_of(ALL[layer]), activations, {"format": format, **layers})
    nodes = tiny.optimized_nodes(lowered, tmp_path / "optimized.onnx")
    made = {name for node in nodes for name in node.output}
    (kernel,) = [node for node in nodes if node.op_type in KERNELS]
    weight = kernel.input[1]
    assert weight not in made
    assert "Transpose" not in {node.op_type for node in nodes}


@pytest.mark.parametrize("activations", [TENSOR, TOKEN], ids=["tensor", "token"])
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("layer", ["matmul", "gemm-transposed", "siblings", "rank-4"])
def test_binary_weights(layer: str, half: bool, activations: dict[str, Any], tmp_path: Path) -> None:
    """Their bits are unpacked to -1 and +1 when the session is made."""
    model = model_of(ALL[layer], half=half)
    portable, lowered, changes = lower(model, activations, {"format": "binary", "layers": ("linear",)})
    assert not changes.skipped
    assert_same(portable, lowered, feeds(model), tolerance=4e-3 if half else 1e-5)
    nodes = tiny.optimized_nodes(lowered, tmp_path / "optimized.onnx")
    made = {name for node in nodes for name in node.output}
    assert not {node.input[1] for node in nodes if node.op_type in KERNELS} & made


def test_four_bits_stay_four_bits_in_the_file() -> None:
    _, lowered, _ = lower(model_of(GEMM_T), TOKEN, {"format": "int4"})
    (stored,) = [value for value in lowered.graph.initializers.values() if tensor_of(value).size == 48]
    assert stored.dtype == ir.DataType.INT4
    assert dims(stored) == [8, 6]


@pytest.mark.parametrize("format", ["uint8", "int8"])
@pytest.mark.parametrize("text", [TIED, TIED_GEMM], ids=["transpose", "gemm"])
def test_a_tied_embedding_is_stored_once(text: str, format: str) -> None:
    _, lowered, _ = lower(model_of(text), TOKEN, {"format": format, "saturation_safe": format == "int8"})
    assert sum(constant.size == 96 for constant in tensors(lowered).values()) == 1


# ------------------------------------------------------------------------------------------- W4A8 in groups, and skips


@pytest.mark.parametrize("activations", [TENSOR, TOKEN], ids=["tensor", "token"])
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("layer", ["matmul", "gemm-transposed", "siblings"])
def test_groups_read_the_float_activation_again(layer: str, half: bool, activations: dict[str, Any]) -> None:
    """MatMulNBits takes scales in blocks, and rounds the activation to 8 bits itself."""
    text = ALL[layer].replace(",8]", ",64]").replace("[8,", "[64,")
    model = model_of(text, half=half)
    portable, lowered, changes = lower(model, activations, {"format": "int4", "granularity": "group", "group_size": 32})
    assert not changes.changed
    assert not changes.skipped
    weights_alone = model.clone()
    tiny.compile(weights_alone, [QuantizeWeights(format="int4", granularity="group", group_size=32)], [])
    tiny.compile(weights_alone, [LowerWeightOnly(accuracy_level=0)], [])
    exact, rounded = lowered.clone(), lowered.clone()
    (floats,) = tiny.compile(exact, [LowerWeightOnly(accuracy_level=0)], [])
    (codes,) = tiny.compile(rounded, [LowerWeightOnly(accuracy_level=4)], [])
    assert {changed.kernel for changed in (*floats.changed, *codes.changed)} == {"MatMulNBits"}
    assert all("the activation stays float" in changed.detail for changed in floats.changed)
    assert all("rounded to 8 bits by the kernel, in blocks of 32" in changed.detail for changed in codes.changed)
    assert not exact.functions
    assert "DynamicQuantizeLinear" not in tiny.operators(exact)
    sample = tiny.feeds(model)[0]
    for got, wanted in zip(tiny.run(exact, sample), tiny.run(weights_alone, sample), strict=True):
        np.testing.assert_array_equal(got, wanted)
    for got, wanted in zip(tiny.run(rounded, sample), tiny.run(portable, sample), strict=True):
        assert tiny.relative_error(got, wanted) < 0.02  # the same number of bits, in blocks and not in rows


def test_wide_weights_are_skipped_with_the_reason() -> None:
    _, lowered, changes = lower(model_of(MATMUL), TOKEN, {"format": "int16"})
    assert "8 bits or fewer" in tiny.reasons(changes)["fc"]
    assert "DequantizePerToken" in tiny.operators(lowered)


def test_scales_along_the_inputs_are_skipped_with_the_reason() -> None:
    portable, _, _ = lower(
        model_of("g (float[M,8] x, float[8,8] W) => (float[M,8] y) { [fc] y = MatMul(x, W) }"), TOKEN
    )
    (site,) = find_sites(portable).linears
    there(site.dequantize).attributes["axis"] = ir.AttrInt64("axis", 0)
    (changes,) = tiny.compile(portable, [LowerDynamicInt8()], [])
    assert "channel" in tiny.reasons(changes)["fc"]


def test_excluded_and_static_and_float_layers_are_left_alone() -> None:
    model = model_of(SIBLINGS)
    tiny.compile(model, [QuantizeWeights(), QuantizeActivations(targets=("first",))], tiny.feeds(model))
    before = tiny.operators(model)
    (changes,) = tiny.compile(model, [LowerDynamicInt8()], [])
    assert not changes.changed
    assert not changes.skipped
    assert tiny.operators(model) == before


def test_the_layers_keep_their_names_and_paths() -> None:
    portable, lowered, _ = lower(model_of(SIBLINGS), TOKEN)
    kernels = {node.name: node for node in lowered.graph if node.op_type in KERNELS}
    assert set(kernels) == {"first", "second"}
    for site in find_sites(portable).linears:
        for key, text in site.node.metadata_props.items():
            assert text in kernels[site.name].metadata_props[key]
