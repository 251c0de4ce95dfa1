"""A file that is no usable graph is refused in one sentence when it is loaded; one that is only unusual is taken."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from qcompiler.errors import ModelError
from qcompiler.graph import definitions
from qcompiler.graph.files import load, save, take
from qcompiler.graph.session import session

Change = Callable[[onnx.ModelProto], object]
V = np.ones(16, np.float32)


def given() -> onnx.ModelProto:
    """x → MatMul w0 → h0 → Relu → h1 → MatMul w1 → y."""
    random = np.random.default_rng(0)
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w0"], ["h0"], name="up"),
            helper.make_node("Relu", ["h0"], ["h1"], name="act"),
            helper.make_node("MatMul", ["h1", "w1"], ["y"], name="down"),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 16])],
        [numpy_helper.from_array(random.normal(size=(16, 16)).astype(np.float32), f"w{index}") for index in range(2)],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("my", 1), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def calling(*functions: onnx.FunctionProto) -> Change:
    """The Relu becomes a call of the first of them."""

    def change(model: onnx.ModelProto) -> None:
        model.functions.extend(functions)
        model.graph.node[1].op_type, model.graph.node[1].domain = functions[0].name, "my"

    return change


def function(name: str, *nodes: onnx.NodeProto, attributes: tuple[str, ...] = ()) -> onnx.FunctionProto:
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("my", 1)]
    return helper.make_function("my", name, ["a"], ["b"], list(nodes), opsets, list(attributes))


def call(name: str) -> onnx.NodeProto:
    return helper.make_node(name, ["a"], ["b"], domain="my")


def referring(name: str, to: str) -> onnx.NodeProto:
    made = helper.make_node("Elu", ["a"], ["b"])
    made.attribute.add(name=name, type=onnx.AttributeProto.FLOAT, ref_attr_name=to)
    return made


def node(op_type: str, inputs: list[str], domain: str = "", **attributes: object) -> Change:
    """This in the place of the Relu."""

    def change(model: onnx.ModelProto) -> None:
        made = helper.make_node(op_type, inputs, ["h1"], name="act", domain=domain, **attributes)
        model.graph.node[1].CopyFrom(made)

    return change


def attribute(name: str, **fields: object) -> Change:
    """One more of the Relu, which becomes a Softmax."""

    def change(model: onnx.ModelProto) -> None:
        model.graph.node[1].op_type = "Softmax"
        added = model.graph.node[1].attribute.add(name=name)
        for field, value in fields.items():
            if isinstance(value, list):
                getattr(added, field).extend(value)
            elif isinstance(value, int | float | bytes | str):
                setattr(added, field, value)
            else:
                getattr(added, field).CopyFrom(value)

    return change


def tensor(change: Callable[[onnx.TensorProto], object]) -> Change:
    return lambda model: change(model.graph.initializer[0])


def cut(array: np.ndarray, name: str = "") -> onnx.TensorProto:
    made = numpy_helper.from_array(array, name)
    made.raw_data = made.raw_data[:-1]
    return made


def floats(count: int) -> Change:
    def change(stored: onnx.TensorProto) -> None:
        stored.ClearField("raw_data")
        stored.float_data.extend([1.0] * count)

    return tensor(change)


def sparse(model: onnx.ModelProto) -> None:
    values, indices = numpy_helper.from_array(np.ones(2, np.float32), "s"), numpy_helper.from_array(np.array([1, 2]))
    model.graph.sparse_initializer.add(values=values, indices=indices, dims=[16, 16])


def body(*nodes: onnx.NodeProto, constants: tuple[onnx.TensorProto, ...] = ()) -> Change:
    """The Relu becomes an If with these as both of its bodies."""
    graph = helper.make_graph(
        list(nodes), "body", [], [helper.make_tensor_value_info("q", TensorProto.FLOAT, None)], list(constants)
    )

    def change(model: onnx.ModelProto) -> None:
        model.graph.initializer.append(numpy_helper.from_array(np.array(True), "c"))
        node("If", ["c"], then_branch=graph, else_branch=graph)(model)

    return change


def outside(**entries: str) -> Change:
    def change(stored: onnx.TensorProto) -> None:
        stored.ClearField("raw_data")
        stored.data_location = TensorProto.EXTERNAL
        for key, value in entries.items():
            stored.external_data.add(key=key, value=value)

    return tensor(change)


relu = helper.make_node
REFUSED: dict[str, tuple[Change, str]] = {
    # functions
    "a function calls itself": (calling(function("F", call("F"))), r"calls itself \(F → F\)"),
    "functions call each other": (calling(function("F", call("G")), function("G", call("F"))), "calls itself"),
    "a cycle in a function": (
        calling(function("F", relu("Add", ["a", "q"], ["p"]), relu("Relu", ["p"], ["q"]), relu("Relu", ["q"], ["b"]))),
        "of the function 'F' .* wait for one another",
    ),
    "a function reads what nobody writes": (calling(function("F", relu("Add", ["a", "q"], ["b"]))), "reads 'q'"),
    "a function gives nothing": (calling(function("F", relu("Relu", ["a"], ["q"]))), "should give 'b'"),
    "a short constant in a function": (
        calling(function("F", relu("Constant", [], ["c"], value=cut(V)), relu("Mul", ["a", "c"], ["b"]))),
        "63 bytes",
    ),
    "more inputs than the function": (
        lambda m: (calling(function("F", relu("Relu", ["a"], ["b"])))(m), m.graph.node[1].input.append("x")),
        "has 2 inputs, but its function has 1",
    ),
    # the graph
    "a node reads itself": (node("Relu", ["h1"]), "reads what it writes itself"),
    "nodes wait for one another": (lambda m: m.graph.node[0].input.__setitem__(0, "h1"), "'up' → 'act'|'act' → 'up'"),
    "a body reads its own node": (body(relu("Relu", ["h1"], ["q"])), "reads what it writes itself"),
    "a cycle in a body": (body(relu("Add", ["h0", "q"], ["p"]), relu("Relu", ["p"], ["q"])), "wait for one another"),
    "two writers": (lambda m: m.graph.node.append(relu("Relu", ["h0"], ["h1"])), "which something else writes"),
    "two constants of a name": (
        lambda m: m.graph.initializer.append(numpy_helper.from_array(V, "w0")), "two constants of the name 'w0'"
    ),
    "a constant without a name": (
        lambda m: m.graph.initializer.append(numpy_helper.from_array(V)), "a constant without a name"
    ),
    "two inputs of a name": (lambda m: m.graph.input.append(m.graph.input[0]), "two inputs of the name 'x'"),
    "an output from nowhere": (lambda m: setattr(m.graph.output[0], "name", "z"), "should give 'z'"),
    "no outputs": (lambda m: m.graph.ClearField("output"), "has no outputs"),
    "no opset": (lambda m: m.ClearField("opset_import"), "imports no version"),
    "a type that is none": (
        lambda m: m.graph.value_info.append(helper.make_tensor_value_info("h0", 99, [1])), "element type 99"
    ),
    # inputs of nodes
    "a blank weight": (lambda m: m.graph.node[0].input.__setitem__(1, ""), "has nothing as its input 1"),
    "a missing weight": (lambda m: m.graph.node[0].input.__delitem__(1), "has 1 inputs but needs 2"),
    "a blank input of a Concat": (node("Concat", ["h0", ""], axis=0), "has nothing as its input 1"),
    "a blank input of ONNX Runtime's": (
        node("FusedMatMul", ["h0", ""], "com.microsoft"), r"\(FusedMatMul\) .* has nothing as its input 1"
    ),
    "too many inputs": (node("Relu", ["h0", "x"]), "has 2 inputs but may have 1"),
    "a blank output": (lambda m: m.graph.node[1].output.__setitem__(0, ""), "gives its output no name"),
    "an unknown operator": (node("Relux", ["h0"]), "opset 21 does not have"),
    "no operator": (node("", ["h0"]), "has no operator"),
    # attributes
    "a float for an int": (attribute("axis", type=1, f=1.0), "'axis' as FLOAT, but it must be INT"),
    "a text for an int": (attribute("axis", type=3, s=b"1"), "'axis' as STRING, but it must be INT"),
    "ints for an int": (attribute("axis", type=7, ints=[1]), "'axis' as INTS, but it must be INT"),
    "a value of another type": (attribute("axis", type=7, i=1), "says it is INTS, and holds none"),
    "a tensor without one": (attribute("axis", type=4), "says it is TENSOR, and holds none"),
    "no type": (attribute("axis", i=1), "without a type"),
    "an attribute twice": (
        lambda m: (attribute("axis", type=2, i=1)(m), attribute("axis", type=2, i=1)(m)), "two attributes of the name"
    ),
    "an unknown attribute": (attribute("axes", type=2, i=1), "'axes', which the operator does not know"),
    "a missing attribute": (node("Concat", ["h0", "h0"]), "lacks the attribute 'axis'"),
    "an attribute of ONNX Runtime's": (
        node("FusedMatMul", ["h0", "w1"], "com.microsoft", transB="yes"), "'transB' as STRING, but it must be INT"
    ),
    "a type that there is not": (node("Cast", ["h0"], to=99), "the attribute 'to' .* element type 99"),
    "a missing attribute of ONNX Runtime's": (node("MatMulNBits", ["h0", "w0", "w1"], "com.microsoft"), "lacks .*'K'"),
    "a reference outside of functions": (
        attribute("axis", type=2, ref_attr_name="a"), "from 'a', but is in no function"
    ),
    "a reference that the function lacks": (
        calling(function("F", referring("alpha", "zz"))),
        "its function has no such attribute",
    ),
    # constants
    "raw data, too short": (tensor(lambda t: setattr(t, "raw_data", t.raw_data[:-1])), "there are 1023 bytes"),
    "raw data, too long": (tensor(lambda t: setattr(t, "raw_data", t.raw_data + b"0")), "there are 1025 bytes"),
    "no data": (tensor(lambda t: t.ClearField("raw_data")), "there are 0 entries"),
    "too few numbers": (floats(255), "there are 255 entries"),
    "too many numbers": (floats(257), "there are 257 entries"),
    "numbers of another type": (
        tensor(lambda t: (t.ClearField("raw_data"), t.int64_data.extend([1] * 256))), "lie in int64_data"
    ),
    "data twice": (tensor(lambda t: t.float_data.append(1.0)), "raw bytes lie beside"),
    "a negative size": (tensor(lambda t: t.dims.__setitem__(0, -16)), "sizes are 0 or more"),
    "a huge size": (tensor(lambda t: t.dims.__setitem__(0, 2**62)), "there are 1024 bytes"),
    "no element type": (tensor(lambda t: setattr(t, "data_type", 0)), "element type 0"),
    "an unknown element type": (tensor(lambda t: setattr(t, "data_type", 99)), "element type 99"),
    "half a byte too many": (tensor(lambda t: setattr(t, "data_type", TensorProto.INT4)), "INT4 needs 128"),
    "segments": (tensor(lambda t: setattr(t.segment, "begin", 1)), "stored in segments"),
    "a short constant in a body": (body(relu("Mul", ["h0", "v"], ["q"]), constants=(cut(V, "v"),)), "63 bytes"),
    "a short constant in an attribute": (
        lambda m: m.graph.node.append(relu("Constant", [], ["z"], value=cut(V))), "63 bytes"
    ),
    "a short constant that nobody reads": (lambda m: m.graph.initializer.append(cut(V, "z")), "63 bytes"),
    "a sparse constant": (sparse, "the constant 's' .* is sparse"),
    "a text too few": (
        lambda m: m.graph.initializer.append(TensorProto(name="s", data_type=8, dims=[2], string_data=[b"a"])),
        "there are 1 entries",
    ),
    # external data
    "no location": (outside(offset="0"), "its name is missing"),
    "a location with a NUL": (outside(location="w\0"), "its name is missing"),
    "an offset in words": (outside(location="w", offset="abc"), "the offset in their file is 'abc'"),
    "a negative length": (outside(location="w", length="-4"), "the length in their file is '-4'"),
    "an offset of 5,000 digits": (outside(location="w", offset="9" * 5000), "the offset in their file"),
    "a name of 300 letters": (outside(location="w" * 300), "which does not exist"),
    "a path of 6,000 letters": (outside(location="/".join(["w" * 200] * 30)), "which does not exist"),
    "a folder": (outside(location="."), "which is no file"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_sentence(case: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    change, words = REFUSED[case]
    model = given()
    change(model)
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ModelError, match=words) as caught:
        load(tmp_path / "m.onnx")
    text = str(caught.value)
    assert str(tmp_path) in text
    assert len(text.splitlines()) == 1
    assert capfd.readouterr() == ("", "")
    assert text.count(";") == 1  # what, and what to do


TAKEN: dict[str, Change] = {
    "as it is": lambda m: None,
    "nodes in any order": lambda m: m.graph.node.reverse(),
    "numbers instead of bytes": floats(256),
    "an attribute that a tool noted": attribute("__note", type=3, s=b"x"),
    "an If": body(relu("Relu", ["h0"], ["q"])),
    "an optional input left out": node("Clip", ["h0", "", ""]),
    "a function that has the name of an operator": lambda model: model.functions.append(
        helper.make_function("", "Relu", ["a"], ["b"], [relu("Identity", ["a"], ["b"])], [helper.make_opsetid("", 21)])
    ),
    "a function in any order": calling(function("F", relu("Relu", ["q"], ["b"]), relu("Abs", ["a"], ["q"]))),
}  # fmt: skip


@pytest.mark.parametrize("case", TAKEN)
def test_taken(case: str, tmp_path: Path) -> None:
    model = given()
    TAKEN[case](model)
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    loaded = load(tmp_path / "m.onnx")
    x = np.random.default_rng(1).normal(size=(3, 16)).astype(np.float32)
    (y,) = session(loaded).run(None, {"x": x})
    assert y.shape == (3, 16)


@pytest.mark.parametrize("name", [b"MatMul", b"down", b"h0", b"w1", b"weights.bin", b"a note", b"value"])
def test_a_name_that_is_no_text(name: bytes, tmp_path: Path) -> None:
    """protobuf gives bytes for it, and onnxruntime would take some."""
    model = given()
    entry = model.graph.initializer[1].external_data.add(key="location", value="weights.bin")
    model.graph.node[1].metadata_props.add(key="value", value="a note")
    content = model.SerializeToString()
    assert entry.value == "weights.bin"
    assert name in content
    (tmp_path / "m.onnx").write_bytes(content.replace(name, b"\xff" + name[1:]))
    with pytest.raises(ModelError, match=r"holds a name or note that is no UTF-8 \(b'\\xff.*; export it again"):
        load(tmp_path / "m.onnx")


def test_a_model_in_memory_is_looked_at_too() -> None:
    model = ir.from_proto(given())
    assert take(model) is not model
    model.graph.node("up").replace_input_with(1, None)
    with pytest.raises(ModelError, match=r"the node 'up' .* of the model has nothing as its input 1"):
        take(model)


def test_many_strings_are_written_and_read_again(tmp_path: Path) -> None:
    """ONNX keeps strings in the model's file alone, however many they are."""
    texts = np.array([f"{index} ü" * 20 for index in range(20_000)], dtype=object)
    model = given()
    model.graph.initializer.append(numpy_helper.from_array(texts, "s"))
    model.graph.initializer.append(numpy_helper.from_array(np.ones((600, 600), np.float32), "large"))
    for name, kind in (("s", TensorProto.STRING), ("large", TensorProto.FLOAT)):
        model.graph.node.append(relu("Identity", [name], [f"{name}_out"]))
        model.graph.output.append(helper.make_tensor_value_info(f"{name}_out", kind, None))
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    save(load(tmp_path / "m.onnx"), tmp_path / "out")
    assert (tmp_path / "out" / "model.onnx.data").stat().st_size >= 600 * 600 * 4
    stored = load(tmp_path / "out").graph.initializers["s"].const_value
    assert isinstance(stored, ir.StringTensor)
    assert [text.decode() for text in stored.string_data()] == texts.tolist()


def test_runtime_operators_are_those_of_the_installed_runtime() -> None:
    kept = json.loads(definitions.FILE.read_text(encoding="utf-8"))
    if kept["runtime"] != f"onnxruntime {onnxruntime.__version__}":
        pytest.skip("another onnxruntime")
    assert kept == definitions.installed()


def test_definitions() -> None:
    loop, concat = definitions.definition("Loop", "", 21), definitions.definition("Concat", "", 21)
    assert loop is not None
    assert concat is not None
    assert [loop.needs(index) for index in (0, 1, 2, 5)] == [False, False, False, False]
    assert concat.needs(7)
    assert (concat.most_inputs, concat.most_outputs) == (None, 1)
    assert definitions.definition("Nothing", "", 21) is None
    assert definitions.definition("SimplifiedLayerNormalization", "", 21) is not None
