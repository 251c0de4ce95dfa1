"""Which output of a model continues which cache input, however the exporter named them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from qcompiler.errors import ModelError
from qcompiler.graph.model_inputs import PAST, Input, Signature
from qcompiler.graph.operators import attends, continuations, has

PRESENT = re.compile(r"^(output[._])?(present|past)(_key_values)?[._]")


@dataclass(frozen=True)
class CachePort:
    """One tensor that goes out of a step and into the next: keys or values of a layer, or the scales of either."""

    past: Input
    present: str
    axis: int
    """The axis along which positions lie."""
    shareable: bool
    """GroupQueryAttention reads and writes it: one buffer for both names spares copying it at every step."""

    def shape(self, batch: int, positions: int) -> list[int]:
        """Sizes for so many rows and positions. Raises ModelError where the model leaves another axis open."""
        sizes = list(self.past.dims or ())
        sizes[self.axis] = positions
        sizes[0] = sizes[0] if isinstance(sizes[0], int) else batch
        known = [size for size in sizes if isinstance(size, int)]
        if len(known) < len(sizes):
            raise ModelError(
                f"the cache input {self.past.name!r} has the shape {list(self.past.dims or ())}, of which more is open "
                "than batch and positions; give heads and head size as numbers"
            )
        return known


def find_cache_io(model: ir.Model, signature: Signature) -> tuple[CachePort, ...]:
    """Every cache input with the output that continues it; empty for a model without a cache.

    Names decide where they pair up (past_key_values.0.key and present.0.key; input.past_key_values.layers.0.keys and
    output.past_key_values.layers.0.keys), else the graph: the output that the input flows into. Raises ModelError where
    neither tells, where two inputs claim one output, and where input and output differ in type.
    """
    graph = model.graph
    values = {str(value.name): value for value in graph.inputs}
    outputs = {str(value.name): value for value in graph.outputs}
    by_rest = {PRESENT.sub("", name): name for name in outputs if PRESENT.match(name)}
    found: list[CachePort] = []
    for item in signature.inputs.values():
        if not item.is_past:
            continue
        flows_into, shareable = _flow(values[item.name], outputs)
        present = by_rest.get(PAST.sub("", item.name)) or (flows_into[0] if len(flows_into) == 1 else None)
        if present is None:
            raise ModelError(
                f"no output continues the cache input {item.name!r}; its outputs are {_listed(list(outputs))}, and "
                "names like past_key_values.0.key and present.0.key would tell"
            )
        if outputs[present].dtype not in (None, item.dtype):
            raise ModelError(
                f"the cache input {item.name!r} has the type {item.dtype.name}, and its output {present!r} "
                f"{outputs[present].dtype}; they must be the same to go round"
            )
        if item.past_axis is None:
            raise ModelError(
                f"the shape of the cache input {item.name!r} does not show which axis grows; generation needs a cache "
                "with one open axis beside the batch"
            )
        found.append(CachePort(item, present, item.past_axis, shareable and flows_into == [present]))
    claimed = [cache.present for cache in found]
    doubled = next((cache for cache in found if claimed.count(cache.present) > 1), None)
    if doubled is not None:
        raise ModelError(f"two cache inputs would be continued by the output {doubled.present!r}; rename the outputs")
    return tuple(found)


def _flow(past: ir.Value, outputs: dict[str, ir.Value]) -> tuple[list[str], bool]:
    """The graph outputs that a cache input flows into, and whether GroupQueryAttention alone reads it and its pair."""
    found: dict[str, None] = {}
    queue, seen = [past], {past}
    while queue:
        value = queue.pop(0)
        if value is not past and outputs.get(str(value.name)) is value:
            found[str(value.name)] = None
        for node, index in value.uses():
            inside = continuations(node).get(index) if attends(node) else None
            nexts: Sequence[ir.Value] = ()
            if inside is not None and inside < len(node.outputs):
                nexts = (node.outputs[inside],)
            elif _hands_on(node) and (node.op_type == "Concat" or index == 0):
                nexts = node.outputs
            new = [other for other in nexts if other not in seen]
            seen.update(new)
            queue += new
    return list(found), _is_shareable(past)


def _hands_on(node: ir.Node) -> bool:
    """Whether a node may lie between a cache and the output that continues it."""
    return has(node, "joins") or (has(node, "moves") and not has(node, "picks"))


def _is_shareable(past: ir.Value) -> bool:
    """Whether a past, and the other one of its operator (both must be of one length), are for the operator alone."""
    readers = {node for node, _ in past.uses()}
    if {node.op_type for node in readers} != {"GroupQueryAttention"} or len(readers) > 1:
        return False
    pair = [value for node in readers for value in node.inputs[3:5] if value is not None]
    return all({node for node, _ in value.uses()} == readers for value in pair)


def _listed(names: list[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
