"""Turns the attention that exporters spell out into ONNX Runtime's GroupQueryAttention, which keeps the cache itself.

**Before**  present = Concat(past, new),  y = softmax(s · q Kᵀ + mask) V, each head of keys repeated for its queries
**After**   y, presents = GroupQueryAttention(q, k, v, pasts, attention_mask summed, its length)

Exporters (torch.onnx, optimum, transformers) write attention as products, a Softmax, a mask that some forty nodes
compute, and copies of every head of keys and values for the queries that share it. The operator reads the cache once,
in place where past and present share a buffer, and can keep it quantized (see quantize-kv-cache). Rotary embeddings
stay as they are: queries and keys arrive rotated (do_rotary = 0). Graph inputs and outputs keep names and types.

What each attention computes is not read off its operators alone: it is run apart on random numbers and compared with
causal attention in float64, and its mask is computed again far beyond every number that occurs in it.

**Padding.** The operator knows how many tokens a row has, no mask. With ``padding: any`` the new tokens of each row are
put in order, real ones first (a Gather before and after the operator, which for one token moves nothing), so that rows
may be padded on either side; ``padding: right`` leaves that out, which saves four small nodes a layer, and is then
right for rows without padding and rows that are padded on the right. In both cases, a row's cache holds its real tokens
side by side, whatever the padding: it is the same cache as before only where nothing was padded. What a padded token
itself gives means nothing, before and after, and may differ. (The compiler's own check compares these, too: let the
samples that it is given be whole, or padded on the right.)

Limits of the operator: attention_mask holds 0 and 1, hides only what it hid from the start, and shows at least one
token in each row; several tokens after a past take a batch of one on the CPU; head sizes are multiples of 8; on CUDA it
computes in half precision only.

Source: the operator's contract in ONNX Runtime (contrib operators, com.microsoft.GroupQueryAttention 1).

Skipped: attention without a cache, with a bias of its own (ALiBi, relative positions), with a sliding window or chunks,
with capped scores, that is not causal, or whose keys and values are read by something else, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir
from pydantic.dataclasses import dataclass as options

from qcompiler.graph.edit import (
    add_constant,
    insert_before,
    new_node,
    remove_node_if_unused,
    remove_unused_constant,
)
from qcompiler.graph.model_inputs import Signature
from qcompiler.graph.operators import has
from qcompiler.graph.rewriter import Rewriter
from qcompiler.rewriting.contract import OPTIONS, Changed, Changes, Kind, Pass, Skipped
from qcompiler.sites.attention import CachedAttention, find_cached_attention
from qcompiler.sites.attention_proof import Proof, prove
from qcompiler.sites.kinds import Unsupported
from qcompiler.statistics import StatisticsStore

OPERATOR = "GroupQueryAttention"
HEAD_SIZE_STEP = 8
LAST = np.iinfo(np.int64).max
Size = int | ir.SymbolicDim | None


@options(frozen=True, config=OPTIONS)
class FuseAttention(Pass):
    name: ClassVar[str] = "fuse-attention"
    kind: ClassVar[Kind] = "exact"

    padding: Literal["any", "right"] = "any"
    """On which side the rows of a batch may be padded; `right` saves a Gather of queries, keys, values and results."""
    half_precision_only: bool = False
    """Leave attention in float32 alone, for which CUDA has no such operator (the target ort-cuda sets it)."""

    def apply(self, model: ir.Model, statistics: StatisticsStore) -> Changes:
        changes, signature = Changes(), Signature(model)
        proved: list[tuple[CachedAttention, Proof]] = []
        for site in self.selected(find_cached_attention(model)):
            proof = self._provable(model, site, signature)
            if isinstance(proof, str):
                changes.skipped.append(Skipped(site.name, proof))
            elif proved and proof.padding is not proved[0][1].padding:
                changes.skipped.append(Skipped(site.name, "some layers read attention_mask and some do not"))
            elif isinstance(site, CachedAttention):
                proved.append((site, proof))
        if not proved:
            return changes
        model.opset_imports.setdefault("com.microsoft", 1)
        lengths = _Lengths(Rewriter(model, self.name), proved[0][0], proved[0][1], self.padding)
        lengths.replace_shapes([site for site, _ in proved])
        for site, proof in proved:
            _fuse(site, proof, lengths)
            shared = site.num_heads // site.kv_heads
            detail = f"{site.num_heads} heads of {site.head_size}, {shared} to a head of keys and values"
            changes.changed.append(Changed(site.name, kernel=OPERATOR, detail=detail))
        lengths.place()
        return changes

    def _provable(self, model: ir.Model, site: CachedAttention | Unsupported, signature: Signature) -> Proof | str:
        if isinstance(site, Unsupported):
            return site.reason
        if site.head_size % HEAD_SIZE_STEP:
            return f"its heads have {site.head_size} numbers, and {OPERATOR} takes multiples of {HEAD_SIZE_STEP}"
        if self.half_precision_only and site.query.dtype == ir.DataType.FLOAT:
            return (
                f"it computes in float32, and CUDA has {OPERATOR} in half precision only: export the model in float16"
            )
        proof = prove(model, site, signature)
        if isinstance(proof, str):
            return proof
        reader = _reader_outside(site, proof)
        return proof if reader is None else f"its keys or values are read by {reader}, too"


def _reader_outside(site: CachedAttention, proof: Proof) -> str | None:
    """What reads the numbers of the caches, or what attention makes of them, but the attention itself."""
    pending = [joined.present for joined in site.joined]
    seen = set(pending)
    while pending:
        value = pending.pop()
        for node in dict.fromkeys(use.node for use in value.uses()):
            if has(node, "measures") or node is site.node:
                continue
            if node not in proof.interior:
                return node.name
            if any(output.is_graph_output() for output in node.outputs):
                return "the graph's outputs"
            new = [output for output in node.outputs if output not in seen]
            pending += new
            seen.update(new)
    return None


class _Lengths:
    """What all layers share, computed once at the start of the graph: how many tokens there are, and their order."""

    def __init__(self, rw: Rewriter, site: CachedAttention, proof: Proof, padding: str) -> None:
        self.rw = rw
        self.nodes: list[ir.Node] = []
        self.padding, self.ids = proof.padding, proof.ids
        dims: list[Size] = list(proof.ids.shape) if proof.ids.shape is not None else [None, None]
        self.batch_size, self.new_size = dims[0], dims[1]
        self._constants: dict[tuple[int, ...], ir.Value] = {}
        past = site.key.past
        new = self.add("Shape", [proof.ids], "new", shape=[1], start=1, end=2)
        if proof.padding is not None:
            self.total = self.add("Shape", [proof.padding], "total", shape=[1], start=1, end=2)
            self.past = self.add("Sub", [self.total, new], "past", shape=[1])
            counts = self._counted(proof.padding)
        else:
            self.past = self.add("Shape", [past], "past", shape=[1], start=2, end=3)
            self.total = self.add("Add", [self.past, new], "total", shape=[1])
            batch = self.add("Shape", [proof.ids], "batch", shape=[1], start=0, end=1)
            counts = self.add("Expand", [self.total, batch], "counts", shape=[self.batch_size])
        last = self.add("Sub", [counts, self.integers([1])], "last", shape=[self.batch_size])
        self.seqlens = self._cast(last, "seqlens")
        self.total_length = self._cast(self.add("Squeeze", [self.total], "length", shape=[]), "total_length")
        self.rows: ir.Value | None = None
        self.back: ir.Value | None = None
        if proof.padding is not None and padding == "any":
            self._put_in_order(proof.padding, new)

    def _counted(self, mask: ir.Value) -> ir.Value:
        """[batch]: how many tokens each row has."""
        return self.add("ReduceSum", [self._whole(mask), self.integers([1])], "counts", shape=[self.batch_size],
                        keepdims=0)  # fmt: skip

    def _whole(self, mask: ir.Value) -> ir.Value:
        if mask.dtype == ir.DataType.INT64:
            return mask
        return self.add("Cast", [mask], "mask", shape=list(mask.shape or []), to=int(ir.DataType.INT64))

    def _put_in_order(self, mask: ir.Value, new: ir.Value) -> None:
        """`rows`: for each place, the row of [batch · new, …] whose token belongs there; `back`: the way back.

        Real tokens get the numbers new, new - 1, …, padded ones 0, -1, …: sorted, each kind keeps its order.
        """
        both = [self.batch_size, self.new_size]
        recent = self.add("Slice", [self._whole(mask), self.past, self.integers([LAST]), self.integers([1])], "recent",
                          shape=both)  # fmt: skip
        zero, one = self.integers([]), self.integers([], 1)
        places = self.add("Range", [zero, self.add("Squeeze", [new], "count", shape=[]), one], "places",
                          shape=[self.new_size])  # fmt: skip
        raised = self.add("Mul", [recent, new], "raised", shape=both)
        rank = self.add("Sub", [raised, places], "rank", shape=both)
        order = self._sorted(rank, new, "order", largest=1)
        inverse = self._sorted(order, new, "inverse", largest=0)
        batch = self.add("Squeeze", [self.add("Shape", [self.ids], "batch", shape=[1], start=0, end=1)], "batches",
                         shape=[])  # fmt: skip
        rows = self.add("Range", [zero, batch, one], "samples", shape=[self.batch_size])
        first = self.add("Mul", [rows, new], "firsts", shape=[self.batch_size])
        first = self.add("Unsqueeze", [first, self.integers([1])], "first", shape=[self.batch_size, 1])
        self.rows = self.add("Add", [order, first], "rows", shape=both)
        self.back = self.add("Add", [inverse, first], "back", shape=both)

    def _sorted(self, value: ir.Value, count: ir.Value, name: str, largest: int) -> ir.Value:
        sizes = ir.Shape([self.batch_size, self.new_size])
        outputs = [
            ir.Value(name=self.rw.fresh(f"attention.{part}"), type=ir.TensorType(ir.DataType.INT64), shape=sizes)
            for part in (f"{name}.values", name)
        ]
        attributes = [ir.AttrInt64("axis", -1), ir.AttrInt64("largest", largest), ir.AttrInt64("sorted", 1)]
        self.nodes.append(ir.Node("", "TopK", [value, count], attributes, outputs=outputs, name=outputs[1].name))
        return outputs[1]

    def _cast(self, value: ir.Value, name: str) -> ir.Value:
        return self.add("Cast", [value], name, dtype=ir.DataType.INT32, shape=list(value.shape or []),
                        to=int(ir.DataType.INT32))  # fmt: skip

    def add(
        self, op_type: str, inputs: Sequence[ir.Value], name: str, *, shape: Sequence[Size],
        dtype: ir.DataType = ir.DataType.INT64, **attributes: int,
    ) -> ir.Value:  # fmt: skip
        node = self.rw.node(
            op_type, inputs, f"attention.{name}", dtype=dtype, shape=ir.Shape(shape),
            attributes=dict(attributes),
        )  # fmt: skip
        self.nodes.append(node)
        return node.outputs[0]

    def integers(self, numbers: Sequence[int], scalar: int = 0) -> ir.Value:
        """A constant of int64, shared by all that ask for it; without numbers it is the scalar."""
        key = tuple(numbers) or (scalar, scalar, scalar, scalar, scalar)
        if key not in self._constants:
            data = np.array(list(numbers) if numbers else scalar, np.int64)
            name = self.rw.fresh("attention." + ("_".join(map(str, numbers)) or f"scalar_{scalar}"))
            self._constants[key] = add_constant(self.rw.graph, name, data)
        return self._constants[key]

    def replace_shapes(self, sites: Sequence[CachedAttention]) -> None:
        """Let what asks a cache for its length get it from here, as a shared buffer is longer than what is in it.

        Heads and their size become constants, so that nothing depends on how a cache is stored but the operator; the
        batch is that of the tokens.
        """
        own = set(self.nodes)
        for site in sites:
            for joined, value in ((j, v) for j in site.joined for v in (j.past, j.present)):
                for node in list(dict.fromkeys(use.node for use in value.uses())):
                    given = node.outputs[0].is_graph_output()
                    if node.op_type == "Shape" and not node.domain and not given and node not in own:
                        self._replace_shape(node, site, self.past if value is joined.past else self.total)

    def _replace_shape(self, node: ir.Node, site: CachedAttention, length: ir.Value) -> None:
        sizes = (None, site.kv_heads, length, site.head_size)
        parts = []
        for size in sizes[node.attributes.get_int("start", 0) : node.attributes.get_int("end", 4)]:
            if size is None:
                parts.append(self.add("Shape", [self.ids], "batch", shape=[1], start=0, end=1))
            else:
                parts.append(self.integers([size]) if isinstance(size, int) else size)
        whole = parts[0] if len(parts) == 1 else self.add("Concat", parts, "shape", shape=[len(parts)], axis=0)
        node.outputs[0].replace_all_uses_with(whole)
        remove_node_if_unused(node)

    def place(self) -> None:
        for node in self.nodes:
            self.rw.inherit([node], node)
        first = next(iter(self.rw.graph))
        insert_before(first, self.nodes)
        for node in reversed(self.nodes):
            if node.graph is not None:
                remove_node_if_unused(node)
        for value in self._constants.values():
            remove_unused_constant(value)


# ------------------------------------------------------------------------------------------- one layer


def _fuse(site: CachedAttention, proof: Proof, lengths: _Lengths) -> None:
    layer = _Layer(site, lengths)
    width, narrow = (heads * site.head_size for heads in (site.num_heads, site.kv_heads))
    inputs = [
        layer.ordered(layer.flat(value, size), size, lengths.rows)
        for value, size in ((site.query, width), (site.key.new, narrow), (site.value.new, narrow))
    ]
    inputs += [site.key.past, site.value.past, lengths.seqlens, lengths.total_length]
    result = layer.named(".result", site.query, [lengths.batch_size, lengths.new_size, width])
    presents = [layer.named(f".{part}", joined.present, list(joined.present.shape or []))
                for part, joined in zip(("key", "value"), site.joined, strict=True)]  # fmt: skip
    attributes = [
        ir.AttrInt64("num_heads", site.num_heads), ir.AttrInt64("kv_num_heads", site.kv_heads),
        ir.AttrFloat32("scale", proof.scale),
    ]  # fmt: skip
    name = lengths.rw.fresh(f"{site.name}.{OPERATOR}")
    layer.nodes.append(ir.Node("com.microsoft", OPERATOR, inputs, attributes, outputs=[result, *presents], name=name))
    layer.hand_on(layer.ordered(result, width, lengths.back))
    for joined, present in zip(site.joined, presents, strict=True):
        _take_place(joined.present, present)


class _Layer:
    """The nodes of one layer, put where its attention ends."""

    def __init__(self, site: CachedAttention, lengths: _Lengths) -> None:
        self.site, self.lengths = site, lengths
        self.nodes: list[ir.Node] = []

    def named(self, part: str, like: ir.Value, shape: Sequence[Size]) -> ir.Value:
        return ir.Value(
            name=self.lengths.rw.fresh(f"{self.site.name}{part}"), type=like.type,
            shape=ir.Shape(shape),
        )  # fmt: skip

    def flat(self, value: ir.Value, width: int) -> ir.Value:
        """[batch, new, heads · head size] of a value that may lie as [batch, heads, new, head size]."""
        if value.shape is not None and len(value.shape) == 3:
            return value
        lengths = self.lengths
        producer = value.producer()
        if producer is not None and _swaps_heads(producer) and producer.inputs[0] is not None:
            apart = producer.inputs[0]
            before = apart.producer()
            source = before.inputs[0] if before is not None and before.op_type == "Reshape" else None
            if source is not None and source.shape is not None and len(source.shape) == 3 and source.shape[2] == width:
                return source
        else:
            heads, size = width // self.site.head_size, self.site.head_size
            apart = self._add("Transpose", [value], [lengths.batch_size, lengths.new_size, heads, size],
                              perm=[0, 2, 1, 3])  # fmt: skip
        shape = [lengths.batch_size, lengths.new_size, width]
        return self._add("Reshape", [apart, lengths.integers([0, 0, width])], shape)

    def ordered(self, value: ir.Value, width: int, places: ir.Value | None) -> ir.Value:
        """The tokens of [batch, new, width] put into another order."""
        if places is None:
            return value
        listed = self._add("Reshape", [value, self.lengths.integers([-1, width])], [None, width])
        return self._add("Gather", [listed, places], [self.lengths.batch_size, self.lengths.new_size, width], axis=0)

    def hand_on(self, result: ir.Value) -> None:
        """Let the readers of attention's result read the operator's [batch, new, width]; the old nodes go."""
        site, lengths = self.site, self.lengths
        old, new = site.output, result
        if old.shape is None or len(old.shape) != 3:
            transposed = _only_reader(old)
            if transposed is not None and _swaps_heads(transposed):
                old = transposed.outputs[0]
                reshaped = _only_reader(old)
                if reshaped is not None and reshaped.op_type == "Reshape" and self._is_flat(reshaped.outputs[0]):
                    old = reshaped.outputs[0]
                else:
                    new = self._apart(new)
            else:
                new = self._add("Transpose", [self._apart(new)], [lengths.batch_size, site.num_heads,
                                lengths.new_size, site.head_size], perm=[0, 2, 1, 3])  # fmt: skip
        lengths.rw.inherit(self.nodes, site.node)
        insert_before(site.node, self.nodes)
        _take_place(old, new)

    def _apart(self, value: ir.Value) -> ir.Value:
        sizes = [self.site.num_heads, self.site.head_size]
        shape = [self.lengths.batch_size, self.lengths.new_size, *sizes]
        return self._add("Reshape", [value, self.lengths.integers([0, 0, *sizes])], shape)

    def _is_flat(self, value: ir.Value) -> bool:
        """Whether a Reshape of [batch, new, heads, head size] gives [batch, new, width]: two sizes tell the third."""
        if value.shape is None or len(value.shape) != 3:
            return False
        return list(value.shape[:2]) == [self.lengths.batch_size, self.lengths.new_size]

    def _add(self, op_type: str, inputs: Sequence[ir.Value], shape: Sequence[Size], **attributes: object) -> ir.Value:
        like = self.site.query
        node = new_node(
            op_type, inputs, self.lengths.rw.fresh(f"{self.site.name}.{op_type.lower()}"), like=like,
            shape=ir.Shape(shape), attributes=dict(attributes),
        )  # fmt: skip
        self.nodes.append(node)
        return node.outputs[0]


def _swaps_heads(node: ir.Node) -> bool:
    return node.op_type == "Transpose" and list(node.attributes.get_ints("perm") or ()) == [0, 2, 1, 3]


def _only_reader(value: ir.Value) -> ir.Node | None:
    uses = list(value.uses())
    return uses[0].node if len(uses) == 1 and not value.is_graph_output() and not uses[0].node.domain else None


def _take_place(old: ir.Value, new: ir.Value) -> None:
    """Let `new` take the readers and the name of a value, and remove the node that wrote it once nobody needs it."""
    name, node = old.name, old.producer()
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    old.name, new.name = f"{name}.before", name
    if node is not None and node.graph is not None:
        remove_node_if_unused(node)
