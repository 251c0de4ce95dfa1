"""The straight line from a model to its quantized form; every other module is one word of it.

load ─ canonicalize ─ [ for each pass: measure ─ apply ─ verify ─ dump ] ─ portable ─ [ lowering ] ─ verify ─ report
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import onnx_ir as ir

from qcompiler.benchmarking.speedup import Speedup
from qcompiler.calibration.calibrator import Calibrator, Hook, load_statistics, model_hash, save_statistics
from qcompiler.driver import inputs, opening, pipeline, speed
from qcompiler.driver.compiled import Compiled
from qcompiler.driver.inputs import Data
from qcompiler.driver.observers import Snapshots, onlookers
from qcompiler.errors import printable
from qcompiler.recipes import CONVERT, Recipe
from qcompiler.report import build, check_gates
from qcompiler.report.facts import inventory
from qcompiler.report.speed import with_speed
from qcompiler.statistics import StatisticsStore
from qcompiler.targets import Target
from qcompiler.targets.kernels import CPU


def compile(
    model: str | Path | ir.Model, recipe: str | Path | Recipe, *, calibration: Data | None = None,
    target: str | None = None, dtype: str | None = None, tokenizer: str | Path | None = None,
    samples: int | None = None, sequence_length: int | None = None, statistics: str | Path | None = None,
    options: Sequence[str] = (), exclude: Sequence[str] = (), strict: bool = False, memory_limit: int | None = None,
    dump_dir: str | Path | None = None, hooks: Sequence[Hook] = (), progress: bool = False,
    measure_speed: bool = False, work_dir: str | Path | None = None, resume: bool = False,
) -> Compiled:  # fmt: skip
    """Quantize a model by a recipe for a target, and say what became of every layer.

    What goes in:
        model: a .onnx file, the folder that an exporter wrote, or an `ir.Model`, which stays as it was.
        recipe: the name of a built-in one (`qcompiler recipes`), a YAML file, or a `Recipe`.
        target: what the result runs on, ort-cpu, ort-cuda, tensorrt or portable; default: the recipe's.
        dtype: fp16 or bf16, to convert what is left in float32; default: float types stay.
        options: settings of passes, each ``pass.option=value``, over those of the recipe.
        exclude: patterns of layers that no pass touches: module path, node name, glob or ``re:…``.

    Data, where a pass measures:
        calibration: a SPEC (data.npz, a folder of them, data.jsonl, text.txt, pb:DIR, py:module:function, random), or
            samples: an iterable, or a function that returns one, of dicts from input name to array, shaped as the
            model's inputs. The last `held_out` of them (4, the recipe says) are kept for comparing.
        tokenizer: a tokenizer.json, where the data is text.
        samples, sequence_length: samples to calibrate on (32) and tokens of each, where the data is text (256).
        statistics: a file that `qcompiler calibrate` wrote for this model, in the place of data.
        hooks: functions of your own that see values while they are measured (`Hook`).

    How it is done:
        memory_limit: bytes that the process may use while it measures; a larger model runs piece by piece.
        work_dir, resume: a folder for what long passes have finished, and whether to go on with what is there. What
            shows the failure of a pass again goes beside it, or to dump_dir.
        dump_dir: a folder for the graph as text after each pass.
        strict: layers that were skipped, and nodes that run elsewhere than asked, make `report.exit_code` 1.
        measure_speed: time the result beside the float model, on the samples kept for comparing, for about two seconds;
            the report then says how fast it is on this machine. The command line does.
        progress: show progress bars on stderr.

    Raises QCompilerError: ModelError, DataError, RecipeError, TargetError, OutputError for what the caller can mend,
    PassError for a defect of a pass (see `qcompiler.errors`).
    """
    start, has_data = time.perf_counter(), calibration is not None
    plan = inputs.plan(recipe, target, options, exclude, samples, sequence_length, dtype, has_data)
    graph, source = inputs.load(model)
    inputs.check_plan(plan, graph)
    runs_here = opening.check_input(model)
    hashes, store, measured_on, held_out = {"model": model_hash(graph)}, StatisticsStore(), None, None
    if calibration is not None:
        measured_on, held_out = inputs.samples(calibration, graph, plan.recipe, tokenizer)
        hashes["calibration"] = measured_on.hash()
    if statistics is not None:
        store = load_statistics(Path(statistics), hashes["model"])
    calibrator = inputs.calibrator(measured_on, hooks, memory_limit, progress)

    snapshots = Snapshots()
    reference, facts, before = snapshots.of(graph), inventory(graph), build.constant_bytes(graph)
    dumps = Path(dump_dir) if dump_dir is not None else None
    beside = Path(work_dir).parent if work_dir is not None else None
    observers = onlookers(plan.recipe, held_out, memory_limit, dumps, snapshots, beside)
    checkpoint = inputs.checkpoint(plan, hashes, work_dir, resume)
    runs = pipeline.run(graph, plan.passes, store, calibrator, observers, checkpoint)
    if calibrator is not None:
        calibrator.run_hooks(reference)  # where nothing had to be measured, the hooks have not seen the data yet
    portable = snapshots.of(graph)
    runs += pipeline.run(graph, plan.lowering, store, calibrator, observers)
    inputs.finish(graph, plan.recipe)
    on = Target.load(plan.recipe.target)
    converted = any(step.name == CONVERT for step in plan.recipe.passes)  # for a processor that has the type, perhaps
    expected = runs_here and on.providers[0] == CPU and not converted
    lean = memory_limit is not None
    with opening.written(graph, work_dir, lean=lean, came=model, runs_here=expected) as opened:
        comparison = build.comparison(
            reference, graph, portable, held_out, facts, runs, on, opened, memory_limit, progress
        )
        timed: Speedup | str = speed.NOT_ASKED
        if measure_speed:
            timed = speed.measured(
                model, graph, opened, held_out, on, sum(before.values()), memory_limit, progress
            )  # fmt: skip
    report = build.report(plan.recipe, graph, facts, runs, comparison, before, hashes,
                          None if measured_on is None else measured_on.rows())  # fmt: skip
    report.gates, report.strict = check_gates(plan.recipe.gates, report.outputs), strict
    report.model = printable(str(model)) if source is not None else str(graph.graph.name)
    report.pictures = build.pictures(report, facts, reference, portable, graph, runs, store)
    with_speed(report, timed)
    report.seconds = round(time.perf_counter() - start, 2)
    return Compiled(graph, report, plan.recipe, source, checkpoint)


def calibrate(
    model: str | Path | ir.Model, recipe: str | Path | Recipe, *, calibration: Data, output: str | Path,
    target: str | None = None, tokenizer: str | Path | None = None, samples: int | None = None,
    sequence_length: int | None = None, options: Sequence[str] = (), exclude: Sequence[str] = (),
    memory_limit: int | None = None, progress: bool = False,
) -> int:  # fmt: skip
    """Measure what the recipe's passes ask for and write it to `output`; returns the number of statistics."""
    plan = inputs.plan(recipe, target, options, exclude, samples, sequence_length)
    graph, _ = inputs.load(model)
    inputs.check_plan(plan, graph)
    measured_on, _ = inputs.samples(calibration, graph, plan.recipe, tokenizer)
    store = StatisticsStore()
    taps = [tap for step in plan.passes for tap in pipeline.taps_to_keep(step, graph)]
    calibrator = Calibrator(measured_on, memory_limit=memory_limit, progress=progress)
    pipeline.measure(graph, taps, store, calibrator, plan.passes)
    save_statistics(Path(output), store, model_hash(graph), measured_on.hash())
    return len(store)
