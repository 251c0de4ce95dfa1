"""Which inputs and outputs of a provider's kernels lie in host memory, asked of the provider itself.

The registry does not say it. But ONNX Runtime inserts a copy wherever a value is read on the other side than where it
is, so a model of one node tells: each input is also read, and each output is read, by a node that works in the device's
memory, and what is copied is what the kernel wants, or leaves, in the host's.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcompiler.graph.runtime_library import onnxruntime as onnxruntime_library
from qcompiler.targets.kernels import CPU, RegisteredKernel

if TYPE_CHECKING:
    import onnx

Memory = tuple[tuple[int, ...], tuple[int, ...]]
"""Inputs that a kernel reads from host memory, and outputs that it leaves there."""
VALUES = {"INT": 1, "FLOAT": 1.0, "STRING": "x", "INTS": [1], "FLOATS": [1.0], "STRINGS": ["x"]}


@dataclass(frozen=True)
class _Probe:
    """A model of one node, and how many of its inputs and outputs it watches."""

    model: onnx.ModelProto
    inputs: int


def host_memory(kernels: Iterable[RegisteredKernel]) -> dict[tuple[str, str, int], Memory]:
    """By (domain, operator, since); nothing where all lies in the device's memory.

    An operator that cannot be made without knowing more of it (one with a subgraph, say) is taken to be of that kind.
    """
    schemas = _schemas()
    found: dict[tuple[str, str, int], Memory] = {}
    done = set()
    for kernel in kernels:
        key = (kernel.domain, kernel.op, kernel.since)
        if key in done:
            continue
        for probe in _probes(kernel, schemas.get((kernel.domain, kernel.op), {})):
            copied = _copies(probe.model, kernel.provider)
            if copied is None:
                continue
            done.add(key)
            inputs = tuple(at for at in range(probe.inputs) if f"i{at}" in copied)
            outputs = tuple(at for at in range(len(probe.model.graph.node[0].output)) if f"o{at}" in copied)
            if inputs or outputs:
                found[key] = inputs, outputs
            break
    return found


def _schemas() -> dict[tuple[str, str], dict[int, Any]]:
    from onnxruntime.capi import _pybind_state

    found: dict[tuple[str, str], dict[int, Any]] = {}
    for schema in _pybind_state.get_all_operator_schema():
        domain = "" if schema.domain == "ai.onnx" else schema.domain
        found.setdefault((domain, schema.name), {})[schema.since_version] = schema
    return found


def _probes(kernel: RegisteredKernel, schemas: dict[int, Any]) -> Iterator[_Probe]:
    """From all inputs and outputs down to those that must be there, until ONNX Runtime makes the node."""
    versions = [v for v in schemas if kernel.since <= v <= (kernel.until or kernel.since)]
    if not versions:
        return
    schema = schemas[max(versions)]
    inputs, outputs = len(schema.inputs), len(schema.outputs)
    least = min(schema.min_input or 1, inputs)
    for count in dict.fromkeys((inputs, least)):
        for watched in dict.fromkeys((outputs, 1, 0)):
            model = _model(kernel, schema, max(versions), count, watched)
            if model is not None:
                yield _Probe(model, count)


def _model(kernel: RegisteredKernel, schema: Any, version: int, inputs: int, watched: int) -> onnx.ModelProto | None:
    """The node with so many inputs; so many of its outputs are watched. None where a type is not a tensor's."""
    from onnx import TensorProto, helper

    def element(parameter: Any) -> int | None:
        allowed = dict(kernel.types).get(parameter.typeStr) or next(
            (c.allowed_type_strs for c in schema.type_constraints if c.type_param_str == parameter.typeStr),
            [parameter.typeStr],
        )
        name = allowed[0].removeprefix("tensor(").removesuffix(")").upper()
        return getattr(TensorProto, name, None)

    types = [element(parameter) for parameter in schema.inputs[:inputs]]
    watched_types = [element(parameter) for parameter in schema.outputs[:watched]]
    if None in types or None in watched_types:
        return None
    attributes = {
        name: VALUES.get(str(attribute.type).rsplit(".", 1)[-1])
        for name, attribute in schema.attributes.items() if attribute.required
    }  # fmt: skip
    if kernel.op == "Cast":
        attributes["to"] = watched_types[0] if watched_types else TensorProto.FLOAT
    if None in attributes.values():
        return None
    names = [f"i{at}" for at in range(inputs)]
    made = [f"o{at}" for at in range(max(watched, 1))]
    nodes = [helper.make_node(kernel.op, names, made, domain=kernel.domain, **attributes)]
    given = [helper.make_tensor_value_info(name, kind, None) for name, kind in zip(names, types, strict=True)]
    for name in names:
        nodes.append(helper.make_node("Identity", [name], [f"{name}_read"]))
    for at, kind in enumerate(watched_types):
        # Beside a value of the device, as a node that reads nothing but the host's would run there itself.
        given.append(helper.make_tensor_value_info(f"d{at}", kind, None))
        nodes.append(helper.make_node("Identity", [f"d{at}"], [f"d{at}_read"]))
        nodes.append(helper.make_node("Concat", [f"o{at}", f"d{at}_read"], [f"o{at}_read"], axis=0))
    results = [helper.make_empty_tensor_value_info(node.output[0]) for node in nodes[1:]]
    results += [helper.make_empty_tensor_value_info(name) for name in made[watched:]]
    graph = helper.make_graph(nodes, "probe", given, results)
    # The nodes around are as old as the probed one, or new enough to take every type.
    opsets = [helper.make_opsetid("", version if not kernel.domain else 21)]
    opsets += [helper.make_opsetid(kernel.domain, version)] if kernel.domain else []
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def _copies(model: onnx.ModelProto, provider: str) -> set[str] | None:
    """The values that ONNX Runtime copies between host and device; None where it does not place the node there."""
    import onnx

    ort = onnxruntime_library()

    with tempfile.TemporaryDirectory() as folder:
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.optimized_model_filepath = str(Path(folder) / "placed.onnx")
        try:
            ort.InferenceSession(model.SerializeToString(), options, providers=[provider, CPU])
        except Exception:  # the kernel may want other attributes; what was placed has been written before it was made
            if not Path(options.optimized_model_filepath).exists():
                return None
        placed = onnx.load(options.optimized_model_filepath)
    copied = {node.input[0] for node in placed.graph.node if node.op_type.startswith("Memcpy")}
    inputs = {name for name in model.graph.node[0].input if name}
    # A node on the CPU has all its inputs copied, and its outputs, too.
    return None if inputs and inputs <= copied and "o0" in copied else copied
