"""Runs statically quantized linear layers as one integer kernel of ONNX Runtime's CPU provider.

**Before**  y = DQ(Q(x)) · DQ(Q_w) (+ b)        **After**  y = MatMulIntegerToFloat(Q(x), Q_w, s_x, s_w, z_x, z_w, b)

The kernel multiplies 8-bit integers, and scales the 32-bit sums and adds the bias on the way out. The bias is an input
of the kernel because the activation has a single scale; with one scale for each row ONNX Runtime would multiply the
bias by it. Layers that share a value share its QuantizeLinear. A weight stored [N, K] for this layer alone is stored
transposed; one that an embedding shares keeps its layout and is turned when the session is made.

Activations become unsigned, because int8 activations have no fast kernel on x86. Weights stay int8 where no two
neighbouring codes add up to more than 128 (quantize-weights sees to that): the uint8 × int8 kernel is the fastest, and
on x86 CPUs without VNNI it adds pairs of products in 16 bits, which then cannot saturate. Other int8 codes are shifted
to uint8 with zero point 128, whose kernel is exact everywhere and slower.

Skipped: layers whose codes or activations have not 8 bits; they stay as they are, in standard operators. Layers whose
scales are blocked are skipped, too, and read the float activation again: ONNX Runtime would fuse blocked scales and a
quantized activation into a kernel that fails, or that multiplies by the wrong scales.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import onnx_ir as ir
from pydantic.dataclasses import dataclass as options

from qcompiler.graph import (
    Names,
    add_constant,
    array,
    constant,
    inherit,
    insert_before,
    new_node,
    node_graph,
    remove_node_if_unused,
    replace_output,
)
from qcompiler.match import Linear, find_sites
from qcompiler.rewrite import OPTIONS, Changed, Changes, Kind, Pass, Skipped
from qcompiler.saturation import is_saturation_safe
from qcompiler.statistics import StatisticsStore
from qcompiler.tensors import derived, read

KERNEL = "MatMulIntegerToFloat"
EIGHT_BITS = (ir.DataType.INT8, ir.DataType.UINT8)


@options(frozen=True, config=OPTIONS)
class LowerInt8(Pass):
    name: ClassVar[str] = "lower-int8"
    kind: ClassVar[Kind] = "lowering"

    def apply(self, model: ir.Model, statistics: StatisticsStore) -> Changes:
        changes = Changes()
        names = Names(model.graph)
        shared = _Shared(names, self.name)
        model.graph.opset_imports.setdefault("com.microsoft", 1)
        for site in self.selected(find_sites(model).linears):
            pair = _activation_pair(site)
            if site.dequantize is None or pair is None:
                continue  # weight-only and float layers are another pass's business
            obstacle = _obstacle(site, pair)
            if obstacle is not None:
                changes.skipped.append(Skipped(site.name, obstacle))
                if _is_blocked(site.dequantize):
                    _read_float(site, pair)
                continue
            _lower(site, pair, shared, names, self.name)
            changes.changed.append(Changed(site.name, kernel=KERNEL))
        return changes


def _activation_pair(site: Linear) -> tuple[ir.Node, ir.Node] | None:
    """The QuantizeLinear and DequantizeLinear that the layer reads its activation through."""
    dequantize = site.input.producer()
    if dequantize is None or dequantize.op_type != "DequantizeLinear" or dequantize.inputs[0] is None:
        return None
    quantize = dequantize.inputs[0].producer()
    if quantize is None or quantize.op_type != "QuantizeLinear":
        return None
    return quantize, dequantize


def _obstacle(site: Linear, pair: tuple[ir.Node, ir.Node]) -> str | None:
    assert site.dequantize is not None
    quantize, _ = pair
    if quantize.outputs[0].dtype not in EIGHT_BITS:
        return f"its activation has {quantize.outputs[0].dtype} codes, and the integer kernel takes 8 bits"
    scale = quantize.inputs[1]
    if constant(scale) is None or array(scale).size != 1:  # type: ignore[arg-type]
        return "its activation has no constant scale for the whole tensor"
    if site.weight.dtype not in EIGHT_BITS:
        return f"its weight has {site.weight.dtype} codes, and the integer kernel takes 8 bits"
    if _is_blocked(site.dequantize):
        return "its weight has blocked scales, which the integer kernel does not take, so its activation stays float"
    weight_scale = site.dequantize.inputs[1]
    if constant(weight_scale) is None:
        return "the scales of its weight are computed, and the integer kernel's are constants"
    axis = site.dequantize.attributes.get_int("axis", 1)
    if array(weight_scale).size > 1 and axis % 2 != site.channel_axis:  # type: ignore[arg-type]
        return "its weight has scales along the inputs, and the integer kernel takes one for each output channel"
    return None


def _is_blocked(dequantize: ir.Node) -> bool:
    return dequantize.attributes.get_int("block_size", 0) > 0


def _read_float(site: Linear, pair: tuple[ir.Node, ir.Node]) -> None:
    """Take the pair away from the layer: ONNX Runtime would fuse it with blocked scales into a kernel that fails."""
    quantize, dequantize = pair
    site.node.replace_input_with(0, quantize.inputs[0])
    remove_node_if_unused(dequantize)


class _Shared:
    """What several layers have in common and gets made once: quantized activations, weights in the kernel's layout."""

    def __init__(self, names: Names, pass_name: str) -> None:
        self.names, self.pass_name = names, pass_name
        self._activations: dict[ir.Node, tuple[ir.Value, ir.Value, ir.Value]] = {}
        self._weights: dict[tuple[ir.Value, bool], ir.Value] = {}

    def activation(self, quantize: ir.Node) -> tuple[ir.Value, ir.Value, ir.Value]:
        """(codes, scale, zero point) of a QuantizeLinear as the kernel takes them: unsigned codes, float32 scale."""
        if quantize not in self._activations:
            codes, scale, zero_point = quantize.outputs[0], quantize.inputs[1], _zero_point(quantize)
            graph, base = node_graph(quantize), str(codes.name)
            assert scale is not None
            single = array(scale).reshape(()).astype(np.float32)
            if scale.dtype == ir.DataType.FLOAT and array(scale).ndim == 0:
                float_scale = scale
            else:
                float_scale = add_constant(graph, self.names.fresh(f"{scale.name}.float"), single)
            unsigned = add_constant(graph, self.names.fresh(f"{base}.zero_point"), _unsigned(zero_point.reshape(())))
            if codes.dtype == ir.DataType.INT8:
                again = new_node(
                    "QuantizeLinear", [quantize.inputs[0], scale, unsigned], self.names.fresh(f"{base}.unsigned"),
                    dtype=ir.DataType.UINT8, shape=codes.shape,
                )  # fmt: skip
                inherit([again], quantize, self.pass_name)
                insert_before(quantize, [again])
                codes = again.outputs[0]
            self._activations[quantize] = codes, float_scale, unsigned
        return self._activations[quantize]

    def weight(self, site: Linear) -> ir.Value:
        """The codes as [K, N]; int8 where the kernel cannot saturate on them, else uint8."""
        key = site.weight, site.transposed  # two layers can read one square constant in both directions
        if key not in self._weights:
            graph, base = node_graph(site.node), str(site.weight.name)
            codes, tensor = site.weight, constant(site.weight)
            assert tensor is not None
            axis = site.channel_axis
            shift = codes.dtype == ir.DataType.INT8 and not read(tensor, lambda data: is_saturation_safe(data, axis))
            turn_now = site.transposed and len(codes.uses()) == 1
            dtype = ir.DataType.UINT8 if shift else tensor.dtype
            if turn_now or shift:

                def arrange(data: np.ndarray) -> np.ndarray:
                    shifted = _unsigned(data) if shift else data
                    return np.ascontiguousarray(shifted.T) if turn_now else shifted

                rows, columns = (int(size) for size in tensor.shape.numpy())
                shape = (columns, rows) if turn_now else (rows, columns)
                name = self.names.fresh(f"{base}.unsigned" if shift else f"{base}.transposed")
                codes = add_constant(graph, name, derived(tensor, arrange, dtype, shape, name))
            if site.transposed and not turn_now:
                turn = new_node(
                    "Transpose", [codes], self.names.fresh(f"{base}.as_k_n"), attributes={"perm": [1, 0]},
                    dtype=dtype, shape=ir.Shape((site.in_features, site.out_features)),
                )  # fmt: skip
                inherit([turn], site.node, self.pass_name)
                insert_before(site.dequantize or site.node, [turn])
                codes = turn.outputs[0]
            self._weights[key] = codes
        return self._weights[key]


def _lower(site: Linear, pair: tuple[ir.Node, ir.Node], shared: _Shared, names: Names, pass_name: str) -> None:
    assert site.dequantize is not None
    graph, base = node_graph(site.node), site.name
    codes, scale, zero_point = shared.activation(pair[0])
    weight = shared.weight(site)
    weight_scale = site.dequantize.inputs[1]
    assert weight_scale is not None
    scales = add_constant(
        graph, names.fresh(f"{base}.weight_scale"), array(weight_scale).astype(np.float32).reshape(-1)
    )
    middle = _zero_point(site.dequantize).reshape(-1)
    middle = _unsigned(middle) if weight.dtype == ir.DataType.UINT8 else middle
    uniform = middle[:1].reshape(()) if np.all(middle == middle[0]) else middle
    weight_zero_point = add_constant(graph, names.fresh(f"{base}.weight_zero_point"), uniform)
    inputs: list[ir.Value | None] = [codes, weight, scale, scales, zero_point, weight_zero_point]
    if site.bias is not None:
        bias = array(site.bias).astype(np.float32).reshape(-1)
        inputs.append(add_constant(graph, names.fresh(f"{base}.bias"), bias))

    output = site.output
    # Shape inference stops at operators of ONNX Runtime, so the output's type may be unknown; the weight's is not.
    dtype = site.dequantize.outputs[0].dtype or weight_scale.dtype
    kernel = new_node(
        KERNEL, inputs, names.fresh(f"{base}.int8"), domain="com.microsoft", dtype=ir.DataType.FLOAT, shape=output.shape
    )
    new, result = [kernel], kernel.outputs[0]
    if dtype is not None and dtype != ir.DataType.FLOAT:
        cast = new_node("Cast", [result], names.fresh(f"{base}.cast"), dtype=dtype, shape=output.shape,
                        attributes={"to": int(dtype)})  # fmt: skip
        new, result = [kernel, cast], cast.outputs[0]
    inherit(new, site.node, pass_name)
    last = site.bias_node or site.node
    insert_before(last, new)
    replace_output(last, result)
    kernel.name = site.name


def _zero_point(node: ir.Node) -> np.ndarray:
    """The zero point of a Quantize- or DequantizeLinear in the codes' own type; 0 where it is left out."""
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        return array(node.inputs[2])
    codes = node.outputs[0] if node.op_type == "QuantizeLinear" else node.inputs[0]
    assert codes is not None
    assert codes.dtype is not None
    return np.zeros((), codes.dtype.numpy())


def _unsigned(codes: np.ndarray) -> np.ndarray:
    return codes if codes.dtype == np.uint8 else (codes.astype(np.int16) + 128).astype(np.uint8)
