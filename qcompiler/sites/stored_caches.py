"""How a graph stores a cache as codes, read off the nodes that decode it: the scheme that the pass reported.

    past → Concat → present → [UnpackInt4] → DequantizeCache(·, scale[, offset]) → [· reach + center]
    past → GroupQueryAttention(…, k_scale, v_scale)

Diff, inspection and diagnosis tell caches by this.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qcompiler.formats.scheme import FORMATS, Granularity, PerChannel, PerTensor, PerToken, Scheme, UnknownGranularity
from qcompiler.functions.cache import DEQUANTIZE_OFFSET, UNPACK, is_cache_function
from qcompiler.graph.edit import constant
from qcompiler.graph.operators import has, quantized
from qcompiler.sites.caches import CODES
from qcompiler.sites.stored.constants import evaluate, source
from qcompiler.sites.stored.weight import format_of


@dataclass(frozen=True, eq=False)
class _Reader:
    """What turns the codes of a cache into numbers, or reads them as they are."""

    node: ir.Node
    scale: ir.Value | None
    packed: bool


def stored_cache(past: ir.Value) -> Scheme | None:
    """The scheme of the cache behind a graph input; None where it holds floats."""
    if past.dtype not in CODES:
        return None
    reader = _reader(past)
    name = "int4" if reader is not None and reader.packed else format_of(past.dtype)
    if reader is None:
        return Scheme(name, UnknownGranularity(), symmetric=None)
    scale = constant(source(reader.scale))
    grain: Granularity = UnknownGranularity()
    if scale is not None:
        grain = PerTensor() if scale.size == 1 else PerChannel()
    elif is_cache_function(reader.node):
        grain = PerToken()
    return Scheme(
        name, grain, _symmetric(reader.node, name), dynamic=isinstance(grain, PerToken),
        normalized=_normalized(reader.node),
    ).numbers  # fmt: skip


def _reader(past: ir.Value) -> _Reader | None:
    """The node that reads the codes, behind those that only append to them, move or unpack them."""
    pending, seen = [(past, False)], set[ir.Node]()
    while pending:
        value, packed = pending.pop()
        for node, index in value.uses():
            if node in seen:
                continue
            codes = next((item for item in quantized(node) if item.codes.index == index), None)
            if has(node, "decodes") and index == 0:
                return _Reader(node, node.inputs[1], packed)
            if codes is not None and codes.role == "past" and codes.scale is not None:
                packed = node.attributes.get_int("kv_cache_bit_width", 8) == 4
                return _Reader(node, codes.scale.of(node), packed)
            seen.add(node)
            unpacks = is_cache_function(node, UNPACK)
            if unpacks or has(node, "joins") or has(node, "moves"):
                pending += [(output, packed or unpacks) for output in node.outputs]
    return None


def _symmetric(reader: ir.Node, format: str) -> bool | None:
    if is_cache_function(reader, DEQUANTIZE_OFFSET):
        return False
    if FORMATS[format].kind != "integer" or reader.op_type != "DequantizeLinear":
        return True
    point = reader.inputs[2] if len(reader.inputs) > 2 else None
    points = np.zeros(1) if point is None else evaluate(point)
    return None if points is None else bool((points.astype(np.float32) == FORMATS[format].middle).all())


def _normalized(decoder: ir.Node) -> bool:
    """Whether what is decoded is stretched and shifted by a constant for each channel."""
    value = decoder.outputs[0]
    for op_type in ("Mul", "Add"):
        readers = [node for node, _ in value.uses()]
        if len(readers) != 1 or (readers[0].domain, readers[0].op_type) != ("", op_type):
            return False
        factor = next((tensor for item in readers[0].inputs if (tensor := constant(item)) is not None), None)
        if factor is None or factor.size == 1:
            return False
        value = readers[0].outputs[0]
    return True
