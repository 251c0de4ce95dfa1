"""Recipes that quantize activations while the model runs, on the demo model as each exporter writes it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

import qcompiler
from models.export import CHECKPOINT, model_path
from qcompiler.evaluation.evaluate import evaluate
from qcompiler.graph import files as model_io
from qcompiler.sites.canonicalize import canonicalize
from qcompiler.sites.find import find_sites
from tests import compilations

VARIANTS = ["dynamo", "dynamo-past", "opset23", "optimum", "fp16", pytest.param("genai", marks=pytest.mark.exporters)]
INTEGER = ["int8-dynamic", "llm-int8"]
WORST_KL = {
    "int8-dynamic": 0.006, "int8-dynamic-tensor": 0.02, "llm-int8": 0.005, "smoothquant-o1": 0.006,
    "smoothquant-o2": 0.02, "smoothquant-o3": 0.02, "fp8": 0.003, "fp8-tensor": 0.004, "w4a8": 0.06,
}  # fmt: skip
KERNELS = {"MatMulIntegerToFloat", "DynamicQuantizeMatMul", "MatMulNBits"}
TEXT, TOKENIZER = str(CHECKPOINT / "heldout.txt"), CHECKPOINT / "tokenizer.json"


def compiled(variant: str, recipe: str) -> qcompiler.Compiled:
    return compilations.compiled(variant, recipe, "ort-cpu")


def layers(variant: str) -> set[str]:
    model = model_io.load(model_path(variant))
    canonicalize(model)
    return {site.name for site in find_sites(model).linears}


def optimized(file: Path) -> onnx.GraphProto:
    """The graph that onnxruntime makes of a model."""
    import onnxruntime as ort

    settings = ort.SessionOptions()
    settings.log_severity_level = 3
    settings.optimized_model_filepath = str(file.with_name("optimized.onnx"))
    ort.InferenceSession(str(file), settings)
    return onnx.load(file.with_name("optimized.onnx"), load_external_data=False).graph


def divergence(variant: str, file: Path, windows: int = 2) -> float:
    found = evaluate(
        file, TEXT, tokenizer=TOKENIZER, sequence_length=128, limit=windows, reference=model_path(variant), threads=1
    )
    assert found.kl is not None
    return found.kl


@pytest.mark.parametrize("recipe", INTEGER)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_layer_is_one_integer_kernel(variant: str, recipe: str, tmp_path: Path) -> None:
    result = compiled(variant, recipe)
    assert not [site for site in result.report.sites if site.status == "skipped"]
    result.save(tmp_path / "out")
    graph = optimized(tmp_path / "out" / "model.onnx")
    assert {node.name for node in graph.node if node.op_type == "MatMulIntegerToFloat"} == layers(variant)
    # Reduced once for each value that layers read, not once for each layer.
    assert sum(node.op_type == "ReduceMax" for node in graph.node) < len(layers(variant))
    assert divergence(variant, tmp_path / "out" / "model.onnx") < WORST_KL[recipe]


@pytest.mark.parametrize("recipe", sorted(set(WORST_KL) - set(INTEGER)))
def test_recipes_are_near_the_float_model(recipe: str, tmp_path: Path) -> None:
    result = compiled("dynamo", recipe)
    assert not [site for site in result.report.sites if site.status == "skipped"]
    result.save(tmp_path / "out")
    assert divergence("dynamo", tmp_path / "out" / "model.onnx") < WORST_KL[recipe]
    if not recipe.startswith("fp8"):
        kernels = {node.name for node in optimized(tmp_path / "out" / "model.onnx").node if node.op_type in KERNELS}
        assert kernels == layers("dynamo")


@pytest.mark.parametrize("recipe", ["llm-int8", "smoothquant-o1", "fp8"])
def test_outliers_do_no_harm(recipe: str, tmp_path: Path) -> None:
    """Scales for each token alone do not help against channels that are always loud; these recipes do."""
    per_token = compiled("dynamo-outliers", "int8-dynamic")
    per_token.save(tmp_path / "per-token")
    compiled("dynamo-outliers", recipe).save(tmp_path / "out")
    harmed = divergence("dynamo-outliers", tmp_path / "per-token" / "model.onnx")
    assert harmed > 3 * WORST_KL["int8-dynamic"]
    assert divergence("dynamo-outliers", tmp_path / "out" / "model.onnx") < WORST_KL[recipe]


def test_rows_of_a_batch_do_not_touch_each_other(tmp_path: Path) -> None:
    """What one sample holds changes no bit of another's answer, as it does with one scale for the batch."""
    compiled("dynamo", "int8-dynamic").save(tmp_path / "out")
    session = qcompiler.load_session(tmp_path / "out", threads=1)
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 3072, (3, 24))
    mask = np.ones_like(ids)

    def run(rows: np.ndarray) -> np.ndarray:
        return np.asarray(session.run(["logits"], {"input_ids": rows, "attention_mask": mask[: len(rows)]})[0])

    other = ids.copy()
    other[1:] = rng.integers(0, 3072, (2, 24))
    np.testing.assert_array_equal(run(ids)[0], run(other)[0])
