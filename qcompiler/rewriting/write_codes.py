"""A quantized constant in the graph: codes, scales, zero points, and the nodes that read them in standard ONNX."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qcompiler.formats.arithmetic import Quantized, quantize
from qcompiler.formats.scheme import FORMATS
from qcompiler.functions.binary import DEQUANTIZE, packed_signs
from qcompiler.functions.library import DOMAIN
from qcompiler.graph.edit import (
    add_constant,
    constant,
    insert_before,
    node_graph,
    remove_node_if_unused,
    replace_output,
)
from qcompiler.graph.lazy import derived
from qcompiler.graph.metadata import BITS
from qcompiler.graph.rewriter import Rewriter
from qcompiler.sites.find import Convolution, Embedding, Linear

INT2_OPSET = 25


def storage(format: str, opset: int) -> ir.DataType:
    """The ONNX type that holds the codes of a format: 3 bits always live in 4, and 2 bits do before opset 25."""
    name = FORMATS[format].storage
    return ir.DataType[name.replace("2", "4") if name.endswith("INT2") and opset < INT2_OPSET else name]


def lazy_codes(tensor: ir.TensorProtocol, quantized: Quantized, dtype: ir.DataType, name: str) -> ir.TensorProtocol:
    """The float constant rounded to the nearest codes, computed when they are written: they never stay in memory."""
    scale, zero_point = quantized.scale, quantized.zero_point
    format, axis, block_size = quantized.format, quantized.axis, quantized.block_size  # the lambda keeps no codes
    return derived(
        tensor, lambda data: quantize(data, scale, zero_point, format, axis, block_size), dtype,
        tuple(int(size) for size in tensor.shape.numpy()), name,
    )  # fmt: skip


def packed_codes(quantized: Quantized, dtype: ir.DataType, name: str) -> ir.TensorProtocol:
    """Codes that cannot be told from the float constant, in memory in as many bits as the file gives them."""
    codes = np.ascontiguousarray(quantized.codes)
    plain = ir.Tensor(codes, dtype=dtype, shape=ir.Shape(codes.shape), name=name)
    if dtype.bitwidth >= 8:
        return plain
    packed = np.frombuffer(plain.tobytes(), np.uint8)
    return ir.PackedTensor(packed, dtype=dtype, shape=ir.Shape(codes.shape), name=name)


class Codes:
    """The quantized constant in the graph: codes (computed when written), scale, zero point, one DequantizeLinear."""

    def __init__(
        self, weight: ir.Value, codes: ir.TensorProtocol, quantized: Quantized, graph: ir.Graph, rw: Rewriter
    ) -> None:
        """`codes` is `lazy_codes` or `packed_codes` of `quantized`, whose scales and zero points are stored here."""
        float_weight = constant(weight)
        assert float_weight is not None  # recognisers only report constants
        self.dtype, self.axis, self.block_size = float_weight.dtype, quantized.axis, quantized.block_size
        self.base, self.bits = str(weight.name), FORMATS[quantized.format].bits
        self.codes = rw.constant(f"{self.base}.codes", codes, graph)
        self.scale = rw.constant(f"{self.base}.scale", quantized.scale, graph)
        self.zero_point: ir.Value | None = None
        if quantized.zero_point is not None:
            points = np.ascontiguousarray(quantized.zero_point)
            stored = ir.Tensor(points, dtype=codes.dtype, shape=ir.Shape(points.shape))
            self.zero_point = rw.constant(f"{self.base}.zero_point", stored, graph)
        self._dequantized: ir.Value | None = None
        self._transposed: ir.Value | None = None

    def dequantize_for(self, site: Linear | Convolution, rw: Rewriter) -> None:
        """Let the layer read the dequantized constant; the first layer in graph order brings the node."""
        if self._dequantized is None:
            settings: dict[str, object] = {"axis": self.axis, "block_size": self.block_size}
            node = rw.node(
                "DequantizeLinear",
                [self.codes, self.scale, *([self.zero_point] if self.zero_point is not None else [])],
                f"{self.base}.dequantized", dtype=self.dtype, shape=self.codes.shape,
                attributes={key: value for key, value in settings.items() if value is not None},
            )  # fmt: skip
            rw.inherit([node], site.node)
            if self.bits < self.codes.dtype.bitwidth:  # type: ignore[union-attr]
                node.metadata_props[BITS] = str(self.bits)
            insert_before(site.node, [node])
            self._dequantized = node.outputs[0]
        transpose = site.transpose if isinstance(site, Linear) else None
        source = self._dequantized if transpose is None else self._transposed_for(site, transpose, rw)
        site.node.replace_input_with(1, source)
        rw.mark(site.node)
        if transpose is not None and transpose.graph is not None:
            remove_node_if_unused(transpose)

    def _transposed_for(self, site: Linear | Convolution, old: ir.Node, rw: Rewriter) -> ir.Value:
        """A Transpose of its own: excluded layers may read the old one, and it may stand before all of the layers."""
        if self._transposed is None:
            turned = rw.node("Transpose", [self._dequantized], f"{self.base}.dequantized.transposed",
                             like=old.outputs[0], attributes={"perm": [1, 0]})  # fmt: skip
            rw.inherit([turned], old)
            insert_before(site.node, [turned])
            self._transposed = turned.outputs[0]
        return self._transposed

    def gather_for(self, site: Embedding, rw: Rewriter) -> None:
        """Gather(table, ids) becomes (Gather(codes, ids) - Gather(zero points, ids)) * Gather(scales, ids)."""
        gather, rows = site.node, site.output
        base = site.name

        def of_row(vector: ir.Value, kind: str) -> list[ir.Node]:
            picked = rw.node("Gather", [vector, site.ids], f"{base}.{kind}", dtype=vector.dtype, shape=site.ids.shape)
            wide = rw.node("Unsqueeze", [picked.outputs[0], last], f"{base}.{kind}.column", dtype=vector.dtype)
            return [picked, wide]

        def as_float(value: ir.Value, kind: str) -> ir.Node:
            return rw.node("Cast", [value], f"{base}.{kind}.float", dtype=self.dtype, shape=value.shape,
                           attributes={"to": int(self.dtype)})  # fmt: skip

        last = rw.constant(f"{base}.last_axis", np.array([-1], np.int64), node_graph(gather))
        new: list[ir.Node] = []
        if site.transpose is not None:
            turned = rw.node("Transpose", [self.codes], f"{base}.codes.transposed",
                             dtype=self.codes.dtype, attributes={"perm": [1, 0]})  # fmt: skip
            new.append(turned)
        codes = new[0].outputs[0] if new else self.codes
        picked = rw.node("Gather", [codes, site.ids], f"{base}.codes", dtype=self.codes.dtype, shape=rows.shape)
        result = as_float(picked.outputs[0], "codes")
        new += [picked, result]
        if self.zero_point is not None:
            columns = of_row(self.zero_point, "zero_point")
            middle = as_float(columns[-1].outputs[0], "zero_point")
            shifted = rw.node("Sub", [result.outputs[0], middle.outputs[0]], f"{base}.centred", like=rows)
            new += [*columns, middle, shifted]
            result = shifted
        columns = of_row(self.scale, "scale")
        scaled = rw.node("Mul", [result.outputs[0], columns[-1].outputs[0]], f"{base}.dequantized", like=rows)
        new += [*columns, scaled]
        rw.insert_before(gather, new)
        replace_output(gather, scaled.outputs[0])


class BinaryCodes:
    """A constant of signs in the graph: bits [N, ⌈K / 8⌉] (computed when written), scales, one DequantizeBinary.

    The model must have that function.
    """

    def __init__(self, site: Linear, quantized: Quantized, rw: Rewriter) -> None:
        """`site` is the first layer in graph order that reads the constant."""
        weight = constant(site.weight)
        assert weight is not None  # recognisers only report constants
        self.dtype = weight.dtype
        # The codes of a tied weight carry the layer's name: recognisers take a layer's path from its weight's name.
        self.base = str(site.weight.name if site.transpose is None else site.name)
        graph, name = node_graph(site.node), rw.fresh(f"{self.base}.codes")
        self.codes = add_constant(graph, name, packed_signs(weight, site.channel_axis, name))
        scale = quantized.scale if quantized.block_size is None or site.channel_axis == 0 else quantized.scale.T
        self.scale = rw.constant(f"{self.base}.scale", scale, graph)
        self.block_size = quantized.block_size or site.in_features
        self._dequantized: ir.Value | None = None
        self._transposed: ir.Value | None = None

    def dequantize_for(self, site: Linear, rw: Rewriter) -> None:
        """Let the layer read the dequantized constant [N, K], through a Transpose where it multiplies by [K, N]."""
        if self._dequantized is None:
            shape = ir.Shape((site.out_features, site.in_features))
            node = rw.node(
                DEQUANTIZE, [self.codes, self.scale], f"{self.base}.dequantized", domain=DOMAIN,
                dtype=self.dtype, shape=shape, attributes={
                    "in_features": site.in_features, "block_size": self.block_size, "output_dtype": int(self.dtype),
                },
            )  # fmt: skip
            rw.insert_before(site.node, [node])
            self._dequantized = node.outputs[0]
        source = self._dequantized
        if not site.node.attributes.get_int("transB", 0):
            source = self._transposed = self._transposed or self._transposed_for(site, source, rw)
        site.node.replace_input_with(1, source)
        rw.mark(site.node)
        if site.transpose is not None and site.transpose.graph is not None:
            remove_node_if_unused(site.transpose)

    def _transposed_for(self, site: Linear, dequantized: ir.Value, rw: Rewriter) -> ir.Value:
        shape = ir.Shape((site.in_features, site.out_features))
        turned = rw.node("Transpose", [dequantized], f"{dequantized.name}.transposed", like=dequantized,
                         shape=shape, attributes={"perm": [1, 0]})  # fmt: skip
        rw.insert_before(site.node, [turned])
        return turned.outputs[0]
