"""Finds attention over a cache that Concat, or the operator Attention itself, extends.

    present = Concat(past, new),  y = softmax(scale · q presentᵀ + mask) present      for keys and values of each layer

Structure proposes, evaluation proves. The walk goes from a Softmax (or an Attention operator) up to the query and to
the two caches; whatever an unknown operator does between is a reason to leave the site alone. What the walk took for
granted (the order of repeated heads, and above all the mask, which every exporter computes in its own way) is then run:
see `attention_proof.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import onnx_ir as ir

from qcompiler.graph.edit import constant
from qcompiler.graph.module_path import block_of, module_path
from qcompiler.graph.operators import has
from qcompiler.sites.caches import Cache, find_caches
from qcompiler.sites.kinds import Site, Unsupported

KERNELS_OF_RUNTIME = ("MultiHeadAttention", "DecoderMaskedMultiHeadAttention", "PagedAttention", "SparseAttention")
NO_CACHE = "its keys and values come from no cache that Concat extends (export the model with its past)"
Factors = tuple[tuple[ir.Value, int], ...]


@dataclass(frozen=True, eq=False)
class Joined:
    """One tensor of a cache: `present` is `past` and what is new, one after the other along axis 2."""

    past: ir.Value
    """Graph input [batch, heads, past, head size]."""
    new: ir.Value
    """[batch, heads, new, head size], or [batch, new, heads · head size] where the operator Attention reads it so."""
    present: ir.Value
    """Graph output."""
    node: ir.Node
    """The Concat or Attention that joins them."""
    axis: int


@dataclass(frozen=True, eq=False)
class Mask:
    """A value that hides positions: added to the scores, or a condition that keeps them or drops them."""

    value: ir.Value
    kind: Literal["add", "keep", "drop"]


@dataclass(frozen=True, eq=False)
class CachedAttention(Site):
    """softmax(scale · q kᵀ) v over a cache, causal, with rows that attention_mask pads. `node` writes its result."""

    query: ir.Value
    """[batch, heads, new, head size], rotated and not yet scaled; or [batch, new, heads · head size]."""
    key: Joined
    value: Joined
    num_heads: int
    kv_heads: int
    head_size: int
    factors: Factors
    """Scalars whose product, each to its power 1 or -1, is the scale."""
    masks: tuple[Mask, ...]
    causal: bool
    """Whether the operator Attention hides later positions by itself."""
    scale: float | None = None
    """Where an attribute says it; else `factors` do."""

    @property
    def output(self) -> ir.Value:
        """Like the query, of rank 4 or 3."""
        return self.node.outputs[0]

    @property
    def joined(self) -> tuple[Joined, Joined]:
        return self.key, self.value


def find_cached_attention(model: ir.Model) -> tuple[CachedAttention | Unsupported, ...]:
    """Every attention of the graph that is spelled out or is the standard operator, as far as the structure shows.

    What is not of the form above, or not with a cache, comes back as `Unsupported` with the reason.
    """
    caches = _caches(model)
    found: list[CachedAttention | Unsupported] = []
    for node in model.graph.all_nodes():
        site = _recognise(node, caches)
        if isinstance(site, str):
            path = module_path(node)
            found.append(Unsupported(node, node.name or "", path, block_of(path), site))
        elif site is not None:
            found.append(site)
    return tuple(found)


def _recognise(node: ir.Node, caches: Mapping[ir.Value, Joined]) -> CachedAttention | str | None:
    if node.domain == "com.microsoft" and node.op_type in KERNELS_OF_RUNTIME:
        return f"{node.op_type} is left as it is; only spelled-out attention and the standard operator are fused"
    if node.domain == "" and node.op_type == "Attention":
        return _operator(node, caches)
    if node.domain == "" and node.op_type == "Softmax":
        return _spelled_out(node, caches)
    return None


def _caches(model: ir.Model) -> dict[ir.Value, Joined]:
    """By present: the caches that a Concat extends."""
    return {
        cache.present: Joined(cache.past, cache.new, cache.present, cache.node, cache.axis)
        for cache in find_caches(model)
        if isinstance(cache, Cache) and cache.new is not None and cache.node.op_type == "Concat"
    }


# ------------------------------------------------------------------------------------------- the standard operator


def _operator(node: ir.Node, caches: Mapping[ir.Value, Joined]) -> CachedAttention | str:
    if node.attributes.get_float("softcap", 0.0):
        return "it caps its scores (softcap)"
    inputs = [*node.inputs, *[None] * (7 - len(node.inputs))]
    query, key, value, mask, past_key, past_value, counts = inputs[:7]
    if query is None or key is None or value is None:
        return "it lacks an input"
    if counts is not None:
        return "it is told how many positions of its keys count (nonpad_kv_seqlen), and no cache says so"
    if len(node.outputs) > 3 and (node.outputs[3].uses() or node.outputs[3].is_graph_output()):
        return "its scores are read by something else, too"
    factors: Factors = ()
    if past_key is not None and past_value is not None and len(node.outputs) >= 3:
        joined = [
            Joined(past, new, present, node, 2)
            for past, new, present in zip((past_key, past_value), (key, value), node.outputs[1:3], strict=True)
        ]
        if not all(item.past.is_graph_input() and item.present.is_graph_output() for item in joined):
            return NO_CACHE
    else:
        traced = [_cache_above(item, caches) for item in (key, value)]
        if traced[0] is None or traced[1] is None:
            return NO_CACHE
        joined = [trace.joined for trace in traced if trace is not None]
        if traced[0].factors or traced[1].factors:
            return "its keys or values are scaled between the cache and the operator"
    kind: Literal["add", "keep"] = "keep" if mask is not None and mask.dtype == ir.DataType.BOOL else "add"
    causal = bool(node.attributes.get_int("is_causal", 0))
    heads = node.attributes.get_int("q_num_heads", 0) or _size(query, 1)
    scale = node.attributes.get_float("scale", 0.0) or None
    masks = (Mask(mask, kind),) if mask is not None else ()
    return _site(node, query, joined[0], joined[1], heads, factors, masks, causal, scale)


# ------------------------------------------------------------------------------------------- spelled out


@dataclass(frozen=True)
class _Traced:
    joined: Joined
    factors: Factors = ()


@dataclass(frozen=True)
class _Scores:
    product: ir.Node
    factors: Factors = ()
    masks: tuple[Mask, ...] = field(default=())


def _spelled_out(softmax: ir.Node, caches: Mapping[ir.Value, Joined]) -> CachedAttention | str | None:
    product = _product_below(softmax)
    if product is None:
        return None  # a router or a classifier
    if isinstance(product, str):
        return product
    score_rank = softmax.outputs[0].shape
    if softmax.attributes.get_int("axis", -1) not in (-1, len(score_rank) - 1 if score_rank is not None else -1):
        return "its Softmax is not over the last axis"
    scores = _scores_above(softmax.inputs[0])
    if isinstance(scores, str):
        return scores
    left, right = scores.product.inputs
    keys, values = _cache_above(right, caches), _cache_above(product.inputs[1], caches)
    if keys is None or values is None or left is None:
        return NO_CACHE
    if values.factors:
        return "its values are scaled between the cache and the product with them"
    query, factors = _unscaled(left)
    heads = next((size for item in (product.outputs[0], left, right, scores.product.outputs[0])
                  if (size := _size(item, 1))), None)  # fmt: skip
    factors = (*factors, *keys.factors, *scores.factors)
    return _site(product, query, keys.joined, values.joined, heads, factors, scores.masks, False, None)


def _product_below(softmax: ir.Node) -> ir.Node | str | None:
    """The MatMul that the attention weights multiply the values in, through what exporters put between."""
    value = softmax.outputs[0]
    while True:
        readers = list(dict.fromkeys(use.node for use in value.uses()))
        checks = [node for node in readers if node.op_type == "IsNaN"]
        rest = [node for node in readers if node not in checks]
        product = next((node for node in rest if node.op_type == "MatMul" and node.inputs[0] is value), None)
        if product is not None and not product.domain and constant(product.inputs[1]) is None:
            others = len(rest) > 1 or checks or value.is_graph_output()
            return "its attention weights are read by something else, too" if others else product
        if len(rest) != 1 or rest[0].domain:
            return None
        (node,) = rest
        guarded = node.op_type == "Where" and checks and node.inputs[0] is checks[0].outputs[0]
        if not (node.op_type in ("Cast", "Identity") or (guarded and node.inputs[2] is value)):
            return None
        value = node.outputs[0]


def _scores_above(value: ir.Value | None) -> _Scores | str:
    """The product of queries and keys behind what a Softmax reads, with the scales and masks between."""
    node = value.producer() if value is not None else None
    if node is None:
        return "its scores are an input of the graph"
    if not node.domain and node.op_type == "MatMul":
        return _Scores(node)
    if not node.domain and node.op_type in ("Cast", "Identity"):
        return _scores_above(node.inputs[0])
    if not node.domain and node.op_type in ("Mul", "Div"):
        for index in (0, 1) if node.op_type == "Mul" else (0,):
            factor = node.inputs[1 - index]
            if factor is not None and _is_scalar(factor):
                scores = _scores_above(node.inputs[index])
                power = 1 if node.op_type == "Mul" else -1
                return scores if isinstance(scores, str) else _with(scores, factors=((factor, power),))
    if not node.domain and node.op_type == "Add":
        sides = [_scores_above(operand) for operand in node.inputs]
        scored = [side for side in sides if isinstance(side, _Scores)]
        if len(scored) == 2:
            return "two products are added to its scores"
        for side, other in zip(sides, reversed(node.inputs), strict=True):
            if isinstance(side, _Scores) and other is not None:
                return _with(side, masks=(Mask(other, "add"),))
        return next(side for side in sides if isinstance(side, str))
    if not node.domain and node.op_type == "Where":
        condition = node.inputs[0]
        for index, kind in ((1, "keep"), (2, "drop")):
            hidden = node.inputs[3 - index]
            if condition is not None and hidden is not None and _is_scalar(hidden):
                scores = _scores_above(node.inputs[index])
                hiding = Mask(condition, "keep" if kind == "keep" else "drop")
                return scores if isinstance(scores, str) else _with(scores, masks=(hiding,))
    if node.op_type == "Tanh":
        return "it caps its scores (Tanh before the mask)"
    return f"{node.op_type} stands between its scores and its Softmax"


def _with(scores: _Scores, *, factors: Factors = (), masks: tuple[Mask, ...] = ()) -> _Scores:
    return _Scores(scores.product, (*scores.factors, *factors), (*scores.masks, *masks))


def _cache_above(value: ir.Value | None, caches: Mapping[ir.Value, Joined]) -> _Traced | None:
    """The cache that a value is moved from, without another operator between but scalar factors."""
    factors: list[tuple[ir.Value, int]] = []
    while value is not None:
        if value in caches:
            return _Traced(caches[value], tuple(factors))
        value, factor = _step_up(value)
        factors += factor
    return None


def _unscaled(value: ir.Value) -> tuple[ir.Value, Factors]:
    """The query before it is scaled."""
    factors: list[tuple[ir.Value, int]] = []
    while True:
        node = value.producer()
        if node is None or _moves(node):
            return value, tuple(factors)
        above, factor = _step_up(value)
        if above is None:
            return value, tuple(factors)
        value = above
        factors += factor


def _moves(node: ir.Node) -> bool:
    return has(node, "moves", "whole") and node.op_type != "Cast"  # which has conditions of its own


def _step_up(value: ir.Value) -> tuple[ir.Value | None, Factors]:
    """What a value is the moved, cast or scaled form of; None where it is computed otherwise."""
    node = value.producer()
    if node is None or node.domain:
        return None, ()
    source = node.inputs[0]
    if _moves(node):
        return source, ()
    if node.op_type == "Cast":
        both = (value.dtype, source.dtype if source is not None else None)
        return (source, ()) if all(dtype is not None and dtype.is_floating_point() for dtype in both) else (None, ())
    if node.op_type in ("Mul", "Div"):
        for index in (1, 0) if node.op_type == "Mul" else (1,):
            factor = node.inputs[index]
            if factor is not None and _is_scalar(factor):
                return node.inputs[1 - index], ((factor, 1 if node.op_type == "Mul" else -1),)
    return None, ()


# ------------------------------------------------------------------------------------------- what both have in common


def _site(
    node: ir.Node, query: ir.Value, key: Joined, value: Joined, heads: int | None, factors: Factors,
    masks: tuple[Mask, ...], causal: bool, scale: float | None,
) -> CachedAttention | str:  # fmt: skip
    if key.past is value.past:
        return "its keys and values are the same cache"
    shapes = [tuple(item.past.shape) if item.past.shape is not None else () for item in (key, value)]
    if any(len(shape) != 4 or item.axis != 2 for shape, item in zip(shapes, (key, value), strict=True)):
        return "its cache does not lie as [batch, heads, positions, head size]"
    sizes = [shape[1::2] for shape in shapes]
    if sizes[0] != sizes[1]:
        return "its keys and values have other numbers of heads or other head sizes"
    kv_heads, head_size = sizes[0]
    if not isinstance(kv_heads, int) or not isinstance(head_size, int) or not heads:
        return "the shapes do not say how many heads it has, or how large they are"
    if heads % kv_heads:
        return f"its {heads} heads of queries cannot share {kv_heads} of keys and values evenly"
    if query.dtype not in (ir.DataType.FLOAT, ir.DataType.FLOAT16):
        return f"it computes in {query.dtype.name if query.dtype is not None else 'an unknown type'}"
    if any(item.dtype != query.dtype for joined in (key, value) for item in (joined.past, joined.new)):
        return "queries, keys, values and cache are not of one type"
    path = module_path(node)
    return CachedAttention(
        node=node, name=node.name or "", module_path=path, block=block_of(path), query=query, key=key, value=value,
        num_heads=heads, kv_heads=kv_heads, head_size=head_size, factors=factors, masks=masks, causal=causal,
        scale=scale,
    )  # fmt: skip


def _is_scalar(value: ir.Value) -> bool:
    tensor = constant(value)
    if tensor is not None:
        return tensor.size == 1
    return value.shape is not None and all(size == 1 for size in value.shape)


def _size(value: ir.Value | None, axis: int) -> int | None:
    if value is None or value.shape is None or len(value.shape) <= axis:
        return None
    size = value.shape[axis]
    return size if isinstance(size, int) else None
