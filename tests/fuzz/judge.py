"""What came of a case, in a word."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from tests.fuzz.cases import MODEL, OUTPUT, Case

FLOOR, NEAR = 20.0, 10.0  # dB: below the first a control decides, which may be better by the second
LONGEST = 1200  # letters of a sentence, where a name has 300
SAID = ("error: ", "warning: ")
BAD = (
    "TRACEBACK", "DEFECT", "HANG", "MEMORY", "CRASH", "DOES NOT OPEN", "DIFFERS", "WROTE OUTSIDE", "LEFT BEHIND",
    "NOT A SENTENCE", "CONTROL CHARACTERS", "UNKNOWN EXIT CODE", "NOTHING WRITTEN",
)  # fmt: skip


@dataclass(frozen=True)
class Ended:
    """How a process ended."""

    code: int
    """The exit code, or minus the number of the signal."""
    out: str
    err: str
    seconds: float
    peak: int
    """Bytes of resident memory at most."""
    stopped: str = ""
    """HANG or MEMORY, where it was stopped for that."""


def said(case: Case, ended: Ended) -> str:
    """What its exit code and its words make of it, before anything was looked at that it wrote."""
    if ended.stopped:
        return ended.stopped
    if "MemoryError" in ended.err or "bad_alloc" in ended.err:
        return "MEMORY"
    if "Traceback (most recent call last)" in ended.err or ended.code == 70:
        return "TRACEBACK"
    if ended.code < 0:
        return "CRASH"
    if "please report it" in ended.err:
        return "DEFECT"
    if re.search("[\x00-\x08\x0b-\x1f\x7f\u202e]", ended.out + ended.err):
        return "CONTROL CHARACTERS"
    if ended.code not in (0, 1, 2):
        return "UNKNOWN EXIT CODE"
    if ended.code != 2:
        return ""
    if "Usage:" in ended.err:
        return "usage"
    lines = [line for line in ended.err.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    fine = len(errors) == 1 and len(errors[0]) < LONGEST and all(line.startswith(SAID) for line in lines)
    return "refused" if fine else "NOT A SENTENCE"


# ------------------------------------------------------------------------------------------------ files


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file below; links are not followed."""
    found = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        found[str(path.relative_to(folder))] = (status.st_size, 0 if path.is_dir() else status.st_mtime_ns)
    return found


def left(before: Mapping[str, Any], after: Mapping[str, Any], refused: bool) -> str:
    """Whether anything was written that should not be there."""
    changed = [name for name in after if before.get(name) != after[name] and not name.startswith("tmp/")]
    changed += [name for name in before if name not in after]
    written = [
        name
        for name in changed
        if name.removeprefix("work/").split("/")[0] not in ("out", "s.safetensors", "__pycache__")
    ]
    if written:
        return "LEFT BEHIND" if any("/." in f"/{name}" for name in written) else "WROTE OUTSIDE"
    if refused and any(name.startswith(("work/out", "work/s.safetensors")) for name in changed):
        return "LEFT BEHIND"
    return "LEFT BEHIND" if any(name.startswith("tmp/") for name in after) else ""


# ------------------------------------------------------------------------------------------------ numbers


def opened(path: Path) -> Any:
    """As anyone would open it: with all optimizations, one thread. Raises what onnxruntime does."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def feeds(session: Any, count: int = 3) -> list[dict[str, np.ndarray]] | None:
    """Normal numbers and small ids; None where an input is of another kind."""
    rng, found = np.random.default_rng(7), []
    types = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(double)": np.float64}
    for _ in range(count):
        feed: dict[str, np.ndarray] = {}
        for item in session.get_inputs():
            shape = [size if isinstance(size, int) and size > 0 else 2 for size in item.shape]
            if item.type in types:
                feed[item.name] = rng.normal(size=shape).astype(types[item.type])
            elif item.type == "tensor(int64)":
                feed[item.name] = rng.integers(0, 5, shape)
            else:
                return None
        found.append(feed)
    return found


def answers(session: Any, samples: list[dict[str, np.ndarray]]) -> list[np.ndarray]:
    rows = [session.run(None, sample) for sample in samples]
    return [np.concatenate([np.asarray(row[index]).reshape(-1) for row in rows]) for index in range(len(rows[0]))]


def nearness(reference: list[np.ndarray], other: list[np.ndarray]) -> float:
    """The least signal-to-noise ratio of the float outputs, in dB."""
    worst = float("inf")
    for a, b in zip(reference, other, strict=True):
        if a.dtype.kind != "f" or a.size == 0:
            continue
        a, b = a.astype(np.float64), b.astype(np.float64)
        if a.shape != b.shape:
            return -float("inf")
        sound = np.isfinite(a)
        if not np.isfinite(b[sound]).all():
            return -float("inf")
        signal, noise = float(np.square(a[sound]).sum()), float(np.square(a[sound] - b[sound]).sum())
        if noise > max(signal * 1e-30, 1e-20):
            worst = min(worst, 10 * float(np.log10(max(signal, 1e-300) / noise)))
    return worst


def control(model: Path, samples: list[dict[str, np.ndarray]], reference: list[np.ndarray]) -> float:
    """What noise of half a step of eight bits on every weight does: the recipe's error, seen without the recipe."""
    proto, rng, worst = onnx.load(model), np.random.default_rng(3), float("inf")
    tensors = [*proto.graph.initializer, *(a.t for node in proto.graph.node for a in node.attribute if a.HasField("t"))]
    for tensor in tensors:
        array = numpy_helper.to_array(tensor)
        if array.dtype.kind == "f" and array.ndim > 1 and array.size:
            step = np.abs(array.astype(np.float64)).max() / 127
            noisy = (array + rng.uniform(-0.5, 0.5, array.shape) * step).astype(array.dtype)
            tensor.CopyFrom(numpy_helper.from_array(noisy, tensor.name))
    path = model.with_name("control.onnx")
    onnx.save(proto, path)
    try:
        worst = nearness(reference, answers(opened(path), samples))
    finally:
        path.unlink()
    return worst


def judge(case: Case, folder: Path) -> str:
    """What became of a compilation that says it is well: does it open, is it near? Runs sessions, so: in a child."""
    if case.command != "compile":
        return "done"
    if not (folder / OUTPUT / "model.onnx").is_file():
        return "NOTHING WRITTEN"
    target = case.arguments[case.arguments.index("--target") + 1] if "--target" in case.arguments else ""
    try:
        before = opened(folder / MODEL)
        samples = feeds(before)
    except Exception:  # onnxruntime raises what it likes, and that is the answer
        return "accepted; the input does not open either"
    try:
        from qcompiler import load_session

        after = load_session(str(folder / OUTPUT))
    except Exception as error:
        elsewhere = "NOT_IMPLEMENTED" in str(error) or target in ("tensorrt", "ort-cuda")
        return "accepted; for another machine" if elsewhere else f"DOES NOT OPEN: {error}"
    if samples is None:
        return "accepted, opens; nothing to compare with"
    try:
        reference = answers(before, samples)
    except Exception:
        return "accepted, opens; the input does not run"
    try:
        result = answers(after, samples)
    except Exception as error:
        return f"DOES NOT OPEN: it opens, but does not run: {error}"
    return _compared(case, folder, samples, reference, nearness(reference, result))


def _compared(case: Case, folder: Path, samples: Any, reference: list[np.ndarray], decibels: float) -> str:
    report = json.loads((folder / OUTPUT / "report.json").read_text())
    if not any(_rounded(report)):
        return "accepted, the same" if decibels > 40 else f"DIFFERS: nothing is quantized, and yet {decibels:.1f} dB"
    if decibels >= FLOOR:
        return "accepted, near"
    state = report["state"]
    if state in ("look", "failed"):
        return "accepted, and the report warns"
    if state == "good" and decibels >= FLOOR - NEAR:  # other samples than the report's
        return "accepted, near"
    if not case.eight_bits:
        return (
            "accepted, far, as few bits may be"
            if state != "good"
            else f"DIFFERS: the report is content with {decibels:.1f} dB"
        )
    limit = control(folder / MODEL, samples, reference)
    if decibels >= limit - NEAR or not np.isfinite(limit):
        return "accepted, as far as noise is"
    return f"DIFFERS: {decibels:.1f} dB; noise {limit:.1f} dB"


def _rounded(report: dict[str, Any]) -> Iterator[object]:
    yield from (site for site in report["sites"] if site["status"] == "quantized")
