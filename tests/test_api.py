"""The door: names that are kept, completion, help, and what a REPL shows of results."""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path

import pytest

import qcompiler
from qcompiler import api
from tests import tiny

MODEL = "g (float[M,16] x, float[16,16] W) => (float[M,16] y) { [fc] y = MatMul(x, W) }"


def compiled() -> qcompiler.Compiled:
    model = tiny.build(MODEL, W="normal")
    return qcompiler.compile(model, "int8-static", calibration=tiny.feeds(model))


def test_completion_knows_what_is_loaded_late() -> None:
    assert set(qcompiler.__all__) <= set(dir(qcompiler))


def test_all_names_of_the_api_are_there() -> None:
    assert len(set(api.__all__)) == len(api.__all__)
    for name in api.__all__:
        assert getattr(api, name).__doc__ or name in ("Kind", "OPTIONS"), name


def test_the_package_is_typed() -> None:
    assert (Path(qcompiler.__file__).parent / "py.typed").exists()


def test_help_tells_each_parameter() -> None:
    text = inspect.getdoc(qcompiler.compile) or ""
    told = {name for line in re.findall(r"^ {4}([a-z_, ]+):", text, re.MULTILINE) for name in line.split(", ")}
    assert set(inspect.signature(qcompiler.compile).parameters) <= told


@pytest.mark.parametrize("what", ["compiled", "report", "inspection", "recipe", "diff"])
def test_a_repr_is_a_few_lines(what: str) -> None:
    result, model = compiled(), tiny.build(MODEL, W="normal")
    shown = {
        "compiled": result, "report": result.report, "inspection": qcompiler.inspect(model, recipe="int8-static"),
        "recipe": result.recipe, "diff": qcompiler.diff(model, result.model),
    }[what]  # fmt: skip
    text = repr(shown)
    assert text.count("\n") <= 6
    assert len(text) < 500
    assert type(shown).__name__ in text


def test_a_repr_names_what_counts() -> None:
    text = repr(compiled())
    assert "1 quantized" in text
    assert "sqnr_db" in text
    assert repr(compiled().recipe) == "Recipe(int8-static for ort-cpu: quantize-weights, quantize-activations)"


def test_results_are_still_data() -> None:
    report = compiled().report
    assert dataclasses.asdict(report)["sites"][0]["name"] == "fc"
