"""Bits within a budget: the knapsack against all assignments, and what the rounding pass makes of it."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import qcompiler
from passes.gptq import Gptq
from passes.mixed_precision import MixedPrecision, assign
from passes.quantize_weights import QuantizeWeights
from qcompiler.errors import SchemeError
from qcompiler.recipes import Recipe
from tests import tiny

SCHEME: dict[str, Any] = {"format": "uint4", "group_size": 16, "symmetric": False}
THREE = """
    m (float[2, 32] x, float[32, 32] A, float[32, 32] B, float[32, 8] C) => (float[2, 8] y) {
        [a] h = MatMul (x, A)
        [b] g = MatMul (h, B)
        [c] y = MatMul (g, C)
    }
"""


def three() -> ir.Model:
    generator = np.random.default_rng(3)
    exact = generator.integers(0, 4, (32, 32)).astype(np.float32)  # two bits lose nothing of it
    exact[0::16], exact[1::16] = 0, 3
    return tiny.build(THREE, A=exact, B="normal", C="normal")


@pytest.mark.parametrize("seed", range(8))
def test_no_assignment_within_the_budget_is_better(seed: int) -> None:
    generator = np.random.default_rng(seed)
    costs = np.sort(generator.integers(1, 40, (5, 3)), axis=1) * 16.0
    losses = np.sort(generator.random((5, 3)), axis=1)[:, ::-1]
    budget = float(generator.integers(int(costs[:, 0].sum()), int(costs[:, 2].sum())))
    chosen = assign(costs, losses, budget)
    assert chosen is not None
    rows = np.arange(5)
    assert costs[rows, chosen].sum() <= budget
    best = min(
        losses[rows, columns].sum()
        for columns in itertools.product(range(3), repeat=5)
        if costs[rows, columns].sum() <= budget * (1 - 5 / 4096)  # what rounding the costs up may lose
    )
    assert losses[rows, chosen].sum() <= best + 1e-12


def test_nothing_fits() -> None:
    assert assign(np.array([[4.0, 8.0]]), np.array([[1.0, 0.0]]), 3.0) is None
    model = three()
    with pytest.raises(SchemeError, match=r"budget: 2 bits a weight are less than"):
        tiny.compile(model, [MixedPrecision(group_size=16, budget=2)], tiny.feeds(model))


@pytest.mark.parametrize("rounding", [QuantizeWeights(granularity="group", **SCHEME), Gptq(sequential=False, **SCHEME)])
def test_the_rounding_pass_obeys(rounding: QuantizeWeights | Gptq) -> None:
    model = three()
    decide = MixedPrecision(budget=7.5, **SCHEME)
    decided, rounded = tiny.compile(model, [decide, rounding], tiny.feeds(model))
    bits = {changed.site: int(changed.detail.split()[0]) for changed in decided.changed}
    assert bits["a"] == 2
    assert bits["b"] > 2
    stored = sum(
        (bits[site] + (32 + bits[site]) / 16) * size for site, size in {"a": 1024, "b": 1024, "c": 256}.items()
    )
    assert stored <= 7.5 * (1024 + 1024 + 256)
    schemes = {changed.site: changed.scheme for changed in rounded.changed}
    assert schemes == {site: f"uint{width} group(16) asymmetric" for site, width in bits.items()}


def test_the_function_stays() -> None:
    model = three()
    feeds = tiny.feeds(model)
    before = tiny.run(model, feeds[0])
    tiny.compile(model, [MixedPrecision(budget=8, group_size=16)], feeds)
    np.testing.assert_array_equal(tiny.run(model, feeds[0])[0], before[0])


def test_a_choice_without_a_format_is_refused() -> None:
    with pytest.raises(SchemeError, match="int5"):
        MixedPrecision(choices=(4, 5))


def test_a_choice_does_not_outlive_its_compilation(tmp_path: Path) -> None:
    """It travels in `Changes`: what the next recipe asks of the saved model holds."""
    samples = tiny.feeds(three())
    decide = {"mixed-precision": {"budget": 7.5, "choices": [2, 4, 8], "group_size": 16}}
    first = Recipe.from_dict({"name": "first", "passes": [decide]})
    chosen = qcompiler.compile(three(), first, target="portable", calibration=samples)
    chosen.save(tmp_path / "out")
    rounding = {"quantize-weights": {"granularity": "group", "group_size": 16}}
    second = Recipe.from_dict({"name": "second", "passes": [rounding]})
    again = qcompiler.compile(tmp_path / "out", second, target="portable", calibration=samples)
    assert {str(site.scheme) for site in again.report.sites} == {"int8 group(16) symmetric"}


def test_bits_of_single_layers_are_an_option() -> None:
    model = three()
    (changes,) = tiny.compile(model, [QuantizeWeights(granularity="group", bits={"b": 2}, **SCHEME)], tiny.feeds(model))
    assert {changed.site: str(changed.scheme).split()[0] for changed in changes.changed}["b"] == "uint2"
