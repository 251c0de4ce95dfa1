"""The GPU benchmark, run on the CPU provider with a tiny block, so that it still works on the day there is a GPU."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from benchmarks import cuda
from benchmarks.cuda_measure import Entry, Shape, compare_speed, feeds, lines, measure, open_session, sqnr_db
from qcompiler.driver import inputs
from qcompiler.errors import TargetError
from qcompiler.recipes import recipe_names
from tests import tiny

LATER = math.inf
TOKENS = """g (int64[batch,sequence] input_ids, float[3072,64] E, float[64,128] W, float[128,3072] V)
    => (float[batch,sequence,3072] logits) { x = Gather(E, input_ids)  [up] h = MatMul(x, W)
    [head] logits = MatMul(h, V) }"""
CASES = (
    cuda.Case("rtn-w4"),
    cuda.Case("int8-dynamic"),
    cuda.Case("kv-int8"),
    cuda.Case("rtn-w4", "tensorrt"),
    cuda.Case("fp8-tensor", settings=(*cuda.WHOLE_BLOCK, "lower-fp8.gemm=true"), name="GemmFloat8"),
    cuda.Case("int8-static"),
)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("cuda")
    (folder / "demo-source").mkdir()
    onnx.save(ir.to_proto(tiny.build(TOKENS, E="normal", W="normal", V="normal")), folder / "demo-source/model.onnx")
    cuda.prepare(
        folder, tiny=True, half=False, deadline=LATER, block_cases=CASES, demo_cases=CASES[:1],
        demo={"float32": folder / "demo-source"},
    )  # fmt: skip
    output = folder / "results" / "cuda.json"
    found = measure(folder, device="cpu", deadline=LATER, output=output, rounds=1, seconds=0.001)
    assert json.loads(output.read_text()) == found
    return found


def rows(report: dict[str, Any], subject: str = "block") -> dict[str, Any]:
    return {row["case"]: row for row in report["rows"] if row["subject"] == subject}


@pytest.mark.parametrize("case", ["rtn-w4", "int8-dynamic", "kv-int8", "rtn-w4 (tensorrt)"])
def test_a_case_is_compared_and_timed(report: dict[str, Any], case: str) -> None:
    row = rows(report)[case]
    assert "error" not in row
    assert set(row["speed"]) == {"prefill", "decode, batch 1", "decode, batch 16"}
    assert all(found["ratio"] > 0 and found["ms"] > 0 for found in row["speed"].values())
    assert set(row["sqnr_db"]) == {"prompt", "token"}
    assert 15 < row["sqnr_db"]["token"] < 60  # quantized, and not broken
    assert row["float_sqnr_db"]["prompt"] > 100
    assert row["kernels"]
    assert sum(row["nodes"].values()) > 0


def test_a_case_that_cannot_run_says_why_and_the_others_go_on(report: dict[str, Any]) -> None:
    assert "GemmFloat8" in rows(report)["GemmFloat8"]["error"]
    assert "QOrderedMatMul" in rows(report, "product")["QOrderedMatMul"]["error"]
    assert "no int8 kernel" in rows(report)["int8-static"]["error"]
    assert "speed" in rows(report, "demo")["rtn-w4"]


def test_the_report_says_where_and_when(report: dict[str, Any]) -> None:
    assert all(report[key] for key in ("date", "device", "versions"))
    assert report["baseline"] == "float32 on the same CPU"
    assert report["tiny"] is True
    text = "\n".join(lines(report))
    assert all(row["case"] in text for row in report["rows"])


@pytest.mark.parametrize("recipe", recipe_names())
def test_every_recipe_for_cuda_is_measured(recipe: str) -> None:
    measured = {case.recipe for case in cuda.BLOCK_CASES if case.target == "ort-cuda"} | set(cuda.SAME_KERNELS)
    try:
        inputs.plan(recipe, "ort-cuda", (), (), None, None)
    except TargetError:
        assert recipe not in measured
    else:
        assert recipe in measured


def test_what_has_the_same_kernels_is_measured_itself() -> None:
    labels = {case.label for case in cuda.BLOCK_CASES}
    assert len(labels) == len(cuda.BLOCK_CASES)
    for name in cuda.SAME_KERNELS.values():
        assert set(name.split(" and ")) <= labels


def test_what_does_not_fit_into_the_time_is_listed(tmp_path: Path) -> None:
    cuda.prepare(tmp_path, tiny=True, half=False, deadline=time.monotonic() - 1, block_cases=CASES[:2], demo={})
    found = measure(tmp_path, device="cpu", deadline=time.monotonic() - 1, output=tmp_path / "out.json")
    assert [row["error"] for row in found["rows"]] == ["not run: out of time"] + 2 * ["not compiled: out of time"]


def test_the_block_in_half_precision_goes_through_the_compiler(tmp_path: Path) -> None:
    """As on a GPU; its kernels for fp8 are not the CPU's, so they are only written."""
    cases = (cuda.Case("rtn-w4"), cuda.Case("fp8", settings=cuda.WHOLE_BLOCK))
    cuda.prepare(tmp_path, tiny=True, half=True, deadline=LATER, block_cases=cases, demo={})
    entries = [Entry(**data) for data in json.loads((tmp_path / "manifest.json").read_text())["entries"]]
    assert [entry.error for entry in entries] == ["", "", ""]
    assert entries[1].kernels == {"MatMulNBits": 7}
    assert entries[1].config == {"ep.cuda.fpa_intb_gemm": "1"}
    assert entries[2].kernels == {"MatMulBlockQuantizedFp8Weight": 7}


def test_a_provider_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="no CUDAExecutionProvider"):
        open_session(tmp_path, ["CUDAExecutionProvider", "CPUExecutionProvider"])


def test_feeds_of_a_decoder() -> None:
    declared: list[tuple[str, str, list[Any]]] = [
        ("x", "tensor(float16)", ["batch", "sequence", 8]), ("seqlens_k", "tensor(int32)", ["batch"]),
        ("total_sequence_length", "tensor(int32)", []),
        ("past_key_values.0.key", "tensor(int8)", ["batch", 2, "past", 4]),
    ]  # fmt: skip
    found = feeds(declared, Shape("", 3, 1, 5), np.random.default_rng(0), capacity=6)
    assert (found["x"].shape, found["x"].dtype) == ((3, 1, 8), np.dtype(np.float16))
    assert found["seqlens_k"].tolist() == [5, 5, 5]
    assert found["total_sequence_length"] == 6
    past = found["past_key_values.0.key"]
    assert (past.shape, past.dtype) == ((3, 2, 6, 4), np.dtype(np.int8))


def test_sqnr() -> None:
    ones = np.ones(100)
    assert sqnr_db(ones, ones) == 200
    assert sqnr_db(ones, 1.1 * ones) == 20
    assert sqnr_db(ones, np.full(100, np.nan)) == -math.inf


def test_speed_is_that_of_the_baseline_over_that_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def bound(session: float, shape: Shape, device: str) -> Callable[[int], None]:
        def run(count: int) -> None:
            clock[0] += count * session

        return run

    monkeypatch.setattr("benchmarks.cuda_measure.bound", bound)
    found = compare_speed(0.004, 0.001, Shape("", 1, 1), "cpu", 3, 0.01)
    assert found == {"float_ms": 4.0, "ms": 1.0, "ratio": 4.0}
