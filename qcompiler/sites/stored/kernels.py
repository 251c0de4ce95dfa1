"""Kernels that multiply by codes: which inputs hold what, and the nodes that make floats of their sums."""

from __future__ import annotations

import onnx_ir as ir

from qcompiler.graph.edit import constant
from qcompiler.graph.operators import has, result, weight


def is_kernel(node: ir.Node) -> bool:
    """Whether it is a product by codes whose order is known: y = x · W, or a convolution."""
    return has(node, "product") and reads_weight(node)


def reads_weight(node: ir.Node) -> bool:
    """Whether it reads the codes of a weight, in an order that is known."""
    return weight(node) is not None and not has(node, "opaque")


def operand(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if 0 <= index < len(node.inputs) else None


def outputs_first(node: ir.Node) -> bool:
    """Whether a product reads its weight as [outputs, inputs, …], and not as [inputs, outputs]."""
    if has(node, "rows"):
        return True
    return bool(node.attributes.get_int("transB", int(node.op_type == "MatMulBnb4")))


def tail_of(node: ir.Node) -> tuple[ir.Node, ...]:
    """The nodes that make the layer's float output of a kernel that gives codes or sums; none where it gives floats."""
    if result(node) is not None:
        after = next((use.node for use in node.outputs[0].uses() if use.node.op_type == "DequantizeLinear"), None)
        return () if after is None else (after,)
    tail: list[ir.Node] = []
    current = _only_reader(node) if gives_sums(node) else None
    while current is not None and _belongs(current, tuple(tail)):
        tail.append(current)
        current = _only_reader(current)
    return tuple(tail)


def gives_sums(node: ir.Node) -> bool:
    """Whether a product by codes gives 32-bit sums, which nodes behind it scale."""
    found = weight(node)
    return is_kernel(node) and found is not None and found.scale is None


def scale_behind(tail: tuple[ir.Node, ...]) -> ir.Value | None:
    """The constant scale that sums are multiplied by, alone or times the activation's."""
    for node in tail:
        if node.op_type != "Mul":
            continue
        for value in node.inputs:
            if constant(value) is not None:
                return value
            inner = value.producer() if value is not None else None
            if inner is None or inner.op_type != "Mul" or inner in tail:
                continue
            known = [item for item in inner.inputs if constant(item) is not None]
            if known:
                return known[0]
    return None


def _belongs(node: ir.Node, tail: tuple[ir.Node, ...]) -> bool:
    """Whether a node turns the sums of an integer product into the layer's output; `tail` are those before it."""
    if node.op_type == "Sub":
        return not tail  # the zero point of the input times the sums of the columns
    if node.op_type in ("Cast", "Reshape"):
        return node.op_type == "Cast" or scale_behind(tail) is not None
    if node.op_type == "Mul":
        return scale_behind(tail) is None
    return (
        node.op_type == "Add" and scale_behind(tail) is not None and any(constant(v) is not None for v in node.inputs)
    )


def _only_reader(node: ir.Node) -> ir.Node | None:
    uses = list(node.outputs[0].uses())
    return uses[0].node if len(uses) == 1 and not node.outputs[0].is_graph_output() else None
