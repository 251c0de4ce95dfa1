"""Quantized embeddings: Gathers of rows of codes, in each of the forms in which a portable graph decodes them.

(Gather(codes, ids) - Gather(zero point, ids)) · Gather(scale, ids)                  one scale a row
DequantizeLinear(Gather(codes, ids), Gather(scale, ids), Gather(zero point, ids))    a scale for each group of a row
Gather(DequantizeLinear(codes, scale, zero point), ids)                              codes that no Gather takes
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from qcompiler.graph.edit import constant
from qcompiler.graph.module_path import block_of, module_path
from qcompiler.sites.kinds import Site

SUFFIX = ".dequantized"


@dataclass(frozen=True, eq=False)
class QuantizedEmbedding(Site):
    """Rows of a constant of codes, gathered and decoded. `node` writes the decoded rows."""

    codes: ir.Value
    """[rows, features]; [features, rows] where `row_axis` is 1."""
    row_axis: int
    scale: ir.Value
    zero_point: ir.Value | None
    axis: int
    """Along which axis of `codes` scales lie, as DequantizeLinear counts."""
    block_size: int
    """Features that share a scale, or 0."""
    ids: ir.Value
    gather: ir.Node
    """The Gather of the codes, or of the decoded codes."""
    dequantize: ir.Node | None
    """The DequantizeLinear that decodes the whole table (third form)."""

    @property
    def output(self) -> ir.Value:
        return self.node.outputs[0]


def find_quantized_embeddings(model: ir.Model) -> tuple[QuantizedEmbedding, ...]:
    """Every quantized embedding of the graph, in graph order; bodies of If, Loop and Scan are left out."""
    found = (_recognise(node) for node in model.graph if _is(node, "Gather") and _axis(node, 0) == 0)
    return tuple(site for site in found if site is not None)


def _recognise(gather: ir.Node) -> QuantizedEmbedding | None:
    source, ids = gather.inputs[0], gather.inputs[1]
    if source is None or ids is None or constant(ids) is not None:
        return None
    row_axis, node = 0, source.producer()
    if node is not None and _is(node, "Transpose") and list(node.attributes.get_ints("perm") or ()) == [1, 0]:
        row_axis, source = 1, node.inputs[0]
        node = source.producer() if source is not None else None
    if node is not None and _is(node, "DequantizeLinear"):
        codes, scale, zero_point = (*node.inputs, None)[:3]
        if codes is None or scale is None or not _is_code_table(codes):
            return None
        return _site(gather, gather, codes, row_axis, scale, zero_point, ids, _axis(node, 1), _block(node), node)
    return None if source is None or not _is_code_table(source) else _gathered(gather, source, row_axis, ids)


def _gathered(gather: ir.Node, codes: ir.Value, row_axis: int, ids: ir.Value) -> QuantizedEmbedding | None:
    node = _reader(gather)
    if node is not None and _is(node, "DequantizeLinear"):
        scale, zero_point = (_picked(value, ids) for value in (*node.inputs, None)[1:3])
        if scale is None or (zero_point is None) != (len(node.inputs) < 3 or node.inputs[2] is None) or row_axis:
            return None
        last = len(ids.shape) if ids.shape is not None else -1
        if not _block(node) or _axis(node, 1) not in (last, -1):
            return None
        return _site(node, gather, codes, row_axis, scale, zero_point, ids, 1, _block(node), None)
    if node is None or not _is(node, "Cast"):
        return None
    node, zero_point = _reader(node), None
    if node is not None and _is(node, "Sub"):
        zero_point = _picked(_without(node.inputs[1], "Cast"), ids)
        if zero_point is None:
            return None
        node = _reader(node)
    if node is None or not _is(node, "Mul"):
        return None
    scale = next((found for found in (_picked(value, ids) for value in node.inputs) if found is not None), None)
    return None if scale is None else _site(node, gather, codes, row_axis, scale, zero_point, ids, row_axis, 0, None)


def _site(
    node: ir.Node, gather: ir.Node, codes: ir.Value, row_axis: int, scale: ir.Value, zero_point: ir.Value | None,
    ids: ir.Value, axis: int, block_size: int, dequantize: ir.Node | None,
) -> QuantizedEmbedding:  # fmt: skip
    path = module_path(node, codes)
    return QuantizedEmbedding(
        node=node, name=(node.name or "").removesuffix(SUFFIX), module_path=path, block=block_of(path), codes=codes,
        row_axis=row_axis, scale=scale, zero_point=zero_point, axis=axis, block_size=block_size, ids=ids, gather=gather,
        dequantize=dequantize,
    )  # fmt: skip


def _picked(value: ir.Value | None, ids: ir.Value) -> ir.Value | None:
    """The constant whose rows by the same ids a value is, perhaps with an axis of length 1 at the end."""
    row = _without(value, "Unsqueeze")
    node = row.producer() if row is not None else None
    if node is None or not _is(node, "Gather") or _axis(node, 0) != 0 or node.inputs[1] is not ids:
        return None
    return node.inputs[0] if constant(node.inputs[0]) is not None else None


def _without(value: ir.Value | None, operator: str) -> ir.Value | None:
    """What a node of this type reads, where one writes the value; else the value itself."""
    node = value.producer() if value is not None else None
    return node.inputs[0] if node is not None and _is(node, operator) else value


def _reader(node: ir.Node) -> ir.Node | None:
    """The only reader of a node that reads it first, and nobody outside."""
    value = node.outputs[0]
    uses = list(value.uses())
    if len(uses) != 1 or value.is_graph_output() or (uses[0].idx != 0 and not _is(uses[0].node, "Mul")):
        return None
    return uses[0].node


def _is_code_table(value: ir.Value) -> bool:
    tensor = constant(value)
    return tensor is not None and tensor.dtype.is_integer() and len(tensor.shape) == 2


def _is(node: ir.Node, operator: str) -> bool:
    return node.domain == "" and node.op_type == operator


def _axis(node: ir.Node, default: int) -> int:
    return node.attributes.get_int("axis", default)


def _block(node: ir.Node) -> int:
    return node.attributes.get_int("block_size", 0)
