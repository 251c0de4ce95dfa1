"""Multiplies float8 weights as they are stored, on ONNX Runtime's CUDA provider.

**Before**  y = x · DequantizeLinear(W_q, s)    **After**  y = MatMulBlockQuantizedFp8Weight(x, W_q, s)

The operator takes E4M3 weights [N, K] with a float32 scale for each row, or for each block of a row, and activations of
16 bits. Up to 8 tokens a kernel of its own reads the codes; from 9 on they are dequantized on every run, and a product
in 16 bits follows. Float8 activations stay rounded, by the nodes that rounded them: that keeps the numbers, and wins
nothing. A bias stays an Add.

``gemm`` takes GemmFloat8 where activation and weight have one scale each, which is the only product of float8 by float8
that the provider has. Each call waits for the device and allocates memory, it cannot be captured in a CUDA graph, and
it has not been run on a GPU yet, so it is not taken unasked.

Skipped: models in float32 (but for GemmFloat8), E5M2 weights, scales that are computed or run along the inputs. These
layers stay in standard operators, which dequantize the whole weight on every run.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import onnx_ir as ir
from pydantic.dataclasses import dataclass as options

from qcompiler.functions.library import remove_unused_functions
from qcompiler.functions.per_token import QUANTIZE_FLOAT8, is_token_function
from qcompiler.graph.edit import (
    add_constant,
    array,
    constant,
    new_node,
    node_graph,
    remove_unused_constant,
    replace_output,
)
from qcompiler.graph.flatten import rows_of
from qcompiler.graph.lazy import derived
from qcompiler.graph.rewriter import Rewriter
from qcompiler.rewriting.contract import OPTIONS, Changed, Changes, Kind, Pass, Skipped
from qcompiler.sites.activations import Float
from qcompiler.sites.analyses import quantized_linears_of
from qcompiler.sites.find import Linear
from qcompiler.statistics import StatisticsStore
from qcompiler.targets.conditions import CODES, Call, Operand, obstacles

WEIGHT_ONLY = "MatMulBlockQuantizedFp8Weight"
GEMM = "GemmFloat8"
E4M3, E5M2 = ir.DataType.FLOAT8E4M3FN, ir.DataType.FLOAT8E5M2
FLOAT8 = (E4M3, E5M2)
HALF = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


@options(frozen=True, config=OPTIONS)
class LowerFp8(Pass):
    name: ClassVar[str] = "lower-fp8"
    kind: ClassVar[Kind] = "lowering"

    gemm: bool = False
    """Multiply float8 by float8 (GemmFloat8) where activation and weight have one scale each."""

    def apply(self, model: ir.Model, statistics: StatisticsStore) -> Changes:
        changes, rw = Changes(), Rewriter(model, self.name)
        model.graph.opset_imports.setdefault("com.microsoft", 1)
        stored: dict[tuple[ir.Value, bool], ir.Value] = {}
        for site in self.selected(quantized_linears_of(model)):
            if site.dequantize is None or site.weight.dtype not in FLOAT8:
                continue  # float layers and integers are other passes' business
            quantize = _quantizes_input(site)
            against = _gemm_obstacle(site, quantize) if self.gemm and quantize is not None else ""
            if self.gemm and quantize is not None and against is None:
                _multiply_codes(site, quantize, _rows(site, stored, rw), rw)
                changes.changed.append(Changed(site.name, kernel=GEMM))
                continue
            obstacle = _obstacle(site)
            if obstacle is not None:
                changes.skipped.append(Skipped(site.name, obstacle))
                continue
            details = [_multiply_weight(site, _rows(site, stored, rw), rw)]
            if quantize is not None:
                details.append("the activation rounded by nodes of its own")
            if against:
                details.append(f"not {GEMM}: {against}")
            changes.changed.append(Changed(site.name, kernel=WEIGHT_ONLY, detail="; ".join(filter(None, details))))
        remove_unused_functions(model)
        return changes


# ------------------------------------------------------------------------------------------------- what can be lowered


def _quantizes_input(site: Linear) -> ir.Node | None:
    """The node that makes the float8 codes whose dequantized form the layer reads; None where its input is float."""
    activation = site.activation
    if isinstance(activation, Float) or activation.quantize is None:
        return None
    return activation.quantize if activation.quantize.outputs[0].dtype in FLOAT8 else None


def _dtype(site: Linear) -> ir.DataType:
    """What the model computes the layer in; float32 where nothing says so."""
    assert site.dequantize is not None
    return site.dequantize.outputs[0].dtype or ir.DataType.FLOAT


def _scale_obstacle(site: Linear) -> str | None:
    node = site.dequantize
    assert node is not None
    scale = constant(node.inputs[1])
    if scale is None:
        return "the scales of its weight are computed, and the operator's are constants"
    along_inputs = node.attributes.get_int("axis", 1) % 2 != site.channel_axis
    if scale.size > 1 and along_inputs != (node.attributes.get_int("block_size", 0) > 0):
        return "its weight has scales along the inputs, and the operator takes one for each output or block of inputs"
    return None


def _obstacle(site: Linear) -> str | None:
    """Why the weight-only operator cannot take the layer."""
    if site.weight.dtype != E4M3:
        return f"its weight is {site.weight.dtype}, and the operator takes {E4M3}"
    if _dtype(site) not in HALF:
        return f"the model computes in {_dtype(site).name.lower()}, and the operator in 16 bits: export it in float16"
    return _scale_obstacle(site)


def _gemm_obstacle(site: Linear, quantize: ir.Node) -> str | None:
    """Why the product of float8 by float8 cannot take the layer."""
    node = site.dequantize
    assert node is not None
    scales = constant(node.inputs[1])
    if is_token_function(quantize, QUANTIZE_FLOAT8):
        return "its activation has a scale for each token"
    if not quantize.domain and (constant(quantize.inputs[1]) is None or array(quantize.inputs[1]).size != 1):  # type: ignore[arg-type]
        return "its activation has no constant scale for the whole tensor"
    if scales is None or scales.size != 1:
        return "its weight has more than one scale"
    if E4M3 not in (site.weight.dtype, quantize.outputs[0].dtype):
        return f"both sides are {E5M2}, which cuBLAS does not multiply"
    if _dtype(site) == ir.DataType.BFLOAT16:
        return "its result would be bfloat16, for which the operator asks cuBLAS for a product that it does not have"
    if obstacles("fp8-product", Call(inputs=[Operand(), _stored(site)])):
        return f"K = {site.in_features} and N = {site.out_features} are not both multiples of {CODES}"
    return None


# ------------------------------------------------------------------------------------------------- in a layer's place


def _stored(site: Linear) -> Operand:
    """The weight as both operators read it."""
    return Operand(shape=(site.out_features, site.in_features))


def _rows(site: Linear, stored: dict[tuple[ir.Value, bool], ir.Value], rw: Rewriter) -> ir.Value:
    """The codes as [N, K]: the constant itself, or a transposed one, once for all layers that read it so."""
    key = site.weight, site.transposed
    if key not in stored:
        codes, tensor = site.weight, constant(site.weight)
        assert tensor is not None
        if not site.transposed:
            name = rw.fresh(f"{codes.name}.transposed")
            turned = derived(tensor, lambda data: np.ascontiguousarray(data.T), tensor.dtype,
                             (site.out_features, site.in_features), name)  # fmt: skip
            codes = add_constant(node_graph(site.node), name, turned)
        stored[key] = codes
    return stored[key]


def _multiply_weight(site: Linear, codes: ir.Value, rw: Rewriter) -> str:
    """The weight-only operator in the layer's place; what is worth a line in the report."""
    node, graph, source = site.dequantize, node_graph(site.node), site.node.inputs[0]
    assert node is not None
    assert node.inputs[1] is not None
    block, scales = node.attributes.get_int("block_size", 0), array(node.inputs[1]).astype(np.float32)
    if not block:
        block, scales = site.in_features, np.broadcast_to(scales.reshape(-1, 1), (site.out_features, 1))
    elif not site.transposed:
        scales = scales.T
    scale = rw.constant(f"{site.name}.weight_scale", np.ascontiguousarray(scales), graph)
    kernel = rw.node(
        WEIGHT_ONLY, [source, codes, scale], f"{site.name}.fp8", domain="com.microsoft",
        dtype=_dtype(site), shape=site.node.outputs[0].shape, attributes={"block_size": block},
    )  # fmt: skip
    _replace(site, [kernel], kernel, rw)
    if obstacles("fp8-codes", Call({"block_size": block}, [Operand(), _stored(site)])):
        sizes = f"K = {site.in_features} and blocks of {block}"
        return f"dequantized on every run: {sizes} are not both multiples of {CODES}"
    return "dequantized from 9 tokens on"


def _multiply_codes(site: Linear, quantize: ir.Node, codes: ir.Value, rw: Rewriter) -> None:
    """The product of float8 by float8 in the layer's place, on rows [M, K]."""
    graph, base, dequantize = node_graph(site.node), site.name, site.dequantize
    assert dequantize is not None
    rows = rows_of(quantize.outputs[0], site.in_features, graph, rw)
    scale = quantize.outputs[1] if quantize.domain else _single(quantize.inputs[1], f"{base}.scale", graph, rw)
    weight_scale = _single(dequantize.inputs[1], f"{base}.weight_scale", graph, rw)
    kernel = rw.node(
        GEMM, [rows.matrix, codes, None, scale, weight_scale], f"{base}.fp8", domain="com.microsoft",
        dtype=_dtype(site), shape=ir.Shape((None, site.out_features)),
        attributes={"transB": 1, "dtype": int(_dtype(site))},
    )  # fmt: skip
    shaped = rows.restore(kernel.outputs[0], site.node.outputs[0], site.out_features, graph, rw)
    _replace(site, [*rows.nodes, kernel, *shaped], kernel, rw)


def _single(scale: ir.Value | None, name: str, graph: ir.Graph, rw: Rewriter) -> ir.Value:
    assert scale is not None
    return rw.constant(name, array(scale).astype(np.float32).reshape(()), graph)


def _replace(site: Linear, new: list[ir.Node], kernel: ir.Node, rw: Rewriter) -> None:
    """Put nodes, the last of which gives the product, in the place of the layer; `kernel` gets its name."""
    product, weight = site.node.outputs[0], site.weight
    if site.bias is not None and site.bias_node is None:  # Gemm's own bias
        name = rw.fresh(f"{site.name}.bias_added")
        new.append(new_node("Add", [new[-1].outputs[0], site.bias], name, dtype=_dtype(site)))
    new[-1].outputs[0].shape = product.shape
    rw.insert_before(site.node, new)
    replace_output(site.node, new[-1].outputs[0])
    remove_unused_constant(weight)
    kernel.name = site.name
