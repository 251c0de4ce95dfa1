"""Without onnxruntime, what runs a model says what to install, and all else works."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

WITHOUT = "import sys; sys.modules['onnxruntime'] = None; from qcompiler.cli import main; main()"


@pytest.fixture
def f(tmp_path: Path) -> Path:
    """Two models and data."""
    weight = numpy_helper.from_array(np.random.default_rng(0).normal(size=(16, 16)).astype(np.float32), "w")
    for name in ("m", "other"):
        graph = helper.make_graph(
            [helper.make_node("MatMul", ["x", "w"], ["y"], name="up")], "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 16])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 16])], [weight],
        )  # fmt: skip
        made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
        (tmp_path / name).mkdir()
        onnx.save(made, tmp_path / name / "model.onnx")
    np.savez(tmp_path / "x.npz", x=np.ones((8, 4, 16), np.float32))
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["compile", "m", "-r", "int8-static", "--calibration", "x.npz", "-o", "out"], 2),
        (["debug", "m", "other", "--calibration", "x.npz"], 2),
        (["targets", "--best", "m"], 0),
        (["inspect", "m"], 0),
        (["diff", "m", "other"], 0),
    ],
)
def test_without_onnxruntime(arguments: list[str], code: int, f: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, *arguments], cwd=f, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    if code == 0:
        assert done.stderr == ""
    else:
        assert done.stderr.startswith("error: onnxruntime is not installed")
        assert "onnx-qcompiler[cpu]" in done.stderr
        assert len(done.stderr.splitlines()) == 1
    assert not (f / "out").exists()
