"""JSON that a person can read and that stays small: what fits on a line is on one."""

from __future__ import annotations

import json
from typing import Any

WIDTH = 160
INDENT = 1


def dumps(value: Any, depth: int = 0) -> str:
    """The JSON of plain data without infinite numbers. Lists and objects without others inside take one line each,
    whatever holds them a line for each entry."""
    inside = list(value.values()) if isinstance(value, dict) else value
    if not isinstance(inside, list | tuple) or not inside or _is_flat(inside):
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        if not isinstance(value, dict) or len(text) <= WIDTH:
            return text
    before, after = "\n" + " " * INDENT * (depth + 1), "\n" + " " * INDENT * depth
    if isinstance(value, dict):
        entries = [f"{json.dumps(key, ensure_ascii=False)}: {dumps(item, depth + 1)}" for key, item in value.items()]
        return "{" + before + ("," + before).join(entries) + after + "}"
    return "[" + before + ("," + before).join(dumps(item, depth + 1) for item in value) + after + "]"


def _is_flat(items: list[Any] | tuple[Any, ...]) -> bool:
    return not any(isinstance(item, dict | list | tuple) and item for item in items)
