"""How fast the compiled model is: as it was measured here, and, in small print, what the target's kernel table says."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from qcompiler.benchmarking.speedup import Speedup
from qcompiler.report.pictures import SpeedClass
from qcompiler.report.report import Report, SiteReport
from qcompiler.targets import Kernel, Speed, Target
from qcompiler.targets.machines import Cpu, this_cpu

FAST = 1.1
"""A model that is measured above it is called fast."""


def with_speed(report: Report, measured: Speedup | str) -> None:
    """Put into a report how fast the model ran here, or why that was not measured, and what is to be warned of."""
    report.speed, report.speed_note = (None, measured) if isinstance(measured, str) else (measured, "")
    found = measured_warnings(report.speed) + speed_warnings(Target.load(report.target), report.sites, report.speed)
    report.warnings = found + report.warnings


def measured_warnings(speed: Speedup | None) -> list[str]:
    """That the compiled model is slower than the float one on this machine."""
    if speed is None or not speed.slower:
        return []
    return [
        f"the compiled model is slower than the float one: {speed}, {_times(speed)} ({speed.case}, {speed.machine}); "
        "`qcompiler bench FLOAT OUT` tells which operators the time goes to"
    ]


def speed_warnings(
    target: Target, sites: Sequence[SiteReport], measured: Speedup | None = None, cpu: Cpu | None = None
) -> list[str]:
    """A sentence for each kernel that runs some of the sites and is slower than float by the target's table.

    The table's rows for this CPU count, others where there are none. What was measured and is not slower speaks for its
    layers; caches, which are empty in that, are warned of all the same.
    """
    warnings = []
    quantized = [site for site in sites if site.status == "quantized"]
    for kernel in target.kernels:
        speeds = _nearest(target, kernel.speed, cpu or this_cpu())
        if all(speed.ratio >= 1 for speed in speeds):
            continue
        run = [site for site in quantized if _runs(kernel, site)]
        if measured is not None and not measured.slower:
            run = [site for site in run if site.is_cache]
        if run:
            what = "cache" if run[0].is_cache else "layer"
            warnings.append(_sentence(target, kernel, speeds, len(run), what, cpu or this_cpu()))
    return warnings


def _nearest(target: Target, speeds: Sequence[Speed], cpu: Cpu) -> Sequence[Speed]:
    """Those that were measured on such CPUs; all where none was."""
    return [speed for speed in speeds if target.is_for(speed, cpu)] or speeds


def speed_classes(target: Target, sites: Sequence[SiteReport], cpu: Cpu | None = None) -> tuple[SpeedClass, ...]:
    """The quantized layers by the row of the target's kernel table that runs them, those of most layers first."""
    groups: dict[tuple[str, Kernel | None], int] = defaultdict(int)
    for site in sites:
        if site.status == "quantized" and site.cache is None:
            rows = (kernel for kernel in target.kernels if _runs(kernel, site))
            groups[site.kernel, next(rows, None)] += 1
    classes = []
    for (name, kernel), count in sorted(groups.items(), key=lambda item: -item[1]):
        speeds = kernel.speed if kernel is not None else ()
        cases = tuple(f"{one.case}, against {one.against} ({one.machine}, {one.date})" for one in speeds)
        scheme = kernel.scheme if kernel is not None else ""
        here = tuple(target.is_for(one, cpu or this_cpu()) for one in speeds)
        classes.append(SpeedClass(name, scheme, count, tuple(one.ratio for one in speeds), cases, here))
    return tuple(classes)


def _runs(kernel: Kernel, site: SiteReport) -> bool:
    """Whether a row of the kernel table is what runs a site."""
    cache = site.cache.scheme if site.cache is not None else None
    return kernel.sites is not None and kernel.sites.matches(site.kernel, site.weight, site.activation, cache)


def _sentence(
    target: Target, kernel: Kernel, speeds: Sequence[Speed], count: int, what: str, cpu: Cpu
) -> str:  # fmt: skip
    """The slowest case with all that belongs to a measurement, and where the others are; `what` is layer or cache."""
    slowest = min(speeds, key=lambda speed: speed.ratio)
    layers = f"1 {what} as {kernel.scheme} is" if count == 1 else f"{count} {what}s as {kernel.scheme} are"
    sometimes = "" if all(speed.ratio < 1 for speed in speeds) else "sometimes "
    others = f"; `qcompiler targets {target.name}` lists all cases" if len(kernel.speed) > 1 else ""
    elsewhere = ", another CPU than this one" if target.machines and not target.is_for(slowest, cpu) else ""
    return (
        f"{layers} {sometimes}slower than {slowest.against} on {target.name}: {slowest.ratio:g} × with {slowest.case} "
        f"({slowest.machine}{elsewhere}, {slowest.date}){others}"
    )


def by_table(*classes: SpeedClass) -> str:
    """The small print: what the table says for this CPU, else for others."""
    marked = [pair for one in classes for pair in zip(one.ratios, one.here or (False,) * len(one.ratios), strict=True)]
    if not marked:
        return "not measured"
    ratios = [ratio for ratio, here in marked if here] or [ratio for ratio, _ in marked]
    lo, hi = min(ratios), max(ratios)
    return (f"{lo:g}×" if lo == hi else f"{lo:g} … {hi:g}×") + (
        "" if any(here for _, here in marked) else ", another CPU"
    )


def figure(report: Report) -> tuple[str, str, str]:
    """The measured speed as a figure, what belongs to it, and its mood: good, bad or empty."""
    speed, classes = report.speed, report.pictures.speed
    if speed is None:
        why = report.speed_note or "a version of qcompiler wrote this that did not"
        known = any(one.ratios for one in classes)
        return "not measured", why + (f"; its kernels by the target's table: {by_table(*classes)}" if known else ""), ""
    mood = "bad" if speed.slower else "good" if speed.ratio > FAST else ""
    spread = f"; middle half {speed.low:.3g} … {speed.high:.3g}×" if speed.rounds > 1 else ""
    return f"{speed.ratio:.3g}×", f"{_times(speed)} here, {speed.case}{spread}", mood


def _times(speed: Speedup) -> str:
    return f"{milliseconds(speed.float_seconds)} → {milliseconds(speed.seconds)} of CPU a run"


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"
