"""Runs passes in order: measure what they ask for, apply, let the hooks look, go on."""

from __future__ import annotations

import resource
import time
from collections.abc import Sequence
from typing import Protocol

import onnx_ir as ir

from qcompiler.calibration.calibrator import Calibrator
from qcompiler.driver.checkpoint import Checkpoint
from qcompiler.errors import DataError
from qcompiler.graph.rewriter import Rewriter
from qcompiler.rewriting.contract import Changes, Pass, PassRun, Tap
from qcompiler.rewriting.staged import Computed, StagedPass, Unit, stages
from qcompiler.sites.analyses import let_go
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
    checkpoint: Checkpoint | None = None,
) -> list[PassRun]:
    """Rewrite `model` in place. Raises DataError where a pass needs data and there is none, PassError where one fails.

    One sweep over the data measures what all passes ask of the model as it is now. Exact passes rescale what was
    measured; a pass whose taps are still missing when its turn comes (it looks at a value that an earlier pass made)
    has them measured then. A pass that is measured in stages, or in turn, is measured on its way; `checkpoint` keeps
    what finished stages have computed.
    """
    union = list({(tap.value, tap.statistic.key): tap for step in passes for tap in taps_before(step, model)}.values())
    measure(model, union, statistics, calibrator, passes)
    runs: list[PassRun] = []
    bits: dict[str, int] = {}
    for index, planned in enumerate(passes):
        step = planned.decided(bits) if bits else planned
        start = time.perf_counter()
        for observer in observers:
            observer.before(step, [step, *passes[index + 1 :]], model, statistics)
        try:
            changes = _apply(step, index, model, statistics, calibrator, checkpoint)
            bits |= changes.bits
            for observer in observers:
                observer.after(step, model, changes)
            for value, divisor in changes.rescaled.items():  # until here they are those of the model before
                statistics.rescale(value, divisor)
        except Exception as error:
            for observer in observers:
                observer.failed(step, error)
            raise
        let_go(model)
        runs.append(PassRun(step, changes, time.perf_counter() - start, peak_rss()))
    return runs


def taps_before(step: Pass, model: ir.Model) -> Sequence[Tap]:
    """What a pass wants measured before it begins."""
    return () if isinstance(step, StagedPass) and step.measured != "at once" else step.taps(model)


def taps_to_keep(step: Pass, model: ir.Model) -> Sequence[Tap]:
    """What of a pass can be measured once for many compilations: all but what it measures on its own results."""
    return () if isinstance(step, StagedPass) and step.measured == "in turn" else step.taps(model)


def _apply(
    step: Pass, position: int, model: ir.Model, statistics: StatisticsStore, calibrator: Calibrator | None,
    checkpoint: Checkpoint | None,
) -> Changes:  # fmt: skip
    if isinstance(step, StagedPass):
        return _apply_in_stages(step, position, model, statistics, calibrator, checkpoint)
    measure(model, step.taps(model), statistics, calibrator, [step])
    return step.apply(model, statistics)


def _apply_in_stages(
    step: StagedPass, position: int, model: ir.Model, statistics: StatisticsStore, calibrator: Calibrator | None,
    checkpoint: Checkpoint | None,
) -> Changes:  # fmt: skip
    """Compute each stage, unless a run before has, and write it: at once, or, where the pass is measured in stages on
    the model that it begins with, when all is computed."""
    changes, rw = Changes(), Rewriter(model, step.name)
    found = stages(step.units(model, changes))
    taps = [[tap for unit in stage for tap in unit.taps] for stage in found]
    finished = {n for n in range(len(found)) if checkpoint is not None and checkpoint.has(position, step.name, n)}
    waiting: list[tuple[Unit, Computed]] = []

    def work(number: int, store: StatisticsStore) -> None:
        if checkpoint is not None and number in finished:
            computed = checkpoint.read(position, step.name, number)
        else:
            computed = {unit.name: step.compute(unit, store) for unit in found[number]}
            if checkpoint is not None:
                checkpoint.write(position, step.name, number, computed)
        for unit in found[number]:
            if step.measured == "in stages":
                waiting.append((unit, computed[unit.name]))
            else:
                step.write(unit, computed[unit.name], rw, changes)

    wanted = [tap for number, stage in enumerate(taps) if number not in finished for tap in stage]
    in_stages = step.measured == "in turn" or statistics.missing([(tap.value, tap.statistic) for tap in wanted])
    if step.measured == "at once" or not in_stages or not wanted:
        measure(model, wanted, statistics, calibrator, [step])
        for number in range(len(found)):
            work(number, statistics)
    elif calibrator is None:
        measure(model, wanted, StatisticsStore(), None, [step])
    else:
        calibrator.collect_in_stages(model, taps, work, finished.__contains__)
    for unit, computed in waiting:
        step.write(unit, computed, rw, changes)
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
