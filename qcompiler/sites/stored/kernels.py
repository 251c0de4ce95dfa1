"""Kernels that multiply by codes: which inputs hold what, and the nodes that make floats of their sums."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from qcompiler.graph.edit import constant


@dataclass(frozen=True)
class Places:
    """Which inputs of a kernel hold what; -1: none does."""

    weight: int
    scale: int
    zero: int
    x_scale: int = -1
    x_zero: int = -1
    y_scale: int = -1
    """Set where the kernel gives codes."""


KERNELS: dict[str, Places] = {
    "MatMulNBits": Places(1, 2, 3),
    "MatMulBnb4": Places(1, 2, -1),
    "MatMulBlockQuantizedFp8Weight": Places(1, 2, -1),
    "GemmFloat8": Places(1, 4, -1, 3),
    "MatMulIntegerToFloat": Places(1, 3, 5, 2, 4),
    "DynamicQuantizeMatMul": Places(1, 2, 3),
    "MatMulInteger": Places(1, -1, 3, -1, 2),
    "ConvInteger": Places(1, -1, 3, -1, 2),
    "QLinearMatMul": Places(3, 4, 5, 1, 2, 6),
    "QLinearConv": Places(3, 4, 5, 1, 2, 6),
    "QGemm": Places(3, 4, 5, 1, 2, 7),
}
"""Products: y = x · W, or a convolution."""
CODED: dict[str, Places] = KERNELS | {
    "GatherBlockQuantized": Places(0, 2, 3),
    "DynamicQuantizeLSTM": Places(1, 8, 9),
    "QAttention": Places(1, 4, 7),
}
"""Whatever reads the codes of a weight."""


def operand(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if 0 <= index < len(node.inputs) else None


def outputs_first(node: ir.Node) -> bool:
    """Whether a product reads its weight as [outputs, inputs, …], and not as [inputs, outputs]."""
    if "Conv" in node.op_type or node.op_type in ("MatMulNBits", "MatMulBlockQuantizedFp8Weight"):
        return True
    return bool(node.attributes.get_int("transB", int(node.op_type == "MatMulBnb4")))


def tail_of(node: ir.Node) -> tuple[ir.Node, ...]:
    """The nodes that make the layer's float output of a kernel that gives codes or sums; none where it gives floats."""
    if KERNELS[node.op_type].y_scale >= 0:
        after = next((use.node for use in node.outputs[0].uses() if use.node.op_type == "DequantizeLinear"), None)
        return () if after is None else (after,)
    tail: list[ir.Node] = []
    current = _only_reader(node) if node.op_type in ("MatMulInteger", "ConvInteger") else None
    while current is not None and _belongs(current, tuple(tail)):
        tail.append(current)
        current = _only_reader(current)
    return tuple(tail)


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
