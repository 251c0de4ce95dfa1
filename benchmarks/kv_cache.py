"""Time of one token after 2,048 others, by how the cache is kept, on one thread of the CPU: `results/kv_cache.json`.

    python benchmarks/kv_cache.py [--past 2048] [--rounds 25]

The demo model (4 layers, 8 heads of 32 over 2) and one layer of the shape of larger models (32 heads of 64 over 8,
random weights: speed does not depend on them), both as torch.onnx exports them, with caches joined by Concat. Compared
are: that graph; the same with int8 and int4 caches (`quantize-kv-cache`); the graph after `fuse-attention`, with a
float, an int8 and an int4 cache. Past and present are bound as ONNX Runtime's own values, so nothing is copied through
Python; "shared" means that both are one buffer, which GroupQueryAttention appends to in place. Every round runs all of
them in turn; medians are reported.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

import qcompiler
from qcompiler.recipes import Recipe, Step
from qcompiler.sessions import runtime

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "models")]

from benchmarks.quality import machine, versions  # noqa: E402

CACHE = ROOT / "benchmarks" / ".cache"
FUSE = Step(name="fuse-attention")


def store(format: str, **options: Any) -> Step:
    return Step(name="quantize-kv-cache", options={"format": format, **options})


STATIC = {"key_granularity": "channel", "value_granularity": "channel"}
RECIPES: dict[str, tuple[Step, ...]] = {
    "Concat, float": (),
    "Concat, int8 per token": (store("int8"),),
    "Concat, int8 per channel": (store("int8", **STATIC),),
    "Concat, int4 per token": (store("int4"),),
    "GroupQueryAttention, float": (FUSE,),
    "GroupQueryAttention, float, right padding only": (Step(name="fuse-attention", options={"padding": "right"}),),
    "GroupQueryAttention, int8": (FUSE, store("int8")),
    "GroupQueryAttention, int4": (FUSE, store("int4")),
}
SHARED = ", shared"


def layer() -> Path:
    """One decoder layer, 32 heads of 64 over 8, with a small MLP and a small head; exported once."""
    path = CACHE / "layer-32-8-64" / "model.onnx"
    if path.exists():
        return path
    import tempfile

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from models.export import export_dynamo_past

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=2048, intermediate_size=2048, num_hidden_layers=1, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=4096,
    )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as source:
        LlamaForCausalLM(config).save_pretrained(source)
        export_dynamo_past(Path(source), path.parent)
    return path


def step(path: Path, past: int, shared: bool) -> Callable[[], None]:
    """Something that runs one token after `past` others."""
    import onnxruntime as ort

    session = runtime.load_session(path, threads=1)
    binding = session.io_binding()
    generator = np.random.default_rng(0)
    for item in session.get_inputs():
        if item.name == "input_ids":
            array = np.ones((1, 1), np.int64)
        elif item.name == "attention_mask":
            array = np.ones((1, past + 1), np.int64)
        else:
            dtype = {"tensor(float)": np.float32, "tensor(int8)": np.int8, "tensor(uint8)": np.uint8,
                     "tensor(float16)": np.float16}[item.type]  # fmt: skip
            shape = (1, item.shape[1], past + (32 if shared else 0), item.shape[3])
            whole = dtype in (np.int8, np.uint8)
            numbers = generator.integers(0, 127, shape) if whole else generator.random(shape, np.float32)
            array = numbers.astype(dtype)
        value = ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))
        binding.bind_ortvalue_input(item.name, value)
        if shared and item.name.startswith("past_key_values"):
            binding.bind_ortvalue_output(item.name.replace("past_key_values", "present"), value)
    for item in session.get_outputs():
        if not shared or not item.name.startswith("present"):
            binding.bind_output(item.name)
    return lambda: session.run_with_iobinding(binding)


def bytes_per_token(path: Path) -> int:
    """Of all caches, with the scales that travel beside them."""
    session = runtime.load_session(path, threads=1)
    widths = {"tensor(float)": 4, "tensor(float16)": 2, "tensor(int8)": 1, "tensor(uint8)": 1}
    return sum(item.shape[1] * item.shape[3] * widths[item.type] for item in session.get_inputs()
               if item.name.startswith("past_key_values"))  # fmt: skip


def measure(name: str, source: Path, vocabulary: int, past: int, rounds: int) -> list[dict[str, Any]]:
    generator = np.random.default_rng(0)
    samples = [{"input_ids": generator.integers(1, vocabulary, (1, 64))} for _ in range(4)]
    steps, paths = {}, {}
    for method, passes in RECIPES.items():
        folder = CACHE / f"kv-{name}-{method.replace(', ', '-').replace(' ', '-')}"
        paths[method] = folder / "model.onnx" if passes else source
        if passes:
            recipe = Recipe(name="kv", passes=passes)
            compiled = qcompiler.compile(source, recipe, target="ort-cpu", calibration=samples)
            compiled.save(folder, overwrite=True)
        steps[method] = step(paths[method], past, shared=False)
        if FUSE.name in {item.name for item in passes}:
            paths[method + SHARED] = paths[method]
            steps[method + SHARED] = step(paths[method], past, shared=True)
    times: dict[str, list[float]] = {method: [] for method in steps}
    for run in steps.values():
        run()
    for _ in range(rounds):
        for method, run in steps.items():
            start = time.perf_counter()
            run()
            times[method].append(time.perf_counter() - start)
    median = {method: statistics.median(found) for method, found in times.items()}
    float_ms = median["Concat, float"]
    return [
        {"model": name, "cache": method, "ms": round(1e3 * found, 3), "speed": round(float_ms / found, 2),
         "bytes_per_token": bytes_per_token(paths[method])}
        for method, found in median.items()
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--past", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "kv_cache.json")
    arguments = parser.parse_args()
    from models.export import model_path

    rows = measure("demo", model_path("dynamo-past"), 3072, arguments.past, arguments.rounds)
    rows += measure("layer", layer(), 512, arguments.past, arguments.rounds)
    report = {"date": date.today().isoformat(), "machine": machine(), "versions": versions(), "threads": 1,
              "past": arguments.past, "rounds": arguments.rounds, "rows": rows}  # fmt: skip
    arguments.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    for row in rows:
        cost = f"{row['ms']:8.3f} ms {row['speed']:5.2f} × {row['bytes_per_token']:6} B"
        print(f"{row['model']:6} {row['cache']:56} {cost}")


if __name__ == "__main__":
    main()
