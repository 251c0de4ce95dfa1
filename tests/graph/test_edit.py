"""Edits of a graph: constants are copied on write, names are unique, nothing dangles."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.graph import edit as g
from qcompiler.graph.metadata import PROVENANCE
from tests.there import operand, there


@pytest.fixture
def model() -> ir.Model:
    """y = (x * w) * w + b, with w read twice, and a body that owns a value."""
    text = """<ir_version: 10, opset_import: ["" : 21]>
        m (float[A,2] x, bool c) => (float[A,2] y)
        <float[2] w = {2.0, 3.0}, float[2] b = {1.0, 1.0}> {
            p = Mul(x, w) q = Mul(p, w) r = Add(q, b)
            y = If(c) <then_branch = t () => (float[A,2] u) <float[2] inner = {5.0, 5.0}> { u = Mul(r, inner) },
                       else_branch = e () => (float[A,2] v) { v = Neg(r) }>
        }"""
    model = ir.from_onnx_text(text)
    for node in model.graph.all_nodes():
        node.name = f"node_{node.outputs[0].name}"
    return model


def node(model: ir.Model, name: str) -> ir.Node:
    return next(node for node in model.graph.all_nodes() if node.name == name)


def test_constant_and_array(model: ir.Model) -> None:
    p = node(model, "node_p")
    assert g.constant(p.inputs[0]) is None
    assert g.constant(p.outputs[0]) is None
    assert g.constant(None) is None
    assert p.inputs[1] is not None
    np.testing.assert_array_equal(g.array(p.inputs[1]), [2, 3])
    with pytest.raises(ValueError, match="'x' is not a constant"):
        g.array(model.graph.inputs[0])


def test_an_initializer_that_a_caller_can_feed_is_no_constant(model: ir.Model) -> None:
    model.graph.inputs.append(model.graph.initializers["w"])
    assert g.constant(model.graph.initializers["w"]) is None


def test_names_know_inputs_constants_nodes_values_and_bodies(model: ir.Model) -> None:
    names = g.Names(model.graph)
    for taken in ("x", "w", "node_p", "q", "inner", "u", "node_v", "c"):
        assert names.fresh(taken) == f"{taken}@2"
    assert names.fresh("w") == "w@3"
    assert names.fresh("new") == "new"
    assert names.fresh("new") == "new@2"


def test_set_constant_leaves_other_readers_alone(model: ir.Model) -> None:
    names = g.Names(model.graph)
    p, q = node(model, "node_p"), node(model, "node_q")
    new = g.set_constant(p, 1, np.array([7, 7], np.float32), names)
    assert new.name == "w@2"
    assert q.inputs[1] is model.graph.initializers["w"]
    again = g.set_constant(q, 1, np.array([8, 8], np.float32), names)
    assert again.name == "w"  # nobody reads the old one any more, so the new one takes its name
    assert model.graph.initializers["w"] is again
    with pytest.raises(ValueError, match="is not a constant"):
        g.set_constant(p, 0, np.ones(2, np.float32), names)


def test_set_constant_keeps_the_new_type(model: ir.Model) -> None:
    new = g.set_constant(node(model, "node_r"), 1, np.array([1, 2], np.int8), g.Names(model.graph))
    assert new.dtype == ir.DataType.INT8


def test_set_constant_in_a_body(model: ir.Model) -> None:
    u = node(model, "node_u")
    new = g.set_constant(u, 1, np.ones(2, np.float32), g.Names(model.graph))
    assert new.graph is u.graph
    assert list(there(u.graph).initializers) == ["inner"]


def test_add_constant_of_every_kind(model: ir.Model) -> None:
    scalar = g.add_constant(model.graph, "s", np.array(2, np.float32))
    assert scalar.shape == ir.Shape([])
    strided = g.add_constant(model.graph, "t", np.arange(6, dtype=np.float32).reshape(2, 3).T)
    np.testing.assert_array_equal(g.array(strided), np.arange(6).reshape(2, 3).T)
    packed = g.add_constant(
        model.graph, "u4", ir.Tensor(np.array([1, 2], np.uint8), dtype=ir.DataType.UINT4, shape=ir.Shape([2]))
    )
    assert packed.dtype == ir.DataType.UINT4
    with pytest.raises(ValueError):
        g.add_constant(model.graph, "w", np.array(2, np.float32))


def test_remove_unused_constant_is_careful(model: ir.Model) -> None:
    w = model.graph.initializers["w"]
    g.remove_unused_constant(w)
    assert "w" in model.graph.initializers
    g.remove_unused_constant(model.graph.inputs[0])
    assert model.graph.inputs[0].name == "x"


def test_new_nodes_go_where_they_should(model: ir.Model) -> None:
    q = node(model, "node_q")
    before = g.new_node("Relu", [q.inputs[0]], "before", like=q.inputs[0])
    g.insert_before(q, [before])
    q.replace_input_with(0, before.outputs[0])
    after = g.new_node("Cast", [q.outputs[0]], "after", dtype=ir.DataType.FLOAT16, attributes={"to": 10})
    g.insert_after(q, [after])
    order = [node.name for node in model.graph]
    assert order.index("node_p") < order.index("before") < order.index("node_q") < order.index("after")
    assert before.outputs[0].shape == operand(q, 0).shape
    assert after.outputs[0].dtype == ir.DataType.FLOAT16
    assert after.attributes["to"].as_int() == 10


def test_provenance(model: ir.Model) -> None:
    p, q = node(model, "node_p"), node(model, "node_q")
    p.metadata_props["pkg.torch.onnx.name_scopes"] = "['', 'a', 'b']"
    for name in ("smooth-quant", "gptq", "smooth-quant"):
        g.add_provenance(p, name)
    assert p.metadata_props[PROVENANCE] == "smooth-quant,gptq"
    g.inherit([q], p, "lower")
    assert q.metadata_props[PROVENANCE] == "smooth-quant,gptq,lower"
    assert q.metadata_props["pkg.torch.onnx.name_scopes"] == "['', 'a', 'b']"
    assert p.metadata_props[PROVENANCE] == "smooth-quant,gptq"


def test_a_name_that_contains_another_is_another() -> None:
    single = ir.node("Relu", [ir.Value(name="x")])
    g.add_provenance(single, "gptq-w4")
    g.add_provenance(single, "gptq")
    assert single.metadata_props[PROVENANCE] == "gptq-w4,gptq"


def test_removing_a_node_takes_what_only_it_read(model: ir.Model) -> None:
    r, q = node(model, "node_r"), node(model, "node_q")
    g.remove_node_if_unused(r)
    assert r.graph is model.graph  # a body reads it
    r.outputs[0].replace_all_uses_with(model.graph.inputs[0])
    g.remove_node_if_unused(r)
    assert [node.name for node in model.graph] == ["node_y"]
    assert not model.graph.initializers
    assert q.graph is None


def test_removing_a_node_that_reads_one_value_twice() -> None:
    text = """<ir_version: 10, opset_import: ["" : 21]>
        m (float[2] x) => (float[2] y) { a = Relu(x) b = Add(a, a) y = Neg(x) }"""
    model = ir.from_onnx_text(text)
    g.remove_node_if_unused(model.graph[1])
    assert [node.op_type for node in model.graph] == ["Neg"]
