"""Values and nodes of a model, changed one at a time."""

from __future__ import annotations

import numpy as np
from onnx import AttributeProto, ModelProto, NodeProto, helper

from tests.fuzz.messages import (
    TEXTS,
    Rng,
    a_graph,
    a_node,
    a_number,
    a_text,
    damage,
    graphs,
    names,
    one,
)


@damage
def reads_another(model: ModelProto, rng: Rng) -> None:
    node = a_node(model, rng)
    if node.input:
        node.input[int(rng.integers(len(node.input)))] = str(one(names(model), rng))


@damage
def writes_another(model: ModelProto, rng: Rng) -> None:
    node = a_node(model, rng)
    if node.output:
        node.output[int(rng.integers(len(node.output)))] = str(one(names(model), rng))


@damage
def fewer_or_more_inputs(model: ModelProto, rng: Rng) -> None:
    node = a_node(model, rng)
    if node.input and rng.random() < 0.5:
        del node.input[int(rng.integers(len(node.input)))]
    else:
        node.input.extend([str(one(names(model), rng))] * int(rng.integers(1, 4)))


@damage
def fewer_or_more_outputs(model: ModelProto, rng: Rng) -> None:
    node = a_node(model, rng)
    if node.output and rng.random() < 0.5:
        del node.output[int(rng.integers(len(node.output)))]
    else:
        node.output.append(a_text(rng) or "more")


@damage
def blank_input(model: ModelProto, rng: Rng) -> None:
    node = a_node(model, rng)
    if node.input:
        node.input[int(rng.integers(len(node.input)))] = ""


@damage
def without_a_node(model: ModelProto, rng: Rng) -> None:
    nodes = a_graph(model, rng).node
    if nodes:
        del nodes[int(rng.integers(len(nodes)))]


@damage
def a_node_twice(model: ModelProto, rng: Rng) -> None:
    graph = a_graph(model, rng)
    if graph.node:
        copy = NodeProto()
        copy.CopyFrom(one(graph.node, rng))
        if rng.random() < 0.6:
            copy.output[:] = [f"{name}_copy" if name else "" for name in copy.output]
        graph.node.append(copy)


@damage
def another_order(model: ModelProto, rng: Rng) -> None:
    graph = a_graph(model, rng)
    nodes = [graph.node[int(index)] for index in rng.permutation(len(graph.node))]
    copies = [NodeProto() for _ in nodes]
    for copy, node in zip(copies, nodes, strict=True):
        copy.CopyFrom(node)
    del graph.node[:]
    graph.node.extend(copies)


@damage
def another_operator(model: ModelProto, rng: Rng) -> None:
    names = ("MatMul", "Gemm", "Conv", "Relu", "Gather", "", "If", "Loop", "DequantizeLinear", "Nothing", "Scan",
             "BeamSearch", "SequenceConstruct", "Optional", "StringNormalizer", "Constant", "LSTM", "Attention",
             "MatMulNBits", "QLinearMatMul", "Reshape", "Cast", "Softmax", "LayerNormalization")  # fmt: skip
    a_node(model, rng).op_type = str(one(names, rng))


@damage
def another_domain(model: ModelProto, rng: Rng) -> None:
    a_node(model, rng).domain = str(one(("com.microsoft", "ai.onnx", "ai.onnx.ml", "local", "nowhere", "\x1b"), rng))


@damage
def another_name(model: ModelProto, rng: Rng) -> None:
    a_node(model, rng).name = str(one((*(node.name for node in model.graph.node), *TEXTS), rng))


@damage
def renamed_everywhere(model: ModelProto, rng: Rng) -> None:
    """A value, wherever it is named: still a good model, where the new name is free."""
    before, after = str(one(names(model), rng)), a_text(rng) + str(one(("", "1", "_scale", "_q"), rng))
    for graph in graphs(model.graph):
        for node in graph.node:
            for held in (node.input, node.output):
                held[:] = [after if name == before else name for name in held]
        for item in (*graph.input, *graph.output, *graph.value_info, *graph.initializer):
            item.name = after if item.name == before else item.name


@damage
def odd_attribute(model: ModelProto, rng: Rng) -> None:
    node = a_node(model, rng)
    attribute = one(node.attribute, rng)
    if not isinstance(attribute, AttributeProto):
        attribute = node.attribute.add(name=str(one(("axis", "perm", "to", "axes", "alpha", "transB", ""), rng)))
    attribute.type = int(rng.integers(0, 16)) if rng.random() < 0.3 else attribute.type
    match int(rng.integers(5)):
        case 0:
            attribute.CopyFrom(helper.make_attribute(attribute.name or "a", a_number(rng)))
        case 1:
            attribute.ints[:] = [a_number(rng) for _ in range(int(rng.integers(0, 5)))]
        case 2:
            attribute.CopyFrom(helper.make_attribute(attribute.name or "a", float(rng.choice([np.nan, np.inf, 0, -1]))))
        case 3:
            attribute.CopyFrom(helper.make_attribute(attribute.name or "a", a_text(rng)))
        case 4:
            attribute.i = a_number(rng)


@damage
def no_attribute(model: ModelProto, rng: Rng) -> None:
    node = a_node(model, rng)
    if node.attribute:
        del node.attribute[int(rng.integers(len(node.attribute)))]


@damage
def attribute_twice(model: ModelProto, rng: Rng) -> None:
    node = a_node(model, rng)
    if node.attribute:
        node.attribute.add().CopyFrom(node.attribute[0])


@damage
def refers_to_an_attribute(model: ModelProto, rng: Rng) -> None:
    attribute = a_node(model, rng).attribute.add(name="axis", ref_attr_name=a_text(rng) or "axis")
    attribute.type = AttributeProto.INT
