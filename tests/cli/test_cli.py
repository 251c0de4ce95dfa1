"""The command line: exit codes, one-sentence errors, one JSON object, and a light start."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import typer
from onnx import TensorProto, helper, numpy_helper

from qcompiler import errors
from qcompiler.cli import app as cli
from qcompiler.cli.common import parse_size
from qcompiler.targets import Target, target_names

HEAVY = (
    "numpy",
    "onnx",
    "onnx_ir",
    "onnxruntime",
    "onnxscript",
    "torch",
    "transformers",
    "yaml",
)  # typer itself loads pydantic


def write_model(folder: Path, width: int = 64) -> Path:
    """Two linear layers with a Relu between, as a file with a tokenizer beside it."""
    folder.mkdir(exist_ok=True)
    random = np.random.default_rng(0)
    weights = [random.standard_normal((width, width), dtype=np.float32) for _ in range(2)]
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w0"], ["h0"], name="/up/MatMul"),
            helper.make_node("Relu", ["h0"], ["h1"], name="/act/Relu"),
            helper.make_node("MatMul", ["h1", "w1"], ["y"], name="/down/MatMul"),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", width])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", width])],
        [numpy_helper.from_array(weight, f"w{index}") for index, weight in enumerate(weights)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, folder / "model.onnx")
    (folder / "tokenizer.json").write_text("{}")
    np.savez(folder / "data.npz", x=random.standard_normal((12, 4, width), dtype=np.float32))
    return folder / "model.onnx"


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Run the console script in this process; returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["qcompiler", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    code = caught.value.code
    return code if isinstance(code, int) else 0


@pytest.mark.parametrize("arguments", [["--help"], ["compile", "--help"], ["eval", "--help"], ["generate", "--help"]])
def test_help_is_light(arguments: list[str]) -> None:
    code = (
        "import sys; from qcompiler import cli; sys.argv = ['qcompiler', *sys.argv[1:]]\n"
        "try: cli.main()\n"
        f"finally: print('LOADED', [name for name in {HEAVY} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "Usage: qcompiler" in done.stdout
    assert "LOADED []" in done.stdout


def test_module_can_be_run() -> None:
    done = subprocess.run([sys.executable, "-m", "qcompiler", "--version"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "onnx-ir " in done.stdout


def test_every_command_of_the_contract_exists(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, "--help")
    text = capsys.readouterr().out
    for command in ("compile", "calibrate", "eval", "generate", "diff", "passes", "explain", "recipes", "targets"):
        assert command in text


def test_compile_without_data(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    model = write_model(tmp_path / "in")
    out = tmp_path / "out"
    settings = ["--set", "lower-weight-only.block_size=64"]
    assert run(monkeypatch, "compile", model, "--recipe", "int8-weights", "-o", out, *settings) == 0
    text = capsys.readouterr().out
    assert text.startswith("– int8-weights for ort-cpu"), "nobody has compared it"
    assert "2 of 2 layers quantized" in text
    assert {"model.onnx", "recipe.yaml", "report.json", "tokenizer.json"} <= {path.name for path in out.iterdir()}
    assert json.loads((out / "report.json").read_text())["target"] == "ort-cpu"
    assert "block_size: 64" in (out / "recipe.yaml").read_text()


def test_compile_json_prints_one_object(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    model = write_model(tmp_path / "in")
    arguments = ["compile", model.parent, "-r", "int8-static", "-o", tmp_path / "out", "--json", "--target", "portable"]
    arguments += ["--calibration", model.parent / "data.npz", "--samples", "8", "--set", "quantize-weights.search=mse"]
    assert run(monkeypatch, *arguments) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["target"] == "portable"
    assert [site["status"] for site in report["sites"]] == ["quantized", "quantized"]
    assert report["outputs"]["y"]["sqnr_db"] > 20
    assert "search: mse" in (tmp_path / "out" / "recipe.yaml").read_text()


def test_calibrate_then_compile_from_its_statistics(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    model = write_model(tmp_path / "in")
    stats, data = tmp_path / "stats.safetensors", model.parent / "data.npz"
    assert run(monkeypatch, "calibrate", model, "-r", "int8-static", "--calibration", data, "-o", stats) == 0
    assert stats.is_file()
    arguments = ["compile", model, "-r", "int8-static", "--statistics", stats, "-o", tmp_path / "out"]
    assert run(monkeypatch, *arguments) == 0
    assert "2 of 2 layers quantized" in capsys.readouterr().out
    assert run(monkeypatch, "calibrate", model, "-r", "int8-static", "--calibration", data, "-o", stats) == 2
    assert "exists already" in capsys.readouterr().err


def test_a_failed_gate_is_exit_code_1_and_the_output_is_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    model = write_model(tmp_path / "in")
    recipe = tmp_path / "strict.yaml"
    recipe.write_text("passes: [quantize-weights, quantize-activations]\ngates: {output_sqnr_db: 200}\n")
    arguments = ["compile", model, "-r", recipe, "-o", tmp_path / "out", "--calibration", model.parent / "data.npz"]
    assert run(monkeypatch, *arguments) == 1
    assert "output_sqnr_db" in capsys.readouterr().out.splitlines()[0]
    assert (tmp_path / "out" / "model.onnx").is_file()


def test_an_existing_output_is_kept_and_nothing_is_worked_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    model = write_model(tmp_path / "in")
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    # The recipe does not exist either: the output is looked at first, before any work.
    assert run(monkeypatch, "compile", model, "-r", "absent", "-o", out) == 2
    assert "exists already" in capsys.readouterr().err
    assert run(monkeypatch, "compile", model, "-r", "absent", "-o", out, "--overwrite") == 2
    assert "no earlier output" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["precious.txt"]
    (out / "precious.txt").unlink()
    assert run(monkeypatch, "compile", model, "-r", "int8-weights", "-o", out) == 0
    assert run(monkeypatch, "compile", model, "-r", "int8-weights", "-o", out) == 2
    assert run(monkeypatch, "compile", model, "-r", "int8-weights", "-o", out, "--overwrite") == 0
    assert run(monkeypatch, "compile", model, "-r", "int8-weights", "-o", tmp_path, "--overwrite") == 2
    assert "holds the input model" in capsys.readouterr().err
    assert model.is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-r", "int8-statik"], "no recipe 'int8-statik'; did you mean 'int8-static'"),
        (["-r", "int8-static"], "needs calibration data"),
        (["-r", "int8-weights", "--set", "quantize-weights.fromat=int8"], "has no option 'fromat'"),
        (["-r", "int8-weights", "--exclude", "dwn"], "'dwn'"),
        (["-r", "int8-weights", "--target", "ort-gpu"], "no target 'ort-gpu'"),
        (["-r", "int8-static", "--target", "ort-cuda"], "take --recipe int8-weights"),
        (["-r", "int8-static", "--calibration", "absent.npz"], "absent.npz"),
        (["-r", "int8-static", "--calibration", ""], "empty name"),
        (["-r", "int8-weights", "--exclude", "re:zzz"], "its layers are called up, /up/MatMul, down"),
        (["-r", "int8-weights", "--device", "cuda"], "--device cuda"),
    ],
)
def test_bad_input_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    arguments: list[str],
    message: str,
) -> None:
    model = write_model(tmp_path / "in")
    assert run(monkeypatch, "compile", model, "-o", tmp_path / "out", *arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert len(captured.err.strip().splitlines()) == 1
    assert message in captured.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def truncate(folder: Path) -> None:
    data = (folder / "model.onnx").read_bytes()
    (folder / "model.onnx").write_bytes(data[: len(data) // 2])


def link_weights_elsewhere(folder: Path) -> None:
    elsewhere = folder.parent / "elsewhere"
    elsewhere.mkdir()
    model = onnx.load(folder / "model.onnx")
    onnx.save(model, folder / "model.onnx", save_as_external_data=True, location="weights.data")
    (folder / "weights.data").rename(elsewhere / "weights.data")
    (folder / "weights.data").symlink_to(elsewhere / "weights.data")


def rename_input_of_data(folder: Path) -> None:
    np.savez(folder / "data.npz", z=np.zeros((4, 4, 64), np.float32))


def put_nan_into_data(folder: Path) -> None:
    data = np.zeros((4, 4, 64), np.float32)
    data[1, 2, 3] = np.nan
    np.savez(folder / "data.npz", x=data)


def lower_opset(folder: Path) -> None:
    model = onnx.load(folder / "model.onnx")
    model.opset_import[0].version = 8
    onnx.save(model, folder / "model.onnx")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (truncate, "is no ONNX model, or is cut off"),
        (link_weights_elsewhere, "outside of the model's folder"),
        (rename_input_of_data, "'x'"),
        (put_nan_into_data, "NaN"),
        (lower_opset, "opset 8"),
    ],
)
def test_spoilt_input_is_one_sentence_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    spoil: Callable[..., Any],
    message: str,
) -> None:
    folder = write_model(tmp_path / "in").parent
    spoil(folder)
    before = sorted(path.name for path in tmp_path.iterdir())
    arguments = ["-r", "int8-static", "--calibration", folder / "data.npz", "-o", tmp_path / "out"]
    assert run(monkeypatch, "compile", folder, *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert len(error.strip().splitlines()) == 1
    assert message in error
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_full_disk_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    model = write_model(tmp_path / "in")

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("onnx_ir.save", full)
    assert run(monkeypatch, "compile", model, "-r", "int8-weights", "-o", tmp_path / "out") == 2
    assert capsys.readouterr().err.startswith("error: the disk is full")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_disk_that_fills_while_a_large_tensor_is_written(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Numpy's tofile raises an OSError without a number."""
    model = write_model(tmp_path / "in")

    def full(*_: object, **__: object) -> None:
        raise OSError("512000 requested and 328096 written")

    monkeypatch.setattr("onnx_ir.save", full)
    assert run(monkeypatch, "compile", model, "-r", "int8-weights", "-o", tmp_path / "out") == 2
    assert capsys.readouterr().err.startswith("error: the disk is full")


def test_dumps_that_cannot_be_written(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    model = write_model(tmp_path / "in")
    (tmp_path / "file").touch()
    out = tmp_path / "out"
    assert run(monkeypatch, "compile", model, "-r", "int8-weights", "-o", out, "--dump-dir", tmp_path / "file/d") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "is no folder; choose another place" in error
    assert len(error.splitlines()) == 1
    assert not out.exists()


OWN_STATISTIC = """
from dataclasses import dataclass, field
from qcompiler import Statistic
from qcompiler.statistics import Range

@dataclass
class Largest(Statistic):
    seen: float = field(default=0.0, init=False)
    def update(self, batch):
        self.seen = max(self.seen, float(abs(batch).max()))
    def merge(self, other):
        self.seen = max(self.seen, other.seen)
    def result(self):
        return Range(-self.seen, self.seen)
"""


def test_a_statistic_of_ones_own_from_the_current_folder(tmp_path: Path) -> None:
    """In processes of their own: the console script does not have the current folder on its import path."""
    write_model(tmp_path / "in")
    (tmp_path / "own_statistic.py").write_text(OWN_STATISTIC)
    (tmp_path / "own.yaml").write_text(
        "passes: [quantize-weights, {quantize-activations: {range: 'own_statistic:Largest'}}]"
    )
    script = str(Path(sys.executable).parent / "qcompiler")
    start = [script, "calibrate", "in", "-r", "own.yaml", "--calibration", "in/data.npz", "-o", "stats.safetensors"]
    subprocess.run(start, cwd=tmp_path, check=True, capture_output=True)
    start = [script, "compile", "in", "-r", "own.yaml", "--statistics", "stats.safetensors", "-o", "out"]
    subprocess.run(start, cwd=tmp_path, check=True, capture_output=True)
    sites = json.loads((tmp_path / "out" / "report.json").read_text())["sites"]
    assert {site["status"] for site in sites} == {"quantized"}


def test_random_data_warns_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    model = write_model(tmp_path / "in")
    arguments = ["compile", model, "-r", "int8-static", "--calibration", "random", "--samples", 2, "-o", tmp_path / "o"]
    assert run(monkeypatch, *arguments) == 0
    assert capsys.readouterr().err.startswith("warning: random calibration data")


@pytest.mark.parametrize(
    "arguments",
    [
        ["compile"],
        ["compile", "m.onnx", "-r", "int8-weights"],
        ["compile", "m.onnx", "-r", "int8-weights", "-o", "out", "--memory-limit", "lots"],
        ["compile", "m.onnx", "-r", "int8-weights", "-o", "out", "--samples", "0"],
        ["compile", "m.onnx", "-r", "int8-weights", "-o", "out", "--device", "tpu"],
        ["recipe"],
    ],
)
def test_usage_errors(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    assert run(monkeypatch, *arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Usage" in captured.err


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("4GiB", 4 << 30),
        ("500MB", 500_000_000),
        ("1.5 GB", 1_500_000_000),
        ("2k", 2000),
        ("3KiB", 3072),
        ("1073741824", 1 << 30),
        ("12 B", 12),
        ("1tib", 1 << 40),
    ],
)
def test_sizes(text: str, count: int) -> None:
    assert parse_size(text) == count


@pytest.mark.parametrize("text", ["", "4 apples", "-1GB", "GiB", "1e9"])
def test_wrong_sizes(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="is no size"):
        parse_size(text)


def write_language_model(folder: Path, noise: float) -> Path:
    """Logits from a table of bigrams: input_ids [batch, sequence] to logits [batch, sequence, 16]."""
    folder.mkdir()
    random = np.random.default_rng(1)
    table = random.standard_normal((16, 16), dtype=np.float32)
    table += noise * np.random.default_rng(2).standard_normal((16, 16), dtype=np.float32)
    graph = helper.make_graph(
        [helper.make_node("Gather", ["table", "input_ids"], ["logits"], name="embed")],
        "g",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "sequence"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "sequence", 16])],
        [numpy_helper.from_array(table, "table")],
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), folder / "model.onnx"
    )
    lines = [json.dumps({"input_ids": random.integers(0, 16, 20).tolist()}) for _ in range(3)]
    (folder / "data.jsonl").write_text("\n".join(lines))
    return folder


def test_eval(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    exact, noisy = (write_language_model(tmp_path / name, noise) for name, noise in (("a", 0.0), ("b", 0.1)))
    data = exact / "data.jsonl"
    assert run(monkeypatch, "eval", noisy, "--data", data, "--reference", exact, "--json") == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["tokens"] == 3 * 19
    assert figures["kl"] > 0
    assert run(monkeypatch, "eval", exact, "--data", data, "--reference", exact) == 0
    text = capsys.readouterr().out
    assert "perplexity ratio" in text
    assert "exact" in text, "a model does not differ from itself"
    assert run(monkeypatch, "eval", exact, "--data", data, "--reference", exact, "--json") == 0
    assert json.loads(capsys.readouterr().out)["sqnr_db"] == "inf"
    assert run(monkeypatch, "eval", exact, "--data", data, "--decode", "--chunk", 5, "--prefill", 8, "--json") == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["tokens"] == 3 * 19
    assert "has no cache" in captured.err
    assert run(monkeypatch, "eval", exact, "--data", data, "--chunk", 5) == 2
    assert "--decode" in capsys.readouterr().err
    assert run(monkeypatch, "eval", exact, "--data", tmp_path / "absent.npz") == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_diff(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    model = write_model(tmp_path / "in")
    assert run(monkeypatch, "compile", model, "-r", "int8-weights", "-o", tmp_path / "out", "--target", "portable") == 0
    capsys.readouterr()
    assert run(monkeypatch, "diff", model, tmp_path / "out", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert {node["after"] for node in found["nodes"] if node["kind"] == "added"} == {"DequantizeLinear"}
    assert all(node["passes"] == "quantize-weights" for node in found["nodes"] if node["kind"] == "added")
    assert len(found["quantization"]) == 2
    page = tmp_path / "diff.html"
    assert run(monkeypatch, "diff", model, tmp_path / "out", "--details", "--html", page) == 0
    text = capsys.readouterr().out
    assert "layers: 2 quantized" in text
    assert "DequantizeLinear 0 → 2" in text
    assert '<table id="table"' in page.read_text(encoding="utf-8")
    assert run(monkeypatch, "diff", model, tmp_path / "out", "--seq-len", "4") == 2
    assert "--calibration" in capsys.readouterr().err
    assert run(monkeypatch, "diff", model, tmp_path / "absent") == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_passes_and_explain(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "passes") == 0
    assert "smooth-quant" in capsys.readouterr().out
    assert run(monkeypatch, "explain", "smooth-quant") == 0
    text = capsys.readouterr().out
    assert "**Before**" in text
    assert "alpha" in text
    assert "insert_mul" in text
    assert run(monkeypatch, "explain", "smooth-quart") == 2
    assert capsys.readouterr().err == "error: there is no pass 'smooth-quart'; did you mean 'smooth-quant'?\n"


def test_a_broken_plugin_is_listed_as_such(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(name: str) -> type:
        raise errors.RecipeError(f"the pass {name!r} cannot be imported")

    monkeypatch.setattr("qcompiler.recipes.registry.pass_class", broken)
    assert run(monkeypatch, "passes") == 0
    assert "cannot be imported" in capsys.readouterr().out


def test_recipes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run(monkeypatch, "recipes") == 0
    assert "smoothquant" in capsys.readouterr().out
    assert run(monkeypatch, "recipes", "smoothquant", "--target", "ort-cpu") == 0
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    assert run(monkeypatch, "recipes", printed) == 0
    assert "lower-int8" in capsys.readouterr().out


def test_targets(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "targets") == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in ("portable", "ort-cpu", "ort-cuda"))
    assert run(monkeypatch, "targets", "ort-cuda") == 0
    text = capsys.readouterr().out
    assert "MatMulNBits" in text
    assert "refuses static W8A8" in text


def test_interrupt_defect_and_pass_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def raising(error: BaseException) -> Callable[..., None]:
        def explode(*_: object) -> None:
            raise error

        return explode

    monkeypatch.setattr("qcompiler.recipes.registry.pass_names", raising(KeyboardInterrupt()))
    assert run(monkeypatch, "passes") == 130
    monkeypatch.setattr("qcompiler.recipes.registry.pass_names", raising(ZeroDivisionError("oops")))
    assert run(monkeypatch, "passes") == cli.DEFECT
    text = capsys.readouterr().err
    assert "Traceback" in text
    assert "ZeroDivisionError: oops" in text
    assert "please report it" in text
    monkeypatch.setattr("qcompiler.recipes.registry.pass_names", raising(errors.PassError("smooth-quant broke y")))
    assert run(monkeypatch, "passes") == 2
    text = capsys.readouterr().err
    assert text.startswith("error: smooth-quant broke y")
    assert "please report it" in text


def test_targets_as_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "targets", "--json") == 0
    titles = json.loads(capsys.readouterr().out)["targets"]
    assert set(titles) == set(target_names())
    for name in titles:
        assert run(monkeypatch, "targets", name, "--json") == 0
        assert Target.model_validate(json.loads(capsys.readouterr().out)) == Target.load(name)
