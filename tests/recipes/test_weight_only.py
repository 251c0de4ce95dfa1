"""Weight-only recipes on the demo model as each exporter writes it: what runs, whether it is right, how near it is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import qcompiler
from models.export import CHECKPOINT, model_path
from passes.lower_embedding import LowerEmbedding
from passes.lower_weight_only import LowerWeightOnly
from qcompiler.calibration.samples import Samples, open_samples
from qcompiler.graph import files as model_io
from qcompiler.graph.session import session
from qcompiler.report import Report
from qcompiler.sites.canonicalize import canonicalize
from qcompiler.sites.find import find_sites
from qcompiler.statistics import StatisticsStore
from tests.compilations import compiled
from tests.there import tensor_of

VARIANTS = ["dynamo", "dynamo-past", "opset23", "optimum", "fp16", pytest.param("genai", marks=pytest.mark.exporters)]
RECIPES = ["rtn-w4", "gptq-w4-act-order", "awq-w4", "hqq-w4", "nf4", "w8", "gptq-w3", "gptq-w2"]
WORST_KL = {"gptq-w3": 0.4, "gptq-w2": 6.0}


@dataclass(frozen=True)
class Portable:
    """A model quantized in standard ONNX, and the float model that it was made of."""

    before: ir.Model
    model: ir.Model
    report: Report


def portable(variant: str, recipe: str) -> Portable:
    found = compiled(variant, recipe, "portable")
    before = model_io.load(model_path(variant))
    canonicalize(before)
    return Portable(before, found.model, found.report)


@pytest.fixture(scope="module", params=VARIANTS)
def by_exporter(request: pytest.FixtureRequest) -> Portable:
    return portable(request.param, "awq-gptq-w4")


@pytest.fixture(scope="module", params=RECIPES)
def by_recipe(request: pytest.FixtureRequest) -> tuple[str, Portable]:
    return request.param, portable("dynamo", request.param)


def lowered(found: Portable, accuracy_level: int) -> ir.Model:
    model = found.model.clone()
    for step in (LowerWeightOnly(accuracy_level=accuracy_level), LowerEmbedding()):  # type: ignore[arg-type]
        changes = step.apply(model, StatisticsStore())
        assert not changes.skipped
    return model


def heldout(found: Portable) -> Samples:
    return open_samples(
        str(CHECKPOINT / "heldout.txt"), model=found.before, tokenizer=CHECKPOINT, limit=1, sequence_length=48
    )


def logits(model: ir.Model, found: Portable, level: str) -> np.ndarray:
    import onnxruntime as ort

    settings = ort.SessionOptions()
    settings.log_severity_level = 3
    settings.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
    (sample,) = heldout(found)
    return np.asarray(session(model, settings).run(["logits"], sample)[0]).astype(np.float64)


def optimized(model: ir.Model, folder: Path) -> onnx.ModelProto:
    """The graph that onnxruntime makes of a model."""
    import onnxruntime as ort

    settings = ort.SessionOptions()
    settings.log_severity_level = 3
    settings.optimized_model_filepath = str(folder / "optimized.onnx")
    session(model, settings)
    return onnx.load(folder / "optimized.onnx", load_external_data=False)


def check_kernels(found: Portable, folder: Path, kernel: str = "MatMulNBits") -> None:
    graph = optimized(lowered(found, 4), folder).graph
    layers = {site.name for site in find_sites(found.before).linears}
    heads = {site.name for site in find_sites(found.before).linears if site.out_features > 1024}
    assert {node.name for node in graph.node if node.op_type == kernel} >= layers - heads
    assert {node.name for node in graph.node if node.op_type in (kernel, "MatMulNBits")} == layers
    assert [node.op_type for node in graph.node].count("GatherBlockQuantized") == 1
    assert not {"DequantizeLinear", "Gemm"} & {node.op_type for node in graph.node}


def check_same_numbers(found: Portable) -> None:
    """Without rounding of activations in the kernel (accuracy level 0).

    The portable model runs operator by operator: optimized, onnxruntime makes it its own MatMulNBits of level 4.
    """
    expected = logits(found.model, found, "ORT_DISABLE_ALL")
    got = logits(lowered(found, 0), found, "ORT_ENABLE_ALL")
    half = any(value.dtype == ir.DataType.FLOAT16 for value in found.before.graph.outputs)
    assert np.linalg.norm(got - expected) <= (2e-3 if half else 1e-5) * np.linalg.norm(expected)


def test_every_layer_runs_on_the_kernel_for_few_bits(by_exporter: Portable, tmp_path: Path) -> None:
    check_kernels(by_exporter, tmp_path)


def test_the_lowered_model_computes_what_the_portable_one_does(by_exporter: Portable) -> None:
    check_same_numbers(by_exporter)


def test_nothing_is_left_out(by_exporter: Portable) -> None:
    assert {site.status for site in by_exporter.report.sites} == {"quantized"}
    for site in by_exporter.report.sites:
        assert ("gptq" in site.details) == site.scheme.startswith("int4"), site.name


def test_blocks_take_four_bits_and_the_tied_table_eight_once(by_exporter: Portable) -> None:
    sites = find_sites(by_exporter.before)
    (table,) = {embedding.table for embedding in sites.embeddings}
    others = sum(tensor_of(site.weight).size for site in sites.linears if site.weight is not table)
    # Codes; scales of 4 bytes for each (perhaps shorter) group; a scale for each row.
    rows = max(tensor_of(table).shape.numpy())
    expected = others / 2 + others / 64 * 4 + tensor_of(table).size + rows * 8
    for model in (by_exporter.model, lowered(by_exporter, 4)):
        floats = {id(v.const_value) for v in by_exporter.before.graph.initializers.values()}
        new = [v.const_value for v in model.graph.initializers.values() if id(v.const_value) not in floats]
        assert sum(tensor.nbytes for tensor in new if tensor is not None) < expected * 1.1


def test_it_is_near_the_float_model(by_exporter: Portable) -> None:
    assert by_exporter.report.outputs["logits"]["kl"] < 0.06


def test_recipes_are_lowered_whole(by_recipe: tuple[str, Portable], tmp_path: Path) -> None:
    recipe, found = by_recipe
    check_kernels(found, tmp_path, "MatMulBnb4" if recipe == "nf4" else "MatMulNBits")
    check_same_numbers(found)
    assert found.report.outputs["logits"]["kl"] < WORST_KL.get(recipe, 0.06)


def test_two_bits_are_two_bits(tmp_path: Path) -> None:
    model = lowered(portable("dynamo", "gptq-w2"), 4)
    bits = [node.attributes.get_int("bits") for node in model.graph if node.op_type == "MatMulNBits"]
    assert sorted(set(bits)) == [2, 8]


def test_layers_with_bits_of_their_own() -> None:
    recipe = qcompiler.Recipe.from_dict({
        "name": "mixed", "target": "portable",
        "passes": [
            {"quantize-weights": {"format": "int8", "granularity": "group", "targets": ["*.down_proj"]}},
            {"quantize-weights": {"format": "int4", "granularity": "group", "layers": ["linear"],
                                  "ignore": ["*.down_proj"]}},
        ],
    })  # fmt: skip
    report = qcompiler.compile(model_path("dynamo"), recipe).report
    formats = {site.module_path.split(".")[-1]: site.scheme.split()[0] for site in report.sites if site.scheme}
    assert formats["down_proj"] == "int8"
    assert formats["up_proj"] == formats["q_proj"] == "int4"
    assert {site.status for site in report.sites if "embed" in site.module_path} == {"excluded"}


def test_a_budget_is_kept_and_spent_where_it_pays() -> None:
    """Closer to float than as many bits everywhere, on what neither decided on."""
    kl = {}
    for name, steps in {
        "uniform": [{"quantize-weights": {"format": "int4", "granularity": "group", "layers": ["linear"]}}],
        "chosen": [
            {"mixed-precision": {"budget": 4.4, "choices": [2, 4, 8]}},
            {"quantize-weights": {"format": "int4", "granularity": "group", "layers": ["linear"]}},
        ],
    }.items():
        recipe = qcompiler.Recipe.from_dict({"name": name, "target": "portable", "passes": steps})
        result = qcompiler.compile(
            model_path("dynamo"), recipe, calibration=str(CHECKPOINT / "calibration.txt"),
            tokenizer=CHECKPOINT / "tokenizer.json", samples=8, sequence_length=64,
        )  # fmt: skip
        kl[name] = result.report.outputs["logits"]["kl"]
        assert result.report.sizes.quantized_bytes <= 0.145 * result.report.sizes.quantized_float_bytes
    assert kl["chosen"] < 1.2 * kl["uniform"]
