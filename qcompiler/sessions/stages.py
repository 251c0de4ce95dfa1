"""Runs a model in stages that change it: each is measured on what the stages before it made of the model.

The graph is cut between the stages, at the narrowest place between the last reader of what one stage measures and the
first value of the next. All samples go through a stage, its values are measured, the caller rewrites its layers, and
the samples go through it once more, so that the next stage reads what the rewritten layers answer. A part of the graph
is run twice at most, and only the weights of one stage are in memory. Stages that no cut divides are one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qcompiler.progress import Progress
from qcompiler.sessions.garbage import Garbage
from qcompiler.sessions.segments import KEPT_SHARE, Consume, Schedule, Segment, wanted_values
from qcompiler.sessions.session import Kept, Session


@dataclass(frozen=True)
class Stage:
    """A part of the graph, and which of the caller's stages lie in it."""

    members: tuple[int, ...]
    known: tuple[str, ...]
    """What is measured, and computed before this part: kept values and graph inputs."""
    measured: Segment
    """Yields what is measured here."""
    forward: Segment | None
    """Yields what later stages read; None for the last."""


def run_stages(
    model: ir.Model,
    samples: Iterable[Mapping[str, np.ndarray]],
    wanted: Sequence[Collection[str]],
    consume: Consume,
    rewrite: Callable[[Sequence[int]], None],
    *,
    done: Callable[[Sequence[int]], bool] = lambda members: False,
    memory_limit: int | None = None,
    progress: Progress | None = None,
) -> None:
    """Measure the values of each stage, and call `rewrite` with the stage's indices, which may change its layers.

    `wanted` names the values of each stage, in graph order. `rewrite` must leave the names of values as they are. Where
    `done` says that a stage needs no measuring, only `rewrite` is called. Otherwise like `segments.run`; the samples
    are read once.
    """
    stages = plan_stages(model.graph, wanted)
    inputs = {name for stage in stages for part in (stage.measured, stage.forward) if part for name in part.inputs}
    inputs = (inputs | {name for stage in stages for name in stage.known}) & {str(v.name) for v in model.graph.inputs}
    limited = memory_limit is not None
    with Kept(None if memory_limit is None else int(memory_limit * KEPT_SHARE)) as kept:
        count = 0
        for index, sample in enumerate(samples):
            for name in inputs & sample.keys():
                kept.put(name, index, np.asarray(sample[name]))
            count = index + 1
        runs = sum(2 if stage.forward else 1 for stage in stages)
        steps = iter(range(1, runs * count + 1))

        garbage = Garbage()

        def through(part: Segment, use: Consume) -> None:
            session, used = Session.of_part(model, part.inputs, part.outputs, kept, limited=limited), part.weight_bytes
            for index in range(count):
                for name, array in session.run({name: kept.get(name, index) for name in part.inputs}, index):
                    used += array.nbytes
                    use(name, index, array)
                if progress is not None:
                    progress(next(steps), runs * count)
            del session
            garbage.left(used)

        for number, stage in enumerate(stages):
            if not done(stage.members):
                for name in stage.known:
                    for index in range(count):
                        consume(name, index, kept.get(name, index))
                if stage.measured.outputs:
                    through(stage.measured, consume)
            rewrite(stage.members)
            if stage.forward is not None:
                through(stage.forward, kept.put)
                kept.drop_all_but({name for later in stages[number + 1 :] for name in _reads(later)})


def plan_stages(graph: ir.Graph, wanted: Sequence[Collection[str]]) -> list[Stage]:
    """Cut a graph between the stages; neighbours that cannot be divided become one."""
    values = [wanted_values(graph, names) for names in wanted]
    steps = Schedule(graph, set[ir.Value]().union(*values))
    widths = steps.widths()
    made = [[steps.position[value] for value in group if value in steps.position] for group in values]
    first = [min(places, default=len(steps.nodes)) for places in made]
    last = [max((steps.last_use.get(v, steps.position.get(v, -1)) for v in group), default=-1) for group in values]
    members: list[list[int]] = [[]]
    cuts: list[int] = []
    for index in range(len(wanted)):
        members[-1].append(index)
        begin, end = max(last[: index + 1], default=-1) + 1, min(first[index + 1 :], default=-1)
        places = [place for place in range(max(begin, 1), end + 1) if widths[place] < np.inf]
        if places:
            cuts.append(min(places, key=lambda place: (widths[place], -place)))
            members.append([])
    ends = [*cuts, len(steps.nodes)]
    return [
        _stage(steps, start, end, tuple(group), set[ir.Value]().union(*(values[index] for index in group)))
        for start, end, group in zip([0, *cuts], ends, members, strict=True)
    ]


def _stage(steps: Schedule, start: int, end: int, members: tuple[int, ...], wanted: set[ir.Value]) -> Stage:
    here = {str(v.name) for v in wanted if start <= steps.position.get(v, -1) < end}
    whole = steps.segment(start, end, len(steps.nodes))
    known = tuple(sorted(str(value.name) for value in wanted if str(value.name) not in here))
    measured = Segment(whole.inputs, tuple(sorted(here)), (), whole.weight_bytes)
    forward = Segment(whole.inputs, whole.kept, whole.kept, whole.weight_bytes) if end < len(steps.nodes) else None
    return Stage(members, known, measured, forward)


def _reads(stage: Stage) -> Iterator[str]:
    yield from stage.measured.inputs
    yield from stage.known
    if stage.forward is not None:
        yield from stage.forward.inputs
