"""What a recipe can set limits for: measures of the compiled model beside the float one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class GateKind:
    """What a gate measures: an entry of `Report.outputs`, and on which side of the limit is good."""

    metric: str
    better: Literal["higher", "lower"]
    unit: str
    text: str


GATES: dict[str, GateKind] = {
    "output_sqnr_db": GateKind("sqnr_db", "higher", "dB", "signal-to-noise ratio of the outputs"),
    "cosine": GateKind("cosine", "higher", "", "cosine similarity of the outputs"),
    "kl": GateKind("kl", "lower", "nats", "Kullback-Leibler divergence from the float model, per token"),
    "top1": GateKind("top1", "higher", "", "share of tokens where the most likely one is the same"),
    "perplexity_ratio": GateKind("perplexity_ratio", "lower", "", "perplexity over that of the float model"),
}
"""Measures that a recipe can set limits for. The worst output counts."""
