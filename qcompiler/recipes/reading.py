"""Reads the YAML of recipes and settings: each key once, and what PyYAML stumbles over told in a sentence."""

from __future__ import annotations

from typing import Any

import yaml

from qcompiler.errors import RecipeError

LARGEST = 1 << 63


def parse(text: str, where: str) -> Any:
    """The value that a YAML text holds. Raises RecipeError, which begins with `where`."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise RecipeError(f"{where} is not valid YAML{_place(error)}") from error
    except RecursionError as error:
        raise RecipeError(f"{where} is nested too deeply; a recipe needs a handful of levels") from error


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice, where YAML libraries silently take the last, or that is no word."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Dates, numbers and tags that cannot be: the constructors raise whatever Python does."""
        try:
            found = super().construct_object(node, deep=deep)
        except (ValueError, TypeError, AttributeError, KeyError, OverflowError) as error:
            shown = node.value if isinstance(node, yaml.ScalarNode) else node.tag
            kind = node.tag.rpartition(":")[2]
            raise yaml.constructor.ConstructorError(
                None, None, f"{shown[:40]!r} is no {kind} that there can be", node.start_mark
            ) from error
        if isinstance(found, int) and abs(found) >= LARGEST:
            problem = f"{node.value[:40]!r} is larger than any number of a recipe"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return found


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[str] = set()
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise yaml.constructor.ConstructorError(None, None, "a key is a word, no list or mapping", key.start_mark)
        if key.value in seen:
            raise yaml.constructor.ConstructorError(None, None, f"the key {key.value!r} occurs twice", key.start_mark)
        seen.add(key.value)
    return loader.construct_mapping(node, deep=True)


def _text(loader: _Loader, node: yaml.ScalarNode) -> str:
    """A lone surrogate can be written in YAML, but into no file."""
    try:
        node.value.encode()
    except UnicodeEncodeError as error:
        raise yaml.constructor.ConstructorError(
            None, None, "half a character (a lone surrogate) is no text", node.start_mark
        ) from error
    return str(node.value)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
_Loader.add_constructor("tag:yaml.org,2002:str", _text)


def _place(error: yaml.YAMLError) -> str:
    """Line, column and problem of a syntax error, as the tail of a sentence."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return f": {error}"
    mark = error.problem_mark
    return f" (line {mark.line + 1}, column {mark.column + 1}: {error.problem})"
