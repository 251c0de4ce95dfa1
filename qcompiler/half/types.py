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

from qcompiler.functions import binary, outliers
from qcompiler.functions import cache as cache_functions
from qcompiler.functions import per_token as token_functions
from qcompiler.functions.library import DOMAIN, FORMATS
from qcompiler.targets import FOLDER, Target
from qcompiler.targets.kernels import CPU_TABLE, RegisteredKernel, read

FLOAT = ir.DataType.FLOAT
TENSOR = {ir.DataType.FLOAT16: "tensor(float16)", ir.DataType.BFLOAT16: "tensor(bfloat16)"}


@dataclass(frozen=True)
class HalfPorts:
    """What changes its type when a node computes in 16 bits, by index."""

    inputs: frozenset[int]
    outputs: frozenset[int]


# ONNX Runtime's operators: the inputs and the outputs that stay as they are.
_RUNTIME: dict[tuple[str, str], tuple[tuple[int, ...], tuple[int, ...]]] = {
    ("", "SimplifiedLayerNormalization"): ((), (1,)),
    ("com.microsoft", "SimplifiedLayerNormalization"): ((), (1,)),
    ("com.microsoft", "SkipLayerNormalization"): ((), (1, 2)),
    ("com.microsoft", "SkipSimplifiedLayerNormalization"): ((), (1, 2)),
    ("com.microsoft", "GroupQueryAttention"): ((12, 13), ()),
    **{
        ("com.microsoft", name): ((), ())
        for name in (
            "Attention", "BiasGelu", "FastGelu", "FusedMatMul", "GatherBlockQuantized", "Gelu", "MatMulBnb4",
            "MatMulNBits", "MultiHeadAttention", "QuickGelu", "RotaryEmbedding",
        )
    },
}  # fmt: skip

# Model-local functions by the inputs that take either type; all of their float outputs but scales follow.
_FUNCTIONS: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    token_functions.QUANTIZE: ((0,), ()),
    token_functions.QUANTIZE_FLOAT8: ((0,), ()),
    token_functions.QUANTIZE_FLOAT8_TENSOR: ((0,), ()),
    cache_functions.QUANTIZE: ((0, 1), ()),
    cache_functions.DYNAMIC: ((0,), ()),
    cache_functions.DYNAMIC_OFFSET: ((0,), ()),
    outliers.SPLIT: ((0,), (1,)),
}

DECODERS: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(FORMATS, ()),
    binary.DEQUANTIZE: (),
    token_functions.DEQUANTIZE: (),
    cache_functions.UNPACK: (),
    cache_functions.DEQUANTIZE: (0,),
    cache_functions.DEQUANTIZE_OFFSET: (0,),
}
"""Model-local functions that give numbers of the type ``output_dtype``, and the inputs that have this type, too."""


def form_of(node: ir.Node, opset: int, dtype: ir.DataType, is_float: Callable[[ir.Value], bool]) -> HalfPorts | None:
    """What of a node becomes `dtype`; None where it has no form in this type, or reads no float32."""
    floats = [i for i, value in enumerate(node.inputs) if value is not None and is_float(value)]
    given = [i for i, value in enumerate(node.outputs) if is_float(value)]
    if node.domain == DOMAIN and node.op_type in _FUNCTIONS:
        taken, made = _FUNCTIONS[node.op_type]
        return HalfPorts(frozenset(taken) & frozenset(floats), frozenset(made))
    if (node.domain, node.op_type) in _RUNTIME:
        kept_inputs, kept_outputs = _RUNTIME[node.domain, node.op_type]
        inputs = frozenset(floats) - frozenset(kept_inputs)
        return HalfPorts(inputs, frozenset(given) - frozenset(kept_outputs)) if inputs else None
    return None if node.domain else _standard(node, opset, dtype, floats, given)


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
            if (node.domain, node.op_type) in _RUNTIME and floats:
                kept = index in _RUNTIME[node.domain, node.op_type][1]
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
