"""What lies beside a language model: its tokenizer, the tokens that end a text, the longest text it can read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from qcompiler.errors import ModelError


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
    stop = [ends] if isinstance(ends, int) else ends
    if not isinstance(stop, list | tuple) or not all(isinstance(token, int) for token in stop):
        raise ModelError(f"the configuration in {folder} gives eos_token_id as {ends!r}; it must be a token's number")
    return Companions(tuple(stop), context)


def _read(file: Path) -> Mapping[str, object]:
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} cannot be read ({error}); repair it, or take it away") from error
    if not isinstance(content, dict):
        raise ModelError(f"{file} holds no JSON object; repair it, or take it away")
    return content
