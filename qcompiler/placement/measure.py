"""Asks a session of ONNX Runtime where it runs each node of a compiled model."""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import onnx_ir as ir

from qcompiler.errors import ModelError
from qcompiler.graph import files as model_io
from qcompiler.graph.runtime_library import onnxruntime as onnxruntime_library
from qcompiler.placement.placed import Copy, PlacedNode, Placement
from qcompiler.sessions.runtime import one_line, session_options_of
from qcompiler.sites.canonicalize import name_everything
from qcompiler.targets import Target
from qcompiler.targets.kernels import CPU

SHAPE_ARITHMETIC = {
    "Add", "And", "Cast", "Concat", "ConstantOfShape", "Div", "Equal", "Expand", "Gather", "GreaterOrEqual", "Identity",
    "LessOrEqual", "Max", "Min", "Mod", "Mul", "Neg", "Not", "Or", "Range", "ReduceProd", "Reshape", "Shape", "Size",
    "Slice", "Squeeze", "Sub", "Unsqueeze", "Where",
}  # fmt: skip


def measure(
    folder: str | Path, target: Target, *, predicted: Placement | None = None, optimized: bool = True
) -> Placement | None:
    """The placement that a session decides on; None where this onnxruntime does not start the target's first provider.

    What a node on the CPU is there for is taken from `predicted`, where that knows the node. Without `optimized` the
    runtime changes nothing before it places the nodes. Raises ModelError where a session cannot be made.
    """
    ort = onnxruntime_library()

    if target.providers[0] not in ort.get_available_providers():
        return None
    file = model_io.find_model(folder)
    model = model_io.load(file)
    recorded = session_options_of(model)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    if not optimized:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    for key, value in (recorded.config_entries | {"session.record_ep_graph_assignment_info": "1"}).items():
        options.add_session_config_entry(key, value)
    with tempfile.TemporaryDirectory() as scratch:
        options.optimized_model_filepath = str(Path(scratch) / "placed.onnx")
        try:
            session = ort.InferenceSession(
                str(file), options, providers=list(target.providers),
                disabled_optimizers=list(recorded.disabled_optimizers),
            )  # fmt: skip
        except Exception as error:  # onnxruntime's errors share no base class
            raise ModelError(f"onnxruntime cannot open {file}: {one_line(error)}") from error
        if target.providers[0] not in session.get_providers():
            return None
        placed = ir.load(options.optimized_model_filepath)  # whose weights, outside the file, are not looked at
        copies = tuple(_copies(placed))
    found = [
        (node.name, f"{node.domain}::{node.op_type}" if node.domain not in ("", "ai.onnx") else node.op_type,
         part.ep_name.removesuffix("ExecutionProvider"))
        for part in session.get_provider_graph_assignment_info() for node in part.get_nodes()
    ]  # fmt: skip
    if predicted is not None:
        found = _named(found, predicted, _unnamed(model))
    roles = {node.name: node for node in predicted.nodes} if predicted is not None else {}
    nodes = tuple(_placed(name, shown, where, target, roles) for name, shown, where in found)
    return Placement(True, f"onnxruntime {ort.__version__}, {target.providers[0]}", nodes, copies)


def _unnamed(model: ir.Model) -> tuple[str, ...]:
    """With what the names begin that a prediction gives to nodes that have none in the file."""
    found = [f"{function.name}/" for function in model.functions.values() if any(not node.name for node in function)]
    nodes = [node for node in model.graph.all_nodes() if not node.name]
    name_everything(model.graph)
    return (*found, *(str(node.name) for node in nodes))


def _named(
    found: list[tuple[str, str, str]], predicted: Placement, unnamed: tuple[str, ...]
) -> list[tuple[str, str, str]]:
    """Nodes (name, operator, provider) that have no name get that of one in the prediction.

    Of the same operator, those come first that are predicted to be where the node is.
    """
    named = {index: name for index, (name, _, _) in enumerate(found) if name}
    free: dict[str, list[PlacedNode]] = defaultdict(list)
    for node in predicted.nodes:
        if node.name.startswith(unnamed):
            free[node.op].append(node)
    for wanted in (lambda node, where: node.provider == where, lambda node, where: True):
        for index, (_, shown, where) in enumerate(found):
            if index not in named:
                match = next((node for node in free[shown] if wanted(node, where)), None)
                if match is not None:
                    free[shown].remove(match)
                    named[index] = match.name
    return [(named.get(index, name), shown, where) for index, (name, shown, where) in enumerate(found)]


def _placed(name: str, shown: str, where: str, target: Target, predicted: dict[str, PlacedNode]) -> PlacedNode:
    if where == target.providers[0].removesuffix("ExecutionProvider") or where != CPU.removesuffix("ExecutionProvider"):
        return PlacedNode(name, shown, where)
    known = predicted.get(name)
    if known is not None and known.provider == where:
        return PlacedNode(name, shown, where, known.role, known.reason)
    if shown in SHAPE_ARITHMETIC:
        return PlacedNode(name, shown, where, "shape")
    return PlacedNode(name, shown, where, "fallback", "ONNX Runtime placed it there")


def _copies(placed: ir.Model) -> Iterable[Copy]:
    for node in placed.graph.all_nodes():
        if node.op_type in ("MemcpyFromHost", "MemcpyToHost"):
            value = node.inputs[0]
            to = "device" if node.op_type == "MemcpyFromHost" else "host"
            yield Copy(value.name or "" if value is not None else "", to)  # type: ignore[arg-type]
