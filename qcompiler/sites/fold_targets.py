"""Finds the linear layer that can take a factor on behalf of a value further on, and which of its channels goes where.

    x = a ⊙ (v W + b)                      a gated MLP: up_proj on behalf of down_proj
    x = heads(softmax(q kᵀ) (v W + b))     attention: v_proj on behalf of o_proj, through GQA's repeated heads

The walk goes up through nodes that are homogeneous in one operand and leaves the rest alone, as long as nobody else
reads what lies between. Then the output channels of the layer are followed down again as labels, an integer for each
element of a value, with size 1 along every axis that they do not depend on (axes on the left may be missing). Only
operators, shapes and types are looked at, so any way to write the same movement (Reshape, Transpose, Unsqueeze, Expand,
Split) is understood.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.graph.edit import constant
from qcompiler.graph.operators import continuations, has
from qcompiler.sites.kinds import Factor, Linear

Labels = npt.NDArray[np.int64]
Sizes = list[int | str | None]  # of a shape: a number, the name of a symbol, or unknown

COUNTS = 6  # where the standard Attention reads how much is valid of a cache that is given whole
_FLOATS = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.FLOAT, ir.DataType.DOUBLE)


def find_factor(value: ir.Value, features: int, writers: Mapping[ir.Value, Linear]) -> Factor | str | None:
    """The layer that can take a factor on behalf of a value [..., features]; a reason where attention stands before.

    None where neither a layer nor attention is found. `writers` are the linear layers by their outputs. Who else reads
    `value` itself is the caller's business.
    """
    if value.is_graph_output():
        return None
    route = _walk(value, writers, after_attention=False)
    if not isinstance(route, _Route):
        return route
    labels = _follow(route)
    if labels is None or labels.shape[-1] not in (1, features) or labels.size != labels.shape[-1]:
        unknown = f"the shapes between it and {route.linear.module_path} do not show which channel goes where"
        return unknown if route.attention else None
    channels = np.broadcast_to(labels.ravel(), features).astype(np.int64)
    return Factor(linear=route.linear, channels=channels, through_attention=route.attention)


def readers(value: ir.Value) -> list[ir.Node]:
    """The nodes that read the numbers of a value; a Shape takes only the shape, which no factor changes."""
    nodes = dict.fromkeys(use.node for use in value.uses())
    return [node for node in nodes if not has(node, "measures")]


# ---------------------------------------------------------------------------------------------------- the way up


@dataclass(frozen=True)
class _Step:
    node: ir.Node
    source: ir.Value
    target: ir.Value


@dataclass(frozen=True)
class _Route:
    linear: Linear
    steps: tuple[_Step, ...] = ()

    @property
    def attention(self) -> bool:
        return any(_is_attention(step.node) for step in self.steps)


def _walk(value: ir.Value, writers: Mapping[ir.Value, Linear], *, after_attention: bool) -> _Route | str | None:
    if (linear := writers.get(value)) is not None:
        return _Route(linear)
    node = value.producer()
    if node is None:
        return f"attention's values are given ({value.name}), not written by a layer" if after_attention else None
    after_attention = after_attention or _is_attention(node)
    carriers = _carriers(node)
    if isinstance(carriers, str):
        return carriers if after_attention else None
    reason = (
        f"{node.op_type} stands between it and the layer that writes attention's values" if after_attention else None
    )
    for operand in carriers:
        refusal = _obstacle(operand, node)
        found = _walk(operand, writers, after_attention=after_attention) if refusal is None else None
        if isinstance(found, _Route):
            return _Route(found.linear, (*found.steps, _Step(node, operand, value)))
        reason = found or (refusal if after_attention else None)
    return reason


def _obstacle(operand: ir.Value, node: ir.Node) -> str | None:
    """Why a value between cannot be divided."""
    if operand.is_graph_output():
        return f"attention's values are kept in a cache ({operand.name}), whose contents would change meaning"
    others = [reader.op_type for reader in readers(operand) if reader is not node]
    if others:
        return f"attention's values are read by {', '.join(sorted(set(others)))}, too"
    if sum(value is operand for value in node.inputs) != 1:
        return f"{node.op_type} reads the same value twice"
    return None


def _is_attention(node: ir.Node) -> bool:
    if node.domain == "com.microsoft":
        return node.op_type in ("GroupQueryAttention", "MultiHeadAttention")
    if node.domain or node.op_type not in ("Attention", "MatMul"):
        return False
    values = node.inputs[1]
    return node.op_type == "Attention" or (constant(values) is None and len(_sizes(values)) > 2)


def _carriers(node: ir.Node) -> Iterable[ir.Value] | str:
    """The operands that the node's output is homogeneous in, each by itself; a reason where a cache holds them."""
    kind = node.op_type
    indices: tuple[int, ...] = ()
    if _is_attention(node) and kind != "MatMul":
        if refusal := _cached(node):
            return refusal
        indices = (2,)
    elif node.domain:
        return ()
    elif kind == "MatMul" and _is_attention(node):
        indices = (1,)
    elif has(node, "elementwise", "bilinear"):
        indices = (1, 0)
    elif has(node, "homogeneous") and _is_followed(node):
        indices = (0,) if kind != "Cast" or node.outputs[0].dtype in _FLOATS else ()
    elif kind == "Concat":
        return "attention's values are joined with a cache by Concat, whose contents would change meaning"
    return [value for i in indices if (value := node.inputs[i]) is not None]


def _is_followed(node: ir.Node) -> bool:
    """Whether `_moved` can tell which channel goes where; where numbers are picked or left out, others may be left."""
    return has(node, "elementwise") or has(node, "moves", "ordered") or node.op_type in ("Transpose", "Expand", "Split")


def _cached(node: ir.Node) -> str | None:
    """Why a node of attention cannot pass a factor on: a past, a present, a bias inside, values packed with others."""
    standard = not node.domain
    past = set(continuations(node)) | ({COUNTS} if standard else set())
    given = any(i < len(node.inputs) and node.inputs[i] is not None for i in past)
    kept = any(value.uses() or value.is_graph_output() for value in node.outputs[1:3])
    if given or kept or node.op_type == "GroupQueryAttention":
        return f"{node.op_type} keeps its values in a cache, whose contents would change meaning"
    if len(node.inputs) < 3 or node.inputs[2] is None:
        return f"{node.op_type} reads its values packed with keys"
    if not standard and len(node.inputs) > 3 and node.inputs[3] is not None:
        return f"{node.op_type} adds the bias of its values itself"
    return None


# ---------------------------------------------------------------------------------------------------- the way down


def _follow(route: _Route) -> Labels | None:
    """The labels of the value at the end of the route, or None where shapes are not known well enough."""
    labels: Labels = np.arange(route.linear.out_features)
    for step in route.steps:
        moved = _moved(step, labels)
        if moved is None:
            return None
        labels = moved
    return labels


def _moved(step: _Step, labels: Labels) -> Labels | None:
    node, kind = step.node, step.node.op_type
    if has(node, "elementwise") or kind == "Expand":
        return labels
    if kind == "MatMul":
        return labels if labels.shape[-2:-1] in ((), (1,)) else None  # else it sums over channels
    rank = len(_sizes(step.source))
    if rank < labels.ndim:
        return None
    labels = labels.reshape((1,) * (rank - labels.ndim) + labels.shape)
    if has(node, "moves", "ordered"):
        return _reshaped(labels, _sizes(step.source), _sizes(step.target))
    if kind == "Transpose":
        order = node.attributes.get_ints("perm")
        return labels.transpose(order if order is not None else range(rank)[::-1])
    return _part(step, labels) if kind == "Split" else _attended(step, labels)


def _reshaped(labels: Labels, before: Sizes, after: Sizes) -> Labels | None:
    """Labels after a reshape; axes are matched from the right, in the smallest groups of equal size."""
    sizes = [size if label == 1 else label for label, size in zip(labels.shape, before, strict=True)]
    after = _solved(sizes, after)
    full, shape = list(labels.shape), [1] * len(after)
    for left, right in _groups(sizes, after):
        if all(labels.shape[axis] == 1 for axis in left):
            continue
        for axis in left:
            full[axis] = int(sizes[axis])  # type: ignore[arg-type]  # labelled sizes are numbers, and their group's too
        for axis in right:
            shape[axis] = int(after[axis])  # type: ignore[arg-type]
    whole = np.broadcast_to(labels, full)
    return whole.reshape(shape) if whole.size == prod(shape) else None  # a labelled axis outside of all groups


def _groups(before: Sizes, after: Sizes) -> Iterator[tuple[list[int], list[int]]]:
    """The axes that become which axes: from the right as far as sizes are known, then the rest from the left."""
    i, j = len(before), len(after)
    for left, right in _matched(before[::-1], after[::-1]):
        yield [len(before) - 1 - axis for axis in left], [len(after) - 1 - axis for axis in right]
        i, j = i - len(left), j - len(right)
    yield from _matched(before[:i], after[:j])


def _matched(before: Sizes, after: Sizes) -> Iterator[tuple[list[int], list[int]]]:
    """The smallest groups of axes of equal size, from the left, up to the first that is not known."""
    i, j = 0, 0
    while i < len(before) and j < len(after):
        left, right = [i], [j]
        while (a := _product(before, left)) != (b := _product(after, right)):
            if a is None or b is None:
                return
            _, longer, end = min((a, left, len(before)), (b, right, len(after)))
            if longer[-1] + 1 == end:
                return
            longer.append(longer[-1] + 1)
        if a is None and (before[i] is None or before[i] != after[j]):
            return
        yield left, right
        i, j = left[-1] + 1, right[-1] + 1


def _solved(before: Sizes, after: Sizes) -> Sizes:
    """`after` with its one unknown size computed, where what is left of `before` is known."""
    same = 0
    while same < min(len(before), len(after)) and before[same] is not None and before[same] == after[same]:
        same += 1
    rest = after[same:]
    unknown = [axis for axis, size in enumerate(rest) if not isinstance(size, int)]
    total = _product(before, range(same, len(before)))
    if len(unknown) != 1 or total is None:
        return after
    known = prod(size for size in rest if isinstance(size, int))
    if known == 0 or total % known:
        return after
    return [*after[: same + unknown[0]], total // known, *after[same + unknown[0] + 1 :]]


def _product(sizes: Sizes, axes: Iterable[int]) -> int | None:
    picked = [sizes[axis] for axis in axes]
    return prod(size for size in picked if isinstance(size, int)) if all(isinstance(s, int) for s in picked) else None


def _part(step: _Step, labels: Labels) -> Labels | None:
    """One output of a Split; the others must hold other channels, as they are read by somebody else."""
    axis = step.node.attributes.get_int("axis", 0) % labels.ndim
    sizes = [_sizes(value)[axis] if _sizes(value) else None for value in step.node.outputs]
    index = list(step.node.outputs).index(step.target)
    earlier, size = [other for other in sizes[:index] if isinstance(other, int)], sizes[index]
    if len(earlier) < index or not isinstance(size, int) or labels.shape[axis] == 1:
        return None
    before = sum(earlier)
    part = np.take(labels, range(before, before + size), axis)
    rest = np.delete(labels, range(before, before + size), axis)
    return None if np.isin(part, rest).any() else part


def _attended(step: _Step, labels: Labels) -> Labels | None:
    """Attention with heads: head h of the output averages the values of head h // (query heads / value heads)."""
    attributes = step.node.attributes
    if labels.ndim == 4 and not step.node.domain:
        query = _sizes(step.node.inputs[0])
        heads, of_query = labels.shape[1], query[1] if len(query) == 4 else None
        if labels.shape[2] != 1 or not isinstance(of_query, int):
            return None
        return np.repeat(labels, of_query // heads, axis=1)
    if labels.ndim != 3 or labels.shape[1] != 1:
        return None
    if step.node.domain:
        return labels
    heads, of_query = attributes.get_int("kv_num_heads"), attributes.get_int("q_num_heads")
    if not heads or not of_query or of_query % heads or labels.shape[2] % heads:
        return None
    size = labels.shape[2] // heads
    split = labels.reshape(*labels.shape[:2], heads, size)
    return np.repeat(split, of_query // heads, axis=2).reshape(*labels.shape[:2], of_query * size)


def _sizes(value: ir.Value | None) -> Sizes:
    """The sizes of a value's axes; empty where not even their number is known."""
    shape = value.shape if value is not None else None
    return [size.value if isinstance(size, ir.SymbolicDim) else int(size) for size in shape or ()]
