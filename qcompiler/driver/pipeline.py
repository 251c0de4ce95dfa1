"""Runs passes in order: measure what they ask for, apply, let the hooks look, go on."""

from __future__ import annotations

import resource
import time
from collections.abc import Sequence
from typing import Protocol

import onnx_ir as ir

from qcompiler.calibration.calibrator import Calibrator
from qcompiler.driver.checkpoint import Journal
from qcompiler.errors import DataError
from qcompiler.rewriting.contract import Changes, Pass, PassRun, Tap
from qcompiler.statistics import StatisticsStore


class Observer(Protocol):
    """Looks at the model around every pass: verification, dumps, reproducers. Must not change it."""

    def before(self, step: Pass, rest: Sequence[Pass], model: ir.Model, statistics: StatisticsStore) -> None: ...

    def after(self, step: Pass, model: ir.Model, changes: Changes) -> None: ...

    def failed(self, step: Pass, error: Exception) -> None: ...


def run(
    model: ir.Model,
    passes: Sequence[Pass],
    statistics: StatisticsStore,
    calibrator: Calibrator | None = None,
    observers: Sequence[Observer] = (),
    journal: Journal | None = None,
) -> list[PassRun]:
    """Rewrite `model` in place. Raises DataError where a pass needs data and there is none, PassError where one fails.

    One sweep over the data measures what all passes ask of the model as it is now. Exact passes rescale what was
    measured; a pass whose taps are still missing when its turn comes (it looks at a value that an earlier pass made)
    has them measured then. A pass of several stages is measured stage by stage, as it rewrites the model; `journal`
    keeps what its finished stages computed.
    """
    union = list({(tap.value, tap.statistic.key): tap for step in passes for tap in taps_before(step, model)}.values())
    measure(model, union, statistics, calibrator, passes)
    runs = []
    for index, step in enumerate(passes):
        start = time.perf_counter()
        for observer in observers:
            observer.before(step, passes[index:], model, statistics)
        try:
            changes = _apply(step, model, statistics, calibrator, journal)
            for value, divisor in changes.rescaled.items():
                statistics.rescale(value, divisor)
            for observer in observers:
                observer.after(step, model, changes)
        except Exception as error:
            for observer in observers:
                observer.failed(step, error)
            raise
        runs.append(PassRun(step, changes, time.perf_counter() - start, peak_rss()))
    return runs


def taps_before(step: Pass, model: ir.Model) -> Sequence[Tap]:
    """What a pass wants measured before it begins; one of several stages measures on its way."""
    return step.taps(model) if len(step.stages(model)) == 1 else ()


def _apply(
    step: Pass, model: ir.Model, statistics: StatisticsStore, calibrator: Calibrator | None, journal: Journal | None
) -> Changes:
    stages = step.stages(model)
    if len(stages) == 1:
        measure(model, step.taps(model), statistics, calibrator, [step])
        return step.apply(model, statistics)
    taps = [stage.taps(model) for stage in stages]
    if calibrator is None:
        measure(model, [tap for stage in taps for tap in stage], StatisticsStore(), None, [step])
        return Changes()
    changes = Changes()
    finished = journal.stages(step.name) if journal is not None else {}

    def rewrite(number: int, store: StatisticsStore) -> None:
        store.solved, store.keeps_solved = dict(finished.get(number, {})), journal is not None
        done = stages[number].apply(model, store)
        changes.changed.extend(done.changed)
        changes.skipped.extend(done.skipped)
        changes.excluded.extend(done.excluded)
        if journal is not None and number not in finished:
            journal.write(step.name, number, store.solved)

    calibrator.collect_in_stages(model, taps, rewrite, finished.__contains__)
    return changes


def measure(
    model: ir.Model,
    taps: Sequence[Tap],
    statistics: StatisticsStore,
    calibrator: Calibrator | None,
    passes: Sequence[Pass],
) -> None:
    """Bring everything that the taps ask for into the store."""
    missing = statistics.missing([(tap.value, tap.statistic) for tap in taps])
    if not missing:
        return
    if calibrator is None:
        # The same name can mean another graph value after a rewrite, so what is asked for is named, not guessed.
        value, statistic = missing[0]
        wanted = ", ".join(dict.fromkeys(step.name for step in passes if step.taps(model)))
        raise DataError(
            f"{wanted} needs calibration data, as it asks for {statistic.key} of {value!r} "
            "(give --calibration text.txt --tokenizer tokenizer.json, data.npz …, or --statistics FILE)"
        )
    calibrator.collect(model, [Tap(value, statistic) for value, statistic in missing], statistics)


def peak_rss() -> int:
    """Peak resident memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
