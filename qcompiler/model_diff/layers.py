"""Reads a model as layers: what a person would call one, however many nodes an exporter or a quantizer wrote for it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import onnx_ir as ir

from qcompiler.formats.scheme import Scheme
from qcompiler.graph.edit import constant
from qcompiler.graph.metadata import PART_OF
from qcompiler.graph.module_path import block_of, module_path
from qcompiler.graph.operators import QuantizedOperand, has, multiplies_floats, quantized
from qcompiler.model_diff.weights import Weight, as_table, float_name, of_codes, of_operand
from qcompiler.sites.activations import Activation, Float, activation_of, operand_activation, through_quantization
from qcompiler.sites.analyses import caches_of, sites_of
from qcompiler.sites.caches import Cache
from qcompiler.sites.embeddings import QuantizedEmbedding, find_quantized_embeddings
from qcompiler.sites.kinds import Linear
from qcompiler.sites.stored import coded_weight, quantized_weight, table_weight
from qcompiler.sites.stored.kernels import is_kernel, operand, outputs_first, tail_of
from qcompiler.sites.stored_caches import stored_cache

LayerKind = Literal["linear", "convolution", "embedding", "recurrent", "cache"]


@dataclass(frozen=True, eq=False)
class Layer:
    kind: LayerKind
    node: ir.Node
    """What multiplies or gathers."""
    name: str
    """The node's name, without what quantizers append."""
    module_path: str
    op: str
    input: ir.Value | None
    """The activation, before it is quantized; ids of an embedding."""
    output: ir.Value
    """After the bias, and after dequantization where the layer gives codes."""
    weight: Weight
    activation: Activation
    """How the input is quantized."""
    nodes: tuple[ir.Node, ...] = ()
    """All nodes of the layer, `node` among them."""
    notes: tuple[str, ...] = field(default=())

    @property
    def block(self) -> str:
        return block_of(self.module_path)

    @property
    def signature(self) -> tuple[object, ...]:
        """What a layer keeps however it is stored: kind and shape."""
        return (self.kind, self.weight.shape)


_SUFFIXES = re.compile(r"(_quant|_Q\d+|_DequantizeLinear|_MatMul_quant|\.dequantized)+$")


def plain_name(name: str) -> str:
    """A node's name without what quantizers append to it."""
    return _SUFFIXES.sub("", name)


def read_layers(model: ir.Model) -> list[Layer]:
    """Every layer with weights, in graph order; `model` has constants as initializers and named nodes."""
    linears = {site.node: site for site in sites_of(model).linears}
    embeddings = {site.gather: site for site in find_quantized_embeddings(model)}
    found: list[Layer] = []
    taken = {gather for site in embeddings.values() for gather in _gathers_of_scales(site)}
    for node in model.graph.all_nodes():
        if node in taken or PART_OF in node.metadata_props:
            continue
        layer = _read(node, linears.get(node), embeddings.get(node))
        if layer is not None:
            found.append(layer)
            taken.update(layer.nodes)
    return found


def _read(node: ir.Node, linear: Linear | None, embedding: QuantizedEmbedding | None) -> Layer | None:
    if embedding is not None:
        return _embedding_of_codes(embedding)
    if node.op_type in ("Gather", "GatherBlockQuantized"):
        return _embedding(node)
    if is_kernel(node):
        return _kernel(node)
    if multiplies_floats(node) and node.op_type != "Einsum":  # whose equation says which operand is multiplied how
        return _plain(node, linear)
    if node.op_type in ("LSTM", "GRU", "RNN"):
        weight = of_operand(operand(node, 1), outputs_first=True)
        return None if weight is None else _layer("recurrent", node, node.inputs[0], weight)
    return None


# ------------------------------------------------------------------------------------------------------ plain operators


def _plain(node: ir.Node, linear: Linear | None) -> Layer | None:
    convolves = has(node, "convolution")
    weight = of_operand(operand(node, 1), outputs_first=outputs_first(node))
    if weight is None or (not convolves and (len(weight.shape) != 2 or 1 in weight.shape)):
        return None
    if of_operand(operand(node, 0), outputs_first=False) is not None:
        return None  # constants alone
    activation = activation_of(node.inputs[0])
    bias = linear.bias_node if linear is not None else None
    nodes = (*weight.nodes, *activation.nodes)
    kind: LayerKind = "convolution" if convolves else "linear"
    return _layer(kind, node, through_quantization(node.inputs[0]), weight, activation, nodes, bias)


def _layer(
    kind: LayerKind, node: ir.Node, source: ir.Value | None, weight: Weight, activation: Activation | None = None,
    nodes: tuple[ir.Node, ...] = (), bias: ir.Node | None = None, output: ir.Value | None = None,
    notes: tuple[str, ...] = (), op: str = "",
) -> Layer:  # fmt: skip
    named = weight.constants[0] if not any(part.op_type == "Transpose" for part in weight.nodes) else None
    result = output if output is not None else (bias or node).outputs[0]
    members = dict.fromkeys((*nodes, node, *((bias,) if bias is not None else ())))
    path = module_path(node, named)
    if path == node.name:
        path = plain_name(path)
    return Layer(
        kind=kind, node=node, name=plain_name(node.name or ""), module_path=path, op=op or node.op_type, input=source,
        output=result, weight=weight, activation=activation or Float(source), nodes=tuple(members), notes=notes,
    )  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- embeddings


def _embedding(node: ir.Node) -> Layer | None:
    if node.op_type == "GatherBlockQuantized":
        table = as_table(of_codes(quantized_weight(node), outputs_first=True))
        return None if table is None else _layer("embedding", node, operand(node, 1), table)
    if node.domain or constant(operand(node, 1)) is not None or node.attributes.get_int("axis", None) not in (None, 0):
        return None
    table = as_table(of_operand(node.inputs[0], outputs_first=True))
    if table is not None:
        wide = len(table.shape) == 2 and 1 not in table.shape and not _angles(node)
        return _layer("embedding", node, node.inputs[1], table, None, table.nodes) if wide else None
    # Codes that are looked up are dequantized, or read by kernels that take the table's scale along.
    readers = sorted((use.node for use in node.outputs[0].uses()), key=lambda reader: not has(reader, "decodes"))
    found = next(((reader, place) for reader in readers if (place := _scaled(node.outputs[0], reader))), None)
    if found is None or node.inputs[0] is None:
        return None
    after, place = found
    scale, zero_point = (None if part is None else part.of(after) for part in (place.scale, place.zero_point))
    stored = coded_weight(after, node.inputs[0], scale, zero_point, axis=1)
    table = as_table(of_codes(stored, outputs_first=True))
    if table is None or len(table.shape) != 2:
        return None
    decoded = has(after, "decodes")
    output = after.outputs[0] if decoded else None
    return _layer("embedding", node, node.inputs[1], table, None, (after,) if decoded else (), output=output)


def _scaled(codes: ir.Value, reader: ir.Node) -> QuantizedOperand | None:
    """The operand that a reader takes codes as, where it has their scale, too."""
    places = [place for place in quantized(reader) if not place.codes.output and place.codes.of(reader) is codes]
    return next((place for place in places if place.scale is not None), None)


def _angles(gather: ir.Node) -> bool:
    """Whether cosines or sines are looked up, which rotate other values: read by Mul or a rotary operator only."""
    readers = [use.node.op_type for use in gather.outputs[0].uses()]
    return bool(readers) and all(op in ("Mul", "RotaryEmbedding", "Unsqueeze") for op in readers)


def _embedding_of_codes(site: QuantizedEmbedding) -> Layer | None:
    if site.dequantize is not None:
        return _embedding(site.gather)
    table = as_table(of_codes(table_weight(site), outputs_first=site.row_axis == 0))
    if table is None:
        return None
    return _layer("embedding", site.node, site.ids, table, None, (site.gather, site.node), op="Gather")


def _gathers_of_scales(site: QuantizedEmbedding) -> Iterator[ir.Node]:
    """What looks up scales and zero points for the codes, and is no embedding of its own."""
    for value in site.node.inputs[1:] if site.node is not site.gather else ():
        producer = value.producer() if value is not None else None
        if producer is not None and producer.op_type == "Gather":
            yield producer


# ------------------------------------------------------------------------------------------------------ integer kernels


def _kernel(node: ir.Node) -> Layer | None:
    weight = of_codes(quantized_weight(node), outputs_first=outputs_first(node))
    if weight is None:
        return None
    tail = tail_of(node)
    activation = operand_activation(node)
    nodes = (*weight.nodes, *(part for part in activation.nodes if part is not node), *tail)
    notes = ("computed in 8-bit integers",) if node.attributes.get_int("accuracy_level", 0) == 4 else ()
    kind: LayerKind = "convolution" if has(node, "convolution") else "linear"
    output = (tail[-1] if tail else node).outputs[0]
    return _layer(kind, node, through_quantization(node.inputs[0]), weight, activation, nodes, None, output, notes)


# --------------------------------------------------------------------------------------------------------------- caches


@dataclass(frozen=True, eq=False)
class CacheView:
    """How a graph stores the keys or values of one layer between runs."""

    past: str
    present: str
    module_path: str
    dtype: ir.DataType
    scheme: Scheme | None
    """None of floats."""
    bytes: int | None
    """For one position of one sequence, scales per token counted; None where shapes do not tell."""
    node: ir.Node

    @property
    def form(self) -> str:
        """The scheme in words, or the type of the floats."""
        return str(self.scheme or float_name(self.dtype))


def read_caches(model: ir.Model) -> Iterator[CacheView]:
    for site in caches_of(model):
        past = next((value for value in model.graph.inputs if value.name == site.name), None)
        if past is None or past.dtype is None:
            continue
        present = next((value for value in site.node.outputs if value.is_graph_output()), None)
        companions = [value for value in model.graph.inputs if _is_companion(value, past)]
        stored = site.bytes if isinstance(site, Cache) else _position_bytes(past)
        parts = [stored, *map(_position_bytes, companions)]
        yield CacheView(
            past=site.name, present=str(present.name) if present is not None else "", module_path=site.module_path,
            dtype=past.dtype, scheme=stored_cache(past), node=site.node,
            bytes=None if None in parts else sum(part for part in parts if part is not None),
        )  # fmt: skip


def _position_bytes(value: ir.Value) -> int | None:
    """Of one position of one sequence: heads and channels are numbers, batch and positions are not."""
    sizes = [size for size in (value.shape or ()) if isinstance(size, int)]
    if len(sizes) < 2 or value.dtype is None:
        return None
    return sizes[-1] * sizes[-2] * value.dtype.bitwidth // 8


def _is_companion(value: ir.Value, past: ir.Value) -> bool:
    return str(value.name) in (f"{past.name}_scale", f"{past.name}_offset")
