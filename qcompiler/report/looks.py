"""What a person should look at before shipping a model that compiled without an error, each with the next step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qcompiler.formats.scheme import PerTensor
from qcompiler.recipes import Recipe
from qcompiler.recipes.gates import GATES
from qcompiler.report.report import SiteReport
from qcompiler.report.table import MEASURES, measured
from qcompiler.rewriting.contract import PassRun

LEAST_TOKENS = 32
"""Rows of data that a range should at least be measured on."""
LAYER_DB = 5.0
DEBUG = "`qcompiler debug` names the layers that lose most"


@dataclass(frozen=True)
class Limit:
    """Beyond it, a measure of an output is worth a look; a gate on the same measure takes its place."""

    measure: str
    value: float
    higher_is_better: bool

    def broken_by(self, value: float) -> bool:
        return math.isnan(value) or (value < self.value if self.higher_is_better else value > self.value)


TOKEN_LIMITS = (Limit("kl", 0.1, False), Limit("perplexity_ratio", 1.05, False), Limit("top1", 0.85, True))
"""Of outputs that are logits."""
OUTPUT_LIMITS = (Limit("sqnr_db", 20.0, True),)
"""Of models without logits."""


def looks(
    recipe: Recipe, sites: Sequence[SiteReport], runs: Sequence[PassRun],
    outputs: Mapping[str, Mapping[str, float]], tokens: int | None,
) -> list[str]:  # fmt: skip
    """A sentence each; `tokens` is how many rows of data ranges were measured on, None where that says nothing."""
    found = []
    next_step = _next_step(recipe, sites)
    kept = {GATES[name].metric for name in recipe.gates}
    logits = any("kl" in measures for measures in outputs.values())
    for output, measures in outputs.items():
        limits = TOKEN_LIMITS if "kl" in measures else () if logits else OUTPUT_LIMITS
        broken = [
            limit for limit in limits
            if limit.measure in measures and limit.measure not in kept and limit.broken_by(measures[limit.measure])
        ]  # fmt: skip
        if broken:
            found.append(f"{output} is far from the float model ({_told(broken, measures)}): {next_step}")
    if not logits and outputs:
        found += _poor_layers(sites, next_step)
    if any(run.step.kind == "rounding" for run in runs) and not any(site.status == "quantized" for site in sites):
        found.append("nothing is quantized: the report says why of each layer, and `qcompiler inspect` what can be")
    if _idle_smoothing(runs):
        found.append(
            "smooth-quant has changed no layer: set smooth-quant.insert_mul=true where no norm can take the factors, "
            "or take llm-int8, which keeps loud channels in float"
        )
    if tokens is not None and tokens < LEAST_TOKENS and any(_static(site) for site in sites):
        found.append(
            f"ranges were measured on {tokens} {'row' if tokens == 1 else 'rows'} of data, and the next may be outside "
            f"of them: give at least {LEAST_TOKENS}, some hundred better"
        )
    return found


def _told(broken: Sequence[Limit], measures: Mapping[str, float]) -> str:
    return ", ".join(
        f"{MEASURES[limit.measure][0]} {measured(limit.measure, measures[limit.measure])}, "
        f"{'under' if limit.higher_is_better else 'over'} {measured(limit.measure, limit.value)}"
        for limit in broken
    )


def _poor_layers(sites: Sequence[SiteReport], next_step: str) -> list[str]:
    poor = [site for site in sites if site.status == "quantized" and _level(site) < LAYER_DB]
    if not poor:
        return []
    worst = min(poor, key=_level)
    name, count = worst.module_path or worst.name, "1 layer is" if len(poor) == 1 else f"{len(poor)} layers are"
    return [f"{count} under {LAYER_DB:.0f} dB, {name} at {measured('sqnr_db', worst.sqnr_db or 0.0)}: {next_step}"]


def _level(site: SiteReport) -> float:
    level = site.sqnr_db if site.sqnr_db is not None else math.inf
    return -math.inf if math.isnan(level) else level


def _next_step(recipe: Recipe, sites: Sequence[SiteReport]) -> str:
    """Which recipe is the next to try, by what the sites are quantized to and what the recipe does already."""
    done = [site for site in sites if site.status == "quantized"]
    names = {step.name for step in recipe.passes}
    one_range = any(
        site.activation is not None and isinstance(site.activation.granularity, PerTensor) and site.op != "Conv"
        for site in done
    )
    bits = min((site.weight.number_format.bits for site in done if site.weight is not None), default=8)
    caches = [site.cache.scheme for site in done if site.cache is not None]
    cache_bits = [scheme.number_format.bits for scheme in caches if scheme is not None]
    if one_range and "smooth-quant" not in names and "split-outliers" not in names:
        return f"smoothquant moves loud channels into the weights, llm-int8 keeps them in float; {DEBUG}"
    if one_range and "split-outliers" not in names:
        return f"llm-int8 keeps loud channels in float; {DEBUG}"
    if cache_bits and min(cache_bits) < 8 and bits >= 8:
        return f"kv-int8 keeps 8 bits in the cache; {DEBUG}"
    if bits < 8 and "gptq" not in names:
        return f"gptq-w4 rounds weights by what they do to the outputs; {DEBUG}"
    if bits < 8:
        return f"w8 keeps 8 bits of each weight; {DEBUG}"
    if any(site.activation is not None for site in done):
        return f"int8-weights leaves activations in float; {DEBUG}"
    return DEBUG


def _idle_smoothing(runs: Sequence[PassRun]) -> bool:
    smoothing = [run for run in runs if run.step.name == "smooth-quant"]
    return bool(smoothing) and not any(run.changes.rescaled for run in smoothing)


def _static(site: SiteReport) -> bool:
    schemes = [site.activation, site.cache.scheme if site.cache is not None else None]
    return any(scheme is not None and not scheme.dynamic for scheme in schemes)
