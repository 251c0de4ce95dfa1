"""The half of `cuda.py` that runs where the GPU is: it needs onnxruntime-gpu and numpy, and not the compiler."""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Shape:
    """What one run reads."""

    name: str
    batch: int
    sequence: int
    past: int = 0


SHAPES = {
    "block": (Shape("prefill", 1, 2048), Shape("decode, batch 1", 1, 1, 512), Shape("decode, batch 16", 16, 1, 512)),
    "demo": (Shape("prefill", 1, 2048), Shape("one token, batch 1", 1, 1), Shape("one token, batch 16", 16, 1)),
    "product": (Shape("2048 rows", 1, 2048), Shape("1 row", 1, 1), Shape("16 rows", 1, 16)),
}
TINY_SHAPES = {
    "block": (Shape("prefill", 1, 16), Shape("decode, batch 1", 1, 1, 8), Shape("decode, batch 16", 16, 1, 8)),
    "demo": (Shape("prefill", 1, 16), Shape("one token, batch 1", 1, 1), Shape("one token, batch 16", 16, 1)),
    "product": (Shape("16 rows", 1, 16),),
}


@dataclass
class Entry:
    """A case in the manifest: what `measure` needs to know of it, without the compiler."""

    subject: str
    label: str
    folder: str = ""
    providers: list[str] = field(default_factory=list)
    config: dict[str, str] = field(default_factory=dict)
    disabled_optimizers: list[str] = field(default_factory=list)
    kernels: dict[str, int] = field(default_factory=dict)
    error: str = ""


# ------------------------------------------------------------------------------------------------- measure


def measure(
    folder: Path, *, device: str, deadline: float, output: Path, rounds: int = 7, seconds: float = 0.2
) -> dict[str, Any]:
    """Compare and time every entry of the manifest; the report, which is also written after each entry."""
    manifest = json.loads((folder / "manifest.json").read_text())
    base = "float16" if manifest["half"] else "float32"
    report: dict[str, Any] = {
        "date": date.today().isoformat(), "device": gpu() if device == "cuda" else platform.machine(),
        "versions": versions(), "baseline": f"{base} on the same {'GPU' if device == 'cuda' else 'CPU'}",
        "tiny": manifest["tiny"], "same_kernels_as": manifest["same_kernels_as"], "rows": [],
    }  # fmt: skip
    open_baselines: dict[str, Baseline] = {}
    for data in manifest["entries"]:
        entry = Entry(**data)
        print(f"measuring {entry.subject}: {entry.label}", file=sys.stderr, flush=True)
        report["rows"].append(
            _row(entry, folder, base, device, deadline, open_baselines, manifest["tiny"], rounds, seconds)
        )
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(report, indent=2) + "\n")
    return report


@dataclass(frozen=True, eq=False)
class Baseline:
    """The float model of a subject on the device, and what float32 answers on the CPU."""

    session: Any
    reference: dict[str, np.ndarray]
    error_db: dict[str, float]


def _row(
    entry: Entry, folder: Path, base: str, device: str, deadline: float, baselines: dict[str, Baseline], tiny: bool,
    rounds: int, seconds: float,
) -> dict[str, Any]:  # fmt: skip
    row: dict[str, Any] = {"subject": entry.subject, "case": entry.label, "kernels": entry.kernels}
    if entry.error:
        return row | {"error": entry.error}
    if time.monotonic() > deadline:
        return row | {"error": "not run: out of time"}
    try:
        if entry.subject not in baselines:
            baselines[entry.subject] = _baseline(folder / entry.subject, base, device)
        baseline = baselines[entry.subject]
        session = open_session(folder / entry.folder, _on(device, entry.providers), entry)
        row["nodes"] = _nodes_by_provider(session)
        row["sqnr_db"] = _errors(baseline.reference, answers(session))
        row["float_sqnr_db"] = baseline.error_db
        row["speed"] = {}
        for shape in (TINY_SHAPES if tiny else SHAPES)[entry.subject]:
            if time.monotonic() > deadline:
                return row | {"error": "not timed to the end: out of time"}
            row["speed"][shape.name] = compare_speed(baseline.session, session, shape, device, rounds, seconds)
    except Exception as error:  # onnxruntime's errors share no base class; one case must not take the others with it
        row["error"] = " ".join(str(error).split())[:400] or type(error).__name__
    return row


def _baseline(folder: Path, base: str, device: str) -> Baseline:
    reference = answers(open_session(folder / "float32", ["CPUExecutionProvider"]))
    session = open_session(folder / base, _on(device, ["CUDAExecutionProvider", "CPUExecutionProvider"]))
    return Baseline(session, reference, _errors(reference, answers(session)))


def _on(device: str, providers: Sequence[str]) -> list[str]:
    return list(providers) if device == "cuda" else ["CPUExecutionProvider"]


def open_session(folder: Path, providers: Sequence[str], entry: Entry | None = None) -> Any:
    """A session that runs where it is asked to; onnxruntime would fall back to the CPU with a line in its log."""
    import onnxruntime as ort

    absent = [name for name in providers if name not in ort.get_available_providers()]
    if absent:
        raise RuntimeError(f"this onnxruntime has no {absent[0]}")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    for key, value in (entry.config if entry is not None else {}).items():
        options.add_session_config_entry(key, value)
    session = ort.InferenceSession(
        str(folder / "model.onnx"), options, providers=list(providers),
        disabled_optimizers=entry.disabled_optimizers if entry is not None else [],
    )  # fmt: skip
    if session.get_providers()[0] != providers[0]:
        raise RuntimeError(f"{providers[0]} did not start, and onnxruntime fell back to {session.get_providers()[0]}")
    return session


def _nodes_by_provider(session: Any) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for part in session.get_provider_graph_assignment_info():
        counts[part.ep_name] += len(part.get_nodes())
    return dict(counts)


# ------------------------------------------------------------------------------------------------- is it right


TYPES = {"float16": np.float16, "float": np.float32, "int8": np.int8, "uint8": np.uint8, "int32": np.int32,
         "int64": np.int64}  # fmt: skip


def feeds(
    inputs: Sequence[tuple[str, str, list[Any]]], shape: Shape, generator: np.random.Generator, capacity: int = 0
) -> dict[str, np.ndarray]:
    """Inputs of a run; a cache holds `shape.past` positions, or has room for `capacity` where that is more."""
    found: dict[str, np.ndarray] = {}
    for name, kind, declared in inputs:
        dtype = np.dtype(TYPES[kind.removeprefix("tensor(").removesuffix(")")])
        if name == "x":
            rows = [shape.sequence] if len(declared) == 2 else [shape.batch, shape.sequence]
            found[name] = generator.standard_normal((*rows, declared[-1])).astype(dtype)
        elif name == "input_ids":
            found[name] = generator.integers(0, 256, (shape.batch, shape.sequence))
        elif name == "attention_mask":
            found[name] = np.ones((shape.batch, shape.sequence), np.int64)
        elif name == "seqlens_k":
            found[name] = np.full(shape.batch, shape.past + shape.sequence - 1, np.int32)
        elif name == "total_sequence_length":
            found[name] = np.array(shape.past + shape.sequence, np.int32)
        elif name.startswith("past_key_values"):
            size = (shape.batch, declared[1], max(shape.past, capacity), declared[3])
            small = generator.integers(0, 100, size) if dtype.kind in "iu" else generator.standard_normal(size)
            found[name] = small.astype(dtype)
        else:
            raise ValueError(f"the benchmark knows no value for the input {name!r}")
    return found


def answers(session: Any) -> dict[str, np.ndarray]:
    """What a model makes of a prompt of 48 tokens, and (with a cache) of a token after it; the same for every model."""
    inputs = [(item.name, item.type, item.shape) for item in session.get_inputs()]
    names = [item.name for item in session.get_outputs()]
    cached = [name for name, _, _ in inputs if name.startswith("past_key_values")]
    plain = {name: name for name, _, _ in inputs if name not in cached}
    generator = np.random.default_rng(1)
    # Numbers are drawn for x alone and in the same order, so that all models read the same, whatever their caches are.
    first = feeds([item for item in inputs if item[0] in plain], Shape("", 2, 48), generator)
    first |= feeds([item for item in inputs if item[0] in cached], Shape("", 2, 48), np.random.default_rng(2))
    result = dict(zip(names, session.run(None, first), strict=True))
    found = {"prompt": result[names[0]].astype(np.float64)}
    if cached:
        token = feeds([item for item in inputs if item[0] in plain], Shape("", 2, 1, 48), generator)
        token |= {name: result[name.replace("past_key_values", "present")] for name in cached}
        found["token"] = session.run(names[:1], token)[0].astype(np.float64)
    return found


def _errors(reference: Mapping[str, np.ndarray], found: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Signal-to-noise in dB of each answer."""
    return {name: sqnr_db(reference[name], found[name]) for name in reference}


def sqnr_db(reference: np.ndarray, found: np.ndarray) -> float:
    """10 log10 of ‖reference‖² / ‖found - reference‖²; -inf where a number is not finite."""
    if not np.all(np.isfinite(found)):
        return float("-inf")
    noise, signal = float(np.square(found - reference).sum()), float(np.square(reference).sum())
    return 200.0 if noise == 0 else round(10 * np.log10(signal / noise), 2)


# ------------------------------------------------------------------------------------------------- how fast is it


def compare_speed(
    baseline: Any, session: Any, shape: Shape, device: str, rounds: int, seconds: float
) -> dict[str, float]:
    """Both in turns, on inputs and outputs that stay on the device: milliseconds, and the median of the ratios."""
    runs = [bound(item, shape, device) for item in (baseline, session)]
    for run in runs:
        _timed(run, 2)
    counts = [max(1, min(50, int(seconds / rounds / max(_timed(run, 1), 1e-6)))) for run in runs]
    pairs = [[_timed(run, count) for run, count in zip(runs, counts, strict=True)] for _ in range(rounds)]
    return {
        "float_ms": round(1e3 * statistics.median(pair[0] for pair in pairs), 4),
        "ms": round(1e3 * statistics.median(pair[1] for pair in pairs), 4),
        "ratio": round(statistics.median(pair[0] / pair[1] for pair in pairs), 3),
    }


def bound(session: Any, shape: Shape, device: str) -> Callable[[int], None]:
    """Runs the model a number of times and waits for it. The cache is one buffer, which the model reads and appends to,
    as decoders are run: only so does attention read quantized caches without writing them out first."""
    import onnxruntime as ort

    inputs = [(item.name, item.type, item.shape) for item in session.get_inputs()]
    arrays = feeds(inputs, shape, np.random.default_rng(3), capacity=shape.past + shape.sequence)
    binding = session.io_binding()
    values: dict[str, Any] = {}
    for name, array in arrays.items():
        place = "cpu" if name == "total_sequence_length" else device  # which the operator reads on the host
        values[name] = ort.OrtValue.ortvalue_from_numpy(array, place, 0)
        binding.bind_ortvalue_input(name, values[name])
    for item in session.get_outputs():
        past = values.get(item.name.replace("present", "past_key_values"))
        if past is not None:
            binding.bind_ortvalue_output(item.name, past)
        else:
            binding.bind_output(item.name, device)

    def run(count: int) -> None:
        for _ in range(count):
            session.run_with_iobinding(binding)
        binding.synchronize_outputs()

    return run


def _timed(run: Callable[[int], None], count: int) -> float:
    """Seconds of one run."""
    start = time.perf_counter()
    run(count)
    return (time.perf_counter() - start) / count


# ------------------------------------------------------------------------------------------------- where it was


def gpu() -> str:
    """Name, driver and memory, as nvidia-smi tells them."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown ({type(error).__name__})"


def versions() -> dict[str, str]:
    import onnxruntime as ort

    found = {"onnxruntime": ort.__version__, "numpy": np.__version__, "python": platform.python_version()}
    return found | {"onnxruntime build": " ".join(ort.get_build_info().split())[:200]}


def lines(report: Mapping[str, Any]) -> Iterator[str]:
    """The report for people: a line for each case."""
    for row in report["rows"]:
        speed = "  ".join(f"{name} {found['ratio']:.2f} ×" for name, found in row.get("speed", {}).items())
        right = ", ".join(f"{name} {found:.1f} dB" for name, found in row.get("sqnr_db", {}).items())
        yield f"{row['subject']:8s} {row['case']:26s} {speed}  {right}  {row.get('error', '')}".rstrip()
