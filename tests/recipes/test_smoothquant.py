"""smoothquant on the demo model as each exporter writes it: what plain ONNX Runtime runs is integers."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from models.export import CHECKPOINT, model_path
from qcompiler.calibration.samples import open_samples
from qcompiler.graph.files import load
from qcompiler.report import Report
from qcompiler.sites.canonicalize import canonicalize
from qcompiler.sites.find import Linear, find_sites
from tests import compilations
from tests.there import tensor_of

VARIANTS = ["dynamo", "dynamo-past", "opset23", "optimum", "fp16", pytest.param("genai", marks=pytest.mark.exporters)]
FLOAT_BYTES = 4


@dataclass(frozen=True)
class CompiledVariant:
    before: ir.Model
    """Canonicalized, in float."""
    saved: onnx.ModelProto
    optimized: onnx.ModelProto
    """The graph that plain onnxruntime makes of the saved file."""
    report: Report
    output: Path


@pytest.fixture(scope="module", params=VARIANTS)
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> CompiledVariant:
    import onnxruntime as ort

    source = model_path(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    result = compilations.compiled(request.param, "smoothquant", "ort-cpu")
    result.save(folder / "out")
    settings = ort.SessionOptions()
    settings.log_severity_level = 3
    settings.optimized_model_filepath = str(folder / "out" / "optimized.onnx")  # its weights stay in the folder's data
    ort.InferenceSession(folder / "out" / "model.onnx", settings, providers=["CPUExecutionProvider"])
    before = load(source)
    canonicalize(before)
    saved, optimized = (
        onnx.load(folder / "out" / file, load_external_data=False) for file in ("model.onnx", "optimized.onnx")
    )
    return CompiledVariant(before, saved, optimized, result.report, folder / "out")


def linears(model: ir.Model) -> list[Linear]:
    return list(find_sites(model).linears)


def test_every_linear_layer_runs_as_one_integer_kernel(compiled: CompiledVariant) -> None:
    graph = compiled.optimized.graph
    kernels = {node.name: node for node in graph.node if node.op_type == "MatMulIntegerToFloat"}
    assert kernels.keys() == {site.name for site in linears(compiled.before)}
    constants = {tensor.name: tensor for tensor in graph.initializer}
    for node in kernels.values():
        weight = constants[node.input[1]]
        assert weight.data_type == onnx.TensorProto.INT8
        assert node.input[2] in constants, "the activation's scale is static"


def test_floats_are_multiplied_where_both_sides_are_computed_only(compiled: CompiledVariant) -> None:
    """Scores and weighted values of the attention, and what turns positions into angles, stay float."""
    graph = compiled.optimized.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    products = [node for node in graph.node if node.op_type in ("MatMul", "Gemm", "FusedMatMul", "MatMulNBits")]
    for node in products:
        weights = [constants[source] for source in node.input[:2] if source in constants]
        assert all(max(np.prod(tensor.dims) for tensor in weights) < 1000 for _ in weights), node.name
    assert not {"DequantizeLinear", "Gemm", "MatMulNBits"} & {node.op_type for node in graph.node}
    sites = {site.node for site in linears(compiled.before)}
    others = [n for n in compiled.before.graph.all_nodes() if n.op_type in ("MatMul", "Gemm") and n not in sites]
    assert len(products) <= len(others)


def test_no_float_copy_of_a_quantized_weight_is_left(compiled: CompiledVariant) -> None:
    quantized = {site.name for site in compiled.report.sites if site.status == "quantized"}
    shapes = set()
    for site in find_sites(compiled.before):
        if site.name in quantized:
            value = site.weight if isinstance(site, Linear) else site.table  # type: ignore[attr-defined]
            shapes.add(tuple(sorted(tensor_of(value).shape.numpy())))
    floats = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)
    left = [
        t.name for t in compiled.saved.graph.initializer if t.data_type in floats and tuple(sorted(t.dims)) in shapes
    ]
    assert not left


def test_the_embedding_is_stored_once_in_8_bits(compiled: CompiledVariant) -> None:
    (embedding,) = find_sites(compiled.before).embeddings
    size = tensor_of(embedding.table).size
    assert embedding.table in {site.weight for site in linears(compiled.before)}, "the demo model's head is tied"
    tables = [tensor for tensor in compiled.saved.graph.initializer if np.prod(tensor.dims) == size]
    assert [tensor.data_type for tensor in tables] == [onnx.TensorProto.INT8]
    kinds = {tensor.name: (tensor.data_type, np.prod(tensor.dims)) for tensor in compiled.optimized.graph.initializer}
    gathers = [node for node in compiled.optimized.graph.node if node.op_type == "Gather"]
    assert [kinds.get(node.input[0]) for node in gathers].count((onnx.TensorProto.INT8, size)) == 1


def test_nothing_is_skipped_silently(compiled: CompiledVariant) -> None:
    assert {site.name for site in compiled.report.sites} == {site.name for site in find_sites(compiled.before)}
    counts = Counter(site.status for site in compiled.report.sites)
    assert counts["quantized"] == len(compiled.report.sites)
    for site in compiled.report.sites:
        assert site.status == "quantized" or site.reason
        assert site.kernel or site.op == "Gather"
    smoothed = [site for site in compiled.report.sites if "smooth-quant" in site.details]
    for site in compiled.report.sites:
        assert site in smoothed or site.op == "Gather", "smooth-quant says what it did, or why not"


def test_quantized_weights_are_a_quarter(compiled: CompiledVariant) -> None:
    """Against 32 bits a number, whatever the model came in."""
    constants = {(s.weight if isinstance(s, Linear) else s.table) for s in find_sites(compiled.before)}  # type: ignore[attr-defined]
    floats = sum(tensor_of(value).size for value in constants) * FLOAT_BYTES
    assert compiled.report.sizes.quantized_bytes <= 0.27 * floats


def test_the_report_is_written(compiled: CompiledVariant) -> None:
    data = json.loads((compiled.output / "report.json").read_text(encoding="utf-8"))
    assert data["target"] == "ort-cpu"
    assert len(data["sites"]) == len(compiled.report.sites)


def test_plain_onnxruntime_computes_what_was_verified(compiled: CompiledVariant) -> None:
    """Verification runs every operator by itself; users run the optimized graph, whose fusions could be wrong."""
    import onnxruntime as ort

    (sample,) = open_samples(
        str(CHECKPOINT / "heldout.txt"), model=compiled.before, tokenizer=CHECKPOINT, limit=1, sequence_length=48
    )
    logits = []
    for level in (ort.GraphOptimizationLevel.ORT_DISABLE_ALL, ort.GraphOptimizationLevel.ORT_ENABLE_ALL):
        settings = ort.SessionOptions()
        settings.graph_optimization_level, settings.log_severity_level = level, 3
        session = ort.InferenceSession(compiled.output / "model.onnx", settings, providers=["CPUExecutionProvider"])
        logits.append(session.run(["logits"], sample)[0].astype(np.float64))
    assert np.linalg.norm(logits[1] - logits[0]) < 0.02 * np.linalg.norm(logits[0])


def test_the_compiled_model_is_near_the_float_one(compiled: CompiledVariant) -> None:
    logits = compiled.report.outputs["logits"]
    assert logits["sqnr_db"] > 20
    assert logits["kl"] < 0.05
