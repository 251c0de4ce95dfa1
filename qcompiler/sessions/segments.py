"""Runs a model piece by piece, so that a model larger than memory can be measured.

The graph is cut where few values are alive, usually the residual stream between two blocks, into segments whose weights
fit a budget. All samples go through one segment before the next is opened; the values that cross a cut are kept in
between, and on disk where they are many. Weights stay in their files: onnxruntime maps them, and lets them go with the
session.

Graph optimizations are off, so that every value means what the graph says and does not depend on where it was cut.
(Half precision excepted: onnxruntime computes it in float on a CPU and rounds only what leaves a chain of operators.)
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qcompiler.errors import ModelError
from qcompiler.graph.operators import has
from qcompiler.progress import Progress
from qcompiler.sessions.garbage import Garbage
from qcompiler.sessions.session import Kept, Session

Consume = Callable[[str, int, np.ndarray], None]
"""Called with the name of a value, the index of the sample, and the array."""

WEIGHT_SHARE = 0.25
"""How much of the memory limit the weights of one segment may take; more of it goes to the process itself and taps."""
KEPT_SHARE = 0.25
"""How much of the memory limit the values between segments may take before they go to disk."""


@dataclass(frozen=True)
class Segment:
    """A piece of the graph: it reads graph inputs and values of earlier segments, and yields `outputs`."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    kept: tuple[str, ...]
    """The outputs that later segments read."""
    weight_bytes: int


def run(
    model: ir.Model,
    samples: Iterable[Mapping[str, np.ndarray]],
    wanted: Collection[str],
    consume: Consume,
    *,
    first: int = 0,
    memory_limit: int | None = None,
    budget: int | None = None,
    progress: Progress | None = None,
) -> None:
    """Run every sample and hand each wanted value to `consume`: all samples of a value in order, values in graph order.

    `wanted` are names of graph inputs, outputs, or values computed in the top graph; samples are numbered from `first`,
    for who has run others before. `memory_limit`, in bytes, is for the process; without one the model runs in one
    piece, or in pieces of `budget` bytes of weights. `samples` are read once. The model is not changed.

    Raises ModelError where a value does not exist or onnxruntime cannot run a node, DataError where a sample does not
    go through the model.
    """
    budget = budget if memory_limit is None else int(memory_limit * WEIGHT_SHARE)
    segments = plan(model.graph, wanted, budget)
    inputs = {str(value.name) for value in model.graph.inputs}
    count = samples.count if hasattr(samples, "count") and isinstance(samples.count, int | None) else None
    done = 0
    garbage = Garbage()
    with Kept(None if memory_limit is None else int(memory_limit * KEPT_SHARE)) as kept:
        feeds: Iterable[Mapping[str, np.ndarray]] = _first(samples, first, inputs, segments, wanted, consume, kept)
        if not segments:
            for _ in feeds:
                done += 1
                _report(progress, done, count)
        for number, segment in enumerate(segments):
            session = Session.of_part(model, segment.inputs, segment.outputs, kept, limited=memory_limit is not None)
            ran, used = 0, segment.weight_bytes
            for index, feed in enumerate(feeds, first):
                for name, array in session.run(feed, index):
                    used += array.nbytes
                    if name in wanted:
                        consume(name, index, array)
                    if name in segment.kept:
                        kept.put(name, index, array)
                ran, done = ran + 1, done + 1
                _report(progress, done, None if count is None else count * len(segments))
            count = ran
            del session
            garbage.left(used)
            later = {name for following in segments[number + 1 :] for name in following.inputs}
            kept.drop_all_but(later)
            feeds = (
                _between(segments[number + 1].inputs, range(first, first + ran), kept)
                if number + 1 < len(segments)
                else ()
            )


def _first(
    samples: Iterable[Mapping[str, np.ndarray]], first: int, inputs: set[str], segments: Sequence[Segment],
    wanted: Collection[str], consume: Consume, kept: Kept,
) -> Iterator[Mapping[str, np.ndarray]]:  # fmt: skip
    """The samples as the first segment reads them. What later segments read is kept: samples may not repeat."""
    later = inputs & {name for segment in segments[1:] for name in segment.inputs}
    for index, sample in enumerate(samples, first):
        for name in sorted(inputs & set(wanted)):
            if name in sample:
                consume(name, index, sample[name])
        for name in later:
            kept.put(name, index, sample[name])
        yield {name: sample[name] for name in segments[0].inputs if name in sample} if segments else {}


def _between(names: Sequence[str], indices: Iterable[int], kept: Kept) -> Iterator[Mapping[str, np.ndarray]]:
    for index in indices:
        yield {name: kept.get(name, index) for name in names}


def _report(progress: Progress | None, done: int, total: int | None) -> None:
    if progress is not None:
        progress(done, total)


def plan(graph: ir.Graph, wanted: Collection[str], budget: int | None) -> list[Segment]:
    """Cut the part of a graph that the wanted values need; `budget` bounds the weight bytes of a segment.

    A single node with more weights than the budget makes a segment of its own.
    """
    values = wanted_values(graph, wanted)
    steps = Schedule(graph, values)
    if not steps.nodes:
        return []
    ends = [len(steps.nodes)] if budget is None else steps.cut(budget)
    return [steps.segment(start, end, ends[-1]) for start, end in zip([0, *ends], ends, strict=False)]


def wanted_values(graph: ir.Graph, wanted: Collection[str]) -> set[ir.Value]:
    known = {str(value.name): value for value in graph.inputs}
    known.update((str(value.name), value) for node in graph for value in node.outputs)
    for name in wanted:
        if name in graph.initializers and name not in known:
            raise ModelError(f"{name!r} is a constant, and only values that are computed can be measured")
        if name not in known:
            raise ModelError(f"the model has no value {name!r}")
    return {known[name] for name in wanted}


class Schedule:
    """The nodes that wanted values need, in order, with what each reads.

    Values computed from constants alone (Constant, the transpose or the dequantization of a weight) are no steps: each
    segment computes those it reads, so they never cross a cut.
    """

    def __init__(self, graph: ir.Graph, wanted: set[ir.Value]) -> None:
        self._wanted = wanted
        self._inputs = {value for value in graph.inputs if value.name not in graph.initializers}
        self._constants: dict[ir.Value, frozenset[ir.Value]] = {}  # of a static value: the initializers it comes from
        self._reads: dict[ir.Node, list[ir.Value]] = {}
        needed = set(wanted)
        nodes = []
        for node in reversed(graph):
            if not needed.isdisjoint(node.outputs):
                self._reads[node] = _reads(node)
                needed.update(self._reads[node])
                nodes.append(node)
        self.nodes = [node for node in reversed(nodes) if not self._is_static(node)]
        self.position = {value: at for at, node in enumerate(self.nodes) for value in node.outputs}
        self.last_use = {
            value: at for at, node in enumerate(self.nodes) for value in self._reads[node] if value in self.position
        }

    def _is_static(self, node: ir.Node) -> bool:
        """Note the constants behind a node that depends on no input; called in graph order."""
        reads = self._reads[node]
        repeatable = not has(node, "random") and not any(
            attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
            for attribute in node.attributes.values()
        )
        if not repeatable or not self._wanted.isdisjoint(node.outputs) or not all(map(self._constant, reads)):
            return False
        behind = frozenset[ir.Value]().union(*(self._behind(value) for value in reads))
        self._constants.update((value, behind) for value in node.outputs)
        return True

    def _constant(self, value: ir.Value) -> bool:
        return value in self._constants or (value.producer() is None and value not in self._inputs)

    def _behind(self, value: ir.Value) -> frozenset[ir.Value]:
        if value in self._constants:
            return self._constants[value]
        return frozenset({value}) if self._constant(value) else frozenset()

    def cut(self, budget: int) -> list[int]:
        """Ends of segments: each the narrowest place, the last of equals, in the second half of what fits."""
        width = self.widths()
        ends: list[int] = []
        start = 0
        while start < len(self.nodes):
            fits = self._weights_until(start, budget)
            if start + len(fits) == len(self.nodes):
                return [*ends, len(self.nodes)]
            half = [start + at + 1 for at, weight in enumerate(fits) if weight >= fits[-1] / 2]
            start = min(half, key=lambda end: (width[end], -end))
            if width[start] == np.inf:  # nowhere a cut is possible: go on to the next place where one is
                start = next((end for end in range(start, len(self.nodes)) if width[end] < np.inf), len(self.nodes))
            ends.append(start)
        return ends

    def _weights_until(self, start: int, budget: int) -> list[int]:
        """The weight bytes from `start` up to and with each node, as far as they fit; at least one node."""
        seen: set[ir.Value] = set()
        total = 0
        fits: list[int] = []
        for node in self.nodes[start:]:
            new = frozenset[ir.Value]().union(*(self._behind(value) for value in self._reads[node])) - seen
            seen |= new
            total += sum(_bytes(value) for value in new)
            if fits and total > budget:
                break
            fits.append(total)
        return fits

    def widths(self) -> list[float]:
        """At each place (before node i), how many computed values cross it; infinite where one is not a tensor."""
        change = [0.0] * (len(self.nodes) + 1)
        blocked = [0.0] * (len(self.nodes) + 1)
        for value, last in self.last_use.items():
            counter = blocked if _is_no_tensor(value) else change
            counter[self.position[value] + 1] += 1
            counter[last + 1] -= 1
        widths = np.cumsum(change)
        return list(np.where(np.cumsum(blocked) > 0, np.inf, widths))

    def segment(self, start: int, end: int, stop: int) -> Segment:
        nodes = self.nodes[start:end]
        made = {value for node in nodes for value in node.outputs}
        reads = {value for node in nodes for value in self._reads[node]}
        inputs = {value for value in reads - made if value in self.position or value in self._inputs}
        kept = {value for value in made if self.last_use.get(value, -1) >= end} if end < stop else set()
        behind = frozenset[ir.Value]().union(*(self._behind(value) for value in reads))
        return Segment(
            _names(inputs), _names(kept | (made & self._wanted)), _names(kept), sum(_bytes(value) for value in behind)
        )


def _reads(node: ir.Node) -> list[ir.Value]:
    """What a node reads, the values that its bodies (If, Loop, Scan) take from the graph around included."""
    values = {value for value in node.inputs if value is not None}
    bodies = [
        body
        for attribute in node.attributes.values()
        if attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
        for body in (attribute.as_graphs() if attribute.type == ir.AttributeType.GRAPHS else (attribute.as_graph(),))
    ]
    for body in bodies:
        outer = {value for value in body.outputs if value is not None}
        for inner in body.all_nodes():
            outer.update(value for value in inner.inputs if value is not None)
        values.update(value for value in outer if value.graph is node.graph)
    return list(values)


def _bytes(value: ir.Value) -> int:
    """Bytes of a constant; one that is not in a file passes through memory several times before it runs."""
    tensor = value.const_value
    if tensor is None:
        return 0
    return tensor.nbytes * (1 if isinstance(tensor, ir.ExternalTensor) else 3)


def _is_no_tensor(value: ir.Value) -> bool:
    producer = value.producer()
    made_as_sequence = producer is not None and (
        producer.op_type.startswith("Sequence") or producer.op_type in ("SplitToSequence", "Optional")
    ) and producer.op_type not in ("SequenceAt", "SequenceLength")  # fmt: skip
    return made_as_sequence or isinstance(value.type, ir.SequenceType | ir.OptionalType)


def _names(values: Iterable[ir.Value]) -> tuple[str, ...]:
    return tuple(sorted(str(value.name) for value in values))
