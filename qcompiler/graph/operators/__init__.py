"""What qcompiler knows of operators: one row each, and the queries that everything else asks.

    has(node, "moves")               a trait (`row.Trait` says what each means)
    quantized(node)                  its quantized operands: where codes, scale and zero point of each are
    weight(node), multiplied(node)   … that of the weight; that of what it is multiplied by
    continuations(node)              which output continues which past

An operator without a row has no trait and no role: whoever asks treats it as unknown. The rows are in `standard.py`
(ONNX), `runtime.py` (com.microsoft) and `functions.py` (qcompiler's own), and are compared with ONNX's schemas and with
ONNX Runtime's registry by tests/graph/test_operators.py.
"""

from __future__ import annotations

from typing import Literal

import onnx_ir as ir

from qcompiler.graph.operators.functions import FUNCTIONS
from qcompiler.graph.operators.row import Operator, Place, QuantizedOperand, Role, Slot, Trait
from qcompiler.graph.operators.runtime import RUNTIME
from qcompiler.graph.operators.standard import STANDARD

__all__ = [
    "OPERATORS",
    "Operator",
    "Place",
    "Slot",
    "QuantizedOperand",
    "Role",
    "Trait",
    "attends",
    "continuations",
    "gains",
    "has",
    "holds",
    "multiplied",
    "multiplies_floats",
    "operator_of",
    "quantized",
    "reads_codes",
    "result",
    "weight",
    "weights",
]

OPERATORS: dict[tuple[str, str], Operator] = {(row.domain, row.name): row for row in (*STANDARD, *RUNTIME, *FUNCTIONS)}
"""By domain and name."""


def operator_of(node: ir.Node) -> Operator | None:
    """The row of a node's operator; None where it is not known."""
    return OPERATORS.get((node.domain, node.op_type))


def has(node: ir.Node, *traits: Trait) -> bool:
    """Whether the operator is known to have all of these traits."""
    row = operator_of(node)
    return row is not None and row.traits.issuperset(traits)


def multiplies_floats(node: ir.Node) -> bool:
    """Whether it is a product, or a convolution, of floats."""
    row = operator_of(node)
    return row is not None and "product" in row.traits and not row.coded


def reads_codes(node: ir.Node) -> bool:
    """Whether the operator works on codes by its nature; attention does not, though its cache may hold codes."""
    row = operator_of(node)
    return row is not None and row.coded


def attends(node: ir.Node) -> bool:
    """Whether it is attention; an operator that is not known is where its name says so."""
    row = operator_of(node)
    return "attention" in row.traits if row is not None else node.op_type.endswith("Attention")


# ---------------------------------------------------------------------------------------------------- operands


def quantized(node: ir.Node) -> tuple[QuantizedOperand, ...]:
    """The quantized operands that the operator can have, whether this node has them or not."""
    row = operator_of(node)
    return row.quantized_of(len(node.inputs)) if row is not None else ()


def weight(node: ir.Node) -> QuantizedOperand | None:
    """The quantized weight, the first where there are several."""
    return next((operand for operand in quantized(node) if operand.role == "weight"), None)


def multiplied(node: ir.Node) -> QuantizedOperand | None:
    """The codes that are multiplied by a weight; None where the operator reads a float there."""
    if weight(node) is None:
        return None
    first = quantized(node)[0]
    return first if first.role == "data" and first.codes == Place(0) else None


def result(node: ir.Node) -> QuantizedOperand | None:
    """The codes that the operator gives; None where it gives floats, or sums."""
    return next((operand for operand in quantized(node) if operand.codes.output), None)


def weights(node: ir.Node) -> tuple[int, ...]:
    """The inputs that hold weights, of an operator that has some."""
    row = operator_of(node)
    if row is None:
        return ()
    if row.repeated:
        return tuple(index for index in range(len(node.inputs)) if (slot := row.input(index)) and slot.role == "weight")
    return row.places("weight")


def gains(node: ir.Node) -> tuple[int, ...]:
    """The inputs of a norm that hold what its result is multiplied by, and what is added to that."""
    row = operator_of(node)
    return row.places("gain", "shift") if row is not None else ()


# ---------------------------------------------------------------------------------------------------- caches


def continuations(node: ir.Node) -> dict[int, int]:
    """From the input that holds a past to the output that continues it."""
    row = operator_of(node)
    if row is None:
        return {}
    inputs = {slot.name: index for index, slot in enumerate(row.inputs) if slot.role == "past"}
    return {inputs[slot.of]: index for index, slot in enumerate(row.outputs) if slot.role == "present"}


def holds(node: ir.Node, index: int) -> Literal["key", "value"] | None:
    """Whether an input of attention holds keys or values, new ones or past ones; None where the operator does not tell.

    Attention that is not known is taken to have its keys at 1 and its values at 2, as all others do.
    """
    row = operator_of(node)
    if row is None:
        return {1: "key", 2: "value"}.get(index) if attends(node) else None  # type: ignore[return-value]
    slot = row.input(index)
    if slot is not None and slot.role == "past" and slot.of:
        slot = next(other for other in row.inputs if other.name == slot.of)
    return slot.role if slot is not None and slot.role in ("key", "value") else None
