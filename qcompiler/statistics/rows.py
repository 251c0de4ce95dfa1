"""What a row (a token) counts for: relative errors are told and minimised as means over tokens.

Real decoders hold numbers a thousand times larger than all others at the first token of a text. In a sum over tokens
that one decides, and the others may be lost without a word; a mean of relative errors gives each token the same say.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

FAINT = 1e-3
"""Rows with less than this share of the median row's energy are judged as if they had that much: 30 dB below what is
usual, an error says little, and next to a row of zeros any error would be infinite."""
USUAL = 1.0
"""The same for the weights of tokens in a search."""


def judged_as(energies: npt.NDArray[np.float64], least: float = FAINT) -> npt.NDArray[np.float64]:
    """The energy that each row's error is held against: its own, or a share of the median for fainter ones [rows]."""
    alive = energies[energies > 0]
    floor = least * float(np.median(alive)) if alive.size else 0.0
    return np.maximum(energies, floor)


def token_weights(rows: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """1 / Σ x² of each row, by `judged_as`; 0 for a row of zeros [rows]."""
    return inverse(np.einsum("rc,rc->r", rows, rows, dtype=np.float64))


def inverse(energies: npt.NDArray[np.float64], least: float = FAINT) -> npt.NDArray[np.float64]:
    """1 / energy of each row, by `judged_as`; 0 for one of zeros [rows]."""
    alive = energies > 0
    return np.where(alive, 1 / np.where(alive, judged_as(energies, least), 1.0), 0.0)


@dataclass
class Typical:
    """What is usual in each channel, (mean √|x|)²: one token with a number of thousands hardly moves it."""

    total: npt.NDArray[np.float64] | None = None
    """Σ √|x| [channels]."""
    count: int = 0

    def update(self, rows: npt.NDArray[Any]) -> None:
        found = np.sqrt(np.abs(rows)).sum(0, dtype=np.float64)
        self.total = found if self.total is None else self.total + found
        self.count += len(rows)

    def weights(self, rows: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        """1 / Σ (x / usual)² of each row of the louder half: a channel that is always loud has no more say than others.

        The quieter half counts alike, as in a sum over tokens: what a search minimises is an error that adds up.
        """
        assert self.total is not None
        usual = np.square(np.square(self.total / self.count))
        energies = np.square(rows, dtype=np.float64) @ np.where(usual > 0, 1 / np.where(usual > 0, usual, 1.0), 0.0)
        return inverse(energies, USUAL)
