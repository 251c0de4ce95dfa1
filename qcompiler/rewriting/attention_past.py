"""Takes the cache out of an ai.onnx Attention: Concat joins past and new keys and values before it.

    Y, present = Attention(Q, K, V, mask, past)    →    present = Concat(past, K);  Y = Attention(Q, present, …, mask)

The numbers stay the same. Inputs [batch, positions, heads · channels] become [batch, heads, positions, channels], as
caches are. `is_causal` counts from the first key where there is no past, so a mask of its own takes its place.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from qcompiler.graph.edit import add_constant, insert_after, insert_before, new_node, node_graph
from qcompiler.graph.rewriter import Rewriter

QUERY, KEY, VALUE, MASK, PAST_KEY, PAST_VALUE = range(6)


def join_outside(attention: ir.Node, rw: Rewriter) -> None:
    """Rewrite a node that has past_key, past_value and both presents."""
    graph = node_graph(attention)
    before = _Nodes(graph, rw, attention)
    flat = "q_num_heads" in attention.attributes
    if flat:
        heads = {QUERY: attention.attributes.pop("q_num_heads").as_int()}
        heads[KEY] = heads[VALUE] = attention.attributes.pop("kv_num_heads").as_int()
        for index, count in heads.items():
            attention.replace_input_with(index, before.split_heads(attention.inputs[index], count))
    queries = attention.inputs[QUERY]
    past_key = attention.inputs[PAST_KEY]
    for index, past, present in ((KEY, PAST_KEY, 1), (VALUE, PAST_VALUE, 2)):
        old = attention.outputs[present]
        name, old.name = old.name, None
        joined = before.add("Concat", [attention.inputs[past], attention.inputs[index]], str(name), like=old,
                            attributes={"axis": 2})  # fmt: skip
        before.nodes[-1].name = rw.fresh(f"{attention.name}.{name}")
        old.replace_all_uses_with(joined, replace_graph_outputs=True)
        attention.replace_input_with(index, joined)
    if attention.attributes.get_int("is_causal", 0):
        del attention.attributes["is_causal"]
        mask = attention.inputs[MASK]
        attention.replace_input_with(MASK, before.causal(queries, past_key, mask))
    insert_before(attention, before.nodes)
    rw.inherit(before.nodes, attention)
    attention.resize_inputs(VALUE + 1 if attention.inputs[MASK] is None else MASK + 1)
    if len(attention.outputs) == 3:
        attention.resize_outputs(1)
    if flat:
        _flatten(attention, rw)


class _Nodes:
    """Nodes to stand before another one, in order."""

    def __init__(self, graph: ir.Graph, rw: Rewriter, anchor: ir.Node) -> None:
        self._graph, self._rw, self._base = graph, rw, anchor.name or "attention"
        self.nodes: list[ir.Node] = []

    def add(
        self, op_type: str, inputs: Sequence[ir.Value | None], name: str, *, like: ir.Value | None = None,
        dtype: ir.DataType | None = None, shape: ir.Shape | None = None, attributes: dict[str, object] | None = None,
    ) -> ir.Value:  # fmt: skip
        self.nodes.append(new_node(op_type, inputs, name, like=like, dtype=dtype, shape=shape, attributes=attributes))
        return self.nodes[-1].outputs[0]

    def split_heads(self, value: ir.Value | None, heads: int) -> ir.Value:
        """[batch, positions, heads · channels] → [batch, heads, positions, channels]."""
        if value is None:
            raise ValueError(f"{self._base!r} lacks an input")
        split = self.add("Reshape", [value, self._ints([0, 0, heads, -1])], self._fresh(f"{value.name}.heads"),
                         dtype=value.dtype)  # fmt: skip
        sizes = list(value.shape) if value.shape is not None else [None] * 3
        width = sizes[2] // heads if isinstance(sizes[2], int) else None
        return self.add("Transpose", [split], self._fresh(f"{value.name}.by_head"), dtype=value.dtype,
                        shape=ir.Shape([sizes[0], heads, sizes[1], width]),
                        attributes={"perm": [0, 2, 1, 3]})  # fmt: skip

    def causal(self, queries: ir.Value | None, past: ir.Value | None, mask: ir.Value | None) -> ir.Value:
        """Query i sees the past and the new keys up to its own, where the mask, if there is one, allows it."""
        length, known = self._length(queries), self._length(past)
        total = self._int64("Add", [known, length], "total")
        zero, one = (self._scalar(number) for number in (0, 1))
        own = self._int64("Range", [known, total, one], "own", rank=1)
        rows = self._int64("Unsqueeze", [own, self._ints([1])], "rows", rank=2)
        keys = self._int64("Range", [zero, total, one], "keys", rank=1)
        seen = self.add("GreaterOrEqual", [rows, keys], self._fresh(f"{self._base}.causal"), dtype=ir.DataType.BOOL)
        if mask is None:
            return seen
        name = self._fresh(f"{self._base}.mask")
        if mask.dtype == ir.DataType.BOOL:
            return self.add("And", [mask, seen], name, dtype=mask.dtype)
        dtype = mask.dtype or ir.DataType.FLOAT
        never = add_constant(self._graph, self._fresh(f"{self._base}.never"), np.array(-np.inf, dtype.numpy()))
        return self.add("Where", [seen, mask, never], name, dtype=dtype)

    def _length(self, value: ir.Value | None) -> ir.Value:
        """The positions of [batch, heads, positions, channels], a number."""
        shape = new_node("Shape", [value], self._fresh(f"{self._base}.shape"), dtype=ir.DataType.INT64,
                         shape=ir.Shape([1]), attributes={"start": 2, "end": 3})  # fmt: skip
        self.nodes.append(shape)
        return self._int64("Squeeze", [shape.outputs[0], self._ints([0])], "length")

    def _int64(self, op_type: str, inputs: Sequence[ir.Value], kind: str, rank: int = 0) -> ir.Value:
        return self.add(op_type, inputs, self._fresh(f"{self._base}.{kind}"), dtype=ir.DataType.INT64,
                        shape=ir.Shape([None] * rank))  # fmt: skip

    def _ints(self, numbers: Sequence[int]) -> ir.Value:
        return add_constant(self._graph, self._fresh(f"{self._base}.ints"), np.array(numbers, np.int64))

    def _scalar(self, number: int) -> ir.Value:
        return add_constant(self._graph, self._fresh(f"{self._base}.int"), np.array(number, np.int64))

    def _fresh(self, name: str) -> str:
        return self._rw.fresh(name)


def _flatten(attention: ir.Node, rw: Rewriter) -> None:
    """The result [batch, heads, positions, channels] → [batch, positions, heads · channels], under its old name."""
    result = attention.outputs[0]
    name, shape = result.name, result.shape
    result.name, result.shape = rw.fresh(f"{name}.by_head"), None
    ints = rw.constant(f"{name}.flat", np.array([0, 0, -1], np.int64), node_graph(attention))
    turned = rw.node("Transpose", [result], f"{name}.turned", dtype=result.dtype,
                     attributes={"perm": [0, 2, 1, 3]})  # fmt: skip
    flat = new_node("Reshape", [turned.outputs[0], ints], str(name), dtype=result.dtype, shape=shape)
    flat.name = rw.fresh(f"{name}.flattened")
    result.replace_all_uses_with(flat.outputs[0], replace_graph_outputs=True)
    turned.replace_input_with(0, result)
    insert_after(attention, [turned, flat])
    rw.inherit([turned, flat], attention)
