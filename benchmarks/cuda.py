"""Correctness and speed of the recipes on a GPU, against float16 on the same GPU: `results/cuda.json`.

    python benchmarks/cuda.py                          compile what there is to measure, and measure it
    python benchmarks/cuda.py prepare --folder DIR     compile alone: no GPU and no onnxruntime-gpu needed
    python benchmarks/cuda.py measure --folder DIR     measure alone: onnxruntime-gpu and numpy, nothing else

It measures a decoder block of Llama's shape (hidden size 4096, 14336 within, 32 heads of 128 on 8 of keys and values,
random weights) and the demo model; and the product by QOrderedMatMul, which no target takes before it has been seen to
be right. Every case is compared with the float32 model on the CPU, on a prompt and a token after it, and timed in turns
with the float16 model: a prompt of 2,048 tokens, and one token after 512 for one text and for 16 at once. Tokens after
others need a cache, so that the demo model, exported without one, runs one token by itself.

All stops in time: what does not fit into `--minutes` is listed as not run, and results are written after every case.
Without a GPU the same runs on the CPU provider with a tiny block (`--tiny --device cpu`), which is what the tests do.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.cuda_measure import Entry, Shape, feeds, lines, measure, open_session  # noqa: E402

HIDDEN, TINY = 4096, 256
WHOLE_BLOCK = ("fp8.first_and_last_block=true", "fp8.attention=true")
OUTLIERS = ("split-outliers.threshold=1e-6", "split-outliers.max_share=0.01")  # a random block has none of its own
SAME_KERNELS = {
    "gptq-w4": "rtn-w4", "gptq-w4-act-order": "rtn-w4", "gptq-w3": "rtn-w4", "awq-w4": "rtn-w4",
    "awq-gptq-w4": "rtn-w4", "w4a8": "rtn-w4", "smoothquant-o1": "int8-dynamic", "binary": "int8-dynamic",
    "smoothquant-o2": "int8-dynamic-tensor", "hqq-w4": "rtn-w4, zero points", "gptq-w2": "rtn-w2",
    "gptq-w4-kv8": "rtn-w4 and kv-int8", "kv-int4-fused": "kv-int4", "kv-int8-fused": "kv-int8",
}  # fmt: skip
"""Recipes that end in the same operators as another, which is measured; they differ in what the codes are."""


@dataclass(frozen=True)
class Case:
    """One compiled model."""

    recipe: str
    target: str = "ort-cuda"
    settings: tuple[str, ...] = ()
    name: str = ""

    @property
    def label(self) -> str:
        return self.name or (self.recipe if self.target == "ort-cuda" else f"{self.recipe} ({self.target})")


BLOCK_CASES = (
    Case("rtn-w4"), Case("int8-weights"), Case("int8-dynamic"), Case("fp8", settings=WHOLE_BLOCK), Case("kv-int8"),
    Case("fp8-tensor", settings=WHOLE_BLOCK), Case("w8"), Case("int8-dynamic-tensor"), Case("kv-int4"), Case("nf4"),
    Case("fp8-tensor", settings=(*WHOLE_BLOCK, "lower-fp8.gemm=true"), name="fp8-tensor, GemmFloat8"),
    Case("llm-int8", settings=OUTLIERS),
    Case("rtn-w4", settings=("quantize-weights.format=uint4", "quantize-weights.symmetric=false"),
         name="rtn-w4, zero points"),
    Case("rtn-w4", settings=("quantize-weights.format=int2",), name="rtn-w2"),
    Case("int8-dynamic", settings=("lower-integer-chain.cudnn=false",), name="int8-dynamic, TopK"),
    Case("rtn-w4", "tensorrt"), Case("smoothquant", "tensorrt"), Case("fp8-tensor", "tensorrt", WHOLE_BLOCK),
)  # fmt: skip
"""What is most wanted comes first. Codes that take long to find (GPTQ's, HQQ's) run as those of rounding to nearest."""
DEMO_CASES = tuple(
    Case(name) for name in
    ("rtn-w4", "int8-weights", "int8-dynamic", "fp8", "gptq-w4", "llm-int8", "fp8-tensor", "nf4", "w8", "hqq-w4",
     "int8-dynamic-tensor", "smoothquant-o1", "smoothquant-o2", "w4a8", "awq-w4", "awq-gptq-w4", "gptq-w4-act-order",
     "gptq-w3", "gptq-w2", "binary")
)  # fmt: skip


# ------------------------------------------------------------------------------------------------- compile


def prepare(
    folder: Path, *, tiny: bool, half: bool, deadline: float, block_cases: Sequence[Case] = BLOCK_CASES,
    demo_cases: Sequence[Case] = DEMO_CASES, demo: Mapping[str, Path] | None = None,
    workers: int = 1,
) -> None:  # fmt: skip
    """Write models and `manifest.json`. `demo`: the demo model as {"float16": …, "float32": …}, empty for none.

    `workers`: compilations at a time, in processes of their own.
    """
    from benchmarks import cuda_models as models

    hidden = TINY if tiny else HIDDEN
    entries = [Entry("product", "QOrderedMatMul", "product/ordered", ["CUDAExecutionProvider", "CPUExecutionProvider"])]
    for name, write in (("block", models.decoder_block), ("product", models.product)):
        for kind in ("float32", "float16") if half else ("float32",):
            write(folder / name / kind / "model.onnx", hidden, half=kind == "float16")
    models.ordered_product(folder / "product" / "ordered" / "model.onnx", hidden, half=half)
    source = folder / "block" / ("float16" if half else "float32")
    # One sample, so that nothing is held out to compare on: `measure` does that.
    samples = [feeds(_declared(source), Shape("", 1, 64), np.random.default_rng(0))]
    found = demo_models() if demo is None else demo
    _write_manifest(folder, tiny, half, entries)
    jobs: list[Job] = [("block", case, source, folder, samples, deadline) for case in block_cases]
    for kind, path in found.items():
        (folder / "demo" / kind).mkdir(parents=True, exist_ok=True)
        for file in path.glob("model.onnx*"):
            shutil.copy(file, folder / "demo" / kind)
    source, text = folder / "demo" / ("float16" if half else "float32"), str(ROOT / "models/demo/calibration.txt")
    jobs += [("demo", case, source, folder, text, deadline) for case in demo_cases if found]
    for entry in _in_turn(jobs, workers):
        entries.append(entry)
        _write_manifest(folder, tiny, half, entries)


Job = tuple[str, Case, Path, Path, Any, float]
"""What `_compiled` takes."""


def _in_turn(jobs: Sequence[Job], workers: int) -> Iterator[Entry]:
    """The entries in the order of the jobs."""
    if workers == 1:
        yield from (_compiled(*job) for job in jobs)
        return
    with ProcessPoolExecutor(
        workers, mp_context=get_context("spawn")
    ) as pool:  # a fork would copy onnxruntime's threads
        yield from pool.map(_compiled, *zip(*jobs, strict=True))


def demo_models() -> dict[str, Path]:
    """The demo model in both types, exported where it is not yet."""
    from models.export import model_path

    return {"float32": model_path("dynamo").parent, "float16": model_path("fp16").parent}


def _compiled(subject: str, case: Case, source: Path, folder: Path, calibration: Any, deadline: float) -> Entry:
    """Compile a case into the folder; where that fails, the entry says why."""
    from qcompiler import compiler
    from qcompiler.errors import QCompilerError
    from qcompiler.targets import Target

    target, place = Target.load(case.target), f"{subject}/{case.label.replace(', ', '-').replace(' ', '-')}"
    entry = Entry(subject, case.label, place, list(target.providers), dict(target.session_options),
                  list(target.disabled_optimizers))  # fmt: skip
    if time.monotonic() > deadline:
        entry.error = "not compiled: out of time"
        return entry
    print(f"compiling {subject}: {case.label}", file=sys.stderr, flush=True)
    try:
        compiled = compiler.compile(
            source, case.recipe, calibration=calibration, target=case.target, options=case.settings,
            tokenizer=ROOT / "models/demo/tokenizer.json", samples=4, sequence_length=64,
        )  # fmt: skip
        compiled.save(folder / place, overwrite=True)
    except QCompilerError as error:
        entry.error = f"not compiled: {error}"
        return entry
    done = [site.kernel or site.scheme for site in compiled.report.sites if site.status == "quantized"]
    entry.kernels = dict(Counter(done))
    return entry


def _declared(folder: Path) -> list[tuple[str, str, list[Any]]]:
    """(name, type, shape) of a model's inputs, as a session tells them."""
    session = open_session(folder, ["CPUExecutionProvider"])
    return [(item.name, item.type, item.shape) for item in session.get_inputs()]


def _write_manifest(folder: Path, tiny: bool, half: bool, entries: Sequence[Entry]) -> None:
    data = {
        "tiny": tiny,
        "half": half,
        "same_kernels_as": SAME_KERNELS,
        "entries": [asdict(entry) for entry in entries],
    }
    (folder / "manifest.json").write_text(json.dumps(data, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", nargs="?", choices=("all", "prepare", "measure"), default="all")
    parser.add_argument("--folder", type=Path, default=ROOT / "benchmarks" / ".cache" / "cuda")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a block of hidden size 256, and short texts")
    parser.add_argument("--minutes", type=float, default=7.5, help="for both stages together")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "cuda.json")
    parser.add_argument(
        "--workers", type=int, default=max(1, (os.cpu_count() or 1) // 4), help="compilations at a time"
    )
    arguments = parser.parse_args()
    start, budget = time.monotonic(), 60 * arguments.minutes
    if arguments.stage != "measure":
        half = budget if arguments.stage == "prepare" else budget / 2
        prepare(
            arguments.folder, tiny=arguments.tiny, half=arguments.device == "cuda", deadline=start + half,
            workers=arguments.workers,
        )  # fmt: skip
    if arguments.stage != "prepare":
        report = measure(arguments.folder, device=arguments.device, deadline=start + budget, output=arguments.output)
        print(*lines(report), sep="\n")
        sys.exit(not any(row.get("speed") for row in report["rows"]))  # nothing ran: no GPU, most likely


if __name__ == "__main__":
    main()
