"""Speed of a Llama decoder block, hidden size 2048, on one thread of the CPU: `results/speed.json`.

    python benchmarks/speed.py [--hidden 2048]

The block (random weights: speed does not depend on them) is exported from transformers by torch.onnx and compiled by
each recipe; every round runs float and compiled one after the other, and the ratio of the medians is reported, for
prefill (128 tokens) and for one token. fp8 has no kernel on CPUs: its row is the price of a simulation. onnxruntime's
own static and dynamic quantization are measured in the same rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from qcompiler import compiler
from qcompiler.sessions import runtime

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.quality import machine, versions  # noqa: E402

CACHE = ROOT / "benchmarks" / ".cache"

RECIPES: dict[str, tuple[str, ...]] = {
    "smoothquant": (),
    "int8-dynamic": (),
    "int8-dynamic-tensor": (),
    # The inputs of a random block have no outliers, so 1 % of the columns are called so.
    "llm-int8": ("split-outliers.threshold=1e-6", "split-outliers.max_share=0.01"),
    "w4a8": (),
    "int8-weights": (),
    "rtn-w4": (),
    # All layers, where the recipe leaves the first and the last block and attention in float.
    "fp8": ("fp8.first_and_last_block=true", "fp8.attention=true"),
}
"""Recipe, and the options that make it work on every layer of the block."""


def block(hidden: int) -> Path:
    """A decoder block and its final norm and small head, exported once."""
    folder = CACHE / f"block-{hidden}"
    path = folder / "model.onnx"
    if path.exists():
        return path
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=512, hidden_size=hidden, intermediate_size=hidden * 11 // 4, num_hidden_layers=1,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 256, max_position_embeddings=2048,
    )).eval()  # fmt: skip
    model.config.use_cache = False
    ids = torch.randint(0, 512, (2, 16))
    sequence, batch = torch.export.Dim("sequence", min=1, max=2048), torch.export.Dim("batch", min=1, max=64)
    folder.mkdir(parents=True, exist_ok=True)
    torch.onnx.export(
        model, (), str(path), kwargs={"input_ids": ids}, dynamic_shapes={"input_ids": {0: batch, 1: sequence}},
        dynamo=True, opset_version=21, input_names=["input_ids"], output_names=["logits"], verbose=False,
    )  # fmt: skip
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "speed.json")
    arguments = parser.parse_args()
    source = block(arguments.hidden)
    models = {"float": source}
    generator = np.random.default_rng(0)
    samples = [{"input_ids": generator.integers(0, 512, (1, 128))} for _ in range(8)]
    for name, settings in RECIPES.items():
        folder = CACHE / f"block-{arguments.hidden}-{name}"
        compiled = compiler.compile(source, name, calibration=samples, options=settings)
        compiled.save(folder, overwrite=True)
        models[name] = folder / "model.onnx"
    models |= peers(source, samples, CACHE / f"block-{arguments.hidden}-peers")

    sessions = {name: runtime.load_session(path, threads=1) for name, path in models.items()}
    rows: list[dict[str, Any]] = []
    for tokens in (128, 1):
        feed = {"input_ids": generator.integers(0, 512, (1, tokens))}
        times: dict[str, list[float]] = {name: [] for name in sessions}
        for _ in range(arguments.rounds):
            for name, session in sessions.items():
                start = time.perf_counter()
                session.run(None, feed)
                times[name].append(time.perf_counter() - start)
        median = {name: statistics.median(found) for name, found in times.items()}
        rows += [
            {"tokens": tokens, "method": name, "ms": round(1e3 * found, 2), "speed": round(median["float"] / found, 2)}
            for name, found in median.items()
        ]
    report = {"date": date.today().isoformat(), "machine": machine(), "versions": versions(), "threads": 1,
              "hidden": arguments.hidden, "rows": rows}  # fmt: skip
    arguments.output.write_text(json.dumps(report, indent=2) + "\n")
    for row in rows:
        print(f"{row['tokens']:4d} tokens  {row['method']:32s} {row['ms']:8.2f} ms  {row['speed']:5.2f} × float")


def peers(source: Path, samples: list[dict[str, np.ndarray]], folder: Path) -> dict[str, Path]:
    """onnxruntime's own quantization of the same block."""
    from onnxruntime.quantization import QuantType, quantize_dynamic, quantize_static

    class Reader:
        def __init__(self) -> None:
            self._iterator = iter(samples)

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self._iterator, None)

    folder.mkdir(parents=True, exist_ok=True)
    quantize_static(
        source, folder / "static.onnx", Reader(), activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8
    )
    quantize_dynamic(source, folder / "dynamic.onnx")
    return {
        "onnxruntime quantize_static": folder / "static.onnx",
        "onnxruntime quantize_dynamic": folder / "dynamic.onnx",
    }


if __name__ == "__main__":
    main()
