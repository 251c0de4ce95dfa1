"""What is found in a model, found once for a state of it: passes, report and driver ask here.

    sites_of(model)                linear layers, convolutions, embeddings, and what is none of them and why
    quantized_linears_of(model)    linear layers whose weight is decoded
    norm_groups_of(model)          norms and the layers that read them
    linear_groups_of(model)        layers by the value that they read
    caches_of(model)               the KV-cache

What was found is kept with the model's graph and holds as long as nothing of what the recognisers look at has changed:
nodes, their operators, inputs, attributes and metadata, names, types and shapes. Numbers of constants may change.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import onnx_ir as ir

from qcompiler.graph.metadata import PROVENANCE
from qcompiler.graph.state import state_of
from qcompiler.sites.caches import Cache, find_caches
from qcompiler.sites.find import Sites, decodes_weight, find_sites
from qcompiler.sites.kinds import Linear, NormGroup, Unsupported
from qcompiler.sites.norms import group_linears

Found = TypeVar("Found")

_KEPT = "qcompiler.analyses"  # in the graph's `meta`, which is never saved


def sites_of(model: ir.Model) -> Sites:
    """Every quantizable site of the graph, and every node that would be one if its form were another."""
    return _kept(model, find_sites)


def quantized_linears_of(model: ir.Model) -> tuple[Linear, ...]:
    """The linear layers whose weight is decoded, which lowering passes work on."""
    if not any(decodes_weight(node) for node in model.graph):
        return ()
    return tuple(linear for linear in sites_of(model).linears if linear.dequantize is not None)


def linear_groups_of(model: ir.Model) -> tuple[NormGroup, ...]:
    """Every value that linear layers read; `gains` is empty where its producer has none that could take a factor."""
    return _kept(model, _linear_groups)


def norm_groups_of(model: ir.Model) -> tuple[NormGroup, ...]:
    """Every value that linear layers read and that gains scale."""
    return tuple(group for group in linear_groups_of(model) if group.gains)


def caches_of(model: ir.Model) -> Sequence[Cache | Unsupported]:
    """Every cache, in the order of the graph's inputs; what looks like one and is of another form, with the reason."""
    return _kept(model, find_caches)


def let_go(model: ir.Model) -> None:
    """Drop what was found in another state, and so nodes and constants that are no longer in the model."""
    state, _ = model.graph.meta.get(_KEPT, (None, {}))
    if state is not None and state != _state(model):
        del model.graph.meta[_KEPT]


def _linear_groups(model: ir.Model) -> tuple[NormGroup, ...]:
    return group_linears(sites_of(model).linears)


def _kept(model: ir.Model, find: Callable[[ir.Model], Found]) -> Found:
    now = _state(model)
    state, found = model.graph.meta.get(_KEPT, (None, {}))
    if state != now:
        found = {}
    if find not in found:
        found[find] = find(model)
    model.graph.meta[_KEPT] = (now, found)
    return cast(Found, found[find])


def _state(model: ir.Model) -> list[Any]:
    """Two states that compare equal are the same to every recogniser."""
    return state_of(model, leave_out=(PROVENANCE,))
