"""Formats whose codes are indices into a table of numbers from -1 to 1, 16 in those that bitsandbytes has.

A weight is the entry of its code times the scale of its block, which is the block's largest magnitude.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, eq=False)
class Codebook:
    table: npt.NDArray[np.float32]
    """What each code stands for."""
    function: str
    """The name of the model-local function (domain `qcompiler`) that decodes it."""

    def encode(self, ratio: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
        """The codes of the nearest entries; halfway between two, of the lower one. Larger than 1 saturates."""
        codes, boundaries = self._ascending
        found: npt.NDArray[np.uint8] = codes[np.searchsorted(boundaries, ratio)]
        return found

    @cached_property
    def _ascending(self) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
        """The codes by what they stand for, one for each number, and what lies halfway between neighbours."""
        numbers, codes = np.unique(self.table, return_index=True)
        return codes.astype(np.uint8), ((numbers[1:] + numbers[:-1]) / 2).astype(np.float32)


# The 16 quantiles of a normal distribution, scaled to [-1, 1], zero among them
# (QLoRA, Dettmers et al. 2023, appendix E).
NF4_TABLE: npt.NDArray[np.float32] = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    dtype=np.float32,
)

# A sign bit, two bits of exponent and one of mantissa, divided by the largest; 0.0625 / 12 stands where the smallest
# subnormal would be. Code 8, minus zero, is never chosen.
_FP4_MAGNITUDES = np.array([0, 0.0625, 8, 12, 4, 6, 2, 3], np.float32) / np.float32(12)
FP4_TABLE: npt.NDArray[np.float32] = np.concatenate([_FP4_MAGNITUDES, -_FP4_MAGNITUDES])

CODEBOOKS: dict[str, Codebook] = {
    "nf4": Codebook(NF4_TABLE, "DequantizeNF4"),
    "fp4_bnb": Codebook(FP4_TABLE, "DequantizeFP4"),
}
