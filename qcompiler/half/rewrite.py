"""Carries out a `half_plan`: gives nodes, constants, graph inputs and outputs their types, with Casts between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from qcompiler.functions.library import DOMAIN
from qcompiler.graph.edit import (
    add_constant,
    constant,
    insert_before,
    remove_node_if_unused,
    remove_unused_constant,
)
from qcompiler.graph.metadata import PART_OF
from qcompiler.graph.operators import OPERATORS
from qcompiler.graph.rewriter import Rewriter
from qcompiler.half.constants import mask_value, rounded
from qcompiler.half.decided import HalfPlan
from qcompiler.half.types import FLOAT, following, gives_output_dtype

TYPE_ATTRIBUTES = ("to", "output_dtype")
"""Attributes that state the type of the output."""


def convert(model: ir.Model, plan: HalfPlan, stays: Callable[[str], bool], pass_name: str) -> int:
    """Rewrite the model in place. `stays` says which graph inputs and outputs keep their type, by name.

    Returns by how many bytes constants shrank that no pass quantized: scales, and columns that were split off, are left
    out.
    """
    conversion = _Conversion(model, plan, pass_name)
    conversion.inputs(stays)
    for node in list(model.graph):
        if node in plan.modes:
            conversion.node(node)
    conversion.outputs(stays)
    conversion.clean_up()
    return conversion.narrowed()


class _Conversion:
    def __init__(self, model: ir.Model, plan: HalfPlan, pass_name: str) -> None:
        self.graph, self.plan, self.half = model.graph, plan, plan.dtype
        self._rw = Rewriter(model, pass_name)
        self.floats = set(plan.kinds)
        """Values that were float32."""
        self._made: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
        self._copies: list[tuple[ir.Node, ir.Node]] = []
        self._constants: list[tuple[ir.Value, ir.Value]] = []
        self._mask: tuple[ir.Value, ir.Value] | None = None

    # ------------------------------------------------------------------------------------------------ the graph's ends

    def inputs(self, stays: Callable[[str], bool]) -> None:
        for value in self.graph.inputs:
            if self.plan.is_half(value) and not stays(str(value.name)):
                value.type = ir.TensorType(self.half)

    def outputs(self, stays: Callable[[str], bool]) -> None:
        for index, value in enumerate(self.graph.outputs):
            name = str(value.name)
            if value not in self.floats or value in self.plan.large:
                continue
            wanted = FLOAT if stays(name) else self.half
            if value.dtype == wanted:
                continue
            given = self.typed(value, wanted)
            if given.is_graph_output():  # one value under two names
                given = self._after(value, [self._cast(given, wanted, f"{name}.copy")])
            self.graph.outputs[index] = given
            value.name = self._rw.fresh(f"{name}.{value.dtype.name.lower()}" if value.dtype is not None else name)
            given.name = name
            self._copies = [pair for pair in self._copies if pair[1] is not given.producer()]

    # ----------------------------------------------------------------------------------------------------- nodes

    def node(self, node: ir.Node) -> None:
        mode, form = self.plan.modes[node], self.plan.forms.get(node)
        if mode == "untouched":
            self._untouched(node)
            return
        for index, value in enumerate(node.inputs):
            if value is None or not self._was_float(value):
                continue
            wanted = FLOAT
            if mode == "half" and (form is None or index in form.inputs):
                wanted = self.half
            node.replace_input_with(index, self.typed(value, wanted))
        self._captured(node)
        if mode != "half":
            return
        for value in node.outputs:
            if value in self.floats and (form is None or value.index() in form.outputs):
                value.type = ir.TensorType(self.half)
        self._state_type(node)
        self._rw.inherit([node], node)

    def _was_float(self, value: ir.Value) -> bool:
        return value in self.floats or (constant(value) is not None and value.dtype == FLOAT)

    def _untouched(self, node: ir.Node) -> None:
        """A Cast to the type that its input has by now gives the input."""
        source, output = node.inputs[0], node.outputs[0]
        if node.op_type != "Cast" or source is None or source.dtype != output.dtype or output.is_graph_output():
            return
        output.replace_all_uses_with(source)
        remove_node_if_unused(node)

    def _captured(self, node: ir.Node) -> None:
        """What bodies of If, Loop and Scan read from outside stays in float32."""
        for attribute in node.attributes.values():
            if attribute.type != ir.AttributeType.GRAPH:
                continue
            for inner in attribute.as_graph().all_nodes():
                for index, value in enumerate(inner.inputs):
                    if value is not None and value.graph is self.graph and self._was_float(value):
                        inner.replace_input_with(index, self.typed(value, FLOAT))

    def _state_type(self, node: ir.Node) -> None:
        for name in TYPE_ATTRIBUTES:
            if name == "to" and node.op_type != "Cast":
                continue
            if node.attributes.get_int(name, 0) == int(FLOAT):
                node.attributes[name] = ir.AttrInt64(name, int(self.half))

    # ----------------------------------------------------------------------------------------------------- values

    def typed(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """The value in a type: itself, a rounded constant, a copy of what makes it, or a Cast."""
        if value.dtype == dtype:
            return value
        key = value, dtype
        if key not in self._made:
            self._made[key] = self._typed(value, dtype)
        return self._made[key]

    def _typed(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        name = f"{value.name}.{dtype.name.lower()}"
        tensor, producer = constant(value), value.producer()
        if tensor is not None:
            name = self._rw.fresh(name)
            new = add_constant(self.graph, name, rounded(tensor, dtype, name))
            self._constants.append((value, new))
            return new
        if producer is not None and self.plan.modes.get(producer) == "either":
            return self._copy(producer, value)
        wide = self.plan.bounds.get(value, np.inf) > mask_value(self.half)
        if dtype == self.half and self.plan.kinds[value] == "table" and wide:
            clip = self._rw.node("Clip", [value, *self._limits()], f"{value.name}.clipped", like=value)
            return self._after(value, [clip, self._cast(clip.outputs[0], dtype, name)])
        return self._after(value, [self._cast(value, dtype, name)])

    def _copy(self, node: ir.Node, value: ir.Value) -> ir.Value:
        """A copy of a node, in 16 bits, with all its outputs."""
        reading = (
            following(OPERATORS[DOMAIN, node.op_type].inputs) if node.domain == DOMAIN else range(len(node.inputs))
        )
        inputs = [
            self.typed(item, self.half) if item is not None and index in reading and self._was_float(item) else item
            for index, item in enumerate(node.inputs)
        ]
        suffix = self.half.name.lower()
        outputs = [
            ir.Value(name=self._rw.fresh(f"{item.name}.{suffix}"), type=ir.TensorType(self.half), shape=item.shape)
            for item in node.outputs
        ]
        copy = ir.Node(node.domain, node.op_type, inputs, list(node.attributes.values()), outputs=outputs,
                       name=self._rw.fresh(f"{node.name}.{suffix}"))  # fmt: skip
        self._state_type(copy)
        self._rw.insert_after(node, [copy])
        self._copies.append((node, copy))
        for old, new in zip(node.outputs, outputs, strict=True):
            self._made[old, self.half] = new
        return outputs[value.index() or 0]

    def _cast(self, value: ir.Value, dtype: ir.DataType, name: str) -> ir.Node:
        return self._rw.node("Cast", [value], name, dtype=dtype, shape=value.shape,
                             attributes={"to": int(dtype)})  # fmt: skip

    def _after(self, value: ir.Value, nodes: Sequence[ir.Node]) -> ir.Value:
        producer = value.producer()
        if producer is not None:
            self._rw.insert_after(producer, nodes)
        else:
            self._rw.inherit(nodes, nodes[0])
            insert_before(self.graph[0], nodes)
        return nodes[-1].outputs[0]

    def _limits(self) -> tuple[ir.Value, ir.Value]:
        if self._mask is None:
            limit = np.float32(mask_value(self.half))
            low = self._rw.constant(f"{self.half.name.lower()}.least", np.asarray(-limit))
            high = self._rw.constant(f"{self.half.name.lower()}.most", np.asarray(limit))
            self._mask = low, high
        return self._mask

    # ----------------------------------------------------------------------------------------------------- afterwards

    def clean_up(self) -> None:
        """Remove what only float32 readers wanted, and let what stands for it have its name."""
        for node, _ in reversed(self._copies):
            if node.graph is not None:
                remove_node_if_unused(node)
        for node, copy in self._copies:
            if node.graph is None:
                copy.name = node.name
                for old, new in zip(node.outputs, copy.outputs, strict=True):
                    old.name, new.name = None, old.name
        for old, _ in self._constants:
            remove_unused_constant(old)
        for old, new in self._constants:
            if old.graph is None and old.name not in self.graph.initializers:
                new.name = old.name

    def narrowed(self) -> int:
        total = 0
        for old, new in self._constants:
            tensor, small = old.const_value, new.const_value
            quantized = any(
                node.op_type == "DequantizeLinear" or gives_output_dtype(node) or PART_OF in node.metadata_props
                for node in new.consumers()
            )
            if tensor is not None and small is not None and not quantized and old.graph is None:
                total += tensor.nbytes - small.nbytes
        return total
