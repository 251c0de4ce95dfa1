"""Bring a model to a newer standard opset."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from qcompiler.errors import ModelError
from qcompiler.graph.edit import Names, add_constant, node_graph
from qcompiler.graph.operators import has

OPSET = 21


def upgrade(model: ir.Model) -> None:
    """Rewrite a model of opset 13 or newer so that it means the same in opset 21; no weights are read.

    The steps to 18 are here, those from there on are onnxscript's. Operators of other domains are left alone.
    """
    from onnxscript import version_converter

    if model.opset_imports[""] < 18:
        _to_18(model)
    _check_group_norms(model)
    version_converter.convert_version(model, OPSET)
    if model.opset_imports[""] != OPSET:
        raise ModelError(f"the model's opset {model.opset_imports['']} cannot be upgraded to {OPSET}; export it newer")


def _to_18(model: ir.Model) -> None:
    names = Names(model.graph)
    for node in model.graph.all_nodes():
        if node.domain:
            continue
        # Opset 18 turned the attribute `axes` into an input; that of ReduceSum went before.
        if has(node, "reduction") and node.op_type != "ReduceSum" and "axes" in node.attributes:
            axes = np.array(node.attributes.pop("axes").as_ints(), dtype=np.int64)
            node.resize_inputs(2)
            name = names.fresh(f"{node.name or node.outputs[0].name}.axes")
            node.replace_input_with(1, add_constant(node_graph(node), name, axes))
        elif node.op_type == "Split" and (len(node.inputs) < 2 or node.inputs[1] is None):
            node.attributes["num_outputs"] = ir.AttrInt64("num_outputs", len(node.outputs))
        elif node.op_type == "RoiAlign" and model.opset_imports[""] < 16:
            mode = "output_half_pixel"  # what it did before there was a choice
            node.attributes["coordinate_transformation_mode"] = ir.AttrString("coordinate_transformation_mode", mode)
        elif node.op_type == "BatchNormalization" and len(node.outputs) > 1 and "training_mode" not in node.attributes:
            raise ModelError(f"the node {node.name!r} is a BatchNormalization in training mode; export for inference")
    model.opset_imports[""] = 18


def _check_group_norms(model: ir.Model) -> None:
    """Opset 21 gave GroupNormalization one gain a channel instead of one a group: only a known shape converts."""
    norms = [node for node in model.graph.all_nodes() if node.op_type == "GroupNormalization" and not node.domain]
    if not norms:
        return
    common.ShapeInferencePass(check_type=False, strict_mode=False)(model)
    for node in norms:
        shapes = [value.shape if value is not None else None for value in node.inputs[:3]]
        sizes = [shape[place] for shape, place in zip(shapes, (1, 0, 0), strict=True) if shape is not None]
        if len(sizes) < 3 or not all(isinstance(size, int) for size in sizes):
            raise ModelError(
                f"the node {node.name!r} (GroupNormalization) has an unknown number of channels, so the model cannot "
                f"be upgraded to opset {OPSET}; export it with opset {OPSET} or newer"
            )
