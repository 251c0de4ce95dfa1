"""Runs weight-only quantized linear layers as ONNX Runtime's MatMulNBits, which reads the codes as they are stored.

**Before**  y = x · DequantizeLinear(Q_w, s)          **After**  y = MatMulNBits(x, Q_w, s)

The operator takes unsigned codes [N, K / block, block] with zero point 128 and one scale for each block, so the scale
of an output channel is repeated for each of its blocks. Without it ONNX Runtime would dequantize the whole weight on
every run. A tied embedding gathers from the same array, which is stored once. A bias stays an Add. Blocks are
``block_size`` wide, or narrower where that stores fewer bytes (64 for 192 input features, which two of 128 would pad).

Layers in half precision run in float32 between two Casts, as the CPU kernel would do inside: given half precision
scales, ONNX Runtime 1.32 turns them by a Cast of its own where the nodes around run in float32, and below the full
optimization level the kernel then misses the scales and writes garbage without a word.

``accuracy_level`` 4 lets the CPU kernel round the activation to 8 bits block by block, which is what makes it fast; 0
keeps the activation in float.

Skipped: layers whose codes have not 8 bits, or whose zero point is not the middle.
"""

from __future__ import annotations

from math import prod
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir
from pydantic.dataclasses import dataclass as options

from qcompiler.graph import (
    Names,
    add_constant,
    array,
    constant,
    inherit,
    insert_after,
    insert_before,
    new_node,
    node_graph,
    remove_unused_constant,
    replace_output,
)
from qcompiler.match import Linear, find_sites
from qcompiler.rewrite import OPTIONS, Changed, Changes, Kind, Pass, Skipped
from qcompiler.statistics import StatisticsStore
from qcompiler.tensors import derived

KERNEL = "MatMulNBits"
BLOCK_SIZES = (16, 32, 64, 128, 256)
SCALE_BYTES = 4


@options(frozen=True, config=OPTIONS)
class LowerWeightOnly(Pass):
    name: ClassVar[str] = "lower-weight-only"
    kind: ClassVar[Kind] = "lowering"

    block_size: Literal[16, 32, 64, 128, 256] = 128
    """Input features that share a scale in the operator, at most."""
    accuracy_level: Literal[0, 1, 4] = 4
    """4: activations rounded to 8 bits in blocks (fast on CPUs); 0 or 1: float32 activations."""

    def apply(self, model: ir.Model, statistics: StatisticsStore) -> Changes:
        changes = Changes()
        names = Names(model.graph)
        model.graph.opset_imports.setdefault("com.microsoft", 1)
        packed: dict[tuple[ir.Value, bool], tuple[ir.Value, ir.Value]] = {}
        for site in self.selected(find_sites(model).linears):
            if site.dequantize is None or _reads_codes(site.node):
                continue
            obstacle = _obstacle(site)
            if obstacle is not None:
                changes.skipped.append(Skipped(site.name, obstacle))
                continue
            key = site.weight, site.transposed  # two layers can read one square constant in both directions
            if key not in packed:
                packed[key] = self._pack(site, names)
            self._lower(site, *packed[key], names)
            changes.changed.append(Changed(site.name, kernel=KERNEL))
        return changes

    def _pack(self, site: Linear, names: Names) -> tuple[ir.Value, ir.Value]:
        """Codes [N, blocks, block] and scales [N, blocks] of a constant, shared by its embedding where it has one."""
        assert site.dequantize is not None
        assert site.dequantize.inputs[1] is not None
        graph, base, block = node_graph(site.node), str(site.weight.name), self._block(site)
        n, k, transposed = site.out_features, site.in_features, site.transposed
        blocks = -(-k // block)

        def arrange(data: np.ndarray) -> np.ndarray:
            codes = data if data.dtype == np.uint8 else (data.astype(np.int16) + 128).astype(np.uint8)
            rows = codes if transposed else codes.T
            full = np.full((n, blocks * block), 128, np.uint8)  # what is added to the last block stands for zero
            full[:, :k] = rows
            return full.reshape(n, blocks, block)

        tensor = constant(site.weight)
        assert tensor is not None
        name = names.fresh(f"{base}.blocks")
        codes = add_constant(graph, name, derived(tensor, arrange, ir.DataType.UINT8, (n, blocks, block), name))
        per_channel = np.broadcast_to(array(site.dequantize.inputs[1]).astype(np.float32).reshape(-1, 1), (n, 1))
        scales = add_constant(graph, names.fresh(f"{base}.block_scales"), np.repeat(per_channel, blocks, axis=1))
        if site.transposed and site.weight.dtype == ir.DataType.UINT8:
            _gather_from_blocks(site.weight, codes, k, names, self.name)
        return codes, scales

    def _block(self, site: Linear) -> int:
        """The block size, up to the option's, with the fewest bytes of codes and scales; the widest of several."""
        sizes = [size for size in BLOCK_SIZES if size <= self.block_size]
        return min(reversed(sizes), key=lambda size: -(-site.in_features // size) * (size + SCALE_BYTES))

    def _lower(self, site: Linear, codes: ir.Value, scales: ir.Value, names: Names) -> None:
        assert site.dequantize is not None
        product, source = site.node.outputs[0], site.node.inputs[0]  # not site.input, which may be replaced by now
        assert source is not None
        dtype = site.dequantize.outputs[0].dtype or site.dequantize.inputs[1].dtype  # type: ignore[union-attr]
        kernel = new_node(
            KERNEL, [source, codes, scales], names.fresh(f"{site.name}.weight_only"),
            domain="com.microsoft", dtype=ir.DataType.FLOAT, shape=product.shape,
            attributes={"K": site.in_features, "N": site.out_features, "bits": 8, "block_size": self._block(site),
                        "accuracy_level": self.accuracy_level},
        )  # fmt: skip
        new, result = [kernel], kernel.outputs[0]
        if dtype is not None and dtype != ir.DataType.FLOAT:
            before = _cast(source, ir.DataType.FLOAT, names.fresh(f"{site.name}.float"))
            after = _cast(result, dtype, names.fresh(f"{site.name}.cast"))
            kernel.replace_input_with(0, before.outputs[0])
            new, result = [before, kernel, after], after.outputs[0]
        if site.bias is not None and site.bias_node is None:  # Gemm's own bias
            add = new_node("Add", [result, site.bias], names.fresh(f"{site.name}.bias_added"), like=product)
            new, result = [*new, add], add.outputs[0]
        inherit(new, site.node, self.name)
        insert_before(site.node, new)
        weight = site.weight
        replace_output(site.node, result)
        remove_unused_constant(weight)
        kernel.name = site.name


def _cast(value: ir.Value, dtype: ir.DataType, name: str) -> ir.Node:
    return new_node("Cast", [value], name, dtype=dtype, shape=value.shape, attributes={"to": int(dtype)})


def _reads_codes(layer: ir.Node) -> bool:
    """Whether the activation is quantized, too: then the layer is another pass's business."""
    producer = layer.inputs[0].producer() if layer.inputs[0] is not None else None
    return producer is not None and producer.op_type == "DequantizeLinear"


def _obstacle(site: Linear) -> str | None:
    assert site.dequantize is not None
    if site.weight.dtype not in (ir.DataType.INT8, ir.DataType.UINT8):
        return f"its weight has {site.weight.dtype} codes, and this lowering knows 8 bits"
    if site.dequantize.attributes.get_int("block_size", 0):
        return "its weight has blocked scales, and this lowering knows one for each output channel"
    scale = site.dequantize.inputs[1]
    if constant(scale) is None:
        return "the scales of its weight are computed, and the operator's are constants"
    axis = site.dequantize.attributes.get_int("axis", 1)
    if array(scale).size > 1 and axis % 2 != site.channel_axis:  # type: ignore[arg-type]
        return "its weight has scales along the inputs, and this lowering knows one for each output channel"
    zero_point = site.dequantize.inputs[2] if len(site.dequantize.inputs) > 2 else None
    middle = 128 if site.weight.dtype == ir.DataType.UINT8 else 0
    if zero_point is not None and np.any(array(zero_point) != middle):
        return "its weight is asymmetric, and this lowering knows symmetric weights"
    return None


def _gather_from_blocks(weight: ir.Value, codes: ir.Value, features: int, names: Names, pass_name: str) -> None:
    """Embeddings that gather rows of the codes gather them from the operator's array, and flatten the blocks."""
    for use in list(weight.uses()):
        gather = use.node
        if gather.op_type != "Gather" or use.idx != 0 or gather.attributes.get_int("axis", 0) != 0:
            continue
        rows, ids = gather.outputs[0], gather.inputs[1]
        if ids is None or ids.shape is None:
            continue  # its rank decides how the rows are flattened
        graph, base, rank = node_graph(gather), gather.name, len(ids.shape)

        def place(kind: str, numbers: list[int], graph: ir.Graph = graph, base: str | None = base) -> ir.Value:
            return add_constant(graph, names.fresh(f"{base}.{kind}"), np.array(numbers, np.int64))

        blocks = new_node("Gather", [codes, ids], names.fresh(f"{base}.blocks"), dtype=codes.dtype)
        flat = place("flat", [0] * rank + [-1])
        whole = new_node("Reshape", [blocks.outputs[0], flat], names.fresh(f"{base}.rows"), dtype=codes.dtype)
        new = [blocks, whole]
        if prod(codes.const_value.shape.numpy()[1:]) > features:  # type: ignore[union-attr]
            cut = [whole.outputs[0], place("begin", [0]), place("end", [features]), place("axis", [rank])]
            new.append(new_node("Slice", cut, names.fresh(f"{base}.features"), dtype=codes.dtype))
        new[-1].outputs[0].shape = rows.shape
        inherit(new, gather, pass_name)
        insert_after(gather, new)
        replace_output(gather, new[-1].outputs[0])
