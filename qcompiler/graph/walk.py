"""Every node, and every graph, of a model: as onnx_ir walks it, in a fraction of the time, and at any depth alike."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

_BODIES = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)


def bodies(node: ir.Node) -> list[ir.Graph]:
    """The bodies of If, Loop and Scan, in order."""
    found: list[ir.Graph] = []
    for attribute in node.attributes.data.values():
        if attribute.type in _BODIES and not attribute.is_ref():
            found += [attribute.value] if attribute.type == ir.AttributeType.GRAPH else attribute.value
    return found


def all_nodes(graph: ir.Graph | ir.Function) -> Iterator[ir.Node]:
    """The nodes of a graph, those of bodies behind the node that has them. The graph may be changed on the way."""
    waiting: list[Iterator[ir.Node]] = [iter(graph)]
    while waiting:
        for node in waiting[-1]:
            yield node
            if node.attributes.data and (inner := bodies(node)):
                waiting += map(iter, reversed(inner))
                break
        else:
            waiting.pop()


def graphs_of(model: ir.Model) -> Iterator[ir.Graph]:
    """The main graph, and the bodies in it."""
    yield model.graph
    for node in all_nodes(model.graph):
        if node.attributes.data:
            yield from bodies(node)
