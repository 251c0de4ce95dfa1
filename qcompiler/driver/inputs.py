"""Turns what a caller gives into what the compiler works on: a resolved recipe with its passes, a graph, samples."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from qcompiler.calibration.calibrator import Calibrator, Hook
from qcompiler.calibration.samples import Samples, from_python, open_samples
from qcompiler.driver.checkpoint import Checkpoint
from qcompiler.errors import DataError, ModelError, PassError
from qcompiler.graph import files as model_io
from qcompiler.graph import metadata
from qcompiler.graph.check import check_structure
from qcompiler.graph.model_folder import check_companions
from qcompiler.recipes import Recipe
from qcompiler.report import build
from qcompiler.rewriting.contract import Pass
from qcompiler.rewriting.staged import StagedPass
from qcompiler.sites.analyses import caches_of, sites_of
from qcompiler.sites.canonicalize import canonicalize
from qcompiler.sites.find import check_patterns
from qcompiler.targets import Target

Data = str | Samples | Iterable[Mapping[str, Any]] | Callable[[], Iterable[Mapping[str, Any]]]


@dataclasses.dataclass(frozen=True)
class Plan:
    """A recipe with nothing left open, and its passes."""

    recipe: Recipe
    passes: Sequence[Pass]
    lowering: Sequence[Pass]


def plan(
    recipe: str | Path | Recipe, target: str | None, options: Sequence[str], exclude: Sequence[str],
    samples: int | None, sequence_length: int | None, dtype: str | None = None, measured: bool = True,
) -> Plan:  # fmt: skip
    """Resolve a recipe for a target and, where one is asked for, a float type; `measured` says whether there is data.

    Raises RecipeError, TargetError.
    """
    given = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
    said = {"samples": samples, "sequence_length": sequence_length}
    calibration = given.calibration.model_copy(update={key: value for key, value in said.items() if value is not None})
    given = given.model_copy(update={"exclude": (*given.exclude, *exclude), "calibration": calibration})
    resolved = given.with_dtype(dtype, measured).for_target(target).with_options(options).resolved()
    passes = [_leave_out(step, resolved.exclude) for step in resolved.build()]
    Target.load(resolved.target).check(passes)
    return Plan(resolved, passes, resolved.build_lowering())


def load(model: str | Path | ir.Model) -> tuple[ir.Model, Path | None]:
    """The canonicalized graph, ours to change, and the folder it came from. Raises ModelError."""
    source = None if isinstance(model, ir.Model) else model_io.find_model(model).parent
    if source is not None:
        check_companions(source)
    graph = model_io.take(model)
    canonicalize(graph)
    try:
        check_structure(graph)
    except PassError as error:  # no pass has run yet, so it came in like this
        raise ModelError(f"the model is not well-formed: {error}; repair or export it again") from error
    return graph, source


def check_plan(plan: Plan, graph: ir.Model) -> None:
    """Every pattern of the recipe names at least one site. Raises RecipeError."""
    patterns = [*plan.recipe.exclude]
    for step in plan.passes:
        patterns += step.patterns
    check_patterns(patterns, [*sites_of(graph), *caches_of(graph)])


def samples(
    data: Data, graph: ir.Model, recipe: Recipe, tokenizer: str | Path | None
) -> tuple[Samples, Samples | None]:
    """(samples to calibrate on, samples to compare on): the last of the data are held out. Raises DataError."""
    calibration = recipe.calibration
    limit = calibration.samples + calibration.held_out
    if isinstance(data, str):
        found = open_samples(
            data, model=graph, tokenizer=Path(tokenizer) if tokenizer else None, limit=limit,
            sequence_length=calibration.sequence_length,
        )  # fmt: skip
    else:
        found = data if isinstance(data, Samples) else from_python(data, model=graph, limit=limit)
    total = found.count if found.count is not None else sum(1 for _ in found)
    held_out = min(calibration.held_out, total // 2)
    return found.part(0, total - held_out), found.part(total - held_out, total) if held_out else None


def calibrator(
    measured_on: Samples | None, hooks: Sequence[Hook], memory_limit: int | None, progress: bool
) -> Calibrator | None:
    """What measures the model, where there is data; hooks without data are an error, as they would see nothing."""
    if measured_on is None:
        if hooks:
            raise DataError("calibration hooks need data to look at: give calibration=…")
        return None
    return Calibrator(measured_on, memory_limit=memory_limit, progress=progress, hooks=hooks)


def checkpoint(plan: Plan, hashes: Mapping[str, str], folder: str | Path | None, resume: bool) -> Checkpoint | None:
    """Where long passes note what they have computed; None where there is none, or no folder is given."""
    if folder is None or not any(isinstance(step, StagedPass) for step in plan.passes):
        return None
    recipe = hashlib.sha256(plan.recipe.to_yaml().encode()).hexdigest()
    versions = ", ".join(f"{name} {version}" for name, version in build.versions().items())
    return Checkpoint(Path(folder), {**hashes, "recipe": recipe, "versions": versions}, resume=resume)


def finish(graph: ir.Model, recipe: Recipe) -> None:
    """Note in the model's metadata how it was made and what a session needs to run it as meant."""
    target = Target.load(recipe.target)
    graph.metadata_props[metadata.RECIPE] = recipe.to_yaml()
    graph.metadata_props[metadata.TARGET] = target.name
    graph.metadata_props[metadata.SESSION_OPTIONS] = json.dumps(dict(target.session_options))
    graph.metadata_props[metadata.DISABLED_OPTIMIZERS] = json.dumps(list(target.disabled_optimizers))
    graph.producer_name, graph.producer_version = "qcompiler", _version()


def _leave_out(step: Pass, patterns: Sequence[str]) -> Pass:
    if step.kind == "lowering":  # which excludes layers from being quantized, not from being lowered
        return step
    return dataclasses.replace(step, ignore=(*step.ignore, *patterns))


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("onnx-qcompiler")
    except PackageNotFoundError:
        return "source"
