"""What of a float32 model may compute in 16 bits: decided node by node, in the order of the graph, changing nothing.

Values are of three kinds: **data**, what the model makes of its float inputs and its weights; **tables**, what it makes
of whole numbers alone (positions, rotary angles, masks); **constants**, and what only moves or decodes constants.

- Tables are computed in float32: a position does not fit 16 bits. They are rounded where data meets them.
- Means, sums, powers, roots and exponentials of data are computed in float32, and so is what joins their results with
  the data (x · 1/√(mean x² + ε)): squares overflow in float16 from 256 on, and ε underflows.
- Nodes stay in float32 whose constants do not fit 16 bits, and those that write or read a value that is too large.
- Everything else that has a form in 16 bits gets it. Products, softmax and norms with an operator of their own
  accumulate in float32 inside ONNX Runtime's kernels whatever their type.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
import onnx_ir as ir

from qcompiler.functions.cache import UNPACK
from qcompiler.graph.edit import constant
from qcompiler.graph.operators import has, multiplies_floats
from qcompiler.half.constants import FITTING, Fit, fit, largest, mask_value
from qcompiler.half.decided import HalfPlan, ValueKind
from qcompiler.half.norms import Mode, is_read_wide
from qcompiler.half.types import FLOAT, form_of, gives_output_dtype
from qcompiler.sites.find import Sites
from qcompiler.sites.stored.kernels import gives_sums

HALF_TYPES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
SMALL_CODES = (ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.INT4, ir.DataType.UINT4)
"""Whole numbers that 16 bits hold exactly."""
PRECISE = frozenset({"Exp", "Log", "Pow", "Reciprocal", "Sqrt", "Sin", "Cos"})
"""Operators that are computed in float32, beside those that accumulate."""
ELEMENTWISE = frozenset({
    "Abs", "Add", "Clip", "Div", "Max", "Mean", "Min", "Mul", "Neg", "Sub", "Sum", "Where",
})  # fmt: skip
FOLLOWING = ELEMENTWISE | {"Softmax", "LogSoftmax"}
"""Operators that stay in float32 where all their data is in it."""
BOUNDED = frozenset({"Sin", "Cos", "Tanh", "Sigmoid", "Softmax"})
PASSIVE = frozenset({"ArgMax", "ArgMin", "IsInf", "IsNaN", "Shape", "Size"})
NO_BFLOAT16_DECODERS = ("DequantizeLinear", UNPACK)
"""What decodes and has no kernel for bfloat16 in the CUDA provider: UnpackInt4 is made of Floor, among others."""
COUNTED = 1 << 16
"""Constants of up to so many numbers are looked at to bound a table."""


def plan(
    model: ir.Model, dtype: ir.DataType, sites: Sites, selected: Callable[[ir.Node], bool],
    stays: Callable[[str], bool], peaks: Mapping[str, float],
) -> HalfPlan:  # fmt: skip
    """Decide for every node. `selected` says of a layer's node whether it may change, `stays` of a graph input whether
    it keeps its type; `peaks` are the largest magnitudes of values, where they were measured, with headroom."""
    planner = _Planner(model, dtype, sites, selected, stays, peaks)
    while wide := planner.wide_gains():  # who else reads what a norm reads is known at the end of the graph only
        planner = planner.again(wide)
    return planner.plan


class _Planner:
    def __init__(
        self, model: ir.Model, dtype: ir.DataType, sites: Sites, selected: Callable[[ir.Node], bool],
        stays: Callable[[str], bool], peaks: Mapping[str, float], wide: frozenset[ir.Node] = frozenset(),
        fits: dict[ir.Value, Fit] | None = None,
    ) -> None:  # fmt: skip
        self.model, self.dtype, self.sites, self.selected = model, dtype, sites, selected
        self.stays, self.peaks = stays, peaks
        self.opset = model.opset_imports[""]
        self.layers = {site.node for site in sites}
        self.limit = largest(dtype)
        self.plan = HalfPlan(dtype)
        self.statistics: set[ir.Value] = set()
        """What reductions of data gave, and what is computed of it alone."""
        self.normalized: set[ir.Value] = set()
        """Data that statistics were subtracted from, or divided by."""
        self.gains: list[ir.Node] = []
        """Products of a normalized value and a norm's gain that are computed in 16 bits."""
        self._wide = wide
        self._fits: dict[ir.Value, Fit] = {} if fits is None else fits
        self._run()

    def again(self, wide: frozenset[ir.Node]) -> _Planner:
        """Decide anew, with the gains of these nodes in float32, too."""
        return _Planner(
            self.model, self.dtype, self.sites, self.selected, self.stays, self.peaks, self._wide | wide, self._fits
        )

    def wide_gains(self) -> frozenset[ir.Node]:
        """The gains in 16 bits that have to be in float32, so that ONNX Runtime can make one operator of the norm."""

        def at_hand(value: ir.Value) -> bool:
            return self._flexible(value) and not (value.is_graph_input() and self.stays(str(value.name)))

        return frozenset(
            node for node in self.gains
            if is_read_wide(node, self.normalized, self.statistics, self.plan.modes, at_hand)
        )  # fmt: skip

    def _run(self) -> None:
        for value in self.model.graph.inputs:
            if value.dtype == FLOAT and constant(value) is None:
                self.plan.kinds[value] = "data"
                if self._too_large(value) or self._appended_to_large(value):
                    self.plan.large.add(value)
        for node in self.model.graph:
            self._decide(node)

    def is_float(self, value: ir.Value) -> bool:
        return value.dtype == FLOAT

    def kind(self, value: ir.Value) -> ValueKind:
        return self.plan.kinds.get(value, "constant")

    # ----------------------------------------------------------------------------------------------------- one node

    def _decide(self, node: ir.Node) -> None:
        floats = [value for value in node.inputs if value is not None and value.dtype == FLOAT]
        written = [value for value in node.outputs if value.dtype == FLOAT]
        if any(attribute.type == ir.AttributeType.GRAPH for attribute in node.attributes.values()):
            self._set(node, "float32", "data", "the graphs inside it stay as they are")
        elif not floats and not written:
            return
        elif not node.domain and node.op_type in PASSIVE:
            any_type = has(node, "measures") or form_of(node, self.opset, self.dtype, self.is_float)
            self._set(node, "untouched" if any_type else "float32", "data")
        elif not node.domain and node.op_type == "Cast" and not written:
            self._set(node, "untouched", "data")
        elif not node.domain and node.op_type == "Cast" and not floats:
            self._cast(node)
        elif node.op_type == "DequantizeLinear" or gives_output_dtype(node):
            self._decoder(node)
        elif has(node, "moves"):
            self._move(node)
        else:
            self._compute(node, floats)
        for value in written:
            if self._too_large(value):
                self.plan.large.add(value)

    def _set(self, node: ir.Node, mode: Mode, kind: ValueKind, reason: str = "") -> None:
        self.plan.modes[node] = mode
        if reason:
            self.plan.reasons[node] = reason
        for value in node.outputs:
            if value.dtype == FLOAT:
                self.plan.kinds[value] = kind

    def _cast(self, node: ir.Node) -> None:
        source = node.inputs[0]
        dtype = source.dtype if source is not None else None
        producer = source.producer() if source is not None else None
        if dtype == ir.DataType.BOOL:
            self._set(node, "either", "table")
            self.plan.bounds[node.outputs[0]] = 1.0
        elif dtype in SMALL_CODES:
            self._set(node, "half", "data")
        elif dtype in HALF_TYPES:  # the model itself asks for float32
            self._set(node, "float32", "data")
        else:
            sums = producer is not None and gives_sums(producer)
            self._set(node, "float32", "data" if sums or dtype == ir.DataType.DOUBLE else "table")

    def _decoder(self, node: ir.Node) -> None:
        """DequantizeLinear, and the model-local functions that decode."""
        codes, scale = (*node.inputs, None)[:2]
        if codes is not None and codes.producer() is not None and any(
            value in self.plan.large for value in codes.producer().inputs if value is not None  # type: ignore[union-attr]
        ):  # fmt: skip
            self._set(node, "float32", "data")
            self.plan.large.update(node.outputs)
            return
        fixed = codes is not None and self._is_fixed(codes)
        if node.domain or scale is None or self.kind(scale) == "constant":
            # Convolutions are not lowered, so their weights are decoded on every run.
            stays = not fixed or any(has(reader, "convolution") for reader in node.outputs[0].consumers())
            no_kernel = stays and self.dtype == ir.DataType.BFLOAT16 and node.op_type in NO_BFLOAT16_DECODERS
            self._set(node, "float32" if no_kernel else "either", "constant" if fixed else "data")
        else:  # its scale is gathered with the codes, or found at run time
            self._set(node, "half" if self.plan.is_half(scale) else "float32", "data")

    def _is_fixed(self, value: ir.Value) -> bool:
        """Whether a value is a constant, or one that was only moved."""
        producer = value.producer()
        if producer is None:
            return constant(value) is not None
        inputs = [item for item in producer.inputs if item is not None]
        return has(producer, "moves") and all(self._is_fixed(item) for item in inputs)

    def _move(self, node: ir.Node) -> None:
        carried = [value for value in node.inputs if value is not None and value.dtype == FLOAT]
        kinds = {self.kind(value) for value in carried}
        self.plan.bounds.update(dict.fromkeys(node.outputs, max(map(self._bound, carried))))
        if any(value in self.plan.large for value in carried):
            self._set(node, "float32", "data")
            self.plan.large.update(node.outputs)
        elif any(value in self.statistics for value in carried):
            self._set(node, "float32", "data")
            self.statistics.update(node.outputs)
        elif "data" in kinds:
            half = any(self._flexible(value) for value in carried if self.kind(value) == "data")
            half = half or self._is_turned_operand(node)
            if any(value in self.normalized for value in carried):
                self.normalized.update(node.outputs)
            self._set(node, "half" if half else "float32", "data")
        elif "table" in kinds:
            self._set(node, "either", "table")
        elif node.op_type == "Gather" and node.inputs[1] is not None and not self._is_fixed(node.inputs[1]):
            reason = self._constant_obstacle(node)
            self._set(node, "float32" if reason or self._left_out(node) else "half", "data", reason)
        else:
            self._set(node, "either", "constant")

    def _is_turned_operand(self, node: ir.Node) -> bool:
        """Whether a Transpose gives operands of products alone: it is rounded before, so that half as much moves.

        Between a Transpose of float32 and a product, ONNX Runtime exchanges Transpose and Cast for some orders of axes
        (1, 0, 2), and then finds no kernel for its own Cast (1.31.1): such a model does not load.
        """
        readers = node.outputs[0].consumers()
        return node.op_type == "Transpose" and bool(readers) and all(
            not item.domain and multiplies_floats(item) and not self._left_out(item)
            and not self._constant_obstacle(item) for item in readers
        )  # fmt: skip

    def _compute(self, node: ir.Node, floats: list[ir.Value]) -> None:
        kinds = {self.kind(value) for value in floats}
        if "data" not in kinds and not (node in self.layers and "table" in kinds):
            runtime = "table" in kinds or any(value is not None and not self._is_fixed(value) for value in node.inputs)
            # A choice between two numbers, as masks are made, is made of rounded ones.
            choice = node.op_type == "Where" and kinds == {"constant"} and not self._constant_obstacle(node)
            self._set(node, "either" if choice else "float32", "table" if runtime else "constant")
            if runtime:
                self.plan.bounds.update(dict.fromkeys(node.outputs, self._table_bound(node, floats)))
            return
        form = form_of(node, self.opset, self.dtype, self.is_float)
        if form is None or _is_precise(node) or self._joins_precise(node, floats):
            self._set(node, "float32", "data")
            if has(node, "accumulates") or all(
                value in self.statistics for value in floats if self.kind(value) != "constant"
            ):
                self.statistics.update(node.outputs)
            elif any(value in self.statistics for value in floats):
                self.normalized.update(node.outputs)
            return
        reason = "" if self._left_out(node) else self._range_obstacle(node, floats) or self._constant_obstacle(node)
        if reason or self._left_out(node) or self._meets_counts(node, floats):
            self._set(node, "float32", "data", reason)
            return
        self._set(node, "half", "data")
        self.plan.forms[node] = form
        if self._is_gain(node, floats):
            self.gains.append(node)

    # ------------------------------------------------------------------------------------------------- why in float32

    def _joins_precise(self, node: ir.Node, floats: list[ir.Value]) -> bool:
        """Whether an elementwise node takes part in what is computed in float32."""
        if node.domain or node.op_type not in FOLLOWING:
            return False
        data = [value for value in floats if self.kind(value) == "data"]
        if self._is_gain(node, floats):
            return False
        if data and not any(self._flexible(value) for value in data):
            return True
        if node.op_type not in ELEMENTWISE:
            return False
        readers = node.outputs[0].consumers()
        reduced = bool(readers) and all(has(item, "accumulates") for item in readers)
        return reduced or any(value in self.statistics for value in floats)

    def _is_gain(self, node: ir.Node, floats: list[ir.Value]) -> bool:
        """Whether a normalized value meets the norm's gain: that is done in 16 bits.

        ONNX Runtime then makes one operator of the whole norm. With a gain in float32 it makes one that CUDA has no
        kernel for where the rest is bfloat16, and the model does not load (1.31.1).
        """
        gains = [constant(value) for value in floats if value not in self.normalized]
        found = node.op_type == "Mul" and len(gains) == 1 and gains[0] is not None and gains[0].size > 1
        return found and node not in self._wide

    def _flexible(self, value: ir.Value) -> bool:
        """Whether data is at hand in 16 bits."""
        producer = value.producer()
        return self.plan.is_half(value) or (producer is not None and self.plan.modes.get(producer) == "either")

    def _left_out(self, node: ir.Node) -> bool:
        return node in self.layers and not self.selected(node)

    def _too_large(self, value: ir.Value) -> bool:
        return self.peaks.get(str(value.name), 0.0) > self.limit

    def _appended_to_large(self, value: ir.Value) -> bool:
        """Whether a cache holds numbers that are too large once something is appended."""
        joins = [node for node in value.consumers() if node.op_type == "Concat" and not node.domain]
        return any(self._too_large(item) for node in joins for item in node.inputs if item is not None)

    def _range_obstacle(self, node: ir.Node, floats: list[ir.Value]) -> str:
        name = self.dtype.name.lower()
        for value in floats:
            if value in self.plan.large:
                return f"what it reads is too large for {name}, which ends at {self.limit:.5g}"
        for value in node.outputs:
            if self._too_large(value):
                peak = self.peaks[str(value.name)]
                return f"its numbers reach {peak:.3g} with headroom, and {name} ends at {self.limit:.5g}"
        return ""

    def _constant_obstacle(self, node: ir.Node) -> str:
        for value in node.inputs:
            for root in self._roots(value):
                found = self._fit(root)
                if found.largest > self.limit or (found.masks and _multiplies(node)):
                    return f"its constant {root.name!r} does not fit the range of {self.dtype.name.lower()}"
                if found.error > FITTING:
                    return f"its constant {root.name!r} is too small for {self.dtype.name.lower()}"
        return ""

    def _roots(self, value: ir.Value | None) -> list[ir.Value]:
        """The float constants that a value is made of by moving and decoding alone."""
        if value is None or value.dtype != FLOAT or self.kind(value) != "constant":
            return []
        producer = value.producer()
        if producer is None:
            return [value]
        if self.plan.modes.get(producer) != "either" or producer.domain:
            return []
        return [root for item in producer.inputs for root in self._roots(item)]

    def _fit(self, value: ir.Value) -> Fit:
        if value not in self._fits:
            tensor = constant(value)
            assert tensor is not None  # the caller looked
            self._fits[value] = fit(tensor, self.dtype)
        return self._fits[value]

    # ------------------------------------------------------------------------------------------------- bounds of tables

    def _meets_counts(self, node: ir.Node, floats: list[ir.Value]) -> bool:
        """Whether data is multiplied by a table that is not known to fit: positions, counts."""
        tables = [value for value in floats if self.kind(value) == "table"]
        return _multiplies(node) and any(self._bound(value) > mask_value(self.dtype) for value in tables)

    def _bound(self, value: ir.Value) -> float:
        tensor = constant(value)
        if tensor is None:
            return self.plan.bounds.get(value, math.inf)
        if tensor.size > COUNTED:
            return math.inf
        numbers = tensor.numpy()
        return float(np.abs(numbers.astype(np.float64)).max(initial=0.0))

    def _table_bound(self, node: ir.Node, floats: list[ir.Value]) -> float:
        if node.op_type in BOUNDED:
            return 1.0
        if node.op_type == "ConstantOfShape":
            filled = node.attributes.get("value")
            return 0.0 if filled is None else float(np.abs(filled.as_tensor().numpy().astype(np.float64)).max())
        bounds = [self._bound(value) for value in floats]
        if node.op_type == "Mul":
            return math.prod(bounds)
        if node.op_type in ("Add", "Sub"):
            return sum(bounds)
        if node.op_type in ("Where", "Neg", "Abs", "Max", "Min") and bounds:
            return max(bounds)
        return math.inf


def _is_precise(node: ir.Node) -> bool:
    return has(node, "accumulates") or node.op_type in PRECISE


def _multiplies(node: ir.Node) -> bool:
    return multiplies_floats(node) or node.op_type in ("Mul", "Div")
