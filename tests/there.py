"""Readers of what a type says may be None and a test knows to be there; where it is not, the test fails here."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import onnx_ir as ir

Thing = TypeVar("Thing")


def there(thing: Thing | None, what: str = "what this line reads") -> Thing:
    """The thing itself."""
    if thing is None:
        raise AssertionError(f"{what} is not there")
    return thing


def operand(node: ir.Node | None, index: int) -> ir.Value:
    """An input of a node."""
    node = there(node, "the node")
    return there(node.inputs[index], f"input {index} of {node.name}")


def operands(node: ir.Node | None) -> list[ir.Value]:
    """The inputs of a node that leaves none out."""
    return [operand(node, index) for index in range(len(there(node, "the node").inputs))]


def tensor_of(value: ir.Value | None) -> ir.TensorProtocol:
    """What a constant holds, unread."""
    value = there(value, "the constant")
    return there(value.const_value, f"the constant of {value.name}")


def tensors(model: ir.Model) -> dict[str, ir.TensorProtocol]:
    """What the initializers of the graph hold, unread."""
    return {name: tensor_of(value) for name, value in model.graph.initializers.items()}


def held(value: ir.Value | None) -> np.ndarray:
    """What a constant holds."""
    return tensor_of(value).numpy()


def dims(value: ir.Value | None) -> list[int | ir.SymbolicDim]:
    """The shape of a value."""
    value = there(value, "the value")
    return list(there(value.shape, f"the shape of {value.name}"))


def numpy_type(value: ir.Value | None) -> np.dtype:
    """The type of a value's numbers, as numpy calls it."""
    value = there(value, "the value")
    return there(value.dtype, f"the type of {value.name}").numpy()
