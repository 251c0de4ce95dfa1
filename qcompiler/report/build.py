"""Puts the report together from what the passes said and what the comparison measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import numpy as np
import onnx_ir as ir

from qcompiler.graph import constant
from qcompiler.match import Embedding, Site, Unsupported, find_sites
from qcompiler.pipeline import PassRun
from qcompiler.recipe import Recipe
from qcompiler.report.report import PassReport, PassSkip, Report, SiteReport, Sizes
from qcompiler.samples import Samples
from qcompiler.verify import Comparison, compare

DISTRIBUTIONS = ("onnx-qcompiler", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "onnxruntime-gpu", "numpy")


@dataclass(frozen=True)
class SiteFacts:
    """What is known of a site before any pass ran."""

    name: str
    module_path: str
    block: str
    op: str
    output: str
    constant: str
    bytes: int
    unsupported: str
    site: Site


def inventory(model: ir.Model) -> list[SiteFacts]:
    """Every quantizable site of the canonicalized float model, in graph order."""
    facts = []
    for site in find_sites(model):
        weight = site.table if isinstance(site, Embedding) else getattr(site, "weight", None)
        tensor = constant(weight)
        output = site.node.outputs[0] if isinstance(site, Unsupported) else site.output  # type: ignore[attr-defined]
        facts.append(
            SiteFacts(
                name=site.name, module_path=site.module_path, block=site.block, op=site.node.op_type,
                output=output.name or "", constant=str(weight.name) if weight is not None else "",
                bytes=tensor.nbytes if tensor is not None else 0,
                unsupported=site.reason if isinstance(site, Unsupported) else "", site=site,
            )
        )  # fmt: skip
    return facts


def report(
    recipe: Recipe, facts: Sequence[SiteFacts], runs: Sequence[PassRun], comparison: Comparison | None,
    before: int, after: int, hashes: dict[str, str],
) -> Report:  # fmt: skip
    """The report of a finished compilation; `before` and `after` are bytes of all constants."""
    measured = comparison.values if comparison is not None else {}
    sqnr = {item.name: measured[item.output].sqnr_db for item in facts if item.output in measured}
    sites = [_site_report(item, runs, sqnr.get(item.name)) for item in facts]
    warnings = []
    if comparison is None:
        warnings.append("not compared with the float model, which takes data with at least two samples")
    if not facts:
        warnings.append(
            "the model has no layer that could be quantized: linear, convolution or embedding with constants"
        )
    outputs = {name: item.to_dict() for name, item in comparison.outputs.items()} if comparison is not None else {}
    return Report(
        recipe=recipe.name, target=recipe.target, sites=sites, sizes=sizes(facts, sites, before, after),
        passes=pass_reports(runs), outputs=outputs, versions=versions(), hashes=hashes, warnings=warnings,
    )  # fmt: skip


def comparison(
    reference: ir.Model, graph: ir.Model, held_out: Samples | None, facts: Sequence[SiteFacts], runs: Sequence[PassRun],
    memory_limit: int | None, progress: bool,
) -> Comparison | None:  # fmt: skip
    """How far outputs and sites are from the float model on samples that calibration did not see; None without any."""
    if held_out is None:
        return None
    values = {item.output: item.output for item in facts}
    return compare(
        reference, graph, held_out, values=values, divided=_divided(runs), memory_limit=memory_limit, progress=progress
    )


def _divided(runs: Sequence[PassRun]) -> dict[str, np.ndarray]:
    """By what exact passes have divided each value that they rescaled, all together."""
    found: dict[str, np.ndarray] = {}
    for run in runs:
        for value, divisor in run.changes.rescaled.items():
            found[value] = found[value] * divisor if value in found else divisor
    return found


def _site_report(item: SiteFacts, runs: Sequence[PassRun], sqnr_db: float | None) -> SiteReport:
    schemes: list[str] = []
    pass_name = kernel = ""
    details: dict[str, str] = {}
    reasons: dict[str, str] = {}
    for run in runs:
        for changed in run.changes.changed:
            if changed.site == item.name:
                if changed.scheme:
                    schemes.append(changed.scheme)
                    pass_name = pass_name or run.step.name
                kernel = changed.kernel or kernel
                if changed.detail:
                    details[run.step.name] = changed.detail
        for skipped in run.changes.skipped:
            if skipped.site == item.name:
                reasons[run.step.name] = skipped.reason
    rounding = [run.step for run in runs if run.step.kind == "rounding"]
    if schemes:
        status, reason = "quantized", ""
        details |= {name: f"skipped: {reason}" for name, reason in reasons.items()}
    elif item.unsupported or any(step.name in reasons for step in rounding):
        status = "skipped"
        reason = item.unsupported or next(reasons[step.name] for step in rounding if step.name in reasons)
        pass_name = next((step.name for step in rounding if step.name in reasons), "")
        if item.unsupported and not any(step.selects(item.site) for step in rounding):
            status, reason = "excluded", "the recipe leaves it out"
    else:
        status, reason = "excluded", "the recipe leaves it out"
    return SiteReport(
        name=item.name, module_path=item.module_path, op=item.op, status=status,  # type: ignore[arg-type]
        block=item.block, reason=reason, scheme=", ".join(dict.fromkeys(schemes)), pass_name=pass_name, kernel=kernel,
        sqnr_db=sqnr_db, details=details,
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


def constant_bytes(model: ir.Model) -> int:
    """Bytes of all constants, each once."""
    return sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)


def sizes(facts: Sequence[SiteFacts], reports: Sequence[SiteReport], before: int, after: int) -> Sizes:
    """Bytes before and after; what no pass quantized is taken to have kept its size."""
    done = {report.name for report in reports if report.status == "quantized"}
    quantized = {item.constant: item.bytes for item in facts if item.name in done}
    float_bytes = sum(quantized.values())
    return Sizes(
        float_bytes=before,
        bytes=after,
        quantized_float_bytes=float_bytes,
        quantized_bytes=after - (before - float_bytes),
    )


def versions() -> dict[str, str]:
    found = {}
    for name in DISTRIBUTIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue  # one of the two distributions of onnxruntime, or qcompiler run from its sources
    return found
