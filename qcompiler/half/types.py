"""Which inputs and outputs of a node can be of 16 bits: by ONNX's schemas, and a table for what these do not know.

A node that takes 16 bits need not take them everywhere: the scales of GroupQueryAttention's cache stay float32, so does
the mean that LayerNormalization gives out. `form_of` says which inputs and outputs change with the node's type.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

import onnx
import onnx_ir as ir

from qcompiler.functions.library import DOMAIN
from qcompiler.graph.operators import Operator, Slot, has, operator_of
from qcompiler.targets import FOLDER, Target
from qcompiler.targets.kernels import CPU_TABLE, RegisteredKernel, read

FLOAT = ir.DataType.FLOAT
TENSOR = {ir.DataType.FLOAT16: "tensor(float16)", ir.DataType.BFLOAT16: "tensor(bfloat16)"}


@dataclass(frozen=True)
class HalfPorts:
    """What changes its type when a node computes in 16 bits, by index."""

    inputs: frozenset[int]
    outputs: frozenset[int]


def form_of(node: ir.Node, opset: int, dtype: ir.DataType, is_float: Callable[[ir.Value], bool]) -> HalfPorts | None:
    """What of a node becomes `dtype`; None where it has no form in this type, or reads no float32."""
    floats = [i for i, value in enumerate(node.inputs) if value is not None and is_float(value)]
    given = [i for i, value in enumerate(node.outputs) if is_float(value)]
    row = operator_of(node)
    if row is not None and node.domain == DOMAIN and following(row.inputs) and not gives_output_dtype(node):
        return HalfPorts(following(row.inputs) & frozenset(floats), following(row.outputs))
    if row is not None and "half" in row.traits:
        inputs = frozenset(floats) - _kept(row, row.inputs)
        return HalfPorts(inputs, frozenset(given) - _kept(row, row.outputs)) if inputs else None
    return None if node.domain else _standard(node, opset, dtype, floats, given)


def gives_output_dtype(node: ir.Node) -> bool:
    """Whether it is a function of ours that gives numbers of the type `output_dtype`."""
    return node.domain == DOMAIN and has(node, "typed")


def following(ports: tuple[Slot, ...]) -> frozenset[int]:
    """Those of a function's inputs, or outputs, that have the type that the model computes in."""
    return frozenset(index for index, port in enumerate(ports) if port.follows)


def _kept(row: Operator, ports: tuple[Slot, ...]) -> frozenset[int]:
    """The inputs, or outputs, of an operator of ONNX Runtime that stay float32: statistics, and scales of a cache."""
    pasts = {port.name for port in row.inputs if port.role == "past"}
    return frozenset(
        index for index, port in enumerate(ports)
        if port.role == "statistic" or (port.role == "scale" and port.of in pasts)
    )  # fmt: skip


def _standard(
    node: ir.Node, opset: int, dtype: ir.DataType, floats: Sequence[int], given: Sequence[int]
) -> HalfPorts | None:
    schema, tensor = _schema(node.op_type, opset), TENSOR[dtype]
    if schema is None:
        return None
    allowed = {item.type_param_str: item.allowed_type_strs for item in schema.type_constraints}
    kinds = {i: schema.inputs[min(i, len(schema.inputs) - 1)].type_str for i in floats}
    inputs = frozenset(i for i, kind in kinds.items() if tensor in allowed.get(kind, ()))
    if not inputs or not _has_kernel(schema, frozenset(kinds[i] for i in inputs), dtype):
        return None
    changed, kept = {kinds[i] for i in inputs}, {kinds[i] for i in floats if i not in inputs}
    outputs = [i for i in given if schema.outputs[min(i, len(schema.outputs) - 1)].type_str in changed - kept]
    return HalfPorts(inputs, frozenset(outputs))


def _has_kernel(schema: onnx.defs.OpSchema, constraints: frozenset[str], dtype: ir.DataType) -> bool:
    """Whether the CUDA provider runs an operator in 16 bits.

    What it has no kernel for runs on the CPU, which reads float16 through Casts of its own, and bfloat16 not at all: no
    session would start. What the CPU has no kernel for either, the runtime takes apart into others, if it can; in
    bfloat16 not all of these have kernels.
    """
    name = dtype.name.lower()
    if any(
        all(name in dict(kernel.types).get(constraint, (name,)) for constraint in constraints)
        for kernel in _kernels(FOLDER / Target.load("ort-cuda").registry).get(schema.name, ())
        if kernel.fits(schema.since_version)
    ):
        return True
    taken_apart = schema.has_function or schema.has_context_dependent_function
    return dtype == ir.DataType.FLOAT16 and taken_apart and schema.name not in _kernels(CPU_TABLE)


@cache
def _kernels(table: Path) -> dict[str, list[RegisteredKernel]]:
    """A provider's kernels of standard operators, by name."""
    found: dict[str, list[RegisteredKernel]] = defaultdict(list)
    for kernel in read(table).kernels:
        if not kernel.domain:
            found[kernel.op].append(kernel)
    return found


@lru_cache
def _schema(op_type: str, opset: int) -> onnx.defs.OpSchema | None:
    try:
        return onnx.defs.get_schema(op_type, opset, "")
    except onnx.defs.SchemaError:
        return None


def fill_in_types(model: ir.Model) -> None:
    """Give values whose type shape inference could not tell, behind operators of ONNX Runtime, the type they have."""
    for node in model.graph:
        known = [value.dtype for value in node.inputs if value is not None and value.dtype is not None]
        floats = [dtype for dtype in known if dtype.is_floating_point()]
        for index, output in enumerate(node.outputs):
            if output.dtype is not None or not output.name:
                continue
            row = operator_of(node)
            if row is not None and "half" in row.traits and floats:
                kept = index in _kept(row, row.outputs)
                output.type = ir.TensorType(FLOAT if kept else floats[0])
            elif not node.domain and (dtype := _inferred(node, index, model.opset_imports[""])) is not None:
                output.type = ir.TensorType(dtype)


def _inferred(node: ir.Node, index: int, opset: int) -> ir.DataType | None:
    """The type of an output whose type variable an input has, too, or that an attribute states."""
    if node.op_type == "Cast":
        return ir.DataType(node.attributes.get_int("to", int(FLOAT)))
    schema = _schema(node.op_type, opset)
    if schema is None:
        return None
    wanted = schema.outputs[min(index, len(schema.outputs) - 1)].type_str
    for i, value in enumerate(node.inputs):
        if value is not None and schema.inputs[min(i, len(schema.inputs) - 1)].type_str == wanted and value.dtype:
            return value.dtype
    return {"tensor(int64)": ir.DataType.INT64, "tensor(bool)": ir.DataType.BOOL}.get(wanted)
