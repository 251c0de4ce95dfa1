"""What became of each layer, in words and numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir

from qcompiler.evaluation.compare import Measures
from qcompiler.formats.scheme import Scheme, in_words
from qcompiler.graph.module_path import block_of
from qcompiler.model_diff.arithmetic import error_of
from qcompiler.model_diff.layers import CacheView, Layer, read_caches
from qcompiler.model_diff.pairing import LayerPair
from qcompiler.model_diff.provenance import exact_passes, in_order, passes_of, rounding_passes
from qcompiler.model_diff.scales import Scaling
from qcompiler.sites.stored.layout import Array

Fate = Literal[
    "quantized", "requantized", "dequantized", "cast", "fused", "replaced", "scaled", "changed", "untouched",
    "added", "removed",
]  # fmt: skip

SAME = 1e-6
"""Relative difference of weights that are the same but for how they were computed."""


@dataclass(frozen=True)
class Form:
    """How a model stores a layer."""

    name: str
    op: str
    """The operator; several where the other model packs them into one."""
    weight: str
    """``float32``, ``int4 group(128) symmetric``; of a cache how that is stored."""
    activations: str
    """``activations uint8 per-tensor asymmetric``; empty where they are float."""
    shape: tuple[int, ...]
    bytes: int
    output: str
    """The name of the value that it writes."""
    scheme: Scheme | None = None
    """`weight` as data; None of floats."""
    activation_scheme: Scheme | None = None
    """`activations` as data."""


@dataclass(frozen=True)
class LayerStory:
    """One layer of the first model and what it is in the second, or the other way round where it is new."""

    kind: str
    fate: Fate
    module_path: str
    block: str
    before: Form | None
    after: Form | None
    passes: tuple[str, ...] = ()
    """That touched it, as the second model's metadata tells."""
    method: str = ""
    """Those among them that rounded it."""
    notes: tuple[str, ...] = ()
    """Clauses: scales that moved, what is packed, what stays float."""
    weight_error: float | None = None
    """‖W' - W‖ / ‖W‖ of the weights as numbers, moved scales taken into account; None where they cannot be compared."""
    measures: Measures | None = None
    """Of the layer's output, where both models were run."""

    @property
    def text(self) -> str:
        """The story in one line."""
        before, after = (_phrase(form) for form in (self.before, self.after))
        if self.before is not None and self.after is not None:
            same_shape = self.before.shape == self.after.shape
            left = f"{before} {_sizes(self.before.shape)}".rstrip()
            right = after if same_shape else f"{after} {_sizes(self.after.shape)}"
            what = f"{left}, untouched" if self.fate == "untouched" else f"{left} → {right}"
        else:
            form = self.before or self.after
            what = f"{before or after} {_sizes(form.shape) if form else ''} {self.fate}"
        if self.method:
            what += f", {self.method}"
        return "; ".join([f"{self.module_path}: {what}", *self.notes])


def _phrase(form: Form | None) -> str:
    if form is None:
        return ""
    parts = f"{form.op} {form.weight}".strip()
    return f"{parts}, {form.activations}" if form.activations else parts


def _sizes(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape))


def tell(
    pairs: Sequence[LayerPair], scalings: Mapping[Layer, Scaling], same: Mapping[str, str], *, errors: bool = True
) -> Iterator[LayerStory]:
    """A story for each pair; `same` are constants of the second model that are equal to one of the first.

    Without `errors` no weight is read, but for those that were needed to match layers.
    """
    shared = _newly_shared(pairs)
    for pair in pairs:
        if not pair.before or not pair.after:
            yield _alone(pair)
        else:
            yield _story(pair, scalings, same, shared, errors)


def _alone(pair: LayerPair) -> LayerStory:
    layer = (pair.before or pair.after)[0]
    form = _form((layer,))
    gone = bool(pair.before)
    return LayerStory(
        layer.kind, "removed" if gone else "added", layer.module_path, layer.block,
        form if gone else None, None if gone else form, () if gone else passes_of(layer.node),
    )  # fmt: skip


def _story(
    pair: LayerPair, scalings: Mapping[Layer, Scaling], same: Mapping[str, str], shared: Mapping[Layer, Layer],
    errors: bool,
) -> LayerStory:  # fmt: skip
    first, last = pair.before[0], pair.after[0]
    stored = _stored_alike(pair, same)
    error = 0.0 if stored else (_error(pair, scalings) if errors else None)
    named = first if "." in first.module_path or first.module_path != first.name else last
    path = named.module_path
    if len(pair.after) == 1 < len(pair.before):
        path = last.module_path
    return LayerStory(
        kind=first.kind, fate=_fate(pair, scalings, error, last in shared), module_path=path, block=block_of(path),
        before=_form(pair.before), after=_form(pair.after), passes=_passes(last), method=", ".join(_method(last)),
        notes=tuple(_notes(pair, scalings, shared)), weight_error=error,
    )  # fmt: skip


def _passes(layer: Layer) -> tuple[str, ...]:
    """That touched the layer or how its input is rounded."""
    found = passes_of(layer.node)
    for node in layer.activation.nodes:
        found += passes_of(node)
    return in_order(dict.fromkeys(found))


def _method(layer: Layer) -> tuple[str, ...]:
    """The passes that rounded the weight; where it is float, those that rounded the input."""
    if layer.weight.quantized:
        return rounding_passes(layer.node)
    nodes = layer.activation.nodes
    return tuple(dict.fromkeys(name for node in nodes for name in rounding_passes(node)))


def _form(layers: Sequence[Layer]) -> Form:
    first = layers[0]
    shape = first.weight.shape
    if len(layers) > 1:
        shape = (shape[0], sum(layer.weight.shape[1] for layer in layers))
    count = f"{len(layers)} × " if len(layers) > 1 else ""
    stored = {id(value): value for layer in layers for value in layer.weight.constants}
    return Form(
        name=", ".join(layer.name for layer in layers), op=count + first.op, weight=first.weight.form,
        activations=in_words(None, first.activation.scheme), shape=shape,
        bytes=sum(value.const_value.nbytes for value in stored.values() if value.const_value is not None),
        output=", ".join(str(layer.output.name) for layer in layers),
        scheme=first.weight.stored.scheme, activation_scheme=first.activation.scheme,
    )  # fmt: skip


def _quantized(layers: Sequence[Layer]) -> bool:
    return any(layer.weight.quantized or layer.activation.scheme is not None for layer in layers)


def _fate(pair: LayerPair, scalings: Mapping[Layer, Scaling], error: float | None, shared: bool) -> Fate:
    a, b = pair.before[0], pair.after[0]
    before, after = _quantized(pair.before), _quantized(pair.after)
    if before != after:
        return "quantized" if after else "dequantized"
    if before and (a.weight.form, a.activation.scheme) != (b.weight.form, b.activation.scheme):
        return "requantized"
    if not before and a.weight.form != b.weight.form:
        return "cast"
    if len(pair.before) != len(pair.after):
        return "fused"
    if any(layer in scalings for layer in pair.before):
        return "scaled"
    if shared or a.weight.shape != b.weight.shape or (error is not None and error > SAME):
        return "changed"
    return "untouched" if a.op == b.op else "replaced"


def _newly_shared(pairs: Sequence[LayerPair]) -> dict[Layer, Layer]:
    """Layers of the second model whose constant an earlier layer has, too, where the first model's have their own."""
    owners: dict[object, LayerPair] = {}
    found = {}
    for pair in pairs:
        if not pair.after:
            continue
        earlier = owners.setdefault(pair.after[0].weight.constants[0], pair)
        if earlier is pair or not pair.before or not earlier.before:
            continue
        if earlier.before[0].weight.constants[0] is not pair.before[0].weight.constants[0]:
            found[pair.after[0]] = earlier.before[0]
    return found


def _notes(pair: LayerPair, scalings: Mapping[Layer, Scaling], shared: Mapping[Layer, Layer]) -> Iterator[str]:
    if len(pair.before) > 1:
        yield f"{', '.join(_short(layer) for layer in pair.before)} packed into one"
    if len(pair.after) > 1:
        yield f"split into {', '.join(_short(layer) for layer in pair.after)}"
    for scaling in dict.fromkeys(scalings[layer] for layer in pair.before if layer in scalings):
        move = scaling.move
        if move is not None:
            by = f" by {', '.join(move.passes)}" if move.passes else ""
            yield f"input scaled{by} into {move.into}"
        if scaling.outputs is not None:
            by = f" by {', '.join(exact_passes(pair.after[0].node))}" if exact_passes(pair.after[0].node) else ""
            yield f"its outputs take the scale of the next layer{by}"
    if pair.after[0] in shared:
        yield f"stored once with {shared[pair.after[0]].module_path}"
    yield from (note for note in pair.after[0].notes if note not in pair.before[0].notes)


def _short(layer: Layer) -> str:
    return layer.module_path.rsplit(".", 1)[-1]


def _stored_alike(pair: LayerPair, same: Mapping[str, str]) -> bool:
    """Whether both models hold the very same constants, so that nothing has to be read."""
    if len(pair.before) != 1 or len(pair.after) != 1:
        return False
    mine, theirs = ([str(value.name) for value in layer.weight.constants] for layer in (pair.before[0], pair.after[0]))
    return pair.before[0].weight.form == pair.after[0].weight.form and [same.get(name) for name in theirs] == mine


def _error(pair: LayerPair, scalings: Mapping[Layer, Scaling]) -> float | None:
    before = _stacked(pair.before, scalings)
    after = _stacked(pair.after, {})
    if before is None or after is None or before.shape != after.shape:
        return None
    return error_of(after, before)


def _stacked(layers: Sequence[Layer], scalings: Mapping[Layer, Scaling]) -> Array | None:
    parts = []
    for layer in layers:
        data = layer.weight.matrix()
        if data is None:
            return None
        parts.append(scalings.get(layer, Scaling()).applied(data))
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


# ------------------------------------------------------------------------------------------------------------- caches


def tell_caches(a: ir.Model, b: ir.Model) -> Iterator[LayerStory]:
    """Caches by the name of the graph input that holds the past, or else in order."""
    mine, theirs = list(read_caches(a)), list(read_caches(b))
    names = {view.past: view for view in theirs}
    in_order = not any(view.past in names for view in mine) and len(mine) == len(theirs)
    partners = theirs if in_order else [names.get(view.past) for view in mine]
    for view, other in zip(mine, partners, strict=True):
        if other is None:
            yield LayerStory("cache", "removed", view.module_path, block_of(view.module_path), _cache(view), None)
            continue
        fate = _fate_of_cache(view, other)
        passes = passes_of(other.node)
        yield LayerStory(
            "cache", fate, view.module_path, block_of(view.module_path), _cache(view), _cache(other), passes,
            ", ".join(rounding_passes(other.node)) if fate in ("quantized", "requantized") else "",
        )  # fmt: skip
    known = {view.past for view in mine}
    for view in [] if in_order else [view for view in theirs if view.past not in known]:
        yield LayerStory("cache", "added", view.module_path, block_of(view.module_path), None, _cache(view))


def _fate_of_cache(view: CacheView, other: CacheView) -> Fate:
    if view.form == other.form:
        return "untouched"
    before, after = (cache.scheme is not None for cache in (view, other))
    if not after:
        return "dequantized" if before else "cast"
    return "requantized" if before else "quantized"


def _cache(view: CacheView) -> Form:
    return Form(view.past, "cache", view.form, "", (), view.bytes or 0, view.present, view.scheme)
