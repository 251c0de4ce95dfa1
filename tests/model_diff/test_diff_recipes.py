"""What the diff tells of outlier columns, scales that AWQ moved, caches of a fused operator, and a peer's kernels."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import qcompiler
from qcompiler.graph.metadata import PART_OF
from qcompiler.graph.module_path import module_path
from qcompiler.model_diff import diff
from tests.demo import EMBEDDING, HEAD, LAYERS, LINEARS, WHOLE, Reader, clause, compiled, stories, variant, windows
from tests.there import there


def test_awq_says_where_the_scales_went() -> None:
    samples = [{"input_ids": window["input_ids"]} for window in windows(4)]  # on which scales move in all but one place
    model = qcompiler.compile(variant("dynamo"), "awq-w4", target="ort-cpu", calibration=samples).model
    found = diff(variant("dynamo"), model)
    told, moved = stories(found), {move.into: move for move in found.scales}
    form = "MatMulNBits int4 group(128) symmetric, activations int8 group(128) symmetric dynamic, quantize-weights"
    for path, shape in LINEARS.items():
        assert clause(told[path]) == f"{path}: MatMul float32 {shape} → {form}"
        # Four bits alone: without the moved scales, which go beyond 50, it would be far more.
        assert there(told[path].weight_error) < 0.2
    for n in range(LAYERS):
        block = f"model.layers.{n}"
        into = {
            f"{block}.input_layernorm": [f"{block}.self_attn.{role}_proj" for role in "qkv"],
            f"{block}.post_attention_layernorm": [f"{block}.mlp.{role}_proj" for role in ("gate", "up")],
            f"{block}.mlp.up_proj": [f"{block}.mlp.down_proj"],
            f"{block}.self_attn.v_proj": [f"{block}.self_attn.o_proj"],
        }
        if n == 2:  # no scales make this one better: nothing moved, and nothing is told
            assert into.popitem()[0] not in moved
        for place, readers in into.items():
            assert moved[place].passes == ("awq",)
            assert list(moved[place].readers) == readers
            assert all(f"input scaled by awq into {place}" in told[reader].notes for reader in readers)
        assert "its outputs take the scale of the next layer by awq" in told[f"{block}.mlp.up_proj"].notes
    assert not [note for path in (HEAD, EMBEDDING) for note in told[path].notes if "scale" in note]


@pytest.mark.parametrize(("target", "op"), [("ort-cpu", "MatMulIntegerToFloat"), ("portable", "MatMul")])
def test_outlier_columns_stay_float(target: str, op: str) -> None:
    quantized = compiled("llm-int8", target, "dynamo-outliers")
    told = stories(diff(variant("dynamo-outliers"), quantized))
    assert set(told) == set(WHOLE), "what multiplies the columns is no layer of its own"
    parts = {node.metadata_props[PART_OF] for node in quantized.graph if PART_OF in node.metadata_props}
    split = {module_path(node) for node in quantized.graph if node.name in parts}
    assert LAYERS < len(split) < len(WHOLE) - 1
    for path, shape in LINEARS.items():
        form = f"{op} int8 per-channel symmetric, activations int8 per-token symmetric dynamic, quantize-weights"
        assert clause(told[path]) == f"{path}: MatMul float32 {shape} → {form}"
    for path, story in told.items():
        columns = [note for note in story.notes if re.fullmatch(r"\d+ outlier columns? stays? float", note)]
        assert bool(columns) == (path in split)
        # With the rows that outlier columns meet in float, the weight is as near as 8 bits are.
        assert there(story.weight_error) < 0.02


@pytest.mark.parametrize(
    ("recipe", "form", "code_bytes"),
    [
        ("kv-int8", "int8 per-channel symmetric", 1),
        ("kv-int8-fused", "int8 per-channel symmetric", 1),
        ("kv-int4-fused", "int4 per-channel symmetric", 0.5),
    ],
)
def test_caches_of_a_fused_operator(recipe: str, form: str, code_bytes: float) -> None:
    found = diff(variant("genai"), compiled(recipe, "ort-cpu", "genai"))
    caches = stories(found, "cache")
    assert set(caches) == {f"model.layers.{n}.attn.{role}_cache" for n in range(LAYERS) for role in ("key", "value")}
    for path, story in caches.items():
        assert story.text == f"{path}: cache float32 → cache {form}, quantize-kv-cache"
        assert story.fate == "quantized"
        assert (there(story.before).bytes, there(story.after).bytes) == (2 * 32 * 4, 2 * 32 * code_bytes)
    fused = [fate for fate in found.fates if fate.op == "com.microsoft.GroupQueryAttention"]
    assert [(fate.fate, fate.count, fate.activations) for fate in fused] == [("quantized", LAYERS, f"cache {form}")]
    assert {story.fate for story in stories(found).values()} == {"untouched"}


@pytest.mark.parametrize(("layout", "weights"), [("QDQ", "QInt8"), ("QOperator", "QInt8"), ("QOperator", "QUInt8")])
def test_onnxruntimes_static_quantizer_per_channel(layout: str, weights: str, tmp_path: Path) -> None:
    """With every operator that it knows: the table's codes are read by kernels as well as dequantized."""
    peer = pytest.importorskip("onnxruntime.quantization")
    peer.quantize_static(
        str(variant("dynamo")), tmp_path / "model.onnx", Reader(), quant_format=peer.QuantFormat[layout],
        per_channel=True, weight_type=peer.QuantType[weights], activation_type=peer.QuantType.QUInt8,
    )  # fmt: skip
    found = diff(variant("dynamo"), tmp_path / "model.onnx")
    told = stories(found)
    assert set(told) == set(WHOLE)
    op = "MatMul" if layout == "QDQ" else "QLinearMatMul"
    symmetry = "symmetric" if weights == "QInt8" else "asymmetric"
    for path, shape in LINEARS.items():
        kind = "int8" if symmetry == "symmetric" else "uint8"
        form = f"{op} {kind} per-channel {symmetry}, activations uint8 per-tensor asymmetric"
        assert told[path].text == f"{path}: MatMul float32 {shape} → {form}"
        assert there(told[path].weight_error) < 0.02
    assert told[EMBEDDING].text.startswith(f"{EMBEDDING}: Gather float32 3072×256 → Gather uint8 per-tensor asymmetric")
    assert there(told[EMBEDDING].weight_error) < 0.02
    assert {story.fate for story in told.values()} == {"quantized"}
    kinds = {fate.activations for fate in found.fates if fate.fate == "quantized"}
    assert kinds <= {"", "activations uint8 per-tensor asymmetric", "activations int8 per-tensor symmetric"}
