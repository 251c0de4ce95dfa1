"""An edit session of a model by one pass: what it makes has a name of its own, and says who made it.

    rw = Rewriter(model, self.name)
    scale = rw.constant("fc.scale", np.float32(0.5))
    scaled = rw.node("Mul", [x, scale], "fc.scaled", like=x)
    rw.insert_before(fc, [scaled])                                          with the metadata of fc

A base name that is taken becomes ``base@2``, ``base@3`` …
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import onnx_ir as ir

from qcompiler.graph import edit
from qcompiler.graph.edit import Names


class Rewriter:
    """Make one for each run of a pass: it knows the names of the model as it is now."""

    def __init__(self, model: ir.Model, pass_name: str) -> None:
        self.model, self.pass_name = model, pass_name
        self._names = Names(model.graph)

    @property
    def graph(self) -> ir.Graph:
        """The main graph; a site may stand in a subgraph (`node_graph`)."""
        return self.model.graph

    def fresh(self, base: str) -> str:
        """A name that no value or node has: `base` where it is free."""
        return self._names.fresh(base)

    def constant(self, base: str, data: np.ndarray | ir.TensorProtocol, graph: ir.Graph | None = None) -> ir.Value:
        """A new initializer of `graph` (default: the main graph)."""
        return edit.add_constant(self.graph if graph is None else graph, self.fresh(base), data)

    def set_constant(self, node: ir.Node, index: int, data: np.ndarray | ir.TensorProtocol) -> ir.Value:
        """Replace the constant input `index` of `node`; other readers of the old constant keep it (copy-on-write)."""
        return edit.set_constant(node, index, data, self._names)

    def node(
        self, op_type: str, inputs: Sequence[ir.Value | None], base: str, *, like: ir.Value | None = None,
        domain: str = "", dtype: ir.DataType | None = None, shape: ir.Shape | None = None,
        attributes: dict[str, object] | None = None,
    ) -> ir.Node:  # fmt: skip
        """A node with one output of the same name, not yet in a graph; type and shape as given, or as of `like`."""
        return edit.new_node(
            op_type, inputs, self.fresh(base), like=like, domain=domain, dtype=dtype, shape=shape,
            attributes=attributes,
        )  # fmt: skip

    def mark(self, node: ir.Node) -> None:
        """Note on a node that this pass changed it."""
        edit.add_provenance(node, self.pass_name)

    def inherit(self, new: Iterable[ir.Node], old: ir.Node) -> None:
        """Give nodes that stand for `old` its metadata (module path, earlier provenance), and mark them."""
        edit.inherit(new, old, self.pass_name)

    def insert_before(self, anchor: ir.Node, new: Sequence[ir.Node]) -> None:
        """Put nodes in front of `anchor`, with its metadata."""
        self.inherit(new, anchor)
        edit.insert_before(anchor, new)

    def insert_after(self, anchor: ir.Node, new: Sequence[ir.Node]) -> None:
        """Put nodes behind `anchor`, with its metadata."""
        self.inherit(new, anchor)
        edit.insert_after(anchor, new)

    def replace(self, old: ir.Node, new: Sequence[ir.Node]) -> None:
        """Put nodes in the place of `old`, with its metadata; the output of the last takes its output's name."""
        self.insert_before(old, new)
        edit.replace_output(old, new[-1].outputs[0])
