"""Constants of a model, and what it says of itself, changed one at a time."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, helper, numpy_helper

from tests.fuzz.messages import (
    Rng,
    a_graph,
    a_node,
    a_number,
    a_tensor,
    a_text,
    an_info,
    damage,
    names,
    one,
)


@damage
def odd_numbers(model: ModelProto, rng: Rng) -> None:
    """Still a good model: NaN, infinities, or the largest of the type in the place of a number."""
    tensor = a_tensor(model, rng)
    array = numpy_helper.to_array(tensor).copy()
    if array.dtype.kind == "f" and array.size:
        array.reshape(-1)[int(rng.integers(array.size))] = rng.choice(
            [np.nan, np.inf, -np.inf, np.finfo(array.dtype).max]
        )
    elif array.dtype.kind in "iu" and array.size:
        array.reshape(-1)[int(rng.integers(array.size))] = int(rng.integers(-5, 100)) % 100
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


@damage
def another_type(model: ModelProto, rng: Rng) -> None:
    a_tensor(model, rng).data_type = int(rng.integers(0, 30))


@damage
def converted(model: ModelProto, rng: Rng) -> None:
    """Numbers of another type, rightly stored; what reads them may not take it."""
    tensor = a_tensor(model, rng)
    array = numpy_helper.to_array(tensor)
    if array.dtype.kind in "fiu":
        kind = str(one(("float16", "float64", "int64", "int8", "bool", "complex64", "str"), rng))
        changed = array.astype(object).astype(str).astype(object) if kind == "str" else array.astype(kind)
        tensor.CopyFrom(numpy_helper.from_array(changed, tensor.name))


@damage
def another_shape(model: ModelProto, rng: Rng) -> None:
    tensor = a_tensor(model, rng)
    match int(rng.integers(4)):
        case 0:
            tensor.dims[:] = tensor.dims[::-1]
        case 1:
            tensor.dims.append(a_number(rng))
        case 2:
            tensor.dims[:] = [*tensor.dims, 1, 1]
        case 3:
            tensor.dims[:] = [int(np.prod(tensor.dims))]


@damage
def empty_constant(model: ModelProto, rng: Rng) -> None:
    tensor = a_tensor(model, rng)
    array = numpy_helper.to_array(tensor)
    tensor.CopyFrom(numpy_helper.from_array(array.reshape(-1)[:0].reshape(0, *array.shape[1:]), tensor.name))


@damage
def cut_data(model: ModelProto, rng: Rng) -> None:
    tensor = a_tensor(model, rng)
    if tensor.raw_data:
        tensor.raw_data = tensor.raw_data[: int(rng.integers(0, len(tensor.raw_data)))]


@damage
def typed_data(model: ModelProto, rng: Rng) -> None:
    """Numbers in the field of a type, beside or in the place of raw data."""
    tensor = a_tensor(model, rng)
    if rng.random() < 0.5 and tensor.data_type == TensorProto.FLOAT:
        tensor.float_data[:] = [float(number) for number in numpy_helper.to_array(tensor).reshape(-1)]
        tensor.ClearField("raw_data")
    else:
        tensor.int32_data.extend([1, 2])


@damage
def external(model: ModelProto, rng: Rng) -> None:
    """The data of a constant in a file: the right one, or something else."""
    tensor = a_tensor(model, rng)
    raw = len(tensor.raw_data)
    del tensor.external_data[:]
    tensor.data_location = TensorProto.EXTERNAL
    places = ("weights.bin", "weights.bin", "none.bin", "../secret", "/etc/passwd", "", ".", "a" * 300, "link", "dir")
    tensor.external_data.add(key="location", value=str(one(places, rng)))
    if rng.random() < 0.7:
        tensor.external_data.add(key="offset", value=str(one((0, 0, 64, -1, 10**9, "x", 10**30), rng)))
        tensor.external_data.add(key="length", value=str(one((raw, raw, raw, 0, -1, raw + 1, "", 10**30), rng)))
    tensor.ClearField("raw_data")


@damage
def constant_twice(model: ModelProto, rng: Rng) -> None:
    graph = a_graph(model, rng)
    if graph.initializer:
        graph.initializer.add().CopyFrom(one(graph.initializer, rng))


@damage
def no_constant(model: ModelProto, rng: Rng) -> None:
    graph = a_graph(model, rng)
    if graph.initializer:
        del graph.initializer[int(rng.integers(len(graph.initializer)))]


@damage
def sparse(model: ModelProto, rng: Rng) -> None:
    values = numpy_helper.from_array(np.ones(2, np.float32), str(one(names(model), rng)))
    entry = model.graph.sparse_initializer.add(dims=[8, 8])
    entry.values.CopyFrom(values)
    entry.indices.CopyFrom(numpy_helper.from_array(np.array([0, 9]), "indices"))


@damage
def declared_otherwise(model: ModelProto, rng: Rng) -> None:
    info = an_info(model, rng)
    match int(rng.integers(7)):
        case 0:
            info.type.tensor_type.elem_type = int(rng.integers(0, 30))
        case 1:
            for dim in info.type.tensor_type.shape.dim:
                dim.dim_value = a_number(rng)
        case 2:
            info.type.tensor_type.shape.dim.add(dim_param=a_text(rng))
        case 3:
            info.type.ClearField("value")
        case 4:
            info.type.sequence_type.elem_type.tensor_type.elem_type = TensorProto.FLOAT
        case 5:
            info.type.optional_type.elem_type.tensor_type.elem_type = TensorProto.FLOAT
        case 6:
            info.type.tensor_type.ClearField("shape")


@damage
def all_named_sizes(model: ModelProto, rng: Rng) -> None:
    """Every size of an input a name, the same or others: what fits is no longer told."""
    for dim in model.graph.input[0].type.tensor_type.shape.dim if model.graph.input else ():
        dim.dim_param = str(one(("B", "N", "S", "", "B"), rng))


@damage
def said_of_values(model: ModelProto, rng: Rng) -> None:
    """Declarations of values in between, wrong ones."""
    for name in names(model)[:8]:
        if rng.random() < 0.4:
            info = helper.make_tensor_value_info(
                name, int(rng.integers(1, 24)), [a_number(rng)] if rng.random() < 0.5 else None
            )
            model.graph.value_info.append(info)


@damage
def no_input(model: ModelProto, rng: Rng) -> None:
    graph = a_graph(model, rng)
    del graph.input[: int(rng.integers(1, 3))]


@damage
def output_of_something(model: ModelProto, rng: Rng) -> None:
    info = a_graph(model, rng).output.add(name=str(one(names(model), rng)))
    if rng.random() < 0.7:
        info.type.tensor_type.elem_type = TensorProto.FLOAT


@damage
def no_output(model: ModelProto, rng: Rng) -> None:
    graph = a_graph(model, rng)
    del graph.output[:]


@damage
def versions(model: ModelProto, rng: Rng) -> None:
    match int(rng.integers(5)):
        case 0:
            model.ir_version = int(one((0, 1, 3, 4, 8, 13, 14, 99, 2**62), rng))  # type: ignore[call-overload]
        case 1:
            del model.opset_import[:]
        case 2:
            entry = one(model.opset_import, rng)
            if entry is not None:
                entry.version = int(one((0, 1, 7, 12, 13, 17, 23, 25, 26, -1, 2**62), rng))  # type: ignore[attr-defined, call-overload]
        case 3:
            model.opset_import.add(domain=str(one(("", "ai.onnx", "other"), rng)), version=int(rng.integers(1, 26)))
        case 4:
            del model.opset_import[-1:]


@damage
def metadata(model: ModelProto, rng: Rng) -> None:
    keys = (
        "qcompiler.session_options",
        "qcompiler.pass",
        "pkg.torch.onnx.name_scopes",
        "",
        "qcompiler.scheme",
        "qcompiler.version",
    )
    values = (
        "",
        "{}",
        "[]",
        '{"session.x": "1"}',
        "[" * 2000,
        "null",
        "9" * 5000,
        "'linear'",
        "\x1b[31m",
        "['', 'a.b']",
    )
    places = (
        model.metadata_props,
        a_node(model, rng).metadata_props,
        model.graph.metadata_props,
        an_info(model, rng).metadata_props,
    )
    for _ in range(int(rng.integers(1, 4))):
        place = places[int(rng.integers(len(places)))]
        place.add(key=str(one(keys, rng)), value=str(one(values, rng)))


@damage
def functions(model: ModelProto, rng: Rng) -> None:
    """A function under the name of an operator, one that calls itself, one twice, or with names that are not there."""
    match int(rng.integers(5)):
        case 0:
            node = a_node(model, rng)
            count = max(1, len(node.input))
            body = [helper.make_node("Identity", ["i0"], ["o0"])]
            names = [f"i{index}" for index in range(count)]
            model.functions.append(
                helper.make_function(node.domain, node.op_type, names, ["o0"], body, model.opset_import)
            )
        case 1:
            body = [helper.make_node("Again", ["i"], ["o"], domain="local")]
            model.functions.append(helper.make_function("local", "Again", ["i"], ["o"], body, model.opset_import))
        case 2 if model.functions:
            model.functions.add().CopyFrom(model.functions[0])
        case 3 if model.functions:
            model.functions[0].output.append(a_text(rng))
        case 4 if model.functions:
            model.functions[0].input.append(str(one(("x", "", "w", "more"), rng)))


@damage
def nested(model: ModelProto, rng: Rng) -> None:
    """A node within If within If, as deep as the library's own limit lets it be."""
    inner = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["deep"])], "deep", [], [onnx.ValueInfoProto(name="deep")]
    )
    for level in range(int(one((2, 10, 28, 60), rng))):  # type: ignore[call-overload]
        name = f"level{level}"
        node = helper.make_node(
            "If", ["deep_cond"], [name], then_branch=inner, else_branch=inner if level < 3 else None
        )
        inner = helper.make_graph([node], name, [], [onnx.ValueInfoProto(name=name)])
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "deep_cond"))
    model.graph.node.extend(inner.node)


@damage
def a_tensor_attribute(model: ModelProto, rng: Rng) -> None:
    """A Constant that holds something else than a tensor."""
    name = str(one(names(model), rng)) if rng.random() < 0.3 else "held"
    kinds: tuple[tuple[str, object], ...] = (
        ("value_int", 3), ("value_string", "s"), ("value_strings", ["a", "b"]), ("value_floats", [1.0, 2.0]),
        ("value_ints", [1]), ("value_float", 1.0),
    )  # fmt: skip
    key, value = kinds[int(rng.integers(len(kinds)))]
    model.graph.node.insert(0, helper.make_node("Constant", [], [name], **{key: value}))
    if rng.random() < 0.5 and (node := a_node(model, rng)).input:
        node.input[int(rng.integers(len(node.input)))] = name
