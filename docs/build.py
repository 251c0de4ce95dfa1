"""Write the pages of the passes from their docstrings and options: `python docs/build.py`.

With `--check` it only says which are not up to date, exit code 1.
`docs/passes/<pass>.md` says what `qcompiler explain` prints; `docs/passes/README.md` lists the pages.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from passes import PASSES  # noqa: E402
from qcompiler.recipes import CONVERT, Recipe, recipe_names  # noqa: E402
from qcompiler.recipes.registry import manual, options_of, pass_class, summary  # noqa: E402
from qcompiler.targets import Target, target_names  # noqa: E402

FOLDER = ROOT / "docs" / "passes"
NOTE = "<!-- written by docs/build.py from {source}; change it there -->"
STARS = "    "  # the width of what is taken off Before and After, and so off the lines that go on below them
CONTINUED = STARS * 3


def pages() -> dict[str, str]:
    """Every page by its file name in docs/passes."""
    return {"README.md": index(), **{f"{name}.md": page(name) for name in PASSES}}


def index() -> str:
    rows = [(f"[{name}]({name}.md)", pass_class(name).kind, summary(name)) for name in PASSES]
    return "\n".join([
        NOTE.format(source="the docstrings of the passes"), "", "# Passes", "",
        "In the order in which a full recipe runs them. What the kinds mean, and how to add a pass, is in",
        "[writing a pass](../writing-a-pass.md).", "",
        *table(("pass", "kind", "what it does"), rows), "",
    ])  # fmt: skip


def page(name: str) -> str:
    cls = pass_class(name)
    source = f"passes/{PASSES[name].partition(':')[0].removeprefix('passes.')}.py"
    rows = [(f"`{option.name}`", f"`{option.default}`", f"`{option.type}`", option.help) for option in options_of(cls)]
    return "\n".join([
        NOTE.format(source=source), "", f"# {name}", "",
        f"A pass of the kind *{cls.kind}*, in [{source}](../../{source}). {users(name)}", "",
        markdown(manual(name)), "",
        "## Options", "",
        *table(("option", "default", "type", "what it means"), rows), "",
        "[All passes](README.md)", "",
    ])  # fmt: skip


def users(name: str) -> str:
    """Who runs the pass: recipes name it, or targets list it as lowering."""
    if recipes := [recipe for recipe, steps in recipes_and_passes() if name in steps]:
        return f"Built-in recipes with it: {', '.join(recipes)}."
    if targets := [target for target in target_names() if name in Target.load(target).lowering]:
        return f"Runs for the target{'s' * (len(targets) > 1)} {' and '.join(targets)}."
    if name == CONVERT:
        return "`qcompiler compile … --dtype fp16` adds it to any recipe."
    return "No built-in recipe has it; a recipe of your own can."


@cache
def recipes_and_passes() -> list[tuple[str, set[str]]]:
    return [(name, {step.name for step in Recipe.load(name).passes}) for name in recipe_names()]


def markdown(text: str) -> str:
    """A docstring as Markdown: what is aligned by spaces (algebra before and after) keeps its form as a code block."""
    return "\n\n".join(_paragraph(paragraph) for paragraph in text.split("\n\n"))


def _paragraph(text: str) -> str:
    if "**Before**" not in text:
        return text
    lines = re.sub(r"(?<=\S) +\*\*After\*\*", r"\n**After** ", text).splitlines()
    plain = [line.removeprefix(STARS) if line.startswith(CONTINUED) else line.replace("**", "") for line in lines]
    return "\n".join(["```text", *plain, "```"])


def table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    lines = [head, ("---",) * len(head), *(tuple(cell.replace("|", "\\|") for cell in row) for row in rows)]
    return ["| " + " | ".join(cells) + " |" for cells in lines]


def stale() -> list[str]:
    """The pages that are missing, not what the docstrings say, or of no pass."""
    wanted = pages()
    found = {path.name: path.read_text(encoding="utf-8") for path in FOLDER.glob("*.md")}
    return [name for name in sorted(wanted.keys() | found.keys()) if wanted.get(name) != found.get(name)]


def main() -> None:
    if "--check" in sys.argv:
        names = stale()
        sys.exit(f"run python docs/build.py, as these are not what the docstrings say: {names}" if names else 0)
    FOLDER.mkdir(exist_ok=True)
    wanted = pages()
    for file in FOLDER.glob("*.md"):
        if file.name not in wanted:
            file.unlink()
    for name, text in wanted.items():
        (FOLDER / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
