"""Adds to each quantized site what runs it on the target: the provider, and which of its kernels, and why that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import onnx_ir as ir

from qcompiler.placement.placed import Placement
from qcompiler.placement.rules import path_of
from qcompiler.report.report import SiteReport
from qcompiler.targets import Target


def with_kernels(
    sites: Sequence[SiteReport], graph: ir.Model, placement: Placement, target: Target
) -> list[SiteReport]:
    """The same sites; a site's operator has the site's name in the lowered graph."""
    nodes = {node.name: node for node in graph.graph.all_nodes()}
    placed = {node.name: node for node in placement.nodes}
    found = []
    for site in sites:
        node, place = nodes.get(site.name), placed.get(site.name)
        if site.status != "quantized" or node is None or place is None:
            found.append(site)
            continue
        path = path_of(node, target)
        conditions = place.reason or (path.text() if path is not None else "")
        found.append(replace(site, provider=place.provider, conditions=conditions))
    return found
