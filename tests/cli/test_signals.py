"""A run that is told to stop leaves nothing half-written, and says a word."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import onnx_ir as ir
import pytest

from tests import tiny

SLOW = """
import sys, time
from passes.quantize_weights import QuantizeWeights
from qcompiler import cli
from qcompiler.graph import files

def wait(*arguments):
    print("writing", flush=True)
    time.sleep(60)

files.copy_companions = wait
sys.argv = ["qcompiler", *sys.argv[1:]]
cli.main()
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_while_the_output_is_written(tmp_path: Path, number: signal.Signals, code: int) -> None:
    model = tiny.build("g (float[M,16] x, float[16,16] W) => (float[M,16] y) { y = MatMul(x, W) }", W="normal")
    (tmp_path / "in").mkdir()
    ir.save(model, tmp_path / "in" / "model.onnx")
    command = [sys.executable, "-c", SLOW, "compile", "in", "-r", "rtn-w4", "-o", "out"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        time.sleep(0.1)
        process.send_signal(number)
        _, said = process.communicate(timeout=30)
    assert process.returncode == code
    assert "stopped; nothing was written" in said
    assert "Traceback" not in said
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
