"""Draws each block of two models side by side, with what became of its nodes, as the report of a compilation does."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence

import onnx_ir as ir

from qcompiler.graph.module_path import block_of
from qcompiler.model_diff.fates import fate_of_pair
from qcompiler.model_diff.layers import Layer
from qcompiler.model_diff.pairing import LayerPair
from qcompiler.model_diff.stories import LayerStory
from qcompiler.report.drawing import Matching, drawings, path_of, readers_of
from qcompiler.report.pictures import Drawing

QUANTIZED = ("quantized", "requantized")


def draw(
    first: ir.Model, second: ir.Model, nodes: Mapping[ir.Node, ir.Node], layers: Sequence[LayerPair],
    stories: Sequence[LayerStory], caches: Sequence[LayerStory], same: Mapping[str, str],
) -> tuple[tuple[Drawing, ...], str]:  # fmt: skip
    """The drawings, and why some blocks have none; `nodes` are those of the first model with their twins.

    `stories` are those of `layers`, in their order.
    """
    quantized: set[ir.Node] = set()
    changed: set[ir.Node] = set()
    twins, told = dict(nodes), set[ir.Node]()
    for pair, story in zip(layers, stories, strict=True):
        if len(pair.before) == len(pair.after) == 1:
            twins[pair.before[0].node] = pair.after[0].node
        both = [node for layer in (*pair.before, *pair.after) for node in _members(layer)]
        told.update(both)
        if story.fate in QUANTIZED:
            quantized.update(both)
        elif story.fate != "untouched":
            changed.update(both)
    for place, model in enumerate((first, second)):
        forms = [(story.before, story.after)[place] for story in caches if story.fate in QUANTIZED]
        quantized.update(readers_of(model, {form.name for form in forms if form is not None}))
    for node, other in twins.items():
        if node in told:
            continue
        fate = fate_of_pair(node, other, same)[0]
        if fate != "untouched":
            (quantized if fate == "quantized" else changed).update((node, other))
    matching = Matching(twins, frozenset(quantized), frozenset(changed), _paths(second, twins))
    return drawings(first, second, matching)


def _members(layer: Layer) -> Iterator[ir.Node]:
    """The nodes of a layer without those that quantize its input."""
    around = layer.activation.nodes
    yield layer.node
    yield from (node for node in layer.nodes if node not in around)


def _paths(second: ir.Model, twins: Mapping[ir.Node, ir.Node]) -> dict[ir.Node, str]:
    """Nodes of the second model under the paths of the first, and in its blocks, as exporters name them differently."""
    found = {other: path_of(node) for node, other in twins.items()}
    votes: dict[str, Counter[str]] = defaultdict(Counter)
    for node, path in found.items():
        if theirs := block_of(path_of(node)):
            votes[theirs][block_of(path)] += 1
    blocks = {theirs: counted.most_common(1)[0][0] for theirs, counted in votes.items()}
    for node in second.graph:
        path = path_of(node)
        theirs = block_of(path)
        if node not in found and (mine := blocks.get(theirs)):
            found[node] = mine + path.removeprefix(theirs)
    return found
