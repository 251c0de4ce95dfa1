"""Cuts a model into its blocks, and each block into the few units that a person would draw of it."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import onnx_ir as ir

from qcompiler.graph.edit import constant
from qcompiler.graph.metadata import PROVENANCE
from qcompiler.graph.module_path import block_of, module_path
from qcompiler.graph.operators import has
from qcompiler.report.pictures import Drawing, DrawnGraph, DrawnUnit, Fate

MOST_NODES = 600  # of a block: one with more is not drawn, as nobody could read it
MOST_DRAWINGS = 24
MOST_OPERATORS = 6  # of a unit that are named


@dataclass(frozen=True)
class Matching:
    """What is known of the nodes of two models that are drawn side by side."""

    twins: Mapping[ir.Node, ir.Node]
    """Of nodes of the first model, those that they are in the second."""
    quantized: frozenset[ir.Node]
    """Of both models."""
    changed: frozenset[ir.Node]
    """Of both models: those that differ from their twins."""
    paths: Mapping[ir.Node, str] = field(default_factory=dict)
    """What nodes are called, where that is known already, or their own names are not to be asked."""

    @cached_property
    def matched(self) -> frozenset[ir.Node]:
        return frozenset(self.twins) | frozenset(self.twins.values())

    def path(self, node: ir.Node) -> str:
        found = self.paths.get(node)
        return path_of(node) if found is None else found


def by_name(reference: ir.Model, graph: ir.Model, quantized: Iterable[str]) -> Matching:
    """Nodes of one name are the same, as after a compilation; `quantized` are the names of the sites that were."""
    names = frozenset(quantized)
    paths = {path for node in reference.graph if node.name in names and (path := path_of(node))}
    found = {node: path_of(node) for model in (reference, graph) for node in model.graph}
    others = {node.name: node for node in graph.graph}
    twins = {node: others[node.name] for node in reference.graph if node.name in others}
    sites = [node for node in (*reference.graph, *graph.graph) if node.name in names or found[node] in paths]
    return Matching(
        twins=twins,
        quantized=frozenset((*sites, *readers_of(reference, names), *readers_of(graph, names))),
        changed=frozenset(node for pair in twins.items() if not _alike(*pair) for node in pair),
        paths=found,
    )


def readers_of(model: ir.Model, caches: Collection[str]) -> Iterator[ir.Node]:
    """The nodes that take in what the caches hold, which are graph inputs."""
    for value in model.graph.inputs:
        if value.name in caches:
            yield from (node for node in value.consumers() if node.op_type != "Shape")


def drawings(reference: ir.Model, graph: ir.Model, matching: Matching) -> tuple[tuple[Drawing, ...], str]:
    """Every block before and after, those that look the same only once, and why some are missing, if any are."""
    before, after = _blocks(reference, matching), _blocks(graph, matching)
    shapes: dict[tuple[object, object], list[str]] = defaultdict(list)
    skipped: list[str] = []
    for block in dict.fromkeys((*before, *after)):
        sides = before.get(block, []), after.get(block, [])
        if max(map(len, sides)) > MOST_NODES:
            skipped.append(block)
            continue
        shapes[_shape(sides[0], block, matching), _shape(sides[1], block, matching)].append(block)
    found = []
    for blocks in list(shapes.values())[:MOST_DRAWINGS]:
        first = blocks[0]
        old, now = (_Block(first, side.get(first, []), matching) for side in (before, after))
        found.append(Drawing(tuple(blocks), *_compared(old, now, matching)))
    reasons = [f"{len(skipped)} with more than {MOST_NODES} nodes are not drawn"] if skipped else []
    if len(shapes) > MOST_DRAWINGS:
        missing = sum(len(blocks) for blocks in list(shapes.values())[MOST_DRAWINGS:])
        reasons.append(f"{missing} are not drawn, as all differ: {MOST_DRAWINGS} kinds of blocks are")
    return tuple(found), "; ".join(reasons)


def _blocks(model: ir.Model, matching: Matching) -> dict[str, list[ir.Node]]:
    """The nodes of each block in order; those of no block are the empty text's.

    A node that a pass made has no path where the exporter's paths are in the names; it goes where its readers are.
    """
    blocks: dict[ir.Node, str] = {}
    for node in reversed(model.graph):
        path = matching.path(node)
        readers = {blocks[use.node] for value in node.outputs for use in value.uses() if use.node in blocks}
        made = not path and (PROVENANCE in node.metadata_props or node not in matching.matched)
        blocks[node] = readers.pop() if made and len(readers) == 1 else block_of(path)
    found: dict[str, list[ir.Node]] = {"": []}
    for node in model.graph:
        if not _is_folded(node):
            found.setdefault(blocks[node], []).append(node)
    return {block: nodes for block, nodes in found.items() if nodes}


def _is_folded(node: ir.Node) -> bool:
    """Whether it computes from constants alone, which the runtime does once: part of a weight, not of the picture."""
    return bool(node.inputs) and all(value is None or constant(value) is not None for value in node.inputs)


def path_of(node: ir.Node) -> str:
    """The module path; empty where the names do not tell."""
    weight = next((value for value in node.inputs if value is not None and constant(value) is not None), None)
    path = module_path(node, weight)
    return "" if path.startswith("_") or path == node.name else path  # an exporter's own marks, and no module at all


def _shape(nodes: Sequence[ir.Node], block: str, matching: Matching) -> tuple[object, ...]:
    """Equal for two blocks that are drawn alike: operators, paths within the block, and who reads whom."""
    places = {value: place for place, node in enumerate(nodes) for value in node.outputs}
    return tuple(
        (
            node.op_type,
            _within(matching.path(node), block),
            node.metadata_props.get(PROVENANCE),
            *(node in known for known in (matching.quantized, matching.changed, matching.matched)),
            tuple(
                places.get(value, _weight_text(value) or _origin(value, block, matching)) if value is not None else None
                for value in node.inputs
            ),
        )
        for node in nodes
    )


def _within(path: str, block: str) -> str:
    return path.removeprefix(block).removeprefix(".") if block and path.startswith(block) else path


def _origin(value: ir.Value, block: str, matching: Matching) -> str:
    """Where a value of another block comes from, in words that are the same for all blocks; empty for constants."""
    producer = value.producer()
    if producer is None:
        return "" if constant(value) is not None else re.sub(r"\d+", "*", value.name or "")
    path = matching.path(producer)
    if _is_folded(producer):
        return ""
    if block_of(path):
        return "another block" if block else "blocks"
    return path or "elsewhere"


def _weight_text(value: ir.Value | None) -> str:
    """``256×1024 INT8`` of a constant matrix, else nothing."""
    tensor = constant(value)
    if tensor is None and value is not None and (producer := value.producer()) is not None and _is_folded(producer):
        tensor = next((found for item in producer.inputs if (found := constant(item)) is not None), None)
    if tensor is None:
        return ""
    sizes = [int(size) for size in tensor.shape.numpy()]
    return f"{'×'.join(map(str, sizes))} {tensor.dtype.name.lower()}" if len(sizes) > 1 and max(sizes) > 1 else ""


class _Block:
    """The units of a block's nodes: `of[i]` is the unit of node i."""

    def __init__(self, block: str, nodes: Sequence[ir.Node], matching: Matching) -> None:
        self.block, self.nodes, self.matching = block, nodes, matching
        places = {node: place for place, node in enumerate(nodes)}
        self.paths = [_within(matching.path(node), block) for node in nodes]
        self.readers: list[set[int]] = [set() for _ in nodes]
        for place, node in enumerate(nodes):
            for value in node.inputs:
                producer = value.producer() if value is not None else None
                if producer in places:
                    self.readers[places[producer]].add(place)
        self.of = list(range(len(nodes)))
        self.edges: dict[int, set[int]] = {place: readers - {place} for place, readers in enumerate(self.readers)}
        """Of each unit, those that read it."""
        self._sources: list[set[int]] = [set() for _ in nodes]
        for place, readers in self.edges.items():
            for reader in readers:
                self._sources[reader].add(place)
        for place in range(len(nodes)):
            self._join_readers(place)

    def _join_readers(self, place: int) -> None:
        """Make one unit of a node and those that read it, where all are of one module and nothing lies between."""
        if _quantizes(self.nodes[place]):
            return
        readers = [reader for reader in self.readers[place] if self.paths[reader] == self.paths[place]]
        for reader in sorted(readers):
            mine, theirs = self.of[place], self.of[reader]
            if mine != theirs and not self._detour(mine, theirs):
                self._join(mine, theirs)

    def _join(self, mine: int, theirs: int) -> None:
        self.of = [mine if unit == theirs else unit for unit in self.of]
        readers, sources = self.edges.pop(theirs), self._sources[theirs]
        for reader in readers:
            self._sources[reader] = self._sources[reader] - {theirs} | {mine}
        for source in sources:
            self.edges[source] = self.edges[source] - {theirs} | {mine}
        self.edges[mine] = (self.edges[mine] | readers) - {mine, theirs}
        self._sources[mine] = (self._sources[mine] | sources) - {mine, theirs}

    def _detour(self, start: int, end: int) -> bool:
        """Whether a way from one unit to the other leads through a third, so that joining them would make a circle."""
        edges = self.edges
        pending = [unit for unit in edges[start] if unit != end]
        seen = set(pending)
        while pending:
            for unit in edges[pending.pop()]:
                if unit == end:
                    return True
                if unit not in seen:
                    seen.add(unit)
                    pending.append(unit)
        return False

    def graph(self) -> tuple[dict[int, list[ir.Node]], DrawnGraph]:
        """The nodes of each unit, and the drawing: units in order, then where values come from and go to."""
        members: dict[int, list[ir.Node]] = defaultdict(list)
        for place, node in enumerate(self.nodes):
            members[self.of[place]].append(node)
        index = {unit: number for number, unit in enumerate(members)}
        units = [self._unit(unit, nodes) for unit, nodes in members.items()]
        edges = {(index[a], index[b]) for a, readers in self.edges.items() for b in readers}
        inside = set(self.nodes)
        outside: dict[str, int] = {}
        for unit, nodes in members.items():
            for value in (value for node in nodes for value in node.inputs if value is not None):
                if value.producer() in inside or constant(value) is not None:
                    continue
                if origin := _origin(value, self.block, self.matching):
                    if origin not in outside:
                        outside[origin] = len(units)
                        units.append(DrawnUnit(origin, (), 0, "outside"))
                    edges.add((outside[origin], index[unit]))
        leaving = {unit for unit, nodes in members.items() if any(_leaves(node, inside) for node in nodes)}
        if leaving:
            units.append(DrawnUnit("out", (), 0, "outside"))
            edges |= {(index[unit], len(units) - 1) for unit in leaving}
        return {index[unit]: nodes for unit, nodes in members.items()}, DrawnGraph(tuple(units), tuple(sorted(edges)))

    def _unit(self, unit: int, nodes: Sequence[ir.Node]) -> DrawnUnit:
        counted = Counter(node.op_type for node in nodes)
        names = [name for name, _ in counted.most_common(MOST_OPERATORS)]
        weights = {text for node in nodes for value in node.inputs if (text := _weight_text(value))}
        if len(weights) == 1:
            names.append(weights.pop())
        passes = {name for node in nodes for name in node.metadata_props.get(PROVENANCE, "").split(",") if name}
        label = self.paths[unit]
        if len(nodes) == 1 and _quantizes(nodes[0]):
            label = nodes[0].op_type
        return DrawnUnit(label or names[0], tuple(names), len(nodes), note=", ".join(sorted(passes)))


def _quantizes(node: ir.Node) -> bool:
    return has(node, "quantizes") and not node.domain  # functions of ours are drawn with what reads them


def _leaves(node: ir.Node, inside: set[ir.Node]) -> bool:
    return any(
        value.is_graph_output() or any(reader.node not in inside for reader in value.uses()) for value in node.outputs
    )


def _compared(before: _Block, after: _Block, matching: Matching) -> tuple[DrawnGraph, DrawnGraph]:
    """Both drawings, each unit with what became of it."""

    def fate(nodes: Sequence[ir.Node], alone: Fate) -> Fate:
        if any(node in matching.quantized for node in nodes if not _quantizes(node)):
            return "quantized"
        known = [node for node in nodes if node in matching.matched]
        if not known:
            return alone
        return "same" if len(known) == len(nodes) and matching.changed.isdisjoint(nodes) else "changed"

    (old_members, old), (new_members, new) = before.graph(), after.graph()
    return (
        _painted(old, {unit: fate(nodes, "removed") for unit, nodes in old_members.items()}),
        _painted(new, {unit: fate(nodes, "added") for unit, nodes in new_members.items()}),
    )


def _alike(a: ir.Node, b: ir.Node) -> bool:
    by = [node.metadata_props.get(PROVENANCE) for node in (a, b)]
    return a.op_identifier() == b.op_identifier() and by[0] == by[1]


def _painted(graph: DrawnGraph, fates: dict[int, Fate]) -> DrawnGraph:
    units = tuple(
        replace(unit, fate=fates[place]) if place in fates else unit for place, unit in enumerate(graph.units)
    )
    return replace(graph, units=units)
