"""Which norms that are spelled out ONNX Runtime reads in float32: with those, the gain is in float32, too.

It makes one operator of (x - mean) / √(variance + ε) · gain + bias, and of x / √(mean x² + ε) · gain. The Cast of x to
float32 goes into that operator where nothing but the norm reads it. The operator then reads 16 bits, and so must the
gain. Otherwise it reads float32: with a gain in 16 bits LayerNormalization has no valid type, and
SimplifiedLayerNormalization in bfloat16 no kernel, so that the model does not load. Where a mean is subtracted and no
bias is added, the second operator is made, of what comes after the subtraction, which is in float32.

(CUDA provider of onnxruntime-gpu 1.31.1 on stub libraries, all combinations.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from typing import Literal

import onnx_ir as ir

from qcompiler.graph.edit import constant

Mode = Literal["half", "float32", "either", "untouched"]
"""How a node computes. `either`: made in the types that its readers want. `untouched`: in whatever its input has."""


def is_read_wide(
    gain: ir.Node, normalized: Set[ir.Value], statistics: Set[ir.Value], modes: Mapping[ir.Node, Mode],
    at_hand: Callable[[ir.Value], bool],
) -> bool:  # fmt: skip
    """Whether the operator that a norm with this gain (a Mul) becomes reads float32.

    `statistics` are sums and means, `normalized` is what they were joined with; `at_hand` says of a value whether there
    is one of 16 bits.
    """
    value = next((item for item in gain.inputs if item in normalized), None)
    centred = False
    while value is not None and value in normalized:
        node = value.producer()
        if node is None or node.op_type not in ("Div", "Mul", "Sub"):
            return False  # no form that becomes an operator
        centred = centred or node.op_type == "Sub"
        value = next((item for item in node.inputs if item is not None and item not in statistics), None)
    if value is None:
        return False
    readers = [node for node in value.consumers() if modes.get(node) == "float32"]
    return not at_hand(value) or len(readers) > 2 or (centred and not _has_bias(gain))


def _has_bias(gain: ir.Node) -> bool:
    readers = gain.outputs[0].consumers()
    return len(readers) == 1 and readers[0].op_type == "Add" and any(map(_is_row, readers[0].inputs))


def _is_row(value: ir.Value | None) -> bool:
    tensor = constant(value)
    return tensor is not None and len(tensor.shape) == 1
