"""What a diff tells of the scales and zero points of every operator on codes that ONNX Runtime has."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler import diff
from qcompiler.model_diff.node_pairing import pair_nodes

HEAD = '<ir_version: 10, opset_import: ["": 21]>'
RUNTIME = "com.microsoft"
# Inputs: x is computed, w the codes of a weight, s1 a scale and z2 a zero point of this value (capitals: [4, 1]).
# Then (operand, scale, zero point) of each quantized operand, None where the node cannot tell.
CASES: dict[str, tuple[str, str, list[tuple[str, float | None, int | None]]]] = {
    "QLinearMatMul": ("", "x s1 z2 w s4 z5 s6 z7", [("A", 1, 2), ("B", 4, 5), ("Y", 6, 7)]),
    "QLinearConv": ("", "x s1 z2 w s4 z5 s6 z7", [("X", 1, 2), ("W", 4, 5), ("Y", 6, 7)]),
    "QGemm": (RUNTIME, "x s1 z2 w s4 z5 - s7 z8", [("A", 1, 2), ("B", 4, 5), ("Y", 7, 8)]),
    "QAttention": (RUNTIME, "x w x s3 s4 - z6 z7", [("input", 3, 6), ("weight", 4, 7)]),
    "DynamicQuantizeMatMul": (RUNTIME, "x w s2 z3", [("B", 2, 3)]),
    "MatMulIntegerToFloat": (RUNTIME, "x w s2 s3 z4 z5", [("A", 2, 4), ("B", 3, 5)]),
    "MatMulNBits": (RUNTIME, "x w S2 Z3", [("B", 2, 3)]),
    "MatMulBnb4": (RUNTIME, "x w s2", [("B", 2, None)]),
    "MatMulBlockQuantizedFp8Weight": (RUNTIME, "x w s2", [("B", 2, None)]),
    "GemmFloat8": (RUNTIME, "x w - s3 s4", [("A", 3, None), ("B", 4, None)]),
    "GatherBlockQuantized": (RUNTIME, "w x S2 Z3", [("data", 2, 3)]),
    "QLinearAdd": (RUNTIME, "x s1 z2 w s4 z5 s6 z7", [("A", 1, 2), ("B", 4, 5), ("C", 6, 7)]),
    "QLinearMul": (RUNTIME, "x s1 z2 w s4 z5 s6 z7", [("A", 1, 2), ("B", 4, 5), ("C", 6, 7)]),
    "QLinearSigmoid": (RUNTIME, "x s1 z2 s3 z4", [("X", 1, 2), ("Y", 3, 4)]),
    "QLinearLeakyRelu": (RUNTIME, "x s1 z2 s3 z4", [("X", 1, 2), ("Y", 3, 4)]),
    "QLinearAveragePool": (RUNTIME, "x s1 z2 s3 z4", [("X", 1, 2), ("Y", 3, 4)]),
    "QLinearGlobalAveragePool": (RUNTIME, "x s1 z2 s3 z4", [("X", 1, 2), ("Y", 3, 4)]),
    "QLinearSoftmax": (RUNTIME, "x s1 z2 s3 z4", [("X", 1, 2), ("Y", 3, 4)]),
    "QLinearConcat": (RUNTIME, "s1 z2 x s3 z4 x s5 z6", [("input", 3, 4), ("input", 5, 6), ("Y", 1, 2)]),
    "QLinearWhere": (RUNTIME, "x x s2 z3 x s5 z6 s7 z8", [("X", 2, 3), ("Y", 5, 6), ("Z", 7, 8)]),
    "DynamicQuantizeLSTM": (RUNTIME, "x w w - - - - - s8 z9 s10 z11", [("W", 8, 9), ("R", 10, 11)]),
    "QMoE": (RUNTIME, "x x w s3 - w s6 - w s9", [(f"fc{i}_experts_weights", i * 3, None) for i in (1, 2, 3)]),
    "QuantizeLinear": ("", "x s1 z2", [("", 1, 2)]),
    "DequantizeLinear": ("", "w s1 z2", [("", 1, 2)]),
    "GroupQueryAttention": (RUNTIME, "x x x x x x x - - - - - s12 s13",
                            [("past_key", 12, None), ("past_value", 13, None)]),
}  # fmt: skip
# What the definitions of operators want beside their inputs.
ATTRIBUTES: dict[str, dict[str, object]] = {
    "QAttention": {"num_heads": 1}, "GroupQueryAttention": {"num_heads": 1, "kv_num_heads": 1},
    "MatMulNBits": {"K": 4, "N": 4, "bits": 8, "block_size": 16},
    "MatMulBnb4": {"K": 4, "N": 4, "block_size": 16, "quant_type": 1},
    "QLinearAveragePool": {"kernel_shape": [1]}, "QLinearSoftmax": {"opset": 13}, "QLinearConcat": {"axis": 0},
}  # fmt: skip


def model(op_type: str, domain: str, text: str) -> ir.Model:
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([2, 4]))
    constants = []

    def value(index: int, word: str) -> ir.Value | None:
        if word in ("x", "-"):
            return x if word == "x" else None
        kind, shape = np.float32 if word[0] in "sS" else np.uint8, (4, 1) if word[0].isupper() else (1,)
        data = np.ones((4, 4), np.uint8) if word == "w" else np.full(shape, float(word[1:]), kind)
        tensor = ir.tensor(data, name=f"i{index}")
        constants.append(ir.Value(name=f"i{index}", const_value=tensor, type=ir.TensorType(tensor.dtype),
                                  shape=ir.Shape(data.shape)))  # fmt: skip
        return constants[-1]

    attributes = ir.convenience.convert_attributes(ATTRIBUTES.get(op_type, {}))
    node = ir.Node(domain, op_type, [value(*item) for item in enumerate(text.split())], attributes, name="kernel")
    node.outputs[0].name = "y"
    graph = ir.Graph([x], node.outputs, nodes=[node], initializers=constants, name="g",
                     opset_imports={"": 21, RUNTIME: 1})  # fmt: skip
    return ir.Model(graph, ir_version=10)


@pytest.mark.parametrize("op_type", CASES)
def test_scales_and_zero_points_of_an_operator(op_type: str) -> None:
    domain, text, expected = CASES[op_type]
    before = ir.from_onnx_text(f"{HEAD} g (float[2,4] x) => (float[2,4] y) {{ y = Relu (x) }}")
    found = diff(before, model(op_type, domain, text)).quantization
    assert [
        (item.operand, item.scale[0] if item.scale else None, item.zero_point[0] if item.zero_point else None)
        for item in found
    ] == expected
    assert {item.op for item in found} == {f"{domain}.{op_type}".removeprefix(".")}


SUMS = """<ir_version: 10, opset_import: ["": 21]> g (float[rows, 4] x) => (float[rows, 3] y)
<uint8[4, 3] W, uint8 z = {7}, float[3] s = {1, 2, 3}> {
    codes, scale, zero = DynamicQuantizeLinear (x)
    [fc] sums = MatMulInteger (codes, W, zero, z)
    whole = Cast <to = 1> (sums)
    both = Mul (scale, s)
    y = Mul (whole, both)
}"""


def test_integer_products_have_their_scales_around_them() -> None:
    """The activation's are where its codes are made, the weight's behind the sums."""
    weight = ir.tensor(np.arange(12, dtype=np.uint8).reshape(4, 3), name="W")
    after = ir.from_onnx_text(SUMS, initializers=[weight])
    plain = f"{HEAD} g (float[rows, 4] x) => (float[rows, 3] y) {{ y = MatMul (x, W) }}"
    before = ir.from_onnx_text(plain, initializers=[ir.tensor(np.zeros((4, 3), np.float32), name="W")])
    found = {(item.op, item.operand): item for item in diff(before, after).quantization}
    assert list(found) == [("DynamicQuantizeLinear", ""), ("MatMulInteger", "A"), ("MatMulInteger", "B")]
    assert found["DynamicQuantizeLinear", ""].value == "x"
    assert (found["MatMulInteger", "A"].scales, found["MatMulInteger", "A"].scale) == (1, None)
    assert (found["MatMulInteger", "B"].scales, found["MatMulInteger", "B"].scale) == (3, (1.0, 3.0))
    assert found["MatMulInteger", "B"].zero_point == (7.0, 7.0)


def test_what_quantize_dynamic_makes_is_told(tmp_path: Path) -> None:
    peer = pytest.importorskip("onnxruntime.quantization")
    text = f"{HEAD} g (float[rows, 64] x) => (float[rows, 32] y) {{ [fc] y = MatMul (x, W) }}"
    weight = np.random.default_rng(0).normal(size=(64, 32)).astype(np.float32)
    ir.save(ir.from_onnx_text(text, initializers=[ir.tensor(weight, name="W")]), tmp_path / "a.onnx")
    peer.quantize_dynamic(tmp_path / "a.onnx", tmp_path / "b.onnx")
    found = {(item.op, item.operand): item for item in diff(tmp_path / "a.onnx", tmp_path / "b.onnx").quantization}
    product = found["MatMulInteger", "B"]
    assert product.scale is not None
    assert product.scale[0] == pytest.approx(np.abs(weight).max() / 127, rel=0.02)
    assert product.type in ("INT8", "UINT8")


def test_a_choice_of_codes_is_the_choice_of_floats_that_it_stands_for() -> None:
    """Named otherwise, QLinearWhere is found by what it chooses from: its operands without scales and zero points."""
    head = '<ir_version: 10, opset_import: ["": 21, "com.microsoft": 1]> g (bool[4] c, float[4] x) => (float[4] y)'
    before = ir.from_onnx_text(
        f"{head} {{ a = Relu (x) b = Neg (x) [one] h = Where (c, a, b) [two] i = Where (c, b, a) y = Sum (h, i) }}"
    )
    after = ir.from_onnx_text(
        f"""{head} <float s = {{0.5}}, uint8 z = {{9}}> {{
        a = Relu (x) b = Neg (x) qa = QuantizeLinear (a, s, z) qb = QuantizeLinear (b, s, z)
        [second] qi = com.microsoft.QLinearWhere (c, qb, s, z, qa, s, z, s, z)
        [first] qh = com.microsoft.QLinearWhere (c, qa, s, z, qb, s, z, s, z)
        dh = DequantizeLinear (qh, s, z) di = DequantizeLinear (qi, s, z) y = Sum (di, dh) }}"""
    )
    paired = {node.name: other.name for node, other in pair_nodes(before, after, []).items() if node.op_type == "Where"}
    assert paired == {"one": "first", "two": "second"}
