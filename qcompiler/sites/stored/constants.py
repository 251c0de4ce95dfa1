"""What a chain of nodes over constants gives, of what shape, and which constants it is made of."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from qcompiler.errors import ModelError
from qcompiler.formats.arithmetic import quantize
from qcompiler.functions.binary import UNPACK, is_binary, unpacked_signs
from qcompiler.functions.library import DOMAIN, codebook_format
from qcompiler.graph.edit import constant
from qcompiler.graph.operators import has
from qcompiler.sites.stored.layout import Array, decoder_layout, decodes


def source(value: ir.Value | None) -> ir.Value | None:
    """The constant behind a value, through operators that only move, cast or quantize it; None where it is computed."""
    while value is not None and constant(value) is None:
        node = value.producer()
        value = node.inputs[0] if node is not None and _leaves_numbers(node) else None
    return value


def _leaves_numbers(node: ir.Node) -> bool:
    """Whether a node leaves the numbers of a constant about as they are, but for their place and type."""
    if node.domain == DOMAIN:
        return node.op_type == UNPACK  # what decodes a weight of ours ends the way: its codes are the weight
    return _recodes(node) or (has(node, "moves") and _rule(node) is not None)


def _recodes(node: ir.Node) -> bool:
    """Whether it quantizes or decodes by a scale that is given to it."""
    return has(node, "elementwise") and (has(node, "quantizes") or has(node, "decodes"))


def chain(value: ir.Value | None) -> tuple[ir.Node, ...]:
    """The nodes between a value and the constant behind it, first input after first input, the nearest one first.

    Where it is computed, those up to the first node that no form of a weight needs.
    """
    found: list[ir.Node] = []
    while value is not None and constant(value) is None:
        node = value.producer()
        if node is None or _rule(node) is None:
            break
        found.append(node)
        value = node.inputs[0]
    return tuple(found)


def shape_of(value: ir.Value | None) -> tuple[int, ...] | None:
    """The shape of a value that constants make up; None where it depends on the model's inputs."""
    tensor = constant(value)
    if value is None or tensor is not None:
        return None if tensor is None else tuple(int(size) for size in tensor.shape.numpy())
    node = value.producer()
    before = shape_of(node.inputs[0]) if node is not None and _rule(node) is not None else None
    if node is None or before is None:
        return None
    if (has(node, "elementwise") and node.op_type not in ("Add", "Mul")) or codebook_format(node) is not None:
        return before
    if node.domain == "" and node.op_type == "Transpose":
        order = node.attributes.get_ints("perm") or range(len(before))[::-1]
        if sorted(order) != list(range(len(before))):
            raise _impossible(node, f"{list(order)} is no order of {len(before)} axes")
        return tuple(before[axis] for axis in order)
    if is_binary(node):
        return before[0], node.attributes.get_int("in_features", 0) or 0
    if value.shape is not None and all(isinstance(size, int) for size in value.shape):
        return tuple(int(size) for size in value.shape)  # type: ignore[arg-type]
    data = evaluate(value)
    return None if data is None else data.shape


def constants_behind(*values: ir.Value | None) -> tuple[ir.Value, ...]:
    """Each constant that the values are made of once, in order; what says how to move one is none of them."""
    found: dict[ir.Value, None] = {}
    seen: set[ir.Node] = set()

    def visit(value: ir.Value | None) -> None:
        node = value.producer() if value is not None else None
        if value is not None and constant(value) is not None:
            found[value] = None
        elif node is not None and node not in seen and (_rule(node) is not None):
            seen.add(node)
            computes = node.op_type in ("Add", "Mul", "QuantizeLinear") or decodes(node)
            for item in node.inputs if computes else node.inputs[:1]:
                visit(item)

    for value in values:
        visit(value)
    return tuple(found)


def evaluate(value: ir.Value | None) -> Array | None:
    """The numbers of a value that constants make up; None where it depends on the model's inputs.

    Also None for operators that no form of a weight needs: whoever compares then says that it cannot.
    """
    if value is None:
        return None
    tensor = constant(value)
    if tensor is not None:
        return tensor.numpy()  # a view of the file where it lies in one
    node = value.producer()
    rule = _rule(node) if node is not None else None
    if node is None or rule is None:
        return None
    inputs = [evaluate(item) for item in node.inputs]
    if any(item is not None and data is None for item, data in zip(node.inputs, inputs, strict=True)):
        return None
    try:
        return rule(node, inputs)
    except (ValueError, IndexError, TypeError, OverflowError, ZeroDivisionError) as error:
        raise _impossible(node, str(error)) from error


def _impossible(node: ir.Node, reason: str) -> ModelError:
    return ModelError(
        f"the node {node.name!r} ({node.op_type}) cannot be computed on the constants that it reads "
        f"({' '.join(reason.split())}); export the model again"
    )


Rule = Callable[[ir.Node, list[Array | None]], Array | None]


def _rule(node: ir.Node) -> Rule | None:
    return _decoded if decodes(node) else _RULES.get((node.domain, node.op_type))


def _decoded(node: ir.Node, inputs: list[Array | None]) -> Array | None:
    codes, scale, zero_point = (*inputs, None)[:3]
    if codes is None or scale is None:
        return None
    layout = decoder_layout(node, codes.shape, scale.shape)
    if layout is None:
        return None
    found = layout.numbers(codes, scale, zero_point)
    return found.reshape(codes.shape) if layout.codebook else found


def _quantize(node: ir.Node, inputs: list[Array | None]) -> Array | None:
    data, scale, zero_point = (*inputs, None)[:3]
    if data is None or scale is None:
        return None
    dtype = np.dtype(np.uint8) if zero_point is None else zero_point.dtype
    if dtype not in _FORMATS:
        return None
    axis = node.attributes.get_int("axis", 1) if scale.size > 1 else None
    if axis is None:
        scale, zero_point = scale.reshape(()), None if zero_point is None else zero_point.reshape(())
    return quantize(data, scale, zero_point, _FORMATS[dtype], axis, node.attributes.get_int("block_size", 0) or None)


_FORMATS = {np.dtype(np.int8): "int8", np.dtype(np.uint8): "uint8"}


def _unpack(node: ir.Node, inputs: list[Array | None]) -> Array | None:
    bits = inputs[0]
    return None if bits is None else unpacked_signs(bits, bits.shape[1] * 8).T


def _transpose(node: ir.Node, inputs: list[Array | None]) -> Array | None:
    permutation = node.attributes.get_ints("perm")
    return None if inputs[0] is None else np.transpose(inputs[0], permutation)


def _reshape(node: ir.Node, inputs: list[Array | None]) -> Array | None:
    data, shape = inputs[:2]
    if data is None or shape is None:
        return None
    sizes = [data.shape[i] if size == 0 else int(size) for i, size in enumerate(shape)]
    return data.reshape(sizes)


def _unsqueeze(node: ir.Node, inputs: list[Array | None]) -> Array | None:
    data, axes = inputs[0], _axes(node, inputs)
    return data if data is None or axes is None else np.expand_dims(data, axes)


def _squeeze(node: ir.Node, inputs: list[Array | None]) -> Array | None:
    data = inputs[0]
    return None if data is None else np.squeeze(data, _axes(node, inputs))


def _axes(node: ir.Node, inputs: list[Array | None]) -> tuple[int, ...] | None:
    """From the input, or from the attribute that opsets before 13 have."""
    if len(inputs) > 1 and inputs[1] is not None:
        return tuple(int(axis) for axis in inputs[1].reshape(-1))
    old = node.attributes.get_ints("axes")
    return None if old is None else tuple(old)


def _cast(node: ir.Node, inputs: list[Array | None]) -> Array | None:
    data, to = inputs[0], node.attributes.get_int("to")
    return None if data is None or to is None else data.astype(ir.DataType(to).numpy())


def _slice(node: ir.Node, inputs: list[Array | None]) -> Array | None:
    data, starts, ends, axes, steps = (*inputs, None, None)[:5]
    if data is None or starts is None or ends is None:
        return None
    index = [slice(None)] * data.ndim
    for place in range(starts.size):
        axis = place if axes is None else int(axes[place])
        index[axis] = slice(int(starts[place]), int(ends[place]), 1 if steps is None else int(steps[place]))
    return data[tuple(index)]


def _first(node: ir.Node, inputs: list[Array | None]) -> Array | None:
    return inputs[0]


def _pairwise(compute: Callable[[Array, Array], Array]) -> Rule:
    def rule(node: ir.Node, inputs: list[Array | None]) -> Array | None:
        left, right = inputs[:2]
        return None if left is None or right is None else compute(left, right)

    return rule


_RULES: dict[tuple[str, str], Rule] = {
    ("", "QuantizeLinear"): _quantize,
    (DOMAIN, UNPACK): _unpack,
    ("", "Transpose"): _transpose,
    ("", "Reshape"): _reshape,
    ("", "Unsqueeze"): _unsqueeze,
    ("", "Squeeze"): _squeeze,
    ("", "Cast"): _cast,
    ("", "Slice"): _slice,
    ("", "Identity"): _first,
    ("", "Add"): _pairwise(np.add),
    ("", "Mul"): _pairwise(np.multiply),
}
