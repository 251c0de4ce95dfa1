"""Embeddings as GatherBlockQuantized: one node gathers codes and scales and decodes the rows.

Two passes need it: lower-embedding for tables of their own, lower-weight-only for tables whose bytes a lm_head reads.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qcompiler.graph.edit import (
    add_constant,
    insert_before,
    node_graph,
    remove_unused_constant,
    replace_output,
)
from qcompiler.graph.metadata import BITS
from qcompiler.graph.rewriter import Rewriter
from qcompiler.lowering.packed import CodeMatrix, code_matrix, pack
from qcompiler.sites.embeddings import QuantizedEmbedding

KERNEL = "GatherBlockQuantized"
LEAST_BLOCK = 16
SCALES = (ir.DataType.FLOAT, ir.DataType.FLOAT16)


def rows_of(site: QuantizedEmbedding) -> CodeMatrix | str:
    """The table that an embedding gathers from, or why it cannot be read as rows."""
    noted = site.dequantize.metadata_props.get(BITS) if site.dequantize is not None else None
    return code_matrix(
        site.codes, site.scale, site.zero_point, row_axis=site.row_axis, axis=site.axis, block_size=site.block_size,
        bits=None if noted is None else int(noted),
    )  # fmt: skip


def gather_from_packed(
    site: QuantizedEmbedding, matrix: CodeMatrix, codes: ir.Value, scales: ir.Value, block: int, rw: Rewriter,
) -> None:  # fmt: skip
    """Let an embedding read MatMulNBits' arrays: codes [rows, blocks, bytes] and scales [rows, blocks].

    The operator takes scales of as many dimensions as the codes have, so they get one by an Unsqueeze, which ONNX
    Runtime folds when the session is made; the file keeps one copy of everything but the zero points.
    """
    graph, base = node_graph(site.node), site.name
    column = rw.constant(f"{base}.column", np.array([-1], np.int64), graph)
    unsqueeze = rw.node("Unsqueeze", [scales, column], f"{base}.scales", dtype=scales.dtype)
    points = matrix.zero_points(block)
    zero_points = None if points is None else rw.constant(f"{base}.zero_points", points[..., None], graph)
    settings: dict[str, object] = {"bits": matrix.bits, "block_size": block, "quantize_axis": 2}
    gather = _operator(site, [codes, site.ids, unsqueeze.outputs[0], zero_points], settings, rw)
    rank = len(site.ids.shape)  # type: ignore[arg-type]  # lower-weight-only has looked
    flat = rw.constant(f"{base}.flat", np.array([0] * rank + [-1], np.int64), graph)
    whole = rw.node("Reshape", [gather.outputs[0], flat], f"{base}.rows", dtype=scales.dtype)
    width = int(np.prod(codes.shape.numpy()[1:])) * 8 // matrix.bits  # type: ignore[union-attr]
    _install(site, [unsqueeze, gather, whole], width, matrix.features, rw)


@dataclass(frozen=True, eq=False)
class Table:
    """What the operator reads of an embedding that shares its bytes with nobody: see `store_table`."""

    matrix: CodeMatrix
    codes: ir.Value
    scales: ir.Value
    zero_points: ir.Value | None
    block: int

    @property
    def packed(self) -> bool:
        """Whether the codes are uint8 that hold `matrix.bits` bits each."""
        return self.codes.const_value is not self.matrix.tensor


def store_table(site: QuantizedEmbedding, matrix: CodeMatrix, block: int, rw: Rewriter) -> Table:
    """The codes where they lie if the operator takes them, else packed into bytes; scales and zero points by block."""
    graph, base = node_graph(site.node), str(site.codes.name)
    in_place, codes = reads_in_place(matrix), site.codes
    if not in_place:
        name = rw.fresh(f"{base}.table")
        codes = add_constant(graph, name, matrix.table(name))
    scale = matrix.scales(block)
    if ir.DataType.from_numpy(scale.dtype) not in SCALES:
        scale = scale.astype(np.float32)
    scales = rw.constant(f"{base}.block_scales", scale, graph)
    points = _stored_points(matrix, block) if in_place else _packed_points(matrix, block)
    zero_points = None
    if points is not None:
        zero_points = rw.constant(f"{base}.block_zero_points", points, graph)
    return Table(matrix, codes, scales, zero_points, block)


def gather_from_table(site: QuantizedEmbedding, table: Table, rw: Rewriter) -> None:
    """Let an embedding read a table of its own."""
    matrix, codes = table.matrix, table.codes
    settings: dict[str, object] = {"block_size": table.block, "quantize_axis": 1}
    if codes.dtype == ir.DataType.UINT8:
        settings["bits"] = matrix.bits
    gather = _operator(site, [codes, site.ids, table.scales, table.zero_points], settings, rw)
    width = int(codes.shape[1]) * 8 // matrix.bits if table.packed else matrix.features  # type: ignore[index, arg-type]
    _install(site, [gather], width, matrix.features, rw)


def reads_in_place(matrix: CodeMatrix) -> bool:
    """Whether the operator takes the constant as it is."""
    return matrix.row_axis == 0 and matrix.tensor.dtype in (ir.DataType.UINT8, ir.DataType.INT4, ir.DataType.UINT4)


def table_block(matrix: CodeMatrix) -> int | None:
    """The widest block that fits the groups of a table: a power of two from 16 on; None where there is none."""
    if matrix.scale.shape[1] == 1:
        return max(LEAST_BLOCK, 1 << (matrix.features - 1).bit_length())
    widest = matrix.group & -matrix.group
    return widest if widest >= LEAST_BLOCK else None


def _stored_points(matrix: CodeMatrix, block: int) -> ir.TensorProtocol | None:
    """The zero points in the type of the codes, unless they are what the operator takes by itself: the middle of uint8,
    and 0 where the type has 4 bits, whether signed or not."""
    dtype, points = matrix.tensor.dtype, matrix.stored_zero_points(block)
    if np.all(points == (128 if dtype == ir.DataType.UINT8 else 0)):
        return None
    return ir.Tensor(points, dtype=dtype, shape=ir.Shape(points.shape))


def _packed_points(matrix: CodeMatrix, block: int) -> ir.TensorProtocol | None:
    points = matrix.zero_points(block)
    return None if points is None else ir.tensor(pack(points, matrix.bits))


def _operator(
    site: QuantizedEmbedding, inputs: list[ir.Value | None], settings: dict[str, object], rw: Rewriter
) -> ir.Node:
    given = inputs if inputs[-1] is not None else inputs[:-1]
    scales = inputs[2]
    return rw.node(
        KERNEL, given, f"{site.name}.gathered", domain="com.microsoft",
        dtype=scales.dtype if scales is not None else None, attributes={**settings, "gather_axis": 0},
    )  # fmt: skip


def _install(site: QuantizedEmbedding, nodes: list[ir.Node], width: int, features: int, rw: Rewriter) -> None:
    """Put the nodes in the place of the embedding; rows are cut to `features` and cast to the type that is expected."""
    graph, base, output = node_graph(site.node), site.name, site.output
    new, value = list(nodes), nodes[-1].outputs[0]
    if width > features:
        places = {"begin": 0, "end": features, "axis": -1}
        cut = [rw.constant(f"{base}.{key}", np.array([at], np.int64), graph) for key, at in places.items()]
        new.append(rw.node("Slice", [value, *cut], f"{base}.features", dtype=value.dtype))
        value = new[-1].outputs[0]
    dtype = output.dtype
    if dtype is not None and dtype != value.dtype:
        attributes: dict[str, object] = {"to": int(dtype)}
        new.append(rw.node("Cast", [value], f"{base}.cast", dtype=dtype, attributes=attributes))
        value = new[-1].outputs[0]
    value.shape = output.shape
    rw.inherit(new, site.node)
    codes = site.codes
    insert_before(site.node, new)
    replace_output(site.node, value)
    remove_unused_constant(codes)
    kernel = next(node for node in new if node.op_type == KERNEL)
    kernel.name = base
