"""Puts the report together from what the passes said and what the comparison measured."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from qcompiler.calibration.samples import Samples
from qcompiler.evaluation.compare import Comparison, Measures, compare
from qcompiler.formats.scheme import Scheme, in_words
from qcompiler.half.emulation import emulated
from qcompiler.placement import predict
from qcompiler.recipes import CONVERT, Recipe
from qcompiler.report.cautions import float_inputs, optimizer_changes, warnings
from qcompiler.report.distributions import channel_pictures, weight_pictures
from qcompiler.report.drawing import by_name, drawings
from qcompiler.report.facts import SiteFacts
from qcompiler.report.kernels import with_kernels
from qcompiler.report.looks import looks
from qcompiler.report.pictures import Pictures
from qcompiler.report.report import CacheSizes, PassReport, PassSkip, Report, SiteReport, Sizes
from qcompiler.report.speed import speed_classes
from qcompiler.rewriting.contract import Changed, PassRun, Skipped
from qcompiler.statistics import StatisticsStore
from qcompiler.targets import Target
from qcompiler.targets.kernels import CPU, missing_on_cpu

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

DISTRIBUTIONS = ("onnx-qcompiler", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "onnxruntime-gpu", "numpy")

RECIPE_LEAVES_IT_OUT = "the recipe leaves it out"


def report(
    recipe: Recipe, graph: ir.Model, facts: Sequence[SiteFacts], runs: Sequence[PassRun],
    comparison: Comparison | None, before: Mapping[str, int], hashes: dict[str, str], rows: int | None = None,
) -> Report:  # fmt: skip
    """The report of a finished compilation, of which `graph` is the result.

    `before` are the constants' bytes, `rows` are those of data that was measured (`Samples.rows`).
    """
    measured = comparison.values if comparison is not None else {}
    facts = _worked_on(facts, runs)
    in_float = float_inputs(runs)
    told = _told(runs)
    sites = [_site_report(item, runs, told, measured.get(item.output), item.name in in_float) for item in facts]
    target, after = Target.load(recipe.target), constant_bytes(graph)
    placement = predict(graph, target)
    said = warnings(facts, recipe, target, sites, runs, comparison, placement)
    if placement is not None:
        sites = with_kernels(sites, graph, placement, target)
    outputs = {name: item.to_dict() for name, item in comparison.outputs.items()} if comparison is not None else {}
    apart = optimizer_changes(comparison) if comparison is not None else []
    return Report(
        recipe=recipe.name, target=recipe.target, sites=sites,
        sizes=sizes(facts, sites, before, after, sum(run.changes.narrowed for run in runs)),
        passes=pass_reports(runs), outputs=outputs, versions=versions(), hashes=hashes, warnings=said,
        looks=looks(recipe, sites, runs, outputs, rows),
        unoptimized={name: comparison.unoptimized[name].to_dict() for name in apart} if comparison is not None else {},
        cache=cache_sizes(facts, sites), placement=placement, resolved_recipe=recipe.to_yaml(),
    )  # fmt: skip


def pictures(
    report: Report, facts: Sequence[SiteFacts], reference: ir.Model, portable: ir.Model, graph: ir.Model,
    runs: Sequence[PassRun], statistics: StatisticsStore,
) -> Pictures:  # fmt: skip
    """What the report draws; `statistics` are those at the end, of values as exact passes have rescaled them."""
    matching = by_name(reference, graph, (site.name for site in report.with_status("quantized")))
    blocks, undrawn = drawings(reference, graph, matching)
    return Pictures(
        channels=channel_pictures(facts, runs, statistics), weights=weight_pictures(facts, reference, portable),
        drawings=blocks, undrawn=undrawn, speed=speed_classes(Target.load(report.target), report.sites),
    )  # fmt: skip


def _worked_on(facts: Sequence[SiteFacts], runs: Sequence[PassRun]) -> list[SiteFacts]:
    """Layers, and caches where the recipe has a pass for them."""
    kinds = {"layers"} | {run.step.works_on for run in runs}
    return [item for item in facts if item.works_on in kinds]


def comparison(
    reference: ir.Model, graph: ir.Model, portable: ir.Model, held_out: Samples | None, facts: Sequence[SiteFacts],
    runs: Sequence[PassRun], target: Target, opened: Callable[[], InferenceSession] | None, memory_limit: int | None,
    progress: bool,
) -> Comparison | None:  # fmt: skip
    """How far outputs and sites are from the float model on samples that calibration did not see; None without any.

    Outputs are those of the written model as `opened`. Where the lowered graph has operators that CPUs have no kernel
    for, the portable one is compared in its place. What was converted to 16 bits is emulated, as CPUs would compute it
    in float32, and so are its outputs for targets that do not.
    """
    if held_out is None:
        return None
    moved = {old: new for run in runs for old, new in run.changes.moved.items()}
    values = {item.output: moved.get(item.output, item.output) for item in _worked_on(facts, runs) if item.output}
    absent = missing_on_cpu((node.domain, node.op_type) for node in graph.graph.all_nodes())
    candidate, converted = portable if absent else graph, any(run.step.name == CONVERT for run in runs)
    on_cpu = target.providers[0] == CPU
    found = compare(
        reference, emulated(candidate) if converted else candidate, held_out, values=values, divided=_divided(runs),
        opened=None if absent or (converted and not on_cpu) else opened, memory_limit=memory_limit, progress=progress,
    )  # fmt: skip
    return replace(found, not_run=absent, unoptimized={} if converted else found.unoptimized)


def _divided(runs: Sequence[PassRun]) -> dict[str, np.ndarray]:
    """By what exact passes have divided each value that they rescaled, all together."""
    found: dict[str, np.ndarray] = {}
    for run in runs:
        for value, divisor in run.changes.rescaled.items():
            found[value] = found[value] * divisor if value in found else divisor
    return found


@dataclass(frozen=True)
class _Told:
    """What a run says of one site."""

    changed: list[Changed] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    excluded: list[Skipped] = field(default_factory=list)


def _told(runs: Sequence[PassRun]) -> list[dict[str, _Told]]:
    """Of each run, by site."""
    found: list[dict[str, _Told]] = []
    for run in runs:
        sites: dict[str, _Told] = defaultdict(_Told)
        for changed in run.changes.changed:
            sites[changed.site].changed.append(changed)
        for skipped in run.changes.skipped:
            sites[skipped.site].skipped.append(skipped)
        for excluded in run.changes.excluded:
            sites[excluded.site].excluded.append(excluded)
        found.append(dict(sites))
    return found


def _site_report(
    item: SiteFacts, runs: Sequence[PassRun], told: Sequence[Mapping[str, _Told]], measures: Measures | None,
    float_input: bool,
) -> SiteReport:  # fmt: skip
    weight: Scheme | None = None
    activation: Scheme | None = None
    pass_name = kernel = ""
    details: dict[str, str] = {}
    reasons: dict[str, str] = {}
    undone: dict[str, str] = {}
    left_out: dict[str, str] = {}
    cache = None
    for run, by_site in zip(runs, told, strict=True):
        said = by_site.get(item.name, _Told())
        for changed in said.changed:
            cache = changed.cache or cache
            weight, activation = changed.weight or weight, changed.activation or activation
            if changed.scheme:
                pass_name = pass_name or run.step.name
            kernel = changed.kernel or kernel
            if changed.detail:
                details[run.step.name] = changed.detail
        for skipped in said.skipped:
            (undone if skipped.undone == "layer" else reasons)[run.step.name] = skipped.reason
        for excluded in said.excluded:
            left_out[run.step.name] = excluded.reason
    rounding = [run.step for run in runs if run.step.kind == "rounding" and run.step.works_on == item.works_on]
    if float_input:
        activation = None
    if undone:
        status, (pass_name, reason) = "skipped", next(iter(undone.items()))
        weight, activation, cache, kernel = None, None, None, ""
    elif weight is not None or activation is not None or cache is not None:
        status, reason = "quantized", ""
        details |= {name: f"skipped: {reason}" for name, reason in reasons.items()}
    elif item.unsupported or any(step.name in reasons for step in rounding):
        status = "skipped"
        reason = item.unsupported or next(reasons[step.name] for step in rounding if step.name in reasons)
        pass_name = next((step.name for step in rounding if step.name in reasons), "")
        if not any(step.selects(item.site) for step in rounding):  # it cannot be quantized, and nobody asked for it
            status, reason = "excluded", RECIPE_LEAVES_IT_OUT
    else:
        status = "excluded"
        pass_name, reason = next(iter(left_out.items()), ("", RECIPE_LEAVES_IT_OUT))
    scheme = in_words(weight, activation, cache.scheme if cache is not None else None)
    return SiteReport(
        name=item.name, module_path=item.module_path, op=item.op, status=status,  # type: ignore[arg-type]
        block=item.block, reason=reason, scheme=scheme, pass_name=pass_name, kernel=kernel,
        sqnr_db=measures.sqnr_db if measures is not None else None,
        total_sqnr_db=measures.total_sqnr_db if measures is not None else None,
        details=details, weight=weight, activation=activation, cache=cache,
    )  # fmt: skip


def pass_reports(runs: Sequence[PassRun]) -> list[PassReport]:
    return [
        PassReport(
            name=run.step.name, seconds=round(run.seconds, 3), peak_rss=run.peak_rss,
            changed=len({changed.site for changed in run.changes.changed}),
            skipped=tuple(PassSkip(skip.site, skip.reason) for skip in run.changes.skipped),
        )
        for run in runs
    ]  # fmt: skip


def constant_bytes(model: ir.Model) -> dict[str, int]:
    """Bytes of all constants by name, each once."""
    initializers = model.graph.initializers
    return {name: value.const_value.nbytes for name, value in initializers.items() if value.const_value is not None}


def sizes(
    facts: Sequence[SiteFacts], reports: Sequence[SiteReport], before: Mapping[str, int], after: Mapping[str, int],
    narrowed: int = 0,
) -> Sizes:  # fmt: skip
    """Bytes before and after.

    What no pass quantized keeps its name and size, but for `narrowed` bytes and what is gone (a pass that fuses
    attention takes its masks out); all else that is there now was quantized, or belongs to what was.
    """
    done = {report.name for report in reports if report.status == "quantized"}
    quantized = {item.constant: item.bytes for item in facts if item.name in done}
    float_bytes = sum(quantized.values())
    kept = sum(count for name, count in before.items() if name in after and name not in quantized) - narrowed
    total = sum(after.values())
    return Sizes(
        float_bytes=sum(before.values()),
        bytes=total,
        quantized_float_bytes=float_bytes,
        quantized_bytes=total - kept if float_bytes else 0,
    )


def cache_sizes(facts: Sequence[SiteFacts], reports: Sequence[SiteReport]) -> CacheSizes | None:
    """Bytes of all caches together; None where no pass works on caches, or there are none."""
    before = {item.name: item.cache_bytes for item in facts if item.cache_bytes}
    after = dict(before)
    after.update({report.name: report.cache.bytes_after for report in reports if report.cache is not None})
    return CacheSizes(sum(before.values()), sum(after.values())) if before else None


def versions() -> dict[str, str]:
    found = {}
    for name in DISTRIBUTIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue  # one of the two distributions of onnxruntime, or qcompiler run from its sources
    return found
