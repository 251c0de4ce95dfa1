"""What became of each node of the first model, counted: quantized, folded, cast, fused, untouched …"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from qcompiler.formats.scheme import Scheme, in_words
from qcompiler.graph.edit import constant
from qcompiler.graph.operators import attends, continuations, quantized
from qcompiler.model_diff.changes import given_inputs, nodes_of, operator
from qcompiler.model_diff.layers import Layer
from qcompiler.model_diff.pairing import LayerPair
from qcompiler.model_diff.stories import LayerStory
from qcompiler.sites.activations import activation_of, coded_activation, quantizes, through_quantization
from qcompiler.sites.stored import operand_weight
from qcompiler.sites.stored_caches import stored_cache

FATES = ("quantized", "dequantized", "cast", "fused", "folded", "scaled", "changed", "replaced", "untouched", "removed")


@dataclass(frozen=True)
class Fate:
    """Nodes of the first model of one operator that share a fate."""

    fate: str
    op: str
    after: str
    """The operator that they are now, or are part of; empty where they are gone."""
    count: int
    activations: str = ""
    """How the values that they read are quantized."""


def count_fates(
    a: ir.Model, nodes: Mapping[ir.Node, ir.Node], layers: Sequence[LayerPair], stories: Sequence[LayerStory],
    same: Mapping[str, str],
) -> tuple[Fate, ...]:  # fmt: skip
    told = {layer.node: (story, pair) for pair, story in zip(layers, stories, strict=True) for layer in pair.before}
    constants, matched = _of_constants(a), set(nodes.values())
    known = {operator(node) for node in nodes_of(a)}
    related = not layers or any(pair.before and pair.after for pair in layers)
    found: Counter[tuple[str, str, str, str]] = Counter()
    gone: dict[ir.Node, ir.Node | None] = {}
    for node in nodes_of(a):
        other = nodes.get(node)
        if node in told and told[node][1].after:
            story, pair = told[node]
            layer = pair.after[0]
            after = operator(layer.node) if layer.op == layer.node.op_type else layer.op
            found[story.fate, operator(node), after, in_words(None, layer.activation.scheme)] += 1
        elif other is not None:
            fate, op, after, activations = fate_of_pair(node, other, same)
            core = _core(other, matched, known)
            if fate == "replaced" and core is not other:  # it only took the place of the last of what was fused
                fate, after = "fused", operator(core)
            found[fate, op, after, activations] += 1
        elif node in constants:
            found["folded", operator(node), "", ""] += 1
        else:
            into = _fused_into(node, nodes, told, matched) if related else None
            gone[node] = into if into is None else _core(into, matched, known)
    shared = Counter(into for into in gone.values() if into is not None)
    for node, into in gone.items():
        if into is None:
            found["removed", operator(node), "", ""] += 1
        elif into not in matched and operator(into) in known:  # one of several that do the same in another way
            found["replaced", operator(node), "", ""] += 1
        else:
            fate = "fused" if shared[into] > 1 or into in matched else "replaced"
            found[fate, operator(node), operator(into), ""] += 1
    order = {fate: place for place, fate in enumerate(FATES)}
    rows = sorted(found.items(), key=lambda item: (order.get(item[0][0], len(order)), -item[1], item[0]))
    return tuple(Fate(fate, op, after, count, activations) for (fate, op, after, activations), count in rows)


def fate_of_pair(node: ir.Node, other: ir.Node, same: Mapping[str, str]) -> tuple[str, str, str, str]:
    """Fate, both operators, and how what it reads is quantized, of a node that no layer's story is about."""
    names = operator(node), operator(other)
    rounded = next((found for value in other.inputs if (found := activation_of(value).scheme) is not None), None)
    before = any(activation_of(value).scheme is not None for value in node.inputs)
    if other.op_type.startswith("QLinear") and not node.op_type.startswith("QLinear") and quantized(other):
        first = quantized(other)[0]  # the result comes last
        return ("quantized", *names, in_words(None, coded_activation(other, first).scheme))
    if (caches := _stored_caches(other)) and not _stored_caches(node):
        return ("quantized", *names, ", ".join(f"cache {scheme}" for scheme in caches))
    if rounded is not None and not before and not quantizes(node):
        return ("quantized", *names, in_words(None, rounded))
    if _narrowed(node, other):
        return ("cast", *names, "")
    if names[0] != names[1]:
        return ("replaced", *names, "")
    return (_kept(node, other, same), *names, "")


def _stored_caches(node: ir.Node) -> tuple[Scheme, ...]:
    """The schemes of the caches, each once, that an operator continues and reads as codes itself."""
    pasts = [node.inputs[index] for index in continuations(node) if index < len(node.inputs)] if attends(node) else []
    found = [stored_cache(past) for past in pasts if past is not None]
    return tuple(dict.fromkeys(scheme for scheme in found if scheme is not None))


def _narrowed(node: ir.Node, other: ir.Node) -> bool:
    """Whether the node computes in another float type now."""
    for a, b in zip((*node.outputs, *node.inputs), (*other.outputs, *other.inputs), strict=False):
        if a is None or b is None or a.dtype is None or b.dtype is None:
            continue
        if a.dtype != b.dtype and a.dtype.is_floating_point() and b.dtype.is_floating_point():
            return True
    return False


def _kept(node: ir.Node, other: ir.Node, same: Mapping[str, str]) -> str:
    """Untouched where it has the same attributes, constants and sources; who writes a source may have changed."""
    mine, theirs = given_inputs(node), given_inputs(other)
    if len(mine) != len(theirs) or set(node.attributes) != set(other.attributes):
        return "changed"
    if any(str(item.value) != str(other.attributes[name].value) for name, item in _plain(node)):
        return "changed"
    for a, b in zip(mine, theirs, strict=True):
        if (constant(a) is not None) != (constant(b) is not None):
            return _stored_otherwise(a, b)
        if constant(a) is None or a is None or b is None:
            continue
        if same.get(str(b.name)) != a.name:
            return "scaled" if _is_vector(a) and _is_vector(b) else "changed"
    return "untouched"


def _stored_otherwise(a: ir.Value | None, b: ir.Value | None) -> str:
    """Fate of who reads a constant that the other model computes."""
    before, after = operand_weight(a), operand_weight(b)
    if before is None or after is None or before.quantized == after.quantized:
        return "changed"
    return "quantized" if after.quantized else "dequantized"


def _plain(node: ir.Node) -> Iterator[tuple[str, ir.Attr]]:
    skipped = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS, ir.AttributeType.TENSOR)
    yield from ((name, item) for name, item in node.attributes.items() if item.type not in skipped)


def _is_vector(value: ir.Value | None) -> bool:
    tensor = constant(value)
    return tensor is not None and tensor.dtype.is_floating_point() and len(tensor.shape) > 0 and tensor.size > 1


def _of_constants(model: ir.Model) -> set[ir.Node]:
    """Nodes that read constants alone."""
    found: set[ir.Node] = set()
    for node in model.graph.all_nodes():
        inputs = [value for value in node.inputs if value is not None]
        if inputs and all(constant(value) is not None or value.producer() in found for value in inputs):
            found.add(node)
    return found


def _fused_into(
    node: ir.Node, nodes: Mapping[ir.Node, ir.Node], told: Mapping[ir.Node, tuple[LayerStory, LayerPair]],
    matched: set[ir.Node],
) -> ir.Node | None:  # fmt: skip
    """The node of the second model that computes what an unmatched node did; None where none does.

    That is what stands, in the second model, where the first one has unmatched nodes: before the counterpart of the
    nearest matched reader, or that reader itself where its operator is another one now.
    """
    seen, pending = {node}, [node]
    while pending:
        current = pending.pop()
        for value in current.outputs:
            for reader, index in value.uses():
                if reader in seen:
                    continue
                seen.add(reader)
                other = _counterpart(reader, nodes, told)
                if other is None:
                    pending.append(reader)
                    continue
                if operator(other) != operator(reader) and reader not in told:
                    return other
                source = through_quantization(other.inputs[index]) if index < len(other.inputs) else None
                writer = source.producer() if source is not None else None
                if writer is not None and writer not in matched and not quantizes(writer):
                    return writer
    return _writer(node, nodes, told)


def _core(node: ir.Node, matched: set[ir.Node], known: set[str]) -> ir.Node:
    """The operator that the first model does not have, where `node` only prepares its result for what follows."""
    current: ir.Node | None = node
    while current is not None and operator(current) in known:
        value = through_quantization(current.inputs[0]) if current.inputs else None
        current = value.producer() if value is not None else None
        if current in matched:
            return node
    return current or node


def _counterpart(
    node: ir.Node, nodes: Mapping[ir.Node, ir.Node], told: Mapping[ir.Node, tuple[LayerStory, LayerPair]]
) -> ir.Node | None:
    if node in told and told[node][1].after:
        return told[node][1].after[0].node
    return nodes.get(node)


def _writer(
    node: ir.Node, nodes: Mapping[ir.Node, ir.Node], told: Mapping[ir.Node, tuple[LayerStory, LayerPair]]
) -> ir.Node | None:
    """A bias or a cast that the layer before has taken in: that layer, where its operator is another one now."""
    for value in node.inputs:
        producer = value.producer() if value is not None else None
        other = _counterpart(producer, nodes, told) if producer is not None else None
        if producer is not None and other is not None and operator(other) != operator(producer):
            return other
    return None


__all__ = ["FATES", "Fate", "Layer", "count_fates"]
