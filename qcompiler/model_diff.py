"""Compares two models: nodes, initializers, inputs and outputs, and how values are quantized.

Tensors are compared by a hash of their bytes, read a piece at a time, so that models may be larger than memory.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx_ir as ir

from qcompiler import model_io
from qcompiler.graph import PROVENANCE, constant
from qcompiler.tensors import pieces

Kind = Literal["added", "removed", "replaced", "changed"]

# Where an operator that reads quantized data has its scales and zero points: (operand, scale, zero point) as indices.
QUANTIZATION_INPUTS: dict[str, tuple[tuple[str, int, int], ...]] = {
    "QuantizeLinear": (("", 1, 2),),
    "DequantizeLinear": (("", 1, 2),),
    "DequantizePerToken": (("", 1, 2),),
    "MatMulIntegerToFloat": (("A", 2, 4), ("B", 3, 5)),
    "DynamicQuantizeMatMul": (("B", 2, 3),),
    "QLinearMatMul": (("A", 1, 2), ("B", 4, 5), ("Y", 6, 7)),
    "QLinearConv": (("X", 1, 2), ("W", 4, 5), ("Y", 6, 7)),
    "QGemm": (("A", 1, 2), ("B", 4, 5), ("Y", 7, 8)),
    "MatMulNBits": (("B", 2, 3),),
    "GatherBlockQuantized": (("data", 2, 3),),
}


@dataclass(frozen=True)
class NodeChange:
    """A node that only one model has, or that differs. Two nodes are the same by name, else by the value they write."""

    kind: Kind
    name: str
    before: str
    """Operator in the first model; empty where the node was added."""
    after: str
    """Operator in the second model; empty where the node was removed."""
    passes: str = ""
    """The passes that made or changed the node, as the second model's metadata tells."""
    detail: str = ""
    """What differs in a changed node: the inputs and attributes."""


@dataclass(frozen=True)
class TensorInfo:
    type: str
    shape: tuple[int, ...]
    bytes: int


@dataclass(frozen=True)
class InitializerChange:
    kind: Kind
    name: str
    before: TensorInfo | None
    after: TensorInfo | None


@dataclass(frozen=True)
class PortChange:
    """An input or output of the graph, before and after as ``type[shape]``; empty where it does not exist."""

    direction: Literal["input", "output"]
    name: str
    before: str
    after: str


@dataclass(frozen=True)
class Quantization:
    """The scale and zero point that a node of the second model uses and the first model's node does not."""

    node: str
    op: str
    operand: str
    """Which operand of the node; empty where it has only one."""
    value: str
    """The name of what is quantized or dequantized."""
    type: str
    """Of the codes, where the zero point or the operand tells; else empty."""
    scales: int
    """How many there are: 1 is per tensor; 0 where that depends on the model's inputs (a scale for each token)."""
    scale: tuple[float, float] | None
    """Smallest and largest; None where the scale is computed at run time."""
    zero_point: tuple[float, float] | None


@dataclass(frozen=True)
class Totals:
    nodes: dict[str, int]
    """Nodes by operator."""
    bytes: dict[str, int]
    """Bytes of the initializers by type."""


@dataclass(frozen=True)
class Diff:
    """What differs from model A to model B. Empty lists mean equal; falsy when all are."""

    nodes: tuple[NodeChange, ...]
    initializers: tuple[InitializerChange, ...]
    ports: tuple[PortChange, ...]
    quantization: tuple[Quantization, ...]
    before: Totals
    after: Totals

    def __bool__(self) -> bool:
        return bool(self.nodes or self.initializers or self.ports or self.quantization)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return dataclasses.asdict(self)


def diff(a: str | Path | ir.Model, b: str | Path | ir.Model) -> Diff:
    """Compare two models: `.onnx` files, folders or `onnx_ir.Model`. Raises ModelError where one cannot be read."""
    first, second = (x if isinstance(x, ir.Model) else model_io.load(x) for x in (a, b))
    return Diff(
        nodes=tuple(_node_changes(first, second)),
        initializers=tuple(_initializer_changes(_initializers(first), _initializers(second))),
        ports=tuple(_port_changes(first, second)),
        quantization=tuple(_new_quantization(first, second)),
        before=_totals(first),
        after=_totals(second),
    )


def _nodes(model: ir.Model) -> Iterator[ir.Node]:
    """All nodes, those of subgraphs and of model-local functions too."""
    yield from model.graph.all_nodes()
    for function in model.functions.values():
        yield from function.all_nodes()


def _node_changes(a: ir.Model, b: ir.Model) -> Iterator[NodeChange]:
    left, right = list(_nodes(a)), list(_nodes(b))
    pairs = _pair(left, right)
    paired = set(pairs.values())
    for node in left:
        other = pairs.get(node)
        if other is None:
            yield NodeChange("removed", _label(node), _operator(node), "")
        elif _operator(node) != _operator(other):
            yield NodeChange("replaced", _label(node), _operator(node), _operator(other), _passes(other))
        elif detail := _differences(node, other):
            yield NodeChange("changed", _label(node), _operator(node), _operator(other), _passes(other), detail)
    for node in right:
        if node not in paired:
            yield NodeChange("added", _label(node), "", _operator(node), _passes(node))


def _pair(left: list[ir.Node], right: list[ir.Node]) -> dict[ir.Node, ir.Node]:
    """Which node of A is which of B: by unique name and operator, then by the value written, then by name alone."""
    pairs: dict[ir.Node, ir.Node] = {}
    for key in (lambda n: n.name and (n.name, _operator(n)), _written, lambda n: n.name):
        open_left = _unique((n for n in left if n not in pairs), key)
        taken = set(pairs.values())
        open_right = _unique((n for n in right if n not in taken), key)
        pairs.update({node: open_right[name] for name, node in open_left.items() if name in open_right})
    return pairs


def _unique(nodes: Iterable[ir.Node], key: Any) -> dict[Any, ir.Node]:
    """Nodes by key, without those whose key is empty or not their own."""
    nodes = list(nodes)
    count = Counter(key(node) for node in nodes)
    return {key(node): node for node in nodes if key(node) and count[key(node)] == 1}


def _written(node: ir.Node) -> str:
    """The name of the first value that the node writes."""
    return next((value.name for value in node.outputs if value.name), "")


def _label(node: ir.Node) -> str:
    return node.name or _written(node)


def _operator(node: ir.Node) -> str:
    return f"{node.domain}.{node.op_type}" if node.domain else node.op_type


def _passes(node: ir.Node) -> str:
    return node.metadata_props.get(PROVENANCE, "")


def _differences(a: ir.Node, b: ir.Node) -> str:
    parts = []
    before, after = ([value.name if value else "" for value in node.inputs] for node in (a, b))
    if before != after:
        moved = [f"{x or '∅'} → {y or '∅'}" for x, y in zip(before, after, strict=False) if x != y]
        moved += [f"+ {name}" for name in after[len(before) :]] + [f"- {name}" for name in before[len(after) :]]
        parts.append("inputs " + ", ".join(moved))
    left, right = ({key: _attribute(item) for key, item in node.attributes.items()} for node in (a, b))
    for key in sorted({*left, *right}):
        if left.get(key) != right.get(key):
            parts.append(f"{key} {left.get(key, '∅')} → {right.get(key, '∅')}")
    return "; ".join(parts)


def _attribute(attribute: ir.Attr) -> str:
    """An attribute as text that is equal where the attribute is; the nodes of subgraphs are compared by themselves."""
    if attribute.type == ir.AttributeType.TENSOR:
        tensor = attribute.as_tensor()
        return f"{_describe(tensor)} #{_digest(tensor)[:8]}"
    if attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
        return "graph"
    return str(attribute.value)


def _initializers(model: ir.Model) -> dict[str, ir.TensorProtocol]:
    """The constants by name: initializers, those of subgraphs too (a name that occurs again gets its graph's name)."""
    found: dict[str, ir.TensorProtocol] = {}
    for graph in model.graphs():
        for name, value in graph.initializers.items():
            if value.const_value is not None:
                found[f"{graph.name}/{name}" if name in found else name] = value.const_value
    return found


def _initializer_changes(
    a: dict[str, ir.TensorProtocol], b: dict[str, ir.TensorProtocol]
) -> Iterator[InitializerChange]:
    for name, tensor in a.items():
        before = _info(tensor)
        other = b.get(name)
        if other is None:
            yield InitializerChange("removed", name, before, None)
        elif before != _info(other) or _digest(tensor) != _digest(other):
            yield InitializerChange("changed", name, before, _info(other))
    for name, tensor in b.items():
        if name not in a:
            yield InitializerChange("added", name, None, _info(tensor))


def _info(tensor: ir.TensorProtocol) -> TensorInfo:
    return TensorInfo(tensor.dtype.name, tuple(int(size) for size in tensor.shape.numpy()), tensor.nbytes)


def _describe(tensor: ir.TensorProtocol) -> str:
    info = _info(tensor)
    return f"{info.type}{list(info.shape)}"


def _digest(tensor: ir.TensorProtocol) -> str:
    """SHA-256 of the bytes; an external file is read in pieces instead of being mapped."""
    digest = hashlib.sha256()
    for piece in pieces(tensor):
        digest.update(piece)
    return digest.hexdigest()


def _port_changes(a: ir.Model, b: ir.Model) -> Iterator[PortChange]:
    sides: tuple[Literal["input", "output"], ...] = ("input", "output")
    for direction in sides:
        left, right = (
            {str(value.name): f"{value.dtype.name if value.dtype else '?'}{value.shape or '[?]'}" for value in values}
            for values in ((m.graph.inputs if direction == "input" else m.graph.outputs) for m in (a, b))
        )
        for name in dict.fromkeys((*left, *right)):
            if left.get(name) != right.get(name):
                yield PortChange(direction, name, left.get(name, ""), right.get(name, ""))


def _new_quantization(a: ir.Model, b: ir.Model) -> Iterator[Quantization]:
    known = {item: None for node in _nodes(a) for item in _quantization(node)}
    for node in _nodes(b):
        yield from (item for item in _quantization(node) if item not in known)


def _quantization(node: ir.Node) -> Iterator[Quantization]:
    for operand, scale_index, zero_index in QUANTIZATION_INPUTS.get(node.op_type, ()):
        scale = _input(node, scale_index)
        if scale is None:
            continue
        zero = _input(node, zero_index)
        shape = scale.shape
        sizes = [1] if shape is None else [size if isinstance(size, int) else 0 for size in shape]
        codes = node.outputs[0] if node.op_type == "QuantizeLinear" else None if operand else _input(node, 0)
        told = zero if zero is not None and zero.dtype is not None else codes
        yield Quantization(
            node=_label(node),
            op=_operator(node),
            operand=operand,
            value=str(_value(node, operand)),
            type=told.dtype.name if told is not None and told.dtype is not None else "",
            scales=math.prod(sizes),
            scale=_span(scale),
            zero_point=_span(zero),
        )


def _value(node: ir.Node, operand: str) -> str:
    """The name of the operand: A, X and data come first, B and W after them (and their scales); Y is the result."""
    if operand == "Y":
        return str(node.outputs[0].name)
    after_scales = node.op_type in ("QLinearMatMul", "QLinearConv", "QGemm")
    index = (3 if after_scales else 1) if operand in ("B", "W") else 0
    value = _input(node, index)
    return str(value.name) if value is not None else ""


def _input(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def _span(value: ir.Value | None) -> tuple[float, float] | None:
    tensor = constant(value)
    if tensor is None or tensor.size == 0:
        return None
    data = tensor.numpy().astype(np.float64)
    return float(data.min()), float(data.max())


def _totals(model: ir.Model) -> Totals:
    sizes: Counter[str] = Counter()
    for tensor in _initializers(model).values():
        sizes[tensor.dtype.name] += tensor.nbytes
    return Totals(dict(sorted(Counter(_operator(node) for node in _nodes(model)).items())), dict(sorted(sizes.items())))
