"""Export the demo model in the shapes that users have, each made on demand by the exporter that writes it.

    python models/export.py                     what there is
    python models/export.py dynamo optimum      make these (or `all`), in models/.cache/VARIANT/
    python models/export.py all --out DIR       the same in DIR/VARIANT/

A variant is made again when the checkpoint, this file or a version of its exporter has changed. Every one also exists
as ``VARIANT-outliers``: the same function with planted activation outliers (see ``plant_outliers``).

From Python: ``model_path("dynamo-outliers")`` makes the variant if needed and returns the path of its ``model.onnx``.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

# torch, transformers and onnx are imported where they are used, so that asking for a variant already made is quick.
if TYPE_CHECKING:
    import torch

MODELS = Path(__file__).resolve().parent
CHECKPOINT = MODELS / "demo"
CACHE = MODELS / ".cache"
GENAI_REQUIREMENTS = MODELS / "requirements-genai.txt"
GENAI_ENVIRONMENT = CACHE / "venv-genai"

OUTLIERS = "-outliers"
OUTLIER_FACTOR, OUTLIER_CHANNELS = 50.0, 4
NORM_READERS = {  # the linear layers that read the output of each RMSNorm of a Llama layer
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}


class ExportError(RuntimeError):
    """An exporter failed; the message says which and ends with what it printed."""


class MissingEnvironmentError(ExportError):
    """The environment of onnxruntime-genai's builder could not be made."""


def plant_outliers(weights: dict[str, torch.Tensor], layers: int) -> None:
    """Give the layers' norms loud channels without changing the function: in place, on float32 weights.

    For every RMSNorm inside a layer, 4 channels (drawn with a fixed seed, anew for each norm) have their gain
    multiplied by 50, and the matching input columns of every weight that reads the norm are divided by 50. The product
    is the same; the activation between them gets outliers as those of far larger models have (Dettmers et al. 2022,
    "LLM.int8()").

    The final norm stays as it is: its only reader, the lm_head, is tied to the embedding, so dividing those columns
    would change the embedding as well.
    """
    import torch

    generator = torch.Generator().manual_seed(0)
    for layer in range(layers):
        for norm, readers in NORM_READERS.items():
            gain = weights[f"model.layers.{layer}.{norm}.weight"]
            channels = torch.randperm(len(gain), generator=generator)[:OUTLIER_CHANNELS]
            gain[channels] *= OUTLIER_FACTOR
            for reader in readers:
                weights[f"model.layers.{layer}.{reader}.weight"][:, channels] /= OUTLIER_FACTOR


def write_source(folder: Path, outliers: bool) -> None:
    """The checkpoint as a transformers model folder in float32, which every exporter reads."""
    import torch
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    model = LlamaForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32)
    if outliers:
        plant_outliers(model.state_dict(), model.config.num_hidden_layers)
    model.save_pretrained(folder)
    end = "<|endoftext|>"
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(CHECKPOINT / "tokenizer.json"), bos_token=end, eos_token=end)
    tokenizer.save_pretrained(folder)


def export_torch(model: torch.nn.Module, inputs: dict[str, Any], out: Path, opset: int, **options: Any) -> None:
    import torch

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns of each torchvision operator that is not there
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model.eval(), (), out / "model.onnx", kwargs=inputs, dynamo=True, opset_version=opset, verbose=False,
            **options,
        )  # fmt: skip


def export_without_cache(
    source: Path,
    out: Path,
    opset: int = 21,
    half: bool = False,
    inputs: tuple[str, ...] = ("input_ids", "attention_mask"),
) -> None:
    import torch
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(source, dtype=torch.float16 if half else torch.float32)
    model.config.use_cache = False
    export_torch(
        model, {name: torch.ones(2, 5, dtype=torch.int64) for name in inputs}, out, opset,
        input_names=list(inputs), output_names=["logits"],
        dynamic_shapes={name: {0: "batch", 1: "sequence"} for name in inputs},
    )  # fmt: skip


def export_dynamo(source: Path, out: Path) -> None:
    """torch.onnx without a cache: input_ids, attention_mask [batch, sequence] → logits."""
    export_without_cache(source, out)


def export_dynamo_past(source: Path, out: Path) -> None:
    """torch.onnx with a cache: past_key_values.N.key/value [batch, kv heads, past, head size] → present.N.key/value."""
    import torch
    from transformers import DynamicCache, LlamaForCausalLM
    from transformers.cache_utils import DynamicLayer

    class WithPast(LlamaForCausalLM):  # type: ignore[misc]
        # A subclass, not a wrapper around the model: module paths in the graph stay those of the model.
        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, past_key_values: Any) -> Any:
            cache = DynamicCache()
            for key, value in past_key_values:
                # Filled by hand: the empty constant that it would start from breaks torch.export (torch 2.13).
                layer = DynamicLayer()
                layer.keys, layer.values, layer.dtype, layer.device = key, value, key.dtype, key.device
                layer.is_initialized = True
                cache.layers.append(layer)
            output = super().forward(
                input_ids=input_ids, attention_mask=attention_mask, past_key_values=cache, use_cache=True
            )
            return output.logits, [(layer.keys, layer.values) for layer in output.past_key_values.layers]

    model = WithPast.from_pretrained(source, dtype=torch.float32)
    layers = model.config.num_hidden_layers
    shape = (2, model.config.num_key_value_heads, 3, model.config.head_dim)
    past = [(torch.zeros(shape), torch.zeros(shape)) for _ in range(layers)]
    names = [f"{index}.{part}" for index in range(layers) for part in ("key", "value")]
    axes = {0: "batch", 2: "past_sequence"}
    inputs = {
        "input_ids": torch.ones(2, 5, dtype=torch.int64),
        "attention_mask": torch.ones(2, 8, dtype=torch.int64),
        "past_key_values": past,
    }
    export_torch(
        model, inputs, out, 21,
        input_names=["input_ids", "attention_mask", *(f"past_key_values.{name}" for name in names)],
        output_names=["logits", *(f"present.{name}" for name in names)],
        dynamic_shapes={
            "input_ids": {0: "batch", 1: "sequence"},
            "attention_mask": {0: "batch", 1: "total_sequence"},
            "past_key_values": [(axes, axes)] * layers,
        },
    )  # fmt: skip


def export_opset23(source: Path, out: Path) -> None:
    """At opset 23, which has operators for attention, RMSNorm and rotary embedding.

    With position_ids as an input: from positions that the model makes itself, [1, sequence], the exporter writes
    RotaryEmbedding nodes that ONNX Runtime refuses for more than one row.
    """
    export_without_cache(source, out, opset=23, inputs=("input_ids", "attention_mask", "position_ids"))


def export_fp16(source: Path, out: Path) -> None:
    """As `dynamo` from the model in half precision, in which transformers' norms compute in float32."""
    export_without_cache(source, out, half=True)


def export_optimum(source: Path, out: Path) -> None:
    """optimum-onnx's text-generation-with-past."""
    command = [sys.executable, "-m", "optimum.exporters.onnx", "--task", "text-generation-with-past"]
    run([*command, "--model", str(source), str(out)], "optimum-onnx")


def export_genai(source: Path, out: Path) -> None:
    """onnxruntime-genai's builder for the CPU in float32, in an environment of its own."""
    builder = [str(genai_python()), "-m", "onnxruntime_genai.models.builder", "-p", "fp32", "-e", "cpu"]
    run([*builder, "-i", str(source), "-o", str(out)], "onnxruntime-genai's builder")


@dataclass(frozen=True)
class Variant:
    about: str
    packages: tuple[str, ...]  # whose versions decide what is written
    export: Callable[[Path, Path], None]  # (transformers model folder, folder to fill)


TORCH = ("torch", "transformers", "onnxscript")
OPTIMUM = ("torch", "transformers", "optimum-onnx")
VARIANTS = {
    "dynamo": Variant("torch.onnx (dynamo), opset 21, no cache", TORCH, export_dynamo),
    "dynamo-past": Variant("torch.onnx (dynamo), opset 21, with a cache", TORCH, export_dynamo_past),
    "opset23": Variant("torch.onnx (dynamo), opset 23, no cache", TORCH, export_opset23),
    "optimum": Variant("optimum-onnx, text-generation-with-past", OPTIMUM, export_optimum),
    "genai": Variant("onnxruntime-genai's builder, float32 for the CPU", ("transformers",), export_genai),
    "fp16": Variant("torch.onnx (dynamo), opset 21, no cache, half precision", TORCH, export_fp16),
}
NAMES = [name + suffix for suffix in ("", OUTLIERS) for name in VARIANTS]


def run(command: list[str], what: str) -> None:
    done = subprocess.run(
        command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    if done.returncode != 0:
        raise ExportError(f"{what} failed with exit code {done.returncode}: …{done.stdout[-2000:].strip()}")


def genai_python() -> Path:
    """The interpreter of the environment of onnxruntime-genai's builder, which is made when missing (over 1 GB)."""
    complete = GENAI_ENVIRONMENT / "complete"
    python = GENAI_ENVIRONMENT / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    requirements = GENAI_REQUIREMENTS.read_text(encoding="utf-8")
    with locked("venv-genai", CACHE):
        if complete.exists() and complete.read_text(encoding="utf-8") == requirements:
            return python
        try:
            run([sys.executable, "-m", "venv", "--clear", str(GENAI_ENVIRONMENT)], "venv")
            run([str(python), "-m", "pip", "install", "-r", str(GENAI_REQUIREMENTS)], "pip install")
        except ExportError as error:
            raise MissingEnvironmentError(
                f"the environment of onnxruntime-genai's builder cannot be made: {error}"
            ) from error
        complete.write_text(requirements, encoding="utf-8")
    return python


def locked(name: str, folder: Path) -> Any:
    """A lock between processes, so that tests that run in parallel make a variant once."""
    from filelock import FileLock

    folder.mkdir(parents=True, exist_ok=True)
    return FileLock(folder / f"{name}.lock")


def key_of(variant: Variant) -> str:
    """Changes whenever what would be written might."""
    digest = hashlib.sha256()
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        digest.update(hashlib.sha256((CHECKPOINT / name).read_bytes()).digest())
    digest.update(hashlib.sha256(Path(__file__).read_bytes()).digest())
    digest.update(GENAI_REQUIREMENTS.read_bytes() if variant is VARIANTS["genai"] else b"")
    digest.update(json.dumps([importlib.metadata.version(package) for package in variant.packages]).encode())
    return digest.hexdigest()


def node_count(model: Path) -> int:
    import onnx

    return len(onnx.load(model, load_external_data=False).graph.node)


def model_path(name: str, out: Path = CACHE) -> Path:
    """Path of ``out/name/model.onnx``; the folder is made if it is missing or out of date, whole or not at all."""
    if name not in NAMES:
        raise ValueError(f"there is no variant {name!r} of the demo model; there are: {', '.join(NAMES)}")
    variant = VARIANTS[name.removesuffix(OUTLIERS)]
    folder, stamp, key = out / name, out / f"{name}.key", key_of(variant)
    with locked(name, out):
        if stamp.exists() and stamp.read_text(encoding="utf-8") == key and (folder / "model.onnx").exists():
            return folder / "model.onnx"
        with tempfile.TemporaryDirectory(prefix=f"{name}.", dir=out) as work:
            source, made = Path(work, "source"), Path(work, "made")
            made.mkdir()
            write_source(source, name.endswith(OUTLIERS))
            variant.export(source, made)
            shutil.copyfile(CHECKPOINT / "tokenizer.json", made / "tokenizer.json")
            stamp.unlink(missing_ok=True)
            if folder.exists():
                folder.rename(Path(work, "old"))
            made.rename(folder)
            stamp.write_text(key, encoding="utf-8")
    return folder / "model.onnx"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="*", metavar="VARIANT", help="names, or `all`; without any, list them")
    parser.add_argument("--out", type=Path, default=CACHE, help="where the folders go (default: models/.cache)")
    arguments = parser.parse_args()
    if not arguments.variants:
        print("\n".join(f"{name:12} {variant.about}" for name, variant in VARIANTS.items()))
        print(f"Each also as VARIANT{OUTLIERS}: the same function with planted activation outliers.")
        return 0
    for name in NAMES if "all" in arguments.variants else arguments.variants:
        start = time.monotonic()
        try:
            path = model_path(name, arguments.out)
        except (ExportError, ValueError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        print(f"{path}  {node_count(path)} nodes, {time.monotonic() - start:.1f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
