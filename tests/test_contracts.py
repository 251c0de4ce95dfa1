"""What holds for the whole: who imports whom, how files and passes are written."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from passes import PASSES
from qcompiler.recipes.registry import options_of, pass_class
from qcompiler.rewriting.contract import Kind
from tests.paths import GOLDEN, ROOT, TESTS

ENGINE, LIBRARY = ROOT / "qcompiler", ROOT / "passes"
SOURCES = sorted([*ENGINE.rglob("*.py"), *LIBRARY.rglob("*.py")])
HEAVY = {"torch", "onnxruntime", "matplotlib", "transformers", "tokenizers", "optimum"}
LONGEST = 400  # lines of a file


def imports(path: Path, *, at_top: bool) -> set[str]:
    """The modules that a file imports: all of them, or those that importing it imports."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found: set[str] = set()
    pending: list[ast.AST] = list(tree.body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            found.add(node.module or "")
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        elif (at_top and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)) or (
            at_top
            and isinstance(node, ast.If)
            and ("TYPE_CHECKING" in (text := ast.unparse(node.test)) or "__name__" in text)
        ):
            continue
        pending.extend(ast.iter_child_nodes(node))
    return found


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


# ----------------------------------------------------------------------------------------------------------- imports


def test_no_file_imports_a_pass() -> None:
    """Neither the engine nor another pass: only the registry loads the library, and by name."""
    found = {name(path): [m for m in imports(path, at_top=False) if m.split(".")[0] == "passes"] for path in SOURCES}
    assert {path: modules for path, modules in found.items() if modules} == {}


def test_heavy_libraries_are_imported_where_they_are_used() -> None:
    found = {name(path): {m.split(".")[0] for m in imports(path, at_top=True)} & HEAVY for path in SOURCES}
    assert {path: modules for path, modules in found.items() if modules} == {}


def test_importing_the_package_is_light() -> None:
    """In an interpreter of its own: neither the package nor its command line loads what only some commands need."""
    heavy = sorted(HEAVY | {"onnx_ir", "onnxscript"})
    code = f"import sys, qcompiler, qcompiler.cli.app; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


# ------------------------------------------------------------------------------------------------------------- files


def test_files_are_short() -> None:
    lengths = {name(path): len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES}
    assert {path: length for path, length in lengths.items() if length > LONGEST} == {}


def test_no_two_public_classes_share_a_name() -> None:
    places: dict[str, list[str]] = {}
    for path in SOURCES:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places.setdefault(node.name, []).append(name(path))
    assert {cls: paths for cls, paths in places.items() if len(paths) > 1} == {}


def test_no_folder_of_tests_is_a_package() -> None:
    """A tests/passes/__init__.py would shadow the pass library."""
    assert not list(TESTS.rglob("__init__.py"))


def test_every_pass_is_a_file_of_its_own() -> None:
    files = {path.stem for path in LIBRARY.glob("*.py")} - {"__init__"}
    modules = [place.partition(":")[0] for place in PASSES.values()]
    assert sorted(modules) == sorted(f"passes.{file}" for file in files)
    assert len(set(modules)) == len(modules)


# ------------------------------------------------------------------------------------------------------------ passes


@pytest.mark.parametrize("key", PASSES)
def test_a_pass_is_named_as_in_the_table(key: str) -> None:
    cls = pass_class(key)
    assert cls.name == key
    assert PASSES[key].partition(":")[0] == "passes." + key.replace("-", "_")
    assert cls.kind in get_args(Kind)


@pytest.mark.parametrize("key", PASSES)
def test_a_pass_has_a_manual_page(key: str) -> None:
    text = importlib.import_module(PASSES[key].partition(":")[0]).__doc__ or ""
    assert "**Before**" in text
    assert "**After**" in text
    assert "Skipped:" in text
    first = text.split("\n\n")[0]
    assert first.endswith(".")
    assert "\n" not in first, "the first sentence is what `qcompiler passes` shows"


@pytest.mark.parametrize("key", PASSES)
def test_options_are_frozen_documented_and_checked(key: str) -> None:
    cls = pass_class(key)
    for option in options_of(cls):
        assert option.help, f"{key}.{option.name} has no text below it"
        assert option.default != "required"
    step = cls()
    with pytest.raises(dataclasses.FrozenInstanceError):
        step.targets = ("*",)  # type: ignore[misc]
    with pytest.raises(ValueError, match="nonsense"):
        cls(nonsense=1)  # type: ignore[call-arg]


@pytest.mark.parametrize("key", PASSES)
def test_a_pass_has_golden_cases(key: str) -> None:
    assert len(list((GOLDEN / key).glob("*.txt"))) >= 3


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda path: path.stem)
def test_benchmarks_can_be_imported(path: Path) -> None:
    """No test runs them, and what they import moves."""
    importlib.import_module(f"benchmarks.{path.stem}")
