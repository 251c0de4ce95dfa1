"""`inspect`: layers, schemes, bytes and statistics of models, ours and others'; and what a recipe would touch."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import qcompiler
from qcompiler.cli import app as cli
from qcompiler.errors import RecipeError
from qcompiler.graph import files as model_io
from qcompiler.inspection import inspect
from qcompiler.inspection.weights import statistics_of
from qcompiler.sites.stored import float_weight
from tests import tiny
from tests.there import there

GRAPH = """g (int64[B,S] ids, float[50,32] table, float[32,64] w0, float[64] b0, float[64,32] w1, float[64,64] wx)
    => (float[B,S,32] y, float[B,S,64] z) {
    ["/embed/Gather"] e = Gather(table, ids)
    ["/layers.0/up/MatMul"] p = MatMul(e, w0)
    ["/layers.0/up/Add"] h = Add(p, b0)
    ["/layers.0/down/MatMul"] y = MatMul(h, w1)
    ["/extra/MatMul"] z = MatMul(h, wx)
}"""


@pytest.fixture(scope="module")
def model() -> ir.Model:
    return tiny.build(GRAPH, table="normal", w0="normal", b0="normal", w1="outliers", wx="normal")


def data() -> list[dict[str, np.ndarray]]:
    return [{"ids": np.random.default_rng(i).integers(0, 50, (1, 6))} for i in range(4)]


def test_a_float_model(model: ir.Model) -> None:
    found = inspect(model)
    layers = {layer.module_path: layer for layer in found.layers}
    assert list(layers) == ["embed", "layers.0.up", "layers.0.down", "extra"]
    up = layers["layers.0.up"]
    assert (up.op, up.type, up.scheme, up.shape, up.bytes) == ("MatMul", "float", "", (32, 64), 32 * 64 * 4)
    assert up.block == "layers.0"
    assert found.bytes["float"] == 4 * (50 * 32 + 32 * 64 + 64 + 64 * 32 + 64 * 64)
    assert found.operators["MatMul"] == 3
    assert [port.name for port in found.outputs] == ["y", "z"]
    assert found.inputs[0].shape == ("B", "S")
    assert not found.made_by_qcompiler
    assert not found.touched


def test_statistics(model: ir.Model) -> None:
    weights = np.asarray(tiny.data(model, "w1"), np.float64)
    seen = there({layer.module_path: layer.statistics for layer in inspect(model).layers}["layers.0.down"])
    assert seen.absmax == pytest.approx(np.abs(weights).max())
    assert seen.mean == pytest.approx(weights.mean())
    assert seen.std == pytest.approx(weights.std())
    assert seen.kurtosis == pytest.approx(((weights - weights.mean()) ** 4).mean() / weights.std() ** 4)
    assert all(layer.statistics is None for layer in inspect(model, statistics=False).layers)


@pytest.mark.parametrize("case", ["offset", "constant", "broken", "empty"])
def test_statistics_of_odd_weights(case: str) -> None:
    rng = np.random.default_rng(0)
    array = {
        "offset": 1e4 + rng.normal(size=(300, 5000)), "constant": np.full((3, 4), 2.0),
        "broken": np.array([1.0, np.nan, np.inf, -3.0]), "empty": np.zeros((0, 4)),
    }[case].astype(np.float32)  # fmt: skip
    seen = statistics_of(there(float_weight(ir.Value(name="w", const_value=ir.tensor(array)))))
    if case == "empty":
        assert seen is None
        return
    assert seen is not None
    finite = array[np.isfinite(array)].astype(np.float64)
    assert seen.absmax == np.abs(finite).max()
    assert seen.std == pytest.approx(finite.std(), rel=1e-6)
    assert seen.not_finite == (2 if case == "broken" else 0)


@pytest.mark.parametrize(
    ("recipe", "target", "op", "scheme", "activations"),
    [
        ("int8-static", "portable", "MatMul", "int8 per-channel symmetric", "int8 per-tensor symmetric"),
        ("int8-static", "ort-cpu", "MatMulIntegerToFloat", "int8 per-channel symmetric", "int8 per-tensor symmetric"),
        ("int8-dynamic", "portable", "MatMul", "int8 per-channel symmetric", "int8 per-token symmetric dynamic"),
        (
            "int8-dynamic",
            "ort-cpu",
            "MatMulIntegerToFloat",
            "int8 per-channel symmetric",
            "int8 per-token symmetric dynamic",
        ),
        ("rtn-w4", "portable", "MatMul", "int4 group(16) symmetric", ""),
        ("rtn-w4", "ort-cpu", "MatMulNBits", "int4 group(16) symmetric", "int8 group(16) symmetric dynamic"),
        ("hqq-w4", "ort-cpu", "MatMulNBits", "uint4 group(16) asymmetric", "int8 group(16) symmetric dynamic"),
        ("nf4", "portable", "MatMul", "nf4 group(64) symmetric, scales int8 per-tensor", ""),
        ("nf4", "ort-cpu", "MatMulBnb4", "nf4 group(64) symmetric", ""),
    ],
)
def test_models_of_ours(model: ir.Model, recipe: str, target: str, op: str, scheme: str, activations: str) -> None:
    options = {"rtn-w4": ["quantize-weights.group_size=16"], "hqq-w4": ["hqq.group_size=16"]}.get(recipe, [])
    compiled = qcompiler.compile(model, recipe, calibration=data(), target=target, options=options)
    found = inspect(compiled.model)
    up = {layer.module_path: layer for layer in found.layers}["layers.0.up"]
    assert (up.op, up.scheme, up.activations) == (op, scheme, activations)
    assert found.made_by_qcompiler
    assert found.metadata["recipe"] == recipe
    assert {layer.module_path for layer in found.layers} == {"embed", "layers.0.up", "layers.0.down", "extra"}
    assert all(layer.scheme for layer in found.layers)
    floats = {layer.module_path: there(layer.statistics) for layer in inspect(model).layers}
    for layer in found.layers:
        assert there(layer.statistics).std == pytest.approx(floats[layer.module_path].std, rel=0.06)


def test_weights_in_files(model: ir.Model, tmp_path: Path) -> None:
    big = tiny.build("g (float[B,600] x, float[600,600] w) => (float[B,600] y) { y = MatMul(x, w) }", w="normal")
    model_io.save(big, tmp_path / "out")
    found = inspect(tmp_path / "out")
    assert found.external == {"model.onnx.data": 600 * 600 * 4}
    assert there(found.layers[0].statistics).std == pytest.approx(1, abs=0.01)


def test_models_of_onnxruntime(model: ir.Model, tmp_path: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    ir.save(model, tmp_path / "float.onnx")
    quantize_dynamic(tmp_path / "float.onnx", tmp_path / "dynamic.onnx", weight_type=QuantType.QInt8)
    found = inspect(tmp_path / "dynamic.onnx")
    ops = {layer.op: layer for layer in found.layers}
    assert ops["MatMulInteger"].type == "int8"
    assert ops["MatMulInteger"].activations == "uint8 per-tensor asymmetric dynamic"
    assert ops["MatMulInteger"].bytes >= 32 * 64


def test_operators_that_no_pass_handles_are_listed_with_the_reason() -> None:
    lstm = tiny.build(
        """g (float[5,B,8] x, float[1,64,8] w, float[1,64,16] r) => (float[5,1,B,16] y) {
            y = LSTM<hidden_size=16>(x, w, r) }""",
        w="normal", r="normal",
    )  # fmt: skip
    (layer,) = inspect(lstm).layers
    assert layer.op == "LSTM"
    assert "no pass handles" in layer.note
    assert layer.bytes == 4 * (64 * 8 + 64 * 16)


def test_what_a_recipe_would_touch(model: ir.Model) -> None:
    found = inspect(model, recipe="rtn-w4", exclude=["extra"]).touched
    done = {(item.pass_name, item.module_path): item.does for item in found if not item.obstacle}
    assert done["quantize-weights", "layers.0.up"] == "int4 per-channel symmetric"  # groups as wide as K
    assert done["quantize-weights", "embed"].startswith("int8 per-channel")
    assert ("quantize-weights", "extra") not in done
    static = inspect(model, recipe="int8-static").touched
    assert {item.pass_name for item in static} == {"quantize-weights", "quantize-activations"}
    with pytest.raises(RecipeError, match="matches no layer"):
        inspect(model, recipe="rtn-w4", exclude=["nothing"])


def test_what_is_touched_is_what_a_compilation_changes(model: ir.Model) -> None:
    touched = {item.name for item in inspect(model, recipe="rtn-w4").touched if not item.obstacle}
    report = qcompiler.compile(model, "rtn-w4").report
    assert touched == {site.name for site in report.with_status("quantized")}


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["qcompiler", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return caught.value.code if isinstance(caught.value.code, int) else 0


def test_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, model: ir.Model
) -> None:
    ir.save(model, tmp_path / "model.onnx")
    assert run(monkeypatch, "inspect", tmp_path / "model.onnx", "--recipe", "rtn-w4") == 0
    printed = capsys.readouterr().out
    for text in ("layers.0.up", "MatMul", "IR 10", "quantize-weights: 3 layers → int4 per-channel symmetric"):
        assert text in printed
    assert run(monkeypatch, "inspect", tmp_path / "model.onnx", "--json", "--no-weights") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["layers"][1]["module_path"] == "layers.0.up"
    assert found["layers"][1]["statistics"] is None
    assert run(monkeypatch, "inspect", tmp_path / "model.onnx", "--exclude", "extra") == 2
