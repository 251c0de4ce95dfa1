"""The registry: the built-in table, plugins, and the help texts that come from a pass's source."""

from __future__ import annotations

import sys
import types
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from qcompiler.errors import RecipeError
from qcompiler.recipes import registry
from qcompiler.recipes.registry import manual, options_of, pass_class, pass_names, summary
from qcompiler.rewriting.contract import Pass


def use_plugins(monkeypatch: pytest.MonkeyPatch, *points: EntryPoint) -> None:
    monkeypatch.setattr(registry, "entry_points", lambda group: list(points))


def point(name: str, value: str) -> EntryPoint:
    return EntryPoint(name=name, value=value, group=registry.GROUP)


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A module as a third party would ship it."""
    module = types.ModuleType("their_passes", "Does nothing, slowly.\n\nMore about it.")
    their_pass = type(
        "Theirs", (Pass,), {"name": "theirs", "kind": "exact", "apply": None, "__module__": "their_passes"}
    )
    vars(module).update(Theirs=their_pass, not_a_pass=dict, Renamed=type("Renamed", (their_pass,), {"name": "other"}))
    monkeypatch.setitem(sys.modules, "their_passes", module)
    return module


def test_every_built_in_pass_loads_under_its_own_name_and_is_explained() -> None:
    names = pass_names()
    assert names[:2] == ["smooth-quant", "awq"]  # the order of the table, exact passes first
    for name in names:
        cls = pass_class(name)
        assert issubclass(cls, Pass)
        assert cls.name == name
        assert len(summary(name)) > 20
        assert all(option.help for option in options_of(cls)), "every option has a text below it"
        assert cls() == cls(), "every option of a built-in pass has a default"


def test_options_come_from_the_source() -> None:
    options = {option.name: option for option in options_of(pass_class("quantize-weights"))}
    assert list(options)[-2:] == ["targets", "ignore"]
    assert options["format"].default == "int8"
    assert options["format"].type == "str"
    assert options["format"].help.startswith("Number format")
    assert options["group_size"].default == "null"
    assert options["symmetric"].default == "true"
    assert options["layers"].default == '["linear", "head", "convolution", "embedding"]'
    assert options["targets"].inherited
    assert not options["format"].inherited


def test_the_manual_is_the_docstring_of_the_module() -> None:
    assert "**Before**" in manual("smooth-quant")
    assert "\n" not in summary("smooth-quant")


def test_unknown_names_get_the_closest() -> None:
    with pytest.raises(RecipeError, match="no pass 'smoothquant'; did you mean 'smooth-quant'"):
        pass_class("smoothquant")
    with pytest.raises(RecipeError, match="such as smooth-quant, "):
        pass_class("zzz")


def test_a_plugin_is_listed_and_loaded(monkeypatch: pytest.MonkeyPatch, plugin: types.ModuleType) -> None:
    use_plugins(monkeypatch, point("theirs", "their_passes:Theirs"))
    assert pass_names()[-1] == "theirs"
    assert pass_class("theirs") is plugin.Theirs
    assert summary("theirs") == "Does nothing, slowly."


def test_a_broken_plugin_harms_only_its_users(monkeypatch: pytest.MonkeyPatch) -> None:
    use_plugins(monkeypatch, point("broken", "no_such_module_at_all:Pass"))
    assert "broken" in pass_names()
    assert pass_class("smooth-quant").name == "smooth-quant"
    with pytest.raises(
        RecipeError, match=r"'broken' of .*no_such_module_at_all.* cannot be imported: ModuleNotFoundError"
    ):
        pass_class("broken")


@pytest.mark.usefixtures("plugin")
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("theirs", "their_passes:not_a_pass", "no subclass of qcompiler.Pass"),
        ("theirs", "their_passes:Renamed", "calls itself 'other'"),
        ("theirs", "their_passes:Absent", "cannot be imported: AttributeError"),
    ],
)
def test_wrong_plugins(monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str) -> None:
    use_plugins(monkeypatch, point(name, value))
    with pytest.raises(RecipeError, match=message):
        pass_class(name)


def test_name_clashes_are_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    use_plugins(monkeypatch, point("smooth-quant", "their_passes:Theirs"))
    with pytest.raises(RecipeError, match=r"'smooth-quant' of .* has the same name as the built-in one"):
        pass_names()
    use_plugins(monkeypatch, point("x", "a:A"), point("x", "b:B"))
    with pytest.raises(RecipeError, match=r"'x' of .*'b:B' has the same name as that of .*'a:A'"):
        pass_class("x")


def test_a_folder_that_shadows_the_pass_library_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "passes").mkdir()
    monkeypatch.delitem(sys.modules, "passes")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "passes" / "__init__.py").write_text("PASSES = {}")
    with pytest.raises(RecipeError, match=f"the folder {tmp_path / 'passes'} shadows qcompiler's pass library"):
        pass_class("smooth-quant")


def test_a_shadowing_folder_without_init_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    shadow = types.ModuleType("passes")
    shadow.__path__ = ["/elsewhere/passes"]
    shadow.__file__ = None
    monkeypatch.setitem(sys.modules, "passes", shadow)
    with pytest.raises(RecipeError, match="the folder /elsewhere/passes shadows"):
        pass_names()
