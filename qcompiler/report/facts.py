"""What is known of every site before any pass has run."""

from __future__ import annotations

from dataclasses import dataclass, replace

import onnx_ir as ir

from qcompiler.graph.edit import constant
from qcompiler.sites.analyses import caches_of, sites_of
from qcompiler.sites.caches import Cache
from qcompiler.sites.find import Embedding, Linear, Site, Unsupported


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
    input: str = ""
    """The value that a linear layer reads."""
    works_on: str = "layers"
    """Whose site it is: of the passes that quantize layers, or caches."""
    cache_bytes: int = 0
    """Of a cache: bytes of one position of one sequence."""


def inventory(model: ir.Model) -> list[SiteFacts]:
    """Every quantizable site of the canonicalized float model, in graph order; caches come last."""
    facts = []
    for site in sites_of(model):
        weight = site.table if isinstance(site, Embedding) else getattr(site, "weight", None)
        tensor = constant(weight)
        output = site.node.outputs[0] if isinstance(site, Unsupported) else site.output  # type: ignore[attr-defined]
        facts.append(
            SiteFacts(
                name=site.name, module_path=site.module_path, block=site.block, op=site.node.op_type,
                output=output.name or "", constant=str(weight.name) if weight is not None else "",
                bytes=tensor.nbytes if tensor is not None else 0,
                unsupported=site.reason if isinstance(site, Unsupported) else "", site=site,
                input=str(site.input.name) if isinstance(site, Linear) else "",
            )
        )  # fmt: skip
    return facts + [_cache_facts(site) for site in caches_of(model)]


def _cache_facts(site: Cache | Unsupported) -> SiteFacts:
    facts = SiteFacts(
        name=site.name, module_path=site.module_path, block=site.block, op=site.node.op_type, output="", constant="",
        bytes=0, unsupported="", site=site, works_on="caches",
    )  # fmt: skip
    if isinstance(site, Unsupported):
        return replace(facts, unsupported=site.reason)
    return replace(facts, op=f"{site.role} cache", output=str(site.present.name), cache_bytes=site.bytes)
