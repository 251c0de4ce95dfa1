"""Warns of layers that a target runs slower than it ran the float ones, by what was measured there."""

from __future__ import annotations

import re
from collections.abc import Sequence

from qcompiler.report.report import SiteReport
from qcompiler.targets import Kernel, Target


def speed_warnings(target: Target, sites: Sequence[SiteReport]) -> list[str]:
    """A sentence for each kernel of the target that runs some of the sites and was measured slower than float."""
    warnings = []
    quantized = [f"{site.kernel}: {site.scheme}" for site in sites if site.status == "quantized"]
    for kernel in target.kernels:
        if not kernel.sites or all(speed.ratio >= 1 for speed in kernel.speed):
            continue
        count = sum(re.search(kernel.sites, site) is not None for site in quantized)
        if count:
            warnings.append(_sentence(target, kernel, count))
    return warnings


def _sentence(target: Target, kernel: Kernel, count: int) -> str:
    """The slowest case with all that belongs to a measurement, and where the others are."""
    slowest = min(kernel.speed, key=lambda speed: speed.ratio)
    layers = f"1 layer as {kernel.scheme} is" if count == 1 else f"{count} layers as {kernel.scheme} are"
    sometimes = "" if all(speed.ratio < 1 for speed in kernel.speed) else "sometimes "
    others = f"; `qcompiler targets {target.name}` lists all cases" if len(kernel.speed) > 1 else ""
    return (
        f"{layers} {sometimes}slower than {slowest.against} on {target.name}: {slowest.ratio:g} × with {slowest.case} "
        f"({slowest.machine}, {slowest.date}){others}"
    )
