"""Stores the keys and values of attention in 8 or 4 bits: the graph's cache inputs and outputs become integers.

**Before**  present = Concat(past, new);  attention reads present
**After**   present = Concat(past, Q(new));  attention reads D(present)          past, present: int8, or uint8 for int4

Names of inputs and outputs stay, types change. The codes of a position are made once, when it is appended, and never
again, so that the error does not grow with the length of the text. Four bits are packed two to a byte, 8 + code of an
even channel in the low half.

A cache's scales are one of

- ``tensor``, ``channel``: static, from calibration: one for the cache of a layer, or one for each channel of each head.
- ``token``: one for each head at each position, found when the position is appended. They travel beside the codes, as
  an input ``past_key_values.0.key_scale`` and an output ``present.0.key_scale``, float16 [batch, heads, positions, 1].
  Asymmetric ones have an ``…_offset``, too.

Left open, scales are per token where the cache is joined in the graph, and per channel where an operator that only
takes static scales (GroupQueryAttention) appends to it.

Keys have channels that are always large, or always far from 0; values have not (Liu et al. 2024, "KIVI", section 3.2,
therefore quantizes keys per channel and values per token). With scales per token, ``normalize`` takes that from the
keys first, k' = (k - center) / reach, by the calibrated range of each channel of each head. That makes the error
independent of how channels are shifted and stretched, and a scale of its own still covers what calibration never saw.

Keys are measured after the rotation of positions, as caches hold them. As attention is causal, a window of text read
at once gives exactly the keys and values of reading it step by step. ``widen`` bounds their ranges for all positions,
seen or not: a rotated pair keeps its length, so |k| ≤ √(k_i² + k_j²) whatever the position.

A cache may be joined by Concat, by TensorScatter, or in ai.onnx Attention itself, whose cache is then joined by Concat
before it. GroupQueryAttention keeps its own, and quantizes and reads it in its kernel: scales are static and symmetric.

Skipped: caches of other forms, and caches that are quantized already; float8 where the cache is joined in the graph, as
ONNX Runtime's Concat has no kernel for it; heads of an odd size with 4 bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir
from pydantic import Field
from pydantic.dataclasses import dataclass as options

from qcompiler.errors import SchemeError
from qcompiler.formats.arithmetic import Array
from qcompiler.formats.scheme import Scheme
from qcompiler.graph.edit import insert_after, insert_before, new_node
from qcompiler.graph.rewriter import Rewriter
from qcompiler.rewriting import fused_cache
from qcompiler.rewriting.attention_past import join_outside
from qcompiler.rewriting.cache_storage import Coder, Storage
from qcompiler.rewriting.contract import OPTIONS, CacheChange, Changed, Changes, Kind, Pass, Skipped, Tap
from qcompiler.sites.analyses import caches_of
from qcompiler.sites.caches import Cache
from qcompiler.sites.find import Unsupported
from qcompiler.statistics import HeadRange, StatisticsStore

Granularity = Literal["tensor", "channel", "token"]
SCALE_DTYPES = {"float16": ir.DataType.FLOAT16, "float32": ir.DataType.FLOAT}


@options(frozen=True, config=OPTIONS)
class QuantizeKvCache(Pass):
    name: ClassVar[str] = "quantize-kv-cache"
    kind: ClassVar[Kind] = "rounding"
    works_on: ClassVar[Literal["layers", "caches"]] = "caches"

    format: Literal["int8", "int4", "fp8_e4m3"] = "int8"
    """int8, int4 (packed two to a byte), or fp8_e4m3."""
    key_granularity: Granularity | None = None
    """What shares one scale: tensor, channel (of each head) or token (of each head). Open: token where it can be."""
    value_granularity: Granularity | None = None
    """The same for values."""
    symmetric: bool = True
    """Scales per token without an offset of their own; static ones never have one."""
    normalize: bool = True
    """Put the channels of keys on one range before scales per token are found (needs calibration data)."""
    widen: bool | None = None
    """Widen the calibrated range of keys to all rotary positions. Open: where the operator with the cache rotates."""
    rotary_interleaved: bool = False
    """The pairs that positions rotate are neighbours (GPT-J), and not half a head apart (Llama); for `widen`."""
    rotary_dim: int | None = Field(default=None, ge=2)
    """How many channels of a head are rotated, the first ones; open: all of them. For `widen`."""
    scale_dtype: Literal["float16", "float32"] = "float16"
    """The type of the scales per token."""

    def __post_init__(self) -> None:
        per_token = (self.key_granularity in ("token", None), self.value_granularity in ("token", None))
        if not self.symmetric and (not all(per_token) or self.format == "fp8_e4m3"):
            raise SchemeError(
                "static scales of a cache, and float8, are symmetric: leave symmetric out, or set key_granularity and "
                "value_granularity to token."
            )
        if self.widen and self.key_granularity == "token" and not self.normalize:
            raise SchemeError(
                "widen widens the calibrated range of keys, and scales per token need none: leave it out."
            )

    def taps(self, model: ir.Model) -> Sequence[Tap]:
        return [
            Tap(str(cache.present.name), self._statistic(cache))
            for cache, obstacle in self._examined(model)
            if self._storage(cache).needs_range and obstacle is None
        ]

    def apply(self, model: ir.Model, statistics: StatisticsStore) -> Changes:
        changes, rw = Changes(), Rewriter(model, self.name)
        for found in caches_of(model):
            if isinstance(found, Unsupported) and self.selects(found):
                changes.skipped.append(Skipped(found.name, found.reason))
        selected = self._selected(model)
        obstacles = self._obstacles(selected)
        changes.skipped += [Skipped(name, reason) for name, reason in obstacles.items() if reason is not None]
        chosen = {name for name, reason in obstacles.items() if reason is None}
        for node in dict.fromkeys(cache.node for cache in selected if cache.name in chosen):
            if node.op_type == "Attention":
                join_outside(node, rw)
        fused: dict[ir.Node, dict[str, Cache]] = {}
        for cache in self._selected(model):
            if cache.name in chosen and not _is_fused(cache.node):
                self._quantize(cache, statistics, rw, changes)
            elif cache.name in chosen:
                fused.setdefault(cache.node, {})[cache.role] = cache
        for node, caches in fused.items():
            key, value = ((cache, self._storage(cache), self._range(cache, statistics)) for cache in _pair(caches))
            fused_cache.store(key, value, rw)
            rw.mark(node)
            changes.changed += [_changed(cache, self._storage(cache)) for cache in _pair(caches)]
        return changes

    def _selected(self, model: ir.Model) -> list[Cache]:
        return [site for site in caches_of(model) if isinstance(site, Cache) and self.selects(site)]

    def _storage(self, cache: Cache) -> Storage:
        granularity = self.key_granularity if cache.role == "key" else self.value_granularity
        if granularity is None:
            granularity = "channel" if _is_fused(cache.node) else "token"
        per_token = granularity == "token"
        scheme = Scheme.from_options(self.format, granularity, symmetric=self.symmetric or not per_token,
                                     dynamic=per_token)  # fmt: skip
        normalize = self.normalize and per_token and cache.role == "key"
        return Storage(scheme, SCALE_DTYPES[self.scale_dtype], normalize)

    def _statistic(self, cache: Cache) -> HeadRange:
        attributes = cache.node.attributes
        rotates = attributes.get_int("do_rotary", 0) == 1  # GroupQueryAttention, which also says which pairs
        if cache.role == "value" or not (rotates if self.widen is None else self.widen):
            return HeadRange(heads_axis=cache.heads_axis)
        interleaved = attributes.get_int("rotary_interleaved", 0) == 1 if rotates else self.rotary_interleaved
        channels = attributes.get_int("rotary_embedding_dim", 0) if rotates else self.rotary_dim
        pairs = "interleaved" if interleaved else "half"
        return HeadRange(heads_axis=cache.heads_axis, pairs=pairs, rotary_dim=channels or 0)

    def _examined(self, model: ir.Model) -> list[tuple[Cache, str | None]]:
        selected = self._selected(model)
        obstacles = self._obstacles(selected)
        return [(cache, obstacles[cache.name]) for cache in selected]

    def _obstacles(self, selected: Sequence[Cache]) -> dict[str, str | None]:
        """Why each cache stays as it is, or None."""
        found = {cache.name: self._obstacle(cache) for cache in selected}
        inside: dict[ir.Node, dict[str, Cache]] = {}
        for cache in selected:
            if cache.new is None:
                inside.setdefault(cache.node, {})[cache.role] = cache
        for node, caches in inside.items():
            names = [cache.name for cache in caches.values()]
            if len(caches) < 2:
                found |= dict.fromkeys(names, f"{node.op_type} takes keys and values together, and one is left out")
            elif _is_fused(node):
                key, value = ((cache, self._storage(cache)) for cache in _pair(caches))
                found |= dict.fromkeys(names, fused_cache.refusal(key, value) or None)
            elif any(found[name] is not None for name in names):
                reason = f"{node.op_type} takes keys and values together, and one is skipped"
                found |= {name: found[name] or reason for name in names}
        return found

    def _obstacle(self, cache: Cache) -> str | None:
        storage = self._storage(cache)
        if _is_fused(cache.node):
            return None
        if self.format == "fp8_e4m3":
            return f"ONNX Runtime has no {cache.node.op_type} for float8: use format int8"
        if storage.packed and any(use.node.op_type == "Size" for use in cache.past.uses()):
            return "Size counts the elements of its past, and packed ones are half as many: use format int8"
        if storage.packed and cache.head_size % 2:
            return f"heads of {cache.head_size} channels cannot be packed in pairs: use format int8"
        return None

    def _range(self, cache: Cache, statistics: StatisticsStore) -> tuple[Array, Array]:
        return statistics.get(str(cache.present.name), self._statistic(cache)).result()

    def _quantize(self, cache: Cache, statistics: StatisticsStore, rw: Rewriter, changes: Changes) -> None:
        storage = self._storage(cache)
        coder = Coder(rw, cache, storage, self._range(cache, statistics) if storage.needs_range else None)
        dequantized = _quantize_joined(cache, storage, coder, rw)
        changes.changed.append(_changed(cache, storage))
        changes.moved[str(cache.present.name)] = str(dequantized.name)


def _pair(caches: Mapping[str, Cache]) -> tuple[Cache, Cache]:
    return caches["key"], caches["value"]


def _is_fused(node: ir.Node) -> bool:
    """Whether the operator itself keeps codes; the others get them, and their scales, from nodes of ours."""
    return node.op_type == fused_cache.OPERATOR


def _changed(cache: Cache, storage: Storage) -> Changed:
    change = CacheChange(
        past=str(cache.past.name), present=str(cache.present.name), before=cache.dtype.name.lower(),
        after=storage.dtype.name.lower(), bytes_before=cache.bytes, bytes_after=storage.bytes(cache),
        scheme=storage.reported,
    )  # fmt: skip
    return Changed(cache.name, detail=str(change), cache=change)


def _quantize_joined(
    cache: Cache, storage: Storage, coder: Coder, rw: Rewriter
) -> ir.Value:  # fmt: skip
    """Let the join append codes, and the readers of the present read them dequantized, which is returned."""
    if cache.new is None:
        raise ValueError(f"{cache.name!r} is joined inside {cache.node.op_type}")
    graph, join, float_shape = rw.graph, cache.node, cache.present.shape
    readers = list(cache.present.uses())
    encoded = coder.encode(cache.new)
    insert_before(join, encoded.nodes)
    join.replace_input_with(1, encoded.codes)
    if storage.packed:
        _keep_sizes(graph, cache.past, rw)
    for value in (cache.past, cache.present):
        value.type, value.shape = ir.TensorType(storage.dtype), storage.shape(value.shape)
    joins, companions = [], {}
    for kind, new in encoded.companions.items():
        node = _join_companion(graph, cache, storage, kind, new)
        joins.append(node)
        companions[kind] = node.outputs[0]
    decoding = coder.decode(cache.present, companions, float_shape)
    insert_after(join, [*joins, *decoding])
    rw.inherit([*encoded.nodes, *joins, *decoding], join)
    rw.inherit([join], join)
    dequantized = decoding[-1].outputs[0]
    for node, index in readers:
        node.replace_input_with(index, dequantized)
    return dequantized


def _join_companion(graph: ir.Graph, cache: Cache, storage: Storage, kind: str, new: ir.Value) -> ir.Node:
    """The node that appends scales or offsets, between an input and an output of the graph, named after the cache's."""

    def shape(value: ir.Value) -> ir.Shape | None:
        return None if value.shape is None else ir.Shape([*value.shape[:-1], 1])

    past = ir.Value(name=f"{cache.past.name}_{kind}", type=ir.TensorType(storage.scale_dtype), shape=shape(cache.past))
    graph.inputs.append(past)
    others = cache.node.inputs[2:]  # where TensorScatter writes
    node = new_node(cache.node.op_type, [past, new, *others], f"{cache.present.name}_{kind}",
                    dtype=storage.scale_dtype, shape=shape(cache.present))  # fmt: skip
    node.attributes.update(cache.node.attributes)
    graph.outputs.append(node.outputs[0])
    return node


def _keep_sizes(graph: ir.Graph, past: ir.Value, rw: Rewriter) -> None:
    """Let the readers of the past's shape read that of the numbers: two of them share the place of a packed one."""
    for node, _ in list(past.uses()):
        if node.op_type != "Shape":
            continue
        axes = list(range(4))[node.attributes.get_int("start", 0) : node.attributes.get_int("end", 4)]
        if 3 not in axes:
            continue
        numbers = np.array([2 if axis == 3 else 1 for axis in axes], np.int64)
        factors = rw.constant(f"{node.name}.factors", numbers, graph)
        sizes = node.outputs[0]
        product = rw.node("Mul", [sizes, factors], f"{node.name}.unpacked", like=sizes)
        public = sizes.is_graph_output()
        sizes.replace_all_uses_with(product.outputs[0], replace_graph_outputs=True)
        product.replace_input_with(0, sizes)
        if public:
            product.outputs[0].name, sizes.name = sizes.name, product.outputs[0].name
        insert_after(node, [product])
        rw.inherit([product], node)
