"""Which token comes next, by the logits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qcompiler.errors import DataError
from qcompiler.evaluation.likelihood import log_softmax


@dataclass(frozen=True)
class Sampling:
    """The likeliest token, or one drawn from those that are left.

    `temperature` 0 takes the likeliest; above, logits are divided by it, then the `top_k` likeliest tokens are kept
    (0: all), of these the likeliest that together reach the probability `top_p`, and one is drawn.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < np.inf:
            raise DataError(f"the temperature is {self.temperature}, and must be 0 (the likeliest token) or more")
        if self.top_k < 0:
            raise DataError(f"top_k is {self.top_k}, and must be 0 (all tokens) or more")
        if not 0 < self.top_p <= 1:
            raise DataError(f"top_p is {self.top_p}, and must be above 0 and at most 1")
        if self.temperature == 0 and (self.top_k or self.top_p < 1):
            raise DataError("top_k and top_p choose what is drawn from; give a temperature above 0 with them")

    def choose(self, logits: np.ndarray, generator: np.random.Generator) -> int:
        """A token by its logits [vocabulary]."""
        if self.temperature == 0:
            return int(logits.argmax())
        order = np.argsort(-logits, kind="stable")[: self.top_k or None]
        chances = np.exp(log_softmax(logits[order].astype(np.float64) / self.temperature))
        kept = np.cumsum(chances) - chances < self.top_p  # up to and with the one that reaches top_p
        chances = chances[kept]
        return int(generator.choice(order[kept], p=chances / chances.sum()))
