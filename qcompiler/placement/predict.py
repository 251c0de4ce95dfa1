"""Predicts by the kernel tables alone, without a GPU, which provider runs each node of a model.

ONNX Runtime asks its providers in order; each takes the nodes that it has kernels for. The CUDA provider then gives
back what is cheaper on the CPU: starting at values that its own kernels leave in host memory (shapes), each node whose
every operand is such a value, an input of the graph or a constant of up to 100 elements, unless one has 16 bits or less
of floating point (GetCpuPreferredNodes in ONNX Runtime's fallback_cpu_capability.cc). Last, a copy is inserted for each
value that is read on the other side than where it is (transformer_memcpy.cc).
"""

from __future__ import annotations

import heapq
import math
from collections import defaultdict
from dataclasses import dataclass, field

import onnx_ir as ir

from qcompiler.graph.edit import constant
from qcompiler.graph.operators import has
from qcompiler.placement.lookup import Kernels, operator
from qcompiler.placement.placed import Copy, PlacedNode, Placement, Role
from qcompiler.placement.prepared import prepared
from qcompiler.placement.rules import Path, path_of
from qcompiler.targets import FOLDER, Target
from qcompiler.targets.kernels import CPU, CPU_TABLE, RegisteredKernel, read

SMALL = 100  # elements of a constant that goes to the CPU with its reader
STAYS = {ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.FLOAT8E4M3FN, ir.DataType.FLOAT8E4M3FNUZ,
         ir.DataType.FLOAT8E5M2, ir.DataType.FLOAT8E5M2FNUZ}  # fmt: skip
NOT_FOLDED = ("DequantizeLinear", "QuantizeLinear")


@dataclass
class _Placing:
    """What is found out about the nodes of one graph on the way."""

    kernels: dict[ir.Node, RegisteredKernel] = field(default_factory=dict)
    """Of the nodes that the first provider can run."""
    elsewhere: dict[ir.Node, tuple[Role, str]] = field(default_factory=dict)
    """Of those that it does not run: role and reason."""
    expanded: set[ir.Node] = field(default_factory=set)
    """Of the nodes in `kernels`: those without one, of whose parts the first provider is taken to run all."""
    paths: dict[ir.Node, Path] = field(default_factory=dict)
    """Of the nodes that a rule of the target is about."""
    skipped: set[ir.Node] = field(default_factory=set)
    """Constants, and what the runtime computes once."""


def predict(model: ir.Model, target: Target, *, optimized: bool = True) -> Placement | None:
    """Where the nodes of a lowered model will run; None for a target without a kernel table.

    `optimized` leaves out what the runtime's optimizers compute once, or take out. Nodes that they fuse are told as
    they stand in the model, and model-local functions as what they consist of. A node without a name is told by its
    operator and first output.
    """
    if not target.registry:
        return None
    model = prepared(model, optimized=optimized)
    kernels = Kernels(read(FOLDER / target.registry), model.opset_imports)
    provider, accelerated = _short(target.providers[0]), target.providers[0] != CPU
    cpu = Kernels(read(CPU_TABLE), model.opset_imports) if accelerated else kernels
    nodes: list[PlacedNode] = []
    copies: list[Copy] = []
    for graph in (model.graph, *_subgraphs(model.graph)):
        placing = _place(graph, kernels, cpu, target, optimized)
        for node in graph:
            if node in placing.skipped:
                continue
            role, reason = placing.elsewhere.get(node, ("expanded" if node in placing.expanded else "", ""))
            if role == "" and (path := placing.paths.get(node)) is not None and path.fails:
                role, reason = "fails", path.text()
            where = {"": provider, "fails": provider, "expanded": provider, "none": ""}.get(role, _short(CPU))
            nodes.append(PlacedNode(node.name or "", operator(node), where, role, reason))
        if accelerated:
            copies += _copies(graph, placing)
    return Placement(False, kernels.runtime, tuple(nodes), tuple(copies))


def _short(provider: str) -> str:
    return provider.removesuffix("ExecutionProvider")


def _subgraphs(graph: ir.Graph) -> list[ir.Graph]:
    found = []
    for node in graph.all_nodes():
        for attribute in node.attributes.values():
            if isinstance(attribute, ir.Attr) and attribute.type == ir.AttributeType.GRAPH:
                found.append(attribute.as_graph())
            elif isinstance(attribute, ir.Attr) and attribute.type == ir.AttributeType.GRAPHS:
                found.extend(attribute.as_graphs())
    return found


def _place(graph: ir.Graph, first: Kernels, cpu: Kernels, target: Target, optimized: bool) -> _Placing:
    placing = _Placing(skipped=_folded(graph, optimized))
    for node in graph:
        if node in placing.skipped:
            continue
        kernel, path = first.find(node, widened=first is cpu), path_of(node, target)
        if path is not None:
            placing.paths[node] = path
        declined = path is not None and path.unmet and path.rule.effect == "declined"
        if kernel is not None and not declined:
            placing.kernels[node] = kernel
            continue
        if kernel is None and first.is_defined_by_others(node) and cpu.find(node, widened=True) is None:
            placing.expanded.add(node)
            placing.kernels[node] = RegisteredKernel("", node.op_type, "", 1, None, ())
            continue
        reason = path.text() if path is not None and declined else first.obstacle(node)
        known = first is not cpu and cpu.find(node, widened=True)
        placing.elsewhere[node] = "fallback" if known else "none", reason
    _prefer_cpu(graph, placing)
    return placing


def _folded(graph: ir.Graph, optimized: bool) -> set[ir.Node]:
    """Nodes that give constants: Constant itself and, where the runtime optimizes, all that it computes beforehand."""
    folded: set[ir.Node] = set()
    for node in graph:
        if node.op_type == "Constant" or (optimized and _is_computed_once(node, folded)):
            folded.add(node)
    return folded


def _is_computed_once(node: ir.Node, folded: set[ir.Node]) -> bool:
    """Whether a node reads constants alone, or only the shape of a value whose shape is known."""
    measured = node.inputs[0] if node.op_type == "Shape" else None
    if measured is not None and measured.shape is not None and measured.shape.is_static():
        return True
    if (
        node.op_type in NOT_FOLDED
        or has(node, "random")
        or any(
            attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
            for attribute in node.attributes.values()
        )
    ):
        return False
    return all(
        value is None or value.producer() in folded or (value.producer() is None and value.const_value is not None)
        for value in node.inputs
    )


def _prefer_cpu(graph: ir.Graph, placing: _Placing) -> None:
    """Move to the CPU what works on values that are there already."""
    order = {node: index for index, node in enumerate(graph)}
    nodes = list(order)
    origin: dict[ir.Value, str] = {}  # values in host memory, and the node that fell back and gave rise to them
    waiting: list[int] = []

    def reached(value: ir.Value, fallen: str) -> None:
        origin[value] = fallen
        for reader in value.consumers():
            if reader in order and reader not in placing.skipped:
                heapq.heappush(waiting, order[reader])

    for node, kernel in placing.kernels.items():
        for index in kernel.host_outputs:
            if index < len(node.outputs):
                reached(node.outputs[index], "")
    visited: set[int] = set()
    while waiting:
        index = heapq.heappop(waiting)
        if index in visited:
            continue
        visited.add(index)
        node = nodes[index]
        found = placing.kernels.get(node)
        if found is None:
            for value in node.outputs:
                reached(value, node.name or "")
        elif all(_on_host(value, at, found, origin, placing.skipped) for at, value in enumerate(node.inputs)):
            fallen = next((origin[value] for value in node.inputs if value is not None and origin.get(value)), "")
            placing.elsewhere[node] = ("follows", fallen) if fallen else ("shape", "")
            for value in node.outputs:
                reached(value, fallen)


def _on_host(
    value: ir.Value | None, index: int, kernel: RegisteredKernel, origin: dict[ir.Value, str], folded: set[ir.Node]
) -> bool:
    """Whether an operand lets its reader go to the CPU."""
    if value is None or value.dtype in STAYS:
        return False
    if value.is_graph_input() or _is_small(value, folded):
        return True
    return value in origin and index not in kernel.host_inputs


def _is_small(value: ir.Value, folded: set[ir.Node]) -> bool:
    """Whether a value is a small constant; one of unknown size, as they stand in functions, is taken to be."""
    tensor = constant(value)
    if tensor is not None:
        return tensor.size <= SMALL
    if value.producer() not in folded:
        return False
    if value.shape is None:
        tensor = ir.convenience.get_const_tensor(value)
        return tensor is None or tensor.size <= SMALL
    return value.shape.is_static() and math.prod(value.shape.numpy()) <= SMALL


def _copies(graph: ir.Graph, placing: _Placing) -> list[Copy]:
    """A copy for each value that is read on the other side than where it is; constants are stored on both sides."""
    readers: dict[ir.Value, dict[str, list[tuple[ir.Node, int]]]] = defaultdict(lambda: defaultdict(list))
    for node in graph:
        if node in placing.skipped:
            continue
        for index, value in enumerate(node.inputs):
            if value is not None:
                readers[value][_side(node, index, placing, "host_inputs")].append((node, index))
    copies = []
    for value, by_side in readers.items():
        producer = value.producer()
        if producer is None and value.is_graph_input() and value.const_value is None:
            if len(by_side) == 2:
                copies.append(Copy(value.name or "", "device"))
        elif producer is not None and producer.graph is graph and producer not in placing.skipped:
            side = _side(producer, value.index() or 0, placing, "host_outputs")
            if side == "host" and "device" in by_side:
                copies.append(Copy(value.name or "", "device"))
            elif side == "device" and "host" in by_side:
                copies.append(Copy(value.name or "", "host", _to_host(value, by_side["host"], placing)))
    return copies


def _side(node: ir.Node, index: int, placing: _Placing, memory: str) -> str:
    if node in placing.elsewhere:
        return "host"
    return "host" if index in getattr(placing.kernels[node], memory) else "device"


def _to_host(value: ir.Value, readers: list[tuple[ir.Node, int]], placing: _Placing) -> str:
    """The warning for a copy to the host that no node on the CPU is the reason of."""
    for node, index in readers:
        if node not in placing.elsewhere:
            return (
                f"{value.name} is computed on the GPU and read from host memory by {node.name} ({operator(node)}, "
                f"input {index}), so each run copies it and waits for it"
            )
    return ""
