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
from passes.hqq import Hqq
from passes.mixed_precision import MixedPrecision, assign
from passes.quantize_weights import QuantizeWeights
from qcompiler.errors import RecipeError, SchemeError
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
    least, most = int(costs[:, 0].sum()), int(costs[:, 2].sum())
    budget = float(generator.integers((least + most) // 2, most))  # room for more than the least, not for the most
    chosen = assign(costs, losses, budget)
    assert chosen is not None
    assert chosen != [0] * 5, "where there is room for more than the least, some row takes more"
    rows = np.arange(5)
    assert costs[rows, chosen].sum() <= budget
    best = min(
        losses[rows, columns].sum()
        for columns in itertools.product(range(3), repeat=5)
        if costs[rows, columns].sum() <= budget * (1 - 5 / 4096)  # what rounding the costs up may lose
    )
    assert losses[rows, chosen].sum() <= best + 1e-12


@pytest.mark.parametrize("over", [1e-6, 0.1, 0.9])
def test_costs_just_above_a_step_keep_the_budget(over: float) -> None:
    """Costs are counted in 4096ths of the budget: two of 2048 and a bit are too much, however small the bit."""
    costs = np.array([[1.0, 2048 + over], [1.0, 2048 + over]])
    chosen = assign(costs, np.array([[1.0, 0.0], [2.0, 0.0]]), 4096.0)
    assert chosen == [0, 1], "both together cost more than the budget; the second gains more"


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
    with pytest.raises(SchemeError, match="does not come in 5 bits; choose of 2, 3, 4, 8, 16"):
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


def rounded(bits: dict[str, int], model: ir.Model | None = None, **options: Any) -> dict[str, str]:
    """The numbers of each layer, or why it was skipped."""
    model = three() if model is None else model
    step = {"quantize-weights": {"granularity": "group", "group_size": 16, "bits": bits, **options}}
    recipe = Recipe.from_dict({"name": "rounded", "passes": [step]})
    sites = qcompiler.compile(model, recipe, target="portable").report.sites
    return {site.name: site.scheme.split()[0] if site.scheme else site.reason for site in sites}


def test_bits_of_single_layers_are_an_option() -> None:
    assert rounded({"b": 2}, format="uint4", symmetric=False) == {"a": "uint4", "b": "uint2", "c": "uint4"}


def test_bits_are_given_by_patterns_of_which_the_first_counts() -> None:
    assert rounded({"re:^[bc]$": 2, "c": 4}) == {"a": "int8", "b": "int2", "c": "int2"}
    assert rounded({"c": 4, "*": 2}) == {"a": "int2", "b": "int2", "c": "int4"}


def test_bits_of_a_layer_that_is_not_there_are_a_mistake() -> None:
    with pytest.raises(RecipeError, match="the pattern 'lm_head' matches no layer"):
        rounded({"lm_head": 8})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "int4", "bits": {"a": 5}}, r"bits: int4 does not come in 5 bits; choose of 2, 3, 4, 8, 16\."),
        ({"format": "fp8_e4m3", "bits": {"a": 4}}, r"bits: fp8_e4m3 does not come in 4 bits; only integers do\."),
    ],
)
def test_bits_without_a_format_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SchemeError, match=message):
        QuantizeWeights(**options)


def test_what_a_pass_cannot_round_to_are_no_bits_of_it() -> None:
    with pytest.raises(SchemeError, match=r"hqq\.bits: hqq\.format: uint16 has no grid to fit"):
        Hqq(bits={"a": 16})


def test_bits_are_said_to_the_pass_that_rounds() -> None:
    with pytest.raises(SchemeError, match="say them to the pass that rounds"):
        MixedPrecision(bits={"a": 8})


def tied() -> ir.Model:
    return tiny.build(
        """g (int64[B,S] ids, float[32,32] E) => (float[B,S,32] y) {
        [embed] e = Gather(E, ids)  T = Transpose<perm=[1,0]>(E)  [head] y = MatMul(e, T) }""",
        E="normal",
    )


def test_layers_that_share_a_constant_share_its_bits() -> None:
    assert rounded({"head": 8}, tied(), format="int4") == {"embed": "int8", "head": "int8"}
    refused = "Gather does not take int4 codes: choose int8 or uint8 for embeddings"
    assert rounded({"head": 4}, tied(), format="int8") == {"embed": refused, "head": "int4"}


def test_saturation_safe_convolutions_keep_bits_of_their_own() -> None:
    model = tiny.build(
        "g (float[1,4,9,9] x, float[4,4,3,3] A, float[4,4,3,3] B) => (float[1,4,5,5] y) "
        "{ [a] h = Conv(x, A)  [b] y = Conv(h, B) }",
        A="normal", B="normal",
    )  # fmt: skip
    found = rounded({"a": 4}, model, granularity="channel", group_size=None, saturation_safe=True)
    assert found == {"a": "int4", "b": "int8"}


def test_convolutions_and_embeddings_keep_the_bits_of_the_rounding_pass() -> None:
    model = tiny.build(
        """g (int64[B,S] ids, float[64,32] E, float[32,32] A) => (float[B,S,32] y) {
        [embed] e = Gather(E, ids)  [a] y = MatMul(e, A) }""",
        E="normal", A="normal",
    )  # fmt: skip
    decide = MixedPrecision(format="int8", granularity="channel", layers=("linear", "embedding"), budget=4.9)
    changes, after = tiny.compile(model, [decide, QuantizeWeights()], tiny.feeds(model))
    assert [(skipped.site, "keeps the bits" in skipped.reason) for skipped in changes.skipped] == [("embed", True)]
    assert changes.bits.keys() == {"a"}
    assert {changed.site: changed.scheme.split()[0] for changed in after.changed}["embed"] == "int8"
