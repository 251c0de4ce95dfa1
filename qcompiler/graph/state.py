"""What a model is at a moment, but for the numbers of its constants, so that changes can be told later."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import onnx_ir as ir

from qcompiler.graph.walk import all_nodes, graphs_of

Said = tuple[Any, ...]


def state_of(model: ir.Model, leave_out: Collection[str] = ()) -> list[Any]:
    """Two states that compare equal are the same to all who read no numbers, and no metadata of nodes by these keys.

    Nodes and values are compared by identity; as the state holds them, no new one takes the place of one that is gone.
    """
    state: list[Any] = [dict(model.opset_imports)]
    for graph in graphs_of(model):
        for values in (graph.inputs, graph.outputs, graph.initializers.values()):
            state.append([said_of(value) for value in values])
    for node in all_nodes(model.graph):
        noted = node.metadata_props
        if noted:
            noted = {key: text for key, text in noted.items() if key not in leave_out}
        state.append((node, node.name, node.op_type, node.domain, noted or None, node.inputs,
                      *node.attributes.data.values(), *map(said_of, node.outputs)))  # fmt: skip
    return state


def said_of(value: ir.Value) -> Said:
    """A value, and what is said of it; sizes as they are now, as some shapes can be changed in place."""
    kind, shape, held = value.type, value.shape, value.const_value
    dtype, sizes = None if kind is None else kind.dtype, None if shape is None else shape.dims
    return value, value.name, type(kind), dtype, sizes, None if held is None else tuple(held.shape)
