"""Times models beside one another, as their users run them, and says which kernels the time went to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from qcompiler.benchmarking.operators import OperatorShare, profiled
from qcompiler.benchmarking.runner import Runner, timing_options
from qcompiler.benchmarking.timing import Limits, Spread, Timed, in_turns, ratios
from qcompiler.calibration.samples import RANDOM_SEQUENCE_LENGTH, Sample, open_samples
from qcompiler.calibration.stored_past import Adapted
from qcompiler.errors import DataError
from qcompiler.graph import files as model_io
from qcompiler.graph.model_folder import companions_of, tokenizer_beside
from qcompiler.graph.model_inputs import IDS, Signature
from qcompiler.graph.runtime_library import onnxruntime as onnxruntime_library
from qcompiler.progress import Progress, progress_bar
from qcompiler.sessions.runtime import open_file, session_options_of
from qcompiler.targets.machines import this_cpu

if TYPE_CHECKING:
    import onnxruntime

TOKENS = (1, 128)
"""Decoding and reading a prompt: the two ends of what a language model does."""
MOST_TOKENS = 1 << 20
SAMPLES = 4
LIMITS = Limits(rounds=200, seconds=5.0, precision=0.01)
"""For each case."""
PROFILED_RUNS, PROFILED_SECONDS = 10, 1.0
"""At most so many runs, in so much time; three at least, as one may be disturbed."""


@dataclass(frozen=True)
class BenchedModel:
    """One model on one case. Times are seconds of a run."""

    model: str
    cpu: Spread
    """Of all threads: what other processes do hardly changes it."""
    wall: Spread
    cpu_ratio: Spread
    """How many times as fast as the first model, round by round, by CPU time."""
    wall_ratio: Spread
    operators: tuple[OperatorShare, ...]
    """What ran, in a run of its own."""


@dataclass(frozen=True)
class BenchCase:
    """What all models were run on."""

    title: str
    rounds: int
    models: tuple[BenchedModel, ...]


@dataclass(frozen=True)
class Benchmark:
    """What `bench` measured."""

    machine: str
    runtime: str
    threads: int
    cases: tuple[BenchCase, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    def __repr__(self) -> str:
        lines = [
            f"{case.title}: {Path(one.model).name} {1e3 * one.cpu.median:.3g} ms, {one.cpu_ratio.median:.3g} ×"
            for case in self.cases for one in case.models
        ]  # fmt: skip
        return f"Benchmark({self.machine}, {self.threads} threads\n  " + "\n  ".join(lines[:4]) + ")"


@dataclass(frozen=True)
class _Case:
    """A title, and the samples of each model."""

    title: str
    samples: tuple[list[Sample], ...]


def bench(
    *models: str | Path, threads: int = 1, tokens: Sequence[int] | None = None, data: str | None = None,
    tokenizer: str | Path | None = None, samples: int = SAMPLES, sequence_length: int | None = None,
    progress: bool = False,
) -> Benchmark:  # fmt: skip
    """Time models (.onnx files or folders), opened as `load_session` opens them, in turns and beside one another.

    Language models run on `tokens` random tokens after an empty cache (default: 1, and 128), models of another kind on
    random numbers of their own shapes, with so many along axes of open size; or all on `samples` of `data`, a SPEC as
    for `compile`. Ratios are to the first model. Raises ModelError where a model cannot be opened, DataError where what
    is to be run does not fit.
    """
    if not models:
        raise DataError("there is no model to time; name one or more")
    if data is not None and tokens is not None:
        raise DataError("tokens and data both say what to run on; give one of them")
    if threads < 1 or samples < 1 or any(count < 1 for count in tokens or ()):
        raise DataError("threads, samples and tokens are counts of 1 or more")
    if tokens is not None and not 0 < max(tokens, default=0) <= MOST_TOKENS:
        raise DataError(f"tokens are one or more counts of up to {MOST_TOKENS}")
    graphs = [model_io.load(path) for path in models]
    for model in models:
        context = companions_of(model).context
        if tokens is not None and context is not None and max(tokens) > context:
            raise DataError(f"{model} reads {context} tokens at most, and {max(tokens)} are asked for")
    sessions = [_opened(path, graph, timing_options(threads)) for path, graph in zip(models, graphs, strict=True)]
    if data is not None:
        beside = Path(tokenizer) if tokenizer else tokenizer_beside(models[0])
        cases = [_on_data(graphs, data, beside, samples, sequence_length)]
    else:
        cases = list(_on_random(graphs, tokens))
    found = []
    with progress_bar("timing", progress) as report:
        for number, case in enumerate(cases):
            triples = zip(models, sessions, case.samples, strict=True)
            runners = [Runner(str(model), session, samples) for model, session, samples in triples]
            times = in_turns(runners, LIMITS, progress=_part(report, number, len(cases)))
            quadruples = zip(models, graphs, case.samples, times, strict=True)
            timed = [
                _benched(str(model), one, times[0], _operators(model, graph, samples, threads, one))
                for model, graph, samples, one in quadruples
            ]
            found.append(BenchCase(case.title, len(times[0].cpu), tuple(timed)))
    return Benchmark(str(this_cpu()), _runtime(), threads, tuple(found))


def _on_data(graphs: Sequence[ir.Model], data: str, tokenizer: Path | None, count: int, length: int | None) -> _Case:
    found = open_samples(data, model=graphs[0], tokenizer=tokenizer, limit=count, sequence_length=length)
    read = list(found)
    others = (list(Adapted(found, graph)) for graph in graphs[1:])
    counted = "1 sample" if len(read) == 1 else f"{len(read)} samples"
    return _Case(f"{counted} of {found.description}", (read, *others))


def _on_random(graphs: Sequence[ir.Model], tokens: Sequence[int] | None) -> Iterator[_Case]:
    """The first model says what kind all are of. Every model has inputs of its own from the same seed."""
    signatures = [Signature(graph) for graph in graphs]
    if not any(name in IDS or item.vocabulary is not None for name, item in signatures[0].inputs.items()):
        is_open = any(
            isinstance(size, str | None) for item in signatures[0].required() for size in (item.dims or ())[1:]
        )
        counts = (tokens or (RANDOM_SEQUENCE_LENGTH,)) if is_open else (1,)
        titles = [f"random numbers, {count} along open axes" if is_open else "random numbers" for count in counts]
    else:
        counts = tokens or TOKENS
        titles = ["1 token" if count == 1 else f"{count} tokens" for count in counts]
    for count, title in zip(counts, titles, strict=True):
        made = ([_random(signature, count, title)] for signature in signatures)
        yield _Case(title, tuple(made))


def _random(signature: Signature, count: int, title: str) -> Sample:
    return signature.complete(signature.random(np.random.default_rng(0), count), f"the input of {title}")


def _benched(model: str, times: Timed, first: Timed, operators: tuple[OperatorShare, ...]) -> BenchedModel:
    return BenchedModel(
        model, Spread.of(times.cpu), Spread.of(times.wall), ratios(first.cpu, times.cpu),
        ratios(first.wall, times.wall), operators,
    )  # fmt: skip


def _operators(
    model: str | Path, graph: ir.Model, samples: list[Sample], threads: int, times: Timed
) -> tuple[OperatorShare, ...]:  # fmt: skip
    def opened(options: onnxruntime.SessionOptions) -> onnxruntime.InferenceSession:
        return _opened(model, graph, options)

    def run(session: onnxruntime.InferenceSession) -> None:
        Runner(str(model), session, samples[:1])(0)

    count = int(PROFILED_SECONDS / max(Spread.of(times.wall).median, 1e-6))
    return profiled(opened, timing_options(threads), run, max(3, min(count, PROFILED_RUNS)))


def _opened(model: str | Path, graph: ir.Model, options: onnxruntime.SessionOptions) -> onnxruntime.InferenceSession:
    """As `load_session` opens it."""
    return open_file(model_io.find_model(model), options, session_options_of(graph))


def _part(report: Progress | None, number: int, count: int) -> Progress | None:
    """Of a bar over all cases."""
    if report is None:
        return None
    return lambda done, total: report(number * (total or 0) + done, count * (total or 0))


def _runtime() -> str:
    ort = onnxruntime_library()

    return f"onnxruntime {ort.__version__}"
