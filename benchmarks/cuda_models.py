"""Models that `cuda.py` measures: a decoder block as Llama has it, and one product, written with random weights.

Speed does not depend on the weights. The block is in the form that onnxruntime-genai's builder writes: norms and
attention are operators of ONNX Runtime, attention keeps the rotary angles and the cache.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

HEAD = 128
POSITIONS = 4096
POOL = (1 << 20) - 3
"""Random numbers that weights are filled with, again and again: to draw all would take minutes. It is odd, so that rows
differ."""


class _Graph:
    """Collects nodes and constants of one type."""

    def __init__(self, half: bool) -> None:
        self.numpy = np.float16 if half else np.float32
        self.type = TensorProto.FLOAT16 if half else TensorProto.FLOAT
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def constant(self, name: str, data: np.ndarray) -> str:
        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(data), name))
        return name

    def node(self, op_type: str, inputs: list[str], outputs: list[str], name: str, **attributes: object) -> str:
        domain = attributes.pop("domain", "")
        self.nodes.append(helper.make_node(op_type, inputs, outputs, name=name, domain=str(domain), **attributes))
        return outputs[0]

    def save(self, path: Path, inputs: list[onnx.ValueInfoProto], outputs: list[onnx.ValueInfoProto]) -> None:
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
        graph = helper.make_graph(self.nodes, "block", inputs, outputs, self.constants)
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        path.parent.mkdir(parents=True, exist_ok=True)
        for stale in path.parent.glob("model.onnx*"):
            stale.unlink()
        onnx.save_model(model, path, save_as_external_data=True, location="model.onnx.data", size_threshold=1024)


def decoder_block(path: Path, hidden: int, *, half: bool) -> None:
    """x [batch, sequence, hidden] and a cache of keys and values → y like x, and the cache; the same weights in both
    types, as those in float32 are the ones in float16."""
    head = min(HEAD, hidden // 4)
    heads, kv_heads, wide = hidden // head, hidden // head // 4, hidden * 7 // 2
    graph, prefix = _Graph(half), "model.layers.0"
    pool = np.random.default_rng(0).standard_normal(POOL, np.float32)

    def linear(source: str, name: str, inputs: int, outputs: int) -> str:
        numbers = np.roll(pool, sum(map(ord, name))) / np.float32(np.sqrt(inputs))
        weight = np.resize(numbers.astype(np.float16), (inputs, outputs))
        constant = graph.constant(f"{prefix}.{name}.weight", weight.astype(graph.numpy, copy=False))
        return graph.node("MatMul", [source, constant], [f"{name}/output"], f"/{prefix}/{name}/MatMul")

    def norm(source: str, name: str) -> str:
        gain = graph.constant(f"{prefix}.{name}.weight", np.ones(hidden, graph.numpy))
        return graph.node("SimplifiedLayerNormalization", [source, gain], [f"{name}/output"], f"/{prefix}/{name}",
                          axis=-1, epsilon=1e-5, stash_type=1)  # fmt: skip

    normal = norm("x", "input_layernorm")
    query, key, value = (
        linear(normal, f"self_attn.{name}_proj", hidden, count * head)
        for name, count in (("q", heads), ("k", kv_heads), ("v", kv_heads))
    )
    angles = np.arange(POSITIONS)[:, None] / 10000 ** (np.arange(head // 2) / (head // 2))
    cos, sin = (graph.constant(name, data.astype(graph.numpy)) for name, data in
                (("cos_cache", np.cos(angles)), ("sin_cache", np.sin(angles))))  # fmt: skip
    caches = [f"{side}.0.{part}" for side in ("past_key_values", "present") for part in ("key", "value")]
    attended = graph.node(
        "GroupQueryAttention",
        [query, key, value, *caches[:2], "seqlens_k", "total_sequence_length", cos, sin],
        ["attention", *caches[2:]], f"/{prefix}/self_attn/GroupQueryAttention", domain="com.microsoft",
        num_heads=heads, kv_num_heads=kv_heads, do_rotary=1,
    )  # fmt: skip
    added = graph.node("Add", ["x", linear(attended, "self_attn.o_proj", hidden, hidden)], ["added"], f"/{prefix}/Add")
    normal = norm(added, "post_attention_layernorm")
    gate, up = linear(normal, "mlp.gate_proj", hidden, wide), linear(normal, "mlp.up_proj", hidden, wide)
    sigmoid = graph.node("Sigmoid", [gate], ["sigmoid"], f"/{prefix}/mlp/Sigmoid")
    silu = graph.node("Mul", [gate, sigmoid], ["silu"], f"/{prefix}/mlp/act")
    product = graph.node("Mul", [silu, up], ["product"], f"/{prefix}/mlp/Mul")
    graph.node("Add", [added, linear(product, "mlp.down_proj", wide, hidden)], ["y"], f"/{prefix}/Add_1")

    info, tokens = helper.make_tensor_value_info, ["batch", "sequence", hidden]
    past = [info(name, graph.type, ["batch", kv_heads, "past", head]) for name in caches[:2]]
    counts = [info("seqlens_k", TensorProto.INT32, ["batch"]), info("total_sequence_length", TensorProto.INT32, [])]
    present = [info(name, graph.type, ["batch", kv_heads, "total", head]) for name in caches[2:]]
    graph.save(path, [info("x", graph.type, tokens), *past, *counts], [info("y", graph.type, tokens), *present])


def product(path: Path, features: int, *, half: bool) -> None:
    """y = x W, x [rows, features], W [features, features]."""
    graph = _Graph(half)
    graph.node("MatMul", ["x", graph.constant("w", _matrix(features).astype(graph.numpy))], ["y"], "product")
    _save_product(graph, path, features)


def ordered_product(path: Path, features: int, *, half: bool) -> None:
    """The same product in static W8A8 by QOrderedMatMul, which no target takes before a GPU has shown that it is right.

    The operator wants the weight's bytes as [N, K], declared as [K, N], and a scale for its own int8 result.
    """
    graph, weight = _Graph(half), _matrix(features)
    scale = np.abs(weight).max(0) / 127
    codes = np.clip(np.rint(weight / scale), -127, 127).astype(np.int8)
    numbers = {"s": 5.0 / 127, "r": 5.5 / 127}
    for name, number in numbers.items():
        graph.constant(name, np.array(number, np.float32))
        graph.constant(f"{name}.own", np.array(number, graph.numpy))
    graph.constant("w", np.ascontiguousarray(codes.T).reshape(features, features))
    graph.constant("t", scale.astype(np.float32))
    graph.constant("z", np.array(0, np.int8))
    graph.node("QuantizeLinear", ["x", "s.own", "z"], ["x.codes"], "quantize")
    graph.node("QOrderedMatMul", ["x.codes", "s", "w", "t", "r"], ["y.codes"], "product", domain="com.microsoft",
               order_A=1, order_B=0, order_Y=1)  # fmt: skip
    graph.node("DequantizeLinear", ["y.codes", "r.own", "z"], ["y"], "dequantize")
    _save_product(graph, path, features)


def _matrix(features: int) -> np.ndarray:
    weight: np.ndarray = np.random.default_rng(0).standard_normal((features, features), np.float32)
    return (weight / np.float32(np.sqrt(features))).astype(np.float16).astype(np.float32)


def _save_product(graph: _Graph, path: Path, features: int) -> None:
    ends = [helper.make_tensor_value_info(name, graph.type, ["rows", features]) for name in ("x", "y")]
    graph.save(path, ends[:1], ends[1:])
