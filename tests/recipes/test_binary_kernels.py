"""Binary weights on the kernels of a CPU, and the recipe: what runs, whether it is right, what the report says."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import qcompiler
from models.export import CHECKPOINT, model_path
from passes.lower_dynamic_int8 import LowerDynamicInt8
from passes.lower_int8 import LowerInt8
from passes.lower_weight_only import LowerWeightOnly
from passes.quantize_activations import QuantizeActivations
from passes.quantize_weights import QuantizeWeights
from qcompiler.calibration.samples import open_samples
from qcompiler.formats.scheme import PerChannel, Scheme
from qcompiler.graph import files as model_io
from qcompiler.graph.session import session
from qcompiler.report.cautions import binary_warnings
from qcompiler.report.report import SiteReport
from qcompiler.rewriting.contract import Changes
from qcompiler.sites.canonicalize import canonicalize
from qcompiler.sites.find import find_sites
from qcompiler.statistics import StatisticsStore
from tests import tiny
from tests.functions.test_binary import GEMM, MATMUL, TURNED, model_of, quantize
from tests.there import operand


@pytest.mark.parametrize("size", [None, 16, 64])
@pytest.mark.parametrize("K", [64, 40, 37, 300])
@pytest.mark.parametrize("text", [MATMUL, GEMM], ids=["matmul", "gemm"])
def test_weight_only_is_two_bit_codes(text: str, K: int, size: int | None) -> None:
    model = model_of(text, K, 6)
    portable, _ = quantize(model, **({} if size is None else {"granularity": "group", "group_size": size}))
    lowered = portable.clone()
    (changes,) = tiny.compile(lowered, [LowerWeightOnly(accuracy_level=0)], [])
    assert [(changed.kernel, changed.detail[:6]) for changed in changes.changed] == [("MatMulNBits", "2 bits")]
    assert not lowered.functions
    for sample in tiny.feeds(model):
        (got,), (expected,) = (tiny.run(each, sample, optimized=True) for each in (lowered, portable))
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("half_precision", [False, True])
def test_two_bit_codes_of_a_model_in_half_precision(half_precision: bool) -> None:
    model = tiny.build(MATMUL.replace("float", "float16").format(K=64, N=6), W="normal")
    portable, _ = quantize(model)
    lowered = portable.clone()
    tiny.compile(lowered, [LowerWeightOnly(accuracy_level=0, half_precision=half_precision)], [])
    (kernel,) = (node for node in lowered.graph if node.op_type == "MatMulNBits")
    assert operand(kernel, 2).dtype == (ir.DataType.FLOAT16 if half_precision else ir.DataType.FLOAT)
    if not half_precision:
        sample = tiny.feeds(model)[0]
        error = tiny.relative_error(tiny.run(lowered, sample, optimized=True)[0], tiny.run(portable, sample)[0])
        assert error < 2e-3


def integer_model(text: str, K: int, N: int, half: bool = False) -> tuple[ir.Model, ir.Model, Changes]:
    """(portable, lowered, changes of the lowering) with static activations."""
    text = text.replace("float", "float16") if half else text
    bias = {"b": "normal"} if "b)" in text else {}
    model = tiny.build(text.format(K=K, N=N), W="normal", **bias)
    tiny.compile(model, [QuantizeWeights(format="binary"), QuantizeActivations()], tiny.feeds(model))
    lowered = model.clone()
    (changes,) = tiny.compile(lowered, [LowerInt8()], [])
    return model, lowered, changes


@pytest.mark.parametrize("half", [False, True], ids=["float", "half"])
@pytest.mark.parametrize("K", [64, 37])
@pytest.mark.parametrize("text", [MATMUL, GEMM, TURNED], ids=["matmul", "gemm", "turned"])
def test_the_integer_kernel_reads_signs_that_are_unpacked_once(tmp_path: Path, text: str, K: int, half: bool) -> None:
    portable, lowered, changes = integer_model(text, K, 6, half)
    assert [changed.kernel for changed in changes.changed] == ["MatMulIntegerToFloat"]
    assert "UnpackBinary" in tiny.operators(lowered)
    assert "DequantizeBinary" not in tiny.operators(lowered)
    for sample in tiny.feeds(portable):
        got, expected = tiny.run(lowered, sample, optimized=True)[0], tiny.run(portable, sample)[0]
        assert tiny.relative_error(got, expected) < (2e-3 if half else 1e-5)

    proto = optimized(lowered, tmp_path / "optimized.onnx")
    (kernel,) = (node for node in proto.graph.node if node.op_type == "MatMulIntegerToFloat")
    constants = {tensor.name: tensor for tensor in proto.graph.initializer}
    assert kernel.input[1] in constants
    codes = onnx.numpy_helper.to_array(constants[kernel.input[1]])
    assert (codes.dtype, codes.shape) == (np.int8, (K, 6))
    assert set(np.unique(codes)) == {-1, 1}
    unpacking = {"BitwiseAnd", "Where", "Gather", "Slice", "Transpose", "UnpackBinary"}
    assert not unpacking & {node.op_type for node in proto.graph.node}


def optimized(model: ir.Model, path: Path) -> onnx.ModelProto:
    import onnxruntime as ort

    settings = ort.SessionOptions()
    settings.log_severity_level = 3
    settings.optimized_model_filepath = str(path)
    ort.InferenceSession(ir.to_proto(model).SerializeToString(), settings, providers=["CPUExecutionProvider"])
    return onnx.load(path)


def test_the_integer_product_is_exact_at_the_extremes() -> None:
    """All activations at one end and all signs equal: the largest sums that there are."""
    K = 512
    W = np.ones((K, 4), np.float32)
    W[:, 1] = -1
    model = model_of(MATMUL, K, 4, W)
    samples = [{"x": np.full((1, 2, K), value, np.float32)} for value in (1.0, -1.0)]
    tiny.compile(model, [QuantizeWeights(format="binary"), QuantizeActivations()], samples)
    tiny.compile(model, [LowerInt8()], [])
    for sample, value in zip(samples, (1.0, -1.0), strict=True):
        got = tiny.run(model, sample, optimized=True)[0][0, 0]
        np.testing.assert_allclose(got, value * K * np.array([1, -1, 1, 1]), rtol=5e-3)


def test_groups_keep_float_activations() -> None:
    model = model_of(MATMUL, 64, 6)
    steps = [QuantizeWeights(format="binary", granularity="group", group_size=16), QuantizeActivations()]
    tiny.compile(model, steps, tiny.feeds(model))
    lowered = model.clone()
    first, second = tiny.compile(lowered, [LowerInt8(), LowerWeightOnly(accuracy_level=0)], [])
    assert "so its activation stays float" in tiny.reasons(first)["fc"]
    assert [changed.kernel for changed in second.changed] == ["MatMulNBits"]


@pytest.mark.parametrize("granularity", ["token", "tensor"])
@pytest.mark.parametrize("K", [64, 37])
@pytest.mark.parametrize("text", [MATMUL, GEMM], ids=["matmul", "gemm"])
def test_dynamic_activations(text: str, K: int, granularity: Literal["token", "tensor"]) -> None:
    model = model_of(text, K, 6)
    steps = [QuantizeWeights(format="binary"), QuantizeActivations(granularity=granularity, dynamic=True)]
    tiny.compile(model, steps, [])
    lowered = model.clone()
    (changes,) = tiny.compile(lowered, [LowerDynamicInt8()], [])
    assert [changed.site for changed in changes.changed] == ["fc"]
    for sample in tiny.feeds(model):
        (got,), (expected,) = tiny.run(lowered, sample, optimized=True), tiny.run(model, sample)
        assert tiny.relative_error(got, expected) < 1e-5


# ---------------------------------------------------------------------------------------------------------- the report


def site(weight: Scheme) -> SiteReport:
    return SiteReport(name="fc", module_path="fc", op="MatMul", status="quantized", weight=weight)


def test_the_report_says_what_it_costs() -> None:
    layers = [site(Scheme("binary", PerChannel())), site(Scheme("int8", PerChannel()))]
    logits = {"sqnr_db": 5.0, "kl": 2.958, "top1": 0.117, "perplexity_ratio": 17.1}
    (warning,) = binary_warnings(layers, {"logits": logits, "present.0.key": {"sqnr_db": 1.0}})
    assert warning.startswith("1 layer has binary weights, which ruins")
    assert "KL 2.96 nats, perplexity 17.1 times as high, the same likeliest token for 11.7 % (logits)" in warning
    assert "present" not in warning
    (warning,) = binary_warnings([layers[0]] * 2, {"y": {"sqnr_db": 1.234}})
    assert "2 layers have" in warning
    assert "1.2 dB signal-to-noise (y)" in warning
    (warning,) = binary_warnings(layers, {})
    assert "not measured" in warning
    assert binary_warnings([layers[1]], {"logits": logits}) == []


@pytest.mark.parametrize("variant", ["dynamo", "dynamo-past", "opset23", "optimum", "fp16",
                                     pytest.param("genai", marks=pytest.mark.exporters)])  # fmt: skip
def test_the_recipe_on_every_exporters_graph(variant: str) -> None:
    compiled = qcompiler.compile(
        model_path(variant), "binary", target="portable", calibration=str(CHECKPOINT / "calibration.txt"),
        tokenizer=CHECKPOINT / "tokenizer.json", samples=2, sequence_length=32,
    )  # fmt: skip
    reports = [report for report in compiled.report.sites if "binary" in report.scheme]
    assert len(reports) == sum(s.in_features > 1 for s in find_sites(compiled.model).linears) - 1  # all but the head
    assert not compiled.report.with_status("skipped")
    assert all(report.sqnr_db is not None and report.sqnr_db < 15 for report in reports)
    assert any("binary weights" in warning and "KL" in warning for warning in compiled.report.warnings)
    lowered = compiled.model.clone()
    changes = LowerDynamicInt8().apply(lowered, StatisticsStore())
    assert len(changes.changed) == len(reports) + 1
    assert not changes.skipped
    before = model_io.load(model_path(variant))
    canonicalize(before)
    (sample,) = open_samples(
        str(CHECKPOINT / "heldout.txt"), model=before, tokenizer=CHECKPOINT, limit=1, sequence_length=32
    )
    got, expected = (session(model).run(["logits"], sample)[0] for model in (lowered, compiled.model))
    assert tiny.relative_error(got, expected) < 0.05  # a code that rounds the other way counts for much here
