"""Lets com.microsoft GroupQueryAttention keep its cache in few bits: it quantizes what it appends and reads the codes.

    GroupQueryAttention(q, k, v, past_key, past_value, …)            float past and present
    GroupQueryAttention(…, k_scale, v_scale), kv_cache_bit_width     int8, fp8, or two int4 codes in a uint8

The operator's contract: codes are round(x / scale); scales are static, symmetric and float32, one for all or one for
each channel of each head; keys and values have the same type, and keys are quantized after they were rotated. An int4
code q is stored as q + 8, an even channel in the low half of the byte and the next one in the high half. A bias on the
scores and a quantized cache exclude each other. fp8 exists on CUDA alone.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qcompiler.formats.arithmetic import Array
from qcompiler.formats.scheme import PerTensor, PerToken
from qcompiler.graph.edit import add_constant, node_graph
from qcompiler.graph.rewriter import Rewriter
from qcompiler.rewriting.cache_storage import Storage, static_scale
from qcompiler.sites.caches import Cache

OPERATOR = "GroupQueryAttention"
BIAS, SINK, K_SCALE, V_SCALE = 10, 11, 12, 13
Pair = tuple[Cache, Storage, tuple[Array, Array]]
"""A cache, how it is to be stored, and its calibrated range (lo, hi) [heads, channels]."""


def refusal(key: tuple[Cache, Storage], value: tuple[Cache, Storage]) -> str:
    """Why the operator cannot keep its two caches like this; empty where it can."""
    node = key[0].node
    storages = (key[1], value[1])
    if any(isinstance(storage.scheme.granularity, PerToken) for storage in storages):
        return f"{OPERATOR} has no scales per token; take tensor or channel"
    if not all(storage.scheme.symmetric for storage in storages):
        return f"{OPERATOR} has no zero points; take symmetric: true"
    if storages[0].dtype != storages[1].dtype:
        return f"{OPERATOR} keeps keys and values in one type"
    if _input(node, BIAS) is not None:
        return f"{OPERATOR} adds a bias to its scores, which it does with a float cache only"
    if _input(node, SINK) is not None or node.attributes.get_int("smooth_softmax", 0) > 0:
        return f"{OPERATOR} has sinks (a smooth Softmax), which was not tried with a quantized cache"
    if _input(node, K_SCALE) is not None:
        return "its cache is quantized already"
    if storages[0].packed and key[0].head_size % 2:
        return f"its heads have {key[0].head_size} numbers, and two of them share a byte"
    return ""


def store(key: Pair, value: Pair, rw: Rewriter) -> None:
    """Rewrite the node of both caches, and the types of their pasts and presents, as `refusal` allows."""
    node = key[0].node
    graph = node_graph(node)
    node.resize_inputs(max(len(node.inputs), V_SCALE + 1))
    for (cache, storage, (lo, hi)), index, letter in ((key, K_SCALE, "k"), (value, V_SCALE, "v")):
        scale = np.asarray(static_scale(cache, storage.scheme, lo, hi, ir.DataType.FLOAT))
        shape = (1,) if isinstance(storage.scheme.granularity, PerTensor) else (cache.heads, 1, cache.head_size)
        name = rw.fresh(f"{cache.present.name}.scale")
        node.replace_input_with(index, add_constant(graph, name, scale.reshape(shape).astype(np.float32)))
        kind = "PER_TENSOR" if shape == (1,) else "PER_CHANNEL"
        node.attributes.add(ir.AttrString(f"{letter}_quant_type", kind))
        for tensor in (cache.past, cache.present):
            tensor.type, tensor.shape = ir.TensorType(storage.dtype), _shape(tensor.shape, cache, storage)
    node.attributes.add(ir.AttrInt64("kv_cache_bit_width", 4 if key[1].packed else 8))


def _shape(shape: ir.Shape | None, cache: Cache, storage: Storage) -> ir.Shape | None:
    """Of codes; the builder of onnxruntime-genai leaves the last axis of a cache open, which is no longer needed."""
    if shape is None or len(shape) != 4:
        return shape
    return storage.shape(ir.Shape([*shape[:3], cache.head_size]))


def _input(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None
