"""What lowering passes share about a layer's activation: why a kernel cannot take its codes, and how it is float again.

activation = site.activation                                       Float | Static | Dynamic
obstacle = static_obstacle(activation, EIGHT_BITS, "the kernel takes int8 and uint8")
read_float(site.node, activation)
"""

from __future__ import annotations

from collections.abc import Collection

import onnx_ir as ir

from qcompiler.graph.edit import constant, remove_node_if_unused
from qcompiler.graph.metadata import PROVENANCE
from qcompiler.sites.activations import Dynamic, Float, Static, activation_of


def static_obstacle(activation: Static, takes: Collection[ir.DataType], kernel: str) -> str | None:
    """Why a kernel cannot take quantized activations, one clause; None where it can.

    It `takes` codes of these types with one constant scale; `kernel` is a clause that says so.
    """
    quantize = activation.quantize
    if quantize is None:
        return "its activation is not quantized by QuantizeLinear"
    codes, scale = quantize.outputs[0].dtype, constant(quantize.inputs[1])
    if codes not in takes:
        return f"its activation has {codes} codes, and {kernel}"
    if scale is None or scale.size != 1:
        return "its activation has no constant scale for the whole tensor"
    return None


def is_the_models_own(activation: Static) -> bool:
    """Whether the pair came with the model, which computes what is rounded, and saturates, then: it has to stay."""
    return activation.quantize is not None and PROVENANCE not in activation.quantize.metadata_props


def read_float(layer: ir.Node, activation: Static | Dynamic) -> None:
    """Let a layer read what was quantized, and take the pair away where nothing else reads it."""
    quantized = layer.inputs[0]
    now = activation_of(quantized)  # the kernel of another layer may have taken the place of what gave the source
    layer.replace_input_with(0, activation.source if isinstance(now, Float) else now.source)
    producer = quantized.producer() if quantized is not None else None
    if producer is not None:
        remove_node_if_unused(producer)
