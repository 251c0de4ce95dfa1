"""Targets of other packages: found by their entry points, read as the built-in ones, named where they are broken."""

from __future__ import annotations

import json
import sys
import types
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from typer.testing import CliRunner

from qcompiler import targets
from qcompiler.cli.app import app
from qcompiler.errors import TargetError
from qcompiler.targets import Target, target_names, usable_targets

TEXT = """name: theirs
title: Their runtime
description: It runs.
runtime: theirs 1.0
providers: [CPUExecutionProvider]
registry: {registry}
rules:
  - {{operator: MatMulInteger, kernel: a product, requires: unpadded-int8, otherwise: padded, source: read}}
"""


def point(name: str, value: str) -> EntryPoint:
    return EntryPoint(name=name, value=value, group=targets.GROUP)


def use(monkeypatch: pytest.MonkeyPatch, *points: EntryPoint) -> None:
    def entry_points(group: str) -> list[EntryPoint]:
        assert group == "qcompiler.targets"
        return list(points)

    monkeypatch.setattr(targets, "entry_points", entry_points)


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> types.ModuleType:
    """A module as a third party would ship it."""
    module = types.ModuleType("their_targets")
    file, other = tmp_path / "theirs.yaml", tmp_path / "odd.yaml"
    file.write_text(TEXT.format(registry="table.json"), encoding="utf-8")
    other.write_text("name: theirs\ntitle: [", encoding="utf-8")
    (tmp_path / "short.yaml").write_text("name: theirs\n", encoding="utf-8")
    (tmp_path / "unknown.yaml").write_text(
        TEXT.format(registry="table.json").replace("unpadded-int8", "unpadded-int7"), encoding="utf-8"
    )
    vars(module).update(
        PATH=file, TEXT=str(file), TARGET=Target.load("portable").model_copy(update={"name": "theirs"}),
        OTHER=Target.load("portable"), ABSENT=tmp_path / "absent.yaml", BROKEN=other, SHORT=tmp_path / "short.yaml",
        UNKNOWN=tmp_path / "unknown.yaml", NUMBER=5,
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "their_targets", module)
    return module


@pytest.mark.parametrize("value", ["PATH", "TEXT"])
def test_a_file_is_listed_and_loaded(
    monkeypatch: pytest.MonkeyPatch, plugin: types.ModuleType, value: str, tmp_path: Path
) -> None:
    use(monkeypatch, point("theirs", f"their_targets:{value}"))
    assert target_names()[-1] == "theirs"
    found = Target.load("theirs")
    assert found.title == "Their runtime"
    assert found.registry == str(tmp_path / "table.json"), "the table lies beside the file"
    assert found.rules[0].conditions == ("K is a multiple of 32", "N is a multiple of 32")
    assert Target.load("ort-cpu").name == "ort-cpu"


def test_an_object_is_loaded(monkeypatch: pytest.MonkeyPatch, plugin: types.ModuleType) -> None:
    use(monkeypatch, point("theirs", "their_targets:TARGET"))
    assert Target.load("theirs") is plugin.TARGET


def test_a_name_that_is_nowhere_is_told_with_the_closest(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, point("theirs", "their_targets:PATH"))
    with pytest.raises(TargetError, match="no target 'their'; did you mean 'theirs'"):
        Target.load("their")


@pytest.mark.usefixtures("plugin")
@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("no_such_module:X", r"'theirs' of plug-in 'no_such_module:X' cannot be imported: ModuleNotFoundError"),
        ("their_targets:NOTHING", "cannot be imported: AttributeError"),
        ("their_targets:NUMBER", "is neither a qcompiler.targets.Target nor the path of a YAML file"),
        ("their_targets:OTHER", "calls itself 'portable'; the names must agree"),
        ("their_targets:ABSENT", "there is no such file"),
        ("their_targets:BROKEN", "is no YAML"),
        ("their_targets:SHORT", "title: Field required"),
        ("their_targets:UNKNOWN", "no conditions 'unpadded-int7'; did you mean 'unpadded-int8'"),
    ],
)
def test_a_broken_plugin_harms_only_its_users(monkeypatch: pytest.MonkeyPatch, value: str, message: str) -> None:
    use(monkeypatch, point("theirs", value))
    assert target_names() == ["ort-cpu", "ort-cuda", "portable", "tensorrt", "theirs"]
    assert Target.load("tensorrt").name == "tensorrt"
    with pytest.raises(TargetError, match=message) as caught:
        Target.load("theirs")
    assert "\n" not in str(caught.value)
    usable, broken = usable_targets()
    assert [target.name for target in usable] == target_names()[:-1]
    assert broken == {"theirs": str(caught.value)}


def test_a_broken_plugin_is_listed_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, point("theirs", "no_such_module:X"))
    shown = CliRunner().invoke(app, ["targets", "--json"])
    assert shown.exit_code == 0
    found = json.loads(shown.stdout)
    assert "theirs" not in found["targets"]
    assert "ModuleNotFoundError" in found["broken"]["theirs"]
    assert "cannot be used" in CliRunner().invoke(app, ["targets"]).output


def test_name_clashes_are_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, point("ort-cpu", "their_targets:PATH"))
    with pytest.raises(TargetError, match=r"'ort-cpu' of .* has the same name as the built-in one; uninstall one"):
        target_names()
    use(monkeypatch, point("x", "a:A"), point("x", "b:B"))
    with pytest.raises(TargetError, match=r"'x' of .*'b:B' has the same name as that of .*'a:A'; uninstall one"):
        Target.load("x")
