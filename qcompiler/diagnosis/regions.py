"""Cuts the layers of a quantized model out of it, each with what quantizes its inputs and weights.

    float       x ──────────────────────── MatMul ── Add ── y
    quantized   x ── QuantizeLinear ── … MatMulIntegerToFloat ── y           the nodes between x and y are a region

A region begins at values that the float model has, too, and ends at the layer's output. Fed with the float model's
values it gives what the layer alone would do to the model, whatever it consists of: Q/DQ pairs, functions, or one
kernel of ONNX Runtime. Values are the same by name; where an exporter or tool has renamed them, a layer's input and
output are found by the layer's module path.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from qcompiler.formats.scheme import Scheme
from qcompiler.graph.edit import constant
from qcompiler.graph.operators import has
from qcompiler.sites.analyses import sites_of
from qcompiler.sites.find import Convolution, Embedding, Linear, Site

MOST_NODES = 64
"""Nodes of a region; more of them are no longer one layer."""
Layer = Linear | Convolution | Embedding
STORED = "stored:"
"""Before the name of an input of the quantized model that the float model does not have: the codes of a past."""


@dataclass(frozen=True, eq=False)
class StoredCache(Site):
    """A KV-cache that the quantized model keeps as codes; `node` appends to it in the float model."""

    output: ir.Value
    """What has the cache's error in the float model: the present, or what attention makes of keys and values."""
    scheme: Scheme | None


@dataclass(frozen=True, eq=False)
class Region:
    """What stands for a layer of the float model in the quantized one."""

    site: Layer | StoredCache
    """In the float model."""
    output: ir.Value
    """In the quantized model; what `site.output` is in the float one."""
    nodes: tuple[ir.Node, ...]
    """Of the quantized model, those that compute constants included, in graph order."""
    inputs: Mapping[ir.Value, str]
    """What the region reads: values of the quantized model, and their names in the float model."""

    @property
    def name(self) -> str:
        return self.site.name

    @property
    def shared(self) -> dict[ir.Value, str]:
        """The inputs that both models have."""
        return {value: name for value, name in self.inputs.items() if not name.startswith(STORED)}


@dataclass(frozen=True)
class Unmatched:
    """A layer of the float model that was not found in the quantized one, and why."""

    name: str
    module_path: str
    reason: str


def find_regions(reference: ir.Model, candidate: ir.Model) -> tuple[list[Region], list[Unmatched]]:
    """The layers of the float model, in graph order, as the quantized model has them; both are canonicalized."""
    layers = [site for site in sites_of(reference) if isinstance(site, Layer)]
    flows = flowing(candidate.graph)
    pairs = _pairs(reference, candidate, layers, flows)
    by_original = {original: value for value, original in pairs.items()}
    order = {node: index for index, node in enumerate(candidate.graph)}
    found: list[Region] = []
    missing: list[Unmatched] = []
    for site in layers:
        output = by_original.get(str(site.output.name))
        region = (
            "the quantized model has no value of its output's name, and no layer of its module path"
            if output is None else region_of(site, output, pairs, flows, order)
        )  # fmt: skip
        if isinstance(region, str):
            missing.append(Unmatched(site.name, site.module_path, region))
        else:
            found.append(region)
    return found, missing


def flowing(graph: ir.Graph) -> set[ir.Value]:
    """The values that depend on what is fed."""
    found = {value for value in graph.inputs if value.name not in graph.initializers}
    for node in graph:
        has_body = any(
            attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
            for attribute in node.attributes.values()
        )
        if has_body or any(value in found for value in node.inputs if value is not None):
            found.update(node.outputs)
    return found


def same_values(reference: ir.Model, flows: set[ir.Value]) -> dict[ir.Value, str]:
    """Values of the candidate that the reference has by the same name, and that name."""
    mine = {str(value.name): value for value in flowing(reference.graph) if value.name}
    return {
        value: str(value.name)
        for value in flows if value.name in mine and _comparable(mine[str(value.name)], value)
    }  # fmt: skip


def _pairs(
    reference: ir.Model, candidate: ir.Model, layers: Sequence[Layer], flows: set[ir.Value]
) -> dict[ir.Value, str]:
    """Values of the candidate, and the names of the same values in the reference, the ends of layers included."""
    pairs = same_values(reference, flows)
    known = set(pairs.values())
    theirs = _by_path(sites_of(candidate))
    ours = Counter(site.module_path for site in layers)
    for site in layers:
        twin = theirs.get(site.module_path) if ours[site.module_path] == 1 else None
        if twin is None or site.output.name in known or twin.outputs[0] not in flows:
            continue
        pairs[_end(twin, site)] = str(site.output.name)
        source = _source(twin, 1 if isinstance(site, Embedding) else 0)
        begin = site.ids if isinstance(site, Embedding) else site.input
        if source is not None and source in flows and str(begin.name) not in known:
            pairs.setdefault(source, str(begin.name))
    return pairs


def _comparable(a: ir.Value, b: ir.Value) -> bool:
    if a.dtype is None or b.dtype is None or a.dtype == b.dtype:
        return True
    return a.dtype.is_floating_point() and b.dtype.is_floating_point() and min(a.dtype.bitwidth, b.dtype.bitwidth) > 8


def _by_path(sites: Iterable[Site]) -> dict[str, ir.Node]:
    """Nodes by module path, where that is their own."""
    sites = list(sites)
    count = Counter(site.module_path for site in sites)
    return {site.module_path: site.node for site in sites if count[site.module_path] == 1}


def _end(node: ir.Node, site: Layer) -> ir.Value:
    """What a node gives, after its bias and back in float."""
    value = node.outputs[0]
    for _ in range(2):
        uses = list(value.uses())
        after = uses[0].node if len(uses) == 1 and not value.is_graph_output() else None
        if after is None:
            return value
        added = after.op_type == "Add" and constant(after.inputs[1 - uses[0].idx]) is not None
        if (added and isinstance(site, Linear) and site.bias_node is not None) or (
            after.op_type == "DequantizeLinear" and node.op_type.startswith("Q")
        ):
            value = after.outputs[0]
    return value


def _source(node: ir.Node, index: int) -> ir.Value | None:
    """The value behind an input of a node, before it was quantized."""
    value = node.inputs[index]
    while value is not None:
        producer = value.producer()
        if producer is None or not _only_rounds(producer) or producer.inputs[0] is None:
            return value
        value = producer.inputs[0]
    return None


def _only_rounds(node: ir.Node) -> bool:
    """Whether a node gives what it reads, rounded or in another form."""
    return has(node, "quantizes") or has(node, "decodes") or node.op_type in ("Cast", "Reshape")


def region_of(
    site: Layer | StoredCache, output: ir.Value, pairs: Mapping[ir.Value, str], flows: set[ir.Value],
    order: Mapping[ir.Node, int],
) -> Region | str:  # fmt: skip
    """The nodes from values that both models have up to the output; a reason where that is no layer."""
    inside = {str(site.output.name), str(site.node.outputs[0].name)}
    nodes: set[ir.Node] = set()
    inputs: dict[ir.Value, str] = {}
    pending = [output]
    while pending:
        value = pending.pop()
        if value in pairs and pairs[value] not in inside:
            inputs[value] = pairs[value]
            continue
        producer = value.producer()
        if producer is None:
            if value in flows:
                return f"it reads the input {value.name!r} of the quantized model, which the float model does not have"
            continue
        if producer in nodes:
            continue
        if producer not in order or any(a.type in _BODIES for a in producer.attributes.values()):
            return f"it is computed by {producer.op_type} with a graph of its own"
        nodes.add(producer)
        if len(nodes) > MOST_NODES:
            return "no value near its input has the same name in both models"
        pending.extend(item for item in producer.inputs if item is not None)
    if not inputs:
        return "it reads no value that the float model has, too"
    return Region(site, output, tuple(sorted(nodes, key=order.__getitem__)), inputs)


_BODIES = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)


# ---------------------------------------------------------------------------------------------------- models of regions


@dataclass(frozen=True, eq=False)
class Cut:
    """Nodes to run apart: from `inputs` (in the graph, and the name to feed them by) to `outputs` (likewise)."""

    nodes: tuple[ir.Node, ...]
    inputs: Mapping[ir.Value, str]
    outputs: Mapping[ir.Value, str]


def model_of(cuts: Sequence[Cut], whole: ir.Model, types: Mapping[str, tuple[ir.DataType, int]]) -> ir.Model:
    """A model that computes all cuts apart from one another, and shares the tensors of the whole.

    `types` has element type and rank of what is fed, by name; the type that the graph knows goes first.
    """
    builder = _Builder(types)
    for number, cut in enumerate(cuts):
        builder.add(cut, f"{number}:")
    graph = ir.Graph(
        list(builder.inputs.values()), builder.outputs, nodes=builder.nodes,
        initializers=list(builder.constants.values()), opset_imports=dict(whole.opset_imports), name="regions",
    )  # fmt: skip
    return ir.Model(graph, ir_version=whole.ir_version, functions=list(whole.functions.values()))


class _Builder:
    def __init__(self, types: Mapping[str, tuple[ir.DataType, int]]) -> None:
        self._types = types
        self.inputs: dict[str, ir.Value] = {}
        self.outputs: list[ir.Value] = []
        self.nodes: list[ir.Node] = []
        self.constants: dict[ir.Value, ir.Value] = {}

    def add(self, cut: Cut, prefix: str) -> None:
        made = {value: self._input(name, value) for value, name in cut.inputs.items()}
        for node in cut.nodes:
            inputs = [None if value is None else made.get(value) or self._constant(value) for value in node.inputs]
            outputs = [
                ir.Value(name=f"{prefix}{value.name}" if value.name else "", type=value.type, shape=None)
                for value in node.outputs
            ]
            made.update(zip(node.outputs, outputs, strict=True))
            self.nodes.append(
                ir.Node(node.domain, node.op_type, inputs, list(node.attributes.values()), overload=node.overload,
                        outputs=outputs, name=f"{prefix}{node.name}")
            )  # fmt: skip
        for value, name in cut.outputs.items():
            output = made[value]
            if value in cut.inputs:
                raise ValueError(f"{value.name!r} is read, not computed")
            output.name = name
            self.outputs.append(output)

    def _input(self, name: str, like: ir.Value) -> ir.Value:
        if name not in self.inputs:
            dtype, rank = self._types[name]
            self.inputs[name] = ir.Value(
                name=name, type=ir.TensorType(like.dtype or dtype), shape=ir.Shape([None] * rank)
            )
        return self.inputs[name]

    def _constant(self, value: ir.Value) -> ir.Value:
        if value not in self.constants:
            self.constants[value] = ir.Value(
                name=value.name, type=value.type, shape=value.shape, const_value=value.const_value
            )
        return self.constants[value]
