"""The documentation is true: pages of passes are fresh, commands parse, links lead somewhere, the example runs."""

from __future__ import annotations

import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from typer.testing import CliRunner

from qcompiler.cli.app import app
from qcompiler.recipes import Recipe, recipe_names, registry
from qcompiler.recipes.registry import options_of, pass_class
from qcompiler.targets import target_names
from tests.passes import test_golden
from tests.paths import ROOT

DOCS = ROOT / "docs"
TEXTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "passes/README.md", "models/README.md")),
    *sorted(DOCS.rglob("*.md")),
]
UsageError: Any = typer.BadParameter.__mro__[1]  # click's, which newer versions of typer bring along
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"^(?: {4}|\$ |> )?(qcompiler (?:\\\n|.)*)", re.MULTILINE)
FILE = re.compile(r"^<!-- file: (\S+) -->\n```\w+\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def test_the_pages_of_the_passes_are_fresh() -> None:
    stale = runpy.run_path(str(DOCS / "build.py"))["stale"]()
    assert not stale, f"run python docs/build.py, as these are not what the docstrings say: {stale}"


def test_the_tables_are_those_of_the_results() -> None:
    from benchmarks.tables import stale

    assert not stale(), f"run python benchmarks/tables.py, as these are not what benchmarks/results say: {stale()}"


# --- commands


def commands(text: str) -> list[str]:
    """Every `qcompiler …` that begins a line, as one line; in a table or a sentence, what is between backticks."""
    begun = [match.group(1).replace("\\\n", " ") for match in COMMAND.finditer(text)]
    return [*begun, *re.findall(r"`(qcompiler [^`\n]*)`", text)]


def words(command: str) -> list[str]:
    """What the shell would hand over, without …; a remark further on in the line is none of it."""
    said = re.split(r"\s#\s|\s>\s", command)[0]
    return [word for word in shlex.split(said)[1:] if word != "…"]


def parse(command: str) -> Any:
    """The context in which typer would run it. Raises UsageError where it would refuse."""
    arguments = words(command)
    root: Any = typer.main.get_command(app)
    if not arguments or arguments[0].startswith("-"):
        return None
    name = arguments[0]
    if name not in root.commands:
        raise UsageError(f"there is no command {name}")
    found = root.commands[name]
    if "…" not in command and len(arguments) > 1:
        return found.make_context(name, arguments[1:])
    known = {option for parameter in found.params for option in parameter.opts}
    for word in arguments[1:]:  # what is left out would be missed, so the options are all that can be checked
        if word.startswith("-") and word.split("=")[0] not in known:
            raise UsageError(f"No such option: {word}")
    return found.make_context(name, arguments[1:], resilient_parsing=True)


TRIED = [(path.relative_to(ROOT), command) for path in TEXTS for command in commands(path.read_text(encoding="utf-8"))]


@pytest.mark.parametrize(("path", "command"), TRIED, ids=[f"{path}: {command[:60]}" for path, command in TRIED])
def test_commands_parse(path: Path, command: str) -> None:
    try:
        context = parse(command)
    except UsageError as error:
        pytest.fail(f"{path}: {command}\n{error}")
    given = context.params if context is not None else {}
    recipe = given.get("recipe") or ""
    if recipe and recipe != "NAME" and not recipe.endswith(".yaml"):
        assert recipe in recipe_names()
    if given.get("target"):
        assert given["target"] in target_names()
    for setting in given.get("set_") or ():
        step, option = setting.split("=")[0].split(".")
        assert option in {found.name for found in options_of(pass_class(step))}


def test_a_command_that_has_rotted_is_seen() -> None:
    with pytest.raises(UsageError, match="No such option"):
        parse("qcompiler compile model.onnx --recipe w8 -o out --never-heard-of")
    with pytest.raises(UsageError, match="no command"):
        parse("qcompiler compress model.onnx")
    with pytest.raises(UsageError, match="Missing"):
        parse("qcompiler compile model.onnx --recipe w8")


def test_the_guide_uses_every_command() -> None:
    used = {words(command)[0] for command in commands((DOCS / "guide.md").read_text(encoding="utf-8"))}
    root: Any = typer.main.get_command(app)
    assert used >= set(root.commands)


def test_recipes_in_the_guide_are_recipes() -> None:
    blocks = [text for kind, text in FENCE.findall((DOCS / "guide.md").read_text(encoding="utf-8")) if kind == "yaml"]
    assert len(blocks) >= 3
    for text in blocks:
        named = text if text.startswith("name:") else f"name: shown\n{text}"
        for target in ("portable", "ort-cpu"):
            Recipe.from_dict(yaml.safe_load(named)).resolved(target)


# --- links


@pytest.mark.parametrize("path", TEXTS, ids=[str(path.relative_to(ROOT)) for path in TEXTS])
def test_links_lead_somewhere(path: Path) -> None:
    text = FENCE.sub("", path.read_text(encoding="utf-8"))
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not link.startswith(("http", "#"))]
    assert [link for link in links if not (path.parent / link.partition("#")[0]).exists()] == []


# --- the example of docs/writing-a-pass.md


def files(page: str) -> list[tuple[str, str]]:
    """The files that a page shows, by name."""
    return FILE.findall((DOCS / page).read_text(encoding="utf-8"))


def installed(page: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The page's files in a folder, as pip would install them: on the path, with the entry points in their metadata."""
    for name, content in files(page):
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content, encoding="utf-8")
    project: dict[str, Any] = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    name = str(project["name"])
    metadata = folder / f"{name.replace('-', '_')}-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    lines = [f"[{group}]\n" + "\n".join(f"{name} = {value}" for name, value in points.items())
             for group, points in project["entry-points"].items()]  # fmt: skip
    (metadata / "entry_points.txt").write_text("\n".join(lines) + "\n")
    monkeypatch.syspath_prepend(folder)
    return name


def run_tests(file: Path) -> None:
    found = [test for name, test in runpy.run_path(str(file)).items() if name.startswith("test_")]
    assert found
    for test in found:
        test()


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    installed("writing-a-pass.md", tmp_path, monkeypatch)
    yield tmp_path
    sys.modules.pop("round_gains", None)


def test_the_example_is_found_and_explained(example: Path) -> None:
    assert registry.pass_names()[-1] == "round-gains"
    assert registry.summary("round-gains").startswith("Rounds the gains")
    assert [option.help[:10] for option in options_of(pass_class("round-gains")) if option.name == "quiet"] == [
        "Round only"
    ]
    Recipe.load(example / "recipe.yaml").resolved("ort-cpu")
    shown = CliRunner().invoke(app, ["explain", "round-gains"])
    assert shown.exit_code == 0
    assert "Skipped: norms in 16 bits." in shown.output


def test_the_examples_numbers_are_right(example: Path) -> None:
    run_tests(example / "test_round_gains.py")


def test_the_examples_golden_case(example: Path, request: pytest.FixtureRequest) -> None:
    test_golden.test_golden(example / "golden" / "round-gains" / "shared-gain.txt", request)


def test_the_example_measures_and_skips(example: Path) -> None:
    import numpy as np

    from tests import tiny

    model = tiny.build(
        "g (float[5,8] x, float[8] g, float[8,4] W) => (float[5,4] y)"
        "{ n = LayerNormalization (x, g) y = MatMul (n, W) }",
        g="outliers", W="normal",
    )  # fmt: skip
    before = np.array(tiny.data(model, "g"))
    rounding: Any = pass_class("round-gains")
    for quiet, skipped in ((100, 0), (10, 1)):
        (changes,) = tiny.compile(model.clone(), [rounding(quiet=quiet)], tiny.feeds(model))
        assert len(changes.skipped) == skipped
        assert len(changes.changed) == 1 - skipped
    assert np.array_equal(before, tiny.data(model, "g"))


def test_the_example_is_clean(example: Path) -> None:
    for command in (
        ["check", "--config", str(ROOT / "pyproject.toml"), "--ignore", "I001"],
        ["format", "--check", "--line-length", "120"],
    ):
        done = subprocess.run([sys.executable, "-m", "ruff", *command, "round_gains.py", "test_round_gains.py"],
                              cwd=example, capture_output=True, text=True, check=False)  # fmt: skip
        assert done.returncode == 0, done.stdout


# --- the example of docs/adding-a-target.md


@pytest.fixture
def board(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    installed("adding-a-target.md", tmp_path, monkeypatch)
    yield tmp_path
    sys.modules.pop("board", None)


def test_the_example_of_a_target_is_found_and_shown(board: Path) -> None:
    assert target_names()[-1] == "board"
    shown = CliRunner().invoke(app, ["targets", "board"])
    assert shown.exit_code == 0
    assert "where N is a multiple of 64" in shown.output
    assert "the board's manual" in shown.output


def test_the_example_of_a_target_is_compiled_for(board: Path) -> None:
    run_tests(board / "test_board.py")


def test_the_example_of_a_target_is_clean(board: Path) -> None:
    for command in (["check", "--config", str(ROOT / "pyproject.toml"), "--ignore", "I001"],
                    ["format", "--check", "--line-length", "120"]):  # fmt: skip
        done = subprocess.run([sys.executable, "-m", "ruff", *command, "board", "test_board.py"], cwd=board,
                              capture_output=True, text=True, check=False)  # fmt: skip
        assert done.returncode == 0, done.stdout


# --- the example of docs/adding-a-number-format.md


@pytest.fixture(scope="module")
def patched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the code with the page's patch, and the page's test."""
    folder = tmp_path_factory.mktemp("fp6")
    for name in ("qcompiler", "passes"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name, content in files("adding-a-number-format.md"):
        (folder / name).write_text(content, encoding="utf-8")
    done = subprocess.run(["git", "apply", "fp6.patch"], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"the page's patch no longer fits the code: {done.stderr}"
    return folder


def test_the_example_of_a_number_format_rounds_and_is_told(patched: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_fp6.py"]
    done = subprocess.run(command, cwd=patched, capture_output=True, text=True, check=False,
                          env=os.environ | {"PYTHONPATH": str(patched)})  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert "5 passed" in done.stdout


def test_the_example_of_a_number_format_touches_few_files() -> None:
    """Beside them stand its test, the page of the pass and a line in the change log: six with both formats."""
    patch = dict(files("adding-a-number-format.md"))["fp6.patch"]
    assert len(re.findall(r"^\+\+\+ b/", patch, re.MULTILINE)) + len(["test", "page", "change log"]) <= 6


def test_the_example_of_a_number_format_is_clean(patched: Path) -> None:
    for command in (["check", "--config", str(ROOT / "pyproject.toml"), "--ignore", "I001"],
                    ["format", "--check", "--line-length", "120"]):  # fmt: skip
        done = subprocess.run([sys.executable, "-m", "ruff", *command, "test_fp6.py", "passes/nf4.py", *map(
            str, (patched / "qcompiler" / "formats").glob("*.py"))], cwd=patched, capture_output=True, text=True,
            check=False)  # fmt: skip
        assert done.returncode == 0, done.stdout
