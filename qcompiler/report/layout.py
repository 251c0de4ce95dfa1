"""Places the units of a drawing: in layers from top to bottom, the order within each chosen so that few edges cross.

The method is Sugiyama, Tagawa and Toda 1981: layers by the longest way, dummies where an edge passes a layer, order by
barycentres; then each unit moves towards the middle of its neighbours as far as the others of its layer let it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from qcompiler.report.pictures import DrawnGraph, DrawnUnit

WIDTH, HEIGHT = 132.0, 48.0  # of a unit
GAP, LAYER = 14.0, 74.0  # between neighbours, and from layer to layer
CHARACTER = 6.5  # at most, of a text in the smallest size
PASSING = 10.0  # the width that an edge takes in a layer it passes
SWEEPS = 8


@dataclass(frozen=True)
class GraphLayout:
    """Centres of the units, and the points that each edge goes through."""

    centres: dict[int, tuple[float, float]]
    edges: dict[tuple[int, int], list[tuple[float, float]]]
    width: float
    height: float


def layout(graph: DrawnGraph) -> GraphLayout:
    """The graph must have no circles, which the units of a block never have."""
    rank = _ranks(graph)
    layers: dict[int, list[int]] = defaultdict(list)
    for unit, layer in rank.items():
        layers[layer].append(unit)
    chains = _with_dummies(graph, rank, layers)
    above, below = defaultdict(list), defaultdict(list)
    for chain in chains.values():
        for a, b in pairwise(chain):
            below[a].append(b)
            above[b].append(a)
    rows = [layers[layer] for layer in sorted(layers)]
    for sweep in range(SWEEPS):
        down = sweep % 2 == 0
        for row in rows if down else reversed(rows):
            _order(row, above if down else below, rows)
    widths = [width_of(unit) for unit in graph.units]
    x = _coordinates(rows, above, below, widths)
    left = min((x[item] - _width(item, widths) / 2 for item in x), default=0.0)
    right = max((x[item] + _width(item, widths) / 2 for item in x), default=0.0)
    y = {item: LAYER * place + HEIGHT / 2 for place, row in enumerate(rows) for item in row}
    return GraphLayout(
        centres={unit: (x[unit] - left, y[unit]) for unit in range(len(graph.units))},
        edges={edge: [(x[item] - left, y[item]) for item in chain] for edge, chain in chains.items()},
        width=right - left,
        height=LAYER * max(len(rows) - 1, 0) + HEIGHT,
    )


def _ranks(graph: DrawnGraph) -> dict[int, int]:
    """The layer of each unit: below all that it reads. What only gives comes just above its first reader."""
    readers, reads = defaultdict(list), defaultdict(list)
    for a, b in graph.edges:
        readers[a].append(b)
        reads[b].append(a)
    rank: dict[int, int] = {}

    def of(unit: int) -> int:
        if unit not in rank:
            rank[unit] = max((of(source) + 1 for source in reads[unit]), default=0)
        return rank[unit]

    for unit in range(len(graph.units)):
        of(unit)
    for unit in range(len(graph.units)):
        if not reads[unit] and readers[unit]:
            rank[unit] = min(rank[reader] for reader in readers[unit]) - 1
    return rank


def _with_dummies(
    graph: DrawnGraph, rank: dict[int, int], layers: dict[int, list[int]]
) -> dict[tuple[int, int], list[int]]:
    """Every edge as a chain of items, one a layer; dummies have numbers beyond those of the units."""
    count, chains = len(graph.units), {}
    for a, b in graph.edges:
        chain = [a]
        for layer in range(rank[a] + 1, rank[b]):
            layers[layer].append(count)
            chain.append(count)
            count += 1
        chains[a, b] = [*chain, b]
    return chains


def _order(row: list[int], neighbours: dict[int, list[int]], rows: list[list[int]]) -> None:
    place = {item: index / max(len(other), 1) for other in rows for index, item in enumerate(other)}

    def barycentre(item: int) -> float:
        known = neighbours[item]
        return sum(place[other] for other in known) / len(known) if known else place[item]

    row.sort(key=barycentre)


def _coordinates(
    rows: list[list[int]], above: dict[int, list[int]], below: dict[int, list[int]], widths: Sequence[float]
) -> dict[int, float]:
    x: dict[int, float] = {}
    for row in rows:
        total = sum(_width(item, widths) + GAP for item in row)
        place = -total / 2
        for item in row:
            x[item] = place + (_width(item, widths) + GAP) / 2
            place += _width(item, widths) + GAP
    for sweep in range(SWEEPS):
        neighbours = above if sweep % 2 == 0 else below
        for row in rows if sweep % 2 == 0 else reversed(rows):
            around = {item: [x[other] for other in neighbours[item]] or [x[item]] for item in row}
            _move(row, {item: sum(places) / len(places) for item, places in around.items()}, x, widths)
    return x


def _move(row: list[int], wanted: dict[int, float], x: dict[int, float], widths: Sequence[float]) -> None:
    """Each item where it is wanted, pushed apart where two would overlap; the row as a whole stays in its middle."""
    placed: list[float] = []
    for index, item in enumerate(row):
        least = placed[-1] + _apart(row[index - 1], item, widths) if placed else wanted[item]
        placed.append(max(wanted[item], least))
    shift = sum(wanted[item] - at for item, at in zip(row, placed, strict=True)) / max(len(row), 1)
    for item, at in zip(row, placed, strict=True):
        x[item] = at + shift


def _apart(a: int, b: int, widths: Sequence[float]) -> float:
    return (_width(a, widths) + _width(b, widths)) / 2 + GAP


def width_of(unit: DrawnUnit) -> float:
    """What lies outside has one line of text, and so may be narrower than a unit."""
    return min(WIDTH, 20 + CHARACTER * len(unit.label)) if unit.fate == "outside" else WIDTH


def _width(item: int, widths: Sequence[float]) -> float:
    return widths[item] if item < len(widths) else PASSING
