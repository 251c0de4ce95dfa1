"""What a file must hold to be worked on: every reason why its graph is none, told in one sentence before any work.

It looks at the file's own messages, as whatever reads them takes most of this for granted: names that are written once
and read where they are known, nodes as their operators are defined, functions that end, constants of the right length.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from graphlib import CycleError, TopologicalSorter

import onnx
import onnx_ir as ir

from qcompiler.errors import ModelError
from qcompiler.graph.definitions import definition, is_operator
from qcompiler.graph.texts import check_texts

KNOWN_DOMAINS = frozenset({"", "ai.onnx", "ai.onnx.ml", "com.microsoft", "com.microsoft.nchwc", "com.ms.internal.nhwc"})
AGAIN = "export the model again"
SHOWN = 4  # nodes of a cycle in a message

_Kind = onnx.AttributeProto
FIELDS = {
    _Kind.FLOAT: "f", _Kind.INT: "i", _Kind.STRING: "s", _Kind.TENSOR: "t", _Kind.GRAPH: "g", _Kind.TYPE_PROTO: "tp",
    _Kind.FLOATS: "floats", _Kind.INTS: "ints", _Kind.STRINGS: "strings", _Kind.TENSORS: "tensors",
    _Kind.GRAPHS: "graphs", _Kind.TYPE_PROTOS: "type_protos", _Kind.SPARSE_TENSOR: "sparse_tensor",
    _Kind.SPARSE_TENSORS: "sparse_tensors",
}  # fmt: skip
"""Where an attribute of each type has its value."""
_NEEDED = frozenset({_Kind.TENSOR, _Kind.GRAPH, _Kind.TYPE_PROTO})
"""Types without a default: where the field is not there, nothing is."""

_D = onnx.TensorProto
STORED = {
    "float_data": {_D.FLOAT: 1, _D.COMPLEX64: 2}, "double_data": {_D.DOUBLE: 1, _D.COMPLEX128: 2},
    "int64_data": {_D.INT64: 1}, "uint64_data": {_D.UINT64: 1, _D.UINT32: 1}, "string_data": {_D.STRING: 1},
}  # fmt: skip
"""Fields of numbers by their types, and how many make an element; all other types lie in int32_data."""
NAMES_A_TYPE = ("to", "dtype", "output_dtype")
"""Attributes whose number is an element type."""
TYPED_FIELDS = (*STORED, "int32_data")


@dataclass(frozen=True)
class _Scope:
    """Where a graph stands: for messages, and what its nodes may refer to."""

    place: str
    """The file, and the function where it is one's body."""
    versions: Mapping[str, int]
    functions: Mapping[tuple[str, str, str], onnx.FunctionProto]
    references: frozenset[str] | None
    """Attributes of the function; None outside of functions."""


def check_given(model: onnx.ModelProto, file: object) -> bool:
    """Raise ModelError where the model is none that can be worked on; returns whether its nodes need to be sorted."""
    check_texts(model, file)
    versions = {entry.domain: entry.version for entry in model.opset_import}
    functions = {
        (function.domain, function.name, function.overload): function for function in model.functions
        if not is_operator(function.name, function.domain, versions)
    }  # fmt: skip
    _check_recursion(functions, str(file))
    scope = _Scope(str(file), versions, functions, None)
    _, sorted_ = _check_graph(model.graph, (), scope)
    if not model.graph.output:
        raise ModelError(f"{file} has no outputs, so there is nothing to compute; {AGAIN}")
    for function in functions.values():
        own = replace(
            scope, place=f"the function {function.name!r} of {file}", references=frozenset(_attributes(function)),
            versions=versions | {entry.domain: entry.version for entry in function.opset_import},
        )  # fmt: skip
        known = set(function.input)
        sorted_ &= _check_nodes(function.node, (), known, own)[1]
        written = known.union(*(node.output for node in function.node))
        for name in function.output:
            if name not in written:
                raise ModelError(f"{own.place} should give {name!r}, which nothing in it writes; {AGAIN}")
    return not sorted_


def _attributes(function: onnx.FunctionProto) -> Iterator[str]:
    yield from function.attribute
    yield from (attribute.name for attribute in function.attribute_proto)


def _check_recursion(functions: Mapping[tuple[str, str, str], onnx.FunctionProto], file: str) -> None:
    calls = {
        key: {called for node in _all_nodes(function.node) if (called := _called(node)) in functions}
        for key, function in functions.items()
    }
    try:
        TopologicalSorter(calls).prepare()
    except CycleError as error:
        chain = " → ".join(name for _, name, _ in reversed(error.args[1]))
        raise ModelError(f"a function of {file} calls itself ({chain}), so it never ends; {AGAIN}") from error


def _called(node: onnx.NodeProto) -> tuple[str, str, str]:
    return (node.domain, node.op_type, node.overload)


def _all_nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    for node in nodes:
        yield node
        for body in _bodies(node):
            yield from _all_nodes(body.node)


def _bodies(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        if attribute.type == _Kind.GRAPH:
            yield attribute.g
        elif attribute.type == _Kind.GRAPHS:
            yield from attribute.graphs


# ---------------------------------------------------------------------------------------------------- graphs


_Outer = tuple[Collection[str], ...]
"""The names that a body may read, of each graph around it: not joined, as there may be as many bodies as names."""


def _check_graph(graph: onnx.GraphProto, outer: _Outer, scope: _Scope) -> tuple[set[str], bool]:
    """(names that it reads from outside, whether all its nodes stand behind what they read)."""
    place = scope.place
    known: set[str] = set()
    for value in graph.input:
        if not value.name or value.name in known:
            raise ModelError(f"{place} has {_named('input', value.name)}; {AGAIN}")
        known.add(value.name)
    constants: set[str] = set()
    for tensor in graph.initializer:
        if not tensor.name or tensor.name in constants:
            raise ModelError(f"{place} has {_named('constant', tensor.name)}; {AGAIN}")
        constants.add(tensor.name)
        check_tensor(tensor, f"the weights {tensor.name!r} of {place}")
    for sparse in graph.sparse_initializer:
        raise ModelError(
            f"the constant {sparse.values.name!r} of {place} is sparse, which no pass can read; "
            "export it as a dense tensor"
        )
    for value in (*graph.input, *graph.output, *graph.value_info):
        if value.type.HasField("tensor_type"):
            _check_type(value.type.tensor_type.elem_type, f"the value {value.name!r} of {place}", absent=True)
    own = known | constants
    read, sorted_ = _check_nodes(graph.node, outer, own, scope)
    own.update(name for node in graph.node for name in node.output)
    given: set[str] = set()
    for value in graph.output:
        if not value.name or value.name in given:
            raise ModelError(f"{place} has {_named('output', value.name)}; {AGAIN}")
        given.add(value.name)
        if value.name not in own and not _is_in(value.name, outer):
            raise ModelError(f"{place} should give {value.name!r}, which nothing writes; {AGAIN}")
    return read | (given - own), sorted_


def _named(what: str, name: str) -> str:
    return f"two {what}s of the name {name!r}" if name else f"an {what} without a name".replace("an c", "a c")


def _check_nodes(
    nodes: Sequence[onnx.NodeProto], outer: _Outer, known: set[str], scope: _Scope
) -> tuple[set[str], bool]:
    """As `_check_graph`; `known` are the graph's inputs and constants."""
    writers: dict[str, int] = {}
    for index, node in enumerate(nodes):
        for name in node.output:
            if name and (name in writers or name in known):
                raise ModelError(f"{_where(node, scope)} writes {name!r}, which something else writes, too; {AGAIN}")
            if name:
                writers[name] = index
    visible = (writers, known, *outer)
    from_outside: set[str] = set()
    sorted_, misplaced = True, False
    reads: list[set[str]] = []
    for index, node in enumerate(nodes):
        where = _where(node, scope)
        _check_node(node, where, scope)
        read = {name for name in node.input if name}
        for name in read:
            if not _is_in(name, visible):
                raise ModelError(f"{where} reads {name!r}, which nothing writes; {AGAIN}")
        for body in _bodies(node):
            inner, fine = _check_graph(body, visible, scope)
            read |= inner
            sorted_ &= fine
        from_outside.update(name for name in read if name not in known and name not in writers)
        misplaced |= any(writers.get(name, -1) >= index for name in read)
        reads.append(read)
    if misplaced:
        _check_cycle(nodes, reads, writers, scope)
    return from_outside, sorted_ and not misplaced


def _is_in(name: str, graphs: _Outer) -> bool:
    return any(name in names for names in graphs)


def _check_cycle(
    nodes: Sequence[onnx.NodeProto], reads: Sequence[set[str]], writers: Mapping[str, int], scope: _Scope
) -> None:
    """ONNX Runtime takes nodes in any order, but for one that waits for itself."""
    waits = {index: {writers[name] for name in read if name in writers} for index, read in enumerate(reads)}
    try:
        TopologicalSorter(waits).prepare()
    except CycleError as error:
        found = [nodes[index] for index in error.args[1][:-1]]
        if len(found) == 1:
            raise ModelError(f"{_where(found[0], scope)} reads what it writes itself; {AGAIN}") from error
        names = " → ".join(repr(node.name or node.op_type) for node in found[:SHOWN])
        more = " → …" if len(found) > SHOWN else ""
        raise ModelError(f"nodes of {scope.place} wait for one another ({names}{more}); {AGAIN}") from error


# ---------------------------------------------------------------------------------------------------- nodes


def _where(node: onnx.NodeProto, scope: _Scope) -> str:
    return f"the node {node.name!r} ({node.op_type}) of {scope.place}"


def _check_node(node: onnx.NodeProto, where: str, scope: _Scope) -> None:
    if not node.op_type:
        raise ModelError(f"{where} has no operator; {AGAIN}")
    _check_attributes(node, where, scope)
    called = scope.functions.get(_called(node))
    if called is not None:
        for what, has, most in (("inputs", node.input, called.input), ("outputs", node.output, called.output)):
            if len(has) > len(most):
                raise ModelError(f"{where} has {len(has)} {what}, but its function has {len(most)}; {AGAIN}")
        return
    if node.domain not in KNOWN_DOMAINS:
        raise ModelError(
            f"{where} belongs to the domain {node.domain!r}, which ONNX Runtime does not know, "
            "and the model has no function of that name; export it without custom operators"
        )
    domain = "" if node.domain == "ai.onnx" else node.domain
    version = scope.versions.get(domain, scope.versions.get("ai.onnx") if not domain else None)
    if version is None:
        shown = f"the domain {domain!r}" if domain else "ONNX's own domain"
        raise ModelError(f"{where} is of {shown}, of which the model imports no version; {AGAIN}")
    _check_defined(node, where, domain, version)


def _check_defined(node: onnx.NodeProto, where: str, domain: str, version: int) -> None:
    """The node is as its operator is defined."""
    known = definition(node.op_type, domain, version)
    if known is None:
        if domain == "":
            raise ModelError(f"{where} has an operator that opset {version} does not have; {AGAIN}")
        return
    inputs, outputs = node.input, node.output
    if len(inputs) < known.fewest_inputs:
        raise ModelError(f"{where} has {len(inputs)} inputs but needs {known.fewest_inputs}; {AGAIN}")
    for what, has, most in (("inputs", inputs, known.most_inputs), ("outputs", outputs, known.most_outputs)):
        if most is not None and len(has) > most:
            raise ModelError(f"{where} has {len(has)} {what} but may have {most}; {AGAIN}")
    for index, name in enumerate(inputs):
        if not name and known.needs(index):
            raise ModelError(f"{where} has nothing as its input {index}, which it needs; {AGAIN}")
    if known.outputs[:1] == "1" and not (outputs and outputs[0]):
        raise ModelError(f"{where} gives its output no name, so nothing can read it; {AGAIN}")
    given = {attribute.name: attribute for attribute in node.attribute}
    for name, (kind, required) in known.attributes.items():
        if name not in given:
            if required:
                raise ModelError(f"{where} lacks the attribute {name!r}; {AGAIN}")
        elif given[name].type != kind:
            has, due = (_Kind.AttributeType.Name(number) for number in (given[name].type, kind))
            raise ModelError(f"{where} has its attribute {name!r} as {has}, but it must be {due}; {AGAIN}")
        elif name in NAMES_A_TYPE and kind == _Kind.INT and not given[name].ref_attr_name:
            _check_type(given[name].i, f"the attribute {name!r} of {where}", absent=not required)
    for name in given.keys() - known.attributes.keys() if known.closed else ():
        if not name.startswith("__"):  # what tools note for themselves
            raise ModelError(f"{where} has an attribute {name!r}, which the operator does not know; {AGAIN}")


def _check_attributes(node: onnx.NodeProto, where: str, scope: _Scope) -> None:
    """Each once, with a value of the type that it says, or a reference that the function around it has."""
    seen: set[str] = set()
    for attribute in node.attribute:
        name = attribute.name
        if not name or name in seen:
            raise ModelError(f"{where} has {_named('attribute', name)}; {AGAIN}")
        seen.add(name)
        field = FIELDS.get(attribute.type)
        if field is None:
            raise ModelError(f"{where} has an attribute {name!r} without a type; {AGAIN}")
        if attribute.ref_attr_name:
            if scope.references is None or attribute.ref_attr_name not in scope.references:
                around = "is in no function" if scope.references is None else "its function has no such attribute"
                raise ModelError(
                    f"{where} takes its attribute {name!r} from {attribute.ref_attr_name!r}, but {around}; {AGAIN}"
                )
            continue
        held = {entry.name for entry, _ in attribute.ListFields()} - {"name", "type", "doc_string"}
        if not held <= {field} or (attribute.type in _NEEDED and not held):
            kind = _Kind.AttributeType.Name(attribute.type)
            raise ModelError(f"{where} has an attribute {name!r} that says it is {kind}, and holds none; {AGAIN}")
        if attribute.type in (_Kind.SPARSE_TENSOR, _Kind.SPARSE_TENSORS):
            raise ModelError(
                f"{where} holds a sparse constant in {name!r}, which no pass can read; export it as a dense tensor"
            )
        for tensor in (attribute.t,) if attribute.type == _Kind.TENSOR else attribute.tensors:
            check_tensor(tensor, f"the numbers in the attribute {name!r} of {where}")


# ---------------------------------------------------------------------------------------------------- constants


def check_tensor(tensor: onnx.TensorProto, where: str) -> None:
    """Raise ModelError unless type, shape and data of a tensor fit together. External data is looked for elsewhere."""
    _check_type(tensor.data_type, where)
    if any(size < 0 for size in tensor.dims):
        raise ModelError(f"{where}: the shape is {list(tensor.dims)}, but sizes are 0 or more; {AGAIN}")
    if tensor.HasField("segment"):
        raise ModelError(f"{where}: they are stored in segments, which nothing reads; {AGAIN}")
    dtype, count = ir.DataType(tensor.data_type), math.prod(tensor.dims)
    stored = [name for name in TYPED_FIELDS if len(getattr(tensor, name))]
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        _check_location(tensor, where)
        return
    packed = 0 if dtype == ir.DataType.STRING else -(-count * dtype.bitwidth // 8)
    if tensor.HasField("raw_data") and not (stored and not tensor.raw_data):
        if stored or dtype == ir.DataType.STRING:
            raise ModelError(f"{where}: raw bytes lie beside, or in the place of, {dtype.name} elements; {AGAIN}")
        _check_count(len(tensor.raw_data), packed, "bytes", dtype, tensor, where)
        return
    field = next((name for name, types in STORED.items() if tensor.data_type in types), "int32_data")
    if set(stored) - {field}:
        raise ModelError(f"{where}: they are {dtype.name}, but lie in {stored[0]}; {AGAIN}")
    each = STORED[field][tensor.data_type] if field in STORED else 1
    due = count * each if dtype == ir.DataType.STRING or dtype.bitwidth >= 8 else packed
    _check_count(len(getattr(tensor, field)), due, "entries", dtype, tensor, where)


def _check_count(got: int, due: int, unit: str, dtype: ir.DataType, tensor: onnx.TensorProto, where: str) -> None:
    if got != due:
        raise ModelError(
            f"{where}: there are {got} {unit}, but the shape {list(tensor.dims)} in {dtype.name} needs {due}; {AGAIN}"
        )


def _check_location(tensor: onnx.TensorProto, where: str) -> None:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    if tensor.data_type == onnx.TensorProto.STRING:
        raise ModelError(f"{where}: they are strings in a file of their own, which ONNX does not have; {AGAIN}")
    if not entries.get("location") or "\0" in entries["location"]:
        raise ModelError(f"{where}: they should be in a file beside the model, but its name is missing; {AGAIN}")
    for key in ("offset", "length"):
        text = entries.get(key, "0")
        if not (text.isascii() and text.isdigit() and len(text) < 20):  # 64 bits
            raise ModelError(f"{where}: the {key} in their file is {text[:20]!r}, which is no position; {AGAIN}")


def _check_type(number: int, where: str, *, absent: bool = False) -> None:
    known = onnx.TensorProto.DataType.values()
    if number not in known or (number == onnx.TensorProto.UNDEFINED and not absent):
        raise ModelError(f"{where}: the element type {number} is none that ONNX has; {AGAIN}")
