"""Weight-only quantization on the demo model, beside llm-compressor's and onnxruntime's: `results/weight_only.json`.

    python benchmarks/weight_only.py [--windows 32] [--workers 2] [--only gptq] [--no-llm-compressor]

All methods quantize the same layers (the linear ones of the blocks; embedding and lm_head stay float), calibrate on the
same windows of `models/demo/calibration.txt`, and are judged by the same evaluation on windows of
`models/demo/heldout.txt` against the same float graph. To see the weights alone, all arithmetic is float: our portable
models and llm-compressor's weights are put back into the float graph (`float_weights.py`), and onnxruntime's kernels
get no accuracy level. The share closed is how much of the KL divergence that round-to-nearest opens, at the same bits,
groups and symmetry, is gone again. The recipes as they come, compiled for ort-cpu, whose kernels round activations too,
stand in rows of their own.

What the peers made is kept in benchmarks/.cache until the checkpoint, the windows or their scripts change;
llm-compressor runs in an environment of its own, made on the first run.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.float_weights import dequantize, insert  # noqa: E402
from benchmarks.peers import environment, onnxruntime_nbits  # noqa: E402
from benchmarks.quality import machine, versions  # noqa: E402
from models.export import model_path  # noqa: E402
from qcompiler import compiler  # noqa: E402
from qcompiler.calibration.samples import Samples, open_samples  # noqa: E402
from qcompiler.evaluation.evaluate import evaluate  # noqa: E402
from qcompiler.graph.files import load  # noqa: E402
from qcompiler.recipes import Recipe, recipe_names  # noqa: E402
from qcompiler.recipes.registry import options_of, pass_class  # noqa: E402

DEMO, CACHE = ROOT / "models" / "demo", ROOT / "benchmarks" / ".cache" / "weight-only"
VARIANT, SEQUENCE = "dynamo", 256
CALIBRATION_WINDOWS, COMPARED_WINDOWS = 32, 4  # our compiler holds the last ones out for its report
FLOAT_LAYERS = ("lm_head", "model.embed_tokens")
RTN = "rtn-w4"
RECIPES = (RTN, "gptq-w4", "gptq-w4-act-order", "awq-w4", "awq-gptq-w4", "hqq-w4", "nf4")
SHIPPED = (*RECIPES, "w8", "gptq-w3", "gptq-w2")


@dataclass(frozen=True)
class Setting:
    bits: int
    group: int
    symmetric: bool

    def __str__(self) -> str:
        return f"w{self.bits}-g{self.group}-{'sym' if self.symmetric else 'asym'}"


SETTINGS = [Setting(bits, group, symmetric) for bits, symmetric in ((4, True), (4, False), (3, False))
            for group in (128, 32)]  # fmt: skip
LLM_COMPRESSOR: dict[str, dict[str, Any]] = {
    "RTN": {"method": "rtn"},
    "GPTQ": {"method": "gptq"},  # its default is act-order with static groups
    "GPTQ, mse observer": {"method": "gptq", "observer": "memoryless_mse"},
    "AWQ": {"method": "awq"},
    "AWQ + GPTQ, mse observer": {"method": "awq-gptq", "observer": "memoryless_mse"},
}


@dataclass(frozen=True)
class Task:
    """One row to measure; picklable, as rows are measured in several processes."""

    tool: str
    method: str
    setting: Setting | None
    """None for a recipe as it comes."""
    windows: int
    cached: Path
    """What a peer made, or where it goes."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=32, help="held-out windows, spread over the text")
    parser.add_argument("--workers", type=int, default=2, help="processes, each on one thread")
    parser.add_argument("--only", default="", help="measure methods with this in their name, beside RTN")
    parser.add_argument("--setting", action="append", choices=[str(setting) for setting in SETTINGS])
    parser.add_argument("--no-llm-compressor", action="store_true", help="leave out what needs its own environment")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "weight_only.json")
    arguments = parser.parse_args()
    start = time.perf_counter()
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that are started from here
    settings = [found for found in SETTINGS if arguments.setting is None or str(found) in arguments.setting]
    tasks = [task for task in plan(settings, arguments.windows, not arguments.no_llm_compressor)
             if arguments.only in task.method or task.method == RTN]  # fmt: skip
    peers = [task for task in tasks if task.tool == "llm-compressor"]
    run_llm_compressor(peers, arguments.workers)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.workers, mp_context=context, max_tasks_per_child=None) as pool:
        rows = list(pool.map(measure, tasks))
    add_shares(rows)
    used = versions() | {"torch": importlib.metadata.version("torch")} | peer_versions(peers)
    report = {
        "date": date.today().isoformat(), "machine": machine(), "versions": used,
        "checkpoint": sha256([DEMO / "model.safetensors"])[:16], "seed": 0,
        "calibration": f"{CALIBRATION_WINDOWS} windows of {SEQUENCE} tokens", "tokens": rows[0]["tokens"],
        "seconds": round(time.perf_counter() - start), "rows": rows,
    }  # fmt: skip
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print_table(rows)


def plan(settings: Iterable[Setting], windows: int, llm_compressor: bool) -> list[Task]:
    """All rows, those that take longest first in each setting, so that no process waits for the last one."""
    there = recipe_names()
    missing = [name for name in SHIPPED if name not in there]
    if missing:
        print(f"not there, so not measured: {', '.join(missing)}", file=sys.stderr)
    peers = peer_cache()
    tasks = [Task("qcompiler", "float", None, windows, model_path(VARIANT))]
    for setting in settings:
        for name in RECIPES:
            if name in there and fits(name, setting):
                tasks.append(Task("qcompiler", name, setting, windows, CACHE / "ours" / f"{name}-{setting}"))
        for name in LLM_COMPRESSOR if llm_compressor else ():
            file = peers / "llm-compressor" / f"{slug(name)}-{setting}.safetensors"
            tasks.append(Task("llm-compressor", name, setting, windows, file))
        for name in onnxruntime_nbits.ALGORITHMS if setting.bits == 4 else ():
            if not (setting.symmetric and name in onnxruntime_nbits.ASYMMETRIC_ONLY):
                file = peers / f"onnxruntime-{name}-{setting}" / "model.onnx"
                tasks.append(Task("onnxruntime", name, setting, windows, file))
    return tasks + [
        Task("qcompiler", name, None, windows, CACHE / "shipped" / name) for name in SHIPPED if name in there
    ]


def fits(name: str, setting: Setting) -> bool:
    """HQQ moves zero points, and NF4 has neither zero points nor another number of bits."""
    if name == "hqq-w4":
        return not setting.symmetric
    return name != "nf4" or (setting.bits == 4 and setting.symmetric)


# ------------------------------------------------------------------------------------------------- one row


def measure(task: Task) -> dict[str, Any]:
    found = MAKE[task.tool, task.setting is None](task)
    source = model_path(VARIANT)
    held_out = open_samples(
        str(DEMO / "heldout.txt"), model=load(source), tokenizer=DEMO / "tokenizer.json", limit=task.windows,
        sequence_length=SEQUENCE,
    )  # fmt: skip
    figures = evaluate(found.model, held_out, reference=source, threads=1)
    row = {"tool": task.tool, "method": task.method, **(asdict(task.setting) if task.setting else {"shipped": True})}
    row |= {"tokens": figures.tokens, "perplexity": figures.perplexity, "kl": figures.kl, "top1": figures.top1}
    row |= {"layers": found.layers, "seconds": found.seconds, "bytes": found.bytes}
    print(
        f"{task.setting or 'as it comes'}  {task.tool} {task.method}: KL {figures.kl:.5f}", file=sys.stderr, flush=True
    )
    return {name: value for name, value in row.items() if value is not None}


@dataclass(frozen=True)
class Made:
    model: Path
    layers: int | None = None
    """Linear layers whose weight is quantized."""
    seconds: float | None = None
    bytes: int | None = None


def ours(task: Task) -> Made:
    assert task.setting is not None
    start = time.perf_counter()
    compiled = compiler.compile(
        model_path(VARIANT), recipe_at(task.method, task.setting), target="portable", calibration=calibration_inputs(),
        exclude=FLOAT_LAYERS,
    )  # fmt: skip
    seconds = round(time.perf_counter() - start, 1)
    output = task.cached / "model.onnx"
    return Made(output, dequantize(compiled.model, output), seconds)


def recipe_at(name: str, setting: Setting) -> Recipe:
    """A recipe with its steps for linear layers at other bits and groups, and those for other layers left out."""
    recipe = Recipe.load(name)
    wanted: dict[str, object] = {"group_size": setting.group, "block_size": setting.group}
    if name != "nf4":
        code = f"{'int' if setting.symmetric else 'uint'}{setting.bits}"
        wanted |= {"format": code, "granularity": "group", "symmetric": setting.symmetric}
    steps = []
    for step in recipe.passes:
        if "linear" not in step.options.get("layers", ["linear"]):
            continue
        known = {option.name for option in options_of(pass_class(step.name))}
        options = step.options | {key: value for key, value in wanted.items() if key in known}
        steps.append(step.model_copy(update={"options": options}))
    return recipe.model_copy(update={"passes": tuple(steps)})


def shipped(task: Task) -> Made:
    if task.method == "float":
        return Made(task.cached, bytes=size(task.cached.parent))
    start = time.perf_counter()
    compiled = compiler.compile(model_path(VARIANT), task.method, target="ort-cpu", calibration=calibration_inputs())
    seconds = round(time.perf_counter() - start, 1)
    compiled.save(task.cached, overwrite=True)
    return Made(task.cached / "model.onnx", seconds=seconds, bytes=size(task.cached))


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("model.onnx*"))


def llm_compressor(task: Task) -> Made:
    from safetensors.numpy import load_file

    output = CACHE / "inserted" / task.cached.stem / "model.onnx"
    insert(model_path(VARIANT), load_file(task.cached), output)
    facts = json.loads(task.cached.with_suffix(".json").read_text(encoding="utf-8"))
    return Made(output, facts["layers"], facts["seconds"])


def onnxruntime(task: Task) -> Made:
    import onnx

    assert task.setting is not None
    seconds = None
    if not task.cached.exists():
        start = time.perf_counter()
        samples = calibration_inputs()[:CALIBRATION_WINDOWS]
        partial = task.cached.parent.with_suffix(".partial") / task.cached.name
        onnxruntime_nbits.quantize(
            model_path(VARIANT), partial, task.method, task.setting.group, task.setting.symmetric, samples
        )
        partial.parent.rename(task.cached.parent)
        seconds = round(time.perf_counter() - start, 1)
        task.cached.with_name("seconds.json").write_text(json.dumps(seconds))
    seconds = json.loads(task.cached.with_name("seconds.json").read_text())
    layers = sum(node.op_type == "MatMulNBits" for node in onnx.load(task.cached).graph.node)
    return Made(task.cached, layers, seconds)


MAKE: dict[tuple[str, bool], Callable[[Task], Made]] = {
    ("qcompiler", False): ours,
    ("qcompiler", True): shipped,
    ("llm-compressor", False): llm_compressor,
    ("onnxruntime", False): onnxruntime,
}


# ------------------------------------------------------------------------------------------------- peers


def calibration_inputs() -> list[dict[str, np.ndarray]]:
    """The windows to calibrate on, then those that our compiler holds out."""
    found: Samples = open_samples(
        str(DEMO / "calibration.txt"), model=load(model_path(VARIANT)), tokenizer=DEMO / "tokenizer.json",
        limit=CALIBRATION_WINDOWS + COMPARED_WINDOWS, sequence_length=SEQUENCE,
    )  # fmt: skip
    return list(found)


def peer_cache() -> Path:
    """The folder for what peers make of this checkpoint on these windows; those of others are deleted."""
    scripts = sorted((ROOT / "benchmarks" / "peers").glob("*.*"))
    inputs = [DEMO / "model.safetensors", DEMO / "config.json", DEMO / "calibration.txt", DEMO / "tokenizer.json"]
    folder = CACHE / "peers" / sha256([*inputs, *scripts])[:16]
    for other in folder.parent.glob("*"):
        if other != folder:
            shutil.rmtree(other)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def run_llm_compressor(tasks: Sequence[Task], workers: int) -> None:
    """Make the weights that are not there yet."""
    jobs = [LLM_COMPRESSOR[task.method] | {"name": task.cached.stem} | asdict(task.setting or SETTINGS[0])
            for task in tasks if not task.cached.with_suffix(".json").exists()]  # fmt: skip
    if not jobs:
        return
    print(f"llm-compressor: {len(jobs)} models", file=sys.stderr, flush=True)
    environment.python_of("llmcompressor")
    folder = tasks[0].cached.parent
    folder.mkdir(parents=True, exist_ok=True)
    ids = np.concatenate([sample["input_ids"] for sample in calibration_inputs()[:CALIBRATION_WINDOWS]])
    np.savez(folder / "calibration.npz", input_ids=ids)

    def run(worker: int) -> None:
        file = folder / f"jobs-{worker}.json"
        file.write_text(json.dumps(jobs[worker::workers]), encoding="utf-8")
        environment.run("llmcompressor", "llm_compressor.py", DEMO, folder / "calibration.npz", file, folder)

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(run, range(min(workers, len(jobs)))))


def peer_versions(tasks: Sequence[Task]) -> dict[str, str]:
    if not tasks:
        return {}
    facts = json.loads(tasks[0].cached.with_suffix(".json").read_text(encoding="utf-8"))
    return {name: facts["versions"][name] for name in ("llmcompressor", "compressed-tensors")}


def sha256(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def slug(name: str) -> str:
    return name.lower().replace(" + ", "-").replace(", ", "-").replace(" ", "-")


# ------------------------------------------------------------------------------------------------- table


def add_shares(rows: list[dict[str, Any]]) -> None:
    """`closed`: 1 - KL / KL of our round-to-nearest at the same setting."""
    base = {setting_of(row): row["kl"] for row in rows if row["method"] == RTN and "bits" in row}
    for row in rows:
        if "bits" in row and row["method"] != RTN:
            row["closed"] = 1 - row["kl"] / base[setting_of(row)]


def setting_of(row: dict[str, Any]) -> Setting:
    return Setting(row["bits"], row["group"], row["symmetric"])


def print_table(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="held-out text, against the float model")
    for column in ("setting", "tool", "method", "KL (nats/token)", "closed", "perplexity", "same top-1", "s"):
        table.add_column(column, justify="left" if column in ("setting", "tool", "method") else "right")
    for row in rows:
        table.add_row(
            str(setting_of(row)) if "bits" in row else "as it comes", row["tool"], row["method"], f"{row['kl']:.5f}",
            f"{row['closed']:.1%}" if "closed" in row else "", f"{row['perplexity']:.3f}", f"{row['top1']:.1%}",
            f"{row['seconds']:.1f}" if "seconds" in row else "",
        )  # fmt: skip
    Console(width=118).print(table)


if __name__ == "__main__":
    main()
