"""lower-fp8: the operators get what they take, and mean what the portable graph means.

Neither operator runs on CPUs, so `tiny.run` puts standard operators in their place (`stand_ins`); a float64 reference
from the operator's definition stands beside it.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

import qcompiler
from passes.fp8 import Fp8
from passes.lower_fp8 import LowerFp8, _gemm_obstacle
from passes.quantize_weights import QuantizeWeights
from qcompiler.rewriting.contract import Changes, Pass
from qcompiler.sites.find import find_sites
from qcompiler.statistics import StatisticsStore
from qcompiler.targets.kernels import missing_on_cpu
from tests import tiny
from tests.stand_ins import weight_of_blocks
from tests.there import dims, held, operand, there

MATMUL = "g (float16[B,S,32] x, float16[32,16] W) => (float16[B,S,16] y) { [fc] y = MatMul(x, W) }"
ADD = """g (float16[B,S,32] x, float16[32,16] W, float16[16] b) => (float16[B,S,16] y) {
    [fc] p = MatMul(x, W)  y = Add(b, p) }"""
GEMM = "g (float16[M,32] x, float16[32,16] W, float16[16] b) => (float16[M,16] y) { [fc] y = Gemm(x, W, b) }"
GEMM_T = """g (float16[M,32] x, float16[16,32] W, float16[1,16] b) => (float16[M,16] y) {
    [fc] y = Gemm<transB=1>(x, W, b) }"""
SIBLINGS = """g (float16[B,S,32] x, float16[32,16] W, float16[32,48] V) => (float16[B,S,16] y, float16[B,S,48] z) {
    [first] y = MatMul(x, W)  [second] z = MatMul(x, V) }"""
SHARED = """g (float16[B,S,32] x, float16[32,32] W) => (float16[B,S,32] z) {
    [first] y = MatMul(x, W)  h = Relu(y)  [second] z = MatMul(h, W) }"""
LAYERS = {"matmul": MATMUL, "add": ADD, "gemm": GEMM, "gemm-transposed": GEMM_T, "siblings": SIBLINGS, "shared": SHARED}
TOLERANCES = {"shared": 0.05}  # float16 in between rounds apart by a bit, and a float8 code behind it by a sixteenth
EVERYTHING = {"first_and_last_block": True, "attention": True}
E4M3 = ir.DataType.FLOAT8E4M3FN


def model_of(text: str, dtype: str = "float16") -> ir.Model:
    names = [name for name in ("W", "V", "b") if f"] {name}," in text or f"] {name})" in text]
    return tiny.build(text.replace("float16", dtype), **dict.fromkeys(names, "normal"))


def lower(model: ir.Model, portable_pass: Pass, **options: Any) -> tuple[ir.Model, ir.Model, Changes]:
    portable = model.clone()
    tiny.compile(portable, [portable_pass], tiny.feeds(model))
    lowered = portable.clone()
    (changes,) = tiny.compile(lowered, [LowerFp8(**options)], [])
    return portable, lowered, changes


def fp8(**options: Any) -> Fp8:
    return Fp8(**{**EVERYTHING, **options})


def assert_same(portable: ir.Model, lowered: ir.Model, model: ir.Model, tolerance: float = 2e-3) -> None:
    for sample in tiny.feeds(model):
        for got, wanted in zip(tiny.run(lowered, sample), tiny.run(portable, sample), strict=True):
            assert got.dtype == wanted.dtype
            assert got.shape == wanted.shape
            assert np.abs(got.astype(float) - wanted).max() <= tolerance * np.abs(wanted.astype(float)).max()


SCHEMES = {
    "weights-channel": fp8(activations=False),
    "weights-tensor": fp8(activations=False, granularity="tensor"),
    "weights-group": QuantizeWeights(format="fp8_e4m3", granularity="group", group_size=16),
    "row": fp8(),
    "tensor": fp8(granularity="tensor"),
    "tensor-dynamic": fp8(granularity="tensor", dynamic=True),
}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("layer", LAYERS)
def test_the_weight_is_multiplied_as_it_is_stored(layer: str, scheme: str) -> None:
    model = model_of(LAYERS[layer])
    portable, lowered, changes = lower(model, SCHEMES[scheme])
    assert not changes.skipped
    assert {c.kernel for c in changes.changed} == {"MatMulBlockQuantizedFp8Weight"}
    rounded = ["rounded by nodes of its own" in c.detail for c in changes.changed]
    assert all(rounded) == any(rounded) == (not scheme.startswith("weights"))
    assert not find_sites(lowered).linears
    assert not {"MatMul", "Gemm"} & set(tiny.operators(lowered))
    assert_same(portable, lowered, model, TOLERANCES.get(layer, 2e-3))


@pytest.mark.parametrize("layer", ["matmul", "gemm-transposed"])
@pytest.mark.parametrize("scheme", ["weights-channel", "weights-tensor", "weights-group"])
def test_against_the_definition_of_the_operator(layer: str, scheme: str) -> None:
    model = model_of(LAYERS[layer])
    _, lowered, _ = lower(model, SCHEMES[scheme])
    (kernel,) = [node for node in lowered.graph if node.op_type == "MatMulBlockQuantizedFp8Weight"]
    codes, scale = (held(operand(kernel, i)) for i in (1, 2))
    block = kernel.attributes["block_size"].value
    assert codes.shape == (16, 32)
    assert codes.dtype == ml_dtypes.float8_e4m3fn
    assert scale.dtype == np.float32
    assert scale.shape == (16, -(-32 // block))
    W, original = weight_of_blocks(codes, scale, block), tiny.data(model, "W").astype(np.float64)
    original = original if layer == "gemm-transposed" else original.T
    # Three bits after the leading one: a sixteenth at the most, or half of the smallest step where numbers are tiny.
    assert (np.abs(W - original) <= np.maximum(np.abs(original) / 16, np.abs(original).max() / 448 / 512)).all()
    for sample in tiny.feeds(model):
        expected = sample["x"].astype(np.float64) @ W.T
        if layer == "gemm-transposed":
            expected = expected + tiny.data(model, "b").astype(np.float64)
        np.testing.assert_allclose(tiny.run(lowered, sample)[0].astype(float), expected, rtol=2e-3, atol=2e-2)


def test_what_is_stored() -> None:
    """A transposed constant stays as it is; one that two layers read is turned once."""
    _, lowered, _ = lower(model_of(GEMM_T), SCHEMES["weights-channel"])
    assert [name for name, v in lowered.graph.initializers.items() if v.dtype == E4M3] == ["W.codes"]
    _, lowered, _ = lower(model_of(SHARED), SCHEMES["weights-channel"])
    (stored,) = [v for v in lowered.graph.initializers.values() if v.dtype == E4M3]
    assert len(stored.uses()) == 2


def test_the_report_says_when_the_weight_is_dequantized() -> None:
    _, _, changes = lower(model_of(MATMUL), SCHEMES["weights-channel"])
    assert changes.changed[0].detail == "dequantized from 9 tokens on"
    odd = "g (float16[B,S,24] x, float16[24,16] W) => (float16[B,S,16] y) { [fc] y = MatMul(x, W) }"
    _, _, changes = lower(model_of(odd), SCHEMES["weights-channel"])
    assert "on every run" in changes.changed[0].detail


# ------------------------------------------------------------------------------------------------- float8 by float8


@pytest.mark.parametrize("dtype", ["float16", "float"])
@pytest.mark.parametrize("scheme", ["tensor", "tensor-dynamic"])
@pytest.mark.parametrize("layer", LAYERS)
def test_one_scale_on_both_sides_can_be_a_product_of_float8(layer: str, scheme: str, dtype: str) -> None:
    model = model_of(LAYERS[layer], dtype)
    portable, lowered, changes = lower(model, SCHEMES[scheme], gemm=True)
    assert not changes.skipped
    assert {c.kernel for c in changes.changed} == {"GemmFloat8"}
    for node in lowered.graph:
        if node.op_type == "GemmFloat8":
            assert [operand(node, i).dtype for i in (0, 1)] == [E4M3, E4M3]
            assert dims(operand(node, 1)) == [dims(operand(node, 1))[0], 32]
    assert "DequantizeLinear" not in tiny.operators(lowered)
    assert_same(portable, lowered, model, TOLERANCES.get(layer, 2e-3) if dtype == "float16" else 1e-5)


def test_a_scale_for_each_token_is_no_product_of_float8() -> None:
    _, _, changes = lower(model_of(MATMUL), fp8(), gemm=True)
    assert changes.changed[0].kernel == "MatMulBlockQuantizedFp8Weight"
    assert "not GemmFloat8: its activation has a scale for each token" in changes.changed[0].detail


def test_e5m2_on_both_sides_is_no_product_of_float8() -> None:
    _, _, changes = lower(model_of(MATMUL), fp8(granularity="tensor", format="fp8_e5m2"), gemm=True)
    assert not changes.changed
    assert tiny.reasons(changes)["fc"] == "its weight is FLOAT8E5M2, and the operator takes FLOAT8E4M3FN"
    _, _, changes = lower(model_of(MATMUL), fp8(granularity="tensor", activation_format="fp8_e5m2"), gemm=True)
    assert changes.changed[0].kernel == "GemmFloat8"


def test_odd_sizes_are_no_product_of_float8() -> None:
    odd = "g (float16[B,S,32] x, float16[32,12] W) => (float16[B,S,12] y) { [fc] y = MatMul(x, W) }"
    _, _, changes = lower(model_of(odd), SCHEMES["tensor"], gemm=True)
    assert "not GemmFloat8: K = 32 and N = 12 are not both multiples of 16" in changes.changed[0].detail


def against_gemm(portable: ir.Model) -> str:
    """Why the weight-only operator was taken, in a copy."""
    lowered = portable.clone()
    return LowerFp8(gemm=True).apply(lowered, StatisticsStore()).changed[0].detail.rpartition("not GemmFloat8: ")[2]


def test_what_else_is_no_product_of_float8() -> None:
    portable, _, _ = lower(model_of(MATMUL, "bfloat16"), SCHEMES["tensor"])
    assert against_gemm(portable) == (
        "its result would be bfloat16, for which the operator asks cuBLAS for a product that it does not have"
    )
    portable, _, _ = lower(model_of(MATMUL), SCHEMES["tensor"])
    assert "not GemmFloat8" not in LowerFp8(gemm=True).apply(portable.clone(), StatisticsStore()).changed[0].detail
    channels = portable.clone()
    of_weight = operand(find_sites(channels).linears[0].dequantize, 1)
    of_weight.const_value = ir.tensor(np.ones(16, np.float16), name=of_weight.name)
    assert against_gemm(channels) == "its weight has more than one scale"
    (quantize,) = (node for node in portable.graph if node.op_type == "QuantizeLinear")
    scale = operand(quantize, 1)
    computed = ir.node("Identity", [scale], name="computed")
    computed.outputs[0].type, computed.outputs[0].shape = scale.type, scale.shape
    portable.graph.insert_before(quantize, computed)
    quantize.replace_input_with(1, computed.outputs[0])
    assert against_gemm(portable) == "its activation has no constant scale for the whole tensor"
    both = fp8(granularity="tensor", format="fp8_e5m2", activation_format="fp8_e5m2")
    portable, _, _ = lower(model_of(MATMUL), both)
    (site,) = find_sites(portable).linears
    (quantize,) = (node for node in portable.graph if node.op_type == "QuantizeLinear")
    assert _gemm_obstacle(site, quantize) == "both sides are FLOAT8E5M2, which cuBLAS does not multiply"


# ------------------------------------------------------------------------------------------------- in a compilation


def test_operators_without_a_kernel_on_cpus_are_known() -> None:
    operators = [("com.microsoft", name) for name in ("GemmFloat8", "MatMulBlockQuantizedFp8Weight", "MatMulNBits")]
    assert missing_on_cpu([*operators, ("", "MatMulInteger"), ("", "Softmax"), ("qcompiler", "QLinearOwn")]) == (
        "GemmFloat8", "MatMulBlockQuantizedFp8Weight",
    )  # fmt: skip


def test_the_error_is_measured_before_lowering_and_the_report_says_so() -> None:
    model = model_of(MATMUL)
    samples, settings = tiny.feeds(model, 4), [f"fp8.{name}=true" for name in EVERYTHING]
    compiled = qcompiler.compile(model, "fp8", target="ort-cuda", calibration=samples, options=settings)
    assert "MatMulBlockQuantizedFp8Weight" in tiny.operators(compiled.model)
    portable = qcompiler.compile(model, "fp8", target="portable", calibration=samples, options=settings)
    assert compiled.report.outputs == portable.report.outputs
    assert any("before lowering" in warning for warning in compiled.report.warnings)
    assert not any("before lowering" in warning for warning in portable.report.warnings)


# ------------------------------------------------------------------------------------------------- what is not done


def test_float32_models_are_skipped_with_the_reason() -> None:
    portable, lowered, changes = lower(model_of(MATMUL, "float"), fp8())
    assert "float16" in tiny.reasons(changes)["fc"]
    assert tiny.operators(lowered) == tiny.operators(portable)


def test_e5m2_weights_are_skipped_with_the_reason() -> None:
    _, _, changes = lower(model_of(MATMUL), fp8(format="fp8_e5m2"))
    assert "FLOAT8E4M3FN" in tiny.reasons(changes)["fc"]


def test_scales_along_the_inputs_are_skipped_with_the_reason() -> None:
    square = "g (float16[M,16] x, float16[16,16] W) => (float16[M,16] y) { [fc] y = MatMul(x, W) }"
    portable, _, _ = lower(model_of(square), SCHEMES["weights-channel"])
    (site,) = find_sites(portable).linears
    there(site.dequantize).attributes["axis"] = ir.AttrInt64("axis", 0)
    (changes,) = tiny.compile(portable, [LowerFp8()], [])
    assert tiny.reasons(changes)["fc"] == (
        "its weight has scales along the inputs, and the operator takes one for each output or block of inputs"
    )
    there(site.dequantize).replace_input_with(1, portable.graph.inputs[0])
    changes = LowerFp8().apply(portable, StatisticsStore())
    assert tiny.reasons(changes)["fc"] == "the scales of its weight are computed, and the operator's are constants"


def test_integers_and_floats_are_left_to_others() -> None:
    model = model_of(SIBLINGS)
    portable, lowered, changes = lower(model, QuantizeWeights(targets=("first",)))
    assert not changes.changed
    assert not changes.skipped
    assert tiny.operators(lowered) == tiny.operators(portable)
