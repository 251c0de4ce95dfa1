"""How well logits predict tokens, and how far two models' predictions are apart, summed up sample by sample."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

ROWS_AT_ONCE = 64
"""Positions turned into float64 distributions at once, which bounds the memory to 64 × vocabulary × 8 bytes."""


@dataclass
class Likelihood:
    """Negative log-likelihood of the tokens that follow, in nats."""

    tokens: int = 0
    nll_sum: float = 0.0

    def update(self, logits: np.ndarray, ids: np.ndarray, mask: np.ndarray | None = None) -> None:
        """Logits [batch, sequence, vocabulary] for ids [batch, sequence]; positions with mask 0 are left out."""
        known = np.ones(ids.shape, bool) if mask is None else mask.astype(bool)
        predicted = known[:, :-1] & known[:, 1:]
        rows, targets = logits[:, :-1][predicted], ids[:, 1:][predicted]
        for start in range(0, len(rows), ROWS_AT_ONCE):
            part = log_softmax(rows[start : start + ROWS_AT_ONCE])
            self.nll_sum -= float(part[np.arange(len(part)), targets[start : start + ROWS_AT_ONCE]].sum())
        self.tokens += len(rows)

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
        wanted, found = reference[known], candidate[known]
        for start in range(0, len(wanted), ROWS_AT_ONCE):
            p, q = (log_softmax(logits[start : start + ROWS_AT_ONCE]) for logits in (wanted, found))
            possible = p > -np.inf  # what the reference gives no probability adds nothing, whatever the other says
            self.kl_sum += float(np.exp(p[possible]) @ (p[possible] - q[possible]))
            self.agreed += int((p.argmax(-1) == q.argmax(-1)).sum())
        self.positions += len(wanted)

    @property
    def kl(self) -> float:
        """Mean KL(reference ‖ candidate) per position, in nats."""
        return self.kl_sum / self.positions if self.positions else math.nan

    @property
    def top1(self) -> float:
        """Share of positions, 0 to 1, where both find the same token likeliest."""
        return self.agreed / self.positions if self.positions else math.nan


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Logarithms of the probabilities along the last axis, in float64."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(-1, keepdims=True))
    return shifted


@dataclass
class Difference:
    """Element by element: signal-to-noise ratio, largest error, cosine; accumulated in float64."""

    signal: float = 0.0
    noise: float = 0.0
    product: float = 0.0
    other: float = 0.0
    largest: float = 0.0

    def update(self, reference: np.ndarray, candidate: np.ndarray) -> None:
        """Two arrays of one shape. Where both hold the same infinity they agree, and it counts for nothing."""
        a, b = reference.astype(np.float64).ravel(), candidate.astype(np.float64).ravel()
        infinite = np.isinf(a) & (a == b)
        if infinite.any():
            a, b = a[~infinite], b[~infinite]
        error = b - a
        self.signal += float(a @ a)
        self.other += float(b @ b)
        self.product += float(a @ b)
        self.noise += float(error @ error)
        if error.size:
            self.largest = float(np.maximum(self.largest, np.abs(error).max()))

    @property
    def sqnr_db(self) -> float:
        """10 log10(Σ reference² / Σ error²); infinite where there is no error, NaN where the candidate holds NaN."""
        if self.noise == 0:
            return math.inf
        if math.isnan(self.noise):
            return math.nan
        if self.signal == 0 or math.isinf(self.noise):
            return -math.inf
        return 10 * math.log10(self.signal / self.noise)

    @property
    def cosine(self) -> float:
        """Cosine of the angle between both, all elements taken as one vector; 1 where both are zero."""
        length = math.sqrt(self.signal) * math.sqrt(self.other)
        if length == 0:
            return 1.0 if self.signal == self.other else 0.0
        return self.product / length
