"""What a diagnosis says, as data."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from qcompiler.formats.scheme import Scheme
from qcompiler.recipes import Recipe

Cause = Literal["", "activations", "weights", "both", "cache"]


@dataclass(frozen=True)
class LayerDiagnosis:
    """The errors of one layer. Ratios are in dB, signal to noise; infinite where there is no error."""

    name: str
    module_path: str
    block: str
    op: str
    kernel: str
    """The operator that runs it in the quantized model."""
    weights: str
    """The scheme of its weight; empty where that is float."""
    activations: str
    """The scheme of its input; empty where that is float."""
    cache: str
    """The scheme of a KV-cache, which is diagnosed like a layer; empty for what is none."""
    alone_db: float
    """Of the layer's output where all others are float."""
    output_db: float | None
    """Of the model's outputs where this layer alone is quantized; None where that was not measured."""
    kl: float | None
    """The same for logits, in nats a token."""
    before_db: float
    """Of the layer's input in the quantized model."""
    accumulated_db: float
    """Of the layer's output in the quantized model."""
    added_db: float
    """How much of the ratio is lost from input to output there, on top of the noise of the median layer's input."""
    activation_share: float | None
    """The part of the error alone, 0 to 1, that comes from rounding the input."""
    channel_outliers: float | None
    """The input's loudest channel over its median one, by largest magnitude."""
    loud_channels: int | None
    """Channels that are at least 6 times as loud as the median one."""
    token_outliers: float | None
    """The same ratio of tokens."""
    weight_schemes: tuple[Scheme, ...] = ()
    """`weights` as data."""
    activation_schemes: tuple[Scheme, ...] = ()
    """`activations` as data."""
    cache_scheme: Scheme | None = None
    """`cache` as data."""

    @property
    def quantized(self) -> bool:
        return bool(self.weights or self.activations or self.cache)

    @property
    def cause(self) -> Cause:
        """Whether the input or the weight makes the error; empty where that is not known."""
        if self.cache:
            return "cache"
        if self.activation_share is None:
            return "weights" if self.weights and not self.activations else ""
        return "activations" if self.activation_share > 0.6 else "weights" if self.activation_share < 0.4 else "both"


@dataclass(frozen=True)
class Proposal:
    """What to change, and why."""

    text: str
    reason: str
    layers: tuple[str, ...] = ()
    """Module paths (or names) of the layers that it is about; empty where it is about all."""


@dataclass(frozen=True)
class Diagnosis:
    """Where the error of a quantized model comes from."""

    alone: tuple[LayerDiagnosis, ...]
    """The layers by what each does to the outputs, the worst first (by its own error where that was not measured)."""
    accumulated: tuple[LayerDiagnosis, ...]
    """The same layers by what each adds to the error that has piled up before it, the most first."""
    output_db: float
    """Of the model's outputs, all layers quantized."""
    kl: float | None
    caches_db: float | None
    """Of the model's outputs where all KV-caches are quantized and nothing else; None where that was not measured."""
    caches_kl: float | None
    samples: int
    effect_samples: int
    """On how many of them the effect on the outputs was measured."""
    unmatched: tuple[tuple[str, str], ...]
    """Layers of the float model that were not found in the quantized one, and why."""
    proposals: tuple[Proposal, ...]
    recipe: Recipe | None
    """The proposals as a recipe; None where there are none."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; layers in the order of `alone`, and `accumulated` as their names in its order."""
        return {
            "output_db": self.output_db,
            "kl": self.kl,
            "caches_db": self.caches_db,
            "caches_kl": self.caches_kl,
            "samples": self.samples,
            "effect_samples": self.effect_samples,
            "layers": [{**dataclasses.asdict(layer), "cause": layer.cause} for layer in self.alone],
            "accumulated": [layer.name for layer in self.accumulated],
            "unmatched": [{"name": name, "reason": reason} for name, reason in self.unmatched],
            "proposals": [dataclasses.asdict(proposal) for proposal in self.proposals],
            "recipe": self.recipe.to_dict() if self.recipe is not None else None,
        }
