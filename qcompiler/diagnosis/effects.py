"""What the error of one layer does to the model's outputs: the float model runs with that error added to the layer.

A run needs no more of the model than what follows the layer. Layers are therefore taken in groups, front to back, and
the runs of a group begin at a narrow place before it, with values that the float model had there. That nearly halves
the work, and a group is large enough to pay for opening a session.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from qcompiler.calibration.samples import Sample
from qcompiler.diagnosis.regions import Region
from qcompiler.graph.edit import Names, insert_after
from qcompiler.progress import Progress
from qcompiler.sessions import segments
from qcompiler.sessions.session import Kept

DELTA = "delta:"
GROUPS = 8
Measure = Callable[[tuple[str, ...], str, int, np.ndarray], None]
"""Called with the names of the sites that had their error, and with an output: its name, the sample, the array."""


class Deltas:
    """The errors of the first samples."""

    def __init__(self, kept: Kept, samples: int) -> None:
        self._kept, self.samples = kept, samples

    def put(self, site: str, sample: int, error: np.ndarray) -> None:
        if sample < self.samples:
            self._kept.put(DELTA + site, sample, error)

    def get(self, site: str, sample: int) -> np.ndarray:
        return self._kept.get(DELTA + site, sample)


def inject(
    reference: ir.Model, regions: Sequence[Region], together: Sequence[Region], main: Sequence[str],
    samples: Sequence[Sample], kept: Kept, deltas: Deltas, measure: Measure, memory_limit: int | None,
    progress: Progress | None,
) -> None:  # fmt: skip
    """Run the float model with the error of each region alone, and once with that of all `together`."""
    cuts = _cuts(reference.graph, regions, main)
    crossing = {name for cut in cuts for name in cut.inputs}
    given = {str(value.name) for value in reference.graph.inputs}
    segments.run(reference, samples, crossing - given, kept.put, memory_limit=memory_limit)
    for sample, feed in enumerate(samples):
        for name in crossing & given & feed.keys():
            kept.put(name, sample, feed[name])
    jobs: list[tuple[_Cut, list[tuple[str, ...]]]] = [(cut, [(region.name,) for region in cut.regions]) for cut in cuts]
    if len(together) > 1:
        whole = next(cut for cut in cuts if not set(cut.regions).isdisjoint(together))
        jobs.append((_Cut(whole.inputs, together), [tuple(region.name for region in together)]))
    total = sum(len(errors) for _, errors in jobs) * len(samples)
    done = 0
    for cut, errors in jobs:
        part, inputs = _part(reference, cut, main, kept)
        feeds = _Feeds(cut.inputs, [(names, sample) for names in errors for sample in range(len(samples))], inputs,
                       kept, deltas)  # fmt: skip

        def take(name: str, run: int, array: np.ndarray, runs: Sequence[_Run] = feeds.runs) -> None:
            names, sample = runs[run]
            measure(names, name, sample, array)

        def report(part_done: int, part_total: int | None, before: int = done, runs: int = len(feeds.runs)) -> None:
            if progress is not None and part_total:
                progress(before + part_done * runs // part_total, total)

        segments.run(part, feeds, main, take, memory_limit=memory_limit, progress=report)
        done += len(feeds.runs)


_Run = tuple[tuple[str, ...], int]


@dataclass(frozen=True, eq=False)
class _Cut:
    """A place in the float model, and the regions whose runs begin there."""

    inputs: tuple[str, ...]
    """The values that cross it, graph inputs included."""
    regions: Sequence[Region] = field(default_factory=list)


def _cuts(graph: ir.Graph, regions: Sequence[Region], main: Sequence[str]) -> list[_Cut]:
    steps = segments.Schedule(graph, segments.wanted_values(graph, main))
    # A layer that no output depends on has no position, and no effect.
    reached = [region for region in regions if region.site.output in steps.position]
    reached.sort(key=lambda region: steps.position[region.site.output])
    widths, end = steps.widths(), len(steps.nodes)
    size = -(-len(reached) // GROUPS) if reached else 1
    found = []
    for start in range(0, len(reached), size):
        first = steps.position[reached[start].site.output]
        least = steps.position[reached[start - 1].site.output] + 1 if start else 0
        place = min(range(least, first + 1), key=lambda at: (widths[at], -at)) if start else 0
        if np.isinf(widths[place]):
            place = 0
        found.append(_Cut(steps.segment(place, end, end).inputs, reached[start : start + size]))
    return found


def _part(
    reference: ir.Model, cut: _Cut, main: Sequence[str], kept: Kept
) -> tuple[ir.Model, dict[str, str]]:  # fmt: skip
    """The model behind a cut, with an input for each region that is added to its output; these inputs by region."""
    graph = ir.convenience.extract(reference.graph, list(cut.inputs), list(main))
    graph.opset_imports.update(reference.graph.opset_imports)
    given = {str(value.name) for value in reference.graph.inputs}
    for value in graph.inputs:
        if value.name not in given:
            dtype, rank = kept.types[str(value.name)]
            value.type, value.shape = ir.TensorType(dtype), ir.Shape([None] * rank)
    names = Names(graph)
    values = {str(value.name): value for node in graph for value in node.outputs}
    inputs = {region.name: _add_delta(graph, values[str(region.site.output.name)], names) for region in cut.regions}
    return ir.Model(graph, ir_version=reference.ir_version, functions=list(reference.functions.values())), inputs


def _add_delta(graph: ir.Graph, value: ir.Value, names: Names) -> str:
    """Let the readers of a value read the sum of it and a new input, whose name is returned."""
    producer = value.producer()
    assert producer is not None
    name = str(value.name)
    # No shape: zero is fed as a scalar, and an error in the shape of the value.
    delta = ir.Value(name=names.fresh(DELTA + name), type=ir.TensorType(value.dtype or ir.DataType.FLOAT))
    total = ir.Value(name=names.fresh(f"{name}.with_error"), type=value.type, shape=value.shape)
    add = ir.Node("", "Add", [value, delta], outputs=[total], name=total.name)
    value.replace_all_uses_with(total, replace_graph_outputs=True)
    add.replace_input_with(0, value)
    insert_after(producer, [add])
    if total.is_graph_output():
        value.name, total.name = names.fresh(f"{name}.without_error"), name
    graph.inputs.append(delta)
    return str(delta.name)


class _Feeds:
    """What the part behind a cut reads: errors for some regions, zero for the others."""

    def __init__(
        self, names: Sequence[str], runs: Sequence[_Run], inputs: Mapping[str, str], kept: Kept, deltas: Deltas
    ) -> None:
        self.runs, self._names, self._inputs, self._kept, self._deltas = runs, names, inputs, kept, deltas
        self.count: int | None = len(runs)

    def __iter__(self) -> Iterator[Sample]:
        for sites, sample in self.runs:
            errors = {
                name: self._deltas.get(site, sample) if site in sites
                else np.zeros((), self._deltas.get(site, sample).dtype)
                for site, name in self._inputs.items()
            }  # fmt: skip
            yield {name: self._kept.get(name, sample) for name in self._names} | errors
