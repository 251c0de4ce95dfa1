"""A copy of a model as ONNX Runtime has it in hand when it places the nodes."""

from __future__ import annotations

from collections.abc import Hashable

import onnx_ir as ir
from onnx_ir.passes import common

from qcompiler.graph.edit import constant
from qcompiler.graph.operators import has
from qcompiler.sites.canonicalize import infer_shapes, inline, name_bodies, name_everything, remove_identities

SHARED = 8  # elements up to which the runtime makes one of equal constants


def prepared(model: ir.Model, *, optimized: bool) -> ir.Model:
    """Functions inlined, everything named and typed; and, where the runtime optimizes, without what it takes out:

    nodes that repeat another one, Identity, and Dropout, which does nothing at inference.
    """
    model = model.clone()
    if model.functions:
        name_bodies(model)
        for function in model.functions.values():
            for node in function:  # the runtime takes operators apart into nodes with names like n7
                node.name = f"{function.name}/{str(node.name).removeprefix(f'{function.name}/')}"
        inline(model)
    name_everything(model.graph)
    if any(value.dtype is None for node in model.graph.all_nodes() for value in node.outputs):
        infer_shapes(model)
    if optimized:
        for node in model.graph.all_nodes():
            if _does_nothing(node):
                node.op_type = "Identity"
                node.resize_inputs(1)
                node.resize_outputs(1)
        remove_identities(model.graph)
        common.DeduplicateInitializersPass(size_limit=SHARED)(model)
        _merge_repeated(model.graph)
    return model


def _does_nothing(node: ir.Node) -> bool:
    """Whether a node is a Dropout whose mask nobody reads."""
    if node.op_type != "Dropout" or node.domain or any(value.uses() for value in node.outputs[1:]):
        return False
    training = node.inputs[2] if len(node.inputs) > 2 else None
    tensor = constant(training)
    return training is None or (tensor is not None and not tensor.numpy().any())


def _merge_repeated(graph: ir.Graph) -> None:
    """Let one node stand for all that compute the same, but for those that give graph outputs."""
    first: dict[Hashable, ir.Node] = {}
    for node in graph:
        key = _computation(node)
        if key is None or any(value.is_graph_output() for value in node.outputs):
            continue
        kept = first.setdefault(key, node)
        if kept is not node:
            for old, new in zip(node.outputs, kept.outputs, strict=True):
                old.replace_all_uses_with(new)
            graph.remove(node, safe=True)


def _computation(node: ir.Node) -> Hashable | None:
    """Equal for nodes that compute the same; None where that is not told."""
    if has(node, "random") or node.op_type == "Dropout":  # which ONNX Runtime takes for random, too
        return None
    attributes: list[Hashable] = []
    for name, attribute in sorted(node.attributes.items()):
        value = attribute.value
        if attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().size <= SHARED:
            value = (attribute.as_tensor().dtype, attribute.as_tensor().tobytes())
        if not isinstance(value, Hashable) or isinstance(value, ir.Graph | ir.TensorProtocol):
            return None
        attributes.append((name, value))
    return node.op_identifier(), tuple(node.inputs), tuple(attributes), len(node.outputs)
