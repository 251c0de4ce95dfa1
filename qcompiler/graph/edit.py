"""Small, safe edits of an `onnx_ir` graph: constants, insertion, unique names, provenance."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import onnx_ir as ir

from qcompiler.graph.metadata import PROVENANCE
from qcompiler.graph.walk import all_nodes, bodies


def constant(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The tensor of an initializer, or None where the value is computed or can be fed by the caller.

    Reads no data: shape and type are known without touching the file that holds it.
    """
    if value is None or value.const_value is None or value.is_graph_input():
        return None
    return value.const_value


def array(value: ir.Value) -> np.ndarray:
    """The data of a constant as an array; it may be a view of a memory-mapped file."""
    tensor = constant(value)
    if tensor is None:
        raise ValueError(f"{value.name!r} is not a constant")
    return tensor.numpy()


class Names:
    """Hands out names that no value or node of a graph has. Make one for each edit session of a graph."""

    def __init__(self, graph: ir.Graph) -> None:
        self._counts: dict[str, int] = {}
        self._taken: set[str] = {value.name for value in graph.inputs if value.name}
        self._taken.update(graph.initializers)
        for node in all_nodes(graph):
            self._taken.add(node.name or "")
            self._taken.update(value.name for value in node.outputs if value.name)
            for body in bodies(node):  # the initializers and inputs of bodies of If and Loop
                self._taken.update(body.initializers)
                self._taken.update(value.name for value in body.inputs if value.name)

    def fresh(self, base: str) -> str:
        """`base` itself where it is free, else `base@2`, `base@3`, …"""
        return unique(base, self._taken, self._counts)


def unique(base: str, taken: set[str], counts: dict[str, int]) -> str:
    """`base`, or with the lowest number that makes it free, which is taken then.

    `counts` is where the search goes on for a base: thousands of nodes may want the same.
    """
    name, count = base, counts.get(base, 1)
    while name in taken:
        count += 1
        name = f"{base}@{count}"
    counts[base] = count
    taken.add(name)
    return name


def add_constant(graph: ir.Graph, name: str, data: np.ndarray | ir.TensorProtocol) -> ir.Value:
    """Register a new initializer; `name` must be free (see `Names`)."""
    if isinstance(data, np.ndarray | np.generic):
        data = ir.tensor(np.ascontiguousarray(data) if np.ndim(data) else np.asarray(data), name=name)
    value = ir.Value(name=name, type=ir.TensorType(data.dtype), shape=ir.Shape(data.shape.numpy()), const_value=data)
    graph.register_initializer(value)
    return value


def set_constant(node: ir.Node, index: int, data: np.ndarray | ir.TensorProtocol, names: Names) -> ir.Value:
    """Replace the constant input `index` of `node`; other readers of the old constant keep it (copy-on-write).

    Exporters merge equal constants, so a norm's gain may well be another norm's gain, too. Where nobody else reads the
    old constant, it gets the new data.
    """
    old = node.inputs[index]
    if old is None or constant(old) is None or node.graph is None:
        raise ValueError(f"input {index} of {node.name!r} is not a constant")
    graph = owner(old) or node_graph(node)
    if isinstance(data, np.ndarray | np.generic):
        data = ir.tensor(np.ascontiguousarray(data) if np.ndim(data) else np.asarray(data), name=old.name)
    if len(old.uses()) == 1 and not old.is_graph_output() and graph.initializers.get(old.name or "") is old:
        del graph.initializers[old.name or ""]  # it goes to the end, as a new one would
        old.const_value, old.type, old.shape = data, ir.TensorType(data.dtype), ir.Shape(data.shape.numpy())
        old.metadata_props.clear()  # what an exporter noted was about the old numbers
        graph.register_initializer(old)
        return old
    node.replace_input_with(index, None)
    name = old.name or node.name or "constant"
    new = add_constant(graph, names.fresh(name) if name in graph.initializers else name, data)
    node.replace_input_with(index, new)
    return new


def owner(value: ir.Value) -> ir.Graph | None:
    """The graph that a value belongs to."""
    graph = value.graph
    return graph if isinstance(graph, ir.Graph) else None


def node_graph(node: ir.Node) -> ir.Graph:
    graph = node.graph
    if not isinstance(graph, ir.Graph):
        raise ValueError(f"node {node.name!r} is not part of a graph")
    return graph


def remove_unused_constant(value: ir.Value) -> None:
    """Drop an initializer that nobody reads any more."""
    graph = owner(value)
    if graph is None or value.uses() or value.is_graph_output() or value.is_graph_input():
        return
    if value.name is not None and graph.initializers.get(value.name) is value:
        del graph.initializers[value.name]


def insert_before(anchor: ir.Node, nodes: Sequence[ir.Node]) -> None:
    node_graph(anchor).insert_before(anchor, nodes)


def insert_after(anchor: ir.Node, nodes: Sequence[ir.Node]) -> None:
    node_graph(anchor).insert_after(anchor, nodes)


def new_node(
    op_type: str, inputs: Sequence[ir.Value | None], name: str, *, like: ir.Value | None = None, domain: str = "",
    dtype: ir.DataType | None = None, shape: ir.Shape | None = None, attributes: dict[str, object] | None = None,
) -> ir.Node:  # fmt: skip
    """A node with one output that carries the node's name; type and shape as given, or as `like` has them."""
    output = ir.Value(
        name=name,
        type=ir.TensorType(dtype) if dtype is not None else (like.type if like is not None else None),
        shape=shape if shape is not None else (like.shape if like is not None else None),
    )
    attrs = [ir.convenience.convert_attribute(key, item) for key, item in (attributes or {}).items()]
    return ir.Node(domain, op_type, inputs, attrs, outputs=[output], name=name)


def add_provenance(node: ir.Node, pass_name: str) -> None:
    """Note on the node that a pass made or changed it; the note survives saving, and a diff reads it."""
    before = node.metadata_props.get(PROVENANCE)
    if before is None or pass_name not in before.split(","):
        node.metadata_props[PROVENANCE] = f"{before},{pass_name}" if before else pass_name


def inherit(new: Iterable[ir.Node], old: ir.Node, pass_name: str) -> None:
    """Give nodes that stand for `old` its metadata (module path, earlier provenance), and add this pass."""
    for node in new:
        node.metadata_props.update(old.metadata_props)
        add_provenance(node, pass_name)


def remove_node_if_unused(node: ir.Node) -> None:
    """Remove a node whose outputs nobody reads, then the producers and constants that only it read."""
    if any(value.uses() or value.is_graph_output() for value in node.outputs):
        return
    inputs = [value for value in node.inputs if value is not None]
    node_graph(node).remove(node, safe=True)
    for value in inputs:
        producer = value.producer()
        if producer is not None:
            if producer.graph is not None:
                remove_node_if_unused(producer)
        else:
            remove_unused_constant(value)


def replace_output(old: ir.Node, new: ir.Value) -> None:
    """Let `new` take the place and the name of the node's output, and remove what nobody needs any more."""
    output = old.outputs[0]
    name = output.name
    output.replace_all_uses_with(new, replace_graph_outputs=True)
    remove_node_if_unused(old)
    output.name, new.name = None, name
