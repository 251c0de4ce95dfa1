"""The diff: finds what changed between two models, by name or by value written, and nothing where they are equal."""

from __future__ import annotations

import io
import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console

import qcompiler
from qcompiler.errors import ModelError
from qcompiler.graph.metadata import PROVENANCE
from qcompiler.model_diff import Diff, diff
from qcompiler.model_diff.terminal import render_diff
from tests import tiny

WEIGHT = np.arange(12, dtype=np.float32).reshape(4, 3) / 10


def build(
    nodes: list[Any], initializers: dict[str, Any], outputs: tuple[Any, ...] = ("y",), width: int = 4
) -> ir.Model:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", width])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 3]) for name in outputs],
        [numpy_helper.from_array(np.asarray(data), name) for name, data in initializers.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return ir.serde.deserialize_model(model)


def float_model(**changes: np.ndarray) -> ir.Model:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], name="fc"),
        helper.make_node("Add", ["h", "b"], ["y"], name="bias"),
    ]
    return build(nodes, {"w": WEIGHT, "b": np.ones(3, np.float32), **changes})


def quantized_model() -> ir.Model:
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "xs", "xz"], ["xq"], name="x.quantize"),
        helper.make_node("DequantizeLinear", ["xq", "xs", "xz"], ["xd"], name="x.dequantize"),
        helper.make_node("DequantizeLinear", ["wq", "ws", "wz"], ["wd"], name="w.dequantize", axis=1),
        helper.make_node("MatMul", ["xd", "wd"], ["h"], name="fc"),
        helper.make_node("Add", ["h", "b"], ["y"], name="bias"),
    ]
    model = build(
        nodes,
        {
            "xs": np.float32(0.5), "xz": np.uint8(7), "wq": np.ones((4, 3), np.uint8), "b": np.ones(3, np.float32),
            "ws": np.array([0.25, 0.5, 0.125], np.float32), "wz": np.full(3, 128, np.uint8),
        },
    )  # fmt: skip
    for node in model.graph:
        if node.op_type.endswith("quantizeLinear") or node.op_type == "QuantizeLinear":
            node.metadata_props[PROVENANCE] = "quantize-activations"
    return model


def text_of(difference: Diff) -> str:
    stream = io.StringIO()
    render_diff(difference, Console(file=stream, width=160, color_system=None), details=True)
    return stream.getvalue()


def test_a_model_equals_itself_and_its_clone() -> None:
    model = quantized_model()
    for other in (model, model.clone()):
        difference = diff(model, other)
        assert not difference
        assert text_of(difference) == "The models are equal.\n"


def test_added_nodes_carry_their_pass_and_rewired_ones_their_inputs() -> None:
    difference = diff(float_model(), quantized_model())
    by_name = {change.name: change for change in difference.nodes}
    assert set(by_name) == {"x.quantize", "x.dequantize", "w.dequantize", "fc"}
    assert by_name["x.quantize"].kind == "added"
    assert by_name["x.quantize"].passes == "quantize-activations"
    assert by_name["fc"].kind == "changed"
    assert by_name["fc"].detail == "inputs x → xd, w → wd"


def test_initializers_with_types_shapes_and_bytes() -> None:
    difference = diff(float_model(), quantized_model())
    by_name = {change.name: change for change in difference.initializers}
    assert set(by_name) == {"w", "xs", "xz", "wq", "ws", "wz"}
    assert by_name["w"].kind == "removed"
    assert by_name["w"].before is not None
    assert (by_name["w"].before.type, by_name["w"].before.shape, by_name["w"].before.bytes) == ("FLOAT", (4, 3), 48)
    assert by_name["wq"].kind == "added"
    assert by_name["wq"].after is not None
    assert by_name["wq"].after.bytes == 12
    assert difference.before.bytes == {"FLOAT": 60}
    assert difference.after.bytes == {"FLOAT": 28, "UINT8": 16}


def test_quantization_parameters() -> None:
    by_node = {item.node: item for item in diff(float_model(), quantized_model()).quantization}
    assert by_node["x.quantize"].scale == (0.5, 0.5)
    assert by_node["x.quantize"].zero_point == (7, 7)
    assert by_node["x.quantize"].value == "x"
    weights = by_node["w.dequantize"]
    assert (weights.scales, weights.scale, weights.zero_point) == (3, (0.125, 0.5), (128, 128))
    assert (weights.value, weights.type) == ("wq", "UINT8")


def test_a_changed_scale_is_a_change_of_quantization() -> None:
    other = quantized_model()
    other.graph.initializers["xs"].const_value = ir.tensor(np.float32(0.75), name="xs")
    difference = diff(quantized_model(), other)
    assert [item.node for item in difference.quantization] == ["x.quantize", "x.dequantize"]
    assert [(change.kind, change.name) for change in difference.initializers] == [("changed", "xs")]
    assert not difference.nodes


def test_a_node_replaced_under_the_same_name_or_for_the_same_value() -> None:
    same_name = build(
        [helper.make_node("Gemm", ["x", "w", "b"], ["y"], name="fc")], {"w": WEIGHT, "b": np.ones(3, np.float32)}
    )
    difference = diff(float_model(), same_name)
    # Gemm has the layer's weight and name, and takes its bias in.
    assert {(c.kind, c.name, c.before, c.after) for c in difference.nodes} == {
        ("replaced", "fc", "MatMul", "Gemm"),
        ("removed", "bias", "Add", ""),
    }
    fates = [(fate.fate, fate.op, fate.after) for fate in difference.fates]
    assert fates == [("fused", "Add", "Gemm"), ("replaced", "MatMul", "Gemm")]
    renamed = build([helper.make_node("Sub", ["x", "k"], ["y"], name="other")], {"k": WEIGHT[0, 0]})
    before = build([helper.make_node("Add", ["x", "k"], ["y"], name="one")], {"k": WEIGHT[0, 0]})
    assert [(c.kind, c.before, c.after) for c in diff(before, renamed).nodes] == [("replaced", "Add", "Sub")]


def test_kernel_operands_of_contrib_operators() -> None:
    node = helper.make_node(
        "MatMulIntegerToFloat", ["xq", "wq", "xs", "ws", "xz", "wz"], ["y"], name="fc", domain="com.microsoft"
    )
    cast = helper.make_node("Cast", ["x"], ["xq"], name="cast", to=TensorProto.UINT8)
    model = build(
        [cast, node],
        {
            "xs": np.float32(0.5), "xz": np.uint8(3), "wq": np.ones((4, 3), np.uint8),
            "ws": np.array([1, 2, 3], np.float32), "wz": np.full(3, 128, np.uint8),
        },
    )  # fmt: skip
    items = {item.operand: item for item in diff(float_model(), model).quantization}
    assert (items["A"].value, items["A"].scale, items["A"].zero_point) == ("xq", (0.5, 0.5), (3, 3))
    assert (items["B"].value, items["B"].scale, items["B"].scales) == ("wq", (1, 3), 3)


def test_attributes_ports_and_unnamed_nodes() -> None:
    def model(axis: int, output: str) -> ir.Model:
        return build([helper.make_node("Softmax", ["x"], [output], axis=axis)], {}, (output,))

    assert [c.detail for c in diff(model(0, "y"), model(1, "y")).nodes] == ["axis 0 → 1"]
    ports = diff(model(0, "y"), model(0, "z")).ports
    assert [(port.direction, port.name, bool(port.before)) for port in ports] == [
        ("output", "y", True),
        ("output", "z", False),
    ]


def test_empty_inputs_at_the_end_are_none() -> None:
    def model(*inputs: str) -> ir.Model:
        return build([helper.make_node("Clip", ["x", *inputs], ["y"], name="clip")], {"low": np.float32(0)})

    assert not diff(model("low"), model("low", ""))
    assert diff(model("low"), model("", "low")).nodes


def test_weights_without_numbers() -> None:
    def model(name: str) -> ir.Model:
        return build(
            [helper.make_node("MatMul", ["x", "w"], ["y"], name=name)], {"w": np.ones((0, 3), np.float32)}, width=0
        )

    assert not diff(model("fc"), model("fc"))
    assert [(story.before, story.after) for story in diff(model("fc"), model("out")).layers]


def test_what_is_fused_is_told_by_the_operator_that_is_new() -> None:
    """And not by what stands between it and the nodes that stayed."""
    chain = [("Neg", "x", "a"), ("Softmax", "a", "p"), ("Exp", "p", "q"), ("Relu", "q", "y")]
    other = [("LpNormalization", "x", "h"), ("Neg", "h", "r"), ("Relu", "r", "y")]
    models = [
        build([helper.make_node(op, [source], [name], name=name) for op, source, name in steps], {}, width=3)
        for steps in (chain, other)
    ]
    fates = {(fate.fate, fate.op): fate.after for fate in diff(*models).fates if fate.fate != "untouched"}
    assert fates == {("fused", op): "LpNormalization" for op in ("Neg", "Softmax", "Exp")}


def test_unrelated_models_have_nothing_fused() -> None:
    other = build([helper.make_node("Conv", ["x", "k"], ["y"], name="conv")], {"k": np.ones((3, 4, 1), np.float32)})
    found = diff(float_model(), other)
    assert [story.fate for story in found.layers] == ["removed", "added"]
    assert "fused" not in {fate.fate for fate in found.fates}


def test_changed_bytes_are_found_in_external_files_without_reading_them_whole(tmp_path: Path) -> None:
    rows = 4096
    data = np.zeros((rows, 1024), np.float32)  # 16 MB
    paths = []
    for index in range(2):
        data[rows - 1, 5] = index
        proto = helper.make_model(
            helper.make_graph(
                [helper.make_node("MatMul", ["x", "w"], ["y"], name="fc")],
                "g",
                [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", rows])],
                [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 1024])],
                [
                    numpy_helper.from_array(data, "w"),
                    numpy_helper.from_array(np.zeros((2000, 2), np.float32), "unused"),
                ],
            ),
            opset_imports=[helper.make_opsetid("", 21)],
            ir_version=10,
        )
        (tmp_path / str(index)).mkdir()
        paths.append(tmp_path / str(index) / "model.onnx")
        onnx.save(proto, paths[-1], save_as_external_data=True, location="model.onnx.data")
        del proto
    tracemalloc.start()
    difference = diff(*paths)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [(change.kind, change.name) for change in difference.initializers] == [("changed", "w")]
    assert peak < data.nbytes
    assert "(relative error inf)" in text_of(difference)


def test_to_dict_is_plain_data_and_the_text_groups() -> None:
    difference = diff(float_model(), quantized_model())
    json.dumps(difference.to_dict(), allow_nan=False)
    text = text_of(difference)
    assert "DequantizeLinear 0 → 2" in text
    assert "+ 2 × DequantizeLinear by quantize-activations: x.dequantize, w.dequantize" in text
    assert "3 scales 0.125 … 0.5, zero point 128" in text


def test_a_missing_file_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"absent\.onnx does not exist"):
        diff(float_model(), tmp_path / "absent.onnx")


def test_the_public_name_stays_a_function() -> None:
    assert qcompiler.diff is diff
    assert qcompiler.diff is diff, "importing a submodule must not hide the function"


SHARING = """g (float[M,8] x, float[8,8] W, float[8,8] V) => (float[M,8] y) {
    [first] h = MatMul (x, W)  r = Relu (h)  [second] y = MatMul (r, V) }"""


def test_a_layer_that_now_shares_the_weight_of_another_has_changed_though_its_numbers_are_the_same() -> None:
    same = np.random.default_rng(0).normal(size=(8, 8)).astype(np.float32)
    before = tiny.build(SHARING, W=same, V=same)
    after = tiny.build(SHARING.replace(", float[8,8] V", "").replace("r, V", "r, W"), W=same)
    assert [story.fate for story in diff(before, before.clone()).layers] == ["untouched", "untouched"]
    assert [story.fate for story in diff(before, after).layers] == ["untouched", "changed"]


NORMED = """g (float[M,8] x, float[8] g, float[8,6] W) => (float[M,6] y) {
    n = RMSNormalization <axis = -1> (x, g)  [fc] y = MatMul (n, W) }"""


def test_another_gain_alone_is_no_scale_that_moved() -> None:
    rng = np.random.default_rng(0)
    gain, weight = np.exp(rng.normal(size=8)), rng.normal(size=(8, 6))
    factors = np.exp(rng.normal(size=8))

    def model(gain: np.ndarray, weight: np.ndarray) -> ir.Model:
        return tiny.build(NORMED, opset=23, g=gain.astype(np.float32), W=weight.astype(np.float32))

    before = model(gain, weight)
    (moved,) = diff(before, model(gain / factors, weight * factors[:, None])).scales
    assert moved.channels == 8
    assert diff(before, model(gain / factors, weight)).scales == ()
    # Where half of the gains change their sign, what is left agrees by chance, and tells nothing of the whole.
    signs = np.where(np.arange(8) < 4, -1, 1)
    assert diff(before, model(gain / factors * signs, weight * factors[:, None])).scales == ()
