"""What a person should know of a compilation beyond its figures, a sentence each: the warnings of the report."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

from qcompiler.evaluation.compare import Comparison
from qcompiler.functions.binary import FORMAT as BINARY
from qcompiler.placement import Placement
from qcompiler.recipes import CONVERT, Recipe
from qcompiler.report.facts import SiteFacts
from qcompiler.report.report import SiteReport
from qcompiler.rewriting.contract import PassRun
from qcompiler.targets import Target

LIKE_DB = 1.0
AS_GOOD_AS_EXACT_DB = 60.0
"""Where an optimizer that sums up in another order shows."""

MANY_ROWS, MOST = 8, 0.5
"""Of so many rows one is expected to have less than this share of the energy."""


def warnings(
    facts: Sequence[SiteFacts], recipe: Recipe, target: Target, sites: Sequence[SiteReport], runs: Sequence[PassRun],
    comparison: Comparison | None, placement: Placement | None,
) -> list[str]:  # fmt: skip
    """All but those of speed (`with_speed`); `sites` as they are before their kernels' conditions are added."""
    found = placement.warnings if placement is not None else []
    found = found + comparison_warnings(comparison) + loud_token_warnings(facts, comparison)
    outputs = {name: item.to_dict() for name, item in comparison.outputs.items()} if comparison is not None else {}
    found += binary_warnings(sites, outputs) + range_warnings(recipe) + float_input_warnings(target, sites, runs)
    found += runtime_warnings(target, runs)
    if not sites:
        return [
            *found,
            "the model has no layer that could be quantized: linear, convolution or embedding with constants",
        ]
    return found + (nothing_warnings(sites, runs) or idle_warnings(runs))


def comparison_warnings(comparison: Comparison | None) -> list[str]:
    """What was not compared with the float model, or in another form than that which was written."""
    if comparison is None:
        return ["not compared with the float model, which takes data with at least two samples"]
    found = []
    if comparison.reshaped:
        first, rest = comparison.reshaped[0], len(comparison.reshaped) - 1
        more = f" and {rest} more" if rest else ""
        found.append(f"not compared with the float model: {first}{more}, whose shape quantization changes")
    for name in optimizer_changes(comparison):
        runs, plain = comparison.outputs[name].sqnr_db, comparison.unoptimized[name].sqnr_db
        found.append(
            f"ONNX Runtime's optimizer changes what the model computes: {name} is {runs:.1f} dB from the float model "
            f"as it runs, and {plain:.1f} dB without the optimizer"
        )
    if comparison.not_run:
        absent = ", ".join(comparison.not_run)
        found.append(f"compared with the float model before lowering, as ONNX Runtime has no {absent} for CPUs")
    return found


def loud_token_warnings(facts: Sequence[SiteFacts], comparison: Comparison | None) -> list[str]:
    """That a layer's output is loud at one token, which a sum over tokens would tell about alone."""
    values = comparison.values if comparison is not None else {}
    found = {
        item.module_path or item.name: values[item.output].share_of_strongest for item in facts
        if item.output in values and values[item.output].rows >= MANY_ROWS
        and values[item.output].share_of_strongest > MOST
    }  # fmt: skip
    if not found:
        return []
    worst = max(found, key=lambda name: found[name])
    layers = "1 layer" if len(found) == 1 else f"{len(found)} layers"
    return [
        f"one token of a sample makes most of what {layers} put out ({100 * found[worst]:.0f} % at {worst}): errors "
        "are means over tokens, as a sum would be that token's alone"
    ]


def optimizer_changes(comparison: Comparison) -> list[str]:
    """Outputs whose error onnxruntime's optimizer moves by more than what rounding in float does."""
    return [
        name for name, plain in comparison.unoptimized.items()
        if name in comparison.outputs and not _alike(comparison.outputs[name].sqnr_db, plain.sqnr_db)
    ]  # fmt: skip


def _alike(a: float, b: float) -> bool:
    return min(a, b) > AS_GOOD_AS_EXACT_DB or a == b or abs(a - b) <= LIKE_DB or (math.isnan(a) and math.isnan(b))


def runtime_warnings(target: Target, runs: Sequence[PassRun]) -> list[str]:
    """That a model for no runtime in particular has operators of one, as the recipe names them."""
    kernels = sorted({item.kernel for run in runs for item in run.changes.changed if item.kernel})
    if target.lowering or not kernels:
        return []
    return [f"the recipe brings {', '.join(kernels)}, which ONNX Runtime alone has: other runtimes cannot run it"]


def float_inputs(runs: Sequence[PassRun]) -> set[str]:
    """Sites whose quantized activation a lowering has made float again."""
    changed = {item.site for run in runs for item in run.changes.changed if item.float_input}
    return changed | {item.site for run in runs for item in run.changes.skipped if item.undone == "activation"}


def float_input_warnings(target: Target, sites: Sequence[SiteReport], runs: Sequence[PassRun]) -> list[str]:
    """That activations are not quantized, though the recipe has a pass for it."""
    found = float_inputs(runs)
    if not found:
        return []
    return [
        f"the recipe quantizes activations, and {len(found)} of {len(sites)} layers read float ones: {target.name} has "
        "no kernel that takes codes beside weights in blocks"
    ]


def binary_warnings(sites: Sequence[SiteReport], outputs: Mapping[str, Mapping[str, float]]) -> list[str]:
    """What one bit a weight has cost, in one sentence; empty where no layer has binary weights."""
    count = sum(site.weight is not None and site.weight.format == BINARY for site in sites)
    if not count:
        return []
    layers = "1 layer has" if count == 1 else f"{count} layers have"
    cost = "; ".join(_cost(name, measures) for name, measures in outputs.items() if "kl" in measures)
    cost = cost or "; ".join(_cost(name, measures) for name, measures in outputs.items())
    measured = f"the error against the float model is {cost}" if cost else "what that costs here was not measured"
    return [f"{layers} binary weights, which ruins a model that was not trained with them: {measured}"]


def _cost(name: str, measures: Mapping[str, float]) -> str:
    if "kl" not in measures:
        return f"{measures['sqnr_db']:.1f} dB signal-to-noise ({name})"
    found = f"KL {measures['kl']:.3g} nats"
    if "perplexity_ratio" in measures:
        found += f", perplexity {measures['perplexity_ratio']:.4g} times as high"
    if "top1" in measures:
        found += f", the same likeliest token for {100 * measures['top1']:.1f} %"
    return f"{found} ({name})"


def range_warnings(recipe: Recipe) -> list[str]:
    """That nobody has looked whether values fit float16, where that is so."""
    unseen = [
        step for step in recipe.passes if step.name == CONVERT
        and step.options.get("dtype", "fp16") == "fp16" and not step.options.get("check_range")
    ]  # fmt: skip
    return ["float16 ends at 65504, and it takes calibration data to tell which values get larger"] if unseen else []


def nothing_warnings(sites: Sequence[SiteReport], runs: Sequence[PassRun]) -> list[str]:
    """That a recipe which quantizes has quantized nothing, with the commonest reason."""
    quantizes = any(run.step.kind == "rounding" for run in runs)
    if not sites or not quantizes or any(site.status == "quantized" for site in sites):
        return []
    reason, count = Counter(site.reason for site in sites).most_common(1)[0]
    return [f"nothing is quantized ({count} of {len(sites)} layers: {reason})"]


def idle_warnings(runs: Sequence[PassRun]) -> list[str]:
    """A sentence for each pass that was to quantize something and met nothing at all, not even something to skip."""
    met: dict[str, int] = {}
    for run in runs:
        if run.step.kind == "rounding":
            changes = run.changes
            count = len(changes.changed) + len(changes.skipped) + len(changes.excluded)
            met[run.step.name] = met.get(run.step.name, 0) + count
    return [f"{name} found nothing in this model to work on" for name, count in met.items() if count == 0]
