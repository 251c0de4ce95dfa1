"""Runs layers with dynamically quantized activations as one integer kernel each of ONNX Runtime's CPU provider.

Per token
    **Before**  y = DequantizePerToken(DynamicQuantizePerToken(x)) · DQ(Q_w) (+ b)
    **After**   s = max(ReduceMax |x| / qmax, least)    Q_x = QuantizeLinear(x, s, 128), a block for each row
                y = MatMulIntegerToFloat(Q_x, Q_w, s, s_w, 128, z_w) (+ b)

Per tensor
    **Before**  y = DQ(DynamicQuantizeLinear(x)) · DQ(Q_w) (+ b)
    **After**   y = DynamicQuantizeMatMul(x, Q_w, s_w, z_w, b); where several layers read x, DynamicQuantizeLinear(x)
                stays, once, and each is MatMulIntegerToFloat(Q_x, Q_w, s_x, s_w, z_x, z_w, b)

The codes are those of the portable form, as uint8 with zero point 128: int8 activations have no fast kernel on x86.
They are computed once for all layers that read the same value. QuantizeLinear wants a zero point for each row, which
is made of the scales' shape.

With a scale for each row the bias is no input of the kernel but stays an Add: ONNX Runtime would multiply it by the
row's scale. It may be one with a single scale. The weight takes the form that `lower-int8` gives it; codes of fewer
than 8 bits (W4A8) stay so in the file, and become int8 when the session is made.

Left to `lower-weight-only`: layers whose weights have blocked scales. Skipped: activations in float8, which no kernel
of the CPU multiplies, and scales that are computed or lie along the inputs; they stay in the portable form.
"""

from __future__ import annotations

from collections import Counter
from typing import ClassVar

import numpy as np
import onnx_ir as ir
from pydantic.dataclasses import dataclass as options

from qcompiler.functions.library import remove_unused_functions
from qcompiler.functions.per_token import SMALLEST_SCALE
from qcompiler.graph.edit import node_graph
from qcompiler.graph.rewriter import Rewriter
from qcompiler.lowering.integer_weights import IntegerWeights, is_blocked, put_kernel, weight_obstacle
from qcompiler.rewriting.contract import OPTIONS, Changed, Changes, Kind, Pass, Skipped
from qcompiler.sites.activations import Dynamic
from qcompiler.sites.analyses import quantized_linears_of
from qcompiler.sites.find import Linear
from qcompiler.statistics import StatisticsStore

KERNEL = "MatMulIntegerToFloat"
WITH_ACTIVATION = "DynamicQuantizeMatMul"
MIDDLE = 128


@options(frozen=True, config=OPTIONS)
class LowerDynamicInt8(Pass):
    name: ClassVar[str] = "lower-dynamic-int8"
    kind: ClassVar[Kind] = "lowering"

    def apply(self, model: ir.Model, statistics: StatisticsStore) -> Changes:
        changes = Changes()
        rw = Rewriter(model, self.name)
        weights, rows = IntegerWeights(rw), _Rows(rw)
        model.graph.opset_imports.setdefault("com.microsoft", 1)
        layers: list[tuple[Linear, Dynamic]] = []
        for site in self.selected(quantized_linears_of(model)):
            pair = site.activation
            if site.dequantize is None or not isinstance(pair, Dynamic) or is_blocked(site):
                continue  # other passes' business
            obstacle = _activation_obstacle(pair) or weight_obstacle(site)
            if obstacle is not None:
                changes.skipped.append(Skipped(site.name, obstacle))
                continue
            layers.append((site, pair))
        readers = Counter(pair.quantize for _, pair in layers)
        for site, pair in layers:
            if pair.per_token:
                kernel, activation = KERNEL, rows.of(pair, site.in_features)
            elif readers[pair.quantize] > 1:
                kernel, activation = KERNEL, list(pair.quantize.outputs)
            else:
                kernel, activation = WITH_ACTIVATION, [pair.quantize.inputs[0]]
            codes = weights.codes(site)
            inputs = _inputs(activation, [codes, weights.scales(site), weights.zero_point(site, codes)])
            put_kernel(site, kernel, inputs, rw, with_bias=not pair.per_token)
            changes.changed.append(Changed(site.name, kernel=kernel))
        remove_unused_functions(model)
        return changes


def _activation_obstacle(pair: Dynamic) -> str | None:
    if pair.float8:
        return "its activation is float8, and the CPU has no kernel that multiplies it; it is dequantized on every run"
    return None


def _inputs(activation: list[ir.Value | None], weight: list[ir.Value]) -> list[ir.Value | None]:
    """In the order of the operators: the codes of both, the scales of both, the zero points of both."""
    if len(activation) == 1:
        return [*activation, *weight]
    return [value for both in zip(activation, weight, strict=True) for value in both]


class _Rows:
    """Activations quantized row by row as the kernel takes them, made once for all layers that read them."""

    def __init__(self, rw: Rewriter) -> None:
        self._rw = rw
        self._made: dict[ir.Node, list[ir.Value | None]] = {}
        self._constants: dict[str, ir.Value] = {}

    def of(self, pair: Dynamic, features: int) -> list[ir.Value | None]:
        """Codes uint8 [..., features], scales float32 [..., 1], zero point uint8 []."""
        if pair.quantize not in self._made:
            self._made[pair.quantize] = self._quantized(pair, features)
        return self._made[pair.quantize]

    def _quantized(self, pair: Dynamic, features: int) -> list[ir.Value | None]:
        graph, (codes, scales) = node_graph(pair.quantize), pair.quantize.outputs
        source = pair.quantize.inputs[0]  # not pair.source, which another layer's kernel may have replaced by now
        assert source is not None
        new: list[ir.Node] = []

        def add(
            op_type: str, inputs: list[ir.Value], kind: str, shape: ir.Shape | None,
            dtype: ir.DataType = ir.DataType.FLOAT, **attributes: object,
        ) -> ir.Value:  # fmt: skip
            node = self._rw.node(op_type, inputs, f"{codes.name}.{kind}", dtype=dtype, shape=shape,
                                 attributes=attributes)  # fmt: skip
            new.append(node)
            return node.outputs[0]

        middle = self._constant(graph, "rows.zero_point", np.array(MIDDLE, np.uint8))
        qmax = self._constant(graph, f"rows.qmax.{pair.qmax:g}", np.array(pair.qmax, np.float32))
        least = self._constant(graph, "rows.smallest_scale", np.array(SMALLEST_SCALE, np.float32))
        last = self._constant(graph, "rows.last_axis", np.array([-1], np.int64))
        if source.dtype != ir.DataType.FLOAT:  # or where it is unknown: ONNX Runtime drops a Cast that changes nothing
            source = add("Cast", [source], "float", codes.shape, to=int(ir.DataType.FLOAT))
        magnitude = add("Abs", [source], "magnitude", codes.shape)
        absmax = add("ReduceMax", [magnitude, last], "absmax", scales.shape, keepdims=1)
        scale = add("Max", [add("Div", [absmax, qmax], "step", scales.shape), least], "scale", scales.shape)
        settings: dict[str, object] = {}
        middles = middle
        if source.shape is None or len(source.shape) > 1:  # a single row [K] cannot have blocks, and needs none
            settings = {"axis": -1, "block_size": features}
            size = add("Shape", [scale], "rows", None, ir.DataType.INT64)
            filling = ir.tensor(np.array([MIDDLE], np.uint8))
            middles = add("ConstantOfShape", [size], "zero_points", scales.shape, ir.DataType.UINT8, value=filling)
        quantized = add("QuantizeLinear", [source, scale, middles], "unsigned", codes.shape, ir.DataType.UINT8,
                        **settings)  # fmt: skip
        self._rw.insert_before(pair.quantize, new)
        return [quantized, scale, middle]

    def _constant(self, graph: ir.Graph, name: str, data: np.ndarray) -> ir.Value:
        if name not in self._constants:
            self._constants[name] = self._rw.constant(name, data, graph)
        return self._constants[name]
