"""What onnxruntime's profile says of a run, operator by operator."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from qcompiler.benchmarking.operators import OperatorShare, profiled, shares
from tests import tiny

CPU = "CPUExecutionProvider"


def run(start: float, length: float) -> dict[str, Any]:
    return {"cat": "Session", "name": "model_run", "ts": start, "dur": length, "tid": 1, "args": {}}


def node(name: str, op: str, start: float, length: float, tid: int = 1) -> dict[str, Any]:
    args = {"op_name": op, "provider": CPU}
    return {"cat": "Node", "name": f"{name}_kernel_time", "ts": start, "dur": length, "tid": tid, "args": args}


def test_nodes_count_by_operator_and_the_first_run_does_not() -> None:
    events = [
        run(0, 100), node("a", "MatMul", 0, 90),
        run(100, 100), node("a", "MatMul", 101, 20), node("b", "MatMul", 125, 10), node("c", "Add", 140, 10),
    ]  # fmt: skip
    assert shares(events) == (OperatorShare("MatMul", CPU, 2, 0.75), OperatorShare("Add", CPU, 1, 0.25))


def test_a_disturbed_run_says_nothing() -> None:
    events = [
        run(0, 10), run(100, 100), node("a", "MatMul", 100, 30), node("c", "Add", 150, 50),
        run(300, 100), node("a", "MatMul", 300, 90), node("c", "Add", 395, 10),
    ]  # fmt: skip
    assert shares(events) == (OperatorShare("MatMul", CPU, 1, 0.75), OperatorShare("Add", CPU, 1, 0.25))


def test_the_time_of_a_body_is_its_nodes() -> None:
    events = [
        run(0, 100), node("loop", "Loop", 0, 100), node("a", "MatMul", 10, 30), node("a", "MatMul", 50, 30),
        node("other", "Add", 20, 60, tid=2),
    ]  # fmt: skip
    found = {one.operator: one.share for one in shares(events)}
    assert found == pytest.approx({"Loop": 40 / 160, "MatMul": 60 / 160, "Add": 60 / 160})


def test_a_profile_without_nodes_is_empty() -> None:
    assert shares([run(0, 1)]) == ()


def test_a_session_is_profiled_and_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = """g (float[2,8] x, float[8,8] w, int64 n, bool c) => (float[2,8] y) { a = MatMul(x, w)
        y = Loop(n, c, a) <body = b (int64 i, bool k, float[2,8] v) => (bool l, float[2,8] u)
            { l = Identity(k) u = Tanh(v) }> }"""
    model = tiny.build(text, w="normal", n=np.int64(3), c=np.bool_(True))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    feeds = {"x": np.ones((2, 8), np.float32)}

    def opened(options: ort.SessionOptions) -> ort.InferenceSession:
        file = tmp_path / "model.onnx"
        file.write_bytes(ir.to_proto(model).SerializeToString())
        return ort.InferenceSession(str(file), options, providers=[CPU])

    found = profiled(opened, ort.SessionOptions(), lambda session: session.run(None, feeds), 2)
    assert {"MatMul", "Loop", "Tanh"} <= {one.operator for one in found}
    assert sum(one.share for one in found) == pytest.approx(1)
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
