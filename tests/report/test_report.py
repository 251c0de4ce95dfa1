"""The report: JSON there and back, gates, and a table that stays short and tells the worst first."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from itertools import product
from typing import Any

import onnx_ir as ir
import pytest
from rich.console import Console

import qcompiler
from qcompiler.formats.scheme import (
    PerBlock,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    Scheme,
    UnknownGranularity,
    in_words,
)
from qcompiler.recipes import Recipe
from qcompiler.report import Gate, PassReport, PassSkip, Report, SiteReport, Sizes, check_gates, render
from qcompiler.report.build import sizes
from qcompiler.report.facts import SiteFacts
from qcompiler.report.table import size
from qcompiler.rewriting.contract import CacheChange
from qcompiler.sites.kinds import Site
from tests import compilations, tiny
from tests.there import there


def example(layers: int = 3, **changes: object) -> Report:
    sites = [
        SiteReport(
            name=f"node_{index}_{kind}",
            module_path=f"model.layers.{index}.{kind}",
            block=f"model.layers.{index}",
            op="MatMul",
            status="quantized",
            scheme="uint8 per-channel symmetric",
            pass_name="quantize-weights",
            kernel="MatMulIntegerToFloat",
            sqnr_db=30.0 + index,
            details={"smooth-quant": "alpha 0.50"},
        )
        for index in range(layers)
        for kind in ("self_attn.q_proj", "mlp.down_proj")
    ]
    sites.append(SiteReport("head", "lm_head", "MatMul", "excluded", reason="the recipe leaves it out"))
    values: dict[str, Any] = {
        "recipe": "smoothquant",
        "target": "ort-cpu",
        "sites": sites,
        "sizes": Sizes(4_000_000, 1_100_000, 3_800_000, 960_000),
        "passes": [
            PassReport("smooth-quant", 0.5, 10**9, 4, (PassSkip("node_0_mlp.down_proj", "no norm writes its input"),))
        ],
        "outputs": {"logits": {"sqnr_db": 31.5, "kl": 0.0021, "top1": 0.987, "perplexity_ratio": 1.004}},
        "gates": [Gate("kl", 0.01, 0.0021, True)],
        "seconds": 12.0,
    }
    return Report(**{**values, **changes})


def printed(report: Report, width: int = 100) -> str:
    stream = io.StringIO()
    render(report, Console(file=stream, width=width, color_system=None))
    return stream.getvalue()


def test_json_round_trip() -> None:
    report = example()
    assert Report.from_json(report.to_json()) == report


def test_json_has_the_promised_keys() -> None:
    data = json.loads(example().to_json())
    promised = {"sites", "sizes", "outputs", "passes", "target", "versions", "hashes", "gates"}
    assert promised <= set(data)
    site = {"name", "module_path", "op", "status", "reason", "scheme", "pass", "kernel", "sqnr_db"}
    assert site <= set(data["sites"][0])
    assert data["exit_code"] == 0


def test_infinite_and_missing_numbers_survive_json() -> None:
    exact = [SiteReport("a", "a", "MatMul", "quantized", sqnr_db=math.inf), SiteReport("b", "b", "MatMul", "quantized")]
    report = example(sites=exact, outputs={"y": {"sqnr_db": math.inf}}, gates=[])
    assert "Infinity" not in report.to_json()
    again = Report.from_json(report.to_json())
    assert again.sites == exact
    assert again.outputs["y"]["sqnr_db"] == math.inf


@pytest.mark.parametrize(
    ("name", "limit", "values", "worst", "held"),
    [
        ("output_sqnr_db", 20.0, [{"sqnr_db": 30.0}, {"sqnr_db": 19.0}], 19.0, False),
        ("output_sqnr_db", 19.0, [{"sqnr_db": 30.0}, {"sqnr_db": 19.0}], 19.0, True),
        ("kl", 0.01, [{"kl": 0.002}, {"sqnr_db": 1.0}], 0.002, True),
        ("kl", 0.01, [{"kl": 0.02}, {"kl": 0.001}], 0.02, False),
        ("top1", 0.98, [{"top1": 0.97}], 0.97, False),
        ("perplexity_ratio", 1.01, [{"perplexity_ratio": 1.01}], 1.01, True),
        ("perplexity_ratio", 1.01, [], None, False),
    ],
)
def test_gates_take_the_worst_output(
    name: str, limit: float, values: list[Any], worst: float | None, held: bool
) -> None:
    outputs = {f"out{index}": measures for index, measures in enumerate(values)}
    assert check_gates({name: limit}, outputs) == [Gate(name, limit, worst, held)]


def test_nan_never_holds() -> None:
    for name, metric in (("kl", "kl"), ("output_sqnr_db", "sqnr_db")):
        for order in ([math.nan, 30.0], [30.0, math.nan]):
            outputs = {f"out{index}": {metric: value} for index, value in enumerate(order)}
            (gate,) = check_gates({name: 25.0}, outputs)
            assert not gate.held


def test_exit_code() -> None:
    assert example().exit_code == 0
    assert example(gates=[Gate("kl", 0.001, 0.0021, False)]).exit_code == 1
    skipped = [SiteReport("a", "a", "Conv", "skipped", reason="its groups differ")]
    assert example(sites=skipped).exit_code == 0
    assert example(sites=skipped, strict=True).failures == ["1 layer was skipped (--strict)"]


def test_the_verdict_comes_first() -> None:
    assert (
        printed(example())
        .splitlines()[0]
        .startswith("✓ smoothquant for ort-cpu, 12 s: 6 of 7 layers quantized (1 excluded)")
    )
    failed = printed(example(gates=[Gate("kl", 0.001, 0.0021, False)]), width=200).splitlines()[0]
    assert failed.startswith("✗ ")
    assert "kl 0.0021 is not ≤ 0.001 nats" in failed


def test_the_table_says_what_matters() -> None:
    text = printed(example())
    assert "4 MB → 1.1 MB (0.275 ×)" in text
    assert "self_attn.q_proj" in text
    assert "98.7%" in text
    assert "MatMulIntegerToFloat" in text
    assert "1 without smooth-quant: no norm writes its input [model.layers.0.mlp.down_proj]" in text
    worst = text[text.index("largest error") :]
    assert worst.index("30.0 dB") < worst.index("31.0 dB"), "the worst layer comes first"
    assert "✓ kl 0.0021 is ≤ 0.01 nats" in text


def test_the_table_stays_short_and_narrow() -> None:
    many = [
        SiteReport(
            f"n{i}", f"tower.{'very_long_name_' * 4}{i}[0]", "Conv", "skipped", reason=f"reason {i}", sqnr_db=1.0
        )
        for i in range(200)
    ]
    outputs = {f"out{i}": {"sqnr_db": 1.0} for i in range(50)}
    text = printed(example(sites=many, outputs=outputs, warnings=["a warning"] * 40))
    assert len(text.splitlines()) <= 45
    assert "… and 34 more in report.json" in text
    assert len(printed(example(layers=100)).splitlines()) <= 30
    assert all(len(line.rstrip()) <= 100 for line in text.splitlines()[1:])
    assert "… and 198 more reasons in report.json" in text


def test_warnings_are_whole_and_reasons_end_at_a_word() -> None:
    words = " ".join(f"word{i}" for i in range(60))
    long = SiteReport("a", "tower." * 30 + "q_proj", "Conv", "skipped", reason=words)
    text = " ".join(printed(example(sites=[long], warnings=[words])).split())
    warnings, reasons = text[text.index("warnings") :], text[text.index("left out") : text.index("warnings")]
    assert words in warnings
    assert "word20 … [" in reasons, "140 characters end in the next word"
    assert ".q_proj]" in reasons


def caches() -> list[SiteReport]:
    """Of a model whose caches were quantized, and nothing else."""
    change = CacheChange("past", "present", "float32", "int8", 256, 68)
    kinds = ["input", "q", "k", "v", "o", "gate", "up", "down"]
    sites = [
        SiteReport(f"{n}{kind}", f"layers.{n}.{kind}", "MatMul", "excluded", block=f"layers.{n}", sqnr_db=math.inf)
        for n in range(2) for kind in kinds
    ]  # fmt: skip
    return sites + [
        SiteReport(f"past.{n}.{role}", f"layers.{n}.attention.{role}_cache", f"{role} cache", "quantized",
                   block=f"layers.{n}", scheme="int8 per-token symmetric", sqnr_db=40.0 + n, cache=change)
        for n in range(2) for role in ("key", "value")
    ]  # fmt: skip


def test_caches_are_no_layers_and_have_rows_of_their_own() -> None:
    sites = [*caches(), SiteReport("head", "lm_head", "MatMul", "excluded", sqnr_db=math.inf)]
    outputs = {"logits": {"sqnr_db": math.inf}}
    text = printed(example(sites=sites, outputs=outputs, gates=[Gate("output_sqnr_db", 20.0, math.inf, True)]))
    assert "0 of 17 layers quantized (17 excluded), 4 of 4 caches" in text
    rows = [line.split() for line in text.splitlines()]
    assert ["attention.key_cache", "2", "·", "40.0", "dB", "·"] in rows
    assert ["down", "·", "2", "exact", "·"] in rows
    assert ["logits", "exact"] in rows
    assert "output_sqnr_db exact is ≥ 20 dB" in text
    assert "inf" not in text


def test_names_with_brackets_are_no_markup() -> None:
    sites = [SiteReport("a", "block[bold]0[/bold]", "MatMul", "skipped", reason="[red]because[/red]", sqnr_db=3.0)]
    text = printed(example(sites=sites))
    assert "block[bold]0[/bold]" in text
    assert "[red]because[/red]" in text


def test_bytes_of_what_was_quantized() -> None:
    """Masks that a pass took out, and what stayed as it was, have no part in them."""
    facts = [site_facts("a", "A", 400), site_facts("b", "B", 400)]
    before = {"A": 400, "B": 400, "mask": 5000, "gain": 8}
    after = {"A.codes": 100, "A.scale": 4, "B": 400, "gain": 8}
    reports = [SiteReport("a", "a", "MatMul", "quantized"), SiteReport("b", "b", "MatMul", "excluded")]
    assert sizes(facts, reports, before, after) == Sizes(5808, 512, 400, 104)
    assert sizes(facts, reports[1:], before, {"A": 400, "B": 400, "gain": 8, "angles": 64}) == Sizes(5808, 872, 0, 0)


def site_facts(name: str, constant: str, count: int) -> SiteFacts:
    site = Site(ir.node("MatMul", []), name, name, "")
    return SiteFacts(name, name, "", "MatMul", "", constant, count, "", site)


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (6_214_000, "6.21 MB"), (4e9, "4 GB")]
)
def test_sizes_for_people(count: float, text: str) -> None:
    assert size(count) == text


EMBEDDED = """block (int64[B,S] ids, float[16,128] E, float[128,128] W) => (float[B,S,128] y) {
    [embed] x = Gather (E, ids)
    [linear] y = MatMul (x, W)
}"""


def test_a_layer_that_lowering_makes_float_again_is_not_called_quantized() -> None:
    report = qcompiler.compile(tiny.build(EMBEDDED, E="normal", W="normal"), "rtn-w4", target="tensorrt").report
    embed, linear = report.sites
    assert (embed.status, embed.scheme, embed.pass_name) == ("skipped", "", "lower-tensorrt")
    assert "float again" in embed.reason
    assert linear.status == "quantized"
    assert report.sizes.quantized_float_bytes == 4 * 128 * 128, "what is float again has no quantized weight"
    assert "1 of 2 layers quantized (1 skipped)" in printed(report)


def test_a_recipe_that_quantizes_nothing_says_so() -> None:
    model = tiny.build(EMBEDDED, E="normal", W="normal")
    report = qcompiler.compile(model, "rtn-w4", exclude=["embed", "linear"]).report
    assert "nothing is quantized (2 of 2 layers: the recipe leaves it out)" in report.warnings
    report = qcompiler.compile(model, "rtn-w4", exclude=["embed"]).report
    assert not [text for text in report.warnings if "nothing" in text]


@pytest.mark.parametrize(("target", "warned"), [("portable", True), ("ort-cpu", False)])
def test_a_portable_model_with_an_operator_of_a_runtime_says_so(target: str, warned: bool) -> None:
    said = compilations.compiled("dynamo-past", "kv-int8-fused", target).report.warnings
    sentence = "the recipe brings GroupQueryAttention, which ONNX Runtime alone has: other runtimes cannot run it"
    assert (sentence in said) == warned


def test_two_exact_passes_in_a_row_leave_the_figures_of_layers_high() -> None:
    """Both divide what `up` gives: the report compares it as it was before both."""
    model = tiny.build(
        """g (float[B,S,8] x, float[B,S,8] g, float[8,8] U, float[8,6] D) => (float[B,S,6] y) {
        [up] u = MatMul (x, U)  p = Mul (g, u)  [down] y = MatMul (p, D) }""",
        U="normal", D="normal",
    )  # fmt: skip
    recipe = Recipe.from_dict({"name": "exact", "passes": [{"smooth-quant": {"alpha": 0.5}}, "awq"]})
    compiled = qcompiler.compile(model, recipe, target="portable", calibration=tiny.feeds(model, 6))
    assert [entry.changed for entry in compiled.report.passes] == [1, 1]
    assert all(there(site.sqnr_db) > 100 for site in compiled.report.sites)


def test_a_layer_whose_input_is_float_again_is_said_to_have_quantized_weights_alone() -> None:
    """Its codes are of uint4 in groups: the kernel for them reads a float activation."""
    model = tiny.build("g (float[M,32] x, float[32,16] W) => (float[M,16] y) { [fc] y = MatMul (x, W) }", W="normal")
    weights = {"quantize-weights": {"format": "uint4", "granularity": "group", "group_size": 16, "symmetric": False}}
    recipe = Recipe.from_dict({"name": "r", "passes": [weights, "quantize-activations"]})
    feeds = tiny.feeds(model, 4)
    portable, lowered = (
        qcompiler.compile(model, recipe, target=target, calibration=feeds).report.sites[0]
        for target in ("portable", "ort-cpu")
    )
    assert "activations" in portable.scheme
    assert (lowered.status, lowered.kernel) == ("quantized", "MatMulNBits")
    assert lowered.scheme == "uint4 group(16) asymmetric"


@pytest.mark.parametrize(("exclude", "status", "reason"), [
    ([], "skipped", "what it adds"), (["odd"], "excluded", "the recipe leaves it out"),
])  # fmt: skip
def test_what_cannot_be_quantized_is_excluded_where_nobody_asked_for_it(
    exclude: list[str], status: str, reason: str
) -> None:
    model = tiny.build(
        """g (float[M,8] x, float[8,8] W, float[8,4] V, float[M,4] c) => (float[M,4] y) {
        [fc] h = MatMul (x, W)  [odd] y = Gemm (h, V, c) }""",
        W="normal", V="normal",
    )  # fmt: skip
    report = qcompiler.compile(model, "int8-weights", target="portable", exclude=exclude).report
    (odd,) = (site for site in report.sites if site.name == "odd")
    assert odd.status == status
    assert reason in odd.reason


# ------------------------------------------------------------------------------------------------------ schemes as data


def test_schemes_of_every_kind_come_back_from_json() -> None:
    """As objects: granularities of one shape are told apart by their kind, scales of two levels keep both."""
    keys = Scheme("int4", PerToken(), symmetric=False, dynamic=True, normalized=True)
    weights: list[Scheme | None] = [
        Scheme("uint8", PerChannel(), positive=True), Scheme("int4", PerGroup(32), symmetric=False),
        Scheme("fp8_e4m3", PerBlock(128, 64)), Scheme("int8", UnknownGranularity(), symmetric=None), None,
        Scheme("fp4", PerGroup(32), scale_type="e8m0"),
        Scheme("nf4", PerGroup(64), scales=Scheme("int8", PerGroup(256))),
    ]  # fmt: skip
    activations = [Scheme("int8", PerToken(), dynamic=True), Scheme("uint8", PerTensor(), symmetric=False), None]
    sites = [
        SiteReport(f"l{n}", f"l{n}", "MatMul", "quantized", scheme=in_words(weight, activation), weight=weight,
                   activation=activation)
        for n, (weight, activation) in enumerate(product(weights, activations))
    ]  # fmt: skip
    change = CacheChange("past", "present", "float32", "uint8", 256, 36, keys)
    sites.append(SiteReport("past", "a.key_cache", "key cache", "quantized", scheme=str(keys), cache=change))
    report = example(sites=sites)
    again = Report.from_json(report.to_json())
    assert again.sites == sites
    assert again.to_json() == report.to_json()
    written = json.loads(report.to_json())["sites"]
    assert written[0]["scheme"] == "int8 per-channel symmetric, activations int8 per-token symmetric dynamic"
    assert (written[0]["weight"]["format"], written[0]["weight"]["granularity"]) == ("uint8", {"kind": "channel"})
    assert written[3]["weight"]["granularity"] == {"size": 32, "kind": "group"}
    assert written[-1]["cache"]["scheme"]["normalized"] is True


def test_a_report_of_before_schemes_were_data_is_read() -> None:
    change = CacheChange("past", "present", "float32", "int8", 256, 68, Scheme("int8", PerToken(), dynamic=True))
    sites = [SiteReport("l", "l", "MatMul", "quantized", scheme="int8 per-channel symmetric",
                        weight=Scheme("int8", PerChannel()), activation=Scheme("int8", PerTensor())),
             SiteReport("past", "a.key_cache", "key cache", "quantized", scheme="int8 per-token symmetric",
                        cache=change)]  # fmt: skip
    old = json.loads(example(sites=sites).to_json())
    for site in old["sites"]:
        del site["weight"], site["activation"]
    del old["sites"][1]["cache"]["scheme"]
    layer, cache = Report.from_json(json.dumps(old)).sites
    assert (layer.scheme, layer.weight, layer.activation) == ("int8 per-channel symmetric", None, None)
    assert cache.scheme == "int8 per-token symmetric"
    assert cache.is_cache
    assert cache.cache == replace(change, scheme=None)
    assert "1 of 1 layers quantized, 1 of 1 caches" in printed(Report.from_json(json.dumps(old)))
