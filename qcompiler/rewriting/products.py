"""Adds to a layer what another product gives: the sum takes the place and the name of the layer's output."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from qcompiler.graph.edit import insert_after
from qcompiler.graph.metadata import PART_OF
from qcompiler.graph.rewriter import Rewriter
from qcompiler.sites.find import Linear


def add_product(linear: Linear, product: Sequence[ir.Node], rw: Rewriter) -> None:
    """Add to a layer's output the result of the last of some nodes; the sum takes the output's place and name.

    The nodes must not be in the graph yet. They become a part of the layer, which no pass takes for a layer of its own.
    """
    last = linear.bias_node or linear.node
    output, name = linear.output, linear.output.name
    total = rw.node("Add", [None, product[-1].outputs[0]], f"{linear.name}.sum", like=output)
    output.replace_all_uses_with(total.outputs[0], replace_graph_outputs=True)
    total.replace_input_with(0, output)
    output.name = rw.fresh(f"{name}.rest")
    total.outputs[0].name = name
    rw.inherit([*product, total], linear.node)
    for node in product:
        node.metadata_props[PART_OF] = linear.name
    insert_after(last, [*product, total])
