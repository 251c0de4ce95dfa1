"""The picture of the rooms is the contract that import-linter checks, and what is on disk."""

from __future__ import annotations

import re
import tomllib

from tests.paths import ROOT

TEXT = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
CONTRACTS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]["contracts"]
LAYERS = [
    [name.strip(" ()").removeprefix("qcompiler.") for name in layer.split("|")] for layer in CONTRACTS[0]["layers"]
]
TO_COME = {name.strip("() ").removeprefix("qcompiler.") for layer in CONTRACTS[0]["layers"]
           for name in layer.split("|") if "(" in name}  # fmt: skip


def drawn() -> list[list[str]]:
    table = TEXT.partition("<!-- rooms -->")[2].partition("<!-- /rooms -->")[0]
    return [re.findall(r"`(\w+)`", line.split("|")[1]) for line in table.strip().splitlines()[2:]]


def test_the_picture_is_the_contract() -> None:
    assert drawn() == LAYERS


def test_every_module_stands_in_a_room() -> None:
    found = {path.stem for path in (ROOT / "qcompiler").iterdir()
             if (path.is_dir() and list(path.glob("*.py"))) or path.suffix == ".py"}  # fmt: skip
    rooms = {name for layer in LAYERS for name in layer} - {"passes"} - TO_COME
    assert found - {"__init__", "__main__"} == rooms


def test_files_that_the_page_names_are_there() -> None:
    named = set(re.findall(r"`((?:qcompiler|passes|[a-z_]+)/[\w/]+\.py)`", TEXT))
    assert len(named) > 15
    assert not [name for name in named if not any((ROOT / place / name).exists() for place in ("", "qcompiler"))]


def test_tests_mirror_the_rooms() -> None:
    rooms = {name for layer in LAYERS for name in layer}
    folders = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir() and list(path.glob("test_*.py"))}
    assert folders - rooms == {"cuda_stub", "docs", "fuzz"}
