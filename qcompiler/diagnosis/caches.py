"""Cuts the quantized KV-caches of a model out of it, so that they are measured as layers are.

    float       new ─────────────────────────────── Concat ── present ── attention
    quantized   new ── QuantizeCache ── … ── Concat ── … ── DequantizeCache ── attention        a region, as for layers

Where attention appends to its cache itself (GroupQueryAttention, Attention), nothing between the two can be compared.
There keys and values are one region, which ends behind attention.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from qcompiler.diagnosis.regions import STORED, Region, StoredCache, Unmatched, flowing, region_of, same_values
from qcompiler.graph.operators import attends, has
from qcompiler.sites.analyses import caches_of
from qcompiler.sites.caches import CODES
from qcompiler.sites.kinds import Site, Unsupported
from qcompiler.sites.stored_caches import stored_cache


def find_cache_regions(reference: ir.Model, candidate: ir.Model) -> tuple[list[Region], list[Unmatched]]:
    """The caches that the quantized model stores as codes; those that cannot be measured, with the reason."""
    inputs = {str(value.name): value for value in candidate.graph.inputs}
    stored = [cache for cache in caches_of(reference) if _is_stored(inputs.get(cache.name))]
    flows = flowing(candidate.graph)
    values = {str(value.name): value for value in flows}
    mine = {str(value.name): value for value in flowing(reference.graph)}
    pairs = same_values(reference, flows)
    pairs |= {value: STORED + name for name, value in inputs.items() if value not in pairs}
    order = {node: index for index, node in enumerate(candidate.graph)}
    found: dict[str, Region] = {}
    missing: list[Unmatched] = []
    for cache in stored:
        end = "it is no cache of a known form in the float model" if isinstance(cache, Unsupported) else _end(
            cache, inputs[cache.name], mine, values)  # fmt: skip
        region: Region | str | None = end if isinstance(end, str) else found.get(str(end[0].name))
        if not isinstance(end, str) and region is None:
            site = _site(cache, end[0], inputs)
            region = region_of(site, end[1], pairs, flows, order)
        if isinstance(region, str):
            missing.append(Unmatched(cache.name, cache.module_path, region))
        elif region is not None:
            found[str(region.site.output.name)] = region
    return list(found.values()), missing


def _is_stored(past: ir.Value | None) -> bool:
    return past is not None and past.dtype in CODES


def _end(
    cache: Site, past: ir.Value, mine: Mapping[str, ir.Value], values: Mapping[str, ir.Value]
) -> tuple[ir.Value, ir.Value] | str:
    """Where the region ends, in the float model and in the quantized one; else why it cannot be measured."""
    joined = has(cache.node, "joins")
    readers = [node for node, _ in past.uses() if attends(node)]
    if joined and not readers:
        present = cache.node.outputs[0]
        dequantized = values.get(f"{present.name}.dequantized")
        return (present, dequantized) if dequantized is not None else "nothing reads it dequantized"
    name = str((_handed_on(readers[0].outputs[0], mine) if joined else cache.node.outputs[0]).name)
    if name not in mine or name not in values or mine[name].producer() is None:
        return "the output of its attention has another name in the float model"
    return mine[name], values[name]


def _handed_on(value: ir.Value, mine: Mapping[str, ir.Value]) -> ir.Value:
    """Attention's output where the float model has it: behind what gives it that model's layout."""
    while str(value.name) not in mine:
        readers = [node for node, _ in value.uses()]
        if len(readers) != 1 or not has(readers[0], "moves"):
            break
        value = readers[0].outputs[0]
    return value


def _site(cache: Site, output: ir.Value, inputs: Mapping[str, ir.Value]) -> StoredCache:
    past = inputs[cache.name]
    alone = output is cache.node.outputs[0] and has(cache.node, "joins")
    before, dot, last = cache.module_path.rpartition(".")
    # A pattern for both: what names the key cache names the value cache, too, but for its last word.
    both = f"{before}.*{'_cache' if last.endswith('_cache') else ''}" if dot else cache.module_path
    path = cache.module_path if alone else both
    return StoredCache(
        node=cache.node, name=cache.name, module_path=path, block=cache.block, output=output,
        scheme=stored_cache(past),
    )  # fmt: skip
