"""The diff tells what became of each layer: of our recipes' outputs, other quantizers', other exporters' graphs."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import qcompiler
from models import export
from qcompiler.calibration.samples import from_python
from qcompiler.graph import files as model_io
from qcompiler.model_diff import diff
from qcompiler.model_diff.terminal import common, rows_of
from tests import tiny
from tests.demo import (
    EMBEDDING,
    HEAD,
    LAYERS,
    LINEARS,
    SHAPES,
    WHOLE,
    Reader,
    clause,
    compiled,
    stories,
    variant,
    windows,
)
from tests.there import tensors, there

# ---------------------------------------------------------------------------------------------------- our own recipes


@pytest.mark.parametrize(
    ("target", "rounded", "linear", "table"),
    [
        ("ort-cpu", ", activations int8 group(128) symmetric dynamic", "MatMulNBits", "GatherBlockQuantized"),
        ("portable", "", "MatMul", "Gather"),
    ],
)
def test_gptq(target: str, rounded: str, linear: str, table: str) -> None:
    """The kernel rounds its input itself (accuracy_level 4). Blocks that repeat the scale of a channel are channels."""
    found = stories(diff(variant("dynamo"), compiled("gptq-w4", target)))
    form = f"{linear} int4 group(128) symmetric{rounded}, gptq"
    expected = {path: f"{path}: MatMul float32 {shape} → {form}" for path, shape in LINEARS.items()}
    assert {path: clause(story) for path, story in found.items() if path in LINEARS} == expected
    form = f"{table} int8 per-channel symmetric, quantize-weights"
    assert clause(found[EMBEDDING]) == f"{EMBEDDING}: Gather float32 3072×256 → {form}"
    assert clause(found[HEAD]).endswith(f"int8 per-channel symmetric{rounded}, quantize-weights")
    for path in LINEARS:
        assert 0.05 < there(found[path].weight_error) < 0.5, "four bits, and GPTQ is after the outputs"
    assert there(found[HEAD].weight_error) < 0.02, "eight bits"


@pytest.mark.parametrize(("target", "op"), [("ort-cpu", "MatMulIntegerToFloat"), ("portable", "MatMul")])
def test_smoothquant_says_where_the_scales_went(target: str, op: str) -> None:
    quantized = compiled("smoothquant", target, "dynamo-outliers", "smooth-quant.alpha=0.5")
    found = diff(variant("dynamo-outliers"), quantized)
    told = stories(found)
    assert set(told) == set(WHOLE)
    for path, shape in LINEARS.items():
        form = "int8 per-channel symmetric, activations uint8 per-tensor asymmetric, quantize-weights"
        assert clause(told[path]) == f"{path}: MatMul float32 {shape} → {op} {form}"
        # Only with the moved scales taken into account are the weights as close as eight bits are.
        assert there(told[path].weight_error) < 0.05
    moved = {move.into: move for move in found.scales}
    for n in range(LAYERS):
        block = f"model.layers.{n}"
        for norm, readers in (("input_layernorm", "qkv"), ("post_attention_layernorm", ("gate", "up"))):
            group = "self_attn" if norm == "input_layernorm" else "mlp"
            move = moved[f"{block}.{norm}"]
            assert move.passes == ("smooth-quant",)
            assert set(move.readers) == {f"{block}.{group}.{reader}_proj" for reader in readers}
            assert move.high / move.low > 5, "planted outliers are 50 times as loud"
            for reader in move.readers:
                assert f"input scaled by smooth-quant into {block}.{norm}" in told[reader].text
        up, down = f"{block}.mlp.up_proj", f"{block}.mlp.down_proj"
        assert f"input scaled by smooth-quant into {up}" in told[down].text
        assert "its outputs take the scale of the next layer by smooth-quant" in told[up].text


def test_dynamic_activations_and_binary_weights() -> None:
    told = stories(diff(variant("dynamo"), compiled("int8-dynamic", "ort-cpu")))
    for path in LINEARS:
        assert there(told[path].after).activations == "activations int8 per-token symmetric dynamic"
        assert there(told[path].after).weight == "int8 per-channel symmetric"
    told = stories(diff(variant("dynamo"), compiled("nf4", "ort-cpu")))
    assert {there(told[path].after).weight for path in LINEARS} == {"nf4 group(64) symmetric"}
    assert all(0.03 < there(told[path].weight_error) < 0.15 for path in LINEARS)


def test_caches() -> None:
    found = diff(variant("optimum"), compiled("kv-int8", "ort-cpu", "optimum"))
    told = stories(found, "cache")
    paths = {f"model.layers.{n}.self_attn.{role}_cache" for n in range(LAYERS) for role in ("key", "value")}
    assert set(told) == paths
    for path in paths:
        scheme = f"int8 per-token symmetric dynamic{', channels normalized' if 'key' in path else ''}"
        assert told[path].text == f"{path}: cache float32 → cache {scheme}, quantize-kv-cache"
        # 2 heads of 32 channels: four bytes each, then one each and a scale of two bytes a head.
        assert (there(told[path].before).bytes, there(told[path].after).bytes) == (256, 68)
    assert {port.name for port in found.ports} >= {"past_key_values.0.key", "present.3.value", "present.0.key_scale"}
    assert all(story.fate == "untouched" for path, story in stories(found).items() if path != HEAD)
    assert stories(found)[HEAD].notes == (f"stored once with {EMBEDDING}",)


# --------------------------------------------------------------------------------------------------------------- peers


@pytest.fixture(scope="module")
def peers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    peer = pytest.importorskip("onnxruntime.quantization")
    folder, source = tmp_path_factory.mktemp("peers"), str(variant("dynamo"))
    out = {name: folder / f"{name}.onnx" for name in ("qdq", "qoperator", "dynamic")}
    static = {"activation_type": peer.QuantType.QUInt8, "op_types_to_quantize": ["MatMul", "Gather"]}
    peer.quantize_static(source, out["qdq"], Reader(), quant_format=peer.QuantFormat.QDQ, per_channel=True,
                         weight_type=peer.QuantType.QInt8, **static)  # fmt: skip
    peer.quantize_static(source, out["qoperator"], Reader(), quant_format=peer.QuantFormat.QOperator,
                         weight_type=peer.QuantType.QUInt8, **static)  # fmt: skip
    peer.quantize_dynamic(source, out["dynamic"], weight_type=peer.QuantType.QUInt8)
    return out


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("qdq", "MatMul int8 per-channel symmetric, activations uint8 per-tensor asymmetric"),
        ("qoperator", "QLinearMatMul uint8 per-tensor asymmetric, activations uint8 per-tensor asymmetric"),
        ("dynamic", "MatMulInteger uint8 per-tensor asymmetric, activations uint8 per-tensor asymmetric dynamic"),
    ],
)
def test_onnxruntimes_quantizers(peers: dict[str, Path], name: str, form: str) -> None:
    found = diff(variant("dynamo"), peers[name])
    told = stories(found)
    assert set(told) == set(WHOLE)
    for path, shape in LINEARS.items():
        # A per-tensor range may happen to lie around its middle.
        text = re.sub(r"\bint8 per-tensor symmetric", "uint8 per-tensor asymmetric", told[path].text)
        assert text == f"{path}: MatMul float32 {shape} → {form}"
        assert told[path].fate == "quantized"
        assert there(told[path].weight_error) < 0.1
    assert told[EMBEDDING].text == f"{EMBEDDING}: Gather float32 3072×256 → Gather uint8 per-tensor asymmetric"
    assert there(told[HEAD].weight_error) < 0.05
    quantized = {(fate.op, fate.after.split(".")[-1]): fate.count for fate in found.fates if fate.fate == "quantized"}
    product = {"qdq": "MatMul", "qoperator": "QLinearMatMul", "dynamic": "MatMulInteger"}[name]
    # The products inside attention, and that of the rotary angles, are quantized where the peer is static.
    assert quantized["MatMul", product] == (28 if name == "dynamic" else 38)
    assert not [fate for fate in found.fates if fate.fate in ("fused", "removed", "replaced")]


@pytest.mark.exporters
def test_the_genai_builders_int4_graph(tmp_path: Path) -> None:
    source = variant("genai")
    python = export.genai_python()
    export.write_source(tmp_path / "source", outliers=False)
    builder = [str(python), "-m", "onnxruntime_genai.models.builder", "-p", "int4", "-e", "cpu"]
    done = subprocess.run(
        [*builder, "-i", str(tmp_path / "source"), "-o", str(tmp_path / "int4")], capture_output=True, text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    form = "MatMulNBits int4 group(32) symmetric, activations int8 group(32) symmetric dynamic"  # accuracy_level 4
    told = stories(diff(source, tmp_path / "int4"))
    assert (
        clause(told["model.layers.2.attn.qkv_proj"]) == f"model.layers.2.attn.qkv_proj: MatMul float32 256×384 → {form}"
    )
    assert len(told) == 2 + 5 * LAYERS
    # Against another exporter's graph three layers are one, and everything has another name.
    found = diff(variant("optimum"), tmp_path / "int4")
    told = stories(found)
    assert len(told) == 2 + 5 * LAYERS
    for n in range(LAYERS):
        packed = told[f"model.layers.{n}.attn.qkv_proj"]
        assert clause(packed) == f"model.layers.{n}.attn.qkv_proj: 3 × MatMul float32 256×384 → {form}"
        assert packed.notes[0] == "q_proj, k_proj, v_proj packed into one"
        assert 0.05 < there(packed.weight_error) < 0.12
        for name in ("self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"):
            path = f"model.layers.{n}.{name}"
            assert clause(told[path]) == f"{path}: MatMul float32 {LINEARS[path]} → {form}"
    assert there(told[EMBEDDING].after).op == "GatherBlockQuantized"
    assert {fate.after for fate in found.fates if fate.fate == "fused"} >= {"com.microsoft.GroupQueryAttention"}


# --------------------------------------------------------------------------------------------------- names, structure


def scrambled(model: ir.Model, seed: int = 0) -> ir.Model:
    """The same graph with other names for everything inside, and without metadata."""
    proto = ir.to_proto(model)
    order = np.random.default_rng(seed).permutation(100_000)
    names: dict[str, str] = {value.name: value.name for value in (*proto.graph.input, *proto.graph.output)}

    def other(name: str) -> str:
        return names.setdefault(name, f"v{order[len(names)]}") if name else ""

    for tensor in proto.graph.initializer:
        tensor.name = other(tensor.name)
    for number, node in enumerate(proto.graph.node):
        node.input[:] = [other(name) for name in node.input]
        node.output[:] = [other(name) for name in node.output]
        node.name = f"n{order[number]}"
        del node.metadata_props[:]
    del proto.graph.value_info[:]
    found = ir.serde.deserialize_model(proto)
    folders = [held.base_dir for held in tensors(model).values() if isinstance(held, ir.ExternalTensor)]
    for held in tensors(found).values():
        if isinstance(held, ir.ExternalTensor):
            held.base_dir = folders[0]
    return found


def test_a_renamed_graph_is_equal() -> None:
    model = model_io.load(variant("dynamo"))
    found = diff(model, scrambled(model))
    assert not found
    assert found.renamed == len(model.graph)
    assert {story.fate for story in found.layers} == {"untouched"}


def test_a_renamed_and_quantized_graph_tells_the_same_stories(peers: dict[str, Path]) -> None:
    plain = stories(diff(variant("dynamo"), peers["qdq"]))
    renamed = stories(diff(variant("dynamo"), scrambled(model_io.load(peers["qdq"]))))
    assert {path: story.text for path, story in renamed.items()} == {path: story.text for path, story in plain.items()}


@pytest.mark.parametrize("other", ["dynamo-past", "opset23", "optimum"])
def test_another_export_of_the_model_has_the_same_layers(other: str) -> None:
    told = stories(diff(variant("dynamo"), variant(other)))
    assert set(told) == set(WHOLE)
    assert {story.fate for story in told.values()} == {"untouched"}
    assert all(story.weight_error == 0 for story in told.values())


def test_half_precision_is_a_cast() -> None:
    found = diff(variant("dynamo"), variant("fp16"))
    told = stories(found)
    assert {story.fate for story in told.values()} == {"cast"}
    assert told[HEAD].text == f"{HEAD}: MatMul float32 256×3072 → MatMul float16"
    assert found.before.bytes["FLOAT"] > 1.9 * found.after.bytes["FLOAT16"]


def test_a_fused_norm_is_told_as_one_operator() -> None:
    found = diff(variant("dynamo"), variant("opset23"))
    into = {fate.op: fate.count for fate in found.fates if (fate.fate, fate.after) == ("fused", "RMSNormalization")}
    assert into["Pow"] == into["ReduceMean"] == 2 * LAYERS + 1


def test_swapped_weights_are_found_though_names_and_shapes_agree() -> None:
    """Two layers that read one value and have one shape are told apart by their weights."""
    text = """g (float[M,32] x, float[32,16] {0}, float[32,16] {1}) => (float[M,16] y) {{
        [one] p = MatMul(x, {0})  [two] q = MatMul(x, {1})  y = Sub(p, q) }}"""
    first = tiny.build(text.format("A", "B"), A="normal", B="normal")
    second = tiny.build(text.format("B", "A"), A="normal", B="normal")
    told = diff(first, second).layers
    assert [(there(story.before).name, there(story.after).name, there(story.weight_error)) for story in told] == [
        ("one", "two", 0), ("two", "one", 0),
    ]  # fmt: skip


def test_an_added_and_a_removed_layer() -> None:
    one = tiny.build("g (float[M,32] x, float[32,16] A) => (float[M,16] y) { [a] y = MatMul(x, A) }", A="normal")
    two = tiny.build(
        """g (float[M,32] x, float[32,16] A, float[16,16] B) => (float[M,16] y) {
        [a] p = MatMul(x, A)  [b] y = MatMul(p, B) }""", A="normal", B="normal",
    )  # fmt: skip
    assert [(s.module_path, s.fate) for s in diff(one, two).layers] == [("a", "untouched"), ("b", "added")]
    assert [(s.module_path, s.fate) for s in diff(two, one).layers] == [("a", "untouched"), ("b", "removed")]


def test_the_models_are_left_as_they_are() -> None:
    model = compiled("gptq-w4", "ort-cpu")
    before = ir.to_proto(model).SerializeToString()
    diff(model, scrambled(model))
    assert ir.to_proto(model).SerializeToString() == before


# ------------------------------------------------------------------------------------------------------------- numbers


def test_measures_of_matched_values(peers: dict[str, Path]) -> None:
    path = variant("dynamo")
    samples = from_python(windows(), model=model_io.load(path))
    found = diff(path, peers["qoperator"], calibration=samples, samples=2)
    told = stories(found)
    assert all(5 < there(story.measures).sqnr_db < 60 for story in told.values())
    assert there(told[HEAD].measures).sqnr_db == pytest.approx(found.outputs["logits"].sqnr_db, abs=0.1)
    assert 0 < there(found.outputs["logits"].kl) < 1


def test_what_smoothing_divided_is_multiplied_back() -> None:
    quantized = compiled("smoothquant", "portable", "dynamo-outliers", "smooth-quant.alpha=0.5")
    path = variant("dynamo-outliers")
    samples = from_python(windows(), model=model_io.load(path))
    told = stories(diff(path, quantized, calibration=samples))
    assert all(there(told[f"model.layers.{n}.mlp.up_proj"].measures).sqnr_db > 15 for n in range(LAYERS))


# --------------------------------------------------------------------------------------------------------- how it shows


def test_json_and_html(peers: dict[str, Path]) -> None:
    found = diff(variant("dynamo"), peers["qdq"])
    data = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert [entry["text"] for entry in data["layers"]] == [story.text for story in found.layers]
    page, card = found.to_html("<A> & B"), found._repr_html_()
    assert page.count("<tr data-status=") == len(found.layers)
    assert "&lt;A&gt; &amp; B" in page
    assert "<script" not in card
    for text in (page, card):
        assert "model.layers." in text
        assert not re.search(r"(src|href)=[\"']?(https?:)?//", text)


def test_rows_put_the_blocks_together() -> None:
    rows = rows_of(diff(variant("dynamo"), compiled("gptq-w4", "ort-cpu")).layers)
    assert [row.path for row in rows][1] == "model.layers.{0…3}.self_attn.q_proj"
    assert len(rows) == 2 + len(SHAPES)
    assert sum(len(row.stories) for row in rows) == len(WHOLE)
    assert common(["a.1.b", "a.3.b"]) == "a.{1,3}.b"
    assert common(["a.1.b"]) == "a.1.b"


def test_two_graphs_of_two_thousand_nodes() -> None:
    """Every layer and every node finds its counterpart, also where both names and quantization differ."""
    count, width = 250, 16
    rng = np.random.default_rng(0)
    nodes, weights, value = [], {}, "x"
    for n in range(count):
        weights[f"w{n}"] = rng.normal(size=(width, width)).astype(np.float32)
        steps = [("MatMul", [value, f"w{n}"]), *((op, None) for op in ("Relu", "Neg", "Tanh", "Abs", "Neg", "Sigmoid"))]
        for step, (op, inputs) in enumerate(steps):
            nodes.append(onnx.helper.make_node(op, inputs or [value], [f"h{n}_{step}"], name=f"node{n}_{step}"))
            value = f"h{n}_{step}"
        nodes.append(onnx.helper.make_node("Add", [value, f"h{n}_0"], [f"r{n}"], name=f"node{n}_sum"))
        value = f"r{n}"
    io = [onnx.helper.make_tensor_value_info(name, 1, ["M", width]) for name in ("x", value)]
    tensors = [onnx.numpy_helper.from_array(data, name) for name, data in weights.items()]
    graph = onnx.helper.make_graph(nodes, "g", io[:1], io[1:], tensors)
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    model = ir.from_proto(proto)
    quantized = qcompiler.compile(model, "int8-weights", target="portable").model
    found = diff(model, scrambled(quantized))
    assert len(model.graph) == 2000
    assert {story.fate for story in found.layers} == {"quantized"}
    assert [there(story.before).name for story in found.layers] == [f"node{n}_0" for n in range(count)]
    assert max(there(story.weight_error) for story in found.layers) < 0.02
    assert {change.kind for change in found.nodes} == {"added", "changed"}
    assert {change.after for change in found.nodes if change.kind == "added"} == {"DequantizeLinear"}
