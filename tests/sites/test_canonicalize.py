"""Canonicalization: the model computes the same before and after, and has the promised form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

import qcompiler
from qcompiler.errors import ModelError, PassError
from qcompiler.graph.check import check_structure
from qcompiler.graph.files import load
from qcompiler.graph.session import session
from qcompiler.sites.canonicalize import _same_table, canonicalize
from qcompiler.sites.find import find_sites
from tests.there import dims

GENERATOR = np.random.default_rng(0)


def parse(graph: str, opset: int = 21, functions: str = "", imports: str = "", **constants: np.ndarray) -> ir.Model:
    """A model from text; inputs named in `constants` become initializers."""
    model = ir.from_onnx_text(f'<ir_version: 8, opset_import: ["" : {opset}{imports}]> {graph} {functions}')
    for value in list(model.graph.inputs):
        if value.name in constants:
            value.const_value = ir.tensor(constants[value.name], name=value.name)
            model.graph.inputs.remove(value)
            model.graph.register_initializer(value)
    return model


def feeds(model: ir.Model) -> dict[str, np.ndarray]:
    return {
        value.name: GENERATOR.standard_normal([d if isinstance(d, int) else 3 for d in value.shape]).astype(np.float32)
        for value in model.graph.inputs
        if value.name is not None and value.shape is not None
    }


def run(model: ir.Model, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    return list(session(model).run(None, inputs))


def canonical(model: ir.Model, inputs: dict[str, np.ndarray] | None = None) -> ir.Model:
    """Canonicalize and check that names, inputs, outputs and results hold."""
    inputs = feeds(model) if inputs is None else inputs
    signature = [value.name for value in (*model.graph.inputs, *model.graph.outputs) if value.const_value is None]
    before = run(model, inputs)
    canonicalize(model)
    for old, new in zip(before, run(model, inputs), strict=True):
        np.testing.assert_array_equal(old, new)
    assert [value.name for value in (*model.graph.inputs, *model.graph.outputs)] == signature
    nodes = list(model.graph.all_nodes())
    names = [node.name for node in nodes]
    assert all(names)
    assert len(set(names)) == len(names)
    values = [value for node in nodes for value in node.outputs if value.name] + list(model.graph.initializers.values())
    assert len({value.name for value in values}) == len(values)
    assert not any(node.op_type == "Constant" for node in nodes)
    assert model.opset_imports[""] >= 21
    return model


def ops(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def test_constants_of_every_kind_become_initializers() -> None:
    model = canonical(
        parse(
            """g (float[A,4] x) => (float[A,4] y, z) {
            a = Constant<value_float=2.0>() b = Constant<value_floats=[1.0,2.0,3.0,4.0]>()
            c = Constant<value = float {0.5}>() d = Constant<value_int=1>() e = Constant<value_ints=[0]>()
            p = Mul(x, a) q = Add(p, b) r = Sub(q, c) y = Relu(r) z = Unsqueeze(y, e) }"""
        )
    )  # fmt: skip
    assert ops(model) == ["Mul", "Add", "Sub", "Relu", "Unsqueeze"]
    assert set(model.graph.initializers) == {"a", "b", "c", "e"}  # d is not read


def test_a_sparse_constant_is_refused() -> None:
    model = parse("g (float[2] x) => (y) { c = Constant<value_float=1.0>() y = Mul(x, c) }")
    attribute = ir.Attr("sparse_value", ir.AttributeType.SPARSE_TENSOR, None)
    model.graph[0].attributes.clear()
    model.graph[0].attributes["sparse_value"] = attribute
    with pytest.raises(ModelError, match="sparse"):
        canonicalize(model)


def test_initializers_that_are_inputs_become_plain() -> None:
    model = parse("g (float[A,4] x, float[4] w) => (float[A,4] y) { y = Mul(x, w) }")
    value = model.graph.inputs[1]
    value.const_value = ir.tensor(np.arange(4, dtype=np.float32), name="w")
    model.graph.register_initializer(value)
    canonical(model, {"x": np.ones((2, 4), np.float32)})
    assert [value.name for value in model.graph.inputs] == ["x"]
    assert set(model.graph.initializers) == {"w"}


def test_names_are_stable_and_unique() -> None:
    text = "g (float[A,4] x) => (float[A,4] y) { a = Relu(x) b = Relu(a) c = Relu(b) y = Relu(c) }"
    model = parse(text)
    model.graph[1].name = model.graph[2].name = "same"  # ONNX Runtime refuses such a model
    canonicalize(model)
    canonical(model)
    assert [node.name for node in model.graph] == ["Relu_a", "same", "same@2", "Relu_y"]


def test_functions_are_inlined_but_not_those_of_qcompiler() -> None:
    functions = """<domain: "mine", opset_import: ["" : 21]> twice (a) => (b) { t = Add(a, a) b = Neg(t) }
                   <domain: "qcompiler", opset_import: ["" : 21]> Half (a) => (b) { b = Abs(a) }"""
    text = "g (float[A,4] x) => (float[A,4] y) { u = mine.twice(x) v = mine.twice(u) y = qcompiler.Half(v) }"
    model = canonical(parse(text, functions=functions, imports=', "mine" : 1, "qcompiler" : 1'))
    assert ops(model) == ["Add", "Neg", "Add", "Neg", "Half"]
    assert [name for _, name, _ in model.functions] == ["Half"]


@pytest.mark.parametrize("function", ["MatMul", "Relu"])
def test_an_operator_comes_before_a_function_of_its_name(function: str) -> None:
    """As in ONNX Runtime, which `canonical` compares with."""
    operands = {"MatMul": "a, b", "Relu": "a"}[function]
    functions = f'<domain: "", opset_import: ["" : 21]> {function} ({operands}) => (c) {{ c = Identity(a) }}'
    text = "g (float[A,4] x, float[4,4] w) => (float[A,4] y) { h = MatMul(x, w) y = Relu(h) }"
    model = canonical(parse(text, functions=functions, w=np.eye(4, dtype=np.float32)[::-1]))
    assert ops(model) == ["MatMul", "Relu"]
    assert not model.functions


@pytest.mark.parametrize("version", [-1, 0, 7])
def test_there_is_one_version_of_the_runtimes_operators(version: int) -> None:
    text = "g (float[A,4] x) => (float[A,4] y) { y = Relu(x) }"
    model = parse(text)
    model.opset_imports["com.microsoft"] = version
    canonicalize(model)
    assert model.opset_imports["com.microsoft"] == 1


def test_a_call_may_not_leave_out_what_its_function_needs() -> None:
    functions = """<domain: "mine", opset_import: ["" : 21]> times (a, w) => (b) { b = MatMul(a, w) }
                   <domain: "mine", opset_import: ["" : 21, "mine" : 1]> both (a, w) => (b) { b = mine.times(a, w) }
                   <domain: "mine", opset_import: ["" : 21]> cut (a, least) => (b) { b = Clip(a, least) }"""
    for call in ("times", "both"):
        model = parse(f"g (float[A,4] x) => (float[A,4] y) {{ y = mine.{call}(x) }}", functions=functions,
                      imports=', "mine" : 1')  # fmt: skip
        with pytest.raises(ModelError, match=r"\(MatMul\) of a function lacks an input, which a call .* leaves out"):
            canonicalize(model)
    text = "g (float[A,4] x) => (float[A,4] y) { y = mine.cut(x) }"
    assert ops(canonical(parse(text, functions=functions, imports=', "mine" : 1'))) == ["Clip"]


def test_identities_go() -> None:
    text = """g (float[A,4] x, float[4] w) => (float[A,4] y, float[A,4] z, float[A,4] u) {
        v = Identity(w) a = Identity(x) b = Mul(a, v)
        y = Identity(b) z = Identity(x) c = Identity(b) u = Identity(c) }"""
    model = canonical(parse(text, w=np.arange(4, dtype=np.float32)))
    # z names an input, and y and u name one value twice: there an Identity has to stay
    assert ops(model).count("Identity") == 2
    (mul,) = (node for node in model.graph if node.op_type == "Mul")
    assert [value.name for value in mul.inputs if value is not None] == ["x", "w"]


def test_identities_inside_bodies() -> None:
    text = """g (float[A,4] x, bool c) => (float[A,4] y) {
        r = Relu(x) y = If(c) <then_branch = t () => (float[A,4] a) { a = Identity(r) },
                               else_branch = e () => (float[A,4] b) { p = Neg(r) b = Identity(p) }> }"""
    model = parse(text)
    for flag in (True, False):
        canonical(model.clone(), {"x": np.ones((2, 4), np.float32), "c": np.array(flag)})


def test_loops_survive_and_their_names_are_unique() -> None:
    text = """g (float[4] x, int64 n, bool t) => (float[4] y) {
        y = Loop(n, t, x) <body = b (int64 i, bool c, float[4] s) => (bool d, float[4] o) {
            one = Constant<value_float=1.0>() r = Add(s, one) o = Add(r, x) d = Identity(c) }> }"""
    model = parse(text)
    model.graph[0].name = "loop"
    inputs = {"x": np.ones(4, np.float32), "n": np.array(3), "t": np.array(True)}
    canonical(model, inputs)


def test_unused_nodes_go() -> None:
    text = "g (float[A,4] x, float[4] w) => (float[A,4] y) { d = Mul(x, w) e = Neg(d) y = Relu(x) }"
    model = canonical(parse(text, w=np.ones(4, np.float32)))
    assert ops(model) == ["Relu"]
    assert not model.graph.initializers


@pytest.mark.parametrize("opset", [13, 14, 15, 17, 18, 19, 20])
def test_old_opsets_are_upgraded(opset: int) -> None:
    split = "a, b = Split<axis=1, num_outputs=2>(x)" if opset >= 18 else "a, b = Split<axis=1>(x)"
    mean = "m = ReduceMean(x, k)" if opset >= 18 else "m = ReduceMean<axes=[-1]>(x)"
    text = f"""g (float[A,4] x, int64[1] k) => (float[A,2] y, float[A,1] n) {{
        {split} {mean} y = Add(a, b) q = Mul(m, m) n = Sqrt(q) }}"""
    model = canonical(parse(text, opset, k=np.array([-1])))
    assert model.opset_imports[""] == 21


@pytest.mark.parametrize("kind", ["L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "SumSquare"])
def test_reductions_are_upgraded(kind: str) -> None:
    text = f"g (float[A,4] x) => (y) {{ p = Abs(x) y = Reduce{kind}<axes=[1], keepdims=0>(p) }}"
    canonical(parse(text, 13))


def test_an_upgrade_leaves_other_domains_and_metadata_alone() -> None:
    text = "g (float[A,4] x, float[4] w) => (float[A,4] y) { n = com.microsoft.Gelu(x) y = Mul(n, w) }"
    model = parse(text, 17, imports=', "com.microsoft" : 1', w=np.ones(4, np.float32))
    model.graph[0].metadata_props["pkg.torch.onnx.name_scopes"] = "['', 'act', 'gelu']"
    model.metadata_props["author"] = "someone"
    canonical(model)
    assert model.graph[0].domain == "com.microsoft"
    assert model.graph[0].metadata_props["pkg.torch.onnx.name_scopes"] == "['', 'act', 'gelu']"
    assert model.metadata_props["author"] == "someone"


def test_newer_opsets_stay() -> None:
    assert canonical(parse("g (float[A,4] x) => (y) { y = Relu(x) }", 23)).opset_imports[""] == 23


def test_a_group_norm_of_unknown_width_is_refused() -> None:
    text = "g (float[A,C,4] x, float[2] s, float[2] b) => (y) { y = GroupNormalization<num_groups=2>(x, s, b) }"
    with pytest.raises(ModelError, match="unknown number of channels"):
        canonicalize(parse(text, 18))


def test_shapes_are_filled_in_and_constants_keep_their_order() -> None:
    constants: dict[str, Any] = {
        name: np.ones((4, 4) if name != "b" else (40, 40), np.float32) for name in ("a", "b", "c")
    }
    text = """g (float[A,4] x, float[4,4] a, float[40,40] b, float[4,4] c) => (y) {
        p = MatMul(x, a) q = MatMul(p, c) r = ReduceSum(b) y = Add(q, r) }"""
    model = canonical(parse(text, **constants))
    assert list(model.graph.initializers) == ["a", "b", "c"]
    assert model.graph[1].outputs[0].shape == ir.Shape(["A", 4])
    assert model.graph[1].outputs[0].dtype == ir.DataType.FLOAT


# ---------------------------------------------------------------------------------------------------- tied weights

TIED = """g (int64[A,S] ids, float[9,4] E, float[{0}] W) => (float[A,S,4] e, y) {{
    e = Gather(E, ids) {1} }}"""


@pytest.mark.parametrize("form", ["MatMul", "Gemm"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_transposed_copy_of_the_table_is_tied(form: str, dtype: Any) -> None:
    table = GENERATOR.standard_normal((9, 4)).astype(dtype)
    kind = "float" if dtype == np.float32 else "float16"
    if form == "MatMul":
        text, weight = TIED.format("4,9", "y = MatMul(e, W)"), table.T.copy()
    else:
        text = TIED.format("9,4", "s = Constant<value_ints=[-1,4]>() f = Reshape(e, s) y = Gemm<transB=1>(f, W)")
        weight = table.copy()
    model = parse(text.replace("float", kind), E=table, W=weight)
    canonical(model, {"ids": np.array([[1, 8, 3]])})
    sites = find_sites(model)
    (linear,), (embedding,) = sites.linears, sites.embeddings
    assert linear.weight is embedding.table
    assert linear.transposed
    assert "W" not in model.graph.initializers


def test_nearly_the_same_is_not_the_same() -> None:
    table = GENERATOR.standard_normal((9, 4)).astype(np.float32)
    weight = table.T.copy()
    weight[3, 8] = np.nextafter(weight[3, 8], 9)
    model = parse(TIED.format("4,9", "y = MatMul(e, W)"), E=table, W=weight)
    canonical(model, {"ids": np.array([[1, 8, 3]])})
    assert "W" in model.graph.initializers


def test_every_number_of_two_tables_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qcompiler.sites.canonicalize.TILE", 2)
    table = GENERATOR.standard_normal((9, 3)).astype(np.float32)
    text = TIED.format("3,9", "y = MatMul(e, W)").replace("9,4", "9,3").replace("A,S,4", "A,S,3")
    for row, column in np.ndindex(9, 3):
        weight = table.T.copy()
        weight[column, row] += 1
        sites = find_sites(parse(text, E=table, W=weight))
        assert not _same_table(sites.linears[0], sites.embeddings[0])
    sites = find_sites(parse(text, E=table, W=table.T.copy()))
    assert _same_table(sites.linears[0], sites.embeddings[0])


# ---------------------------------------------------------------------------------------------------- real exports


@pytest.mark.parametrize(
    "variant",
    ["dynamo", "dynamo-past", "opset23", "fp16", "optimum", pytest.param("genai", marks=pytest.mark.exporters)],
)
def test_exports_compute_the_same(variant: str) -> None:
    from models.export import model_path

    model = load(Path(model_path(variant)))
    length, heads, head_size = 5, 2, 32
    inputs: dict[str, np.ndarray] = {}
    for value in model.graph.inputs:
        assert value.name is not None
        assert value.dtype is not None
        if value.name == "input_ids":
            inputs[value.name] = GENERATOR.integers(0, 3000, (1, length))
        elif value.name == "attention_mask":
            inputs[value.name] = np.ones((1, length), np.int64)
        elif value.name == "position_ids":
            inputs[value.name] = np.arange(length)[None]
        else:  # an empty past
            inputs[value.name] = np.zeros((1, heads, 0, head_size), value.dtype.numpy())
    before = run(model, inputs)
    canonicalize(model)
    for old, new in zip(before, run(model, inputs), strict=True):
        np.testing.assert_allclose(new.astype(np.float32), old.astype(np.float32), rtol=1e-3, atol=1e-4)


def test_a_graph_without_a_name_gets_one() -> None:
    model = ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["" : 21]> g (float[n] x) => (float[n] y) { y = Relu (x) }'
    )
    model.graph.name = None
    with pytest.raises(PassError, match="name"):
        check_structure(model)
    canonicalize(model)
    check_structure(model)


def test_a_negative_size_is_any_size(tmp_path: Path) -> None:
    weight = numpy_helper.from_array(np.eye(16, 8, dtype=np.float32), "w")
    node = helper.make_node("MatMul", ["x", "w"], ["y"], name="fc")
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [-1, size]) for name, size in (("x", 16), ("y", 8)))
    proto = helper.make_model(helper.make_graph([node], "g", [x], [y], [weight]), ir_version=10,
                              opset_imports=[helper.make_opsetid("", 21)])  # fmt: skip
    onnx.save(proto, tmp_path / "model.onnx")
    samples = [{"x": np.ones((2, 16), np.float32)}] * 4
    for data in (samples, "random"):
        result = qcompiler.compile(tmp_path / "model.onnx", "int8-static", calibration=data)
        assert [site.status for site in result.report.sites] == ["quantized"]
        assert dims(result.model.graph.inputs[0])[1] == 16
