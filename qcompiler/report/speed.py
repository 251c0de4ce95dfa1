"""How fast a target runs the layers, by what was measured there, and a warning of those that float ones outrun."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from qcompiler.report.pictures import SpeedClass
from qcompiler.report.report import SiteReport
from qcompiler.targets import Kernel, Target


def speed_warnings(target: Target, sites: Sequence[SiteReport]) -> list[str]:
    """A sentence for each kernel of the target that runs some of the sites and was measured slower than float."""
    warnings = []
    quantized = [site for site in sites if site.status == "quantized"]
    for kernel in target.kernels:
        if all(speed.ratio >= 1 for speed in kernel.speed):
            continue
        run = [site for site in quantized if _runs(kernel, site)]
        if run:
            warnings.append(_sentence(target, kernel, len(run), "cache" if run[0].is_cache else "layer"))
    return warnings


def speed_classes(target: Target, sites: Sequence[SiteReport]) -> tuple[SpeedClass, ...]:
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
        classes.append(SpeedClass(name, scheme, count, tuple(one.ratio for one in speeds), cases))
    return tuple(classes)


def _runs(kernel: Kernel, site: SiteReport) -> bool:
    """Whether a row of the kernel table is what runs a site."""
    cache = site.cache.scheme if site.cache is not None else None
    return kernel.sites is not None and kernel.sites.matches(site.kernel, site.weight, site.activation, cache)


def _sentence(target: Target, kernel: Kernel, count: int, what: str) -> str:
    """The slowest case with all that belongs to a measurement, and where the others are; `what` is layer or cache."""
    slowest = min(kernel.speed, key=lambda speed: speed.ratio)
    layers = f"1 {what} as {kernel.scheme} is" if count == 1 else f"{count} {what}s as {kernel.scheme} are"
    sometimes = "" if all(speed.ratio < 1 for speed in kernel.speed) else "sometimes "
    others = f"; `qcompiler targets {target.name}` lists all cases" if len(kernel.speed) > 1 else ""
    return (
        f"{layers} {sometimes}slower than {slowest.against} on {target.name}: {slowest.ratio:g} × with {slowest.case} "
        f"({slowest.machine}, {slowest.date}){others}"
    )
