"""What is recommended counts layers that the recipe would quantize, weights once, and speeds of this CPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper, numpy_helper

import qcompiler
from qcompiler.graph.files import save
from qcompiler.inspection import recommend as module
from qcompiler.inspection.recommend import recommend
from qcompiler.targets.machines import Cpu
from tests import tiny

LAYER = "g (float[B,8] x, float[8,8] w) => (float[B,8] y) { y = MatMul(x, w) }"


def first(model: ir.Model | Path) -> str:
    return recommend(model, "ort-cpu")[0].reasons[0]


@pytest.mark.parametrize("text", [
    "g (float[8,B] x, float[8,8] w) => (float[8,B] y) { y = MatMul(w, x) }",  # of another form
    "g (float[B,8] x, float[8,8] w, float[B] c) => (float[B,8] y) { y = Gemm<alpha=2.0>(x, w, c) }",
    "g (float[B,8] x, float[1,8,8] w) => (float[1,B,8] y) { y = MatMul(x, w) }",
    "g (float[B,8] x, float[8,8] w, float s) => (float[B,8] y) { v = Mul(w, s) y = MatMul(x, v) }",
])  # fmt: skip
def test_nothing_is_recommended_for_layers_that_no_pass_takes(text: str) -> None:
    constants = {"w": "normal"} | ({"s": np.float32(2)} if "float s" in text else {})
    assert recommend(tiny.build(text, **constants)) == []


def test_a_model_that_is_quantized_already_gets_no_recipe() -> None:
    model = tiny.build(LAYER, w="normal")
    for recipe in ("int8-weights", "int8-static"):
        compiled = qcompiler.compile(model, recipe, calibration=tiny.feeds(model))
        assert recommend(compiled.model) == []


def test_layers_that_cannot_be_quantized_are_told_beside_those_that_can() -> None:
    text = """g (float[8,8] x, float[8,8] w, float[8,8] u) => (float[8,8] y) {
        a = MatMul(x, w) b = MatMul(u, a) y = MatMul(b, w) }"""
    assert "; 2 of 3 layers can be quantized, 0.000256 MB of weights" in first(tiny.build(text, w="normal", u="normal"))


def test_embeddings_count_as_they_are_quantized() -> None:
    text = """g (int64[B,S] ids, float[100,8] table, float[8,8] w) => (float[B,S,8] y) {
        x = Gather(table, ids) y = MatMul(x, w) }"""
    model = tiny.build(text, table="normal", w="normal")
    assert "; 2 of 2 layers can be quantized, 0.00346 MB of weights" in first(model)


def test_a_shared_weight_counts_once(tmp_path: Path) -> None:
    steps = " ".join(f"a{n} = MatMul({f'a{n - 1}' if n else 'x'}, w)" for n in range(15))
    text = f"g (float[B,8] x, float[8,8] w) => (float[B,8] y) {{ {steps} y = MatMul(a14, w) }}"
    assert "; 16 of 16 layers can be quantized, 0.000256 MB of weights" in first(tiny.build(text, w="normal"))

    weight = numpy_helper.from_array(np.ones((8, 8), np.float32))
    opset = helper.make_opsetid("", 21)
    body = [helper.make_node("Constant", [], ["w"], value=weight), helper.make_node("MatMul", ["a", "w"], ["b"])]
    function = helper.make_function("own", "layer", ["a"], ["b"], body, [opset])
    calls = [helper.make_node("layer", [f"v{n}"], [f"v{n + 1}"], domain="own") for n in range(3)]
    ports = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["B", 8]) for name in ("v0", "v3")]
    graph = helper.make_graph(calls, "g", ports[:1], ports[1:])
    opsets = [opset, helper.make_opsetid("own", 1)]
    onnx.save(helper.make_model(graph, functions=[function], opset_imports=opsets, ir_version=10), tmp_path / "f.onnx")
    assert "; 3 of 3 layers can be quantized, 0.000256 MB of weights" in first(tmp_path / "f.onnx")


def test_constants_that_lie_at_one_place_of_a_file_count_once(tmp_path: Path) -> None:
    text = """g (float[B,1024] x, float[1024,512] w, float[512,1024] v) => (float[B,1024] y) {
        a = MatMul(x, w) y = MatMul(a, v) }"""
    model = tiny.build(text, w="normal", v="normal")
    save(model, tmp_path / "model")
    file = tmp_path / "model" / "model.onnx"
    proto = onnx.load(file, load_external_data=False)
    one, other = proto.graph.initializer
    del other.external_data[:]
    other.external_data.extend(one.external_data)
    onnx.save(proto, file)
    assert "; 2 of 2 layers can be quantized, 2.1 MB of weights" in first(file)


@pytest.mark.parametrize(("cpu", "told"), [
    (Cpu("x86_64", frozenset({"avx2", "avx512f", "avx512_vnni"})), ["8.8", "x86, AVX512-VNNI, which is this CPU"]),
    (Cpu("x86_64", frozenset({"avx2"})), ["2 ", "x86, AVX2 without VNNI, which is this CPU"]),
])  # fmt: skip
def test_speeds_of_this_cpu_are_told(cpu: Cpu, told: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "this_cpu", lambda: cpu)
    (figure,) = (reason for reason in recommend(tiny.build(LAYER, w="normal"), "ort-cpu")[0].reasons if "×" in reason)
    assert all(text in figure for text in told)


def test_speeds_of_other_cpus_are_told_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "this_cpu", lambda: Cpu("aarch64"))
    figures = [reason for reason in recommend(tiny.build(LAYER, w="normal"), "ort-cpu")[0].reasons if "×" in reason]
    assert len(figures) == 2
    assert all("which is another CPU than this one" in figure for figure in figures)
