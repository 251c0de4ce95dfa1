"""A compilation times its result beside the float model where both can run, and else says why it does not."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import qcompiler
from qcompiler import cli
from qcompiler.benchmarking import speedup
from qcompiler.benchmarking.speedup import Speedup
from qcompiler.benchmarking.timing import Limits
from qcompiler.calibration.samples import from_python
from qcompiler.driver import speed
from qcompiler.errors import ModelError
from qcompiler.graph.files import save
from qcompiler.report import Report
from qcompiler.targets import Target
from tests import tiny

LAYER = "g (float[M,16] x, float[16,16] W) => (float[M,16] y) { [fc] y = MatMul(x, W) }"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speedup, "LIMITS", Limits(rounds=3, seconds=1e9, precision=0.0))


def layer() -> ir.Model:
    return tiny.build(LAYER, W="normal")


@pytest.mark.parametrize("given", ["model", "folder", "file"])
def test_the_written_model_is_timed_beside_the_float_one(given: str, tmp_path: Path) -> None:
    model = layer()
    save(model, tmp_path / "float")
    files: dict[str, Path] = {"folder": tmp_path / "float", "file": tmp_path / "float" / "model.onnx"}
    source: Path | ir.Model = files.get(given) or model
    compiled = qcompiler.compile(source, "int8-static", calibration=tiny.feeds(model, 6), measure_speed=True)
    found = compiled.report.speed
    assert found is not None
    assert (found.rounds, found.threads, found.inputs) == (3, 1, "x [7, 16]")
    assert found.ratio > 0
    assert compiled.report.speed_note == ""
    assert Report.from_json(compiled.report.to_json()).speed == found


def test_nothing_but_the_report_tells_whether_it_was_timed(tmp_path: Path) -> None:
    model = layer()
    for name in ("timed", "untimed"):
        found = qcompiler.compile(
            model, "int8-static", calibration=tiny.feeds(model, 6), measure_speed=name == "timed"
        )  # fmt: skip
        found.save(tmp_path / name)
    timed, untimed = ((tmp_path / name / "model.onnx").read_bytes() for name in ("timed", "untimed"))
    assert timed == untimed
    assert json.loads((tmp_path / "untimed" / "report.json").read_text())["speed"] is None
    assert found.report.speed_note.startswith("not asked for")


def note(**options: object) -> str:
    model = layer()
    report = qcompiler.compile(model, measure_speed=True, **options).report  # type: ignore[arg-type]
    assert report.speed is None
    return report.speed_note


def test_what_cannot_be_timed_says_why() -> None:
    data = tiny.feeds(layer(), 6)
    assert "no samples to run on" in note(recipe="int8-weights")
    assert "no samples to run on" in note(recipe="int8-weights", calibration=data[:1])
    assert "under a memory limit" in note(recipe="int8-weights", calibration=data, memory_limit=1 << 32)
    told = note(recipe="w8", target="ort-cuda", calibration=data)
    assert told == "it runs on CUDAExecutionProvider, and only CPUs are timed"
    told = note(recipe="int8-static", target="tensorrt", calibration=data)
    assert told == "it runs on TensorrtExecutionProvider, and only CPUs are timed"


def test_what_has_no_kernel_here_or_does_not_open_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    model = layer()
    samples = from_python(tiny.feeds(model), model=model)
    args = (samples, Target.load("ort-cpu"), 0, None, False)
    large = (samples, Target.load("ort-cpu"), speed.LARGEST_BYTES + 1, None, False)
    told = speed.measured(model, model, lambda _: pytest.fail("it was opened"), *large)
    assert str(told).startswith("models of this size are not opened at once")
    assert speed.measured(model, model, None, *args) == "ONNX Runtime has no kernel for it on this machine"

    def refuses(*_: object) -> None:
        raise ModelError("onnxruntime cannot open it")

    monkeypatch.setattr(speed, "float_session", refuses)
    assert speed.measured(model, model, lambda _: tiny.session(model), *args) == "onnxruntime cannot open it"


def test_a_model_whose_cache_is_in_codes_is_fed_codes() -> None:
    model = tiny.build(
        """g (float[B,2,S,8] q, float[B,2,S,8] new, float[B,2,P,8] past_0)
        => (float[B,2,S,L] y, float[B,2,L,8] present_0) {
        present_0 = Concat<axis=2>(past_0, new) keys = Transpose<perm=[0,1,3,2]>(present_0) y = MatMul(q, keys) }"""
    )
    data = [{"q": np.ones((1, 2, 3, 8), np.float32), "new": np.ones((1, 2, 3, 8), np.float32),
             "past_0": np.ones((1, 2, 4, 8), np.float32)} for _ in range(6)]  # fmt: skip
    report = qcompiler.compile(model, "kv-int8", calibration=data, measure_speed=True).report
    assert report.with_status("quantized")
    assert report.speed is not None, report.speed_note


def test_the_command_times_unless_told_not_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save(layer(), tmp_path / "float")
    np.savez(tmp_path / "x.npz", x=np.random.default_rng(0).normal(size=(6, 7, 16)).astype(np.float32))
    for name, options in (("timed", []), ("untimed", ["--no-speed"])):
        args = [tmp_path / "float", "-r", "int8-static", "--calibration", tmp_path / "x.npz", "-o", tmp_path / name]
        monkeypatch.setattr(sys, "argv", ["qcompiler", "compile", *map(str, args), *options])
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert end.value.code in (None, 0)
        report = Report.from_json((tmp_path / name / "report.json").read_text())
        said = " ".join(capsys.readouterr().out.split())
        if name == "timed":
            assert isinstance(report.speed, Speedup)
            assert f"speed against float {report.speed.ratio:.3g}× (" in said
            assert "Speed against float" in (tmp_path / name / "report.html").read_text()
        else:
            assert "speed against float not measured (not asked for" in said
