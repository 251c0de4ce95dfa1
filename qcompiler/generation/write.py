"""Writing on from prompts, greedily or by drawing, with a float or quantized cache.

    written = qcompiler.generate("out", [[17, 4, 99], [5]], max_new_tokens=40)
    written[0].ids

Several prompts are read as one batch, and each is continued as it would be alone. Where their lengths differ they are
padded as the model needs it: on the left for models that read position_ids, on the right for GroupQueryAttention (which
keeps each row's cache without gaps) and for models without a cache. A model that has a cache and counts positions by
itself cannot be padded: its prompts are taken together by equal length.

A model without a cache reads the whole text again for every token; a warning says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from qcompiler.errors import DataError, ModelError
from qcompiler.generation.sampling import Sampling
from qcompiler.graph.model_folder import companions_of
from qcompiler.sessions.decoder import Decoder

Finish = Literal["stop", "length", "context"]
OnToken = Callable[[int, int], bool | None]
"""Called with the prompt's number and the new token; True ends that prompt's text (the token is kept)."""


@dataclass(frozen=True)
class Generation:
    """What was written after one prompt."""

    prompt: tuple[int, ...]
    ids: tuple[int, ...]
    """The new tokens, with the one that ended the text."""
    finish: Finish
    """Why it ended: a stop token (or `on_token`), `max_new_tokens`, or the longest text that the model can read."""


def generate(
    model: str | Path | Decoder,
    prompt_ids: Sequence[int] | Sequence[Sequence[int]] | np.ndarray,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: Iterable[int] | None = None,
    on_token: OnToken | None = None,
    threads: int | None = None,
    providers: Sequence[str] | None = None,
    shared_buffer: bool = True,
) -> list[Generation]:
    """Continue prompts by at most `max_new_tokens` tokens each.

    `model` is a file, a folder, or a Decoder that is already open (then the last three options are the Decoder's own).
    `prompt_ids` is one prompt or several. `temperature` 0 takes the likeliest token, and above it tokens are drawn (see
    `Sampling`), with a generator of its own for each prompt. `stop` ends a text at these tokens; by default those that
    the configuration files beside the model name. `on_token` sees each token as it comes.

    Raises DataError for a prompt that is empty, too long or not of the vocabulary, and for options out of range;
    ModelError where the model cannot be run so.
    """
    sampling = Sampling(temperature, top_k, top_p)
    if max_new_tokens < 1:
        raise DataError(f"max_new_tokens is {max_new_tokens}, and must be 1 or more")
    if seed < 0:
        raise DataError(f"the seed is {seed}, and must be 0 or more")
    if not isinstance(model, Decoder):
        model = Decoder(model, threads=threads, providers=providers, shared_buffer=shared_buffer)
    beside = companions_of(model.path)
    context = min((size for size in (beside.context, model.positions) if size is not None), default=None)
    prompts = check_prompts(prompt_ids, model.vocabulary, context)
    rows = [
        _Row(number, prompt, np.random.default_rng([seed, number]), max_new_tokens, context)
        for number, prompt in enumerate(prompts)
    ]
    ends = frozenset(beside.stop if stop is None else stop)
    for group in _groups(rows, model):
        _write(model, group, sampling, ends, on_token)
    return [row.result() for row in rows]


def check_prompts(
    prompt_ids: Sequence[int] | Sequence[Sequence[int]] | np.ndarray, vocabulary: int | None, context: int | None
) -> list[tuple[int, ...]]:
    """One prompt or several, as several. Raises DataError (see `generate`)."""
    given = list(prompt_ids)
    if given and all(np.ndim(entry) == 0 for entry in given):
        given = [given]
    if not given:
        raise DataError("there is no prompt; give at least one")
    prompts = []
    for number, entry in enumerate(given, 1):
        ids = np.asarray(entry)
        if ids.size == 0:
            raise DataError(f"prompt {number} is empty; give at least one token")
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise DataError(f"prompt {number} must be a list of token ids, and holds {ids.dtype} of shape {ids.shape}")
        wrong = next((token for token in ids.tolist() if not 0 <= token < (vocabulary or np.inf)), None)
        if wrong is not None:
            raise DataError(
                f"prompt {number} holds the token id {wrong}, which the vocabulary of the model (0 to "
                f"{'…' if vocabulary is None else vocabulary - 1}) lacks; the tokenizer may belong to another model"
            )
        if context is not None and len(ids) >= context:
            raise DataError(
                f"prompt {number} has {len(ids)} tokens, and the model reads at most {context} with what it writes; "
                "shorten it"
            )
        prompts.append(tuple(ids.tolist()))
    return prompts


class _Row:
    """One prompt and what has been written after it."""

    def __init__(
        self, number: int, prompt: tuple[int, ...], generator: np.random.Generator, most: int, context: int | None
    ) -> None:
        self.number, self.prompt, self.generator = number, prompt, generator
        self.ids: list[int] = []
        self.finish: Finish | None = None
        room = most if context is None else context - len(prompt)
        self.most: int = min(most, room)
        self._limit: Finish = "length" if self.most == most else "context"

    def add(self, token: int, ended: bool) -> None:
        self.ids.append(token)
        if ended:
            self.finish = "stop"
        elif len(self.ids) == self.most:
            self.finish = self._limit

    def result(self) -> Generation:
        return Generation(self.prompt, tuple(self.ids), self.finish or self._limit)


def _groups(rows: list[_Row], decoder: Decoder) -> list[list[_Row]]:
    """The rows that can be read as one batch."""
    if decoder.padding != "none":
        return [rows]
    by_length: dict[int, list[_Row]] = {}
    for row in rows:
        by_length.setdefault(len(row.prompt), []).append(row)
    return list(by_length.values())


def _write(
    decoder: Decoder, rows: list[_Row], sampling: Sampling, ends: frozenset[int], on_token: OnToken | None
) -> None:
    longest = max(len(row.prompt) for row in rows)
    decoding = decoder.start(len(rows), longest + max(row.most for row in rows))
    ids = np.zeros((len(rows), longest), np.int64)
    known = np.zeros(ids.shape, bool)
    for index, row in enumerate(rows):
        size = len(row.prompt)
        place = slice(longest - size, longest) if decoder.padding == "left" else slice(0, size)
        ids[index, place], known[index, place] = row.prompt, True
    while True:
        logits = _last(decoding.feed(ids, known), known, decoder)
        for row, scores in zip(rows, logits, strict=True):
            if row.finish is not None:
                continue
            if np.isnan(scores).any():
                raise ModelError(
                    f"{decoder.path} gives NaN after {len(row.prompt) + len(row.ids)} tokens of prompt {row.number + 1}"
                )
            token = sampling.choose(scores, row.generator)
            told = on_token(row.number, token) if on_token is not None else None
            row.add(token, token in ends or told is True)
        if all(row.finish is not None for row in rows):
            return
        # A row that has ended stays in the batch, with a token that does not count.
        ids = np.array([row.ids[-1:] for row in rows])
        known = np.array([[row.finish is None] for row in rows])


def _last(logits: np.ndarray, known: np.ndarray, decoder: Decoder) -> np.ndarray:
    """Logits [batch, vocabulary] of each row's last token that counts."""
    if logits.shape[1] == known.shape[1]:
        at = np.where(known.any(1), known.shape[1] - 1 - known[:, ::-1].argmax(1), 0)
        return np.asarray(logits[np.arange(len(known)), at])
    if logits.shape[1] == 1 and known[:, -1].all():
        return np.asarray(logits[:, 0])
    raise ModelError(
        f"{decoder.path} gives logits of the shape {list(logits.shape)} for ids of the shape {list(known.shape)}; "
        "a model that gives those of the last token alone takes prompts of one length only"
    )
