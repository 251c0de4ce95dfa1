"""Weights as ONNX Runtime's 8-bit kernels on CPUs take them, and the kernel in the place of a layer.

    reason = weight_obstacle(site)             why the kernels cannot take the weight; None where they can
    weights = IntegerWeights(rw)
    weights.codes(site)                        [K, N], int8 or uint8; once for all layers that share the constant
    weights.scales(site), weights.zero_point(site, codes)

Codes stay int8 where no two neighbours add up to more than 128: the uint8 × int8 kernel is the fastest, and on x86
CPUs without VNNI it adds pairs of products in 16 bits, which then cannot saturate. Other int8 codes are shifted to
uint8 with zero point 128, whose kernel is exact everywhere and slower. Codes of fewer bits stay so in the file: a Cast
makes them int8 (and a function unpacks binary ones) when the session is made, as ONNX Runtime folds constants.

A weight stored [N, K] for one layer alone is stored transposed; one that another layer or an embedding shares keeps its
layout, and is turned when the session is made.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from qcompiler.formats.saturation import is_saturation_safe
from qcompiler.functions.binary import channel_scales, int8_codes, is_binary
from qcompiler.functions.library import DOMAIN
from qcompiler.graph.edit import (
    add_constant,
    array,
    constant,
    insert_before,
    new_node,
    node_graph,
    replace_output,
)
from qcompiler.graph.lazy import derived, read
from qcompiler.graph.rewriter import Rewriter
from qcompiler.sites.find import Linear

EIGHT_BITS = (ir.DataType.INT8, ir.DataType.UINT8)
CAST = (ir.DataType.INT4, ir.DataType.UINT4, ir.DataType.INT2, ir.DataType.UINT2)
"""Types of codes that are cast to int8: no two of them add up to more than 128."""


def weight_obstacle(site: Linear) -> str | None:
    """Why an 8-bit kernel cannot take the layer's quantized weight, one clause; None where it can."""
    node = site.dequantize
    assert node is not None
    if is_binary(node):
        return None if channel_scales(node) is not None else "its weight has no constant scale for each output channel"
    if node.domain == DOMAIN or site.weight.dtype not in (*EIGHT_BITS, *CAST):
        kind = node.op_type if node.domain == DOMAIN else site.weight.dtype
        return f"its weight has {kind} codes, and the integer kernel takes integers of 8 bits or fewer"
    if is_blocked(site):
        return "its weight has blocked scales, which the integer kernel does not take"
    scale = constant(node.inputs[1])
    if scale is None:
        return "the scales of its weight are computed, and the integer kernel's are constants"
    axis = node.attributes.get_int("axis", 1)
    if scale.size > 1 and axis % 2 != site.channel_axis:
        return "its weight has scales along the inputs, and the integer kernel takes one for each output channel"
    return None


FLOAT_INPUT = "so its activation stays float"
"""How a lowering's reason ends that left the activation of a layer with blocked scales in float."""


def is_blocked(site: Linear) -> bool:
    """Whether groups of a channel's weights have scales of their own."""
    node = site.dequantize
    if node is None:
        return False
    if is_binary(node):
        return channel_scales(node) is None
    return node.attributes.get_int("block_size", 0) > 0


class IntegerWeights:
    """Makes the codes of each constant in the kernel's layout, once for all layers that share it."""

    def __init__(self, rw: Rewriter, *, signed: bool = False) -> None:
        """`signed`: codes of 8 bits are int8 in any case, for kernels that take nothing else."""
        self._rw, self._signed = rw, signed
        self._codes: dict[tuple[ir.Value, bool], ir.Value] = {}

    def codes(self, site: Linear) -> ir.Value:
        """int8 or uint8 [K, N]; `weight_obstacle` found nothing."""
        key = site.weight, site.transposed  # two layers can read one square constant in both directions
        if key not in self._codes:
            assert site.dequantize is not None
            if is_binary(site.dequantize):
                self._codes[key] = int8_codes(site.dequantize, self._rw)
            else:
                self._codes[key] = self._arranged(site)
        return self._codes[key]

    def scales(self, site: Linear) -> ir.Value:
        """float32, [N] or [1]."""
        node = site.dequantize
        assert node is not None
        assert node.inputs[1] is not None
        data = array(node.inputs[1]).astype(np.float32).reshape(-1)
        return self._rw.constant(f"{site.name}.weight_scale", data, node_graph(site.node))

    def zero_point(self, site: Linear, codes: ir.Value) -> ir.Value:
        """In the type of `codes`, as the kernel takes them: [] where all are equal, else [N]."""
        assert site.dequantize is not None
        middle = np.zeros(1, np.int8) if is_binary(site.dequantize) else zero_point(site.dequantize).reshape(-1)
        if codes.dtype == ir.DataType.UINT8:
            middle = unsigned(middle)
        elif middle.dtype == np.uint8:
            middle = signed(middle)
        middle = middle.astype(np.uint8 if codes.dtype == ir.DataType.UINT8 else np.int8)
        uniform = middle[:1].reshape(()) if np.all(middle == middle[0]) else middle
        return self._rw.constant(f"{site.name}.weight_zero_point", uniform, node_graph(site.node))

    def _arranged(self, site: Linear) -> ir.Value:
        graph, base = node_graph(site.node), str(site.weight.name)
        codes, tensor, axis = site.weight, constant(site.weight), site.channel_axis
        assert tensor is not None
        if self._signed:
            shift, change, kind = codes.dtype == ir.DataType.UINT8, signed, ir.DataType.INT8
        else:
            unsafe = codes.dtype == ir.DataType.INT8 and not read(tensor, lambda data: is_saturation_safe(data, axis))
            shift, change, kind = unsafe, unsigned, ir.DataType.UINT8
        turn_now = site.transposed and len(codes.uses()) == 1
        if turn_now or shift:

            def arrange(data: np.ndarray) -> np.ndarray:
                shifted = change(data) if shift else data
                return np.ascontiguousarray(shifted.T) if turn_now else shifted

            rows, columns = (int(size) for size in tensor.shape.numpy())
            shape = (columns, rows) if turn_now else (rows, columns)
            name = self._rw.fresh(f"{base}.{change.__name__ if shift else 'transposed'}")
            dtype = kind if shift else tensor.dtype
            codes = add_constant(graph, name, derived(tensor, arrange, dtype, shape, name))
        new: list[ir.Node] = []
        if codes.dtype in CAST:  # before the Transpose, which few runtimes have for fewer than 8 bits
            new.append(_cast(codes, ir.DataType.INT8, self._rw.fresh(f"{base}.int8")))
            codes = new[-1].outputs[0]
        if site.transposed and not turn_now:
            new.append(self._rw.node(
                "Transpose", [codes], f"{base}.as_k_n", attributes={"perm": [1, 0]},
                dtype=codes.dtype, shape=ir.Shape((site.in_features, site.out_features)),
            ))  # fmt: skip
            codes = new[-1].outputs[0]
        if new:
            self._rw.inherit(new, site.node)
            insert_before(site.dequantize or site.node, new)
        return codes


def put_kernel(site: Linear, op_type: str, inputs: Sequence[ir.Value | None], rw: Rewriter, *, with_bias: bool) -> None:
    """Replace the layer by an operator of ONNX Runtime that gives float32; it gets the layer's name.

    `with_bias`: the bias is the operator's next input; else it stays an Add. In half precision a Cast comes behind.
    """
    assert site.dequantize is not None
    graph, base = node_graph(site.node), site.name
    absorbed = with_bias and site.bias is not None
    last = site.bias_node if absorbed and site.bias_node is not None else site.node
    if absorbed:
        assert site.bias is not None
        bias = array(site.bias).astype(np.float32).reshape(-1)
        inputs = [*inputs, rw.constant(f"{base}.bias", bias, graph)]
    output = last.outputs[0]
    # Shape inference stops at operators of ONNX Runtime, so the output's type may be unknown; the weight's is not.
    scale = site.dequantize.inputs[1]
    dtype = site.dequantize.outputs[0].dtype or (scale.dtype if scale is not None else None)
    kernel = rw.node(op_type, inputs, f"{base}.int8", domain="com.microsoft",
                     dtype=ir.DataType.FLOAT, shape=output.shape)  # fmt: skip
    new, result = [kernel], kernel.outputs[0]
    if dtype is not None and dtype != ir.DataType.FLOAT:
        new.append(_cast(result, dtype, rw.fresh(f"{base}.cast")))
        result = new[-1].outputs[0]
    if site.bias is not None and site.bias_node is None and not absorbed:  # Gemm's own bias
        new.append(rw.node("Add", [result, site.bias], f"{base}.bias_added", like=output))
        result = new[-1].outputs[0]
    rw.inherit(new, site.node)
    insert_before(last, new)
    replace_output(last, result)
    kernel.name = site.name


def zero_point(node: ir.Node) -> np.ndarray:
    """The zero point of a Quantize- or DequantizeLinear in the codes' own type; 0 where it is left out."""
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        return array(node.inputs[2])
    codes = node.outputs[0] if node.op_type == "QuantizeLinear" else node.inputs[0]
    assert codes is not None
    assert codes.dtype is not None
    return np.zeros((), codes.dtype.numpy())


def unsigned(codes: np.ndarray) -> np.ndarray:
    """int8 codes or zero points moved up by 128 to uint8; unsigned ones as they are."""
    return codes if codes.dtype == np.uint8 else (codes.astype(np.int16) + 128).astype(np.uint8)


def signed(codes: np.ndarray) -> np.ndarray:
    """uint8 codes or zero points moved down by 128 to int8; signed ones as they are."""
    return codes if codes.dtype == np.int8 else (codes.astype(np.int16) - 128).astype(np.int8)


def _cast(value: ir.Value, to: ir.DataType, name: str) -> ir.Node:
    return new_node("Cast", [value], name, dtype=to, shape=value.shape, attributes={"to": int(to)})
