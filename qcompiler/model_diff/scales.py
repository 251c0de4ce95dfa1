"""Scales that moved: channels of an activation divided in the node that writes it, and multiplied in who reads it.

x' = x / s with s in a norm's gain, in the columns of the linear layer before (a gated MLP's up_proj), or in a Mul of
its own. Nothing in a file says so; it shows in the constants of both models.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qcompiler.graph import constant
from qcompiler.match import find_linear_groups
from qcompiler.model_diff.arithmetic import Array, error_of
from qcompiler.model_diff.layers import Layer
from qcompiler.model_diff.pairing import LayerPair
from qcompiler.model_diff.provenance import exact_passes
from qcompiler.sites import Factor, NormGroup

NOTICEABLE = 2e-3  # half precision rounds by up to 5e-4
EXPLAINED = 0.5
"""Columns count as scaled where scaling them explains at least half of what differs; rounding alone explains little."""
EXPLAINED_OF_KNOWN = 0.95
"""The same where metadata says that one pass moved scales in both layers: small factors hide in the noise of 4 bits."""


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
    partner = {pair.before[0]: pair.after[0] for pair in layers if len(pair.before) == len(pair.after) == 1}
    found: dict[Layer, Scaling] = {}
    groups = find_linear_groups(model)
    for group in groups:
        if group.gains:
            factors = _of_gains(group, nodes)
            if factors is not None:
                _note(found, group, factors, group.module_path, exact_passes(nodes[group.gains[0][0]]), by_node)
    for group in groups:
        if isinstance(group.factor, Factor):
            _through_layer(group, group.factor, found, by_node, partner)
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
    found: dict[Layer, Scaling], group: NormGroup, factors: Array, into: str, passes: tuple[str, ...],
    by_node: Mapping[ir.Node, Layer],
) -> None:  # fmt: skip
    readers = [by_node[linear.node] for linear in group.linears if linear.node in by_node]
    if not readers:
        return
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
    group: NormGroup, factor: Factor, found: dict[Layer, Scaling], by_node: Mapping[ir.Node, Layer],
    partner: Mapping[Layer, Layer],
) -> None:  # fmt: skip
    """Factors in the outputs of the layer before, which a least-squares fit of each output shows."""
    writer = by_node.get(factor.linear.node)
    other = partner.get(writer) if writer is not None else None
    if writer is None or other is None:
        return
    before, after = writer.weight.matrix(), other.weight.matrix()
    if before is None or after is None or before.shape != after.shape:
        return
    old = found.get(writer, Scaling())
    expected = old.applied(before)
    energy = np.einsum("nk,nk->n", expected, expected)
    outputs = np.where(energy == 0, 1.0, np.einsum("nk,nk->n", after, expected) / np.where(energy == 0, 1.0, energy))
    plain, fitted = error_of(after, expected), error_of(after, expected * outputs[:, None])
    readers = [partner[by_node[linear.node]] for linear in group.linears if by_node.get(linear.node) in partner]
    by_one = all(set(exact_passes(other.node)) & set(exact_passes(reader.node)) for reader in readers)
    share = EXPLAINED_OF_KNOWN if readers and by_one else EXPLAINED
    if np.any(outputs <= 0) or plain < NOTICEABLE or fitted > share * plain:
        return
    found[writer] = Scaling(old.inputs, outputs.astype(np.float32), old.move)
    _note(found, group, 1 / outputs[factor.channels], writer.module_path, exact_passes(other.node), by_node)


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
