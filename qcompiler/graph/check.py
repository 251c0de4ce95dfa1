"""Is a graph well-formed? Run after every pass, so that a broken rewrite is caught where it was made."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache

import onnx
import onnx_ir as ir

from qcompiler.errors import PassError
from qcompiler.graph.definitions import RUNTIME_OPERATORS

CHECKED_BYTES = 1024
"""Constants up to this size are shown to ONNX's checker."""


def check_structure(model: ir.Model) -> None:
    """Raise PassError, which names the node, unless the model is well-formed.

    Names are there and unique, nodes read only what comes before them, declared types agree with each other and with
    what the operators take, and ONNX's own checker is content. The model is not changed and no weights are read.
    """
    _check_graph(model.graph, set())
    for node in model.graph.all_nodes():
        _check_node(node, model)
    try:
        onnx.checker.check_model(without_weights(model))
    except onnx.checker.ValidationError as error:
        raise PassError(f"onnx's checker refuses the model: {_first_line(error)}") from error


def without_weights(model: ir.Model) -> onnx.ModelProto:
    """The model with its larger constants as inputs, so that the checker reads no weights and looks for no files.

    Those of bodies of If and Loop, too: a body may read what the main graph is given.
    """
    proto = onnx.ModelProto(ir_version=model.ir_version)
    for domain, version in {"com.microsoft": 1, **model.opset_imports}.items():
        proto.opset_import.add(domain=domain, version=version)
    graph = proto.graph
    graph.name = model.graph.name or ""
    for value in model.graph.inputs:
        ir.serde.serialize_value_into(graph.input.add(), value)
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is None or (isinstance(tensor, ir.Tensor) and tensor.nbytes <= CHECKED_BYTES):
            if tensor is not None:
                ir.serde.serialize_tensor_into(graph.initializer.add(), tensor)
                graph.initializer[-1].name = name
        elif not value.is_graph_input():
            typed = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape.numpy()))
            ir.serde.serialize_value_into(graph.input.add(), typed)
    for value in model.graph.outputs:
        ir.serde.serialize_value_into(graph.output.add(), value)
    for node in model.graph:
        graph.node.append(ir.serde.serialize_node(node))
        graph.value_info.extend(
            ir.serde.serialize_value(value) for value in node.outputs
            if value.name and value.type is not None and not value.is_graph_output()
        )  # fmt: skip
    for function in model.functions.values():
        proto.functions.append(ir.serde.serialize_function(function))
    constants: dict[str, onnx.TensorProto] = {}
    _pass_over(graph, constants)
    for name, constant in constants.items():
        graph.input.append(onnx.helper.make_tensor_value_info(name, constant.data_type, constant.dims))
    return proto


def _pass_over(graph: onnx.GraphProto, constants: dict[str, onnx.TensorProto]) -> None:
    """Move the runtime's operators to a domain that the checker does not look at, and take `constants` from bodies."""
    for node in graph.node:
        if node.domain == "" and node.op_type in RUNTIME_OPERATORS:
            node.domain = "com.microsoft"
        for attribute in node.attribute:
            for body in (*([attribute.g] if attribute.HasField("g") else ()), *attribute.graphs):
                _pass_over(body, constants)
                large = [tensor for tensor in body.initializer if _is_large(tensor)]
                constants.update((tensor.name, tensor) for tensor in large)
                for tensor in large:
                    body.initializer.remove(tensor)


def _is_large(tensor: onnx.TensorProto) -> bool:
    return bool(tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.ByteSize() > CHECKED_BYTES)


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _check_graph(graph: ir.Graph, outer: set[ir.Value]) -> None:
    """Names and order within a graph and, with what they see from outside, the bodies of its nodes."""
    visible = outer | set(graph.inputs) | set(graph.initializers.values())
    names = {value.name for value in outer}
    for given in (*graph.inputs, *(item for item in graph.initializers.values() if not item.is_graph_input())):
        _claim(given, names, "the graph reads ")
    _check_constants(graph)
    node_names: set[str] = set()
    for node in graph:
        where = _where(node)
        if node.name in node_names and node.name:
            raise PassError(f"two nodes are called {node.name!r}")
        node_names.add(node.name or "")
        for index, value in enumerate(node.inputs):
            if value is not None and value not in visible:
                raise PassError(f"{where} reads {value.name!r} as input {index}, and {_fate(value, graph)}")
        for body in _bodies(node):
            _check_graph(body, visible)
        for value in node.outputs:
            if value.name:
                _claim(value, names, f"{where} writes ")
        visible.update(node.outputs)
    for value in graph.outputs:
        if value not in visible:
            raise PassError(f"the graph's output {value.name!r} is not written by any node, and {_fate(value, graph)}")


def _claim(value: ir.Value, names: set[str | None], prefix: str) -> None:
    if not value.name:
        raise PassError(f"{prefix}a value that has no name")
    if value.name in names:
        raise PassError(f"{prefix}{value.name!r}, a name that another value has")
    names.add(value.name)


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


def _bodies(node: ir.Node) -> Iterator[ir.Graph]:
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            yield attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS:
            yield from attribute.as_graphs()


def _check_node(node: ir.Node, model: ir.Model) -> None:
    if node.op_identifier() in model.functions:
        return
    version = model.opset_imports.get(node.domain, model.opset_imports.get("ai.onnx") if node.domain == "" else None)
    if version is None:
        raise PassError(f"{_where(node)} is of the domain {node.domain!r}, of which the model imports no version")
    schema = _schema(node.op_type, node.domain, version)
    if schema is None:
        return
    bound: dict[str, tuple[ir.DataType, str]] = {}
    for kind, value in _typed(schema.inputs, node.inputs):
        _bind(kind, value, bound, schema, node, "reads")
    for kind, value in _typed(schema.outputs, node.outputs):
        _bind(kind, value, bound, schema, node, "writes")


def _typed(
    parameters: Iterable[onnx.defs.OpSchema.FormalParameter], values: Iterable[ir.Value | None]
) -> Iterator[tuple[str, ir.Value]]:
    """Each value with the name of its type in the operator's definition; the last parameter may repeat."""
    formal = list(parameters)
    for index, value in enumerate(values):
        parameter = formal[min(index, len(formal) - 1)] if formal else None
        if parameter is None or value is None or value.dtype is None or not parameter.is_homogeneous:
            continue
        yield parameter.type_str, value


def _bind(
    kind: str, value: ir.Value, bound: dict[str, tuple[ir.DataType, str]], schema: onnx.defs.OpSchema, node: ir.Node,
    verb: str,
) -> None:  # fmt: skip
    allowed = _allowed(schema, kind)
    dtype = value.dtype
    if dtype is None or allowed is None or not isinstance(value.type, ir.TensorType):
        return
    if _onnx_name(dtype) not in allowed:
        raise PassError(f"{_where(node)} {verb} {value.name!r} as {dtype.name}, a type that the operator does not take")
    first = bound.setdefault(kind, (dtype, str(value.name)))
    if first[0] != dtype:
        raise PassError(
            f"{_where(node)} {verb} {value.name!r} as {dtype.name}, which must be of the type of {first[1]!r}, "
            f"{first[0].name}"
        )


def _allowed(schema: onnx.defs.OpSchema, kind: str) -> frozenset[str] | None:
    for constraint in schema.type_constraints:
        if constraint.type_param_str == kind:
            return frozenset(constraint.allowed_type_strs)
    return frozenset({kind}) if kind.startswith("tensor(") else None


def _onnx_name(dtype: ir.DataType) -> str:
    return f"tensor({dtype.name.lower()})"


@lru_cache(maxsize=1024)
def _schema(op_type: str, domain: str, version: int) -> onnx.defs.OpSchema | None:
    if not onnx.defs.has(op_type, max_inclusive_version=version, domain=domain):
        return None
    return onnx.defs.get_schema(op_type, max_inclusive_version=version, domain=domain)


def _where(node: ir.Node) -> str:
    return f"the node {node.name!r} ({node.op_type})"
