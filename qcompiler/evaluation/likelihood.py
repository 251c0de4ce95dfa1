"""How well logits predict tokens, and how far two models' predictions are apart, summed up sample by sample."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

ELEMENTS_AT_ONCE = 1 << 20
"""Logits turned into float64 at once, which bounds the memory whatever the vocabulary."""


@dataclass
class Likelihood:
    """Negative log-likelihood of the tokens that follow, in nats."""

    tokens: int = 0
    nll_sum: float = 0.0

    def update(self, logits: np.ndarray, ids: np.ndarray, mask: np.ndarray | None = None) -> None:
        """Logits [batch, sequence, vocabulary] for ids [batch, sequence]; positions with mask 0 are left out."""
        known = np.ones(ids.shape, bool) if mask is None else mask.astype(bool)
        predicted = known[:, :-1] & known[:, 1:]
        for batch, places in _pieces(predicted, logits.shape[-1]):
            part = log_softmax(logits[batch, places])
            self.nll_sum -= float(part[np.arange(len(part)), ids[batch, places + 1]].sum())
        self.tokens += int(predicted.sum())

    @property
    def nll(self) -> float:
        """Mean per predicted token, in nats; NaN where no token was predicted."""
        return self.nll_sum / self.tokens if self.tokens else math.nan

    @property
    def perplexity(self) -> float:
        return float(np.exp(self.nll))


@dataclass
class Divergence:
    """KL divergence of a model's next-token distributions from a reference's, and agreement on the likeliest token."""

    positions: int = 0
    kl_sum: float = 0.0
    agreed: int = 0

    def update(self, reference: np.ndarray, candidate: np.ndarray, mask: np.ndarray | None = None) -> None:
        """Logits [batch, sequence, vocabulary] of both models; positions with mask 0 are left out."""
        known = np.ones(reference.shape[:2], bool) if mask is None else mask.astype(bool)
        for batch, places in _pieces(known, reference.shape[-1]):
            p, q = (log_softmax(logits[batch, places]) for logits in (reference, candidate))
            possible = p > -np.inf  # what the reference gives no probability adds nothing, whatever the other says
            self.kl_sum += float(np.exp(p[possible]) @ (p[possible] - q[possible]))
            self.agreed += int((p.argmax(-1) == q.argmax(-1)).sum())
        self.positions += int(known.sum())

    @property
    def kl(self) -> float:
        """Mean KL(reference ‖ candidate) per position, in nats."""
        return self.kl_sum / self.positions if self.positions else math.nan

    @property
    def top1(self) -> float:
        """Share of positions, 0 to 1, where both find the same token likeliest."""
        return self.agreed / self.positions if self.positions else math.nan


def _pieces(positions: np.ndarray, vocabulary: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The indices of positions that are set [batch, sequence], as many at once as memory allows."""
    batch, places = np.nonzero(positions)
    step = max(1, ELEMENTS_AT_ONCE // max(1, vocabulary))
    for start in range(0, len(batch), step):
        yield batch[start : start + step], places[start : start + step]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Logarithms of the probabilities along the last axis, in float64."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(-1, keepdims=True))
    return shifted
