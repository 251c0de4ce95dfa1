"""Every reason that a pass or a recogniser can give is the concern of some test: one names it in words of its own.

What stands in the sources is collected as text: what `Skipped` and `Unsupported` are made with, and what functions
return that give a result or a sentence. A test has seen a reason where one of its strings, or a golden case, holds a
piece of it that no other reason holds.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest

from tests.paths import ROOT

ROOMS = (
    "passes",
    "qcompiler/half",
    "qcompiler/lowering",
    "qcompiler/rewriting",
    "qcompiler/sites",
    "qcompiler/targets",
)
MAKERS = re.compile(r"Skipped|_?[Uu]nsupported|_RefusedError")
FUNCTIONS = re.compile(r"obstacle|refusal|refused|no_fold|why|reason|broken")
NAMES = re.compile(r"reason|refusal|obstacle|unknown|NO_ROOM|FLOAT_INPUT|FLOAT_AGAIN")
GAP = "\0"  # what is filled in when the reason is given
LEAST = 9  # characters of a piece


def with_gaps(text: ast.JoinedStr) -> str:
    return "".join(str(part.value) if isinstance(part, ast.Constant) else GAP for part in text.values)


def text_of(node: ast.expr) -> str:
    """A string or an f-string, with gaps; empty for what is none, and for a single word."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        text = node.value
    elif isinstance(node, ast.JoinedStr):
        text = with_gaps(node)
    else:
        return ""
    return text if " " in text.strip() else ""


def texts_of(node: ast.expr | None) -> Iterator[str]:
    """The texts that an expression can be."""
    if isinstance(node, ast.IfExp):
        yield from texts_of(node.body)
        yield from texts_of(node.orelse)
    elif isinstance(node, ast.BoolOp):
        for value in node.values:
            yield from texts_of(value)
    elif isinstance(node, ast.Tuple):
        for value in node.elts:
            yield from texts_of(value)
    elif node is not None and (text := text_of(node)):
        yield text


def gives_reasons(function: ast.FunctionDef) -> bool:
    """By its name, or as it answers with a sentence in the place of something else."""
    returns = "" if function.returns is None else ast.unparse(function.returns)
    return bool(re.search(r"\bstr \||\| str\b", returns) or (returns != "None" and FUNCTIONS.search(function.name)))


def reasons_in(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        found: list[ast.expr | None] = []
        if isinstance(node, ast.Call) and MAKERS.fullmatch(ast.unparse(node.func).rpartition(".")[2]):
            found += [*node.args, *(keyword.value for keyword in node.keywords)]
        elif isinstance(node, ast.Assign) and any(NAMES.fullmatch(ast.unparse(target)) for target in node.targets):
            found.append(node.value)
        elif isinstance(node, ast.FunctionDef) and gives_reasons(node):
            found += [item.value for item in ast.walk(node) if isinstance(item, ast.Return | ast.Yield)]
        for value in found:
            for text in texts_of(value):
                yield getattr(value, "lineno", 0), text


def all_reasons() -> dict[str, str]:
    """Where each stands, by text."""
    found: dict[str, str] = {}
    for room in ROOMS:
        for path in sorted((ROOT / room).rglob("*.py")):
            for line, text in reasons_in(ast.parse(path.read_text(encoding="utf-8"))):
                found.setdefault(text, f"{path.relative_to(ROOT)}:{line}")
    return found


def said_by_tests() -> set[str]:
    """The strings of all tests but docstrings and ONNX text, and the lines of golden cases."""
    found: set[str] = set()
    for path in (ROOT / "tests").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        prose = {id(item.value) for item in ast.walk(tree) if isinstance(item, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
                found.add(node.value.replace("\\", ""))  # of a pattern
            elif isinstance(node, ast.JoinedStr):
                found.add(with_gaps(node))
    for path in (ROOT / "tests" / "golden").rglob("*.txt"):
        found.update(path.read_text(encoding="utf-8").splitlines())
    return found


REASONS = all_reasons()
SAID = sorted(text for text in said_by_tests() if len(text) >= LEAST)
PIECES = {reason: [piece for piece in reason.split(GAP) if len(piece.strip()) >= LEAST] for reason in REASONS}
PATTERNS = {
    reason: re.compile(".+".join(map(re.escape, reason.split(GAP)))) for reason, pieces in PIECES.items() if pieces
}


def pieces_of(said: str) -> list[str]:
    """What a test's string has between the gaps of an f-string or a pattern."""
    return [part.strip() for part in re.split(r"\.\*|\0", said) if len(part.strip()) >= LEAST]


def are_told(said: str) -> list[str]:
    """The reasons that a test's string holds whole; else that which alone it is a piece of."""
    whole = [reason for reason, pattern in PATTERNS.items() if pattern.search(said)]
    if whole:
        return whole
    found = [[reason for reason, pieces in PIECES.items() if any(part in piece for piece in pieces)]
             for part in pieces_of(said)]  # fmt: skip
    return [reasons[0] for reasons in found if len(reasons) == 1]


TOLD = {reason for said in SAID for reason in are_told(said)}


def test_there_are_reasons() -> None:
    assert len(REASONS) > 100
    assert "its input is quantized already" in REASONS


@pytest.mark.parametrize("reason", [pytest.param(text, id=place) for text, place in REASONS.items() if PIECES[text]])
def test_a_test_gives_this_reason(reason: str) -> None:
    assert reason in TOLD, f"no test says enough of it to be sure: {reason.replace(GAP, '…')!r}"
