"""Linear layers that read the same value, and what writes it: the gains of a norm, or another linear layer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import onnx_ir as ir

from qcompiler.graph.edit import constant
from qcompiler.graph.module_path import block_of, module_path
from qcompiler.graph.operators import gains, has
from qcompiler.sites.fold_targets import find_factor, readers
from qcompiler.sites.kinds import Factor, Linear, NormGroup

Gains = tuple[tuple[ir.Node, int], ...]


def group_linears(linears: Iterable[Linear]) -> tuple[NormGroup, ...]:
    """The linear layers by the value that they read, with the gains that scale it (`analyses.linear_groups_of`)."""
    by_input: dict[ir.Value, list[Linear]] = {}
    writers: dict[ir.Value, Linear] = {}
    for linear in linears:
        by_input.setdefault(linear.input, []).append(linear)
        writers[linear.output] = linear
    groups = []
    for value, members in by_input.items():
        source = _source(value, members[0].in_features)
        node = source.node or value.producer() or members[0].node
        gain = node.inputs[source.gains[0][1]] if source.gains and source.gains[0][0] is node else None
        path = module_path(node, gain)
        nodes = {linear.node for linear in members}
        others = tuple(node for node in readers(value) if node not in nodes)
        found = None if source.gains else find_factor(value, members[0].in_features, writers)
        group = NormGroup(
            node=node, name=node.name or "", module_path=path, block=block_of(path), output=value,
            gains=source.gains, linears=tuple(members), others=others + source.others,
            factor=found if isinstance(found, Factor) else None, refusal=found if isinstance(found, str) else "",
        )  # fmt: skip
        groups.append(group)
    return tuple(groups)


@dataclass(frozen=True)
class _Source:
    node: ir.Node | None = None
    gains: Gains = ()
    others: tuple[ir.Node, ...] = ()


def _source(value: ir.Value, features: int) -> _Source:
    """The norm that writes a value, and who else reads the norm where nodes that only pass it on stand between."""
    others: list[ir.Node] = []
    while not value.is_graph_output():
        node = value.producer()
        if node is None:
            return _Source()
        if gains := _gains(node, value, features):
            return _Source(node, gains, tuple(others))
        if not _passes_on(node, features) or node.inputs[0] is None:
            return _Source()
        value = node.inputs[0]
        others.extend(reader for reader in readers(value) if reader is not node)
    return _Source()


def _passes_on(node: ir.Node, features: int) -> bool:
    """Whether a node leaves numbers and last axis as they are: a Cast, or a Reshape such as before a Gemm."""
    if node.domain or node.op_type not in ("Cast", "Reshape"):
        return False
    shapes = [value.shape for value in (node.inputs[0], node.outputs[0]) if value is not None]
    if node.op_type == "Cast":
        return True
    return all(shape is not None and len(shape) > 0 and shape[-1] == features for shape in shapes)


def _gains(node: ir.Node, value: ir.Value, features: int) -> Gains:
    if value is not node.outputs[0]:
        return ()
    if has(node, "norm"):
        # Linear layers read the first output; the other ones of the Skip variants are the residual stream and
        # statistics, which the gain does not scale.
        places = [(node, i) for i in gains(node) if i < len(node.inputs)]
        places = [(node, i) for node, i in places if node.inputs[i] is not None]
        return tuple(places) if all(_is_gain(node.inputs[i], features) for node, i in places) else ()
    if node.domain:
        return ()
    if node.op_type == "Mul":
        return tuple((node, i) for i in (0, 1) if _is_gain(node.inputs[i], features))[:1]
    if node.op_type == "Add":
        return _gain_and_bias(node, features)
    return ()


def _gain_and_bias(add: ir.Node, features: int) -> Gains:
    """x * gain + bias, the end of a decomposed LayerNormalization."""
    for index in (0, 1):
        product = add.inputs[1 - index]
        if not _is_gain(add.inputs[index], features) or product is None or product.is_graph_output():
            continue
        multiply = product.producer()
        if multiply is None or multiply.domain or multiply.op_type != "Mul" or len(product.uses()) != 1:
            continue
        if gains := _gains(multiply, product, features):
            return (*gains, (add, index))
    return ()


def _is_gain(value: ir.Value | None, features: int) -> bool:
    """Whether a value is a constant [K], or [1, …, K]."""
    tensor = constant(value)
    if tensor is None or len(tensor.shape) == 0 or tensor.shape[-1] != features:
        return False
    return all(size == 1 for size in tensor.shape[:-1])
