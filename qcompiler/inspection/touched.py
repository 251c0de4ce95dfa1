"""Which layers the passes of a recipe would work on, told from their options and the graph alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from qcompiler.driver import inputs
from qcompiler.rewriting.contract import Changes, Pass
from qcompiler.rewriting.weights import WeightPass
from qcompiler.sites.analyses import caches_of, sites_of
from qcompiler.sites.find import Convolution, Embedding, Linear, Site, Unsupported


@dataclass(frozen=True)
class Touched:
    """What a pass would do with one layer."""

    pass_name: str
    name: str
    module_path: str
    does: str
    """The scheme that it would round to; empty where the options do not tell."""
    obstacle: str
    """Why it would leave the layer as it is, as far as that can be told; empty where it would not."""


def touched(
    model: ir.Model, recipe: str | Path, target: str | None, options: Sequence[str], exclude: Sequence[str]
) -> tuple[Touched, ...]:
    """In the order of the passes, then of the graph. Passes that look at data or at what others made may skip more."""
    plan = inputs.plan(recipe, target, options, exclude, None, None)
    inputs.check_plan(plan, model)
    sites = {site.name: site for site in sites_of(model)}
    taken: set[str] = set()  # a weight is rounded once, by the first pass that wants it
    found: list[Touched] = []
    for step in plan.passes:
        if isinstance(step, WeightPass):
            found += _weights(step, model, sites, taken)
        else:
            chosen = [site for site in _worked_on(step, model) if step.selects(site)]
            found += [Touched(step.name, site.name, site.module_path, "",
                              site.reason if isinstance(site, Unsupported) else "") for site in chosen]  # fmt: skip
    return tuple(found)


def _weights(step: WeightPass, model: ir.Model, sites: dict[str, Site], taken: set[str]) -> list[Touched]:
    changes, found = Changes(), []
    for constant in step.constants(model, changes):
        for reader in constant.readers:
            again = "an earlier pass of the recipe quantizes it" if reader.name in taken else ""
            found.append(Touched(step.name, reader.name, reader.module_path, str(constant.reported), again))
            taken.add(reader.name)
    skipped = [Touched(step.name, item.site, sites[item.site].module_path if item.site in sites else item.site, "",
                       item.reason) for item in changes.skipped]  # fmt: skip
    return found + skipped


def _worked_on(step: Pass, model: ir.Model) -> list[Site]:
    if step.works_on == "caches":
        return list(caches_of(model))
    kinds = (Linear,) if step.kind == "exact" else (Linear, Convolution, Unsupported)
    return [site for site in sites_of(model) if isinstance(site, kinds) and not isinstance(site, Embedding)]
