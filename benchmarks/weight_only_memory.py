"""Time and peak memory of GPTQ on a model of 1.1 billion parameters: `results/weight_only_memory.json`.

    python benchmarks/weight_only_memory.py [--blocks 22] [--memory-limit 2GiB] [--peer-blocks 2] [--folder DIR]

A Llama-shaped model (22 blocks, hidden 2048, SwiGLU 5632, 32 heads that share 4 key-value heads, vocabulary 32000,
float32: 4.4 GB) with generated weights is written tensor by tensor, then `qcompiler compile` runs gptq-w4 on it as a
process of its own, whose peak resident memory the operating system reports. The floor beside it is what the algorithm
has to compute, divided by how fast this machine multiplies large matrices (measured in the same run, before and after).

With `--peer-blocks N`, llm-compressor's GPTQ runs on the same weights of the first N blocks, in an environment of its
own, and ours once more on these N blocks. It takes minutes a block on two cores, so N is small. `--blocks 0` leaves the
large model out. Rows of an earlier run for other numbers of blocks stay in the results, each with its date.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (numpy learns bfloat16, which onnx_ir needs)
import numpy as np
import onnx_ir as ir

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.memory import Shape, build, run  # noqa: E402
from benchmarks.peers import environment  # noqa: E402
from benchmarks.quality import machine, versions  # noqa: E402

COMPARED = 4  # samples that the compiler holds out and compares on
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def shape_of(blocks: int) -> Shape:
    return Shape(blocks, kv_heads=4, vocabulary=32000, tied=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=22)
    parser.add_argument("--recipe", default="gptq-w4")
    parser.add_argument("--set", action="append", default=[], metavar="PASS.OPTION=VALUE", dest="settings")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--sequence", type=int, default=256)
    parser.add_argument("--memory-limit", default="2GiB")
    parser.add_argument("--peer-blocks", type=int, default=0, help="blocks that llm-compressor quantizes too")
    parser.add_argument("--folder", type=Path, default=None, help="where the models go (default: a temporary folder)")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "weight_only_memory.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        rows = [ours(arguments, blocks, folder) for blocks in dict.fromkeys((arguments.blocks, arguments.peer_blocks))
                if blocks]  # fmt: skip
        if arguments.peer_blocks:
            rows.append(peer(arguments, arguments.peer_blocks, folder))
    rows = kept(arguments.output, rows) + rows
    report = {"date": date.today().isoformat(), "machine": machine(), "cores": os.cpu_count(), "versions": versions(),
              "samples": arguments.samples, "sequence": arguments.sequence, "memory_limit": arguments.memory_limit,
              "rows": rows}  # fmt: skip
    arguments.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def kept(results: Path, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of an earlier run for numbers of blocks that this one did not touch."""
    if not results.exists():
        return []
    touched = {row["blocks"] for row in rows}
    return [row for row in json.loads(results.read_text(encoding="utf-8"))["rows"] if row["blocks"] not in touched]


def ours(arguments: argparse.Namespace, blocks: int, folder: Path) -> dict[str, Any]:
    shape = shape_of(blocks)
    source = folder / f"source-{blocks}" / "model.onnx"
    if not source.exists():
        build(shape, source.parent)
    generator = np.random.default_rng(0)
    ids = generator.integers(0, shape.vocabulary, (arguments.samples + COMPARED, arguments.sequence))
    np.savez(folder / "data.npz", input_ids=ids)
    rates = gemm_rates()
    output = folder / f"{arguments.recipe}-{blocks}"
    settings = [word for setting in arguments.settings for word in ("--set", setting)]
    seconds, peak = run([
        "compile", str(source), "--recipe", arguments.recipe, "--calibration", str(folder / "data.npz"),
        "--samples", str(arguments.samples), "--memory-limit", arguments.memory_limit, "-o", str(output), "--overwrite",
        *settings,
    ])  # fmt: skip
    rates = {name: max(rate, rates[name]) for name, rate in gemm_rates().items()}
    needed = operations(shape, arguments.samples * arguments.sequence, arguments.sequence)
    floor = floor_seconds(needed, rates)
    row = {
        "date": date.today().isoformat(), "tool": "qcompiler", "recipe": arguments.recipe,
        "settings": arguments.settings, "blocks": blocks,
        "parameters": shape.parameters, "seconds": round(seconds, 1), "peak_gb": round(peak / 1e9, 3),
        "gb_before": round(size(source.parent), 3), "gb_after": round(size(output), 3),
        "floor_seconds": round(floor, 1), "times_floor": round(seconds / floor, 2),
        "tera_operations": {name: round(count / 1e12, 2) for name, count in needed.items()},
        "gemm_gflops": {name: round(rate / 1e9, 1) for name, rate in rates.items()},
    }  # fmt: skip
    print(row, flush=True)
    return row


def size(folder: Path) -> float:
    """Gigabytes of a model and its external data."""
    return sum(file.stat().st_size for file in folder.glob("model.onnx*")) / 1e9


# ------------------------------------------------------------------------------------------------- the floor


def operations(shape: Shape, tokens: int, sequence: int) -> dict[str, float]:
    """Additions and multiplications that sequential GPTQ cannot do without, for all blocks.

    Each block runs twice, to measure it and to give the next block its inputs. Hessians are symmetric, so half of XᵀX
    counts. The factor of the inverse is a Cholesky factorisation and the inverse of a triangle, K³/3 each, in float64.
    Of the updates, a column's error reaches half of the columns on average. Layers that read the same value share
    Hessian and factor: a block has four of them.
    """
    per_token = sum(2.0 * k * n for k, n in shape.linears.values()) + 4.0 * sequence * shape.hidden
    inputs = [shape.linears[name][0] for name in ("q_proj", "o_proj", "gate_proj", "down_proj")]
    block = {
        "forward": 2 * tokens * per_token,
        "hessian": float(sum(tokens * k * k for k in inputs)),
        "factor, float64": sum(2 / 3 * k**3 for k in inputs),
        "update": float(sum(n * k * k for k, n in shape.linears.values())),
    }
    return {name: shape.layers * count for name, count in block.items()}


def floor_seconds(needed: dict[str, float], rates: dict[str, float]) -> float:
    return sum(count / rates["float64" if "float64" in name else "float32"] for name, count in needed.items())


def gemm_rates(size: int = 2048, rounds: int = 5) -> dict[str, float]:
    """Operations a second of the fastest of some products of square matrices, with all cores."""
    import torch

    rates = {}
    for name, dtype in (("float32", torch.float32), ("float64", torch.float64)):
        a, b = torch.randn(size, size, dtype=dtype), torch.randn(size, size, dtype=dtype)
        times = []
        for _ in range(rounds):
            start = time.perf_counter()
            torch.mm(a, b)
            times.append(time.perf_counter() - start)
        rates[name] = 2 * size**3 / min(times)
    return rates


# ------------------------------------------------------------------------------------------------- llm-compressor


def peer(arguments: argparse.Namespace, blocks: int, folder: Path) -> dict[str, Any]:
    checkpoint = folder / f"checkpoint-{blocks}"
    write_checkpoint(shape_of(blocks), folder / f"source-{blocks}" / "model.onnx", checkpoint)
    calibration = folder / "calibration.npz"
    np.savez(calibration, input_ids=np.load(folder / "data.npz")["input_ids"][: arguments.samples])
    job = {"name": "gptq", "method": "gptq", "bits": 4, "group": 128, "symmetric": True}
    (folder / "jobs.json").write_text(json.dumps([job]), encoding="utf-8")
    environment.run("llmcompressor", "llm_compressor.py", checkpoint, calibration, folder / "jobs.json", folder)
    facts = json.loads((folder / "gptq.json").read_text(encoding="utf-8"))
    row = {
        "date": date.today().isoformat(), "tool": "llm-compressor", "recipe": "GPTQ", "blocks": blocks,
        "parameters": shape_of(blocks).parameters,
        "seconds": facts["seconds"], "peak_gb": round(facts["peak_bytes"] / 1e9, 3), "versions": facts["versions"],
    }  # fmt: skip
    print(row, flush=True)
    return row


def write_checkpoint(shape: Shape, model: Path, folder: Path) -> None:
    """The weights of the generated model as a transformers checkpoint, whose linear layers hold [out, in]."""
    from safetensors.numpy import save_file

    weights = {}
    for name, value in ir.load(model).graph.initializers.items():
        if not name.endswith(".weight") or value.const_value is None:
            continue
        array = value.const_value.numpy()
        turned = array.ndim == 2 and "embed_tokens" not in name
        weights[transformers_name(name)] = np.ascontiguousarray(array.T if turned else array)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": shape.hidden,
        "intermediate_size": shape.inner, "num_hidden_layers": shape.layers, "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads, "vocab_size": shape.vocabulary, "tie_word_embeddings": shape.tied,
        "rms_norm_eps": 1e-5, "max_position_embeddings": 2048, "torch_dtype": "float32",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    # llm-compressor wants a tokenizer in the folder, and uses none where it is given token ids.
    shutil.copy(ROOT / "models" / "demo" / "tokenizer.json", folder)


def transformers_name(name: str) -> str:
    *before, layer, weight = name.split(".")
    if not layer.endswith("_proj"):
        return name
    return ".".join([*before, "self_attn" if layer in ATTENTION else "mlp", layer, weight])


if __name__ == "__main__":
    main()
