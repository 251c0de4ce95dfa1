"""Runs weight-only quantized linear layers as ONNX Runtime's MatMulNBits, which reads the codes as they are stored.

**Before**  y = x · DequantizeLinear(Q_w, s, z)          **After**  y = MatMulNBits(x, Q_w, s, z)

The operator takes unsigned codes of 2, 4 or 8 bits [N, K / block, block · bits / 8] with a scale, and where not all are
the middle a zero point, for each block. Codes of 3 bits live in 4. Without the operator ONNX Runtime would dequantize
the whole weight on every run. A bias stays an Add.

Blocks are the groups of the codes where these are 16, 32, 64, 128 or 256 wide, else the widest of these that divides a
group; the scale is repeated. The scale of an output channel (or tensor) goes into blocks of ``block_size``, or narrower
ones where that stores fewer bytes (64 for 192 input features, which two of 128 would pad).

Embeddings that gather from a weight (tied embeddings) gather from the operator's array, which is stored once: they
become GatherBlockQuantized here.

Binary weights become 2-bit codes, 1 and 3 about the zero point 2: the operator knows no single bits.

Weights in NF4 and FP4 become MatMulBnb4, which ONNX Runtime has for compatibility: on CPUs it is slower than float.

``fused_kernel`` is for CUDA, whose fast kernel takes 16-bit models without zero points in blocks of 32 (64 for 2 bits):
these are chosen wherever the kernel would take the layer, and the report says of each other layer why it would not.

``half_precision`` lets the operator compute in the model's own type. Without it, layers in half precision run in
float32 between two Casts, as the CPU kernel would do inside: given half precision scales, ONNX Runtime 1.32 turns them
by a Cast of its own where the nodes around run in float32, and below the full optimization level the kernel then misses
the scales and writes garbage without a word.

Layers whose activations are quantized dynamically and whose scales are blocked (W4A8 in groups) read the float
activation again, as no integer kernel takes both: with ``accuracy_level`` 4 the operator rounds it to 8 bits itself.

``accuracy_level`` 4 lets the CPU kernel round the activation to 8 bits block by block, which is what makes it fast; 0
keeps the activation in float.

Skipped: groups that are no multiple of 16 (NF4, FP4: no power of two), and scales that are computed or lie along the
inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir
from pydantic.dataclasses import dataclass as options

from qcompiler.formats.scheme import FORMATS, Scheme
from qcompiler.functions.binary import FORMAT as BINARY
from qcompiler.functions.binary import is_binary
from qcompiler.functions.library import block_scales, codebook_format, remove_unused_functions
from qcompiler.graph.edit import (
    add_constant,
    constant,
    new_node,
    node_graph,
    remove_unused_constant,
    replace_output,
)
from qcompiler.graph.metadata import BITS
from qcompiler.graph.operators import has
from qcompiler.graph.rewriter import Rewriter
from qcompiler.lowering import bnb4
from qcompiler.lowering.block_gather import KERNEL as GATHER
from qcompiler.lowering.block_gather import gather_from_packed
from qcompiler.lowering.integer_weights import is_blocked
from qcompiler.lowering.layer_inputs import read_float
from qcompiler.lowering.packed import CodeMatrix, code_matrix, pack, two_bit_matrix
from qcompiler.rewriting.contract import OPTIONS, Changed, Changes, Kind, Pass, Skipped
from qcompiler.sites.activations import Dynamic, is_quantized, rounds_to
from qcompiler.sites.analyses import quantized_linears_of
from qcompiler.sites.embeddings import QuantizedEmbedding, find_quantized_embeddings
from qcompiler.sites.find import Linear
from qcompiler.sites.stored import quantized_weight
from qcompiler.statistics import StatisticsStore
from qcompiler.targets.conditions import FUSED, FUSED_FEATURES, Call, Operand, dtype_name, obstacles

KERNEL = "MatMulNBits"
BLOCK_SIZES: tuple[int, ...] = (16, 32, 64, 128, 256)
SCALE_BYTES = 4


def fused_obstacle(bits: int, block: int, features: int, outputs: int, dtype: ir.DataType, zero_points: bool) -> str:
    """Why CUDA's fused kernel will not take a MatMulNBits without bias input; empty where it will."""
    inputs = [Operand(dtype_name(dtype)), Operand(), Operand(), Operand() if zero_points else None]
    call = Call({"K": features, "N": outputs, "block_size": block}, inputs)
    return next(iter(obstacles(f"fpA_intB-{bits}", call)), "")


@dataclass(frozen=True, eq=False)
class _Operator:
    """An operator that multiplies by a constant: all of its inputs but the first."""

    op_type: str
    inputs: tuple[ir.Value, ...]
    attributes: dict[str, object]
    dtype: ir.DataType
    """What the model computes the layer in."""
    detail: str


@options(frozen=True, config=OPTIONS)
class LowerWeightOnly(Pass):
    name: ClassVar[str] = "lower-weight-only"
    kind: ClassVar[Kind] = "lowering"

    block_size: Literal[16, 32, 64, 128, 256] = 128
    """Input features that share a scale in the operator, at most, where the codes have one scale for all of them."""
    accuracy_level: Literal[0, 1, 4] = 4
    """4: activations rounded to 8 bits in blocks (fast on CPUs); 0 or 1: float32 activations."""
    half_precision: bool = False
    """Compute in the model's own type, as CUDA's kernels do, and not in float32 between Casts."""
    fused_kernel: bool = False
    """Choose the blocks that CUDA's fused kernel takes, and report of each layer whether it does."""

    def apply(self, model: ir.Model, statistics: StatisticsStore) -> Changes:
        changes = Changes()
        rw = Rewriter(model, self.name)
        model.graph.opset_imports.setdefault("com.microsoft", 1)
        embeddings = find_quantized_embeddings(model)
        made: dict[object, _Operator] = {}
        for site in self.selected(quantized_linears_of(model)):
            found = site.activation
            pair = found if isinstance(found, Dynamic) else None
            if site.dequantize is None or (is_quantized(site.input) and not is_blocked(site)):
                continue  # codes on both sides are other passes' business
            # Two layers can read one square constant in both directions.
            key = site.weight, site.transposed, *site.dequantize.inputs[1:]
            if key not in made:
                if codebook_format(site.dequantize) is None:
                    operator = self._blocks(site, embeddings, rw, changes)
                else:
                    operator = self._codebook(site, rw)
                if isinstance(operator, str):
                    changes.skipped.append(Skipped(site.name, operator))
                    continue
                made[key] = operator
            detail, rounds = made[key].detail, self._rounds_inputs(made[key])
            if pair is not None:
                block = made[key].attributes["block_size"]
                rounded = f"the activation rounded to 8 bits by the kernel, in blocks of {block}"
                detail = f"{detail}, {rounded if rounds else 'the activation stays float'}"
                read_float(site.node, pair)
            left = pair is not None and not rounds
            kernel = _lower(site, made[key], rw)
            stored = quantized_weight(kernel) if kernel.op_type == bnb4.KERNEL else None  # its scales are floats now
            changes.changed.append(Changed(
                site.name, weight=stored.scheme if stored is not None else None, activation=_rounding(kernel),
                kernel=kernel.op_type, detail=detail, float_input=left,
            ))  # fmt: skip
        remove_unused_functions(model)
        return changes

    def _rounds_inputs(self, operator: _Operator) -> bool:
        """Whether the kernel rounds activations itself."""
        return operator.op_type == KERNEL and not obstacles("rounded-in-blocks", Call(operator.attributes))

    def _blocks(
        self, site: Linear, embeddings: tuple[QuantizedEmbedding, ...], rw: Rewriter, changes: Changes
    ) -> _Operator | str:
        """MatMulNBits, and the embeddings that share its codes lowered; or why not."""
        matrix = _matrix(site)
        block = matrix if isinstance(matrix, str) else self._block(matrix)
        if isinstance(matrix, str) or isinstance(block, str):
            return str(block)
        graph, base = node_graph(site.node), str(site.weight.name)
        name = rw.fresh(f"{base}.blocks")
        codes = add_constant(graph, name, matrix.packed(block, name))
        scale = matrix.scales(block)
        if not self.half_precision:
            scale = scale.astype(np.float32, copy=False)
        inputs = [codes, rw.constant(f"{base}.block_scales", scale, graph)]
        points = matrix.zero_points(block)
        if points is not None:
            packed_points = pack(points, matrix.bits)
            inputs.append(rw.constant(f"{base}.block_zero_points", packed_points, graph))
        for embedding in _tied(site, embeddings):
            if embedding.ids.shape is None:
                changes.skipped.append(Skipped(embedding.name, "its ids have an unknown number of dimensions"))
                continue
            gather_from_packed(embedding, matrix, inputs[0], inputs[1], block, rw)
            changes.changed.append(Changed(embedding.name, kernel=GATHER))
        attributes: dict[str, object] = {
            "K": matrix.features, "N": matrix.rows, "bits": matrix.bits, "block_size": block,
            "accuracy_level": self.accuracy_level,
        }  # fmt: skip
        return _Operator(KERNEL, tuple(inputs), attributes, _dtype(matrix), self._detail(matrix, block))

    def _codebook(self, site: Linear, rw: Rewriter) -> _Operator | str:
        """MatMulBnb4, or why not."""
        node, tensor = site.dequantize, constant(site.weight)
        assert node is not None
        assert tensor is not None
        block, scales, format = node.attributes.get_int("block_size", 0), block_scales(node), codebook_format(node)
        if scales is None:
            return "the scales of its weight are computed, and the operator's are constants"
        if not site.transposed:
            return "the blocks of its weight run along its outputs, and the operator's along the inputs"
        obstacle = bnb4.obstacle(str(format), block)
        if obstacle is not None:
            return obstacle
        dtype = node.outputs[0].dtype or ir.DataType.FLOAT
        graph, base = node_graph(site.node), str(site.weight.name)
        name = rw.fresh(f"{base}.pairs")
        codes = add_constant(graph, name, bnb4.packed(tensor, name))
        absmax = scales.astype(dtype.numpy()) if self.half_precision and dtype != ir.DataType.DOUBLE else scales
        attributes: dict[str, object] = {
            "K": site.in_features, "N": site.out_features, "block_size": block,
            "quant_type": bnb4.QUANT_TYPES[str(format)],
        }  # fmt: skip
        inputs = codes, rw.constant(f"{base}.absmax", absmax, graph)
        return _Operator(bnb4.KERNEL, inputs, attributes, dtype, f"blocks of {block}")

    def _block(self, matrix: CodeMatrix) -> int | str:
        """The block size, or why there is none."""
        fused, allowed = FUSED[matrix.bits].block, BLOCK_SIZES
        if self.fused_kernel and matrix.features % FUSED_FEATURES:
            allowed = tuple(size for size in BLOCK_SIZES if size != fused)  # or else it fails when it runs
        if self.fused_kernel and (matrix.group % fused == 0 or matrix.scale.shape[1] == 1):
            zero_points = matrix.zero_point is not None
            if not fused_obstacle(matrix.bits, fused, matrix.features, matrix.rows, _dtype(matrix), zero_points):
                return fused
        if matrix.scale.shape[1] > 1:
            fitting = [size for size in allowed if matrix.group % size == 0]
            return max(fitting, default=f"groups of {matrix.group} features are no multiple of 16, the least block")
        sizes = [size for size in reversed(allowed) if size <= self.block_size]
        # The fewest bytes of codes and scales; the widest of several.
        return min(sizes, key=lambda size: -(-matrix.features // size) * (size * matrix.bits // 8 + SCALE_BYTES))

    def _detail(self, matrix: CodeMatrix, block: int) -> str:
        detail = f"{matrix.bits} bits in blocks of {block}"
        if not self.fused_kernel:
            return detail
        zero_points = matrix.zero_point is not None
        reason = fused_obstacle(matrix.bits, block, matrix.features, matrix.rows, _dtype(matrix), zero_points)
        if not reason:
            return f"{detail}, fpA_intB"
        return f"{detail}, dequantized from {FUSED[matrix.bits].tokens} tokens on: {reason}"


def _tied(site: Linear, embeddings: tuple[QuantizedEmbedding, ...]) -> list[QuantizedEmbedding]:
    """The embeddings that gather rows of the layer's codes, with the same scales and zero points."""
    assert site.dequantize is not None
    scale, zero_point = (*site.dequantize.inputs, None)[1:3]
    return [
        embedding
        for embedding in embeddings
        if embedding.codes is site.weight
        and embedding.row_axis == site.channel_axis
        and embedding.scale is scale
        and embedding.zero_point is zero_point
    ]


def _lower(site: Linear, operator: _Operator, rw: Rewriter) -> ir.Node:
    """Put the operator, which is returned, in the place of the layer, between Casts where their types differ."""
    product, source = site.node.outputs[0], site.node.inputs[0]  # not site.input, which may be replaced by now
    assert source is not None
    dtype, computed = product.dtype or operator.dtype, operator.inputs[1].dtype
    kernel = rw.node(
        operator.op_type, [source, *operator.inputs], f"{site.name}.weight_only",
        domain="com.microsoft", dtype=computed, shape=product.shape, attributes=operator.attributes,
    )  # fmt: skip
    new, result = [kernel], kernel.outputs[0]
    if computed is not None and dtype != computed:
        before = _cast(source, computed, rw.fresh(f"{site.name}.float"))
        after = _cast(result, dtype, rw.fresh(f"{site.name}.cast"))
        kernel.replace_input_with(0, before.outputs[0])
        new, result = [before, kernel, after], after.outputs[0]
    if site.bias is not None and site.bias_node is None:  # Gemm's own bias
        add = rw.node("Add", [result, site.bias], f"{site.name}.bias_added", like=product)
        new, result = [*new, add], add.outputs[0]
    rw.insert_before(site.node, new)
    weight = site.weight
    replace_output(site.node, result)
    remove_unused_constant(weight)
    kernel.name = site.name
    bits = _narrower(site)
    if bits is not None:
        kernel.metadata_props[BITS] = bits
    return kernel


def _rounding(kernel: ir.Node) -> Scheme | None:
    """To what the operator rounds its input itself."""
    return rounds_to(kernel) if has(kernel, "rounds") else None


def _narrower(site: Linear) -> str | None:
    """How many bits the weight's codes have where the operator stores them in more; None where it does not."""
    node = site.dequantize
    assert node is not None
    return str(FORMATS[BINARY].bits) if is_binary(node) else node.metadata_props.get(BITS)


def _cast(value: ir.Value, dtype: ir.DataType, name: str) -> ir.Node:
    return new_node("Cast", [value], name, dtype=dtype, shape=value.shape, attributes={"to": int(dtype)})


def _matrix(site: Linear) -> CodeMatrix | str:
    """The layer's weight with a row for each output, or why it cannot be read so."""
    node = site.dequantize
    assert node is not None
    if is_binary(node):
        return two_bit_matrix(node)
    scale, zero_point = (*node.inputs, None)[1:3]
    noted = node.metadata_props.get(BITS)
    return code_matrix(
        site.weight, scale, zero_point, row_axis=site.channel_axis, axis=node.attributes.get_int("axis", 1),
        block_size=node.attributes.get_int("block_size", 0), bits=None if noted is None else int(noted),
    )  # fmt: skip


def _dtype(matrix: CodeMatrix) -> ir.DataType:
    """The type that the model computes the layer in: that of its scales."""
    return ir.DataType.from_numpy(matrix.scale.dtype)
