"""The conditions of kernels: what each accepts and refuses, for nodes and for what is yet to be written."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import pytest

from qcompiler.errors import TargetError
from qcompiler.targets import Target
from qcompiler.targets.conditions import (
    CONDITIONS,
    Call,
    Condition,
    Operand,
    call_of,
    conditions,
    obstacles,
    type_name,
    unmet,
)

ON = {"ep.cuda.fpa_intb_gemm": "1"}
HALF, FLOAT, THERE = Operand("float16"), Operand("float"), Operand()


def fused(k: int = 128, n: int = 128, block: int = 32, **changes: Any) -> Call:
    call: dict[str, Any] = {
        "attributes": {"K": k, "N": n, "block_size": block}, "inputs": [HALF, THERE, THERE], "session": ON,
    }  # fmt: skip
    return Call(**call | changes)


def matrix(*shape: int | None) -> Call:
    return Call(inputs=[THERE, Operand(shape=shape)])


# Each set with a call that meets it, and calls that break one condition each, with the clause.
CASES: dict[str, tuple[Call, list[tuple[Call, str]]]] = {
    "rounded-in-blocks": (
        Call({"accuracy_level": 4}),
        [(Call({"accuracy_level": 1}), "its accuracy_level is 1, not 4"), (Call(), "its accuracy_level is , not 4")],
    ),
    "unsigned-activations": (
        Call(inputs=[Operand("uint8")]), [(Call(inputs=[Operand("int8")]), "its activation is int8, not uint8")],
    ),
    "fpA_intB-4": (fused(), [
        (fused(session={}), "the session option ep.cuda.fpa_intb_gemm is not 1"),
        (fused(inputs=[FLOAT]), "the model computes in float, not in 16 bits"),
        (fused(inputs=[HALF, THERE, THERE, THERE]), "its codes have zero points"),
        (fused(inputs=[HALF, THERE, THERE, None, THERE]), "its input features have an order of their own"),
        (fused(inputs=[HALF, THERE, THERE, None, None, THERE]), "its bias is an input of the operator"),
        (fused(n=96), "N = 96 is no multiple of 64"),
        (fused(k=96), "K = 96 is no multiple of 64"),
        (fused(block=64), "its blocks are 64 wide, not 32"),
    ]),
    "fpA_intB-8": (fused(n=32), [(fused(n=48), "N = 48 is no multiple of 32"),
                                 (fused(block=16), "its blocks are 16 wide, not 32")]),
    "fpA_intB-2": (
        fused(block=64, inputs=[HALF, THERE, THERE, None, THERE]),  # an order is taken here
        [(fused(n=64, block=64), "N = 64 is no multiple of 128"), (fused(), "its blocks are 32 wide, not 64")],
    ),
    "fp8-tensor-cores": (Call({"block_size": 64}, matrix(8, 256).inputs), [
        (Call({"block_size": 64}, matrix(8, 288).inputs), "K = 288 is no multiple of 64"),
        (Call({"block_size": 64}, matrix(8, 192).inputs), "K = 192 is less than 256"),
        (Call({"block_size": 32}, matrix(8, 256).inputs), "the block = 32 is no multiple of 64"),
    ]),
    "fp8-codes": (Call({"block_size": 16}, matrix(8, 48).inputs), [
        (Call({"block_size": 16}, matrix(8, 40).inputs), "K = 40 is no multiple of 16"),
        (Call({"block_size": 24}, matrix(8, 48).inputs), "the block = 24 is no multiple of 16"),
    ]),
    "fp8-product": (matrix(16, 32), [(matrix(16, 40), "K = 40 is no multiple of 16"),
                                     (matrix(8, 32), "N = 8 is no multiple of 16")]),
    "unpadded-int8": (matrix(32, 64), [(matrix(48, 64), "K = 48 is no multiple of 32"),
                                       (matrix(32, 8), "N = 8 is no multiple of 32")]),
    "unblocked-scales": (Call(), [(Call({"block_size": 32}), "its scales are in blocks of 32")]),
    "even-pads": (Call({"pads": [1, 2, 1, 2], "auto_pad": "NOTSET"}), [
        (Call({"auto_pad": "SAME_UPPER"}), "its pads are SAME_UPPER"),
        (Call({"pads": [0, 1, 1, 1]}), "its pads are [0, 1, 1, 1]"),
    ]),
}  # fmt: skip


def test_every_condition_is_tried() -> None:
    assert CASES.keys() == CONDITIONS.keys()
    for key, found in CONDITIONS.items():
        tried = {condition.text for call, _ in CASES[key][1] for condition, _ in unmet(key, call)}
        shared = {condition.text for other in ("fpA_intB-4",) for condition in CONDITIONS[other]}
        assert {condition.text for condition in found} <= tried | (shared if key.startswith("fpA") else set())


@pytest.mark.parametrize("key", CASES)
def test_what_a_kernel_takes(key: str) -> None:
    taken, refused = CASES[key]
    assert obstacles(key, taken) == []
    for call, clause in refused:
        assert obstacles(key, call) == [clause]


def test_what_is_not_known_counts_as_met() -> None:
    assert obstacles("fp8-product", matrix(None, None)) == []
    assert obstacles("fp8-product", Call()) == []
    assert obstacles("fpA_intB-4", fused(session=None)) == []
    assert obstacles("unsigned-activations", Call(inputs=[THERE])) == []


def test_a_clause_says_what_is_there() -> None:
    found = {
        condition.text: condition.clause(value) for condition, value in unmet("fpA_intB-4", fused(n=8, session={}))
    }
    assert found["N is a multiple of 64"] == "N is a multiple of 64 (here 8)"
    text = "the session option ep.cuda.fpa_intb_gemm is 1"
    assert found[text] == text  # it is not given, so there is nothing to show


def test_a_node_as_its_kernel_sees_it() -> None:
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.BFLOAT16), shape=ir.Shape(["rows", 64]))
    node = ir.Node("com.microsoft", "MatMulNBits", [x, None], [ir.AttrInt64("K", 64)], num_outputs=1)
    call = call_of(node, ON)
    assert call.attributes == {"K": 64}
    assert call.inputs == [Operand("bfloat16", (None, 64)), None]
    assert call.input(5) is None
    assert call.session == ON
    assert (type_name(x), type_name(None), type_name(ir.Value(name="y"))) == ("bfloat16", "", "")


def test_a_fallback_is_told() -> None:
    from qcompiler.placement.rules import path_of

    def path(features: int, block: int) -> str:
        values = [
            ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT16), shape=ir.Shape([8, features]))
            for name in ("x", "w", "s")
        ]
        node = ir.Node("com.microsoft", "MatMulBlockQuantizedFp8Weight", values, [ir.AttrInt64("block_size", block)],
                       num_outputs=1)  # fmt: skip
        found = path_of(node, Target.load("ort-cuda"))
        assert found is not None
        return found.text()

    assert path(256, 64).startswith("a product on tensor cores")
    assert path(128, 64).endswith("K is 256 or more (here 128): a kernel without tensor cores that reads the codes, "
                                  "up to 8 tokens")  # fmt: skip
    assert path(40, 64).endswith(": the weight is dequantized on every run and multiplied in 16 bits")


MINE = (Condition("the moon is full", lambda call: call.attributes.get("moon"), bool, "it is new moon"),)
NONE = "no conditions"


def test_conditions_of_a_package() -> None:
    assert conditions(f"{__name__}:MINE") is MINE
    assert obstacles(f"{__name__}:MINE", Call({"moon": 0})) == ["it is new moon"]


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("fpA_intB-5", "there are no conditions 'fpA_intB-5'; did you mean 'fpA_intB-"),
        ("no_such_module:x", "cannot be imported: ModuleNotFoundError"),
        (f"{__name__}:ABSENT", "cannot be imported: AttributeError"),
        (f"{__name__}:NONE", "is no tuple of qcompiler.targets.conditions.Condition"),
    ],
)
def test_conditions_that_are_none(key: str, message: str) -> None:
    with pytest.raises(TargetError, match=message):
        conditions(key)
