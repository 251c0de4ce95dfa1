"""Broken graphs are found and named; models that differ are measured right."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import qcompiler
from qcompiler.calibration.samples import Samples, from_python
from qcompiler.errors import ModelError, PassError
from qcompiler.evaluation.compare import VALUE_ELEMENTS, check_structure, compare
from qcompiler.evaluation.difference import Difference
from qcompiler.evaluation.likelihood import Divergence, Likelihood
from qcompiler.graph.edit import add_constant
from tests import tiny
from tests.oracles.difference import sqnr_db
from tests.there import there


def language_model(noise: float = 0.0, vocabulary: int = 11, hidden: int = 8) -> ir.Model:
    model = ir.from_onnx_text(
        """<ir_version: 10, opset_import: ["" : 21]>
        lm (int64[b, s] input_ids, int64[b, s] attention_mask, float[v, k] table, float[k, k] weight, float[k, v] head)
            => (float[b, s, v] logits, float[b, s, k] hidden, int64[2] size) {
            h = Gather (table, input_ids)
            y = MatMul (h, weight)
            hidden = Add (y, h)
            logits = MatMul (hidden, head)
            size = Shape (input_ids)
        }"""
    )
    generator = np.random.default_rng(0)
    shapes = {"table": (vocabulary, hidden), "weight": (hidden, hidden), "head": (hidden, vocabulary)}
    for value in list(model.graph.inputs):
        if value.name in shapes:
            array = generator.standard_normal(shapes[value.name], np.float32)
            if value.name == "weight":
                array += noise * np.random.default_rng(1).standard_normal(array.shape, np.float32)
            model.graph.inputs.remove(value)
            value.const_value, value.shape = ir.tensor(array, name=value.name), ir.Shape(array.shape)
            model.graph.register_initializer(value)
    for index, node in enumerate(model.graph):
        node.name = f"n{index}"
    return model


def samples(model: ir.Model, count: int = 3) -> Samples:
    generator = np.random.default_rng(2)
    data = [{"input_ids": generator.integers(0, 11, (1, 4 + index))} for index in range(count)]
    data[-1]["attention_mask"] = np.array([[1] * (2 + count) + [0]])
    return from_python(data, model=model)


def log_probabilities(logits: np.ndarray) -> np.ndarray:
    p = np.exp(logits.astype(np.float64))
    return np.asarray(np.log(p / p.sum(-1, keepdims=True)))


def outputs(model: ir.Model, data: Samples) -> list[dict[str, np.ndarray]]:
    import onnxruntime as ort

    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    return [dict(zip(names, session.run(None, sample), strict=True)) for sample in data]


def test_a_model_equals_itself() -> None:
    comparison = compare(language_model(), language_model(), samples(language_model()), values={"h": "h", "y": "y"})
    assert set(comparison.outputs) == {"logits", "hidden", "size"}
    assert set(comparison.values) == {"h", "y"}
    for measures in (*comparison.outputs.values(), *comparison.values.values()):
        assert (measures.sqnr_db, measures.max_abs_error) == (math.inf, 0)
        assert measures.cosine == pytest.approx(1)
    logits = comparison.outputs["logits"]
    assert logits.kl == pytest.approx(0)
    assert (logits.top1, logits.perplexity_ratio) == (1, 1)
    assert comparison.outputs["hidden"].kl is None
    assert comparison.outputs["hidden"].to_dict().keys() == {"sqnr_db", "total_sqnr_db", "max_abs_error", "cosine"}


@pytest.mark.parametrize("memory_limit", [None, 2000])
def test_measures_are_those_of_the_definitions(memory_limit: int | None) -> None:
    reference, candidate = language_model(), language_model(0.3)
    data = samples(reference)
    comparison = compare(reference, candidate, data, values={"y": "y"}, memory_limit=memory_limit)
    a, b = outputs(reference, data), outputs(candidate, data)
    x = np.concatenate([o["hidden"].ravel() for o in a]).astype(np.float64)
    y = np.concatenate([o["hidden"].ravel() for o in b]).astype(np.float64)
    hidden = comparison.outputs["hidden"]
    assert hidden.total_sqnr_db == pytest.approx(10 * np.log10((x**2).sum() / ((x - y) ** 2).sum()), rel=1e-5)
    assert hidden.sqnr_db == pytest.approx(sqnr_db(x.reshape(-1, 8), y.reshape(-1, 8)), rel=1e-5)
    assert hidden.cosine == pytest.approx(x @ y / np.linalg.norm(x) / np.linalg.norm(y), rel=1e-6)
    assert hidden.max_abs_error == pytest.approx(np.abs(x - y).max(), rel=1e-5)
    kl, same = [], []
    nll: list[list[float]] = [[], []]
    for sample, one, other in zip(data, a, b, strict=True):
        keep = sample["attention_mask"][0] == 1
        p, q = (log_probabilities(o["logits"][0][keep]) for o in (one, other))
        kl += list((np.exp(p) * (p - q)).sum(-1))
        same += list(p.argmax(-1) == q.argmax(-1))
        following = sample["input_ids"][0][keep][1:]
        for part, distribution in zip(nll, (p, q), strict=True):
            part += [-distribution[t, token] for t, token in enumerate(following)]
    logits = comparison.outputs["logits"]
    assert logits.kl == pytest.approx(np.mean(kl), rel=1e-5)
    assert logits.top1 == np.mean(same)
    assert logits.perplexity_ratio == pytest.approx(np.exp(np.mean(nll[1]) - np.mean(nll[0])), rel=1e-5)
    assert 0 < comparison.values["y"].sqnr_db < 30


def test_limit_and_outputs_choose() -> None:
    data = samples(language_model())
    few = compare(language_model(), language_model(0.3), data, outputs=["hidden"], limit=1)
    assert set(few.outputs) == {"hidden"}
    assert (
        few.outputs["hidden"].sqnr_db != compare(language_model(), language_model(0.3), data).outputs["hidden"].sqnr_db
    )


def test_large_values_are_thinned_alike_in_both() -> None:
    def wide(factor: float) -> ir.Model:
        return ir.from_onnx_text(
            f"""<ir_version: 10, opset_import: ["" : 21]>
            g (float[n] x) => (float y) <float[1] f = {{{factor}}}> {{
                a = Mul (x, f)
                y = ReduceSum <keepdims = 0> (a)
            }}"""
        )

    x = np.linspace(-1, 1, 3 * VALUE_ELEMENTS + 5, dtype=np.float32)
    data = from_python([{"x": x}], model=wide(1))
    measures = compare(wide(1.0), wide(1.1), data, values={"a": "a"}).values["a"]
    assert measures.sqnr_db == pytest.approx(20, abs=1e-3)
    assert measures.max_abs_error == pytest.approx(0.1, rel=1e-3)


def test_what_is_not_in_both_models_is_listed() -> None:
    comparison = compare(language_model(), language_model(), samples(language_model()), values={"h": "gone", "y": "y"})
    assert comparison.absent == ("h",)
    assert set(comparison.values) == {"y"}
    with pytest.raises(ModelError, match="the output 'gone' is not in both models"):
        compare(language_model(), language_model(), samples(language_model()), outputs=["gone"])


def test_shapes_that_differ_are_listed_and_not_measured() -> None:
    comparison = compare(language_model(), language_model(vocabulary=12), samples(language_model()), values={"y": "y"})
    assert comparison.reshaped == ("logits",)
    assert "logits" not in comparison.outputs
    assert set(comparison.values) == {"y"}


ROUTED = """block (float[N,8] x, float[8,1] R, float[8,4] W) => (float[N,4] y) {
    [router] r = MatMul (x, R)
    limit = Constant <value_float = 0.0> ()
    chosen = Greater (r, limit)
    axes = Constant <value_ints = [1]> ()
    flat = Squeeze (chosen, axes)
    some = Compress <axis = 0> (x, flat)
    [expert] e = MatMul (some, W)
    zero = Constant <value_ints = [0]> ()
    sum = ReduceSum <keepdims = 1> (e, zero)
    [shared] s = MatMul (x, W)
    y = Add (s, sum)
}"""


def test_a_layer_whose_rows_are_routed_otherwise_after_quantization_does_not_stop_the_compilation() -> None:
    """Scores of exactly 0 leave, once rounding makes them positive: the expert then sees another number of rows."""
    R = np.array([1, -1, 0, 0, 0, 0, 0, 0], np.float32)[:, None]
    x = np.random.default_rng(0).standard_normal((64, 8)).astype(np.float32)
    x[:, 1] = x[:, 0] * (1 + 1e-3 * np.random.default_rng(1).standard_normal(64).astype(np.float32))
    model = tiny.build(ROUTED, R=R, W="normal")
    report = qcompiler.compile(model, "int8-static", calibration=[{"x": x}] * 4).report
    _, expert, shared = report.sites
    assert [site.status for site in report.sites] == ["quantized"] * 3
    assert expert.sqnr_db is None
    assert shared.sqnr_db is not None
    assert "y" in report.outputs
    assert "not compared with the float model: e, whose shape quantization changes" in report.warnings


def test_difference_of_special_numbers() -> None:
    def measured(a: list[float], b: list[float]) -> Difference:
        difference = Difference()
        difference.update(np.array(a, np.float32), np.array(b, np.float32))
        return difference

    assert measured([np.inf, 1], [np.inf, 1]).sqnr_db == math.inf
    assert math.isnan(measured([1, 1], [1, np.nan]).sqnr_db)
    assert math.isnan(measured([1, 1], [1, np.nan]).largest)
    assert measured([0, 0], [0, 1]).sqnr_db == -math.inf
    assert math.isnan(measured([0, 0], [0, np.nan]).sqnr_db)
    assert measured([1, 1], [1, np.inf]).sqnr_db == -math.inf
    assert measured([np.inf, 1], [0, 1]).sqnr_db == -math.inf
    assert (measured([0], [0]).cosine, measured([0], [1]).cosine) == (1, 0)


def test_masked_tokens_and_impossible_ones_do_not_count() -> None:
    logits = np.zeros((1, 3, 4), np.float32)
    logits[0, 2] = [9, 9, 9, 0]
    likelihood = Likelihood()
    likelihood.update(logits, np.array([[0, 1, 2]]), np.array([[1, 1, 0]]))
    assert likelihood.tokens == 1
    assert likelihood.perplexity == pytest.approx(4)
    assert math.isnan(Likelihood().nll)
    divergence = Divergence()
    reference = np.array([[[0, 0, -np.inf]]], np.float32)
    divergence.update(reference, np.zeros((1, 1, 3), np.float32))
    assert divergence.kl == pytest.approx(math.log(1.5))
    divergence.update(reference, reference)
    assert divergence.kl == pytest.approx(math.log(1.5) / 2)


def broken(change: Callable[..., None]) -> ir.Model:
    model = language_model()
    change(model.graph, list(model.graph))
    return model


def later(graph: ir.Graph, nodes: list[ir.Node]) -> None:
    graph.remove(nodes[0])
    graph.append(nodes[0])


def removed(graph: ir.Graph, nodes: list[ir.Node]) -> None:
    other = ir.Node("", "Neg", [nodes[0].outputs[0]], name="other")
    nodes[1].replace_input_with(0, other.outputs[0])
    other.outputs[0].name = "other"


def twice(graph: ir.Graph, nodes: list[ir.Node]) -> None:
    nodes[1].outputs[0].name = "h"


def same_node_name(graph: ir.Graph, nodes: list[ir.Node]) -> None:
    nodes[1].name = "n0"


def nameless(graph: ir.Graph, nodes: list[ir.Node]) -> None:
    nodes[1].replace_input_with(1, ir.Value(name="from nowhere"))


def stale_type(graph: ir.Graph, nodes: list[ir.Node]) -> None:
    graph.initializers["weight"].const_value = ir.tensor(np.zeros((8, 8), np.int8), name="weight")


def stale_shape(graph: ir.Graph, nodes: list[ir.Node]) -> None:
    graph.initializers["weight"].const_value = ir.tensor(np.zeros((8, 9), np.float32), name="weight")


def mixed_types(graph: ir.Graph, nodes: list[ir.Node]) -> None:
    value = ir.Value(name="half", const_value=ir.tensor(np.zeros((8, 8), np.float16)), shape=ir.Shape([8, 8]))
    value.type = ir.TensorType(ir.DataType.FLOAT16)
    graph.register_initializer(value)
    nodes[1].replace_input_with(1, value)


def refused_type(graph: ir.Graph, nodes: list[ir.Node]) -> None:
    value = ir.Value(name="flags", const_value=ir.tensor(np.zeros((8, 8), bool)), shape=ir.Shape([8, 8]))
    value.type = ir.TensorType(ir.DataType.BOOL)
    graph.register_initializer(value)
    nodes[1].replace_input_with(1, value)


def no_such_operator(graph: ir.Graph, nodes: list[ir.Node]) -> None:
    nodes[1].op_type = "MatMull"


def domain_not_imported(graph: ir.Graph, nodes: list[ir.Node]) -> None:
    nodes[1].domain = "com.microsoft"


def wrong_attribute(graph: ir.Graph, nodes: list[ir.Node]) -> None:
    nodes[0].attributes.add(ir.AttrString("axis", "one"))


def lost_output(graph: ir.Graph, nodes: list[ir.Node]) -> None:
    graph.outputs.append(ir.Value(name="lost", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([1])))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (later, r"node 'n1' \(MatMul\) reads 'h' as input 0, and its node 'n0' comes only later"),
        (removed, r"node 'n1' \(MatMul\) reads 'other' as input 0, and its node 'other' is no longer in the graph"),
        (twice, r"node 'n1' \(MatMul\) writes 'h', a name that another value has"),
        (same_node_name, "two nodes are called 'n0'"),
        (nameless, "reads 'from nowhere' as input 1, and nothing writes it"),
        (stale_type, "constant 'weight' is declared FLOAT and holds INT8"),
        (stale_shape, r"constant 'weight' is declared \[8,8\] and holds \[8,9\]"),
        (mixed_types, r"node 'n1' \(MatMul\) reads 'half' as FLOAT16, which must be of the type of 'h', FLOAT"),
        (refused_type, r"node 'n1' \(MatMul\) reads 'flags' as BOOL, a type that the operator does not take"),
        (no_such_operator, "No Op registered for MatMull"),
        (domain_not_imported, "domain 'com.microsoft', of which the model imports no version"),
        (wrong_attribute, "onnx's checker refuses the model: .*axis"),
        (lost_output, "output 'lost' is not written by any node"),
    ],
)
def test_broken_graphs_are_found(change: Callable[..., Any], message: str) -> None:
    model = language_model()
    check_structure(typed(model))
    change(model.graph, list(model.graph))
    with pytest.raises(PassError, match=message):
        check_structure(model)


def typed(model: ir.Model) -> ir.Model:
    next(iter(model.graph)).outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    return model


def test_checking_changes_nothing_and_reads_no_weights(tmp_path: Path) -> None:
    ir.save(language_model(vocabulary=600), tmp_path / "m.onnx", external_data="m.data", size_threshold_bytes=0)
    model = ir.load(tmp_path / "m.onnx")
    (tmp_path / "m.data").unlink()
    order = list(model.graph.initializers)
    check_structure(model)
    assert list(model.graph.initializers) == order
    assert [value.name for value in model.graph.inputs] == ["input_ids", "attention_mask"]


def test_weights_of_bodies_are_not_read_either(tmp_path: Path) -> None:
    weight = ir.tensor(np.ones((32, 32), np.float32), name="W")
    model = ir.from_onnx_text(
        """<ir_version: 10, opset_import: ["" : 21]>
        g (float[n,32] x, bool choose) => (float[n,32] z) {
            z = If (choose) <
                then_branch = t () => (float[n,32] u) { u = MatMul (x, x) },
                else_branch = e () => (float[n,32] v) { v = Identity (x) }
            >
        }"""
    )
    product = model.graph[0].attributes["then_branch"].as_graph()[0]
    product.replace_input_with(1, add_constant(there(product.graph), "W", weight))
    ir.save(model, tmp_path / "m.onnx", external_data="m.data", size_threshold_bytes=0)
    model = ir.load(tmp_path / "m.onnx")
    (tmp_path / "m.data").unlink()
    check_structure(model)
    model.graph[0].attributes["then_branch"].as_graph()[0].attributes["alpha"] = ir.AttrInt64("alpha", 1)
    with pytest.raises(PassError, match="alpha"):  # what is left of the body is checked
        check_structure(model)


def test_bodies_are_checked_with_what_they_see() -> None:
    model = ir.from_onnx_text(
        """<ir_version: 10, opset_import: ["" : 21]>
        g (float[n] x, bool choose) => (float[n] z) {
            a = Mul (x, x)
            z = If (choose) <
                then_branch = t () => (float[n] u) { u = Add (a, x) },
                else_branch = e () => (float[n] v) { v = Identity (x) }
            >
        }"""
    )
    check_structure(model)
    body = list(model.graph)[1].attributes["then_branch"].as_graph()
    body[0].outputs[0].name = "a"
    with pytest.raises(PassError, match="writes 'a', a name that another value has"):
        check_structure(model)


def test_operators_that_onnx_runtime_keeps_in_the_standard_domain() -> None:
    model = ir.from_onnx_text(
        """<ir_version: 10, opset_import: ["" : 21]>
        g (float[n] x, float[n] gain) => (float[n] y) { y = SimplifiedLayerNormalization <axis = -1> (x, gain) }"""
    )
    check_structure(model)
    assert next(iter(model.graph)).domain == ""


def test_values_that_an_exact_pass_divided_are_compared_as_they_were() -> None:
    divisor = np.array([2.0, 0.5, 4.0, 1.0], np.float32)
    text = "g (float[M,4] x, float[4] c) => (float[M,4] y) { v = Mul(x, c)  y = Sum(v) }"
    reference = tiny.build(text, c=np.ones(4, np.float32))
    candidate = tiny.build(text, c=1 / divisor)
    samples = from_python([{"x": np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)}], model=reference)
    told = compare(reference, candidate, samples, values={"v": "v"}, divided={"v": divisor}).values["v"]
    untold = compare(reference, candidate, samples, values={"v": "v"}).values["v"]
    assert told.sqnr_db > 100
    assert untold.sqnr_db < 10
