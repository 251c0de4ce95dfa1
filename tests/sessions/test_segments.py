"""Running a model piece by piece gives, bit for bit, what running it in one piece gives."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from models.export import MissingEnvironmentError, model_path
from qcompiler.calibration.samples import from_python
from qcompiler.errors import DataError, ModelError
from qcompiler.graph import files as model_io
from qcompiler.sessions import segments
from qcompiler.sessions.segments import plan, run
from qcompiler.sessions.session import Kept
from qcompiler.sites.canonicalize import canonicalize
from qcompiler.sites.find import find_sites
from tests.there import there

HIDDEN, LAYERS = 32, 4
MATRIX = HIDDEN * HIDDEN * 4  # bytes
BIG = 1 << 30


def constant(name: str, array: np.ndarray) -> ir.Value:
    return ir.Value(
        name=name, type=ir.TensorType(ir.DataType.from_numpy(array.dtype)), shape=ir.Shape(array.shape),
        const_value=ir.tensor(array, name=name),
    )  # fmt: skip


def transformer(layers: int = LAYERS) -> ir.Model:
    """Decoder blocks whose norms also add the residual, so that two outputs of one node live on."""
    lines = ["h_0 = Gather (embedding, input_ids)", "zero_0 = Sub (h_0, h_0)", "mask = Cast <to = 1> (attention_mask)",
             "wide = Unsqueeze (mask, axis)", "turned = Transpose <perm = [1, 0]> (embedding)"]  # fmt: skip
    for i in range(layers):
        lines += [
            f"n_{i}, m_{i}, s_{i}, r_{i} = com.microsoft.SkipSimplifiedLayerNormalization (h_{i}, zero_{i}, gain)",
            f"q_{i} = MatMul (n_{i}, wq_{i})",
            f"k_{i} = MatMul (n_{i}, wk_{i})",
            f"kt_{i} = Transpose <perm = [0, 2, 1]> (k_{i})",
            f"a_{i} = MatMul (q_{i}, kt_{i})",
            f"p_{i} = Softmax <axis = -1> (a_{i})",
            f"o_{i} = MatMul (p_{i}, k_{i})",
            f"om_{i} = Mul (o_{i}, wide)",
            f"h_{i + 1} = MatMul (om_{i}, wo_{i})",
            f"zero_{i + 1} = Identity (r_{i})",
        ]
    lines += [f"last = Add (h_{layers}, zero_{layers})", "logits = MatMul (last, turned)"]
    body = "\n".join(lines)
    model = ir.from_onnx_text(
        f"""<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>
        lm (int64[b, s] input_ids, int64[b, s] attention_mask) => (float[b, s, v] logits) {{ {body} }}"""
    )
    return with_constants(model, layers)


def with_constants(model: ir.Model, layers: int) -> ir.Model:
    generator = np.random.default_rng(0)
    arrays = {"axis": np.array([-1]), "gain": generator.random(HIDDEN, np.float32)}
    arrays["embedding"] = generator.standard_normal((50, HIDDEN), np.float32)
    for i in range(layers):
        for letter in "qko":
            arrays[f"w{letter}_{i}"] = generator.standard_normal((HIDDEN, HIDDEN), np.float32) / 4
    new = {name: constant(name, array) for name, array in arrays.items()}
    for node in model.graph:
        node.name = f"node_{node.outputs[0].name}"
        for index, value in enumerate(node.inputs):
            if value is not None and value.name in new:
                node.replace_input_with(index, new[value.name])
    for value in new.values():
        model.graph.register_initializer(value)
    return model


def tokens(count: int = 3) -> list[dict[str, np.ndarray]]:
    generator = np.random.default_rng(1)
    lengths = [5 + 3 * index for index in range(count)]
    return [
        {"input_ids": generator.integers(0, 50, (1, length)), "attention_mask": np.ones((1, length), np.int64)}
        for length in lengths
    ]


def collected(
    model: ir.Model, samples: Iterable[Mapping[str, np.ndarray]], wanted: Sequence[str], memory_limit: int | None
) -> dict[tuple[str, int], np.ndarray]:
    found = {}

    def consume(name: str, index: int, array: np.ndarray) -> None:
        assert (name, index) not in found
        found[name, index] = array.copy()

    run(model, samples, wanted, consume, memory_limit=memory_limit)
    return found


def all_values(model: ir.Model) -> list[str]:
    names = [there(value.name) for node in model.graph for value in node.outputs]
    return [name for name in names if not name.startswith(("m_", "s_"))]


def test_segments_compute_exactly_what_the_whole_computes() -> None:
    model, samples = transformer(), tokens()
    wanted = ["input_ids", *all_values(model)]
    limit = int(3.5 * 3 * MATRIX / segments.WEIGHT_SHARE)  # constants in memory count threefold
    assert len(plan(model.graph, wanted, int(limit * segments.WEIGHT_SHARE))) >= LAYERS
    whole, pieces = (collected(model, samples, wanted, bytes_) for bytes_ in (BIG, limit))
    assert whole.keys() == pieces.keys()
    assert len(whole) == len(samples) * len(wanted)
    for key, array in whole.items():
        np.testing.assert_array_equal(pieces[key], array)


def test_weights_stay_within_the_budget_and_cuts_are_narrow() -> None:
    graph = transformer(8).graph
    budget = 7 * 3 * MATRIX
    pieces = plan(graph, ["logits"], budget)
    assert 3 <= len(pieces) <= 8
    assert all(piece.weight_bytes <= budget for piece in pieces)
    # A block hands on its output, the residual stream beside it, and the mask that all blocks read.
    assert max(len(piece.kept) for piece in pieces) <= 3
    assert pieces[-1].kept == ()


def test_one_node_larger_than_the_budget_is_a_segment() -> None:
    pieces = plan(transformer().graph, ["logits"], 1)
    assert max(piece.weight_bytes for piece in pieces) >= 3 * MATRIX
    assert len(collected(transformer(), tokens(2), ["logits"], 1)) == 2


def test_without_a_limit_there_is_one_segment() -> None:
    assert len(plan(transformer().graph, ["logits", "h_1"], None)) == 1


def test_what_is_not_wanted_is_not_run() -> None:
    model = transformer()
    (piece,) = plan(model.graph, ["h_1"], None)
    assert piece.weight_bytes < 3 * 5 * MATRIX
    assert set(collected(model, tokens(1), ["h_1"], BIG)) == {("h_1", 0)}
    assert plan(model.graph, ["input_ids"], 1) == []
    assert collected(model, tokens(2), ["input_ids"], 1)["input_ids", 1].shape == (1, 8)


def test_values_computed_from_constants_alone_never_cross_a_cut() -> None:
    """The tied embedding is transposed in the segment that reads it, however early its node stands."""
    pieces = plan(transformer().graph, ["logits"], 3 * MATRIX)
    assert not any("turned" in piece.kept for piece in pieces)
    assert plan(transformer().graph, ["turned"], 1)[0].outputs == ("turned",)


def test_values_between_segments_go_to_disk_where_they_are_many(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    model, samples = transformer(), tokens()
    written = []
    write = Kept._write

    def counted(self: Kept, array: np.ndarray) -> Any:
        written.append(1)
        return write(self, array)

    monkeypatch.setattr(Kept, "_write", counted)
    pieces = collected(model, samples, ["logits"], 1000)
    assert written
    assert list(tmp_path.iterdir()) == []
    for key, array in collected(model, samples, ["logits"], BIG).items():
        np.testing.assert_array_equal(pieces[key], array)


def test_kept_arrays_survive_the_disk_whatever_their_type() -> None:
    for dtype in (ir.DataType.BFLOAT16, ir.DataType.FLOAT8E4M3FN, ir.DataType.FLOAT16, ir.DataType.BOOL):
        array = np.array([[0.5, -1.5, 0]]).astype(dtype.numpy())
        with Kept(capacity=0) as kept:
            kept.put("a", 0, array)
            assert kept.on_disk == 1
            assert kept.get("a", 0).dtype == array.dtype
            np.testing.assert_array_equal(kept.get("a", 0), array)


def test_samples_are_read_once_and_progress_counts_all_runs() -> None:
    model, samples, calls = transformer(), tokens(), []
    run(
        model, iter(samples), ["logits"], lambda *_: None, memory_limit=12 * MATRIX, progress=lambda *a: calls.append(a)
    )
    count = len(plan(model.graph, ["logits"], int(12 * MATRIX * segments.WEIGHT_SHARE)))
    assert count > 1
    assert calls[-1] == (count * len(samples), count * len(samples))


def test_the_model_is_left_as_it_was() -> None:
    model = transformer()
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    collected(model, tokens(), all_values(model), 10 * MATRIX)
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


def test_a_body_reads_values_from_outside() -> None:
    model = ir.from_onnx_text(
        """<ir_version: 10, opset_import: ["" : 21]>
        g (float[n] x, bool choose) => (float[n] z) {
            a = Mul (x, x)
            b = Neg (a)
            c = Abs (b)
            z = If (choose) <
                then_branch = t () => (float[n] u) { u = Add (a, c) },
                else_branch = e () => (float[n] v) { v = Identity (x) }
            >
        }"""
    )
    for index, node in enumerate(model.graph):
        node.name = f"n{index}"
    samples = [{"x": np.arange(3, dtype=np.float32), "choose": np.array(flag)} for flag in (True, False)]
    assert len(plan(model.graph, ["z"], 0)) == 1, "nothing to save where there are no weights"
    whole = collected(model, samples, ["z", "b"], BIG)
    assert whole["z", 0].tolist() == [0, 2, 8]
    assert whole["z", 1].tolist() == [0, 1, 2]


def test_a_captured_value_crosses_a_cut() -> None:
    model = ir.from_onnx_text(
        """<ir_version: 10, opset_import: ["" : 21]>
        g (float[n] x, bool choose) => (float[n] z)
        <float[1] w1 = {2}, float[1] w2 = {3}, float[1] w3 = {1}>
        {
            a = Mul (x, w1)
            b = Mul (x, w2)
            z = If (choose) <
                then_branch = t () => (float[n] u) { u = Add (a, b) },
                else_branch = e () => (float[n] v) { v = Sub (x, w3) }
            >
        }"""
    )
    samples = [{"x": np.arange(3, dtype=np.float32), "choose": np.array(flag)} for flag in (True, False)]
    pieces = plan(model.graph, ["z"], 1)
    assert len(pieces) == 3
    assert pieces[1].kept == ("a", "b") or set(pieces[2].inputs) == {"a", "b", "x", "choose"}
    found = collected(model, samples, ["z"], 1)
    assert found["z", 0].tolist() == [0, 5, 10]
    assert found["z", 1].tolist() == [-1, 0, 1]


def test_sequences_are_not_cut() -> None:
    model = ir.from_onnx_text(
        """<ir_version: 10, opset_import: ["" : 21]>
        g (float[n] x) => (float[n] z)
        <float[1] w1 = {2}, float[1] w2 = {3}, int64 first = {0}>
        {
            a = Mul (x, w1)
            s = SequenceConstruct (a, x)
            b = Mul (a, w2)
            c = SequenceAt (s, first)
            z = Add (b, c)
        }"""
    )
    found = collected(model, [{"x": np.ones(2, np.float32)}], ["z"], 1)
    assert found["z", 0].tolist() == [8, 8]
    assert not any("s" in piece.kept for piece in plan(model.graph, ["z"], 1))
    with pytest.raises(
        ModelError, match=r"the value 's' has the type seq\(tensor\(float\)\), which cannot be measured"
    ):
        collected(model, [{"x": np.ones(2, np.float32)}], ["s"], None)


def test_types_that_numpy_lacks() -> None:
    model = ir.from_onnx_text(
        """<ir_version: 10, opset_import: ["" : 21]>
        g (float[n] x) => (float[n] z)
        <float[1] w1 = {2}, float[1] w2 = {3}>
        {
            a = Mul (x, w1)
            b = Cast <to = 16> (a)
            c = Cast <to = 1> (b)
            z = Mul (c, w2)
        }"""
    )
    for limit in (None, 1):
        found = collected(model, [{"x": np.array([1.001, 2], np.float32)}], ["b", "z"], limit)
        assert found["b", 0].dtype == ir.DataType.BFLOAT16.numpy()
        assert found["z", 0].tolist() == [6, 12]


def test_unknown_and_constant_values() -> None:
    for name, message in (("nothing", "has no value 'nothing'"), ("gain", "'gain' is a constant")):
        with pytest.raises(ModelError, match=message):
            plan(transformer().graph, [name], None)


def test_a_sample_that_does_not_go_through_is_named() -> None:
    samples = tokens()
    samples[2]["attention_mask"] = np.ones((1, 3), np.int64)
    with pytest.raises(DataError, match=r"sample 2 .*: 'attention_mask' has s = 3 and 'input_ids' has s = 11"):
        collected(transformer(), samples, ["logits"], None)


def test_an_operator_without_a_kernel_is_a_model_error() -> None:
    model = ir.from_onnx_text(
        """<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>
        g (float[n] x) => (float[n] z) { z = com.microsoft.NoSuchOperator (x) }"""
    )
    with pytest.raises(ModelError, match="NoSuchOperator"):
        collected(model, [{"x": np.ones(1, np.float32)}], ["z"], None)


@pytest.mark.parametrize(
    "variant",
    ["dynamo-past", "optimum", "opset23", pytest.param("genai", marks=pytest.mark.exporters)],
)
def test_exported_models_in_pieces(variant: str) -> None:
    try:
        model = model_io.load(model_path(variant))
    except MissingEnvironmentError as error:
        pytest.skip(str(error))
    canonicalize(model)
    data = from_python([{"input_ids": np.arange(length)[None]} for length in (7, 12)], model=model)
    wanted = [there(site.input.name) for site in find_sites(model).linears] + ["logits"]
    limit = int((4 << 20) / segments.WEIGHT_SHARE)
    assert len(plan(model.graph, wanted, 4 << 20)) > 2
    whole, pieces = (collected(model, data, wanted, bytes_) for bytes_ in (BIG, limit))
    assert whole.keys() == pieces.keys()
    for key, array in whole.items():
        np.testing.assert_array_equal(pieces[key], array)


def test_numbers_by_chance_are_drawn_once() -> None:
    """What reads no input could be computed anew in each segment, but these numbers would be others there."""
    size = 64
    text = f"""<ir_version: 10, opset_import: ["" : 21]>
        m (float[n, {size}] x) => (float[n, {size}] b, float[n, {size}] d) {{
            m = Abs (x)  noise = RandomNormal <shape = [{size}]> ()
            b = Add (m, noise)  p = MatMul (b, w_0)  q = MatMul (p, w_1)  d = Add (q, noise) }}"""
    model = ir.from_onnx_text(text)
    for node in model.graph:
        node.name = f"node_{node.outputs[0].name}"
        for index, value in enumerate(node.inputs):
            if value is not None and value.name in ("w_0", "w_1"):
                eye = constant(str(value.name), np.eye(size, dtype=np.float32))
                node.replace_input_with(index, eye)
                model.graph.register_initializer(eye)
    samples = [{"x": np.zeros((1, size), np.float32)}]
    limit = int(1.5 * 3 * size * size * 4 / segments.WEIGHT_SHARE)
    assert len(plan(model.graph, ["b", "d"], int(limit * segments.WEIGHT_SHARE))) > 1
    found = collected(model, samples, ["b", "d"], limit)
    # With eyes for weights and zeros for x: b is the noise, and d is twice that. (ONNX Runtime seeds a node by its
    # place in the graph: there is one before it here, and none where it would be drawn again.)
    np.testing.assert_allclose(found["d", 0], 2 * found["b", 0], rtol=1e-6)
