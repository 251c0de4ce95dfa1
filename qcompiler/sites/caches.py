"""Finds the KV-caches of a language model: tensors that go in as the past, are appended to, and go out as the present.

    Concat                past [batch, heads, positions, channels] and new keys or values, along the positions
    TensorScatter         writes new ones into a past of fixed size
    Attention             ai.onnx, with past_key and past_value of its own
    GroupQueryAttention   com.microsoft, the same

The structure tells them, from a graph input through one of these nodes to a graph output; names do so only for what is
then reported as of unknown form. Which of the two a cache holds follows from where it is multiplied, too: keys before
attention's Softmax, values behind it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

from qcompiler.functions.cache import is_cache_function
from qcompiler.graph.model_inputs import PAST
from qcompiler.graph.module_path import block_of, module_path
from qcompiler.graph.operators import attends, continuations, has, holds, multiplies_floats
from qcompiler.sites.kinds import Site, Unsupported

Role = Literal["key", "value"]

FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
CODES = (ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.FLOAT8E4M3FN)

_JOINS = (("", "Concat"), ("", "TensorScatter"), ("", "Attention"), ("com.microsoft", "GroupQueryAttention"))
"""The operators whose caches can be stored otherwise; others continue a past, too, and have no form for codes."""


@dataclass(frozen=True, eq=False)
class Cache(Site):
    """Keys or values of one layer. `node` appends to them; `name` is that of the past, a graph input."""

    role: Role
    past: ir.Value
    """The graph input."""
    present: ir.Value
    """The graph output."""
    new: ir.Value | None
    """What is appended, of the same layout; None where an operator makes it inside."""
    axis: int
    """The axis of positions, 1 or 2; heads lie on the other one, channels on the last."""
    heads: int
    head_size: int
    dtype: ir.DataType
    """Of the numbers: float, float16 or bfloat16."""

    @property
    def heads_axis(self) -> int:
        return 3 - self.axis

    @property
    def bytes(self) -> int:
        """Bytes of one position of one sequence."""
        return self.heads * self.head_size * self.dtype.bitwidth // 8


def find_caches(model: ir.Model) -> tuple[Cache | Unsupported, ...]:
    """Every cache, in the order of the graph's inputs; what looks like one and is of another form, with the reason."""
    graph = model.graph
    found: list[Cache | Unsupported] = []
    for past in graph.inputs:
        if past.name in graph.initializers or not isinstance(past.type, ir.TensorType):
            continue
        if past.dtype not in FLOATS + CODES or (past.shape is not None and len(past.shape) < 3):
            continue
        site = _recognise(past, graph)
        if site is not None:
            found.append(site)
    return tuple(found)


def _recognise(past: ir.Value, graph: ir.Graph) -> Cache | Unsupported | None:
    reads = [use for use in past.uses() if not has(use.node, "measures")]
    joins = [use for use in reads if use.idx in _continued(use.node)]
    ends = [use for use in joins if _present(use.node, use.idx) is not None]
    if not ends and (not reads or not _named(past)):
        return None
    if not ends:
        return _unsupported(past, reads[0].node, _why_no_join(reads[0].node, reads[0].idx))
    node, index = ends[0]
    if _is_companion(node):
        return None
    if past.dtype in CODES:
        return _unsupported(past, node, f"it is quantized already ({past.dtype.name.lower()})")
    if node.graph is not graph:
        return _unsupported(past, node, "it is read inside the body of an If, Loop or Scan")
    if len(reads) > 1:
        others = sorted({use.node.op_type for use in reads if use.node is not node} or {node.op_type})
        return _unsupported(past, node, f"{', '.join(others)} reads its past, too")
    return _cache(past, node, index)


def _present(node: ir.Node, index: int) -> ir.Value | None:
    """The graph output in which a node continues its input `index`."""
    output = _continued(node)[index]
    if output >= len(node.outputs) or not node.outputs[output].is_graph_output():
        return None
    if node.op_type == "Concat" and len(node.inputs) != 2:
        return None
    return node.outputs[output]


def _continued(node: ir.Node) -> dict[int, int]:
    """From the index of a past to that of the output that continues it."""
    return continuations(node) if (node.domain, node.op_type) in _JOINS else {}


def _is_companion(join: ir.Node) -> bool:
    """Whether it appends the scales or offsets of a cache that is quantized already."""
    new = join.inputs[1] if has(join, "joins") else None
    return new is not None and is_cache_function(new.producer()) and (new.index() or 0) > 0


def _cache(past: ir.Value, node: ir.Node, index: int) -> Cache | Unsupported:
    present, role = node.outputs[_continued(node)[index]], holds(node, index)
    joined = has(node, "joins")
    new = node.inputs[1] if joined else None
    axis = _axis(node, past) if joined else 2
    if axis not in (1, 2):
        return _unsupported(past, node, f"its layout is unknown (rank {_rank(past)}, positions along axis {axis})")
    heads, head_size = _size(past, new, 3 - axis), _size(past, new, 3)
    if node.op_type == "GroupQueryAttention":
        heads, head_size = node.attributes.get_int("kv_num_heads"), head_size or _fused_head_size(node)
    if heads is None or head_size is None:
        return _unsupported(past, node, "the number or the size of its heads is not known; export it with numbers")
    role = role or _role(present) or _role_by_name(past)
    if role is None:
        return _unsupported(past, node, "nothing shows whether it holds keys or values")
    path = module_path(node)
    path = f"{path}.{role}_cache" if path != node.name else str(past.name)
    return Cache(
        node=node, name=str(past.name), module_path=path, block=block_of(path), role=role, past=past, present=present,
        new=new, axis=axis, heads=heads, head_size=head_size, dtype=past.dtype or ir.DataType.FLOAT,
    )  # fmt: skip


def _axis(node: ir.Node, past: ir.Value) -> int | None:
    """The axis of positions, counted from the left; None where the cache is not of rank 4."""
    axis = node.attributes.get_int("axis", -2)
    return None if _rank(past) != 4 or axis is None else axis % 4


def _rank(value: ir.Value) -> int | None:
    return None if value.shape is None else len(value.shape)


def _size(past: ir.Value, new: ir.Value | None, axis: int) -> int | None:
    for value in (past, new):
        if value is not None and value.shape is not None and len(value.shape) == 4:
            size = value.shape[axis]
            if isinstance(size, int):
                return size
    return None


def _fused_head_size(node: ir.Node) -> int | None:
    """From the width of the operator's result, or of its packed input."""
    heads, groups = node.attributes.get_int("num_heads"), node.attributes.get_int("kv_num_heads")
    query, key = node.inputs[0], node.inputs[1]
    if not heads or not groups:
        return None
    parts = heads if key is not None else heads + 2 * groups
    for value, count in ((node.outputs[0], heads), (query, parts)):
        width = value.shape[-1] if value is not None and value.shape is not None else None
        if isinstance(width, int):
            return width // count
    return None


# ------------------------------------------------------------------------------------------------ keys or values


def _role(present: ir.Value) -> Role | None:
    """What the nearest product or attention below takes the cache for."""
    pending, seen = [present], {present}
    while pending:
        for node, index in pending.pop(0).uses():
            if has(node, "measures"):
                continue
            if attends(node):
                return holds(node, index)
            if _is_product(node):
                others = [value for place, value in enumerate(node.inputs) if place != index and value is not None]
                return "value" if any(_from_softmax(value) for value in others) else "key"
            pending += [value for value in node.outputs if value not in seen]
            seen.update(node.outputs)
    return None


def _is_product(node: ir.Node) -> bool:
    return multiplies_floats(node) and not has(node, "convolution")


def _from_softmax(value: ir.Value) -> bool:
    """Whether a Softmax made the value, without a product between."""
    pending, seen = [value], {value}
    while pending:
        node = pending.pop().producer()
        if node is None or _is_product(node) or has(node, "measures"):
            continue
        if node.op_type == "Softmax":
            return True
        above = [source for source in node.inputs if source is not None and source not in seen]
        seen.update(above)
        pending += above
    return False


def _role_by_name(past: ir.Value) -> Role | None:
    name = (past.name or "").lower()
    found: list[Role] = [role for role in _roles() if name.rstrip("s").endswith(role)]
    return found[0] if len(found) == 1 else None


def _roles() -> Iterator[Role]:
    yield "key"
    yield "value"


# ----------------------------------------------------------------------------------------------------- what is no cache


def _named(past: ir.Value) -> bool:
    return PAST.match(past.name or "") is not None


def _why_no_join(node: ir.Node, index: int) -> str:
    outputs = _continued(node)
    if index in outputs and node.op_type == "Concat" and len(node.inputs) != 2:
        return f"Concat joins {len(node.inputs)} values, and not its past with what is new"
    if index in outputs:
        return f"what {node.op_type} appends to it is no output of the graph"
    known = ", ".join(op_type for _, op_type in _JOINS)
    return f"{node.op_type} reads it, and those known to append to a cache are {known}"


def _unsupported(past: ir.Value, node: ir.Node, reason: str) -> Unsupported:
    path = module_path(node)
    shown = path if path != node.name else str(past.name)
    return Unsupported(node=node, name=str(past.name), module_path=shown, block=block_of(path), reason=reason)
