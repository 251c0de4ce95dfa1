"""What lies beside a model: its tokenizer, the tokens that end a text, the longest text; and what goes along."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from qcompiler.errors import ModelError

WEIGHTS = frozenset({".onnx", ".onnx_data", ".data", ".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".lock"})
"""Of the model, or of the one that it was exported from; the output has its own."""
COMPANIONS = (
    "tokenizer*.json", "tokenizer.model", "*.tiktoken", "special_tokens_map.json", "added_tokens.json",
    "vocab*.json", "vocab*.txt", "merges.txt", "spiece.model", "sentencepiece*.model", "source.spm", "target.spm",
    "config.json", "*_config.json", "preprocessor_config.json", "chat_template.*", "audio_processor_config.json",
    "labels.txt", "labels.json", "LICENSE*", "NOTICE*", "README.md",
)  # fmt: skip
"""What belongs to a model and is no weight: these files go along to the output, and no others."""


@dataclass(frozen=True)
class Companions:
    """What the configuration files of a model's folder say; nothing where there are none."""

    stop: tuple[int, ...]
    """Ids of the tokens that end a text."""
    context: int | None
    """Tokens that the model can read at most, those it wrote included."""


def folder_of(model: str | Path) -> Path:
    path = Path(model)
    return path if path.is_dir() else path.parent


def tokenizer_beside(model: str | Path) -> Path | None:
    """The tokenizer that lies beside a model, as exporters and the compiler put it there."""
    file = folder_of(model) / "tokenizer.json"
    return file if file.is_file() else None


def companions_of(model: str | Path) -> Companions:
    """From genai_config.json, generation_config.json and config.json, the first that says. Raises ModelError."""
    folder = folder_of(model)
    genai = _read(folder / "genai_config.json").get("model")
    sources: list[Mapping[str, object]] = [genai if isinstance(genai, dict) else {}]
    sources += [_read(folder / name) for name in ("generation_config.json", "config.json")]
    ends = next((source["eos_token_id"] for source in sources if source.get("eos_token_id") is not None), ())
    names = ("context_length", "max_position_embeddings", "n_positions")
    values = [source.get(name) for source in sources for name in names]
    context = next((value for value in values if isinstance(value, int)), None)
    if context is not None and context < 1:
        raise ModelError(f"the configuration in {folder} gives {context} as the longest text; it must be 1 or more")
    stop = [ends] if isinstance(ends, int) else ends
    if not isinstance(stop, list | tuple) or not all(isinstance(token, int) for token in stop):
        raise ModelError(f"the configuration in {folder} gives eos_token_id as {ends!r}; it must be a token's number")
    return Companions(tuple(stop), context)


def _read(file: Path) -> Mapping[str, object]:
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{file} cannot be read ({error}); repair it, or take it away") from error
    if not isinstance(content, dict):
        raise ModelError(f"{file} holds no JSON object; repair it, or take it away")
    return content


def is_companion(name: str) -> bool:
    """Whether a file of this name goes along with a model."""
    return any(fnmatchcase(name, pattern) for pattern in COMPANIONS)


def companions_in(source: Path) -> tuple[list[Path], list[Path]]:
    """(what goes along with a model, what else lies at the top of its folder): models, weights and hidden files aside.

    What a link outside of the folder leads to is somebody else's, and stays.
    """
    taken: list[Path] = []
    left: list[Path] = []
    inside = source.resolve()
    try:
        files = sorted(source.iterdir())
    except OSError as error:
        raise ModelError(f"the folder {source} of the model cannot be read: {error.strerror or error}") from error
    for file in files:
        if file.name.startswith(".") or file.suffix in WEIGHTS:
            continue
        own = file.is_file() and file.resolve().is_relative_to(inside)
        (taken if is_companion(file.name) and own else left).append(file)
    return taken, left


def copy_companions(source: Path, folder: Path) -> None:
    for file in companions_in(source)[0]:
        _check_readable(file)
        shutil.copyfile(file, folder / file.name)


def check_companions(source: Path) -> None:
    """Raise ModelError where one of those that go along cannot be read."""
    for file in companions_in(source)[0]:
        _check_readable(file)


def _check_readable(file: Path) -> None:
    if not os.access(file, os.R_OK):
        raise ModelError(f"{file}, which goes along with the model, may not be read; change its permissions")
