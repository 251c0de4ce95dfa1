"""A layer's weight, in whatever form a file stores it: what a person calls the form, and the numbers behind it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qcompiler.binary import is_binary
from qcompiler.codebooks import CODEBOOKS
from qcompiler.codes import BITS
from qcompiler.embeddings import QuantizedEmbedding
from qcompiler.functions import DOMAIN, codebook_format
from qcompiler.graph import constant
from qcompiler.model_diff.arithmetic import Array, by_blocks, evaluate, source, unpacked
from qcompiler.quantize import dequantize

FLOAT_NAMES = {
    "FLOAT": "float32", "FLOAT16": "float16", "BFLOAT16": "bfloat16", "DOUBLE": "float64",
    "FLOAT8E4M3FN": "fp8 e4m3", "FLOAT8E5M2": "fp8 e5m2", "FLOAT4E2M1": "fp4 e2m1",
}  # fmt: skip
SMALL = 1 << 16
"""Zero points beyond so many are not looked at one by one."""


@dataclass(frozen=True, eq=False)
class Weight:
    form: str
    """``float32``, or ``4-bit block 128 symmetric``."""
    quantized: bool
    constants: tuple[ir.Value, ...]
    """Codes, scales, zero points: what is stored."""
    shape: tuple[int, ...]
    """[inputs, outputs]; [rows, features] of an embedding, [outputs, inputs / groups, …] of a convolution."""
    matrix: Callable[[], Array | None]
    """The numbers it stands for as [outputs, inputs] ([rows, features]); None where they cannot be told."""
    nodes: tuple[ir.Node, ...] = ()
    """The nodes between the constants and the layer."""

    @property
    def bytes(self) -> int:
        tensors = {id(value): constant(value) for value in self.constants}
        return sum(tensor.nbytes for tensor in tensors.values() if tensor is not None)


def type_name(dtype: ir.DataType | None) -> str:
    """``float32``, ``8-bit``, ``fp8 e4m3``."""
    if dtype is None:
        return "?"
    return FLOAT_NAMES.get(dtype.name, f"{dtype.bitwidth}-bit" if dtype.is_integer() else dtype.name.lower())


def form_of(kind: str, scales: int, channels: int, block: int, symmetric: bool | None) -> str:
    """One phrase for the form: `channels` outputs have `scales` scales, in blocks of `block` inputs (0: none)."""
    if block:
        grain = f"block {block}"
    elif scales == 1:
        grain = "per tensor"
    else:
        grain = "per channel" if scales == channels else f"{scales} scales"
    words = {True: "symmetric", False: "asymmetric", None: ""}[symmetric]
    return " ".join(part for part in (kind, grain, words) if part)


def is_symmetric(zero_point: ir.Value | None, middle: int) -> bool | None:
    """Whether every zero point is the middle of the range; None where they are computed, or too many to look at."""
    tensor = constant(source(zero_point))
    if tensor is None:
        return None if zero_point is not None else True
    if tensor.dtype.is_floating_point():
        return True
    if tensor.nbytes > SMALL:
        return None
    return bool((tensor.numpy().astype(np.int64) == middle).all())


def operand(value: ir.Value | None, *, outputs_first: bool) -> Weight | None:
    """What a plain operator multiplies by: a float constant, or what a node dequantizes; None where it is computed.

    `outputs_first`: the operator reads [outputs, inputs], as Gemm with transB, Gather and Conv do.
    """
    nodes: list[ir.Node] = []
    decoder: ir.Node | None = None
    below = value
    while below is not None and constant(below) is None:
        node = below.producer()
        if node is None or not _passes(node):
            return None
        nodes.append(node)
        decoder = node if _decodes(node) else decoder  # the one nearest to what is stored
        below = node.inputs[0]
    stored = constant(below)
    if below is None or stored is None or value is None:
        return None
    if decoder is None and not stored.dtype.is_floating_point():
        return None

    def matrix() -> Array | None:
        data = evaluate(value)
        if data is None or data.ndim < 2:
            return None
        return (
            data.reshape(data.shape[0], -1) if outputs_first else np.swapaxes(data, -1, -2).reshape(-1, data.shape[-2])
        )

    turned = sum(node.op_type == "Transpose" for node in nodes) % 2 == 1
    sizes = _sizes(decoder, stored)
    shape = tuple(reversed(sizes)) if turned and len(sizes) == 2 else sizes
    if outputs_first and len(shape) == 2:
        shape = (shape[1], shape[0])
    if decoder is None:
        return Weight(type_name(stored.dtype), False, (below,), shape, matrix, tuple(nodes))
    scale = decoder.inputs[1]
    zero_point = decoder.inputs[2] if len(decoder.inputs) > 2 else None
    constants = tuple(item for item in (below, *map(_stored, (scale, zero_point))) if item is not None)
    return Weight(_form(decoder, stored, shape), True, constants, shape, matrix, tuple(nodes))


def _stored(value: ir.Value | None) -> ir.Value | None:
    """The constant that holds most of a scale: scales that are quantized once more are codes themselves."""
    found = source(value)
    node = value.producer() if value is not None and found is None else None
    while node is not None and found is None:
        first = node.inputs[0]
        found, node = source(first), first.producer() if first is not None else None
    return found


def _passes(node: ir.Node) -> bool:
    return _moves(node) or _decodes(node)


def _moves(node: ir.Node) -> bool:
    return node.domain == "" and node.op_type in ("Transpose", "Cast", "Identity", "Reshape", "QuantizeLinear")


def _decodes(node: ir.Node) -> bool:
    return (
        (node.domain == "" and node.op_type == "DequantizeLinear")
        or codebook_format(node) is not None
        or is_binary(node)
    )


def _sizes(decoder: ir.Node | None, stored: ir.TensorProtocol) -> tuple[int, ...]:
    sizes = tuple(int(size) for size in stored.shape.numpy())
    if decoder is not None and is_binary(decoder):
        return sizes[0], int(decoder.attributes.get_int("in_features", 0) or 0)
    return sizes


def _form(decoder: ir.Node, stored: ir.TensorProtocol, shape: tuple[int, ...]) -> str:
    """`shape` is [inputs, outputs], or that of a convolution's weight."""
    if decoder.domain == DOMAIN:
        block = decoder.attributes.get_int("block_size", 0) or 0
        if is_binary(decoder):
            whole = block >= shape[0]
            return form_of("binary", shape[-1], shape[-1], 0 if whole else block, None)
        name = codebook_format(decoder) or ""
        again = constant(decoder.inputs[1]) is None
        return f"{name.replace('fp4_bnb', 'fp4')} block {block}" + (", scales quantized again" if again else "")
    bits = decoder.metadata_props.get(BITS)
    scale = constant(source(decoder.inputs[1]))
    scales = 0 if scale is None else int(np.prod(scale.shape.numpy()))
    zero_point = decoder.inputs[2] if len(decoder.inputs) > 2 else None
    symmetric = None
    if stored.dtype.is_integer():
        middle = 0 if stored.dtype.is_signed() else 1 << (int(bits or stored.dtype.bitwidth) - 1)
        symmetric = is_symmetric(zero_point, middle) if zero_point is not None else middle == 0
    channels = shape[0] if len(shape) > 2 else shape[-1]
    kind = f"{bits}-bit" if bits else type_name(stored.dtype)
    return form_of(kind, scales, channels, decoder.attributes.get_int("block_size", 0) or 0, symmetric)


# ------------------------------------------------------------------------------------------ operands of integer kernels


def codes_operand(
    codes: ir.Value | None, scale: ir.Value | None, zero_point: ir.Value | None, *, outputs_first: bool = False
) -> Weight | None:
    """Codes [inputs, outputs] (or as `operand`), with a scale for the tensor or for each output, that kernels read."""
    stored = source(codes)
    tensor = constant(stored)
    if stored is None or tensor is None or codes is None:
        return None
    scale_tensor = constant(source(scale))
    sizes = _computed_sizes(codes, tensor)
    shape = (sizes[1], sizes[0]) if outputs_first and len(sizes) == 2 else sizes
    channels = shape[0] if len(shape) > 2 else shape[-1]
    scales = 0 if scale_tensor is None else int(np.prod(scale_tensor.shape.numpy()))
    width = tensor.dtype if tensor.dtype.is_integer() or codes.dtype is None else codes.dtype
    symmetric = None
    if width.is_integer():
        symmetric = is_symmetric(zero_point, 128 if width == ir.DataType.UINT8 else 0)

    def matrix() -> Array | None:
        data, factor, zero = evaluate(codes), evaluate(scale), evaluate(zero_point)
        if data is None or factor is None:
            return None
        data = data.astype(np.float32)
        rows = data.reshape(data.shape[0], -1) if outputs_first or data.ndim > 2 else data.T
        if zero is not None:
            rows = rows - _column(zero.astype(np.float32), len(rows))
        return rows * _column(factor.astype(np.float32), len(rows))

    unpacks = stored is not codes and tensor.dtype == ir.DataType.UINT8 and _unpacks(codes)
    kind = "binary" if unpacks else type_name(width)
    constants = tuple(item for item in map(source, (codes, scale, zero_point)) if item is not None)
    form = form_of(kind, scales, channels, 0, None if unpacks else symmetric)
    return Weight(form, True, constants, shape, matrix, tuple(_chain(codes)))


def _column(values: Array, rows: int) -> Array:
    return values.reshape(-1, 1) if values.size == rows else values.reshape(-1)[:1]


def _unpacks(value: ir.Value) -> bool:
    return any(node.domain == DOMAIN for node in _chain(value))


def _chain(value: ir.Value) -> list[ir.Node]:
    """The nodes between a value and the constant behind it."""
    found: list[ir.Node] = []
    current: ir.Value | None = value
    while current is not None and constant(current) is None and (node := current.producer()) is not None:
        found.append(node)
        current = node.inputs[0]
    return found


def _computed_sizes(codes: ir.Value, tensor: ir.TensorProtocol) -> tuple[int, ...]:
    """Of the codes as the kernel reads them: those that a graph notes, else those of the constant, turned."""
    if codes.shape is not None and all(isinstance(size, int) for size in codes.shape):
        return tuple(int(size) for size in codes.shape)  # type: ignore[arg-type]
    sizes = tuple(int(size) for size in tensor.shape.numpy())
    turned = sum(node.op_type == "Transpose" for node in _chain(codes)) % 2 == 1
    return tuple(reversed(sizes)) if turned else sizes


def packed_blocks(node: ir.Node) -> Weight | None:
    """The weight of a MatMulNBits: [outputs, blocks, bytes], with a scale for each block."""
    codes, scale = source(node.inputs[1]), source(node.inputs[2])
    zero_point = node.inputs[3] if len(node.inputs) > 3 else None
    attributes = node.attributes
    inputs, outputs = attributes.get_int("K", 0) or 0, attributes.get_int("N", 0) or 0
    bits, block = attributes.get_int("bits", 4) or 4, attributes.get_int("block_size", 0) or inputs
    if codes is None or scale is None:
        return None
    middle = 1 << (bits - 1)

    def matrix() -> Array | None:
        data, scales = evaluate(codes), evaluate(scale)
        if data is None or scales is None:
            return None
        numbers = unpacked(data.view(np.uint8).reshape(outputs, -1, data.shape[-1]), bits)[..., :block].astype(
            np.float32
        )
        blocks = numbers.shape[1]
        return ((numbers - _points(zero_point, outputs, blocks, bits)) * scales.reshape(outputs, blocks, 1)).reshape(
            outputs, -1
        )[:, :inputs]

    form = form_of(f"{bits}-bit", -1, outputs, block, _packed_symmetric(zero_point, bits, middle))
    constants = tuple(item for item in (codes, scale, source(zero_point)) if item is not None)
    return Weight(form, True, constants, (inputs, outputs), matrix)


def _points(zero_point: ir.Value | None, rows: int, blocks: int, bits: int) -> Array:
    """Zero points [rows, blocks, 1]; packed as codes are where they are bytes."""
    data = evaluate(zero_point)
    if data is None:
        return np.full((1, 1, 1), float(1 << (bits - 1)), np.float32)
    if data.dtype == np.uint8:
        data = unpacked(data.reshape(rows, -1), bits)[:, :blocks]
    return data.astype(np.float32).reshape(rows, blocks, 1)


def _packed_symmetric(zero_point: ir.Value | None, bits: int, middle: int) -> bool | None:
    tensor = constant(source(zero_point))
    if zero_point is None:
        return True
    if tensor is None or tensor.nbytes > SMALL:
        return None
    data = tensor.numpy()
    if data.dtype != np.uint8:
        return bool((data == middle).all())
    return bool((unpacked(data, bits) == middle).all()) if data.size else None


def bnb4(node: ir.Node) -> Weight | None:
    """The weight of a MatMulBnb4: indices into a table, two in a byte, the first in the high half."""
    codes, scale = source(node.inputs[1]), source(node.inputs[2])
    inputs, outputs = (node.attributes.get_int(name, 0) or 0 for name in ("K", "N"))
    block = node.attributes.get_int("block_size", 64) or 64
    name = "nf4" if node.attributes.get_int("quant_type", 1) == 1 else "fp4_bnb"
    if codes is None or scale is None:
        return None

    def matrix() -> Array | None:
        data, scales = evaluate(codes), evaluate(scale)
        if data is None or scales is None:
            return None
        bytes_ = data.view(np.uint8).reshape(-1)
        indices = np.stack([bytes_ >> 4, bytes_ & 15], axis=1).reshape(-1)[: inputs * outputs]
        return by_blocks(CODEBOOKS[name].table[indices], scales, block).reshape(outputs, inputs)

    return Weight(f"{name.replace('fp4_bnb', 'fp4')} block {block}", True, (codes, scale), (inputs, outputs), matrix)


def table_blocks(node: ir.Node) -> Weight | None:
    """The table of a GatherBlockQuantized, [rows, …, features] in blocks along the features."""
    codes, scale = source(node.inputs[0]), source(node.inputs[2])
    zero_point = node.inputs[3] if len(node.inputs) > 3 else None
    bits, block = node.attributes.get_int("bits", 4) or 4, node.attributes.get_int("block_size", 128) or 128
    tensor, scales_tensor = constant(codes), constant(scale)
    if codes is None or scale is None or tensor is None or scales_tensor is None:
        return None
    packed = tensor.dtype == ir.DataType.UINT8
    rows = int(tensor.shape.numpy()[0])
    features = int(np.prod(tensor.shape.numpy())) // rows * (8 // bits if packed else 1)
    middle = (1 << (bits - 1)) if packed else 0

    def matrix() -> Array | None:
        data, scales = evaluate(codes), evaluate(scale)
        if data is None or scales is None:
            return None
        flat = data.reshape(rows, -1)
        numbers = (unpacked(flat.view(np.uint8), bits) if packed else flat).astype(np.float32)[:, :features]
        blocks = scales.size // rows
        wide = numbers.reshape(rows, blocks, -1)
        points = _points(zero_point, rows, blocks, bits) if packed else _plain_points(zero_point, rows, blocks)
        return ((wide - points) * scales.astype(np.float32).reshape(rows, blocks, 1)).reshape(rows, -1)

    form = form_of(f"{bits}-bit" if packed else type_name(tensor.dtype), -1, rows, 0 if block >= features else block,
                   _packed_symmetric(zero_point, bits, middle) if packed else is_symmetric(zero_point, 0))  # fmt: skip
    form = form.replace("-1 scales", "per channel")
    constants = tuple(item for item in (codes, scale, source(zero_point)) if item is not None)
    return Weight(form, True, constants, (rows, features), matrix)


def _plain_points(zero_point: ir.Value | None, rows: int, blocks: int) -> Array:
    data = evaluate(zero_point)
    return np.zeros((1, 1, 1), np.float32) if data is None else data.astype(np.float32).reshape(rows, blocks, 1)


def grouped_table(site: QuantizedEmbedding) -> Weight | None:
    """The table of an embedding whose rows have a scale for each group of features, in standard operators."""
    tensor, scale = constant(site.codes), constant(site.scale)
    if tensor is None or scale is None:
        return None
    sizes = tuple(int(size) for size in tensor.shape.numpy())
    rows, features = (sizes[1], sizes[0]) if site.row_axis else sizes
    middle = 0 if tensor.dtype.is_signed() else 1 << (tensor.dtype.bitwidth - 1)

    def matrix() -> Array | None:
        zero = None if site.zero_point is None else evaluate(site.zero_point)
        codes, factor = evaluate(site.codes), evaluate(site.scale)
        if codes is None or factor is None:
            return None
        table = dequantize(codes, factor, zero, site.axis, site.block_size or None)
        return table.T if site.row_axis else table

    symmetric = is_symmetric(site.zero_point, middle) if site.zero_point is not None else middle == 0
    form = form_of(type_name(tensor.dtype), -1, -1, site.block_size, symmetric)
    constants = tuple(item for item in (site.codes, site.scale, site.zero_point) if item is not None)
    return Weight(form, True, constants, (rows, features), matrix)
