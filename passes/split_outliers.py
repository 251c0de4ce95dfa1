"""Lets the few input columns that are far louder than the rest stay in float, without changing the function.

**Before**  y = x W (+ b)        **After**  y = (x ⊙ m) W' (+ b) + x[…, O] W[O, :]

O are the outlier columns of x, m is 0 on O and 1 elsewhere, and W' is W with the rows O set to 0, so that neither the
scale of a row of x nor that of a column of W has to cover them. The passes that follow quantize (x ⊙ m) W' as they
would any layer, and leave x[…, O] W[O, :] alone: with int8 weights per channel and int8 activations per token that is
LLM.int8(). Layers that read one value share O, the Gather and the Mul.

Source: Dettmers et al. 2022, "LLM.int8()", section 3.2 and equation 8. There O are the columns with a magnitude above
6.0, found anew for each batch. Here O comes from calibration, so that W[O, :] is a small float constant and the rest a
plain layer; ``top`` takes the loudest columns instead. The threshold is a magnitude, and how loud a value is as a whole
depends on the model: where more than ``max_share`` of the columns pass it, the loudest are taken.

``dynamic: true`` finds O for each batch, as in the paper and in bitsandbytes, and needs no calibration data. The pass
then comes after `quantize-weights` and before `quantize-activations`, as W[O, :] is dequantized from the codes:
outliers that calibration has not seen are caught, and the rows are as exact as 8 bits are. What that costs at run time
is in docs/decisions/0009.

A weight that is tied to an embedding or shared with another layer stays as it is (W' = W, which gives the same
product): only its rows O are stored a second time.

Skipped: layers whose weight is quantized already (with ``dynamic``: whose weight is float, or not in 8 bits with one
scale per channel or tensor), and layers whose input is. Layers without outlier columns are left as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from pydantic import Field
from pydantic.dataclasses import dataclass as options

from qcompiler.errors import SchemeError
from qcompiler.functions.library import DOMAIN
from qcompiler.functions.outliers import add_split_function
from qcompiler.graph.edit import (
    add_constant,
    array,
    node_graph,
)
from qcompiler.graph.lazy import derived
from qcompiler.graph.rewriter import Rewriter
from qcompiler.rewriting.contract import OPTIONS, Changed, Changes, Kind, Pass, Skipped, Tap
from qcompiler.rewriting.folding import is_shared, reader_of, weight_of
from qcompiler.rewriting.products import add_product
from qcompiler.sites.activations import is_quantized
from qcompiler.sites.analyses import sites_of
from qcompiler.sites.find import Linear
from qcompiler.statistics import ChannelRange, StatisticsStore

SHOWN = 8  # columns that the report names
QUANTIZED_INPUT = "its input is quantized already: split-outliers comes before that"
EIGHT_BITS = (ir.DataType.INT8, ir.DataType.UINT8)

Columns = npt.NDArray[np.int64]


@options(frozen=True, config=OPTIONS)
class SplitOutliers(Pass):
    name: ClassVar[str] = "split-outliers"
    kind: ClassVar[Kind] = "exact"

    threshold: float = Field(default=6.0, gt=0)
    """Columns whose magnitude reaches this somewhere in the data are outliers."""
    top: int | None = Field(default=None, ge=1)
    """Take this many of the loudest columns instead, whatever their magnitude."""
    max_share: float = Field(default=0.05, gt=0, le=1)
    """Share of the columns that may pass the threshold; of more, the loudest are taken (at least one)."""
    dynamic: bool = False
    """Find the columns at run time, in each batch anew; comes after quantize-weights."""

    def __post_init__(self) -> None:
        if self.dynamic and self.top is not None:
            raise SchemeError(
                "split-outliers.top counts calibrated columns, and dynamic: true measures none: set max_share instead."
            )

    def taps(self, model: ir.Model) -> Sequence[Tap]:
        if self.dynamic:
            return ()
        groups = self._groups(model, Changes())
        return [Tap(str(value.name), ChannelRange()) for value in groups]

    def apply(self, model: ir.Model, statistics: StatisticsStore) -> Changes:
        changes, rw = Changes(), Rewriter(model, self.name)
        for linears in self._groups(model, changes).values():
            value = linears[0].node.inputs[0]  # as it is now: the layer that writes it may have been split before
            assert value is not None  # a linear layer reads something
            if self.dynamic:
                detail = self._split_at_run_time(model, value, linears, rw)
            else:
                lo, hi = statistics.get(str(value.name), ChannelRange()).result()
                detail = self._split(value, linears, np.maximum(-lo, hi), rw)
            changes.changed.extend(Changed(linear.name, detail=detail) for linear in linears)
        return changes

    def _groups(self, model: ir.Model, changes: Changes) -> dict[ir.Value, list[Linear]]:
        """The layers that can be split, by the value that they read; the others go to `changes.skipped`."""
        groups: dict[ir.Value, list[Linear]] = {}
        for linear in self.selected(sites_of(model).linears):
            obstacle = _not_for_codes(linear) if self.dynamic else _not_for_floats(linear)
            if obstacle is not None:
                changes.skipped.append(Skipped(linear.name, obstacle))
            else:
                groups.setdefault(linear.input, []).append(linear)
        return groups

    # --------------------------------------------------------------------------------------- columns from calibration

    def _split(self, value: ir.Value, linears: Sequence[Linear], absmax: np.ndarray, rw: Rewriter) -> str:
        """Split the layers that read a value, and say so in a line for the report."""
        columns, limit = self._choose(absmax)
        loudest = float(absmax.max())
        if columns.size == 0:
            return f"left as it is: no column reaches {self.threshold:.3g} (input absmax {loudest:.3g})"
        first, dtype = linears[0].node, _dtype(value, linears[0])
        graph = node_graph(first)
        mask = np.ones(absmax.size, dtype.numpy())
        mask[columns] = 0
        indices = rw.constant(f"{value.name}.outlier_columns", columns, graph)
        kept = rw.constant(f"{value.name}.outlier_mask", mask, graph)
        shape = ir.Shape([*value.shape[:-1], columns.size]) if value.shape is not None else None
        picked = rw.node("Gather", [value, indices], f"{value.name}.outliers", dtype=dtype, shape=shape,
                         attributes={"axis": -1})  # fmt: skip
        rest = rw.node("Mul", [value, kept], f"{value.name}.rest", dtype=dtype, shape=value.shape)
        rw.insert_before(first, [picked, rest])
        for linear in linears:
            self._take_rows(linear, columns, picked.outputs[0], rw)
            linear.node.replace_input_with(0, rest.outputs[0])
        left = float(np.delete(absmax, columns).max(initial=0.0))
        return f"{_listed(columns, absmax.size)} in float, input absmax {loudest:.3g} → {left:.3g}{limit}"

    def _choose(self, absmax: np.ndarray) -> tuple[Columns, str]:
        """The outlier columns in order, and for the report whether more would have passed."""
        by_loudness = np.argsort(-absmax, kind="stable").astype(np.int64)
        if self.top is not None:
            return np.sort(by_loudness[: self.top]), ""
        passing = int(np.count_nonzero(absmax >= self.threshold))
        most = self._most(absmax.size)
        chosen = np.sort(by_loudness[: min(passing, most)])
        if passing <= most:
            return chosen, ""
        return chosen, f" ({passing} columns reach {self.threshold:.3g}: the loudest by max_share {self.max_share:g})"

    def _most(self, features: int) -> int:
        return max(1, int(self.max_share * features))

    def _take_rows(self, linear: Linear, columns: Columns, picked: ir.Value, rw: Rewriter) -> None:
        """Multiply the picked columns by the rows of the weight that they met, and set these rows to 0."""
        source, by_rows = weight_of(linear), not linear.transposed
        base, shape = str(linear.weight.name), tuple(int(size) for size in source.shape.numpy())

        def taken(data: np.ndarray) -> np.ndarray:
            return data[columns] if by_rows else data[:, columns].T

        def left(data: np.ndarray) -> np.ndarray:
            others = data.copy()
            others[(columns,) if by_rows else (slice(None), columns)] = 0
            return others

        name = rw.fresh(f"{base}.outliers")
        rows = derived(source, taken, source.dtype, (columns.size, linear.out_features), name)
        product = rw.node(
            "MatMul", [picked, add_constant(node_graph(linear.node), name, rows)],
            f"{linear.name}.outliers", like=linear.node.outputs[0],
        )  # fmt: skip
        if not is_shared(linear):
            reader, index = reader_of(linear)
            rw.set_constant(reader, index, derived(source, left, source.dtype, shape, base))
        add_product(linear, [product], rw)
        rw.mark(linear.node)

    # ------------------------------------------------------------------------------------------- columns at run time

    def _split_at_run_time(self, model: ir.Model, value: ir.Value, linears: Sequence[Linear], rw: Rewriter) -> str:
        first, dtype, features = linears[0].node, _dtype(value, linears[0]), linears[0].in_features
        most = self._most(features)
        columns = ir.Value(name=rw.fresh(f"{value.name}.outlier_columns"), type=ir.TensorType(ir.DataType.INT64))
        rest = ir.Value(name=rw.fresh(f"{value.name}.rest"), type=ir.TensorType(dtype), shape=value.shape)
        options = {"threshold": float(self.threshold), "most": most}
        split = ir.Node(
            DOMAIN, add_split_function(model), [value], outputs=[columns, rest], name=rest.name,
            attributes=[ir.convenience.convert_attribute(key, item) for key, item in options.items()],
        )  # fmt: skip
        picked = rw.node("Gather", [value, columns], f"{value.name}.outliers", dtype=dtype,
                         attributes={"axis": -1})  # fmt: skip
        rw.insert_before(first, [split, picked])
        for linear in linears:
            self._gather_rows(linear, columns, picked.outputs[0], rw)
            linear.node.replace_input_with(0, rest)
        return f"columns that reach {self.threshold:.3g} in a batch are multiplied apart, at most {most} of {features}"

    def _gather_rows(self, linear: Linear, columns: ir.Value, picked: ir.Value, rw: Rewriter) -> None:
        """Multiply the picked columns by the rows that they meet, dequantized from the layer's codes."""
        dequantize = linear.dequantize
        assert dequantize is not None  # `_not_for_codes`
        base, dtype = linear.name, dequantize.outputs[0].dtype
        codes = rw.node("Gather", [linear.weight, columns], f"{base}.outliers.codes",
                        dtype=linear.weight.dtype, attributes={"axis": 1 - linear.channel_axis})  # fmt: skip
        new = [codes, rw.node("DequantizeLinear", [codes.outputs[0], *dequantize.inputs[1:]],
                              f"{base}.outliers.weight", dtype=dtype,
                              attributes={"axis": linear.channel_axis})]  # fmt: skip
        if linear.transposed:
            new.append(rw.node("Transpose", [new[-1].outputs[0]], f"{base}.outliers.weight.transposed",
                               dtype=dtype, attributes={"perm": [1, 0]}))  # fmt: skip
        new.append(rw.node("MatMul", [picked, new[-1].outputs[0]], f"{base}.outliers",
                           like=linear.node.outputs[0]))  # fmt: skip
        add_product(linear, new, rw)
        rw.mark(linear.node)


def _not_for_floats(linear: Linear) -> str | None:
    """Why a layer cannot be split before its weight is quantized, or None."""
    if linear.dequantize is not None:
        return "its weight is quantized already: split-outliers comes before the passes that quantize weights"
    return QUANTIZED_INPUT if is_quantized(linear.input) else None


def _not_for_codes(linear: Linear) -> str | None:
    """Why a layer cannot be split at run time, or None."""
    if linear.dequantize is None:
        return "its weight is float: with dynamic: true split-outliers comes after quantize-weights"
    if linear.dequantize.op_type != "DequantizeLinear" or linear.weight.dtype not in EIGHT_BITS:
        return "its weight is not in 8 bits, and rows of other codes cannot be gathered"
    if linear.dequantize.attributes.get_int("block_size", 0) > 0:
        return "its weight has blocked scales, and rows of them are not gathered: use granularity channel"
    scale = linear.dequantize.inputs[1]
    axis = linear.dequantize.attributes.get_int("axis", 1)
    if scale is None or (array(scale).size > 1 and axis % 2 != linear.channel_axis):
        return "its weight has scales along the inputs, not for each output channel"
    return QUANTIZED_INPUT if is_quantized(linear.input) else None


def _dtype(value: ir.Value, linear: Linear) -> ir.DataType:
    """Shape inference stops at operators of ONNX Runtime; the layer's other operand has the type, too."""
    weight = linear.node.inputs[1]
    return value.dtype or (weight.dtype if weight is not None else None) or ir.DataType.FLOAT


def _listed(columns: Columns, features: int) -> str:
    shown = ", ".join(str(column) for column in columns[:SHOWN]) + (", …" if columns.size > SHOWN else "")
    return f"{columns.size} of {features} columns ({columns.size / features:.1%}: {shown})"
