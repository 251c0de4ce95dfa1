"""Stores the weights of linear layers in 4 bits, as indices into a table made for normally distributed numbers.

**Before**  y = x W            **After**  y = x · DequantizeNF4(Q, s)ᵀ,  W[n, k] ≈ table[Q[n, k]] · s[block of (n, k)]

Weights look like draws from a normal distribution. NF4's 16 numbers are its quantiles, so that each code is used about
equally often; FP4's are a tiny floating-point format (one sign bit, two of exponent, one of mantissa). ``block_size``
weights share a scale, their largest magnitude. Blocks follow one another through the rows of [outputs, inputs], over
the ends of rows where ``block_size`` does not divide these.

Source: Dettmers et al. 2023, "QLoRA", section 3 and appendix E; tables and blocks are those of bitsandbytes, and of
ONNX Runtime's MatMulBnb4 (code 8 of its FP4, minus zero, is never chosen). ``double_quantization`` stores the scales
themselves in 8 bits: their mean is taken off, and 256 of them share a float32 scale, which costs 0.127 instead of 0.5
bits a weight in blocks of 64. Unlike bitsandbytes, whose 8-bit code is a table with steps that grow, the code is plain
int8 (absmax / 127), so that DequantizeLinear and Add restore it, and the weights are rounded with the scales as they
will be restored.

In the portable model each weight is one node, the function `qcompiler::DequantizeNF4` (or `DequantizeFP4`), whose body
is standard ONNX; on a CPU, ONNX Runtime computes it once, when it opens the model, into a float weight. Lowering makes
MatMulBnb4 of it.

Skipped: weights that are quantized already, and constants in forms that no pass handles (inside If or Loop bodies,
batched weights, …), each with its reason.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import gcd
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from pydantic import Field
from pydantic.dataclasses import dataclass as options

from qcompiler.errors import DataError
from qcompiler.formats.arithmetic import dequantize, quantize, scale_and_zero_point, slices
from qcompiler.formats.scheme import PerGroup, PerTensor, Scheme, find_format
from qcompiler.formats.search import quantize_weight
from qcompiler.functions.library import DOMAIN, add_function
from qcompiler.graph.edit import (
    constant,
    node_graph,
    remove_node_if_unused,
    remove_unused_constant,
)
from qcompiler.graph.lazy import derived, read
from qcompiler.graph.rewriter import Rewriter
from qcompiler.rewriting.contract import OPTIONS, Changed, Changes, Kind, Skipped
from qcompiler.rewriting.staged import Computed, StagedPass, Unit
from qcompiler.sites.analyses import sites_of
from qcompiler.sites.find import Linear, Sites
from qcompiler.statistics import StatisticsStore

Array = npt.NDArray[Any]

FORMATS = {"nf4": "nf4", "fp4": "fp4_bnb"}
SCALES_TOGETHER = 256  # scales that share a scale
FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)


@options(frozen=True, config=OPTIONS)
class Nf4(StagedPass):
    name: ClassVar[str] = "nf4"
    kind: ClassVar[Kind] = "rounding"

    table: Literal["nf4", "fp4"] = "nf4"
    """What the codes stand for: quantiles of the normal distribution, or a 4-bit floating-point format."""
    block_size: int = Field(default=64, ge=1)
    """Weights that share a scale; MatMulBnb4 takes powers of two from 16 on."""
    double_quantization: bool = True
    """Store the scales in 8 bits."""
    layers: tuple[Literal["linear", "head"], ...] = ("linear",)
    """Kinds of layers to work on; a head is a linear layer with one output for each row of an embedding (logits)."""

    def units(self, model: ir.Model, changes: Changes) -> Sequence[Unit]:
        sites = sites_of(model)
        changes.skipped.extend(Skipped(site.name, site.reason) for site in self.selected(sites.unsupported))
        by_weight: dict[tuple[ir.Value, bool], list[Linear]] = {}
        for site in self._wanted(sites):
            obstacle = _obstacle(site)
            if obstacle is None:
                by_weight.setdefault((site.weight, site.transposed), []).append(site)
            else:
                changes.skipped.append(Skipped(site.name, obstacle))
        return [
            Unit(f"{weight.name}{'.transposed' if transposed else ''}", number, (), readers)
            for number, ((weight, transposed), readers) in enumerate(by_weight.items())
        ]

    def compute(self, unit: Unit, statistics: StatisticsStore) -> Computed:
        """The scales; codes are computed when they are written."""
        return block_scales(unit.work[0], FORMATS[self.table], self.block_size, self.double_quantization)

    def write(self, unit: Unit, computed: Computed, rw: Rewriter, changes: Changes) -> None:
        readers: list[Linear] = unit.work
        format, weight = FORMATS[self.table], readers[0].weight
        blocks = encode(readers[0], format, self.block_size, computed)
        dequantized = self._dequantize(readers[0], blocks, add_function(rw.model, format), rw)
        turned: ir.Value | None = None
        for site in readers:
            if site.node.attributes.get_int("transB", 0):
                source = dequantized
            else:
                source = turned = turned or self._transpose(site, dequantized, rw)
            self._connect(site, source, rw)
            changes.changed.append(Changed(site.name, weight=blocks.scheme, detail=blocks.size))
        remove_unused_constant(weight)

    def _wanted(self, sites: Sites) -> list[Linear]:
        rows = {int(_tensor(site.table).shape.numpy()[site.channel_axis]) for site in sites.embeddings}
        return self.selected(
            s for s in sites.linears if ("head" if s.out_features in rows else "linear") in self.layers
        )

    def _dequantize(self, site: Linear, blocks: Blocks, function: str, rw: Rewriter) -> ir.Value:
        """Put codes, scales and the function that reads them before the layer; the float weight [N, K]."""
        graph, dtype = node_graph(site.node), _tensor(site.weight).dtype
        # The codes of a tied weight carry the layer's name: recognisers take a layer's path from its weight's name.
        base = str(site.weight.name if site.transpose is None else site.name)
        codes = rw.constant(f"{base}.codes", blocks.codes, graph)
        scale, new = self._scale(graph, blocks, base, rw)
        node = rw.node(
            function, [codes, scale], f"{base}.dequantized", domain=DOMAIN, dtype=dtype,
            shape=codes.shape, attributes={"block_size": self.block_size, "output_dtype": int(dtype)},
        )  # fmt: skip
        new.append(node)
        rw.insert_before(site.node, new)
        return node.outputs[0]

    def _scale(self, graph: ir.Graph, blocks: Blocks, base: str, rw: Rewriter) -> tuple[ir.Value, list[ir.Node]]:
        """The scales of the blocks, and the nodes that compute them."""
        if blocks.scale_codes is None:
            return rw.constant(f"{base}.scale", blocks.scale, graph), []
        codes = rw.constant(f"{base}.scale.codes", blocks.scale_codes, graph)
        scale = rw.constant(f"{base}.scale.scale", blocks.scale, graph)
        mean = rw.constant(f"{base}.scale.mean", np.array([blocks.mean], np.float32), graph)
        # ONNX Runtime takes a single scale for that of a whole tensor and then refuses a block size.
        blocked: dict[str, object] = {"axis": 0, "block_size": SCALES_TOGETHER} if blocks.scale.size > 1 else {}
        centred = rw.node("DequantizeLinear", [codes, scale], f"{base}.scale.centred",
                          dtype=ir.DataType.FLOAT, shape=codes.shape, attributes=blocked)  # fmt: skip
        restored = rw.node("Add", [centred.outputs[0], mean], f"{base}.scale", like=centred.outputs[0])
        return restored.outputs[0], [centred, restored]

    def _transpose(self, site: Linear, dequantized: ir.Value, rw: Rewriter) -> ir.Value:
        shape = ir.Shape((site.in_features, site.out_features))
        node = rw.node("Transpose", [dequantized], f"{dequantized.name}.transposed", like=dequantized,
                       shape=shape, attributes={"perm": [1, 0]})  # fmt: skip
        rw.insert_before(site.node, [node])
        return node.outputs[0]

    def _connect(self, site: Linear, source: ir.Value, rw: Rewriter) -> None:
        site.node.replace_input_with(1, source)
        rw.mark(site.node)
        if site.transpose is not None and site.transpose.graph is not None:
            remove_node_if_unused(site.transpose)


@dataclass(frozen=True, eq=False)
class Blocks:
    """A weight in blocks of codes. `scale` is that of the blocks, or of `scale_codes` where there are any."""

    format: str
    block_size: int
    codes: ir.TensorProtocol
    """[N, K], as the format stores them: uint4."""
    scale: npt.NDArray[np.float32]
    scale_codes: npt.NDArray[np.int8] | None
    mean: np.float32
    """What is added to the restored scales."""

    @property
    def scheme(self) -> Scheme:
        scales = None
        if self.scale_codes is not None:
            scales = Scheme("int8", PerGroup(SCALES_TOGETHER) if self.scale.size > 1 else PerTensor())
        return Scheme(self.format, PerGroup(self.block_size), scales=scales)

    @property
    def size(self) -> str:
        extra = 0 if self.scale_codes is None else self.scale_codes.nbytes
        bits = (self.codes.nbytes + self.scale.nbytes + extra) * 8 / self.codes.size
        return f"{bits:.2f} bits a weight{'' if self.scale_codes is None else ', scales in 8 bits'}"


def block_scales(site: Linear, format: str, block_size: int, double_quantization: bool) -> Computed:
    """The scales [blocks] of a layer's weight, or their codes, scales and mean. DataError for NaN or infinity."""
    tensor, in_rows = _tensor(site.weight), _in_rows(site)
    largest = read(tensor, lambda data: _largest(in_rows(data), block_size, site.module_path))
    if double_quantization:
        scale_codes, scale, mean = quantize_scales(largest)
        return Computed({"scale_codes": scale_codes, "scale": scale, "mean": np.asarray(mean)})
    scale, _ = scale_and_zero_point(-largest, largest, Scheme(format, PerGroup(block_size)))
    return Computed({"scale": scale})


def encode(site: Linear, format: str, block_size: int, scales: Computed) -> Blocks:
    """The weight of a layer in blocks with these scales; the codes are computed when they are written."""
    tensor, in_rows, shape = _tensor(site.weight), _in_rows(site), (site.out_features, site.in_features)
    scale, scale_codes = scales.arrays["scale"], scales.arrays.get("scale_codes")
    mean = np.float32(scales.arrays.get("mean", 0))
    of_blocks = scale if scale_codes is None else restore_scales(scale_codes, scale, mean)
    codes = derived(
        tensor, lambda data: _codes(in_rows(data), of_blocks, format, block_size),
        ir.DataType[find_format(format).storage], shape, f"{site.weight.name}.codes",
    )  # fmt: skip
    return Blocks(format, block_size, codes, scale, scale_codes, mean)


def _in_rows(site: Linear) -> Callable[[Array], Array]:
    """Turns the layer's constant to [N, K]."""
    return (lambda data: data) if site.transposed else (lambda data: data.T)


def quantize_scales(scales: Array) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32], np.float32]:
    """Scales [blocks] ≥ 0 as int8 codes [blocks], the codes' scales [⌈blocks / 256⌉] and the mean; restored to > 0."""
    mean = np.float32(scales.mean(dtype=np.float64))
    centred = quantize_weight((scales - mean)[None], Scheme("int8", PerGroup(SCALES_TOGETHER)), channel_axis=0)
    codes, of_codes = centred.codes[0], centred.scale[0]
    # A block of zeros, or nearly so, may be restored to 0 or less: half a step, so that the next code is above.
    return codes + (restore_scales(codes, of_codes, mean) <= 0).astype(np.int8), of_codes, mean


def restore_scales(codes: Array, scale: Array, mean: np.float32) -> npt.NDArray[np.float32]:
    return dequantize(codes, scale, None, 0, SCALES_TOGETHER) + mean


def _parts(shape: tuple[int, ...], block_size: int) -> list[tuple[slice, slice]]:
    """Slices of rows, and the blocks that each of them fills."""
    inputs = shape[1]
    parts = slices(shape, block_size // gcd(inputs, block_size))
    return [(part, slice(part.start * inputs // block_size, -(-part.stop * inputs // block_size))) for part in parts]


def _largest(rows: Array, block_size: int, name: str) -> npt.NDArray[np.float32]:
    """The largest magnitude of each block."""
    found = []
    for part, _ in _parts(rows.shape, block_size):
        flat = np.abs(rows[part].astype(np.float32).reshape(-1))
        found.append(np.maximum.reduceat(flat, np.arange(0, flat.size, block_size)))
    largest = np.concatenate(found)
    if not np.isfinite(largest).all():
        raise DataError(f"{name} contains NaN or infinity: repair it before it is quantized.")
    return largest


def _codes(rows: Array, scales: Array, format: str, block_size: int) -> Array:
    out = np.empty(rows.shape, np.uint8)
    for part, blocks in _parts(rows.shape, block_size):
        flat = rows[part].astype(np.float32).reshape(-1)
        out[part] = quantize(flat, scales[blocks], None, format, 0, block_size).reshape(out[part].shape)
    return out


def _obstacle(site: Linear) -> str | None:
    dtype = _tensor(site.weight).dtype
    if site.dequantize is not None:
        return "its weight is quantized already"
    return None if dtype in FLOATS else f"its weight is {dtype.name}, which is no type to restore it to"


def _tensor(weight: ir.Value) -> ir.TensorProtocol:
    tensor = constant(weight)
    assert tensor is not None  # recognisers only report constants
    return tensor
