"""Models in 16 bits on CPUs, whose kernels compute in float32: the numbers of kernels in 16 bits all the same.

ONNX Runtime has no products in bfloat16 for CPUs. Float16 it runs in float32 between Casts, and takes out the Casts
between two such nodes: nothing is rounded, and nothing overflows, but weights. So that a comparison on the CPU shows
what 16 bits cost, a model is emulated: what a node gives is rounded to its type, and widened again.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qcompiler.graph.edit import Names, insert_after, new_node
from qcompiler.graph.lazy import derived
from qcompiler.graph.operators import has
from qcompiler.half.plan import HALF_TYPES

FLOAT = ir.DataType.FLOAT
TYPE_ATTRIBUTES = ("to", "output_dtype", "dtype", "scale_dtype")


def emulated(model: ir.Model) -> ir.Model:
    """A model in float32 that gives the numbers of one in 16 bits, in which kernels accumulate in float32.

    Inputs and outputs are float32, too. Constants are widened when they are read. The model itself stays as it was.
    """
    copy = model.clone()
    names = Names(copy.graph)
    for value in (*copy.graph.inputs, *copy.graph.initializers.values()):
        if value.dtype in HALF_TYPES:
            _widen(value)
    for node in list(copy.graph):
        for name in TYPE_ATTRIBUTES:
            if node.attributes.get_int(name, 0) in map(int, HALF_TYPES):
                node.attributes[name] = ir.AttrInt64(name, int(FLOAT))
        for value in node.outputs:
            dtype = value.dtype
            if dtype is None or dtype not in HALF_TYPES:
                continue
            value.type = ir.TensorType(FLOAT)
            if node.op_type == "Cast" or not has(node, "moves"):
                _round(value, dtype, node, names)
    return copy


def _widen(value: ir.Value) -> None:
    value.type = ir.TensorType(FLOAT)
    tensor = value.const_value
    if tensor is not None:
        shape = tuple(int(size) for size in tensor.shape.numpy())
        value.const_value = derived(tensor, lambda data: data.astype(np.float32), FLOAT, shape, str(value.name))


def _round(value: ir.Value, dtype: ir.DataType, node: ir.Node, names: Names) -> None:
    rounded = new_node("Cast", [value], names.fresh(f"{value.name}.rounded"), dtype=dtype, shape=value.shape,
                       attributes={"to": int(dtype)})  # fmt: skip
    widened = new_node("Cast", [rounded.outputs[0]], names.fresh(f"{value.name}.widened"), dtype=FLOAT,
                       shape=value.shape, attributes={"to": int(FLOAT)})  # fmt: skip
    name, result = value.name, widened.outputs[0]
    given = value.is_graph_output()
    value.replace_all_uses_with(result, replace_graph_outputs=True)
    rounded.replace_input_with(0, value)
    insert_after(node, [rounded, widened])
    if given:
        value.name, result.name = names.fresh(f"{name}.exact"), name
