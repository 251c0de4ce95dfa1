"""llm-compressor's quantization of a transformers checkpoint, as float weights; runs in an environment of its own.

    python llm_compressor.py CHECKPOINT CALIBRATION.npz JOBS.json OUT

CALIBRATION holds ``input_ids`` [samples, tokens]. JOBS is a list of objects with ``name``, ``method`` (rtn, gptq, awq,
awq-gptq), ``bits``, ``group``, ``symmetric``, and optionally ``actorder`` and ``observer`` in llm-compressor's own
words. Each job writes ``OUT/NAME.safetensors``: all weights of the model in float32 under their names in the
checkpoint, those of the linear layers after quantizing and dequantizing. What a job took goes to ``OUT/NAME.json``.

The lm_head and the embedding stay as they are. Nothing else differs from what llm-compressor does when left alone: the
pipeline, the damping and the block size are its defaults.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from compressed_tensors.quantization import (  # type: ignore[import-not-found]
    QuantizationArgs,
    QuantizationScheme,
    QuantizationStrategy,
    fake_quantize,
)
from datasets import Dataset  # type: ignore[import-not-found]
from llmcompressor import oneshot  # type: ignore[import-not-found]
from llmcompressor.modifiers.gptq import GPTQModifier  # type: ignore[import-not-found]
from llmcompressor.modifiers.quantization import QuantizationModifier  # type: ignore[import-not-found]
from llmcompressor.modifiers.transform.awq import AWQModifier  # type: ignore[import-not-found]
from safetensors.torch import save_file
from transformers import LlamaForCausalLM

PACKAGES = ("llmcompressor", "compressed-tensors", "torch", "transformers")


def modifiers(job: dict[str, Any]) -> list[Any]:
    """What llm-compressor calls a recipe."""
    weights = QuantizationArgs(
        num_bits=job["bits"], type="int", symmetric=job["symmetric"], strategy=QuantizationStrategy.GROUP,
        group_size=job["group"], dynamic=False, observer=job.get("observer"),
    )  # fmt: skip
    scheme = {"config_groups": {"all": QuantizationScheme(targets=["Linear"], weights=weights)}, "ignore": ["lm_head"]}
    found: list[Any] = [AWQModifier()] if job["method"].startswith("awq") else []
    if job["method"].endswith("gptq"):
        order = {"actorder": job["actorder"]} if "actorder" in job else {}
        return [*found, GPTQModifier(**scheme, **order)]
    return [*found, QuantizationModifier(**scheme)]


def quantized(module: Any) -> torch.Tensor:
    """The weight as the quantized layer multiplies by it."""
    weight: torch.Tensor = module.weight
    scheme = getattr(module, "quantization_scheme", None)
    if scheme is not None and scheme.weights is not None:
        weight = fake_quantize(weight, module.weight_scale, getattr(module, "weight_zero_point", None), scheme.weights)
    return weight


def allow_pinning() -> None:
    """AWQModifier asks for pinned memory, which torch refuses without an accelerator; no number depends on it."""
    if not torch.accelerator.is_available():
        torch.Tensor.pin_memory = lambda self, device=None: self  # type: ignore[method-assign,assignment,return-value]


def run(job: dict[str, Any], checkpoint: Path, data: Dataset, out: Path) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    start = time.perf_counter()
    oneshot(
        model=model, dataset=data, recipe=modifiers(job), num_calibration_samples=len(data),
        max_seq_length=len(data[0]["input_ids"]), shuffle_calibration_samples=False,
    )  # fmt: skip
    seconds = time.perf_counter() - start
    weights = {}
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(getattr(module, "weight", None), torch.nn.Parameter):
                weights[f"{name}.weight"] = quantized(module).detach().float().contiguous().clone()
    save_file(weights, out / f"{job['name']}.safetensors")
    layers = sum(getattr(module, "quantization_scheme", None) is not None for module in model.modules())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    facts = {"layers": layers, "seconds": round(seconds, 2), "peak_bytes": peak, "versions": versions}
    (out / f"{job['name']}.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("calibration", type=Path)
    parser.add_argument("jobs", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    allow_pinning()
    ids = np.load(arguments.calibration)["input_ids"]
    data = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": np.ones_like(ids).tolist()})
    for job in json.loads(arguments.jobs.read_text(encoding="utf-8")):
        run(job, arguments.checkpoint, data, arguments.out)


if __name__ == "__main__":
    main()
