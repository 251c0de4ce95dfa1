"""What differs node by node and constant by constant, and how values are quantized.

Tensors are compared by a hash of their bytes, read a piece at a time, so that models may be larger than memory.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import onnx_ir as ir

from qcompiler.functions.library import DOMAIN
from qcompiler.graph.edit import constant
from qcompiler.graph.lazy import pieces
from qcompiler.graph.metadata import PROVENANCE
from qcompiler.graph.operators import QuantizedOperand, has, quantized
from qcompiler.model_diff.arithmetic import error_of
from qcompiler.model_diff.node_pairing import written
from qcompiler.sites.stored.kernels import scale_behind, tail_of

Kind = Literal["added", "removed", "replaced", "changed"]


@dataclass(frozen=True)
class NodeChange:
    """A node that only one model has, or that differs (see `pairing` for which node is which)."""

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
    error: float | None = None
    """‖after - before‖ / ‖before‖ of a changed float constant whose shape stayed."""


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


def nodes_of(model: ir.Model) -> Iterator[ir.Node]:
    """All nodes, those of subgraphs too, and of functions that are not qcompiler's: a call of these is one node."""
    yield from model.graph.all_nodes()
    for function in model.functions.values():
        if function.domain != DOMAIN:
            yield from function.all_nodes()


Pairs = Mapping[ir.Node, ir.Node]


def node_changes(a: ir.Model, b: ir.Model, pairs: Pairs, renamed: Mapping[str, str]) -> Iterator[NodeChange]:
    """`pairs` says which node is which, `renamed` which constants of the second are called otherwise in the first."""
    paired = set(pairs.values())
    for node in nodes_of(a):
        other = pairs.get(node)
        if other is None:
            yield NodeChange("removed", label(node), operator(node), "")
        elif operator(node) != operator(other):
            yield NodeChange("replaced", label(node), operator(node), operator(other), passes_of(other))
        elif detail := _differences(node, other, pairs, renamed):
            yield NodeChange("changed", label(node), operator(node), operator(other), passes_of(other), detail)
    for node in nodes_of(b):
        if node not in paired:
            yield NodeChange("added", label(node), "", operator(node), passes_of(node))


def label(node: ir.Node) -> str:
    return node.name or written(node)


def operator(node: ir.Node) -> str:
    return f"{node.domain}.{node.op_type}" if node.domain else node.op_type


def passes_of(node: ir.Node) -> str:
    return node.metadata_props.get(PROVENANCE, "")


def _differences(a: ir.Node, b: ir.Node, pairs: Pairs, renamed: Mapping[str, str]) -> str:
    parts = []
    before, after = given_inputs(a), given_inputs(b)
    moved = [
        f"{_name(x) or '∅'} → {_name(y) or '∅'}"
        for x, y in zip(before, after, strict=False)
        if not same_value(x, y, pairs, renamed)
    ]
    moved += [f"+ {_name(value)}" for value in after[len(before) :]]
    moved += [f"- {_name(value)}" for value in before[len(after) :]]
    if moved:
        parts.append("inputs " + ", ".join(moved))
    left, right = ({key: _attribute(item) for key, item in node.attributes.items()} for node in (a, b))
    for key in sorted({*left, *right}):
        if left.get(key) != right.get(key):
            parts.append(f"{key} {left.get(key, '∅')} → {right.get(key, '∅')}")
    return "; ".join(parts)


def given_inputs(node: ir.Node) -> list[ir.Value | None]:
    """Without the empty ones at the end, which a file may leave out or name."""
    inputs = list(node.inputs)
    while inputs and inputs[-1] is None:
        inputs.pop()
    return inputs


def same_value(a: ir.Value | None, b: ir.Value | None, pairs: Pairs, renamed: Mapping[str, str]) -> bool:
    """Whether two values are the same thing under another name at most."""
    if a is None or b is None:
        return a is b
    if constant(b) is not None:
        return constant(a) is not None and renamed.get(str(b.name), b.name) == a.name
    first, second = a.producer(), b.producer()
    if first is None or second is None:
        return first is second and (a.name == b.name or renamed.get(str(b.name)) == a.name)
    return pairs.get(first) is second and a.index() == b.index()


def _name(value: ir.Value | None) -> str:
    return str(value.name) if value is not None else ""


def _attribute(attribute: ir.Attr) -> str:
    """An attribute as text that is equal where the attribute is; the nodes of subgraphs are compared by themselves."""
    if attribute.type == ir.AttributeType.TENSOR:
        tensor = attribute.as_tensor()
        return f"{_describe(tensor)} #{_digest(tensor)[:8]}"
    if attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
        return "graph"
    return str(attribute.value)


def initializers(model: ir.Model) -> dict[str, ir.TensorProtocol]:
    """The constants by name: initializers, those of subgraphs too (a name that occurs again gets its graph's name)."""
    found: dict[str, ir.TensorProtocol] = {}
    for graph in model.graphs():
        for name, value in graph.initializers.items():
            if value.const_value is not None:
                found[f"{graph.name}/{name}" if name in found else name] = value.const_value
    return found


Constants = Mapping[str, ir.TensorProtocol]


def same_constants(a: Constants, b: Constants) -> dict[str, str]:
    """The constants of `b`, by name, that hold the same bytes as one of `a`, and what that is called; names first."""
    same = {name: name for name in b if name in a and _info(a[name]) == _info(b[name]) and _equal(a[name], b[name])}
    known: dict[TensorInfo, list[str]] = defaultdict(list)
    for name, tensor in a.items():
        known[_info(tensor)].append(name)
    digests: dict[str, str] = {}
    taken = set(same)
    for name, tensor in b.items():
        candidates = known.get(_info(tensor), []) if name not in same else []
        for other in candidates:
            if other in taken or (other in b and other in same):
                continue
            if other not in digests:
                digests[other] = _digest(a[other])
            if digests[other] == _digest_once(name, tensor, digests):
                same[name] = other
                taken.add(other)
                break
    return same


def _digest_once(name: str, tensor: ir.TensorProtocol, known: dict[str, str]) -> str:
    key = f"\0{name}"  # of the second model: no name of the first one has that character
    if key not in known:
        known[key] = _digest(tensor)
    return known[key]


def _equal(a: ir.TensorProtocol, b: ir.TensorProtocol) -> bool:
    return a is b or _digest(a) == _digest(b)


def initializer_changes(a: Constants, b: Constants, same: Mapping[str, str]) -> Iterator[InitializerChange]:
    """`same` as `same_constants` gives it: what is only called otherwise is no change."""
    kept = set(same.values())
    for name, tensor in a.items():
        if name in kept:
            continue
        before, other = _info(tensor), b.get(name)
        if other is None or name in same:
            yield InitializerChange("removed", name, before, None)
        else:
            yield InitializerChange("changed", name, before, _info(other), _relative_error(tensor, other))
    for name, tensor in b.items():
        if name not in same and (name not in a or name in kept):
            yield InitializerChange("added", name, None, _info(tensor))


def _relative_error(a: ir.TensorProtocol, b: ir.TensorProtocol) -> float | None:
    floats = all(tensor.dtype.is_floating_point() for tensor in (a, b))
    if not floats or list(a.shape.numpy()) != list(b.shape.numpy()):
        return None
    return error_of(b.numpy(), a.numpy())


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


def port_changes(a: ir.Model, b: ir.Model) -> Iterator[PortChange]:
    sides: tuple[Literal["input", "output"], ...] = ("input", "output")
    for direction in sides:
        left, right = (
            {str(value.name): f"{value.dtype.name if value.dtype else '?'}{value.shape or '[?]'}" for value in values}
            for values in ((m.graph.inputs if direction == "input" else m.graph.outputs) for m in (a, b))
        )
        for name in dict.fromkeys((*left, *right)):
            if left.get(name) != right.get(name):
                yield PortChange(direction, name, left.get(name, ""), right.get(name, ""))


def new_quantization(a: ir.Model, b: ir.Model, pairs: Pairs) -> Iterator[Quantization]:
    partners = {other: node for node, other in pairs.items()}
    for node in nodes_of(b):
        old = partners.get(node)
        known = {_nameless(item) for item in _quantization(old)} if old is not None else set()
        yield from (item for item in _quantization(node) if _nameless(item) not in known)


def _nameless(item: Quantization) -> Quantization:
    return replace(item, node="", value="")


def _quantization(node: ir.Node) -> Iterator[Quantization]:
    for operand in quantized(node):
        value = operand.codes.of(node)
        scale = _scale(node, operand, value)
        source = node.inputs[0] if has(node, "quantizes") else value
        if value is None or scale is None or source is None:
            continue
        zero = operand.zero_point.of(node) if operand.zero_point is not None else None
        sizes = [1] if scale.shape is None else [size if isinstance(size, int) else 0 for size in scale.shape]
        told = zero if zero is not None and zero.dtype is not None else value
        yield Quantization(
            node=label(node),
            op=operator(node),
            operand="" if has(node, "quantizes") or has(node, "decodes") else _label(operand),
            value=str(source.name),
            type=told.dtype.name if told.dtype is not None else "",
            scales=math.prod(sizes),
            scale=_span(scale),
            zero_point=_span(zero),
        )


def _scale(node: ir.Node, operand: QuantizedOperand, codes: ir.Value | None) -> ir.Value | None:
    """The scale of an operand: an input; or what made the codes has it, or what scales the sums behind the operator."""
    if operand.scale is not None:
        return operand.scale.of(node)
    maker = codes.producer() if codes is not None else None
    made = next((found for found in quantized(maker) if found.codes.of(maker) is codes), None) if maker else None
    if maker is not None and made is not None and made.scale is not None:
        return made.scale.of(maker)
    return scale_behind(tail_of(node)) if operand.role == "weight" else None


def _label(operand: QuantizedOperand) -> str:
    """An operand's name; one letter is a capital, whatever the operator's schema makes of it."""
    return operand.name.upper() if len(operand.name) == 1 else operand.name


def _span(value: ir.Value | None) -> tuple[float, float] | None:
    tensor = constant(value)
    if tensor is None or tensor.size == 0:
        return None
    data = tensor.numpy().astype(np.float64)
    return float(data.min()), float(data.max())


def totals(model: ir.Model) -> Totals:
    sizes: Counter[str] = Counter()
    for tensor in initializers(model).values():
        sizes[tensor.dtype.name] += tensor.nbytes
    return Totals(
        dict(sorted(Counter(operator(node) for node in nodes_of(model)).items())), dict(sorted(sizes.items()))
    )
