"""Four states: what is good, what is worth a look and why, what failed, and what nobody has checked."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import qcompiler
from qcompiler.formats.scheme import PerChannel, PerTensor, PerToken, Scheme
from qcompiler.recipes import Recipe
from qcompiler.report import Gate, Report, SiteReport
from qcompiler.report.html import card, page
from qcompiler.report.looks import LEAST_TOKENS, looks
from qcompiler.report.verdict import verdict
from qcompiler.rewriting.contract import CacheChange
from tests import tiny
from tests.report.test_report import example, printed

U8, PER_TOKEN = Scheme("uint8", PerTensor(), symmetric=False), Scheme("int8", PerToken(), dynamic=True)
W8, W4 = Scheme("int8", PerChannel()), Scheme("int4", PerChannel())
GOOD = {"kl": 0.01, "top1": 0.97, "perplexity_ratio": 1.01, "sqnr_db": 3.0}


def site(name: str = "a", **more: Any) -> SiteReport:
    plain = SiteReport(name, f"m.{name}", "MatMul", "quantized", weight=W8, activation=U8, sqnr_db=30.0)
    return replace(plain, **more)


def found(
    outputs: dict[str, dict[str, float]], sites: list[SiteReport] | None = None, passes: tuple[str, ...] = (),
    tokens: int | None = None, gates: dict[str, float] | None = None,
) -> list[str]:  # fmt: skip
    steps = list(passes) or ["quantize-weights", "quantize-activations"]
    recipe = Recipe.from_dict({"name": "r", "passes": steps, "gates": gates or {}})
    return looks(recipe, [site()] if sites is None else sites, [], outputs, tokens)


@pytest.mark.parametrize(
    ("measure", "good", "bad", "said"),
    [
        ("kl", 0.1, 0.11, "KL divergence 0.11, over 0.1"),
        ("perplexity_ratio", 1.05, 1.06, "perplexity ratio 1.0600, over 1.0500"),
        ("top1", 0.85, 0.84, "same top-1 84.0%, under 85.0%"),
        ("kl", 0.1, math.nan, "KL divergence nan, over 0.1"),
    ],
)
def test_logits_have_limits_of_their_own(measure: str, good: float, bad: float, said: str) -> None:
    assert found({"logits": GOOD | {measure: good}}) == []
    (sentence,) = found({"logits": GOOD | {measure: bad}, "hidden": {"sqnr_db": -5.0}})
    assert sentence.startswith(f"logits is far from the float model ({said}): ")


def test_other_outputs_and_their_layers_are_told_in_decibels() -> None:
    assert found({"y": {"sqnr_db": 20.0}}) == []
    (sentence,) = found({"y": {"sqnr_db": 19.9}, "z": {"sqnr_db": 40.0}})
    assert sentence.startswith("y is far from the float model (SQNR 19.9 dB, under 20.0 dB): ")
    poor = [site("a", sqnr_db=4.9), site("b", sqnr_db=-3.0), site("c", sqnr_db=5.0), site("d", sqnr_db=None)]
    (sentence,) = found({"y": {"sqnr_db": 30.0}}, poor)
    assert sentence.startswith("2 layers are under 5 dB, m.b at -3.0 dB: ")
    (sentence,) = found({"y": {"sqnr_db": 30.0}}, [site("a", sqnr_db=math.nan)])
    assert sentence.startswith("1 layer is under 5 dB, m.a at nan dB: ")
    assert found({"y": GOOD}, poor) == [], "the figures of tokens say more"


def test_a_gate_of_the_recipe_takes_the_place_of_the_limit() -> None:
    assert found({"logits": GOOD | {"kl": 0.3}}, gates={"kl": 0.4}) == []
    assert len(found({"logits": GOOD | {"kl": 0.3, "top1": 0.5}}, gates={"kl": 0.4})) == 1


CACHE = CacheChange("past", "present", "float32", "int4", 256, 40, Scheme("int4", PerToken(), dynamic=True))


@pytest.mark.parametrize(
    ("passes", "sites", "step"),
    [
        (("quantize-weights", "quantize-activations"), [site()], "smoothquant moves loud channels into the weights, "
         "llm-int8 keeps them in float; `qcompiler debug`"),
        (("smooth-quant", "quantize-weights", "quantize-activations"), [site()], "llm-int8 keeps loud channels in"),
        (("split-outliers", "quantize-weights", "quantize-activations"), [site()], "int8-weights leaves activations"),
        (("quantize-weights", "quantize-activations"), [site(activation=PER_TOKEN)], "int8-weights leaves activations"),
        (("quantize-weights", "quantize-activations"), [site(op="Conv")], "int8-weights leaves activations in float"),
        (("quantize-weights",), [site(activation=None, weight=W4)], "gptq-w4 rounds weights by what they do"),
        (("gptq",), [site(activation=None, weight=W4)], "w8 keeps 8 bits of each weight; `qcompiler debug`"),
        (("quantize-weights",), [site(activation=None)], "`qcompiler debug` names the layers that lose most"),
        (("quantize-kv-cache",), [site(activation=None, weight=None, cache=CACHE)], "kv-int8 keeps 8 bits in"),
    ],
)  # fmt: skip
def test_the_sentence_names_the_next_step(passes: tuple[str, ...], sites: list[SiteReport], step: str) -> None:
    (sentence,) = found({"logits": GOOD | {"kl": 1.0}}, sites, passes)
    assert sentence.split("): ")[1].startswith(step)
    assert "`qcompiler debug` names the layers that lose most" in sentence


def test_ranges_of_few_tokens_are_worth_a_look() -> None:
    (sentence,) = found({"logits": GOOD}, tokens=LEAST_TOKENS - 1)
    assert sentence.startswith("ranges were measured on 31 rows of data")
    assert found({"logits": GOOD}, tokens=LEAST_TOKENS) == found({"logits": GOOD}, tokens=None) == []
    assert found({"logits": GOOD}, [site(activation=PER_TOKEN)], tokens=1) == [], "scales are found at run time"


def linear(text: str = "y = MatMul (x, w)") -> ir.Model:
    return tiny.build(f"m (float[n, 8] x, float[8, 8] w) => (float[n, 8] y) {{ {text} }}", w="normal")


def data(rows: int, count: int = 6) -> list[dict[str, np.ndarray]]:
    return [{"x": np.random.default_rng(seed).normal(size=(rows, 8)).astype(np.float32)} for seed in range(count)]


def test_rows_are_those_of_the_data_that_was_measured() -> None:
    few = qcompiler.compile(linear(), "int8-static", calibration=data(6)).report  # 3 of 6 samples are held out
    assert any("measured on 18 rows" in sentence for sentence in few.looks)
    assert not qcompiler.compile(linear(), "int8-static", calibration=data(11)).report.looks


def test_nothing_quantized_and_nothing_smoothed_are_worth_a_look() -> None:
    idle = qcompiler.compile(linear(), "smoothquant", calibration=data(32)).report
    assert any(sentence.startswith("smooth-quant has changed no layer") for sentence in idle.looks)
    none = qcompiler.compile(linear("h = Transpose (w)  y = Add (x, x)"), "rtn-w4").report
    assert none.looks[0].startswith("nothing is quantized")
    assert (none.state, none.exit_code) == ("look", 0)


STATES = {
    "good": example(),
    "look": example(looks=["logits is far", "ranges were"]),
    "failed": example(looks=["logits is far"], gates=[Gate("kl", 0.001, 0.0021, False)]),
    "not checked": example(outputs={}, gates=[]),
}


@pytest.mark.parametrize("state", STATES)
def test_terminal_page_card_and_json_say_the_state(state: str) -> None:
    report = STATES[state]
    assert report.state == state == report.to_dict()["state"]
    assert Report.from_json(report.to_json()) == report
    assert report.exit_code == (1 if state == "failed" else 0)
    told = verdict(report)
    assert printed(report, 200).lstrip().startswith(f"{told.mark} smoothquant for ort-cpu")
    for html in (page(report), card(report)):
        assert f'class="verdict {told.mood}"' in html
        assert f"<strong>{told.word}:</strong>" in html
    for sentence in report.looks:
        assert sentence in printed(report, 200)
        assert sentence in page(report)
        assert sentence in repr(report)
    assert ("not compared with the float model" in printed(report, 200)) == (state == "not checked")


def test_a_loud_token_is_told() -> None:
    model = tiny.build(
        "m (float[n, 16] x, float[16, 16] w) => (float[n, 16] y) { h = MatMul (x, w)  y = Tanh (h) }",
        w=np.eye(16, dtype=np.float32),
    )
    samples = []
    for seed in range(4):
        x = np.random.default_rng(seed).normal(size=(64, 16)).astype(np.float32)
        x[0, 3] = 2920
        samples.append({"x": x})
    report = qcompiler.compile(model, "int8-static", calibration=samples).report
    assert any("one token of a sample makes most of what 1 layer put out (100 % at" in text for text in report.warnings)
    (layer,) = report.sites
    assert layer.sqnr_db is not None
    assert layer.total_sqnr_db is not None
    assert layer.sqnr_db < 5 < 35 < layer.total_sqnr_db
    assert report.state == "look"
