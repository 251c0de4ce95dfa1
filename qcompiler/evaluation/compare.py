"""Checks of our own work: is the graph well-formed, and does it compute what the reference computes?"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field

import numpy as np
import onnx_ir as ir

from qcompiler.calibration.samples import Samples
from qcompiler.calibration.stored_past import Adapted
from qcompiler.errors import ModelError
from qcompiler.evaluation.likelihood import Difference, Divergence, Likelihood
from qcompiler.graph.check import check_structure
from qcompiler.graph.model_inputs import Signature
from qcompiler.progress import Progress, progress_bar
from qcompiler.sessions import segments
from qcompiler.sessions.session import Kept

__all__ = ["Comparison", "Measures", "check_structure", "compare"]

VALUE_ELEMENTS = 65_536
"""How many numbers of a value are compared per sample, evenly spread; outputs are compared whole."""
KEPT_SHARE = 0.25
"""How much of the memory limit the reference's values may take before they go to disk."""


@dataclass(frozen=True)
class Measures:
    """How far a value of the candidate is from the reference's. The last three are for logits of a language model."""

    sqnr_db: float
    """Signal-to-noise ratio in dB; infinite where both are equal."""
    max_abs_error: float
    cosine: float
    kl: float | None = None
    """Mean KL(reference ‖ candidate) per token, in nats."""
    top1: float | None = None
    """Share of tokens where both find the same next token likeliest."""
    perplexity_ratio: float | None = None
    """Perplexity of the candidate over that of the reference, on the samples' own tokens."""

    def to_dict(self) -> dict[str, float]:
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class Comparison:
    """What `compare` found, by name: graph outputs, and values inside by their names in the reference."""

    outputs: dict[str, Measures] = field(default_factory=dict)
    values: dict[str, Measures] = field(default_factory=dict)
    absent: tuple[str, ...] = ()
    """What was asked for and could not be compared: one of the models has no such value, or stores it as codes."""
    reshaped: tuple[str, ...] = ()
    """What has another shape in the candidate on the same sample: data decides it (NonZero, experts), so it is in no
    other list."""
    not_run: tuple[str, ...] = ()
    """Operators of the compiled model that CPUs have no kernel for, so that its portable form was compared."""


def compare(
    reference: ir.Model,
    candidate: ir.Model,
    samples: Samples,
    *,
    outputs: Iterable[str] | None = None,
    values: Mapping[str, str] | None = None,
    divided: Mapping[str, np.ndarray] | None = None,
    limit: int | None = None,
    memory_limit: int | None = None,
    progress: bool = False,
) -> Comparison:
    """Run both models on the samples (at most `limit`) and measure how far the candidate is from the reference.

    `outputs` are graph outputs (default: all), `values` maps names in the reference to names in the candidate. Where an
    exact pass rescaled a value, `divided` says by what the candidate's is divided along its last axis.
    Memory is bounded by the reference's outputs on all samples, or by a quarter of `memory_limit`.
    Raises ModelError where a model cannot be run, DataError where the data does not fit.
    """
    pairs, absent = _pairs(reference, candidate, outputs, values or {})
    whole = {str(value.name) for value in reference.graph.outputs}
    tokens = _Tokens(reference)
    meters = {name: _Meter(tokens) for name in pairs}
    with (
        Kept(None if memory_limit is None else int(memory_limit * KEPT_SHARE)) as kept,
        progress_bar("comparing", progress) as report,
    ):

        def remember(name: str, index: int, array: np.ndarray) -> None:
            kept.put(name, index, array if name in whole else _thinned(array))

        def measure(name: str, index: int, array: np.ndarray) -> None:
            for original in originals[name]:
                scaled = array * divided[original] if divided is not None and original in divided else array
                found = scaled if original in whole else _thinned(scaled)
                meters[original].update(original, kept.get(original, index), found, index)

        originals: dict[str, list[str]] = {}
        for original, name in pairs.items():
            originals.setdefault(name, []).append(original)
        first, second = _halves(report)
        segments.run(
            reference, tokens.watching(_limited(samples, limit)), set(pairs), remember,
            memory_limit=memory_limit, progress=first,
        )  # fmt: skip
        segments.run(
            candidate, Adapted(_limited(samples, limit), candidate), set(originals), measure,
            memory_limit=memory_limit, progress=second,
        )  # fmt: skip
    named = {str(value.name) for value in reference.graph.outputs} if outputs is None else set(outputs)
    measured = {name: meter.measures() for name, meter in meters.items() if not meter.reshaped}
    return Comparison(
        {name: measures for name, measures in measured.items() if name in named},
        {name: measures for name, measures in measured.items() if name in (values or {})},
        absent,
        tuple(name for name in meters if name not in measured),
    )


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


def _comparable(a: ir.Value, b: ir.Value) -> bool:
    """Codes are not compared with numbers, nor is text; a type that is not known is given the benefit of the doubt."""
    if ir.DataType.STRING in (a.dtype, b.dtype):
        return False
    if a.dtype is None or b.dtype is None:
        return True
    return a.dtype == b.dtype or (a.dtype.is_floating_point() and b.dtype.is_floating_point())


def _limited(samples: Samples, limit: int | None) -> Samples:
    return samples if limit is None else samples.part(0, limit)


class _Tokens:
    """The token ids and masks of the samples, which tell whether an output holds logits and how good they are."""

    def __init__(self, model: ir.Model) -> None:
        item = Signature(model).inputs.get("input_ids")
        self._vocabulary = item.vocabulary if item is not None else None
        self._by_sample: dict[int, tuple[np.ndarray, np.ndarray | None]] = {}
        self.count: int | None = None

    def watching(self, samples: Samples) -> _Watched:
        return _Watched(samples, self._by_sample)

    def of(self, name: str, index: int, array: np.ndarray) -> tuple[np.ndarray, np.ndarray | None] | None:
        """(ids, mask) where the array holds logits for the ids of the sample, else None."""
        ids, mask = self._by_sample.get(index, (None, None))
        if ids is None or array.ndim != 3 or array.shape[:2] != ids.shape:
            return None
        return (ids, mask) if name == "logits" or array.shape[2] == self._vocabulary else None


class _Watched:
    def __init__(self, samples: Samples, notes: dict[int, tuple[np.ndarray, np.ndarray | None]]) -> None:
        self._samples, self._notes, self.count = samples, notes, samples.count

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        for index, sample in enumerate(self._samples):
            ids, mask = sample.get("input_ids"), sample.get("attention_mask")
            if ids is not None and ids.ndim == 2:
                self._notes[index] = ids, (mask if mask is not None and mask.shape == ids.shape else None)
            yield sample


class _Meter:
    """Everything that is measured of one value."""

    def __init__(self, tokens: _Tokens) -> None:
        self._tokens = tokens
        self._difference, self._divergence = Difference(), Divergence()
        self._likelihoods = Likelihood(), Likelihood()
        self.reshaped = False
        """Whether the shapes of a sample differed."""

    def update(self, name: str, reference: np.ndarray, candidate: np.ndarray, index: int) -> None:
        if reference.shape != candidate.shape:
            self.reshaped = True
            return
        self._difference.update(reference, candidate)
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
        )


def _thinned(array: np.ndarray) -> np.ndarray:
    """Up to VALUE_ELEMENTS numbers in one row, evenly spread, copied so that the whole array can go."""
    step = max(1, -(-array.size // VALUE_ELEMENTS))
    return array.reshape(-1)[::step].copy()


def _halves(report: Progress | None) -> tuple[Progress | None, Progress | None]:
    """The reference's run is the first half of the work, the candidate's the second."""
    if report is None:
        return None, None
    return (
        lambda done, total: report(done, None if total is None else 2 * total),
        lambda done, total: report(done if total is None else total + done, None if total is None else 2 * total),
    )
