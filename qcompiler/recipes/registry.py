"""Finds passes by name: the built-in table `passes.PASSES`, then plugins (entry points, group ``qcompiler.passes``).

Nothing is imported before it is asked for, so a broken plugin harms only those who use it.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib
import inspect
import json
import sys
import textwrap
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

from qcompiler.errors import RecipeError, closest
from qcompiler.rewriting.contract import Pass

GROUP = "qcompiler.passes"


@dataclass(frozen=True)
class Option:
    """One option of a pass, as its source declares it."""

    name: str
    type: str
    default: str
    """As YAML-like text; ``required`` where there is none."""
    help: str
    inherited: bool
    """True for the options that every pass has (`targets`, `ignore`)."""


def pass_names() -> list[str]:
    """Every pass that can be used: the built-in ones in the order of their table, then the plugins by name."""
    built_in = _built_in()
    return [*built_in, *sorted(_plugins(built_in))]


def pass_class(name: str) -> type[Pass]:
    """The class of a pass. Raises RecipeError where the name is unknown or its plugin cannot be loaded."""
    built_in = _built_in()
    if name in built_in:
        module, _, attribute = built_in[name].partition(":")
        found: type[Pass] = getattr(importlib.import_module(module), attribute)
        return found
    plugins = _plugins(built_in)
    if name in plugins:
        return _load(plugins[name])
    raise RecipeError(f"there is no pass {name!r}{closest(name, [*built_in, *plugins])}")


def users_own(path: str) -> object:
    """What `module:name` means, with the current folder on the import path. Raises what the import raises."""
    module, _, name = path.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    return getattr(importlib.import_module(module), name)


def manual(name: str) -> str:
    """The manual page of a pass: the docstring of its module."""
    return inspect.cleandoc(sys.modules[pass_class(name).__module__].__doc__ or "")


def summary(name: str) -> str:
    """The first paragraph of the manual page, on one line."""
    return " ".join(manual(name).split("\n\n")[0].split())


@functools.cache
def options_of(cls: type[Pass]) -> tuple[Option, ...]:
    """The options of a pass in the order of their declaration, its own before those that every pass has."""
    everyones = set(inspect.get_annotations(Pass))
    help_texts = _help_texts(cls)
    found = [
        Option(
            name=field.name,
            type=field.type if isinstance(field.type, str) else getattr(field.type, "__name__", str(field.type)),
            default=_default(field),
            help=help_texts.get(field.name, ""),
            inherited=field.name in everyones,
        )
        for field in dataclasses.fields(cls)
    ]
    return tuple(sorted(found, key=lambda option: option.inherited))


def _built_in() -> dict[str, str]:
    """The table of the pass library, checked: any folder called ``passes`` on the path could shadow it."""
    library = importlib.import_module("passes")
    where = Path(library.__file__).parent if library.__file__ else Path(next(iter(library.__path__)))
    expected = Path(__file__).parent.parent.parent / "passes"
    if not hasattr(library, "PASSES") or where.resolve() != expected.resolve():
        raise RecipeError(
            f"the folder {where} shadows qcompiler's pass library in {expected}; "
            "rename it, or take its parent off the path"
        )
    table: dict[str, str] = library.PASSES
    return table


def _plugins(built_in: dict[str, str]) -> dict[str, EntryPoint]:
    found: dict[str, EntryPoint] = {}
    for point in entry_points(group=GROUP):
        if point.name in built_in or point.name in found:
            other = f"that of {_source(found[point.name])}" if point.name in found else "the built-in one"
            raise RecipeError(
                f"the pass {point.name!r} of {_source(point)} has the same name as {other}; uninstall one"
            )
        found[point.name] = point
    return found


def _load(point: EntryPoint) -> type[Pass]:
    try:
        found = point.load()
    except (Exception, SystemExit) as error:
        raise RecipeError(
            f"the pass {point.name!r} of {_source(point)} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    if not (isinstance(found, type) and issubclass(found, Pass)):
        raise RecipeError(
            f"the pass {point.name!r} of {_source(point)} ({point.value}) is no subclass of qcompiler.Pass"
        )
    if getattr(found, "name", None) != point.name:
        raise RecipeError(
            f"the pass {point.name!r} of {_source(point)} calls itself {getattr(found, 'name', None)!r}; "
            "the names must agree"
        )
    return found


def _source(point: EntryPoint) -> str:
    """What a person can uninstall: the distribution of a plugin."""
    return f"package {point.dist.name!r}" if point.dist else f"plugin {point.value!r}"


def _default(field: dataclasses.Field[object]) -> str:
    value = field.default
    if hasattr(value, "get_default"):  # pydantic's Field(...) stands in for the default
        value = value.get_default(call_default_factory=True)
        if repr(value) == "PydanticUndefined":
            return "required"
    elif value is dataclasses.MISSING:
        if field.default_factory is dataclasses.MISSING:
            return "required"
        value = field.default_factory()
    return value if isinstance(value, str) else json.dumps(value, default=str)  # JSON is YAML, too


def _help_texts(cls: type) -> dict[str, str]:
    """The string literal below each field, from the source of the class and its bases; a subclass overrides."""
    texts: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        try:
            body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        except OSError:  # the class was made where there is no source file, so there are no texts either
            continue
        if isinstance(body, ast.ClassDef):
            texts.update(_texts_below_fields(body))
    return texts


def _texts_below_fields(body: ast.ClassDef) -> dict[str, str]:
    texts = {}
    for field, after in zip(body.body, body.body[1:], strict=False):
        if not (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)):
            continue
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) and isinstance(after.value.value, str):
            texts[field.target.id] = " ".join(after.value.value.split())
    return texts
