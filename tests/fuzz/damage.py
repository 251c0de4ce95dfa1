"""What can be wrong with a model's file: its messages changed, one thing at a time, and its bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

Rng = np.random.Generator
Damage = Callable[[ModelProto, Rng], None]
TEXTS = ("", "x", "ü", "\x1b[2J", "a" * 300, "a/b", "..", "\u202e", "y\n", "%s", "[red]", "9" * 40)
NUMBERS = (0, -1, 1, 2, 3, 7, 2**31 - 1, 2**31, -(2**63), 2**63 - 1, 1000)
DAMAGE: list[Damage] = []


def _damage(function: Damage) -> Damage:
    DAMAGE.append(function)
    return function


def _one(items: object, rng: Rng) -> object:
    sequence = list(items)  # type: ignore[call-overload]
    return sequence[int(rng.integers(len(sequence)))] if sequence else None


def _graphs(graph: GraphProto) -> Iterator[GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == AttributeProto.GRAPH:
                yield from _graphs(attribute.g)


def _graph(model: ModelProto, rng: Rng) -> GraphProto:
    graphs = list(_graphs(model.graph))
    return graphs[0] if rng.random() < 0.7 else graphs[int(rng.integers(len(graphs)))]


def _node(model: ModelProto, rng: Rng) -> NodeProto:
    nodes = [node for graph in _graphs(model.graph) for node in graph.node]
    nodes += [node for function in model.functions for node in function.node]
    return nodes[int(rng.integers(len(nodes)))] if nodes else model.graph.node.add(op_type="Identity")


def _tensor(model: ModelProto, rng: Rng) -> TensorProto:
    tensors = [tensor for graph in _graphs(model.graph) for tensor in graph.initializer]
    tensors += [attribute.t for node in model.graph.node for attribute in node.attribute if attribute.HasField("t")]
    if not tensors:
        model.graph.initializer.append(numpy_helper.from_array(np.zeros(2, np.float32), "lonely"))
        return model.graph.initializer[0]
    return tensors[int(rng.integers(len(tensors)))]


def _info(model: ModelProto, rng: Rng) -> ValueInfoProto:
    graph = _graph(model, rng)
    infos = [*graph.input, *graph.output, *graph.value_info]
    return infos[int(rng.integers(len(infos)))] if infos else graph.value_info.add(name="nothing")


def _names(model: ModelProto) -> list[str]:
    names = {name for graph in _graphs(model.graph) for node in graph.node for name in (*node.input, *node.output)}
    return sorted(names | {tensor.name for tensor in model.graph.initializer} | set(TEXTS))


def _text(rng: Rng) -> str:
    return TEXTS[int(rng.integers(len(TEXTS)))]


def _number(rng: Rng) -> int:
    return NUMBERS[int(rng.integers(len(NUMBERS)))]


# ------------------------------------------------------------------------------------------------ values


@_damage
def reads_another(model: ModelProto, rng: Rng) -> None:
    node = _node(model, rng)
    if node.input:
        node.input[int(rng.integers(len(node.input)))] = str(_one(_names(model), rng))


@_damage
def writes_another(model: ModelProto, rng: Rng) -> None:
    node = _node(model, rng)
    if node.output:
        node.output[int(rng.integers(len(node.output)))] = str(_one(_names(model), rng))


@_damage
def fewer_or_more_inputs(model: ModelProto, rng: Rng) -> None:
    node = _node(model, rng)
    if node.input and rng.random() < 0.5:
        del node.input[int(rng.integers(len(node.input)))]
    else:
        node.input.extend([str(_one(_names(model), rng))] * int(rng.integers(1, 4)))


@_damage
def fewer_or_more_outputs(model: ModelProto, rng: Rng) -> None:
    node = _node(model, rng)
    if node.output and rng.random() < 0.5:
        del node.output[int(rng.integers(len(node.output)))]
    else:
        node.output.append(_text(rng) or "more")


@_damage
def blank_input(model: ModelProto, rng: Rng) -> None:
    node = _node(model, rng)
    if node.input:
        node.input[int(rng.integers(len(node.input)))] = ""


@_damage
def without_a_node(model: ModelProto, rng: Rng) -> None:
    nodes = _graph(model, rng).node
    if nodes:
        del nodes[int(rng.integers(len(nodes)))]


@_damage
def a_node_twice(model: ModelProto, rng: Rng) -> None:
    graph = _graph(model, rng)
    if graph.node:
        copy = NodeProto()
        copy.CopyFrom(_one(graph.node, rng))
        if rng.random() < 0.6:
            copy.output[:] = [f"{name}_copy" if name else "" for name in copy.output]
        graph.node.append(copy)


@_damage
def another_order(model: ModelProto, rng: Rng) -> None:
    graph = _graph(model, rng)
    nodes = [graph.node[int(index)] for index in rng.permutation(len(graph.node))]
    copies = [NodeProto() for _ in nodes]
    for copy, node in zip(copies, nodes, strict=True):
        copy.CopyFrom(node)
    del graph.node[:]
    graph.node.extend(copies)


# ------------------------------------------------------------------------------------------------ nodes


@_damage
def another_operator(model: ModelProto, rng: Rng) -> None:
    names = ("MatMul", "Gemm", "Conv", "Relu", "Gather", "", "If", "Loop", "DequantizeLinear", "Nothing", "Scan",
             "BeamSearch", "SequenceConstruct", "Optional", "StringNormalizer", "Constant", "LSTM", "Attention",
             "MatMulNBits", "QLinearMatMul", "Reshape", "Cast", "Softmax", "LayerNormalization")  # fmt: skip
    _node(model, rng).op_type = str(_one(names, rng))


@_damage
def another_domain(model: ModelProto, rng: Rng) -> None:
    _node(model, rng).domain = str(_one(("com.microsoft", "ai.onnx", "ai.onnx.ml", "local", "nowhere", "\x1b"), rng))


@_damage
def another_name(model: ModelProto, rng: Rng) -> None:
    _node(model, rng).name = str(_one((*(node.name for node in model.graph.node), *TEXTS), rng))


@_damage
def renamed_everywhere(model: ModelProto, rng: Rng) -> None:
    """A value, wherever it is named: still a good model, where the new name is free."""
    before, after = str(_one(_names(model), rng)), _text(rng) + str(_one(("", "1", "_scale", "_q"), rng))
    for graph in _graphs(model.graph):
        for node in graph.node:
            for names in (node.input, node.output):
                names[:] = [after if name == before else name for name in names]
        for item in (*graph.input, *graph.output, *graph.value_info, *graph.initializer):
            item.name = after if item.name == before else item.name


@_damage
def odd_attribute(model: ModelProto, rng: Rng) -> None:
    node = _node(model, rng)
    attribute = _one(node.attribute, rng)
    if not isinstance(attribute, AttributeProto):
        attribute = node.attribute.add(name=str(_one(("axis", "perm", "to", "axes", "alpha", "transB", ""), rng)))
    attribute.type = int(rng.integers(0, 16)) if rng.random() < 0.3 else attribute.type
    match int(rng.integers(5)):
        case 0:
            attribute.CopyFrom(helper.make_attribute(attribute.name or "a", _number(rng)))
        case 1:
            attribute.ints[:] = [_number(rng) for _ in range(int(rng.integers(0, 5)))]
        case 2:
            attribute.CopyFrom(helper.make_attribute(attribute.name or "a", float(rng.choice([np.nan, np.inf, 0, -1]))))
        case 3:
            attribute.CopyFrom(helper.make_attribute(attribute.name or "a", _text(rng)))
        case 4:
            attribute.i = _number(rng)


@_damage
def no_attribute(model: ModelProto, rng: Rng) -> None:
    node = _node(model, rng)
    if node.attribute:
        del node.attribute[int(rng.integers(len(node.attribute)))]


@_damage
def attribute_twice(model: ModelProto, rng: Rng) -> None:
    node = _node(model, rng)
    if node.attribute:
        node.attribute.add().CopyFrom(node.attribute[0])


@_damage
def refers_to_an_attribute(model: ModelProto, rng: Rng) -> None:
    attribute = _node(model, rng).attribute.add(name="axis", ref_attr_name=_text(rng) or "axis")
    attribute.type = AttributeProto.INT


# ------------------------------------------------------------------------------------------------ constants


@_damage
def odd_numbers(model: ModelProto, rng: Rng) -> None:
    """Still a good model: NaN, infinities, or the largest of the type in the place of a number."""
    tensor = _tensor(model, rng)
    array = numpy_helper.to_array(tensor).copy()
    if array.dtype.kind == "f" and array.size:
        array.reshape(-1)[int(rng.integers(array.size))] = rng.choice([np.nan, np.inf, -np.inf, np.finfo(array.dtype).max])
    elif array.dtype.kind in "iu" and array.size:
        array.reshape(-1)[int(rng.integers(array.size))] = int(rng.integers(-5, 100)) % 100
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


@_damage
def another_type(model: ModelProto, rng: Rng) -> None:
    _tensor(model, rng).data_type = int(rng.integers(0, 30))


@_damage
def converted(model: ModelProto, rng: Rng) -> None:
    """Numbers of another type, rightly stored; what reads them may not take it."""
    tensor = _tensor(model, rng)
    array = numpy_helper.to_array(tensor)
    if array.dtype.kind in "fiu":
        kind = str(_one(("float16", "float64", "int64", "int8", "bool", "complex64", "str"), rng))
        changed = array.astype(object).astype(str).astype(object) if kind == "str" else array.astype(kind)
        tensor.CopyFrom(numpy_helper.from_array(changed, tensor.name))


@_damage
def another_shape(model: ModelProto, rng: Rng) -> None:
    tensor = _tensor(model, rng)
    match int(rng.integers(4)):
        case 0:
            tensor.dims[:] = tensor.dims[::-1]
        case 1:
            tensor.dims.append(_number(rng))
        case 2:
            tensor.dims[:] = [*tensor.dims, 1, 1]
        case 3:
            tensor.dims[:] = [int(np.prod(tensor.dims))]


@_damage
def empty_constant(model: ModelProto, rng: Rng) -> None:
    tensor = _tensor(model, rng)
    array = numpy_helper.to_array(tensor)
    tensor.CopyFrom(numpy_helper.from_array(array.reshape(-1)[:0].reshape(0, *array.shape[1:]), tensor.name))


@_damage
def cut_data(model: ModelProto, rng: Rng) -> None:
    tensor = _tensor(model, rng)
    if tensor.raw_data:
        tensor.raw_data = tensor.raw_data[: int(rng.integers(0, len(tensor.raw_data)))]


@_damage
def typed_data(model: ModelProto, rng: Rng) -> None:
    """Numbers in the field of a type, beside or in the place of raw data."""
    tensor = _tensor(model, rng)
    if rng.random() < 0.5 and tensor.data_type == TensorProto.FLOAT:
        tensor.float_data[:] = [float(number) for number in numpy_helper.to_array(tensor).reshape(-1)]
        tensor.ClearField("raw_data")
    else:
        tensor.int32_data.extend([1, 2])


@_damage
def external(model: ModelProto, rng: Rng) -> None:
    """The data of a constant in a file: the right one, or something else."""
    tensor = _tensor(model, rng)
    raw = len(tensor.raw_data)
    del tensor.external_data[:]
    tensor.data_location = TensorProto.EXTERNAL
    places = ("weights.bin", "weights.bin", "none.bin", "../secret", "/etc/passwd", "", ".", "a" * 300, "link", "dir")
    tensor.external_data.add(key="location", value=str(_one(places, rng)))
    if rng.random() < 0.7:
        tensor.external_data.add(key="offset", value=str(_one((0, 0, 64, -1, 10**9, "x", 10**30), rng)))
        tensor.external_data.add(key="length", value=str(_one((raw, raw, raw, 0, -1, raw + 1, "", 10**30), rng)))
    tensor.ClearField("raw_data")


@_damage
def constant_twice(model: ModelProto, rng: Rng) -> None:
    graph = _graph(model, rng)
    if graph.initializer:
        graph.initializer.add().CopyFrom(_one(graph.initializer, rng))


@_damage
def no_constant(model: ModelProto, rng: Rng) -> None:
    graph = _graph(model, rng)
    if graph.initializer:
        del graph.initializer[int(rng.integers(len(graph.initializer)))]


@_damage
def sparse(model: ModelProto, rng: Rng) -> None:
    values = numpy_helper.from_array(np.ones(2, np.float32), str(_one(_names(model), rng)))
    entry = model.graph.sparse_initializer.add(dims=[8, 8])
    entry.values.CopyFrom(values)
    entry.indices.CopyFrom(numpy_helper.from_array(np.array([0, 9]), "indices"))


# ------------------------------------------------------------------------------------------------ what is declared


@_damage
def declared_otherwise(model: ModelProto, rng: Rng) -> None:
    info = _info(model, rng)
    match int(rng.integers(7)):
        case 0:
            info.type.tensor_type.elem_type = int(rng.integers(0, 30))
        case 1:
            for dim in info.type.tensor_type.shape.dim:
                dim.dim_value = _number(rng)
        case 2:
            info.type.tensor_type.shape.dim.add(dim_param=_text(rng))
        case 3:
            info.type.ClearField("value")
        case 4:
            info.type.sequence_type.elem_type.tensor_type.elem_type = TensorProto.FLOAT
        case 5:
            info.type.optional_type.elem_type.tensor_type.elem_type = TensorProto.FLOAT
        case 6:
            info.type.tensor_type.ClearField("shape")


@_damage
def all_named_sizes(model: ModelProto, rng: Rng) -> None:
    """Every size of an input a name, the same or others: what fits is no longer told."""
    for dim in model.graph.input[0].type.tensor_type.shape.dim if model.graph.input else ():
        dim.dim_param = str(_one(("B", "N", "S", "", "B"), rng))


@_damage
def said_of_values(model: ModelProto, rng: Rng) -> None:
    """Declarations of values in between, wrong ones."""
    for name in _names(model)[:8]:
        if rng.random() < 0.4:
            info = helper.make_tensor_value_info(name, int(rng.integers(1, 24)), [_number(rng)] if rng.random() < 0.5 else None)
            model.graph.value_info.append(info)


@_damage
def no_input(model: ModelProto, rng: Rng) -> None:
    graph = _graph(model, rng)
    del graph.input[: int(rng.integers(1, 3))]


@_damage
def output_of_something(model: ModelProto, rng: Rng) -> None:
    info = _graph(model, rng).output.add(name=str(_one(_names(model), rng)))
    if rng.random() < 0.7:
        info.type.tensor_type.elem_type = TensorProto.FLOAT


@_damage
def no_output(model: ModelProto, rng: Rng) -> None:
    graph = _graph(model, rng)
    del graph.output[:]


@_damage
def versions(model: ModelProto, rng: Rng) -> None:
    match int(rng.integers(5)):
        case 0:
            model.ir_version = int(_one((0, 1, 3, 4, 8, 13, 14, 99, 2**62), rng))  # type: ignore[call-overload]
        case 1:
            del model.opset_import[:]
        case 2:
            entry = _one(model.opset_import, rng)
            if entry is not None:
                entry.version = int(_one((0, 1, 7, 12, 13, 17, 23, 25, 26, -1, 2**62), rng))  # type: ignore[attr-defined, call-overload]
        case 3:
            model.opset_import.add(domain=str(_one(("", "ai.onnx", "other"), rng)), version=int(rng.integers(1, 26)))
        case 4:
            del model.opset_import[-1:]


@_damage
def metadata(model: ModelProto, rng: Rng) -> None:
    keys = ("qcompiler.session_options", "qcompiler.pass", "pkg.torch.onnx.name_scopes", "", "qcompiler.scheme", "qcompiler.version")
    values = ("", "{}", "[]", '{"session.x": "1"}', "[" * 2000, "null", "9" * 5000, "'linear'", "\x1b[31m", "['', 'a.b']")
    places = (model.metadata_props, _node(model, rng).metadata_props, model.graph.metadata_props, _info(model, rng).metadata_props)
    for _ in range(int(rng.integers(1, 4))):
        place = places[int(rng.integers(len(places)))]
        place.add(key=str(_one(keys, rng)), value=str(_one(values, rng)))


@_damage
def functions(model: ModelProto, rng: Rng) -> None:
    """A function under the name of an operator, one that calls itself, one twice, or with names that are not there."""
    match int(rng.integers(5)):
        case 0:
            node = _node(model, rng)
            count = max(1, len(node.input))
            body = [helper.make_node("Identity", ["i0"], ["o0"])]
            names = [f"i{index}" for index in range(count)]
            model.functions.append(helper.make_function(node.domain, node.op_type, names, ["o0"], body, model.opset_import))
        case 1:
            body = [helper.make_node("Again", ["i"], ["o"], domain="local")]
            model.functions.append(helper.make_function("local", "Again", ["i"], ["o"], body, model.opset_import))
        case 2 if model.functions:
            model.functions.add().CopyFrom(model.functions[0])
        case 3 if model.functions:
            model.functions[0].output.append(_text(rng))
        case 4 if model.functions:
            model.functions[0].input.append(str(_one(("x", "", "w", "more"), rng)))


@_damage
def nested(model: ModelProto, rng: Rng) -> None:
    """A node within If within If, as deep as the library's own limit lets it be."""
    inner = helper.make_graph([helper.make_node("Identity", ["x"], ["deep"])], "deep", [], [onnx.ValueInfoProto(name="deep")])
    for level in range(int(_one((2, 10, 28, 60), rng))):  # type: ignore[call-overload]
        name = f"level{level}"
        node = helper.make_node("If", ["deep_cond"], [name], then_branch=inner, else_branch=inner if level < 3 else None)
        inner = helper.make_graph([node], name, [], [onnx.ValueInfoProto(name=name)])
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "deep_cond"))
    model.graph.node.extend(inner.node)


@_damage
def a_tensor_attribute(model: ModelProto, rng: Rng) -> None:
    """A Constant that holds something else than a tensor."""
    name = str(_one(_names(model), rng)) if rng.random() < 0.3 else "held"
    kinds: tuple[tuple[str, object], ...] = (
        ("value_int", 3), ("value_string", "s"), ("value_strings", ["a", "b"]), ("value_floats", [1.0, 2.0]),
        ("value_ints", [1]), ("value_float", 1.0),
    )  # fmt: skip
    key, value = kinds[int(rng.integers(len(kinds)))]
    model.graph.node.insert(0, helper.make_node("Constant", [], [name], **{key: value}))
    if rng.random() < 0.5 and (node := _node(model, rng)).input:
        node.input[int(rng.integers(len(node.input)))] = name


def damaged(model: ModelProto, rng: Rng) -> list[str]:
    """Change a model in one to three ways; returns which."""
    done = []
    for _ in range(int(rng.choice([1, 1, 1, 2, 3]))):
        change = DAMAGE[int(rng.integers(len(DAMAGE)))]
        try:
            change(model, rng)
        except (ValueError, TypeError, OverflowError, DecodeError):  # an earlier one left nothing to change here
            continue
        done.append(change.__name__)
    return done


def write_external(folder: Path, rng: Rng) -> None:
    """What names of external data may lead to."""
    (folder / "weights.bin").write_bytes(rng.normal(size=1024).astype(np.float32).tobytes())
    (folder / "dir").mkdir()
    (folder / "link").symlink_to("/etc/passwd")


def bytes_damaged(data: bytes, other: bytes, rng: Rng) -> bytes:
    """Flips, cuts, splices, repeats and runs of one byte."""
    changed = bytearray(data)
    for _ in range(int(rng.integers(1, 5))):
        if not changed:
            break
        at, length = int(rng.integers(len(changed))), int(rng.integers(1, 64))
        match int(rng.integers(7)):
            case 0:
                changed[at] ^= 1 << int(rng.integers(8))
            case 1:
                del changed[at:]
            case 2:
                del changed[at : at + length]
            case 3:
                begin = int(rng.integers(max(1, len(other))))
                changed[at:at] = other[begin : begin + length]
            case 4:
                changed[at : at + length] = bytes([int(rng.choice([0, 255, 127, 128]))]) * length
            case 5:
                changed[at:at] = changed[at : at + length]
            case 6:
                changed[at] = int(rng.integers(256))
    return bytes(changed)


def early_bytes_damaged(data: bytes, rng: Rng) -> bytes:
    """A flip where names and nodes are: weights, which come later, make most of a file."""
    changed = bytearray(data)
    for _ in range(int(rng.integers(1, 4))):
        changed[int(rng.integers(min(len(changed), 400)))] = int(rng.integers(256))
    return bytes(changed)

