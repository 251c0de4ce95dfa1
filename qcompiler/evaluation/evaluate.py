"""How good a language model is on a text, and how close a compiled model stays to the one it came from."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from qcompiler.calibration.samples import Samples, open_samples
from qcompiler.calibration.stored_past import StoredPasts
from qcompiler.errors import DataError, ModelError
from qcompiler.evaluation.difference import Difference
from qcompiler.evaluation.likelihood import Divergence, Likelihood
from qcompiler.graph import files as model_io
from qcompiler.graph.model_folder import tokenizer_beside
from qcompiler.graph.model_inputs import PAST, Signature
from qcompiler.progress import progress_bar
from qcompiler.sessions.decoder import Decoder, logits_output
from qcompiler.sessions.runtime import load_session, one_line

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import onnxruntime


@dataclass(frozen=True)
class Steps:
    """How a text is read through the cache: the first `prefill` tokens at once (default: one chunk), then chunks."""

    chunk: int = 1
    prefill: int | None = None


@dataclass(frozen=True)
class Evaluation:
    """Figures of a language model on a text; those from `reference_perplexity` on need a reference.

    Perplexity is exp(mean negative log-likelihood of each token but the first of a window). What compares two models is
    paired: both read the same tokens, which shows differences far smaller than two perplexities do.
    """

    samples: int
    tokens: int
    """Tokens that were predicted."""
    nll: float
    """Mean negative log-likelihood per predicted token, in nats."""
    perplexity: float
    reference_perplexity: float | None = None
    perplexity_ratio: float | None = None
    kl: float | None = None
    """Mean KL(reference ‖ model) per token, in nats."""
    top1: float | None = None
    """Share of tokens, 0 to 1, where both models find the same next token likeliest."""
    cosine: float | None = None
    """Of all logits as one vector."""
    sqnr_db: float | None = None
    """Signal-to-noise ratio of the logits."""

    def to_dict(self) -> dict[str, float]:
        return {name: value for name, value in asdict(self).items() if value is not None}


def evaluate(
    model: str | Path,
    data: str | Samples,
    *,
    reference: str | Path | None = None,
    tokenizer: str | Path | None = None,
    sequence_length: int | None = None,
    limit: int | None = None,
    decode: Steps | None = None,
    threads: int | None = None,
    providers: Sequence[str] | None = None,
    progress: bool = False,
) -> Evaluation:
    """Run a language model (.onnx or its folder), as onnxruntime runs it, over data.

    `data` is a SPEC (see `samples`) or Samples opened for this model. A text is read whole, in windows of
    `sequence_length` tokens that follow one another; `limit` stops after so many. Windows are independent: caches start
    empty. With `reference`, another model with the same vocabulary, both are run on the same samples. With `decode`,
    both read each row in steps, through their caches, so that what a quantized cache loses is in the figures.

    Raises ModelError where a model cannot be run or gives no logits, DataError where the data does not fit.
    """
    subject = _Runner(model, threads, providers, decode)
    other = None if reference is None else _Runner(reference, threads, providers, decode)
    samples = data
    if isinstance(samples, str):
        samples = open_samples(
            samples, model=subject.model, tokenizer=Path(tokenizer) if tokenizer else tokenizer_beside(model),
            limit=limit, sequence_length=sequence_length, contiguous=True,
        )  # fmt: skip
    elif limit is not None:
        samples = samples.part(0, limit)
    likelihood, baseline = Likelihood(), Likelihood()
    divergence, difference = Divergence(), Difference()
    count = 0
    with progress_bar("evaluating", progress) as report:
        for index, sample in enumerate(samples):
            count += 1
            logits = subject.logits(sample, index)
            ids, mask = subject.tokens(sample, logits, index)
            likelihood.update(logits, ids, mask)
            if other is not None:
                expected = other.logits(sample, index)
                if expected.shape != logits.shape:
                    raise ModelError(
                        f"the logits have the shape {list(logits.shape)}, and the reference's {list(expected.shape)}: "
                        "the models have different vocabularies, or one gives the last token's logits only"
                    )
                baseline.update(expected, ids, mask)
                divergence.update(expected, logits, mask)
                difference.update(expected, logits)
            if report is not None:
                report(count, samples.count)
    if likelihood.tokens == 0:
        raise DataError(f"{samples.description} has no sample of two tokens or more, so nothing is predicted")
    figures = Evaluation(count, likelihood.tokens, likelihood.nll, likelihood.perplexity)
    if other is None:
        return figures
    return Evaluation(
        figures.samples, figures.tokens, figures.nll, figures.perplexity,
        reference_perplexity=baseline.perplexity, perplexity_ratio=float(np.exp(likelihood.nll - baseline.nll)),
        kl=divergence.kl, top1=divergence.top1, cosine=difference.cosine, sqnr_db=difference.sqnr_db,
    )  # fmt: skip


class _Runner:
    """A language model, open in onnxruntime."""

    def __init__(
        self, path: str | Path, threads: int | None, providers: Sequence[str] | None, steps: Steps | None
    ) -> None:
        self.path = path
        self.model = model_io.load(path)
        self._signature, self._pasts = Signature(self.model), StoredPasts(self.model)
        try:
            self._tokens = self._signature.token_input()
        except DataError as error:
            raise ModelError(
                f"{path} is no language model, as no single input takes token ids; how close a compiled model of "
                "another kind is to its float model stands in the report.json that `compile --calibration` writes"
            ) from error
        self._logits = logits_output(self.model, path)
        self._steps = steps
        self._decoder: Decoder | None = None
        if steps is not None:
            self._decoder = Decoder(path, threads=threads, providers=providers)
            self._session: onnxruntime.InferenceSession = self._decoder.session
        else:
            self._session = load_session(path, threads=threads, providers=providers)

    def logits(self, sample: Mapping[str, np.ndarray], index: int) -> np.ndarray:
        """[batch, sequence, vocabulary]"""
        if self._decoder is not None and self._steps is not None:
            return self._decoded(self._decoder, self._steps, sample, index)
        feed = self._signature.adopt(self._pasts.encode(sample), f"sample {index}")
        try:
            found = self._session.run([self._logits], feed)[0]
        except Exception as error:  # onnxruntime's errors share no base class
            raise DataError(f"sample {index} does not go through {self.path}: {one_line(error)}") from error
        return np.asarray(found)

    def _decoded(self, decoder: Decoder, steps: Steps, sample: Mapping[str, np.ndarray], index: int) -> np.ndarray:
        """Row by row, without its padding, where the logits are 0: so rows need no padding that suits the cache."""
        ids = np.atleast_2d(sample[self._tokens])
        past = next((name for name, array in sample.items() if PAST.match(name) and array.size), None)
        if past is not None:
            raise DataError(
                f"sample {index} has a past of its own ({past!r}); decoding begins with an empty one, so leave it out"
            )
        mask = sample.get("attention_mask")
        known = np.ones(ids.shape, bool) if mask is None or mask.shape != ids.shape else mask.astype(bool)
        rows = [
            decoder.read(row[counts], prefill=steps.prefill or steps.chunk, chunk=steps.chunk)
            for row, counts in zip(ids, known, strict=True)
        ]
        logits = np.zeros((*ids.shape, rows[0].shape[-1]), np.float32)
        for place, counts, row in zip(logits, known, rows, strict=True):
            place[counts] = row
        return logits

    def tokens(
        self, sample: Mapping[str, np.ndarray], logits: np.ndarray, index: int
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """The ids that the logits are for, and the attention mask where it is of the same shape."""
        ids, mask = sample[self._tokens], sample.get("attention_mask")
        if logits.ndim != 3 or logits.shape[:2] != ids.shape:
            raise ModelError(
                f"{self.path} gives logits of the shape {list(logits.shape)} for ids of the shape {list(ids.shape)} "
                f"(sample {index}); evaluation needs logits for every token, [batch, sequence, vocabulary]"
            )
        return ids, mask if mask is not None and mask.shape == ids.shape else None
