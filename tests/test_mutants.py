"""The faults that `make mutants` tries are those of the code as it is: each has its place and its tests."""

from __future__ import annotations

import ast

import pytest

from tests import mutants
from tests.paths import ROOT


@pytest.mark.parametrize("mutant", mutants.NAMED, ids=[mutant.name for mutant in mutants.NAMED])
def test_the_place_and_the_tests_are_there(mutant: mutants.Mutant) -> None:
    source = (ROOT / mutant.file).read_text(encoding="utf-8")
    assert source.count(mutant.old) == 1, f"its place in {mutant.file} has changed: change it in tests/mutants.py, too"
    ast.parse(source.replace(mutant.old, mutant.new))
    for test in mutant.tests:
        file, _, name = test.partition("::")
        assert f"def {name}" in (ROOT / file).read_text(encoding="utf-8")


def test_simple_mutants_are_one_change_of_one_place_each() -> None:
    drawn = mutants.drawn(30, seed=0)
    assert len({mutant.name for mutant in drawn}) == 30
    assert {mutant.file for mutant in drawn} == set(mutants.CORE)
    for mutant in drawn:
        source = (ROOT / mutant.file).read_text(encoding="utf-8")
        assert mutant.old == source != mutant.new
        changed = [a != b for a, b in zip(source.splitlines(), mutant.new.splitlines(), strict=False)]
        assert any(changed)
        ast.parse(mutant.new)
    assert [mutant.name for mutant in mutants.drawn(30, seed=0)] == [mutant.name for mutant in drawn]


@pytest.mark.parametrize(
    ("source", "drawn"),
    [
        ("def f(x: Literal[8]) -> Literal[4]: ...", []),
        ("json.dumps(x, indent=2)", []),
        ("warnings.warn(text, stacklevel=3)", []),
        ("_ROWS_AT_ONCE = 1 << 20", []),
        ("if x.size <= _ROWS_AT_ONCE:\n    y = 1", ["(1 + 1)"]),
        ("x.reshape(len(x), -1)", []),
        ("x.reshape(len(x), 1)", ["(1 + 1)"]),
        ("x.sum(-1)", ["(1 + 1)"]),
        ("LIMIT = 20", ["(20 + 1)"]),
        ("for row in range(0, n, ROWS_AT_ONCE): ...", ["(0 + 1)"]),
    ],
)
def test_what_no_test_can_see_is_not_drawn(source: str, drawn: list[str]) -> None:
    tree = ast.parse(source)
    unseen = mutants._unseen(tree)
    assert [text for node, text in mutants._changes(tree) if node not in unseen] == drawn
