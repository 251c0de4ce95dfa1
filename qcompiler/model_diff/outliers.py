"""Layers of which a few input columns are multiplied apart, in float: one layer again, as a person sees it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import onnx_ir as ir

from qcompiler.graph.metadata import PART_OF
from qcompiler.model_diff.layers import Layer
from qcompiler.model_diff.weights import Weight
from qcompiler.sites.stored.constants import evaluate, source
from qcompiler.sites.stored.layout import Array


@dataclass(frozen=True, eq=False)
class _Joined(Weight):
    rows: ir.Value | None = None
    """What the columns meet, in float."""

    @property
    def constants(self) -> tuple[ir.Value, ...]:
        return self.stored.constants if self.rows is None else (*self.stored.constants, self.rows)


def joined(model: ir.Model, layers: Iterable[Layer]) -> list[Layer]:
    """The layers with the weights of such columns, and with the sum of both products as output."""
    products = {
        node.metadata_props[PART_OF]: node
        for node in model.graph.all_nodes()
        if PART_OF in node.metadata_props and node.op_type == "MatMul"
    }
    found = [(layer, products.get(str(layer.node.name))) for layer in layers]
    return [layer if product is None else _joined(layer, product) for layer, product in found]


def _joined(layer: Layer, product: ir.Node) -> Layer:
    columns, rows = _columns(product), source(product.inputs[1])
    total = _sum(layer.output, product.outputs[0])
    weight = layer.weight
    note = "outlier columns stay float, found at run time"  # of the whole weight, of which nothing is taken out
    if columns is not None and rows is not None:
        note = f"{len(columns)} outlier column{' stays' if len(columns) == 1 else 's stay'} float"
        numbers = layer.weight.matrix
        weight = _Joined(
            weight.stored, weight.shape, lambda: _whole(numbers(), columns, rows), weight.nodes, rows=rows
        )  # fmt: skip
    output = layer.output if total is None else total.outputs[0]
    nodes = layer.nodes if total is None else (*layer.nodes, total)
    return replace(layer, weight=weight, output=output, nodes=nodes, notes=(*layer.notes, note))


def _columns(product: ir.Node) -> Array | None:
    """Which columns of its input a product takes; None where that is found at run time."""
    picked = product.inputs[0].producer() if product.inputs[0] is not None else None
    if picked is not None and picked.op_type == "Cast" and picked.inputs[0] is not None:
        picked = picked.inputs[0].producer()
    return evaluate(picked.inputs[1]) if picked is not None and picked.op_type == "Gather" else None


def _whole(data: Array | None, columns: Array, rows: ir.Value) -> Array | None:
    """The weight [outputs, inputs] with those columns, of which `data` has zeros."""
    numbers = evaluate(rows)
    if data is None or numbers is None:
        return None
    whole = data.copy()
    whole[:, columns] = numbers.T
    return whole


def _sum(rest: ir.Value, product: ir.Value) -> ir.Node | None:
    """The Add of both, perhaps behind a Cast of either."""
    readers = [{use.node for part in _cast(value) for use in part.uses()} for value in (rest, product)]
    both = [node for node in readers[0] & readers[1] if node.op_type == "Add"]
    return both[0] if len(both) == 1 else None


def _cast(value: ir.Value) -> list[ir.Value]:
    return [value, *(use.node.outputs[0] for use in value.uses() if use.node.op_type == "Cast")]
