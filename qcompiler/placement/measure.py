"""Asks a session of ONNX Runtime where it runs each node of a compiled model."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path

import onnx_ir as ir

from qcompiler import model_io
from qcompiler.errors import ModelError
from qcompiler.placement.placed import Copy, PlacedNode, Placement
from qcompiler.runtime import one_line, session_options_of
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
    import onnxruntime as ort

    if target.providers[0] not in ort.get_available_providers():
        return None
    file = model_io.find_model(folder)
    recorded = session_options_of(model_io.load(file))
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
    roles = {node.name: node for node in predicted.nodes} if predicted is not None else {}
    nodes = [
        _placed(node.name, node.domain, node.op_type, part.ep_name, target, roles)
        for part in session.get_provider_graph_assignment_info() for node in part.get_nodes()
    ]  # fmt: skip
    return Placement(True, f"onnxruntime {ort.__version__}, {target.providers[0]}", tuple(nodes), copies)


def _placed(
    name: str, domain: str, op: str, provider: str, target: Target, predicted: dict[str, PlacedNode]
) -> PlacedNode:
    where = provider.removesuffix("ExecutionProvider")
    shown = f"{domain}::{op}" if domain not in ("", "ai.onnx") else op
    if provider == target.providers[0] or provider != CPU:
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
