"""What is in a model: its layers, how their weights are stored, and what those look like."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

import onnx_ir as ir

from qcompiler.formats.scheme import Scheme
from qcompiler.graph.edit import constant
from qcompiler.graph.module_path import block_of, module_path
from qcompiler.graph.operators import has
from qcompiler.inspection.weights import WeightStatistics, statistics_of
from qcompiler.sites.activations import operand_activation
from qcompiler.sites.analyses import sites_of
from qcompiler.sites.embeddings import QuantizedEmbedding, find_quantized_embeddings
from qcompiler.sites.find import Convolution, Embedding, Linear, Site
from qcompiler.sites.stored import StoredWeight, float_weight, quantized_weight, table_weight
from qcompiler.sites.stored.kernels import reads_weight


@dataclass(frozen=True)
class InspectedLayer:
    """A node with a weight of its own."""

    name: str
    module_path: str
    block: str
    op: str
    """The operator that computes it."""
    type: str
    """Of the weight: float32, or the codes' format."""
    scheme: str
    """How the weight is quantized; empty where it is float."""
    activations: str
    """How its input is quantized; empty where it is float, or rounded inside of the operator."""
    shape: tuple[int, ...]
    """Of the weight, as the node that decodes or multiplies it reads it; of packed codes, of what they stand for."""
    bytes: int
    """Weight, scales and zero points; a tied weight counts for each of its layers."""
    weight: str
    """The name of the constant."""
    shared: bool
    """Whether another layer reads the same constant."""
    note: str
    """Why no pass quantizes it, where that is so."""
    statistics: WeightStatistics | None
    weight_scheme: Scheme | None = None
    """`scheme` as data."""
    activation_scheme: Scheme | None = None
    """`activations` as data."""


def layers_of(model: ir.Model, *, statistics: bool = True) -> list[InspectedLayer]:
    """The layers of a canonicalized model, in graph order: what passes work on, and what is quantized already."""
    sites: dict[ir.Node, Site] = {site.gather: site for site in find_quantized_embeddings(model)}
    sites.update((site.node, site) for site in sites_of(model))
    found: list[InspectedLayer] = []
    computed: dict[ir.Value, WeightStatistics | None] = {}
    for node in model.graph.all_nodes():
        site = sites.get(node)
        weight = _weight(node, site)
        if weight is not None:
            found.append(_layer(node, site, weight, statistics, computed))
        elif site is not None:
            found.append(_unsupported(site))
    count = Counter(layer.weight for layer in found if layer.weight)
    return [_with_shared(layer, count[layer.weight] > 1) for layer in found]


def _weight(node: ir.Node, site: Site | None) -> StoredWeight | None:
    """What a node multiplies by or gathers, directly or through what decodes it."""
    if isinstance(site, Linear | Convolution):
        return quantized_weight(site.dequantize) if site.dequantize is not None else float_weight(site.weight)
    if isinstance(site, Embedding):
        return float_weight(site.table)
    if isinstance(site, QuantizedEmbedding):
        return table_weight(site)
    # What decodes a weight is told with the layer that reads it.
    return quantized_weight(node) if reads_weight(node) else None


def _layer(
    node: ir.Node, site: Site | None, weight: StoredWeight, statistics: bool,
    computed: dict[ir.Value, WeightStatistics | None],
) -> InspectedLayer:  # fmt: skip
    path = site.module_path if site is not None else module_path(node)
    stored = weight.constants[0]
    if statistics and stored not in computed:
        computed[stored] = statistics_of(weight)
    activation = operand_activation(node).scheme if has(node, "product") else None
    return InspectedLayer(
        name=site.name if site is not None else node.name or "", module_path=path, block=block_of(path),
        op=node.op_type, type=weight.format, scheme=str(weight.scheme or ""),
        activations=str(activation or ""), shape=weight.shape, bytes=weight.bytes,
        weight=str(stored.name), shared=False, note="", statistics=computed.get(stored),
        weight_scheme=weight.scheme, activation_scheme=activation,
    )  # fmt: skip


def _unsupported(site: Site) -> InspectedLayer:
    tensors = [(value, tensor) for value in site.node.inputs if (tensor := constant(value)) is not None]
    value, tensor = max(tensors, key=lambda pair: pair[1].nbytes, default=(None, None))
    return InspectedLayer(
        name=site.name, module_path=site.module_path, block=site.block, op=site.node.op_type,
        type=tensor.dtype.name.lower() if tensor is not None else "", scheme="", activations="",
        shape=tuple(int(size) for size in tensor.shape.numpy()) if tensor is not None else (),
        bytes=sum(tensor.nbytes for _, tensor in tensors), weight=str(value.name) if value is not None else "",
        shared=False, note=getattr(site, "reason", ""), statistics=None,
    )  # fmt: skip


def _with_shared(layer: InspectedLayer, shared: bool) -> InspectedLayer:
    return replace(layer, shared=True) if shared else layer
