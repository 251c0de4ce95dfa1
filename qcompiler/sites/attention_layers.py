"""Finds the linear layers around attention, whatever an exporter calls them and however it writes attention down.

    softmax(q kᵀ) v        q, k, v = x W_q, x W_k, x W_v (or one packed x W), y = heads W_o

Attention is one operator (its name ends in Attention), or a Softmax between two products of computed values. Its
projections are the layers whose outputs reach it, and those that it reaches, without another linear layer between. What
lies between may be anything: rotary angles, norms of heads, a cache, Reshape and Transpose. Only operators are looked
at, never names or shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import onnx_ir as ir

from qcompiler.graph.edit import constant
from qcompiler.graph.operators import attends, has, multiplies_floats
from qcompiler.sites.kinds import Linear


def find_attention_projections(model: ir.Model, linears: Iterable[Linear]) -> tuple[Linear, ...]:
    """Those that write attention's queries, keys and values, or read its result, in order; `linears` is all there are.

    A softmax over the outputs of a router, or at the end of a classifier, is no attention: no product of computed
    values stands before it.
    """
    by_node = {linear.node: linear for linear in linears}

    def is_layer(node: ir.Node) -> bool:
        """A linear layer, or a part of one that is no site of its own."""
        return node in by_node or (_is_product(node) and any(constant(value) is not None for value in node.inputs))

    first: set[ir.Node] = set()
    last: set[ir.Node] = set()
    for node in model.graph.all_nodes():
        if node.domain not in ("", "com.microsoft"):
            continue
        if attends(node):
            first.add(node)
            last.add(node)
        elif node.op_type == "Softmax":
            scores, results = (
                {product for product in _walk([node], step, _is_product) if not is_layer(product)}
                for step in (_above, _below)
            )
            if scores and results:
                first |= scores | results
                last |= results
    found = _walk(first, _above, is_layer) | _walk(last, _below, is_layer)
    return tuple(linear for node, linear in by_node.items() if node in found)


def _is_product(node: ir.Node) -> bool:
    return multiplies_floats(node) and not has(node, "convolution")


def _walk(
    starts: Iterable[ir.Node], step: Callable[[ir.Node], Iterator[ir.Node]], wanted: Callable[[ir.Node], bool]
) -> set[ir.Node]:
    """The nearest nodes that are wanted, on all ways in the direction of `step`."""
    pending, seen, found = list(starts), set[ir.Node](), set[ir.Node]()
    while pending:
        for node in step(pending.pop()):
            if node in seen or has(node, "measures"):
                continue
            seen.add(node)
            if wanted(node):
                found.add(node)
            else:
                pending.append(node)
    return found


def _above(node: ir.Node) -> Iterator[ir.Node]:
    for value in node.inputs:
        producer = value.producer() if value is not None else None
        if producer is not None:
            yield producer


def _below(node: ir.Node) -> Iterator[ir.Node]:
    for value in node.outputs:
        for use in value.uses():
            yield use.node
