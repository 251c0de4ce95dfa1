"""Checks of our own work: is the graph well-formed, and does it compute what the reference computes?"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from qcompiler.calibration.samples import Sample, Samples
from qcompiler.calibration.stored_past import Adapted
from qcompiler.errors import ModelError
from qcompiler.evaluation.difference import Difference, feature_maps
from qcompiler.evaluation.likelihood import Divergence, Likelihood
from qcompiler.graph.check import check_structure
from qcompiler.graph.model_inputs import Signature
from qcompiler.progress import Progress, progress_bar
from qcompiler.sessions import segments
from qcompiler.sessions.garbage import Garbage
from qcompiler.sessions.session import Kept, Session

if TYPE_CHECKING:
    import onnxruntime

__all__ = ["Comparison", "Measures", "check_structure", "compare"]

VALUE_ELEMENTS = 65_536
"""How many numbers of a value inside are compared per sample: rows, evenly spread; outputs are compared whole."""
LEAST_ROWS = 32
"""Of a value with very long rows so many are taken, and of each as many numbers as that leaves."""
GROUP_BYTES = 64 << 20
"""What the reference's values of a group of samples may take: all models run on one group before the next is read, so
that memory does not grow with the number of samples."""
PIECE_BYTES = 256 << 20
"""Weights that are open at once where no memory limit is given; a larger model's samples are run one by one."""
KEPT_SHARE = 0.25
"""How much of the memory limit the reference's values may take before they go to disk."""


@dataclass(frozen=True)
class Measures:
    """How far a value of the candidate is from the reference's. The last three are for logits of a language model."""

    sqnr_db: float
    """Signal-to-noise ratio in dB, of the mean over rows (tokens) of relative errors; infinite where both are equal."""
    max_abs_error: float
    cosine: float
    kl: float | None = None
    """Mean KL(reference ‖ candidate) per token, in nats."""
    top1: float | None = None
    """Share of tokens where both find the same next token likeliest."""
    perplexity_ratio: float | None = None
    """Perplexity of the candidate over that of the reference, on the samples' own tokens."""
    total_sqnr_db: float | None = None
    """Signal-to-noise ratio in dB of the sums over all rows, which one loud token can have to itself."""
    rows: int = 0
    """How many rows with a signal were compared."""
    share_of_strongest: float = 0.0
    """What share of the energy, 0 to 1, the strongest row of each sample has."""

    def to_dict(self) -> dict[str, float]:
        told = {name: value for name, value in asdict(self).items() if value is not None}
        return {name: value for name, value in told.items() if name not in ("rows", "share_of_strongest")}


@dataclass(frozen=True)
class Comparison:
    """What `compare` found, by name: graph outputs, and values inside by their names in the reference."""

    outputs: dict[str, Measures] = field(default_factory=dict)
    """Of the candidate as its users open it, where `compare` was told how that is."""
    values: dict[str, Measures] = field(default_factory=dict)
    absent: tuple[str, ...] = ()
    """What was asked for and could not be compared: one of the models has no such value, or stores it as codes."""
    reshaped: tuple[str, ...] = ()
    """What has another shape in the candidate on the same sample: data decides it (NonZero, experts), so it is in no
    other list."""
    not_run: tuple[str, ...] = ()
    """Operators of the compiled model that CPUs have no kernel for, so that its portable form was compared."""
    unoptimized: dict[str, Measures] = field(default_factory=dict)
    """The same outputs without onnxruntime's optimizer; empty where `outputs` are those."""


def compare(
    reference: ir.Model,
    candidate: ir.Model,
    samples: Samples,
    *,
    outputs: Iterable[str] | None = None,
    values: Mapping[str, str] | None = None,
    divided: Mapping[str, np.ndarray] | None = None,
    limit: int | None = None,
    opened: Callable[[], onnxruntime.InferenceSession] | None = None,
    memory_limit: int | None = None,
    progress: bool = False,
) -> Comparison:
    """Run both models on the samples (at most `limit`) and measure how far the candidate is from the reference.

    `outputs` are graph outputs (default: all), `values` maps names in the reference to names in the candidate. Where an
    exact pass rescaled a value, `divided` says by what the candidate's is divided along its last axis. `opened` opens
    the candidate as its users do, with onnxruntime's optimizer; without it, and for the values inside, the graphs run
    as they stand. Memory is bounded by `GROUP_BYTES` and one sample's values, or by a quarter of `memory_limit`.
    Raises ModelError where a model cannot be run, DataError where the data does not fit.
    """
    pairs, absent = _pairs(reference, candidate, outputs, values or {})
    whole = dict.fromkeys(str(value.name) for value in reference.graph.outputs)
    named = whole if outputs is None else dict.fromkeys(outputs)
    asked = [name for name in named if name in pairs]
    given = {str(value.name) for value in candidate.graph.outputs}
    run = {pairs[name]: name for name in asked if opened is not None and pairs[name] in given}
    tokens, maps = _Tokens(reference), feature_maps(reference)
    meters = {name: _Meter(tokens, name in maps) for name in pairs}
    as_opened = {name: _Meter(tokens, name in maps) for name in run.values()}
    originals: dict[str, list[str]] = {}
    for original, name in pairs.items():
        originals.setdefault(name, []).append(original)
    with (
        Kept(None if memory_limit is None else int(memory_limit * KEPT_SHARE)) as kept,
        progress_bar("comparing", progress) as report,
    ):
        steps = _Steps(report, samples.count if limit is None else min(limit, samples.count or limit), opened)

        def remember(name: str, index: int, array: np.ndarray) -> None:
            kept.put(name, index, array if name in whole else _thinned(array, name in maps))

        def measure(name: str, index: int, array: np.ndarray) -> None:
            for original in originals[name]:
                scaled = array * divided[original] if divided is not None and original in divided else array
                found = scaled if original in whole else _thinned(scaled, original in maps)
                meters[original].update(original, kept.get(original, index), found, index)

        def measure_opened(name: str, index: int, array: np.ndarray) -> None:
            as_opened[run[name]].update(run[name], kept.get(run[name], index), array, index)

        large = sum(constant.nbytes for constant in _constants(reference)) > PIECE_BYTES
        most = 0 if large and memory_limit is None else GROUP_BYTES
        size = 1 if most == 0 else None  # of a group
        run_pieces = partial(segments.run, memory_limit=memory_limit, budget=PIECE_BYTES)
        garbage = Garbage()
        for group in _groups(_limited(samples, limit), kept, most, size):
            run_pieces(
                reference,
                tokens.watching(group),
                set(pairs),
                remember,
                first=group.first,
                progress=steps.next(group.count),
            )
            run_pieces(
                candidate,
                Adapted(group, candidate),
                set(originals),
                measure,
                first=group.first,
                progress=steps.next(group.count),
            )
            if opened is not None:
                _run_whole(opened, Adapted(group, candidate), run, measure_opened, group.first, steps.next(group.count))
            garbage.left(kept.bytes)
            kept.drop_all_but(())
    either = {name: [found[name] for found in (meters, as_opened) if name in found] for name in meters}
    reshaped = tuple(name for name, found in either.items() if any(meter.reshaped for meter in found))
    plain = {name: meter.measures() for name, meter in meters.items() if name not in reshaped}
    unoptimized = {name: plain[name] for name in asked if name in plain}
    shown = unoptimized | {name: meter.measures() for name, meter in as_opened.items() if name not in reshaped}
    inside = {name: measures for name, measures in plain.items() if name in (values or {})}
    return Comparison(shown, inside, absent, reshaped, unoptimized=unoptimized if opened is not None else {})


def _run_whole(
    opened: Callable[[], onnxruntime.InferenceSession], samples: Iterable[Sample], names: Iterable[str],
    consume: segments.Consume, first: int, progress: Progress,
) -> None:  # fmt: skip
    """Like `segments.run`, in a session that is gone afterwards."""
    session = Session(opened(), list(names))
    for index, sample in enumerate(samples, first):
        for name, array in session.run(sample, index):
            consume(name, index, array)
        progress(index + 1 - first, None)


def _pairs(
    reference: ir.Model, candidate: ir.Model, outputs: Iterable[str] | None, values: Mapping[str, str]
) -> tuple[dict[str, str], tuple[str, ...]]:
    """What is compared with what, and the names that cannot be."""
    mine, theirs = _computed(reference), _computed(candidate)
    chosen = [str(value.name) for value in reference.graph.outputs] if outputs is None else list(outputs)
    asked = {**{name: name for name in chosen}, **values}
    missing = [name for name in chosen if name not in mine or name not in theirs]
    if missing:
        raise ModelError(f"the output {missing[0]!r} is not in both models, so they cannot be compared")
    pairs = {a: b for a, b in asked.items() if a in mine and b in theirs and _comparable(mine[a], theirs[b])}
    return pairs, tuple(name for name in asked if name not in pairs)


def _computed(model: ir.Model) -> dict[str, ir.Value]:
    found = {str(value.name): value for value in model.graph.inputs}
    return found | {str(value.name): value for node in model.graph for value in node.outputs if value.name}


def _constants(model: ir.Model) -> Iterator[ir.TensorProtocol]:
    for value in model.graph.initializers.values():
        if value.const_value is not None:
            yield value.const_value


def _comparable(a: ir.Value, b: ir.Value) -> bool:
    """Codes are not compared with numbers, nor is text; a type that is not known is given the benefit of the doubt."""
    if ir.DataType.STRING in (a.dtype, b.dtype):
        return False
    if a.dtype is None or b.dtype is None:
        return True
    return a.dtype == b.dtype or (a.dtype.is_floating_point() and b.dtype.is_floating_point())


def _limited(samples: Samples, limit: int | None) -> Samples:
    return samples if limit is None else samples.part(0, limit)


class _Group:
    """Samples that all models run on before the next are read; none is drawn once the reference's values are many."""

    def __init__(self, first: int, rest: Iterator[Sample], kept: Kept, most: int, count: int | None) -> None:
        """`count` is how many samples there will be, where that is known before they are drawn."""
        self.first, self.count = first, count
        self._rest, self._kept, self._most = rest, kept, most
        self.drawn: list[Sample] = []

    def __iter__(self) -> Iterator[Sample]:
        if self.drawn:
            yield from self.drawn
            return
        for sample in self._rest:
            self.drawn.append(sample)
            yield sample
            if self._kept.bytes >= self._most:
                return


def _groups(samples: Samples, kept: Kept, most: int, count: int | None) -> Iterator[_Group]:
    """One after another, of so many bytes of kept values; the next is begun when the last is done with."""
    rest, done = iter(samples), 0
    while (first := next(rest, None)) is not None:
        group = _Group(done, itertools.chain([first], rest), kept, most, count)
        yield group
        done += len(group.drawn)


class _Steps:
    """Progress over all runs of all groups."""

    def __init__(self, report: Progress | None, count: int | None, opened: object) -> None:
        self._report, self._done, self._shown = report, 0.0, 0.0
        self._total = None if count is None else count * (2 if opened is None else 3)

    def next(self, size: int | None) -> Progress:
        """For the next run, of so many samples if that is known; it may tell pieces of samples."""
        self._done += self._shown
        self._shown = 0.0

        def told(done: int, total: int | None) -> None:
            self._shown = done if total is None or size is None else size * done / total
            if self._report is not None:
                self._report(int(self._done + self._shown), self._total)

        return told


class _Tokens:
    """The token ids and masks of the samples, which tell whether an output holds logits and how good they are."""

    def __init__(self, model: ir.Model) -> None:
        item = Signature(model).inputs.get("input_ids")
        self._vocabulary = item.vocabulary if item is not None else None
        self._by_sample: dict[int, tuple[np.ndarray, np.ndarray | None]] = {}
        self.count: int | None = None

    def watching(self, samples: _Group) -> _Watched:
        return _Watched(samples, self._by_sample)

    def of(self, name: str, index: int, array: np.ndarray) -> tuple[np.ndarray, np.ndarray | None] | None:
        """(ids, mask) where the array holds logits for the ids of the sample, else None."""
        ids, mask = self._by_sample.get(index, (None, None))
        if ids is None or array.ndim != 3 or array.shape[:2] != ids.shape:
            return None
        return (ids, mask) if name == "logits" or array.shape[2] == self._vocabulary else None


class _Watched:
    def __init__(self, samples: _Group, notes: dict[int, tuple[np.ndarray, np.ndarray | None]]) -> None:
        self._samples, self._notes, self.count = samples, notes, samples.count

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        for index, sample in enumerate(self._samples, self._samples.first):
            ids, mask = sample.get("input_ids"), sample.get("attention_mask")
            if ids is not None and ids.ndim == 2:
                self._notes[index] = ids, (mask if mask is not None and mask.shape == ids.shape else None)
            yield sample


class _Meter:
    """Everything that is measured of one value."""

    def __init__(self, tokens: _Tokens, whole: bool) -> None:
        self._tokens, self._whole = tokens, whole
        self._difference, self._divergence = Difference(), Divergence()
        self._likelihoods = Likelihood(), Likelihood()
        self.reshaped = False
        """Whether the shapes of a sample differed."""

    def update(self, name: str, reference: np.ndarray, candidate: np.ndarray, index: int) -> None:
        if reference.shape != candidate.shape:
            self.reshaped = True
            return
        self._difference.update(reference, candidate, whole=self._whole)
        found = self._tokens.of(name, index, reference)
        if found is not None:
            ids, mask = found
            self._divergence.update(reference, candidate, mask)
            for likelihood, logits in zip(self._likelihoods, (reference, candidate), strict=True):
                likelihood.update(logits, ids, mask)

    def measures(self) -> Measures:
        difference, divergence = self._difference, self._divergence
        reference, candidate = self._likelihoods
        return Measures(
            sqnr_db=difference.sqnr_db,
            max_abs_error=difference.largest,
            cosine=difference.cosine,
            kl=divergence.kl if divergence.positions else None,
            top1=divergence.top1 if divergence.positions else None,
            perplexity_ratio=float(np.exp(candidate.nll - reference.nll)) if reference.tokens else None,
            total_sqnr_db=difference.total_sqnr_db,
            rows=difference.rows,
            share_of_strongest=difference.share_of_strongest,
        )


def _thinned(array: np.ndarray, whole: bool) -> np.ndarray:
    """Rows, the first and others evenly spread, copied so that the whole array can go; `whole` takes it as one row."""
    if array.size <= VALUE_ELEMENTS:
        return array.copy()
    if whole or array.ndim < 2:
        return array.reshape(1, -1)[:, :: -(-array.size // VALUE_ELEMENTS)].copy()
    rows = array.reshape(-1, array.shape[-1])
    step = -(-len(rows) // max(LEAST_ROWS, VALUE_ELEMENTS // rows.shape[1]))
    taken = rows[::step]
    return taken[:, :: max(1, -(-taken.size // VALUE_ELEMENTS))].copy()
