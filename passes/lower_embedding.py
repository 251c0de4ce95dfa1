"""Runs quantized embeddings as ONNX Runtime's GatherBlockQuantized, which gathers codes and decodes the rows at once.

**Before**  y = (Gather(Q, ids) - Gather(z, ids)) · Gather(s, ids)     **After**  y = GatherBlockQuantized(Q, ids, s, z)

Tables of uint8, int4 and uint4 codes stay as they are stored; others (int8, 2 bits, tables that are stored by column)
become unsigned codes packed into bytes. A row with one scale is one block, as wide as the next power of two; rows with
groups keep them, or, where a group is no power of two, get the widest blocks that divide it, with scales repeated.

The numbers are those of the portable graph; ids out of range, which Gather refuses, give rows of zeros.

A table that a lm_head shares is lower-weight-only's business, which lets both read one array. Skipped: a table that
would have to be stored a second time because another operator reads its codes, and groups that are no multiple of 16.
"""

from __future__ import annotations

from typing import ClassVar

import onnx_ir as ir
from pydantic.dataclasses import dataclass as options

from qcompiler.graph.rewriter import Rewriter
from qcompiler.lowering.block_gather import (
    KERNEL,
    Table,
    gather_from_table,
    reads_in_place,
    rows_of,
    store_table,
    table_block,
)
from qcompiler.lowering.packed import CodeMatrix
from qcompiler.rewriting.contract import OPTIONS, Changed, Changes, Kind, Pass, Skipped
from qcompiler.sites.embeddings import QuantizedEmbedding, find_quantized_embeddings
from qcompiler.statistics import StatisticsStore


@options(frozen=True, config=OPTIONS)
class LowerEmbedding(Pass):
    name: ClassVar[str] = "lower-embedding"
    kind: ClassVar[Kind] = "lowering"

    def apply(self, model: ir.Model, statistics: StatisticsStore) -> Changes:
        changes = Changes()
        rw = Rewriter(model, self.name)
        model.graph.opset_imports.setdefault("com.microsoft", 1)
        sites = self.selected(find_quantized_embeddings(model))
        tables: dict[object, Table] = {}
        for site in sites:
            key = site.codes, site.row_axis, site.scale, site.zero_point
            if key not in tables:
                matrix = rows_of(site)
                obstacle = matrix if isinstance(matrix, str) else _obstacle(site, matrix, sites)
                if isinstance(matrix, str) or obstacle is not None:
                    changes.skipped.append(Skipped(site.name, str(obstacle)))
                    continue
                tables[key] = store_table(site, matrix, table_block(matrix) or 0, rw)
            gather_from_table(site, tables[key], rw)
            changes.changed.append(Changed(site.name, kernel=KERNEL))
        return changes


def _obstacle(site: QuantizedEmbedding, matrix: CodeMatrix, sites: list[QuantizedEmbedding]) -> str | None:
    if table_block(matrix) is None:
        return f"groups of {matrix.group} features are no multiple of 16, the operator's least block"
    if reads_in_place(matrix):
        return None
    readers = _other_readers(site, sites)
    if readers:
        return (
            f"{readers[0].name} reads its codes, too, and the operator takes them in another form: "
            "they would be stored twice"
        )
    return None


def _other_readers(site: QuantizedEmbedding, sites: list[QuantizedEmbedding]) -> list[ir.Node]:
    """Who reads the codes, or what is decoded of the whole table, besides the embeddings."""
    gathers = {other.gather for other in sites if other.codes is site.codes}
    pending, readers = [site.codes], []
    while pending:
        for node in pending.pop().consumers():
            if node.op_type in ("DequantizeLinear", "Transpose"):
                pending.extend(node.outputs)
            elif node not in gathers:
                readers.append(node)
    return readers
