"""Scales that moved: channels of an activation divided in the node that writes it, and multiplied in who reads it.

x' = x / s with s in a norm's gain, in the columns of the linear layer before (a gated MLP's up_proj), or in a Mul of
its own. Nothing in a file says so; it shows in the constants of both models.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qcompiler.graph.edit import constant
from qcompiler.model_diff.arithmetic import error_of
from qcompiler.model_diff.layers import Layer
from qcompiler.model_diff.pairing import LayerPair
from qcompiler.model_diff.provenance import exact_passes
from qcompiler.sites.analyses import linear_groups_of
from qcompiler.sites.kinds import Factor, NormGroup
from qcompiler.sites.stored.layout import Array

NOTICEABLE = 2e-3  # half precision rounds by up to 5e-4
AGREE = 0.7
"""Correlation of what an activation was divided by with what its readers' columns were multiplied by, from which scales
count as moved between them: rounding alone gives up to 0.3, however coarse, and small scales beside the noise of 4 bits
give more than 0.9."""
MOSTLY = 0.9
"""Channels of which that must be known."""


@dataclass(frozen=True)
class MovedScale:
    """The input of some layers is divided by `low` … `high`, a factor for each channel."""

    into: str
    """The module path of what is divided: a norm, the layer before, or ``a Mul`` before the layers."""
    passes: tuple[str, ...]
    """That did it, as the second model's metadata tells."""
    readers: tuple[str, ...]
    """The module paths of the layers whose weights take the factors."""
    channels: int
    low: float
    high: float


@dataclass(frozen=True, eq=False)
class Scaling:
    """What moved scales do to the weight of a layer [outputs, inputs]."""

    inputs: Array | None = None
    outputs: Array | None = None
    move: MovedScale | None = None

    def applied(self, weight: Array) -> Array:
        scaled = weight
        if self.inputs is not None:
            scaled = scaled * self.inputs
        return scaled if self.outputs is None else scaled * self.outputs[:, None]


def find_scalings(
    model: ir.Model, layers: Sequence[LayerPair], nodes: Mapping[ir.Node, ir.Node]
) -> dict[Layer, Scaling]:  # fmt: skip
    """By layer of the first model; layers whose input and output nothing scales are left out."""
    by_node = {layer.node: layer for pair in layers for layer in pair.before}
    pair_of = {layer: pair for pair in layers for layer in pair.before if pair.after}
    found: dict[Layer, Scaling] = {}
    groups = linear_groups_of(model)
    for group in groups:
        readers = [by_node[linear.node] for linear in group.linears if linear.node in by_node]
        factors = _of_gains(group, nodes) if group.gains and readers else None
        if factors is None:
            continue
        passes, columns = exact_passes(nodes[group.gains[0][0]]), _columns(readers, pair_of)
        # Another gain alone is another function, unless who reads it makes up for it.
        if _agree(factors, columns) if columns is not None else passes:
            _note(found, readers, factors, group.module_path, passes)
    for group in groups:
        readers = [by_node[linear.node] for linear in group.linears if linear.node in by_node]
        if isinstance(group.factor, Factor) and group.factor.linear.node in by_node and readers:
            _through_layer(by_node[group.factor.linear.node], group.factor, readers, found, pair_of)
    partner = {pair.before[0]: pair.after[0] for pair in layers if len(pair.before) == len(pair.after) == 1}
    for layer, other in partner.items():
        factors = None if layer in found and found[layer].inputs is not None else _inserted(layer, other)
        if factors is not None:
            move = _move(factors, "a Mul", exact_passes(other.node), [layer])
            old = found.get(layer, Scaling())
            found[layer] = Scaling(factors, old.outputs, move)
    return found


def moves(scalings: Mapping[Layer, Scaling]) -> Iterator[MovedScale]:
    """Each once."""
    yield from dict.fromkeys(scaling.move for scaling in scalings.values() if scaling.move is not None)


def _note(
    found: dict[Layer, Scaling], readers: Sequence[Layer], factors: Array, into: str, passes: tuple[str, ...]
) -> None:
    move = _move(factors, into, passes, readers)
    for layer in readers:
        found[layer] = Scaling(factors, found.get(layer, Scaling()).outputs, move)


def _move(factors: Array, into: str, passes: tuple[str, ...], readers: Sequence[Layer]) -> MovedScale:
    changed = int((np.abs(factors - 1) > NOTICEABLE).sum())
    paths = tuple(layer.module_path for layer in readers)
    return MovedScale(into, passes, paths, changed, float(factors.min()), float(factors.max()))


def _of_gains(group: NormGroup, nodes: Mapping[ir.Node, ir.Node]) -> Array | None:
    """s = gain / gain' of the norm that writes the value; None where it did not change."""
    node, index = group.gains[0]
    other = nodes.get(node)
    before = _vector(node.inputs[index])
    if other is None or before is None:
        return None
    places = [index, *(place for place in range(len(other.inputs)) if place != index)]
    vectors = (_vector(other.inputs[place]) for place in places if place < len(other.inputs))
    after = next((vector for vector in vectors if vector is not None and vector.size == before.size), None)
    return None if after is None else _ratio(before, after)


def _ratio(before: Array, after: Array) -> Array | None:
    with np.errstate(divide="ignore", invalid="ignore"):
        factors = np.where((after == 0) | (before == 0), 1.0, before / after).astype(np.float32)
    return factors if np.any(np.abs(factors - 1) > NOTICEABLE) else None


def _vector(value: ir.Value | None) -> Array | None:
    tensor = constant(value)
    if tensor is None or not tensor.dtype.is_floating_point() or len(tensor.shape) == 0:
        return None
    data = tensor.numpy()
    return data.reshape(-1).astype(np.float64) if data.size == data.shape[-1] else None


def _through_layer(
    writer: Layer, factor: Factor, readers: Sequence[Layer], found: dict[Layer, Scaling],
    pair_of: Mapping[Layer, LayerPair],
) -> None:  # fmt: skip
    """Factors in the outputs of the layer before, where the columns of its readers take the opposite ones."""
    before, after = writer.weight.matrix(), _after(writer, pair_of)
    if before is None or after is None or before.shape != after.shape:
        return
    old = found.get(writer, Scaling())
    expected = old.applied(before)
    if error_of(after, expected) < NOTICEABLE:
        return
    outputs, columns = _fit(after, expected, 1), _columns(readers, pair_of)
    outputs = np.where(outputs > 0, outputs, 1.0)  # coarse rounding may turn a faint channel
    factors = 1 / outputs[factor.channels]
    if columns is None or not _agree(factors, columns):
        return
    passes = exact_passes(pair_of[writer].after[0].node)
    found[writer] = Scaling(old.inputs, outputs.astype(np.float32), old.move)
    _note(found, readers, factors, writer.module_path, passes)


def _after(layer: Layer, pair_of: Mapping[Layer, LayerPair]) -> Array | None:
    """The weight of a layer in the second model: some rows of it where that packs several."""
    pair = pair_of.get(layer)
    data = _stacked(pair.after) if pair is not None else None
    if pair is None or data is None:
        return None
    start = sum(other.weight.shape[1] for other in pair.before[: pair.before.index(layer)])
    return data[start : start + layer.weight.shape[1]] if len(pair.before) > 1 else data


def _stacked(layers: Sequence[Layer]) -> Array | None:
    parts = [layer.weight.matrix() for layer in layers]
    known = [part for part in parts if part is not None]
    if len(known) < len(parts):
        return None
    return known[0] if len(known) == 1 else np.concatenate(known)


def _fit(after: Array, before: Array, axis: int) -> Array:
    """The factor by which each slice of a weight differs, by least squares; 1 for slices of zeros."""
    energy = np.square(before, dtype=np.float64).sum(axis)
    product = np.multiply(after, before, dtype=np.float64).sum(axis)
    factors: Array = np.divide(product, energy, out=np.ones_like(energy), where=energy > 0)
    return factors


def _columns(readers: Sequence[Layer], pair_of: Mapping[Layer, LayerPair]) -> Array | None:
    """What the columns of layers that read one value were multiplied by; None where it cannot be told."""
    after = [_after(layer, pair_of) for layer in readers]
    before = _stacked(readers)
    known = [data for data in after if data is not None]
    if before is None or len(known) < len(after):
        return None
    whole = np.concatenate(known)
    return _fit(whole, before, 0) if whole.shape == before.shape else None


def _agree(factors: Array, columns: Array) -> bool:
    """Whether columns were multiplied by these factors, channel by channel or as a whole, but for rounding."""
    if factors.shape != columns.shape:
        return False
    known = (factors > 0) & (columns > 0)
    if known.mean() < MOSTLY:
        return False
    left, right = np.log(factors[known]), np.log(columns[known])
    return max(_cosine(left, right), _cosine(left - left.mean(), right - right.mean())) > AGREE


def _cosine(left: Array, right: Array) -> float:
    size = float(np.linalg.norm(left) * np.linalg.norm(right))
    return float(left @ right) / size if size > 0 else 0.0


def _inserted(layer: Layer, other: Layer) -> Array | None:
    """s where the second model multiplies the layer's input by 1 / s, and the first one does not."""
    first, second = (value.producer() if value is not None else None for value in (layer.input, other.input))
    features = layer.weight.shape[0]
    if layer.kind != "linear" or second is None or second.domain or second.op_type != "Mul":
        return None
    factors = next((v for v in map(_vector, second.inputs) if v is not None and v.size == features), None)
    if factors is None or (first is not None and any(_vector(value) is not None for value in first.inputs)):
        return None
    return _ratio(np.ones_like(factors), factors)
