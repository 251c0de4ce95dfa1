"""Recognisers: they find the sites of a canonicalized model. An idiom is recognised here once; passes match nothing.

Recognisers look at operators, shapes and types only; they never read the data of a constant.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod

import onnx_ir as ir

from qcompiler.functions.binary import is_binary, weight_shape
from qcompiler.functions.library import DOMAIN, codebook_format
from qcompiler.graph.edit import constant
from qcompiler.graph.metadata import PART_OF
from qcompiler.graph.module_path import block_of, module_path
from qcompiler.graph.operators import has, weight, weights
from qcompiler.graph.walk import all_nodes
from qcompiler.sites.activations import activation_of
from qcompiler.sites.kinds import (
    Convolution,
    Embedding,
    Linear,
    NormGroup,
    Site,
    Sites,
    Unsupported,
    check_patterns,
    matches,
)

__all__ = [
    "Convolution",
    "Embedding",
    "Linear",
    "NormGroup",
    "Site",
    "Sites",
    "Unsupported",
    "check_patterns",
    "find_sites",
    "matches",
]


def find_sites(model: ir.Model) -> Sites:
    """Every quantizable site of the graph, and every node that would be one if its form were another."""
    found: list[Site] = []
    derived = _derived(model.graph)
    for node in all_nodes(model.graph):
        site = _recognise(node, derived)
        if site is not None and node.graph is not model.graph:
            site = _unsupported(node, "it is inside the body of an If, Loop or Scan")
        if site is not None:
            found.append(site)
    return Sites(tuple(found))


def weight_decoder(node: ir.Node) -> ir.Node | None:
    """What decodes the weight of a linear layer or convolution, once it is quantized."""
    weight = _trace(node.inputs[1], frozenset()) if len(node.inputs) > 1 else None
    return weight.dequantize if isinstance(weight, _Weight) else None


Derived = frozenset[ir.Value]


@dataclass(frozen=True)
class _Weight:
    """A constant that a node reads, and the nodes between."""

    constant: ir.Value
    dequantize: ir.Node | None
    transpose: ir.Node | None

    @property
    def shape(self) -> tuple[int, ...]:
        if is_binary(self.dequantize):
            return weight_shape(self.dequantize)
        return _shape(self.constant)


def _shape(value: ir.Value) -> tuple[int, ...]:
    tensor = constant(value)
    assert tensor is not None  # asked of constants alone
    return tuple(int(size) for size in tensor.shape.numpy())


def _is_float(value: ir.Value) -> bool:
    return value.dtype is not None and value.dtype.is_floating_point()


def _trace(value: ir.Value | None, derived: Derived) -> _Weight | str | None:
    """The float constant behind a value; a reason where it comes from constants in an unknown way; None if computed."""
    if value is None:
        return None
    transpose, value = _behind(value, _swaps)
    dequantize, value = _behind(value, lambda node: decodes_weight(node) and constant(node.inputs[0]) is not None)
    if constant(value) is not None:
        return _Weight(value, dequantize, transpose) if dequantize is not None or _is_float(value) else None
    if value in derived and _is_float(value):
        node = value.producer()
        return f"its weight is computed from constants by {node.op_type if node else '?'}; fold the constants first"
    return None


def _behind(value: ir.Value, is_one: Callable[[ir.Node], bool]) -> tuple[ir.Node | None, ir.Value]:
    """The node that writes a value and what it reads first, where it is one of a kind; else none, and the value."""
    node = value.producer()
    return (node, _input(node, 0)) if node is not None and is_one(node) else (None, value)


def _input(node: ir.Node, index: int) -> ir.Value:
    """An input that the operator cannot do without."""
    value = node.inputs[index]
    assert value is not None  # the structure was checked
    return value


def _is(node: ir.Node, *op_types: str) -> bool:
    return node.domain in ("", "com.microsoft") and node.op_type in op_types


def decodes_weight(node: ir.Node) -> bool:
    """Whether a node makes numbers of codes, as the weights of quantized layers are made."""
    if node.domain == DOMAIN:
        return codebook_format(node) is not None or is_binary(node)
    return _is(node, "DequantizeLinear")


def _swaps(node: ir.Node) -> bool:
    """Whether a node transposes a matrix."""
    if not _is(node, "Transpose"):
        return False
    permutation = node.attributes.get_ints("perm")
    if permutation is not None:
        return list(permutation) == [1, 0]
    shape = _input(node, 0).shape
    return shape is not None and len(shape) == 2


def _derived(graph: ir.Graph) -> Derived:
    """The values that are computed from constants alone. What functions of qcompiler give is quantized, not derived."""
    derived: set[ir.Value] = set()
    for node in all_nodes(graph):
        inputs = [value for value in node.inputs if value is not None]
        has_body = any(attribute.type == ir.AttributeType.GRAPH for attribute in node.attributes.values())
        if not inputs or has_body or node.domain == DOMAIN:
            continue
        if all(value in derived or constant(value) is not None for value in inputs):
            derived.update(node.outputs)
    return frozenset(derived)


def _is_matrix(shape: Sequence[int]) -> bool:
    return sum(size > 1 for size in shape) > 1


# ---------------------------------------------------------------------------------------------------- operators


def _recognise(node: ir.Node, derived: Derived) -> Site | None:
    if PART_OF in node.metadata_props:
        return None
    if _is(node, "MatMul", "Gemm", "FusedMatMul"):
        return _linear(node, derived)
    if _is(node, "Conv"):
        return _convolution(node, derived)
    if node.domain == "" and node.op_type == "Gather":
        return _embedding(node, derived)
    if (codes := weight(node)) is not None:
        is_constant = constant(codes.codes.of(node)) is not None
        return _unsupported(node, f"it is quantized already ({node.op_type})") if is_constant else None
    traced = [_trace(node.inputs[index], derived) for index in weights(node) if index < len(node.inputs)]
    if any(isinstance(found, str) or (found is not None and _is_matrix(found.shape)) for found in traced):
        return _unsupported(node, f"no pass handles the weights of {node.op_type}")
    return None


def _unsupported(node: ir.Node, reason: str) -> Unsupported:
    path = module_path(node)
    return Unsupported(node=node, name=node.name or "", module_path=path, block=block_of(path), reason=reason)


def _linear(node: ir.Node, derived: Derived) -> Linear | Unsupported | None:
    source = _input(node, 0)
    left, right = _trace(source, derived), _trace(node.inputs[1], derived)
    if right is None:
        if isinstance(left, str) or (left is not None and _is_matrix(left.shape)):
            return _unsupported(node, "its constant is the left operand; only x W is handled, not W x")
        return None
    if left is not None:
        return None  # constants alone: nothing that data flows through
    if isinstance(right, str):
        return _unsupported(node, right)
    if len(right.shape) != 2:
        return _unsupported(node, f"its weight has rank {len(right.shape)}, not 2") if _is_matrix(right.shape) else None
    if refusal := _attributes_refused(node):
        return _unsupported(node, refusal)
    transposed = (right.transpose is not None) != bool(node.attributes.get_int("transB", 0))
    features, outputs = reversed(right.shape) if transposed else right.shape
    if features == 1:
        return _unsupported(node, "it has one input feature: an outer product, such as rotary angles, is left alone")
    bias, bias_node = _gemm_bias(node, outputs) if node.op_type == "Gemm" else _added_bias(node, outputs)
    if isinstance(bias, str):
        return _unsupported(node, bias)
    # A transposed weight is another layer's (tied), unless it is one of the codes that always have a row an output.
    named = right.transpose is None or (right.dequantize is not None and right.dequantize.domain == DOMAIN)
    path = module_path(node, right.constant if named else None)
    return Linear(
        node=node, name=node.name or "", module_path=path, block=block_of(path), input=source,
        weight=right.constant, transposed=transposed, dequantize=right.dequantize, transpose=right.transpose,
        bias=bias, bias_node=bias_node, in_features=features, out_features=outputs, activation=activation_of(source),
    )  # fmt: skip


def _attributes_refused(node: ir.Node) -> str | None:
    wanted = {"alpha": 1.0, "beta": 1.0, "transA": 0, "transBatchA": 0, "transBatchB": 0}
    for name, value in wanted.items():
        attribute = node.attributes.get(name)
        if attribute is not None and attribute.value != value:
            return f"its attribute {name} is {attribute.value}, not {value}"
    return None


def _is_vector(value: ir.Value, size: int) -> bool:
    """Whether a constant holds `size` numbers along its last axis and nothing else."""
    tensor = constant(value)
    return tensor is not None and len(tensor.shape) > 0 and tensor.shape[-1] == size and prod(_shape(value)) == size


def _gemm_bias(node: ir.Node, outputs: int) -> tuple[ir.Value | str | None, None]:
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is None or _is_vector(bias, outputs):
        return bias, None
    if constant(bias) is not None:
        return f"what it adds has shape {list(_shape(bias))}, not [{outputs}]", None
    return "what it adds is computed, not a constant", None


def _added_bias(node: ir.Node, outputs: int) -> tuple[ir.Value | None, ir.Node | None]:
    product = node.outputs[0]
    uses = list(product.uses())
    if len(uses) != 1 or product.is_graph_output():
        return None, None
    add = uses[0].node
    if add.domain or add.op_type != "Add" or add.graph is not node.graph:
        return None, None
    bias = _input(add, 1 - uses[0].idx)
    if not _is_vector(bias, outputs):
        return None, None
    rank = len(product.shape) if product.shape is not None else 1
    return (bias, add) if len(_shape(bias)) <= rank else (None, None)


def _convolution(node: ir.Node, derived: Derived) -> Convolution | Unsupported | None:
    source, weight = _input(node, 0), _trace(node.inputs[1], derived)
    if weight is None or _trace(source, derived) is not None:
        return None
    if isinstance(weight, str):
        return _unsupported(node, weight)
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is not None and constant(bias) is None:
        return _unsupported(node, "its bias is computed, not a constant")
    path = module_path(node, weight.constant)
    return Convolution(
        node=node, name=node.name or "", module_path=path, block=block_of(path), input=source,
        weight=weight.constant, dequantize=weight.dequantize, bias=bias, activation=activation_of(source),
    )  # fmt: skip


def _embedding(node: ir.Node, derived: Derived) -> Embedding | Unsupported | None:
    table, ids = _trace(node.inputs[0], derived), _input(node, 1)
    if table is None or isinstance(table, str) or table.dequantize is not None or not _is_matrix(table.shape):
        return None
    if constant(ids) is not None or _is_rotary(node):
        return None
    if len(table.shape) != 2:
        return _unsupported(node, f"its table has rank {len(table.shape)}, not 2")
    axis = node.attributes.get_int("axis", 0)
    if axis % 2 != 0:
        return _unsupported(node, f"it gathers along axis {axis}, not rows")
    path = module_path(node, table.constant)
    return Embedding(
        node=node, name=node.name or "", module_path=path, block=block_of(path), table=table.constant, ids=ids,
        transposed=table.transpose is not None, transpose=table.transpose,
    )  # fmt: skip


def _is_rotary(gather: ir.Node) -> bool:
    """Whether what is gathered is cosines or sines that rotate other values, not features of tokens."""
    reached = {gather.outputs[0]}
    readers: list[bool] = []
    waiting = list(reached)
    while waiting:
        for reader, index in waiting.pop().uses():
            if has(reader, "moves") and not has(reader, "picks"):
                waiting += [output for output in reader.outputs if output not in reached]
                reached.update(reader.outputs)
                continue
            rotates = _is(reader, "RotaryEmbedding", "GroupQueryAttention", "MultiHeadAttention")
            scales = _is(reader, "Mul") and constant(reader.inputs[1 - index]) is None
            readers.append((rotates and index > 0) or scales)
    return bool(readers) and all(readers)
