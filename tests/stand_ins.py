"""Operators that ONNX Runtime has for CUDA alone, in standard ones, so that tests can run them on the CPU.

Written from the operators' schemas in ONNX Runtime. They compute in float32, and round the result to the model's type.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qcompiler.graph.edit import Names, add_constant, insert_before, new_node, replace_output
from tests.there import dims, held, numpy_type, operand, operands, there


def on_cpu(model: ir.Model) -> ir.Model:
    """The model itself, or a copy in which such operators are replaced."""
    if not any(node.op_type in _STAND_INS for node in model.graph):
        return model
    copy = model.clone()
    names = Names(copy.graph)
    for node in list(copy.graph):
        if node.op_type in _STAND_INS:
            _STAND_INS[node.op_type](node, copy.graph, names)
    return copy


def weight_of_blocks(codes: np.ndarray, scale: np.ndarray, block_size: int) -> np.ndarray:
    """codes [N, K] · scale [N, ⌈K / block_size⌉], float64."""
    return codes.astype(np.float64) * np.repeat(scale.astype(np.float64), block_size, axis=1)[:, : codes.shape[1]]


def _weight_only(node: ir.Node, graph: ir.Graph, names: Names) -> None:
    a, b, scale = operands(node)
    assert len(node.outputs) == 1
    assert (a.dtype or ir.DataType.FLOAT16) in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
    assert (b.dtype, scale.dtype) == (ir.DataType.FLOAT8E4M3FN, ir.DataType.FLOAT)
    codes, scales = held(b), held(scale)
    block = node.attributes["block_size"].value
    assert scales.shape == (codes.shape[0], -(-codes.shape[1] // block))
    W = weight_of_blocks(codes, scales, block).astype(numpy_type(a) if a.dtype else np.float16)
    _replace(node, graph, names, a, None, W.T, there(node.outputs[0].dtype))


def _gemm(node: ir.Node, graph: ir.Graph, names: Names) -> None:
    assert node.inputs[2] is None
    a, b, scale_a, scale_b = (operand(node, index) for index in (0, 1, 3, 4))
    assert node.attributes["transB"].value == 1
    assert "transA" not in node.attributes
    assert len(dims(a)) == 2
    assert scale_a.dtype == scale_b.dtype == ir.DataType.FLOAT
    W = held(b).astype(np.float64) * held(scale_b).astype(np.float64)
    _replace(node, graph, names, a, scale_a, W.T, ir.DataType(node.attributes["dtype"].value))


def _replace(
    node: ir.Node, graph: ir.Graph, names: Names, a: ir.Value, scale: ir.Value | None, W: np.ndarray, dtype: ir.DataType
) -> None:
    value, single = a, ir.DataType.FLOAT
    weight = add_constant(graph, names.fresh("stand_in.weight"), W.astype(np.float32))
    for op_type, others, to in (("Cast", [], single), ("Mul", [scale], single), ("MatMul", [weight], single),
                                ("Cast", [], dtype)):  # fmt: skip
        if others == [None]:
            continue
        attributes: dict[str, object] = {"to": int(to)} if op_type == "Cast" else {}
        name = names.fresh(f"stand_in.{op_type}")
        step = new_node(op_type, [value, *others], name, dtype=to, attributes=attributes)
        insert_before(node, [step])
        value = step.outputs[0]
    replace_output(node, value)


_STAND_INS = {"MatMulBlockQuantizedFp8Weight": _weight_only, "GemmFloat8": _gemm}
