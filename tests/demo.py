"""The demo model as its exporters wrote it, what our recipes make of it, and what its layers are called."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from models import export
from qcompiler.model_diff import Diff, LayerStory
from tests import compilations

DEMO = Path(export.CHECKPOINT)
LAYERS = 4
SHAPES = {
    "self_attn.q_proj": "256×256", "self_attn.k_proj": "256×64", "self_attn.v_proj": "256×64",
    "self_attn.o_proj": "256×256", "mlp.gate_proj": "256×512", "mlp.up_proj": "256×512", "mlp.down_proj": "512×256",
}  # fmt: skip
LINEARS = {f"model.layers.{n}.{name}": shape for n in range(LAYERS) for name, shape in SHAPES.items()}
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
WHOLE = {EMBEDDING: "3072×256", **LINEARS, HEAD: "256×3072"}


@cache
def variant(name: str) -> Path:
    try:
        return Path(export.model_path(name))
    except export.MissingEnvironmentError as error:
        pytest.skip(str(error))


@cache
def ids() -> np.ndarray:
    tokenizers = pytest.importorskip("tokenizers")
    coder = tokenizers.Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    return np.array(coder.encode((DEMO / "calibration.txt").read_text(encoding="utf-8")[:4000]).ids)


def windows(count: int = 2, length: int = 32) -> list[dict[str, np.ndarray]]:
    rows = [ids()[None, n * length : (n + 1) * length] for n in range(count)]
    return [{"input_ids": row, "attention_mask": np.ones_like(row)} for row in rows]


def compiled(recipe: str, target: str, name: str = "dynamo", *options: str) -> ir.Model:
    variant(name)  # skips where its exporter is missing
    return compilations.compiled(name, recipe, target, *options).model


def stories(found: Diff, kind: str = "") -> dict[str, LayerStory]:
    told = [story for story in found.layers if (story.kind == kind if kind else story.kind != "cache")]
    assert len({story.module_path for story in told}) == len(told)
    return {story.module_path: story for story in told}


def clause(story: LayerStory) -> str:
    """The story up to what is noted of scales and kernels."""
    return story.text.split("; ")[0]


class Reader:
    """What onnxruntime.quantization calibrates on."""

    def __init__(self) -> None:
        self._samples = iter(windows())

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._samples, None)
