"""Is a graph well-formed? Run after every pass, so that a broken rewrite is caught where it was made."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import onnx
import onnx_ir as ir

from qcompiler.errors import PassError
from qcompiler.graph.definitions import RUNTIME_OPERATORS
from qcompiler.graph.walk import all_nodes, bodies

CHECKED_BYTES = 1024
"""Constants up to this size are shown to ONNX's checker."""


_CHECKED = "qcompiler.checked"  # in the graph's `meta`, which is never saved
_Said = tuple[Any, ...]


@dataclass(frozen=True)
class _Checked:
    """What was found to be well-formed, so that only what has changed since is looked at again."""

    surroundings: _Said
    """What every node depends on."""
    nodes: Mapping[ir.Node, _Said]
    constants: Mapping[str, ir.TensorProtocol]
    """Those that ONNX's checker was shown."""


def check_structure(model: ir.Model) -> None:
    """Raise PassError, which names the node, unless the model is well-formed.

    Names are there and unique, nodes read only what comes before them, declared types agree with each other and with
    what the operators take, and ONNX's own checker is content. The latter two are asked of what is not as it was when
    the model was last checked. The model is not changed and no weights are read.
    """
    _check_graph(model.graph, (), ())
    now = _Checked(_surroundings(model), {node: _said(node) for node in model.graph}, dict(_small_constants(model)))
    before = model.graph.meta.get(_CHECKED)
    if not isinstance(before, _Checked) or before.surroundings != now.surroundings:
        before = _Checked((), {}, {})
    nodes = [node for node, said in now.nodes.items() if before.nodes.get(node) != said]
    constants = {name: held for name, held in now.constants.items() if before.constants.get(name) is not held}
    for node in nodes:
        _check_node(node, model)
        for body in bodies(node):
            for inner in all_nodes(body):
                _check_node(inner, model)
    if nodes or constants or model.functions:
        try:
            onnx.checker.check_model(_proto(model, nodes, constants, _read_from_outside(nodes, model.graph.outputs)))
        except onnx.checker.ValidationError as error:
            raise PassError(f"onnx's checker refuses the model: {_first_line(error)}") from error
    model.graph.meta[_CHECKED] = now


def forget_checked(model: ir.Model) -> None:
    """Let go of what a model was when it was checked last, and so of nodes and constants that are no longer in it."""
    model.graph.meta.pop(_CHECKED, None)


def _surroundings(model: ir.Model) -> _Said:
    ends = [(value, value.name, value.type, value.shape) for value in (*model.graph.inputs, *model.graph.outputs)]
    return model.ir_version, dict(model.opset_imports), frozenset(model.functions), model.graph.name, ends


def _said(node: ir.Node) -> _Said:
    """What the checks of a node depend on."""
    said = (
        node.name, node.op_type, node.domain, node.overload, node.inputs, *map(_named_and_typed, node.inputs),
        *map(_named_and_typed, node.outputs),
    )  # fmt: skip
    return (*said, *node.attributes.data.values(), *map(_body_said, bodies(node))) if node.attributes.data else said


def _body_said(body: ir.Graph) -> _Said:
    held = [(name, value.const_value) for name, value in body.initializers.items()]
    ends = [(value, *_named_and_typed(value), value.shape) for value in (*body.inputs, *body.outputs)]
    return body.name, ends, held, [(node, *_said(node)) for node in body]


def _named_and_typed(value: ir.Value | None) -> _Said:
    if value is None:
        return ()
    kind = value.type
    return value.name, type(kind), None if kind is None else kind.dtype


def _small_constants(model: ir.Model) -> Iterator[tuple[str, ir.TensorProtocol]]:
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if isinstance(tensor, ir.Tensor) and tensor.nbytes <= CHECKED_BYTES:
            yield name, tensor


def without_weights(model: ir.Model) -> onnx.ModelProto:
    """The model with its larger constants as inputs, so that who checks it reads no weights and looks for no files.

    Those of bodies of If and Loop, too: a body may read what the main graph is given.
    """
    small = dict(_small_constants(model))
    held = [name for name, value in model.graph.initializers.items() if value.const_value is not None]
    return _proto(model, model.graph, small, (name for name in held if name not in small))


def _proto(
    model: ir.Model, nodes: Iterable[ir.Node], constants: Mapping[str, ir.TensorProtocol], given: Iterable[str]
) -> onnx.ModelProto:  # fmt: skip
    """Nodes and constants of a model as a model, without what is known of the values between; `given` become inputs."""
    proto = onnx.ModelProto(ir_version=model.ir_version)
    for domain, version in {"com.microsoft": 1, **model.opset_imports}.items():
        proto.opset_import.add(domain=domain, version=version)
    graph = proto.graph
    graph.name = model.graph.name or ""
    for value in model.graph.inputs:
        ir.serde.serialize_value_into(graph.input.add(), value)
    for name, tensor in constants.items():
        ir.serde.serialize_tensor_into(graph.initializer.add(), tensor)
        graph.initializer[-1].name = name
    for value in model.graph.outputs:
        ir.serde.serialize_value_into(graph.output.add(), value)
    for node in nodes:
        ir.serde.serialize_node_into(graph.node.add(), node)
    for function in model.functions.values():
        proto.functions.append(ir.serde.serialize_function(function))
    taken: set[str] = set()
    _pass_over(graph, taken)
    known = {value.name for value in model.graph.inputs} | constants.keys()
    for name in dict.fromkeys((*given, *sorted(taken))):
        if name not in known:
            graph.input.add(name=name).CopyFrom(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ()))
    return proto


def _read_from_outside(nodes: Iterable[ir.Node], outputs: Iterable[ir.Value]) -> list[str]:
    """The names of outputs, and of values that some nodes of a graph read, that none of them, nor their bodies, has."""
    read: dict[ir.Value | None, None] = dict.fromkeys(outputs)
    own: set[ir.Value] = set()
    for top in nodes:
        for node in (top, *(inner for body in bodies(top) for inner in all_nodes(body))):
            read.update(dict.fromkeys(node.inputs))
            own.update(node.outputs)
            for body in bodies(node):
                read.update(dict.fromkeys(body.outputs))
                own.update((*body.inputs, *body.initializers.values()))
    return [value.name for value in read if value is not None and value not in own and value.name]


def _pass_over(graph: onnx.GraphProto, taken: set[str]) -> None:
    """Move the runtime's operators to a domain that the checker does not look at, and take large constants out of
    bodies; their names are `taken`."""
    for node in graph.node:
        if node.domain == "" and node.op_type in RUNTIME_OPERATORS:
            node.domain = "com.microsoft"
        for attribute in node.attribute:
            for body in (*([attribute.g] if attribute.HasField("g") else ()), *attribute.graphs):
                _pass_over(body, taken)
                small = [tensor for tensor in body.initializer if not _is_large(tensor)]
                if len(small) < len(body.initializer):
                    taken.update(tensor.name for tensor in body.initializer if _is_large(tensor))
                    del body.initializer[:]
                    body.initializer.extend(small)


def _is_large(tensor: onnx.TensorProto) -> bool:
    return bool(tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.ByteSize() > CHECKED_BYTES)


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _check_graph(graph: ir.Graph, outer: tuple[set[ir.Value], ...], outer_names: tuple[set[str | None], ...]) -> None:
    """Names and order within a graph and, with what they see from outside, the bodies of its nodes."""
    own = set(graph.inputs) | set(graph.initializers.values())
    names: set[str | None] = set()
    visible, taken = (own, *outer), (names, *outer_names)
    for given in (*graph.inputs, *(item for item in graph.initializers.values() if not item.is_graph_input())):
        _claim(given, taken, None)
    _check_constants(graph)
    node_names: set[str] = set()
    for node in graph:
        if node.name in node_names and node.name:
            raise PassError(f"two nodes are called {node.name!r}")
        node_names.add(node.name or "")
        for index, value in enumerate(node.inputs):
            if value is not None and value not in own and not any(value in values for values in outer):
                raise PassError(f"{_where(node)} reads {value.name!r} as input {index}, and {_fate(value, graph)}")
        if node.attributes.data:
            for body in bodies(node):
                _check_graph(body, visible, taken)
        for value in node.outputs:
            own.add(value)
            if value.name:
                _claim(value, taken, node)
    for value in graph.outputs:
        if not any(value in values for values in visible):
            raise PassError(f"the graph's output {value.name!r} is not written by any node, and {_fate(value, graph)}")


def _claim(value: ir.Value, taken: tuple[set[str | None], ...], writer: ir.Node | None) -> None:
    """Take a name for the innermost graph, where none that it sees has it."""
    if not value.name or any(value.name in names for names in taken):
        does = "the graph reads" if writer is None else f"{_where(writer)} writes"
        what = f"{value.name!r}, a name that another value has" if value.name else "a value that has no name"
        raise PassError(f"{does} {what}")
    taken[0].add(value.name)


def _fate(value: ir.Value, graph: ir.Graph) -> str:
    producer = value.producer()
    if producer is None:
        return "nothing writes it"
    if producer.graph is not graph:
        return f"its node {producer.name!r} is no longer in the graph"
    return f"its node {producer.name!r} comes only later"


def _check_constants(graph: ir.Graph) -> None:
    for name, value in graph.initializers.items():
        tensor = value.const_value
        if value.name != name:
            raise PassError(f"the constant {name!r} is registered under another name than its own, {value.name!r}")
        if tensor is None:
            raise PassError(f"the constant {name!r} has no data")
        if value.dtype is not None and value.dtype != tensor.dtype:
            raise PassError(f"the constant {name!r} is declared {value.dtype.name} and holds {tensor.dtype.name}")
        if value.shape is not None and list(value.shape) != list(tensor.shape):
            raise PassError(f"the constant {name!r} is declared {value.shape} and holds {tensor.shape}")


def _check_node(node: ir.Node, model: ir.Model) -> None:
    if node.op_identifier() in model.functions:
        return
    version = model.opset_imports.get(node.domain, model.opset_imports.get("ai.onnx") if node.domain == "" else None)
    if version is None:
        raise PassError(f"{_where(node)} is of the domain {node.domain!r}, of which the model imports no version")
    parameters = _parameters(node.op_type, node.domain, version)
    if parameters is None:
        return
    bound: dict[str, tuple[ir.DataType, str]] = {}
    for verb, formal, values in (("reads", parameters[0], node.inputs), ("writes", parameters[1], node.outputs)):
        for index, value in enumerate(values if formal else ()):
            if value is not None:
                _bind(formal[min(index, len(formal) - 1)], value, bound, node, verb)


@dataclass(frozen=True)
class _Parameter:
    """An input or output of an operator's definition; the last may repeat."""

    kind: str
    """The name of its type."""
    allowed: frozenset[str] | None
    """None where it may be any, or differ where it repeats."""


def _bind(
    parameter: _Parameter, value: ir.Value, bound: dict[str, tuple[ir.DataType, str]], node: ir.Node, verb: str
) -> None:
    dtype = value.dtype
    if dtype is None or parameter.allowed is None or not isinstance(value.type, ir.TensorType):
        return
    if _onnx_name(dtype) not in parameter.allowed:
        raise PassError(f"{_where(node)} {verb} {value.name!r} as {dtype.name}, a type that the operator does not take")
    first = bound.setdefault(parameter.kind, (dtype, str(value.name)))
    if first[0] != dtype:
        raise PassError(
            f"{_where(node)} {verb} {value.name!r} as {dtype.name}, which must be of the type of {first[1]!r}, "
            f"{first[0].name}"
        )


@lru_cache(maxsize=1024)
def _parameters(
    op_type: str, domain: str, version: int
) -> tuple[tuple[_Parameter, ...], tuple[_Parameter, ...]] | None:
    """Inputs and outputs of an operator; None where ONNX does not define it."""
    if not onnx.defs.has(op_type, max_inclusive_version=version, domain=domain):
        return None
    schema = onnx.defs.get_schema(op_type, max_inclusive_version=version, domain=domain)
    allowed = {item.type_param_str: frozenset(item.allowed_type_strs) for item in schema.type_constraints}

    def parameter(formal: onnx.defs.OpSchema.FormalParameter) -> _Parameter:
        kind = formal.type_str
        plain = frozenset({kind}) if kind.startswith("tensor(") else None
        return _Parameter(kind, allowed.get(kind, plain) if formal.is_homogeneous else None)

    return tuple(map(parameter, schema.inputs)), tuple(map(parameter, schema.outputs))


@cache
def _onnx_name(dtype: ir.DataType) -> str:
    return f"tensor({dtype.name.lower()})"


def _where(node: ir.Node) -> str:
    return f"the node {node.name!r} ({node.op_type})"
