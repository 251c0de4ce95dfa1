"""What is drawn from a model's messages to be changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, numpy_helper

Rng = np.random.Generator
Damage = Callable[[ModelProto, Rng], None]
TEXTS = ("", "x", "ü", "\x1b[2J", "a" * 300, "a/b", "..", "\u202e", "y\n", "%s", "[red]", "9" * 40)
NUMBERS = (0, -1, 1, 2, 3, 7, 2**31 - 1, 2**31, -(2**63), 2**63 - 1, 1000)
DAMAGE: list[Damage] = []


def damage(function: Damage) -> Damage:
    DAMAGE.append(function)
    return function


def one(items: object, rng: Rng) -> object:
    sequence = list(items)  # type: ignore[call-overload]
    return sequence[int(rng.integers(len(sequence)))] if sequence else None


def graphs(graph: GraphProto) -> Iterator[GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == AttributeProto.GRAPH:
                yield from graphs(attribute.g)


def a_graph(model: ModelProto, rng: Rng) -> GraphProto:
    found = list(graphs(model.graph))
    return found[0] if rng.random() < 0.7 else found[int(rng.integers(len(found)))]


def a_node(model: ModelProto, rng: Rng) -> NodeProto:
    nodes = [node for graph in graphs(model.graph) for node in graph.node]
    nodes += [node for function in model.functions for node in function.node]
    return nodes[int(rng.integers(len(nodes)))] if nodes else model.graph.node.add(op_type="Identity")


def a_tensor(model: ModelProto, rng: Rng) -> TensorProto:
    tensors = [tensor for graph in graphs(model.graph) for tensor in graph.initializer]
    tensors += [attribute.t for node in model.graph.node for attribute in node.attribute if attribute.HasField("t")]
    if not tensors:
        model.graph.initializer.append(numpy_helper.from_array(np.zeros(2, np.float32), "lonely"))
        return model.graph.initializer[0]
    return tensors[int(rng.integers(len(tensors)))]


def an_info(model: ModelProto, rng: Rng) -> ValueInfoProto:
    graph = a_graph(model, rng)
    infos = [*graph.input, *graph.output, *graph.value_info]
    return infos[int(rng.integers(len(infos)))] if infos else graph.value_info.add(name="nothing")


def names(model: ModelProto) -> list[str]:
    names = {name for graph in graphs(model.graph) for node in graph.node for name in (*node.input, *node.output)}
    return sorted(names | {tensor.name for tensor in model.graph.initializer} | set(TEXTS))


def a_text(rng: Rng) -> str:
    return TEXTS[int(rng.integers(len(TEXTS)))]


def a_number(rng: Rng) -> int:
    return NUMBERS[int(rng.integers(len(NUMBERS)))]
