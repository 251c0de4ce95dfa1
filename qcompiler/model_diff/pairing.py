"""Which layer of one model is which of another: by name, by provenance, by structure.

Layers are matched by name and by module path (which quantizers and exporters keep in metadata), then
by the signs of their weights, which scaling and rounding leave alone, then by order. Where names carry no path, the
signs of the weights must agree, too: exporters number their nodes, so that equal names can mean different layers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import TypeVar

import numpy as np

from qcompiler.model_diff.layers import Layer, plain_name
from qcompiler.sites.stored.layout import Array

T = TypeVar("T")

SAMPLE = 64
"""Rows and columns of a weight whose signs are compared, evenly spread."""
ALIKE = 0.5
"""Mean product of the signs from which two weights are taken for the same one: chance gives 0, 2-bit codes some 0.7."""
UNLIKE = 0.25


@dataclass(frozen=True, eq=False)
class LayerPair:
    """Layers that do the same: one each, or several that one packed layer stands for; none where it is new or gone."""

    before: tuple[Layer, ...]
    after: tuple[Layer, ...]


def pair_layers(before: Sequence[Layer], after: Sequence[Layer]) -> list[LayerPair]:
    """In the order of the first model; what only the second one has comes at the end."""
    matching = _Matching(before, after)
    matching.by(lambda layer: (layer.name, layer.signature), check=True)
    matching.by(lambda layer: (_path(layer), layer.signature) if _has_path(layer) else None)
    matching.by(lambda layer: (plain_name(str(layer.output.name)), layer.signature), check=True)
    matching.by_weights()
    packed = list(matching.packed())
    matching.by(lambda layer: (_path(layer), layer.kind) if _has_path(layer) else None)
    matching.by(lambda layer: (layer.name, layer.signature))
    matching.by_order()
    return matching.result(packed)


class _Matching:
    def __init__(self, before: Sequence[Layer], after: Sequence[Layer]) -> None:
        self.before, self.after = list(before), list(after)
        self.pairs: dict[Layer, Layer] = {}
        self._gone: set[Layer] = set()  # packed with others
        self._signs: dict[Layer, Array | None] = {}

    def _open(self) -> tuple[list[Layer], list[Layer]]:
        taken = set(self.pairs.values()) | self._gone
        return (
            [layer for layer in self.before if layer not in self.pairs and layer not in self._gone],
            [layer for layer in self.after if layer not in taken],
        )

    def by(self, key: Callable[[Layer], Hashable], *, check: bool = False) -> None:
        """Pair what has a key of its own in both; with `check`, only what does not contradict itself."""
        left, right = (unique(layers, key) for layers in self._open())
        for name, layer in left.items():
            other = right.get(name)
            if other is not None and (not check or self._plausible(layer, other)):
                self.pairs[layer] = other

    def _plausible(self, a: Layer, b: Layer) -> bool:
        if _has_path(a) and _has_path(b):
            return _path(a) == _path(b)
        likeness = self._likeness([a], [b])
        return likeness is None or bool(likeness[0, 0] > UNLIKE)

    def by_weights(self) -> None:
        """Among layers of the same shape, the best likeness first."""
        left, right = self._open()
        groups: dict[object, tuple[list[Layer], list[Layer]]] = defaultdict(lambda: ([], []))
        for side, layers in enumerate((left, right)):
            for layer in layers:
                groups[layer.signature][side].append(layer)
        for first, second in groups.values():
            likeness = self._likeness(first, second) if first and second else None
            if likeness is None:
                continue
            for flat in np.argsort(-likeness, axis=None, kind="stable"):
                row, column = divmod(int(flat), likeness.shape[1])
                if likeness[row, column] < ALIKE:
                    break
                if first[row] not in self.pairs and second[column] not in self.pairs.values():
                    self.pairs[first[row]] = second[column]

    def _likeness(self, first: Sequence[Layer], second: Sequence[Layer]) -> Array | None:
        """[first, second]: mean product of signs; 0 where a weight cannot be read. None where none can."""
        left, right = ([self._sign(layer) for layer in layers] for layers in (first, second))
        size = next((len(signs) for signs in (*left, *right) if signs is not None), 0)
        if not size:
            return None
        stacks = [
            np.stack([np.zeros(size) if signs is None or len(signs) != size else signs for signs in side])
            for side in (left, right)
        ]
        product: Array = stacks[0] @ stacks[1].T / size
        return product

    def _sign(self, layer: Layer) -> Array | None:
        if layer not in self._signs:
            data = layer.weight.matrix()
            self._signs[layer] = None if data is None else np.sign(thinned(data)).astype(np.float32).reshape(-1)
        return self._signs[layer]

    def packed(self) -> Iterable[LayerPair]:
        """Neighbours that read the same value, where the other model has one layer of all their outputs."""
        for mine, swapped in ((0, False), (1, True)):
            sides = self._open()
            parts, wholes = sides[mine], list(sides[1 - mine])
            for group in _by_input(parts):
                whole = next((layer for layer in wholes if _packs(layer, group)), None)
                if whole is None:
                    continue
                wholes.remove(whole)
                self._gone.update((*group, whole))
                yield LayerPair((whole,), tuple(group)) if swapped else LayerPair(tuple(group), (whole,))

    def by_order(self) -> None:
        """What is left, where both models have the same run of shapes."""
        left, right = self._open()
        matcher = SequenceMatcher(
            None, [layer.signature for layer in left], [layer.signature for layer in right], autojunk=False
        )
        for start, other, size in matcher.get_matching_blocks():
            for offset in range(size):
                a, b = left[start + offset], right[other + offset]
                if not (_has_path(a) and _has_path(b)) or self._plausible(a, b):
                    self.pairs[a] = b

    def result(self, packed: Sequence[LayerPair]) -> list[LayerPair]:
        first = {pair.before[0]: pair for pair in packed}
        members = {layer for pair in packed for layer in pair.before}
        found = []
        for layer in self.before:
            if layer in first:
                found.append(first[layer])
            elif layer not in members:
                other = self.pairs.get(layer)
                found.append(LayerPair((layer,), () if other is None else (other,)))
        taken = {layer for pair in found for layer in pair.after}
        return found + [LayerPair((), (layer,)) for layer in self.after if layer not in taken]


def _by_input(layers: Sequence[Layer]) -> list[list[Layer]]:
    groups: dict[object, list[Layer]] = defaultdict(list)
    for layer in layers:
        if layer.kind == "linear" and layer.input is not None:
            groups[layer.input].append(layer)
    return [group for group in groups.values() if len(group) > 1]


def _packs(whole: Layer, parts: Sequence[Layer]) -> bool:
    if whole.kind != "linear" or len(whole.weight.shape) != 2:
        return False
    inputs, outputs = whole.weight.shape
    return all(part.weight.shape[0] == inputs for part in parts) and outputs == sum(p.weight.shape[1] for p in parts)


def _has_path(layer: Layer) -> bool:
    return "." in layer.module_path or layer.module_path != layer.name


def _path(layer: Layer) -> str:
    return layer.module_path.removeprefix("model.")


def thinned(data: Array) -> Array:
    """At most SAMPLE rows and columns, evenly spread."""
    rows, columns = (np.linspace(0, size - 1, min(size, SAMPLE)).astype(np.int64) for size in data.shape)
    part: Array = data[np.ix_(rows, columns)]
    return part


def unique(items: Iterable[T], key: Callable[[T], Hashable]) -> dict[Hashable, T]:
    """Items by key, without those whose key is empty or not their own."""
    groups: dict[Hashable, list[T]] = defaultdict(list)
    for item in items:
        groups[key(item)].append(item)
    return {name: group[0] for name, group in groups.items() if name and len(group) == 1}
