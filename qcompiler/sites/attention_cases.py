"""Small inputs that a decoder's masks are tried on: the length of past and new tokens, and padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from qcompiler.graph.model_inputs import Input


@dataclass(frozen=True)
class MaskCase:
    """A run: `kept` is attention_mask [batch, past + new]."""

    past: int
    kept: np.ndarray
    positions: np.ndarray

    @property
    def batch(self) -> int:
        return int(self.kept.shape[0])

    @property
    def new(self) -> int:
        return int(self.kept.shape[1]) - self.past

    @property
    def visible(self) -> np.ndarray:
        """[batch, new, past + new]: what each query should see; queries that are padded see what they like."""
        total = self.kept.shape[1]
        causal = np.arange(total)[None] <= (self.past + np.arange(self.new))[:, None]
        seen: np.ndarray = causal[None] & (self.kept != 0)[:, None]
        return seen

    @property
    def real(self) -> np.ndarray:
        """[batch, new]: which queries count."""
        counted: np.ndarray = self.kept[:, self.past :] != 0
        return counted


def mask_cases(ids: Input, padded: bool) -> Iterator[MaskCase]:
    batch, new = (ids.dims or (None, None))[:2]
    for past, count in ((0, 5), (4, 1), (4, 3)):
        count = new if isinstance(new, int) else count
        total = past + count
        rows = [np.ones(total, np.int64)]
        if padded:
            left, right = rows[0].copy(), rows[0].copy()
            left[:2] = 0
            right[slice(2, past) if past else slice(max(1, total - 2), total)] = 0
            rows += [left, right] if total > 2 else []
        yield from _stacked(past, rows, batch)


def far_cases(ids: Input, numbers: Sequence[int], padded: bool) -> Iterator[MaskCase]:
    batch = (ids.dims or (None,))[0]
    for number in numbers:
        yield from _stacked(2 * number + 2, [np.ones(2 * number + 3, np.int64)], batch)


def _stacked(past: int, rows: Sequence[np.ndarray], batch: object) -> Iterator[MaskCase]:
    """The rows in batches of a fixed size where the model has one, each with both customs of counting positions."""
    size = batch if isinstance(batch, int) else len(rows)
    for start in range(0, len(rows), size):
        kept = np.stack([rows[min(start + index, len(rows) - 1)] for index in range(size)])
        counted = np.tile(np.arange(kept.shape[1]), (size, 1))
        after_padding = np.maximum(np.cumsum(kept, axis=1) - 1, 0)
        yield MaskCase(past, kept, counted[:, past:])
        if not np.array_equal(counted, after_padding):
            yield MaskCase(past, kept, after_padding[:, past:])
