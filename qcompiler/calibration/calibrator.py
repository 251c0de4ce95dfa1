"""Runs a model on samples and feeds what passes and users want to see: statistics at taps, and calibration hooks."""

from __future__ import annotations

import fnmatch
import hashlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from qcompiler.calibration.samples import Samples
from qcompiler.calibration.stored_past import Adapted, StoredPasts
from qcompiler.errors import DataError, RecipeError, closest
from qcompiler.graph.lazy import pieces
from qcompiler.graph.module_path import module_path
from qcompiler.progress import progress_bar
from qcompiler.rewriting.contract import Tap
from qcompiler.sessions import segments
from qcompiler.sessions.stages import run_stages
from qcompiler.sites.kinds import searched
from qcompiler.statistics import Statistic, StatisticsStore


@dataclass(frozen=True)
class Hook:
    """Gives a function of your own every batch of the values that a pattern names.

    `pattern` is compared with the names of values and with the module paths of the nodes that write them
    (``model.layers.0.mlp.down_proj``), as exporters often number the values. It is a name, a glob (``*mlp*``) or
    ``re:`` and a regular expression that is searched for. `function` is called with the name and the array, once for
    each sample, in the order of the samples. The array must not be changed, and be copied to be kept.
    """

    pattern: str
    function: Callable[[str, np.ndarray], None]


class Calibrator:
    """Measures values of a model on samples, in sweeps over the data that are as few as can be.

    `memory_limit`, in bytes, is for the whole process: a larger model is run piece by piece (see `segments`).
    The hooks see the first model that is measured, once.
    """

    def __init__(
        self,
        samples: Samples,
        *,
        memory_limit: int | None = None,
        progress: bool = False,
        hooks: Sequence[Hook] = (),
    ) -> None:
        self._samples, self._memory_limit, self._progress = samples, memory_limit, progress
        self._waiting = tuple(hooks)

    def collect(self, model: ir.Model, taps: Sequence[Tap], store: StatisticsStore) -> None:
        """Measure those of the taps that the store lacks, in one sweep, and put them there.

        The store stays as it was where an error is raised: DataError for NaN or infinity at a tapped value or data that
        does not fit, ModelError where the model cannot be run, RecipeError for a hook that names no value.
        """
        missing = store.missing([(tap.value, tap.statistic) for tap in taps])
        measured = [(value, prototype.fresh()) for value, prototype in missing]
        self._sweep(model, measured)
        for value, statistic in measured:
            store.put(value, statistic)

    def collect_in_stages(
        self, model: ir.Model, stages: Sequence[Sequence[Tap]], rewrite: Callable[[int, StatisticsStore], None],
        done: Callable[[int], bool],
    ) -> None:  # fmt: skip
        """Measure the taps of each stage and hand them to `rewrite`, which changes the model before the next stage.

        Nothing is measured for a stage that is `done`. Statistics live until `rewrite` returns. Raises as `collect`.
        """
        statistics: dict[str, list[Statistic]] = {}
        taps = list({(tap.value, tap.statistic.key): tap for stage in stages for tap in stage}.values())

        def consume(value: str, sample: int, batch: np.ndarray) -> None:
            if value not in statistics:
                statistics[value] = [tap.statistic.fresh() for tap in taps if tap.value == value]
            _update(model.graph, value, sample, batch, statistics[value])

        def rewrite_all(members: Sequence[int]) -> None:
            store = StatisticsStore()
            for value, found in statistics.items():
                for statistic in found:
                    store.put(value, statistic)
            statistics.clear()
            for member in members:
                rewrite(member, store)

        with progress_bar("quantizing block by block", self._progress) as progress:
            run_stages(
                model, self._read_by(model), [{tap.value for tap in stage} for stage in stages], consume, rewrite_all,
                done=lambda members: all(map(done, members)), memory_limit=self._memory_limit, progress=progress,
            )  # fmt: skip

    def run_hooks(self, model: ir.Model) -> None:
        """Run the hooks now, where they have not run with a sweep of `collect` before."""
        self._sweep(model, [])

    def _read_by(self, model: ir.Model) -> Samples | Adapted:
        """The samples; where the model has its caches quantized by now, as it reads them."""
        return Adapted(self._samples, model) if StoredPasts(model) else self._samples

    def _sweep(self, model: ir.Model, measured: Sequence[tuple[str, Statistic]]) -> None:
        hooks = _hooks_by_value(model.graph, self._waiting)
        statistics: dict[str, list[Statistic]] = {}
        for value, statistic in measured:
            statistics.setdefault(value, []).append(statistic)
        if not statistics and not hooks:
            return

        def consume(value: str, sample: int, batch: np.ndarray) -> None:
            for hook in hooks.get(value, ()):
                hook.function(value, batch)
            if value in statistics:
                _update(model.graph, value, sample, batch, statistics[value])

        with progress_bar("calibrating", self._progress) as progress:
            segments.run(
                model, self._read_by(model), {*statistics, *hooks}, consume,
                memory_limit=self._memory_limit, progress=progress,
            )  # fmt: skip
        self._waiting = ()


def _update(graph: ir.Graph, value: str, sample: int, batch: np.ndarray, statistics: Iterable[Statistic]) -> None:
    # Not left to the statistics: those of users need not look, and the message should say where.
    if batch.dtype.kind in "fV" and not np.isfinite(batch).all():
        wrong = int(np.size(batch) - np.isfinite(batch).sum())
        raise DataError(
            f"{_place(graph, value)} holds NaN or infinity on sample {sample} ({wrong} of {batch.size} numbers); "
            "remove the sample, or exclude the layers that read the value"
        )
    for statistic in statistics:
        try:
            statistic.update(batch)
        except DataError as error:
            raise DataError(f"{_place(graph, value)} on sample {sample}: {error}") from error
        except (Exception, SystemExit) as error:
            if type(statistic).__module__.startswith("qcompiler."):
                raise
            failure = f"the statistic {statistic.key} failed with {type(error).__name__}: {error}"
            raise DataError(f"{_place(graph, value)} on sample {sample}: {failure}") from error


def _place(graph: ir.Graph, name: str) -> str:
    for node in graph:
        if any(output.name == name for output in node.outputs):
            return f"the value {name!r} of node {node.name!r} ({node.op_type})"
    return f"the input {name!r}"


def _hooks_by_value(graph: ir.Graph, hooks: Sequence[Hook]) -> dict[str, list[Hook]]:
    names = {str(value.name): "" for value in graph.inputs}
    for node in graph:
        if node.op_type != "Constant":
            names |= {str(value.name): module_path(node) for value in node.outputs if value.name}
    found: dict[str, list[Hook]] = {}
    for hook in hooks:
        matching = set(_matching(hook.pattern, [*names, *names.values()]))
        if not matching:
            known = list(dict.fromkeys([*names, *names.values()]))
            raise RecipeError(f"the hook's pattern {hook.pattern!r} matches no value{closest(hook.pattern, known)}")
        for name, path in names.items():
            if name in matching or path in matching:
                found.setdefault(name, []).append(hook)
    return found


def _matching(pattern: str, names: Sequence[str]) -> list[str]:
    if pattern.startswith("re:"):
        return [name for name in names if searched(pattern, name)]
    if pattern in names:
        return [pattern]
    return [name for name in names if fnmatch.fnmatchcase(name, pattern)]


def model_hash(model: ir.Model) -> str:
    """SHA-256 over the graph (nodes, names, attributes, inputs, outputs) and all constants.

    Weights in files are read in pieces, not mapped, at about 1 GB/s a core.
    """
    constants = [(name, value.const_value) for graph in model.graphs() for name, value in graph.initializers.items()]
    with ThreadPoolExecutor(max_workers=4) as pool:
        digests = list(pool.map(_tensor_digest, [tensor for _, tensor in constants]))
    digest = hashlib.sha256()
    for opset in sorted(model.opset_imports.items()):
        digest.update(repr(opset).encode())
    for value in (*model.graph.inputs, *model.graph.outputs):
        digest.update(f"{value.name}:{value.type}:{value.shape};".encode())
    nodes = [*model.graph, *(node for function in model.functions.values() for node in function)]
    for node in nodes:
        digest.update(ir.serde.serialize_node(node).SerializeToString(deterministic=True))
    for (name, _), content in sorted(zip(constants, digests, strict=True), key=lambda pair: pair[0][0] or ""):
        digest.update(f"{name}={content};".encode())
    return digest.hexdigest()


def _tensor_digest(tensor: ir.TensorProtocol | None) -> str:
    digest = hashlib.sha256()
    if tensor is None:
        return digest.hexdigest()
    digest.update(f"{tensor.dtype.name}{tensor.shape};".encode())
    for piece in pieces(tensor):
        digest.update(piece)
    return digest.hexdigest()


def save_statistics(path: Path, store: StatisticsStore, model_hash: str, data_hash: str) -> None:
    """Write a store with the hashes of the model and of the data it was measured on. Raises OutputError."""
    store.save(path, {"model": model_hash, "data": data_hash})


def load_statistics(path: Path, model_hash: str) -> StatisticsStore:
    """Read what `save_statistics` wrote. Raises DataError where the file is damaged, or is of another model."""
    store, header = StatisticsStore.load(path)
    if header.get("model") != model_hash:
        raise DataError(
            f"the statistics in {path} were measured on another model (or on an earlier version of this one); "
            "run `qcompiler calibrate` on this model"
        )
    return store
