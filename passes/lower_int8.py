"""Runs statically quantized linear layers as one integer kernel of ONNX Runtime's CPU provider.

**Before**  y = DQ(Q(x)) · DQ(Q_w) (+ b)        **After**  y = MatMulIntegerToFloat(Q(x), Q_w, s_x, s_w, z_x, z_w, b)

The kernel multiplies 8-bit integers, and scales the 32-bit sums and adds the bias on the way out. The bias is an input
of the kernel because the activation has a single scale; with one scale for each row ONNX Runtime would multiply the
bias by it. Layers that share a value share its QuantizeLinear. A weight stored [N, K] for this layer alone is stored
transposed; one that an embedding shares keeps its layout and is turned when the session is made.

Activations become unsigned, because int8 activations have no fast kernel on x86. Weights stay int8 where no two
neighbouring codes add up to more than 128 (quantize-weights sees to that): the uint8 × int8 kernel is the fastest, and
on x86 CPUs without VNNI it adds pairs of products in 16 bits, which then cannot saturate. Other int8 codes are shifted
to uint8 with zero point 128, whose kernel is exact everywhere and slower. Codes of fewer bits stay so in the file and
become int8 when the session is made.

Skipped: layers whose activations have more than 8 bits, or whose weights are no integers; they stay as they are, in
standard operators. Layers whose scales are blocked are skipped, too, and read the float activation again: ONNX Runtime
would fuse blocked scales and a quantized activation into a kernel that fails, or that multiplies by the wrong scales.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import onnx_ir as ir
from pydantic.dataclasses import dataclass as options

from qcompiler.graph.edit import (
    array,
    node_graph,
)
from qcompiler.graph.rewriter import Rewriter
from qcompiler.lowering.integer_weights import (
    EIGHT_BITS,
    FLOAT_INPUT,
    IntegerWeights,
    is_blocked,
    put_kernel,
    unsigned,
    weight_obstacle,
    zero_point,
)
from qcompiler.lowering.layer_inputs import is_the_models_own, read_float, static_obstacle
from qcompiler.rewriting.contract import OPTIONS, Changed, Changes, Kind, Pass, Skipped
from qcompiler.sites.activations import Static
from qcompiler.sites.analyses import quantized_linears_of
from qcompiler.statistics import StatisticsStore
from qcompiler.targets.conditions import Call, obstacles, operand_of

KERNEL = "MatMulIntegerToFloat"
TAKES = "the integer kernel takes int8 and uint8"


@options(frozen=True, config=OPTIONS)
class LowerInt8(Pass):
    name: ClassVar[str] = "lower-int8"
    kind: ClassVar[Kind] = "lowering"

    def apply(self, model: ir.Model, statistics: StatisticsStore) -> Changes:
        changes = Changes()
        rw = Rewriter(model, self.name)
        activations, weights = _Activations(rw), IntegerWeights(rw)
        model.graph.opset_imports.setdefault("com.microsoft", 1)
        for site in self.selected(quantized_linears_of(model)):
            activation = site.activation
            if site.dequantize is None or not isinstance(activation, Static) or activation.quantize is None:
                continue  # weight-only, dynamic and float layers are other passes' business
            obstacle = static_obstacle(activation, EIGHT_BITS, TAKES) or weight_obstacle(site)
            if obstacle is None:
                codes, scale, middle = activations.of(activation.quantize)
                weight = weights.codes(site)
                inputs = [codes, weight, scale, weights.scales(site), middle, weights.zero_point(site, weight)]
                put_kernel(site, KERNEL, inputs, rw, with_bias=True)
                changes.changed.append(Changed(site.name, kernel=KERNEL))
                continue
            if is_blocked(site):
                if is_the_models_own(activation):
                    continue  # its weight alone is lowered, by lower-weight-only
                read_float(site.node, activation)
                changes.skipped.append(Skipped(site.name, f"{obstacle}, {FLOAT_INPUT}", undone="activation"))
                continue
            changes.skipped.append(Skipped(site.name, obstacle))
        return changes


class _Activations:
    """Quantized activations as the kernel takes them, made once for all layers that read them."""

    def __init__(self, rw: Rewriter) -> None:
        self._rw = rw
        self._made: dict[ir.Node, tuple[ir.Value, ir.Value, ir.Value]] = {}

    def of(self, quantize: ir.Node) -> tuple[ir.Value, ir.Value, ir.Value]:
        """(codes, scale, zero point) of a QuantizeLinear: unsigned codes, float32 scale."""
        if quantize not in self._made:
            codes, scale = quantize.outputs[0], quantize.inputs[1]
            graph, base = node_graph(quantize), str(codes.name)
            assert scale is not None
            single = array(scale).reshape(()).astype(np.float32)
            if scale.dtype == ir.DataType.FLOAT and array(scale).ndim == 0:
                float_scale = scale
            else:
                float_scale = self._rw.constant(f"{scale.name}.float", single, graph)
            middle = unsigned(zero_point(quantize).reshape(()))
            unsigned_middle = self._rw.constant(f"{base}.zero_point", middle, graph)
            if obstacles("unsigned-activations", Call(inputs=[operand_of(codes)])):
                again = self._rw.node(
                    "QuantizeLinear", [quantize.inputs[0], scale, unsigned_middle],
                    f"{base}.unsigned", dtype=ir.DataType.UINT8, shape=codes.shape,
                )  # fmt: skip
                self._rw.insert_before(quantize, [again])
                codes = again.outputs[0]
            self._made[quantize] = codes, float_scale, unsigned_middle
        return self._made[quantize]
