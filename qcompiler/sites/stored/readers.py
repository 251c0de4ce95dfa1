"""Reads off a node, or off an operand, how the weight behind it is stored: of our models, and of other tools'.

It looks at operators, shapes and types alone, but for what says how many bits of a type are used.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import onnx_ir as ir

from qcompiler.errors import ModelError
from qcompiler.formats.scheme import FORMATS, Granularity, PerChannel, PerGroup, PerTensor
from qcompiler.functions.binary import FORMAT as BINARY
from qcompiler.functions.binary import UNPACK, is_binary
from qcompiler.functions.library import DOMAIN, codebook_format
from qcompiler.graph.edit import constant
from qcompiler.graph.metadata import BITS
from qcompiler.graph.operators import has, weight
from qcompiler.sites.embeddings import QuantizedEmbedding
from qcompiler.sites.stored.constants import chain, shape_of, source
from qcompiler.sites.stored.kernels import operand, outputs_first, reads_weight, scale_behind, tail_of
from qcompiler.sites.stored.layout import Layout, decoder_layout, decodes
from qcompiler.sites.stored.weight import StoredWeight, format_of


def quantized_weight(node: ir.Node) -> StoredWeight | None:
    """How the codes that a node decodes or multiplies by are stored; None where it reads no constant codes."""
    if decodes(node):
        return _decoded(node)
    reader, place = _READERS.get(node.op_type), weight(node)
    if place is None or not reads_weight(node):
        return None
    codes = place.codes.of(node)
    tensor = constant(source(codes))
    if codes is None or tensor is None or (_is_wide_float(tensor.dtype) and _quantizer(codes) is None):
        return None
    return reader(node, codes) if reader is not None else _by_integers(node, codes)


def float_weight(value: ir.Value) -> StoredWeight | None:
    """A float constant; None where the value is no such thing."""
    tensor = constant(value)
    if tensor is None or not _is_wide_float(tensor.dtype):
        return None
    return StoredWeight(None, value, shape_of(value) or (), format_of(tensor.dtype), tensor.dtype.bitwidth)


def operand_weight(value: ir.Value | None) -> StoredWeight | None:
    """What a plain operator multiplies by: a float constant, or what a node decodes; None where it is computed.

    What the nodes between do, which `chain` tells, only moves it.
    """
    nodes = chain(value)
    if value is None or not all(_moves(node) or decodes(node) for node in nodes):
        return None
    decoder = next((node for node in reversed(nodes) if decodes(node)), None)  # the one nearest to what is stored
    if decoder is not None:
        return _decoded(decoder)
    stored = nodes[-1].inputs[0] if nodes else value
    return float_weight(stored) if stored is not None else None


def table_weight(site: QuantizedEmbedding) -> StoredWeight | None:
    """The table of an embedding, in any of its portable forms."""
    if site.dequantize is not None:
        return _decoded(site.dequantize)
    return coded_weight(site.gather, site.codes, site.scale, site.zero_point, axis=site.axis, block=site.block_size)


def coded_weight(
    node: ir.Node, codes: ir.Value, scale: ir.Value | None, zero_point: ir.Value | None, *, axis: int, block: int = 0
) -> StoredWeight | None:
    """Codes with a scale for each place of `axis`, for blocks along it, or for all of them; `node` reads them."""
    shape, stored = shape_of(codes), constant(source(codes))
    if shape is None or stored is None:
        return None
    scales, points = shape_of(scale), shape_of(zero_point)
    one = not block and all(size is None or prod(size) == 1 for size in (scales, points))
    layout = Layout(shape) if one else Layout(shape, axis, block)
    known = scales is not None and layout.fits(scales) and (points is None or layout.fits(points))
    packed = any((link.domain, link.op_type) == (DOMAIN, UNPACK) for link in chain(codes))
    format, bits = (BINARY, 1) if packed else _format(node, codes, stored)
    return StoredWeight(
        node, codes, shape, format, bits, _granularity(layout, prod(shape[1:])) if known else None, scale, zero_point,
        layout if known or scales is None else None,
    )  # fmt: skip


def _decoded(node: ir.Node) -> StoredWeight | None:
    codes, scale, zero_point = (*node.inputs, None, None)[:3]
    stored, shape, scales = constant(source(codes)), shape_of(codes), shape_of(scale)
    if codes is None or stored is None or shape is None or scales is None:
        return None
    layout = decoder_layout(node, shape, scales)
    if is_binary(node):
        features = node.attributes.get_int("in_features", 0) or 0
        return StoredWeight(node, codes, (shape[0], features), BINARY, 1, _granularity(layout, features), scale, None,
                            layout)  # fmt: skip
    if (book := codebook_format(node)) is not None:
        size = node.attributes.get_int("block_size", 0) or 0
        bits = FORMATS[book].bits
        return StoredWeight(node, codes, shape, book, bits, PerGroup(size), scale, None, layout)
    format, bits = _format(node, codes, stored)
    return StoredWeight(node, codes, shape, format, bits, _granularity(layout), scale, zero_point, layout)


def _granularity(layout: Layout | None, features: int | None = None) -> Granularity | None:
    """How the scales lie; blocks as wide as the `features` of a row, or as the axis is long, are channels."""
    if layout is None:
        return None
    if layout.axis is None:
        return PerTensor()
    if layout.block and layout.block < (layout.shape[layout.axis] if features is None else features):
        return PerGroup(layout.block)
    return PerChannel()


def _moves(node: ir.Node) -> bool:
    if has(node, "quantizes", "elementwise"):
        return True
    # Behind an Unsqueeze or Squeeze lies a weight of another rank, as of a one-dimensional convolution: not told yet.
    return has(node, "moves", "whole") and node.op_type not in ("Unsqueeze", "Squeeze")


def _is_wide_float(dtype: ir.DataType) -> bool:
    return dtype.is_floating_point() and dtype.bitwidth > 8


def _quantizer(codes: ir.Value) -> ir.Node | None:
    return next((link for link in chain(codes) if link.op_type == "QuantizeLinear"), None)


def _format(node: ir.Node, codes: ir.Value, stored: ir.TensorProtocol) -> tuple[str, int]:
    """The format of codes and its bits: fewer than those of the type where the node has a note of it."""
    dtype = stored.dtype
    if _is_wide_float(dtype):  # quantized when the session is made
        quantize = _quantizer(codes)
        zero_point = operand(quantize, 2) if quantize is not None else None
        dtype = codes.dtype or (zero_point.dtype if zero_point is not None else None) or ir.DataType.UINT8
    if BITS not in node.metadata_props:
        return format_of(dtype), dtype.bitwidth
    bits = int(node.metadata_props[BITS])
    return f"{format_of(dtype).rstrip('0123456789')}{bits}", bits


# ------------------------------------------------------------------------------------------------------------- kernels


MOST_BITS = 8


def _by_integers(node: ir.Node, codes: ir.Value) -> StoredWeight | None:
    """The operand of a kernel that has a scale for all of it, or for each output."""
    place, shape = weight(node), shape_of(codes)
    if place is None or shape is None:
        return None
    scale = place.scale.of(node) if place.scale is not None else scale_behind(tail_of(node))
    zero_point = place.zero_point.of(node) if place.zero_point is not None else None
    axis = 0 if outputs_first(node) else len(shape) - 1
    return coded_weight(node, codes, scale, zero_point, axis=axis)


def _of_nbits(node: ir.Node, codes: ir.Value) -> StoredWeight | None:
    """MatMulNBits: [outputs, blocks, bytes], and a scale for each block."""
    outputs, inputs = _attribute(node, "N", 0), _attribute(node, "K", 0)
    bits, block = _attribute(node, "bits", 4), _attribute(node, "block_size", 0) or inputs
    scale, shape = operand(node, 2), (outputs, inputs)
    layout = Layout(shape, 1, block, "low first", bits, middle=1 << (bits - 1))
    # Blocks that go by an index are no blocks, and what is packed for one kind of GPU lies in another order.
    plain = 8 % bits == 0 and operand(node, 4) is None and not _attribute(node, "weight_prepacked", 0)
    used = int(node.metadata_props.get(BITS, bits))
    format = BINARY if used == 1 else f"uint{used}"
    return StoredWeight(node, codes, shape, format, used, _granularity(layout, inputs), scale, operand(node, 3),
                        _fitting(layout, scale) if plain else None)  # fmt: skip


def _of_table(node: ir.Node, codes: ir.Value) -> StoredWeight | None:
    """GatherBlockQuantized: a table in blocks along one of its axes, its codes one an element or packed into bytes."""
    stored, tensor = shape_of(codes), constant(source(codes))
    if stored is None or tensor is None or not stored:
        return None
    scale, axis = operand(node, 2), _attribute(node, "quantize_axis", 1) % len(stored)
    block = _attribute(node, "block_size", 128) or stored[axis]
    if tensor.dtype == ir.DataType.UINT8:
        bits = _attribute(node, "bits", 4)
        wide = (*stored[:-1], stored[-1] * 8 // bits)
        layout, format = Layout(wide, axis, block, "low first", bits, middle=1 << (bits - 1)), f"uint{bits}"
    else:
        layout, format, bits = Layout(stored, axis, block), format_of(tensor.dtype), tensor.dtype.bitwidth
    shape = (layout.shape[0], prod(layout.shape[1:]))
    grain = _granularity(layout, shape[1])
    return StoredWeight(node, codes, shape, format, bits, grain, scale, operand(node, 3), _fitting(layout, scale))


def _of_bnb4(node: ir.Node, codes: ir.Value) -> StoredWeight | None:
    """MatMulBnb4: indices into a table, the first of two in a byte's high half; blocks run over the ends of rows."""
    outputs, inputs = _attribute(node, "N", 0), _attribute(node, "K", 0)
    block, scale = _attribute(node, "block_size", 64), operand(node, 2)
    format = "nf4" if _attribute(node, "quant_type", 1) == 1 else "fp4_bnb"
    layout = Layout((outputs * inputs,), 0, block, "high first", 4, codebook=format)
    return StoredWeight(node, codes, (outputs, inputs), format, 4, PerGroup(block), scale, None,
                        _fitting(layout, scale))  # fmt: skip


def _of_float8_blocks(node: ir.Node, codes: ir.Value) -> StoredWeight | None:
    """MatMulBlockQuantizedFp8Weight: [outputs, inputs], and a scale for each block of a row."""
    return coded_weight(node, codes, operand(node, 2), None, axis=1, block=_attribute(node, "block_size", 128))


def _fitting(layout: Layout, scale: ir.Value | None) -> Layout | None:
    scales = shape_of(scale)
    return layout if scales is not None and layout.fits(scales) else None


def _attribute(node: ir.Node, name: str, default: int) -> int:
    found = node.attributes.get_int(name, default)
    value = default if found is None else found
    if name == "bits" and not 1 <= value <= MOST_BITS:
        raise ModelError(f"the node {node.name!r} ({node.op_type}) has {value} bits; 1 to {MOST_BITS} can be")
    return value


_READERS: dict[str, Callable[[ir.Node, ir.Value], StoredWeight | None]] = {
    "GatherBlockQuantized": _of_table, "MatMulBlockQuantizedFp8Weight": _of_float8_blocks, "MatMulBnb4": _of_bnb4,
    "MatMulNBits": _of_nbits,
}  # fmt: skip
