"""Quality, size and speed of the recipes on the demo model, beside onnxruntime's own quantization:
`results/quality.json`.

    python benchmarks/quality.py [--samples 32] [--windows 96]

Perplexity and KL divergence are those of `models/demo/heldout.txt`, which neither training nor calibration saw; all
methods calibrate on the same windows of `models/demo/calibration.txt`. KL is taken token by token against the float
model of the same variant, so it is paired and far finer than a difference of perplexities: rank by it. The speed is the
time of one run over 256 tokens on one thread against the float model, in turns with it, median of the ratios.
Everything runs in one process, one after the other.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from models.export import model_path  # noqa: E402
from qcompiler import compiler  # noqa: E402
from qcompiler.calibration.samples import Samples, open_samples  # noqa: E402
from qcompiler.evaluation.evaluate import evaluate  # noqa: E402
from qcompiler.graph.files import load  # noqa: E402
from qcompiler.sessions import runtime  # noqa: E402
from qcompiler.targets.machines import this_cpu  # noqa: E402

DEMO, CACHE = ROOT / "models" / "demo", ROOT / "benchmarks" / ".cache"
VARIANTS = ("dynamo", "dynamo-outliers")
SEQUENCE = 256
RECIPES = (
    "int8-static", "smoothquant", "smoothquant-o2", "smoothquant-o1", "int8-dynamic-tensor", "int8-dynamic", "llm-int8",
    "int8-weights", "fp8-tensor", "fp8", "w4a8", "binary",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=32, help="calibration windows")
    parser.add_argument("--windows", type=int, default=None, help="held-out windows (default: all)")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "quality.json")
    arguments = parser.parse_args()
    rows = [row for variant in VARIANTS for row in measure(variant, arguments.samples, arguments.windows)]
    report = {"date": date.today().isoformat(), "machine": machine(), "versions": versions(), "rows": rows}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(report, indent=2) + "\n")
    print_table(rows)


def measure(variant: str, samples: int, windows: int | None) -> Iterator[dict[str, Any]]:
    """One row for each method on one variant of the demo model."""
    source = model_path(variant)
    folder = CACHE / variant
    yield row(variant, "float", source, source, windows)
    for recipe in RECIPES:
        compiled = compiler.compile(
            source.parent, recipe, calibration=str(DEMO / "calibration.txt"), tokenizer=DEMO / "tokenizer.json",
            samples=samples, sequence_length=SEQUENCE,
        )  # fmt: skip
        compiled.save(folder / recipe, overwrite=True)
        sizes = compiled.report.sizes
        extra = {"quantized_ratio": round(sizes.quantized_bytes / sizes.quantized_float_bytes, 4)}
        yield row(variant, recipe, folder / recipe / "model.onnx", source, windows) | extra
    for name, quantize in PEERS.items():
        output = folder / name / "model.onnx"
        output.parent.mkdir(parents=True, exist_ok=True)
        quantize(source, output, samples)
        yield row(variant, name, output, source, windows)


def row(variant: str, method: str, model: Path, reference: Path, windows: int | None) -> dict[str, Any]:
    print(f"{variant}: {method}", file=sys.stderr, flush=True)
    found = evaluate(
        model, str(DEMO / "heldout.txt"), tokenizer=DEMO / "tokenizer.json", sequence_length=SEQUENCE,
        reference=None if model == reference else reference, limit=windows,
    )  # fmt: skip
    result: dict[str, Any] = {"variant": variant, "method": method, "tokens": found.tokens}
    result["perplexity"] = found.perplexity
    if model != reference:
        result |= {"kl": found.kl, "top1": found.top1}
    result["bytes"] = sum(file.stat().st_size for file in model.parent.glob("model.onnx*"))
    result["speed"] = speed(reference, model)
    return result


def speed(reference: Path, model: Path, rounds: int = 15) -> float:
    """How many times as fast as the float model: one thread, one window, both in turns, median of the ratios."""
    sessions = [runtime.load_session(path, threads=1) for path in (reference, model)]
    feed = next(iter(text_windows("heldout.txt", reference, 1)))
    ratios = []
    for _ in range(rounds):
        times = []
        for session in sessions:
            start = time.perf_counter()
            session.run(None, feed)
            times.append(time.perf_counter() - start)
        ratios.append(times[0] / times[1])
    return round(float(np.median(ratios)), 2)


def text_windows(name: str, model: Path, count: int) -> Samples:
    """Windows of one of the demo model's texts, as inputs of `model`."""
    return open_samples(
        str(DEMO / name), model=load(model), tokenizer=DEMO / "tokenizer.json", limit=count, sequence_length=SEQUENCE
    )


class Reader:
    """onnxruntime's CalibrationDataReader over the same windows that qcompiler calibrates on."""

    def __init__(self, source: Path, samples: int) -> None:
        self._data = text_windows("calibration.txt", source, samples)
        self._iterator = iter(self._data)

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._iterator, None)

    def rewind(self) -> None:
        self._iterator = iter(self._data)


def ort_static(source: Path, output: Path, samples: int, per_channel: bool = False) -> None:
    from onnxruntime.quantization import QuantType, quantize_static

    quantize_static(
        source, output, Reader(source, samples), activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
        per_channel=per_channel,
    )  # fmt: skip


def ort_dynamic(source: Path, output: Path, samples: int) -> None:
    from onnxruntime.quantization import quantize_dynamic

    quantize_dynamic(source, output)


PEERS: dict[str, Callable[[Path, Path, int], None]] = {
    "onnxruntime quantize_static": ort_static,
    "onnxruntime quantize_static, per channel": lambda source, output, samples: ort_static(
        source, output, samples, True
    ),
    "onnxruntime quantize_dynamic": ort_dynamic,
}


def machine() -> str:
    """What of the processor matters for integer kernels."""
    return str(this_cpu())


def versions() -> dict[str, str]:
    return {"python": platform.python_version(), "onnxruntime": ort.__version__, "onnx": onnx.__version__}


def print_table(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="held-out text, against the float model of the same variant")
    for column in ("variant", "method", "perplexity", "ratio", "KL (nats/token)", "same top-1", "MB", "speed"):
        table.add_column(column, justify="left" if column in ("variant", "method") else "right")
    base = {row["variant"]: row["perplexity"] for row in rows if row["method"] == "float"}
    for row in rows:
        ratio = row["perplexity"] / base[row["variant"]]
        table.add_row(
            row["variant"], row["method"], f"{row['perplexity']:.3f}", f"{ratio:.4f}",
            f"{row['kl']:.5f}" if "kl" in row else "", f"{row['top1']:.1%}" if "top1" in row else "",
            f"{row['bytes'] / 1e6:.2f}", f"{row['speed']:.2f} ×",
        )  # fmt: skip
    Console(width=118).print(table)


if __name__ == "__main__":
    main()
