"""Sites: what passes work on, and the patterns that name them. `find.py` finds them."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import regex

from qcompiler.errors import RecipeError

if TYPE_CHECKING:
    from qcompiler.sites.activations import Activation

PATIENCE = 1.0  # seconds for one pattern and one name


@dataclass(frozen=True, eq=False)
class Site:
    """Something that passes work on, found in the graph. `name` is the name of `node` and is unique in the graph."""

    node: ir.Node
    name: str
    module_path: str
    """What a person calls the layer, e.g. ``model.layers.0.mlp.down_proj``; falls back to the node name."""
    block: str
    """The decoder block that the site belongs to, e.g. ``model.layers.0``; empty where there is none."""


@dataclass(frozen=True, eq=False)
class Linear(Site):
    """y = x W + b, as MatMul, Gemm (alpha = beta = 1, no transA) or com.microsoft FusedMatMul, quantized or not.

    The weight is followed upward through Transpose and DequantizeLinear to the constant that holds it, so that a site
    looks the same before and after its weight was quantized, and tied weights (a Transpose of the embedding) are seen.
    Where both are there, the Transpose reads the DequantizeLinear, whose axis thus counts on the constant.
    """

    input: ir.Value
    """The activation that the node reads, [..., K] (for Gemm [M, K])."""
    weight: ir.Value
    """The constant: float, or integer codes where `dequantize` is set."""
    transposed: bool
    """True where the constant holds [N, K] (Gemm with transB, or through a Transpose), False for [K, N]."""
    dequantize: ir.Node | None
    """The DequantizeLinear that reads `weight`, once the weight is quantized."""
    transpose: ir.Node | None
    """A Transpose between the weight and the node (tied embeddings)."""
    bias: ir.Value | None
    """A constant of N numbers ([N], [1, N] …) added to the product: third input of Gemm, or the Add that follows."""
    bias_node: ir.Node | None
    """That Add, or None (Gemm's own bias, or no bias)."""
    in_features: int
    out_features: int
    activation: Activation
    """What `input` is: float, or quantized with constant scales, or with scales found while the model runs."""

    @property
    def output(self) -> ir.Value:
        """The value after the bias, which keeps its name whatever a pass does to the site."""
        return (self.bias_node or self.node).outputs[0]

    @property
    def channel_axis(self) -> int:
        """The axis of the constant that holds output channels."""
        return 0 if self.transposed else 1


@dataclass(frozen=True, eq=False)
class Convolution(Site):
    """Conv with a constant weight [out, in / groups, *kernel]."""

    input: ir.Value
    weight: ir.Value
    dequantize: ir.Node | None
    bias: ir.Value | None
    activation: Activation
    """As of a linear layer."""

    @property
    def output(self) -> ir.Value:
        return self.node.outputs[0]

    @property
    def channel_axis(self) -> int:
        return 0


@dataclass(frozen=True, eq=False)
class Embedding(Site):
    """Gather of rows of a constant float table by computed ids, in any of the forms that a tied embedding takes.

    Tables of rotary angles and tables read at constant places are none.
    """

    table: ir.Value
    """The constant [rows, features]; [features, rows] where `transposed`."""
    ids: ir.Value
    transposed: bool
    """True where the Gather reads a Transpose of the constant (tied to a lm_head that keeps [features, rows])."""
    transpose: ir.Node | None

    @property
    def output(self) -> ir.Value:
        return self.node.outputs[0]

    @property
    def channel_axis(self) -> int:
        """The axis of the constant along which rows lie; each row gets its own scale."""
        return 1 if self.transposed else 0


@dataclass(frozen=True, eq=False)
class Unsupported(Site):
    """A node that multiplies by a constant matrix in a form that no pass handles; `reason` says which."""

    reason: str


@dataclass(frozen=True, eq=False)
class Factor:
    """A linear layer whose output channels, divided by anything positive, divide a value further on and nothing else.

    Between the two stand nodes that are homogeneous in the layer's output: x = a ⊙ (v W + b), x = softmax(…) (v W + b).
    Dividing column c of W, and b_c, by s_c divides each channel j of x by s of `channels[j]`.
    """

    linear: Linear
    channels: npt.NDArray[np.int64]
    """[K]: the output channel of `linear` that each channel of the value comes from. With grouped queries several come
    from one, as many as query heads share a head of keys and values."""
    through_attention: bool
    """Whether the value is attention's output; else only elementwise nodes stand between."""


@dataclass(frozen=True, eq=False)
class NormGroup(Site):
    """A value that a vector of gains scales, and the linear layers that read it: x = n * gain (+ bias), y_i = x W_i.

    `node` writes the value: LayerNormalization, RMSNormalization, SimplifiedLayerNormalization,
    Skip(Simplified)LayerNormalization, or the last Mul (or Add) of a norm that the exporter decomposed.
    """

    output: ir.Value
    """The value that the linear layers read, [..., K]."""
    gains: tuple[tuple[ir.Node, int], ...]
    """(node, input index) of every constant of K numbers to divide so that `output` is divided: gain, and bias where
    there is one. Empty where nothing can be folded into the producer (`linear_groups_of` alone lists such groups)."""
    linears: tuple[Linear, ...]
    others: tuple[ir.Node, ...]
    """Readers of the value that are no linear layers; while there are any, nothing can be folded."""
    factor: Factor | None = None
    """The linear layer to fold into where there are no gains (a gated MLP's up_proj, attention's v_proj), or None."""
    refusal: str = ""
    """Why attention's v_proj cannot take a factor; empty where it can, or where no attention is near."""


@dataclass(frozen=True)
class Sites:
    """What `find_sites` found, in graph order; each kind is also at hand alone."""

    all: tuple[Site, ...]

    def __iter__(self) -> Iterator[Site]:
        return iter(self.all)

    def __len__(self) -> int:
        return len(self.all)

    @property
    def linears(self) -> tuple[Linear, ...]:
        return tuple(site for site in self.all if isinstance(site, Linear))

    @property
    def convolutions(self) -> tuple[Convolution, ...]:
        return tuple(site for site in self.all if isinstance(site, Convolution))

    @property
    def embeddings(self) -> tuple[Embedding, ...]:
        return tuple(site for site in self.all if isinstance(site, Embedding))

    @property
    def unsupported(self) -> tuple[Unsupported, ...]:
        return tuple(site for site in self.all if isinstance(site, Unsupported))


def matches(pattern: str, site: Site) -> bool:
    """Whether a pattern (exact, glob, or ``re:`` + a regular expression searched for) names the site.

    It is held against the module path and against the name of the node; one is enough.
    """
    names = (site.module_path, site.name)
    if pattern.startswith("re:"):
        return any(searched(pattern, name) for name in names)
    return pattern in names or any(fnmatchcase(name, pattern) for name in names)


def check_patterns(patterns: Iterable[str], sites: Iterable[Site]) -> None:
    """Raise RecipeError for a pattern that names none of the sites: it is most likely misspelt."""
    known = list(sites)
    for pattern in patterns:
        if any(matches(pattern, site) for site in known):
            continue
        names = dict.fromkeys(name for site in known for name in (site.module_path, site.name))
        close = difflib.get_close_matches(pattern.removeprefix("re:"), names, n=3, cutoff=0.4)
        hint = f"the closest names are {', '.join(close)}" if close else _some(list(names))
        raise RecipeError(f"the pattern {pattern!r} matches no layer of the model; {hint}")


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:4])
    return (
        f"its layers are called {shown}{', …' if len(names) > 4 else ''}" if names else "it has no layers to quantize"
    )


def searched(pattern: str, name: str) -> bool:
    """Whether a pattern ``re:…`` is found in a name. RecipeError where it is none, or backtracks without end."""
    try:
        return _compiled(pattern).search(name, timeout=PATIENCE) is not None
    except TimeoutError as error:
        raise RecipeError(
            f"the pattern {pattern!r} is still undecided about {name!r} after {PATIENCE:g} s; "
            "write it without repeats of repeats"
        ) from error


@functools.cache
def _compiled(pattern: str) -> regex.Pattern[str]:
    try:
        return regex.compile(pattern.removeprefix("re:"))
    except (regex.error, RecursionError) as error:
        raise RecipeError(f"the pattern {pattern!r} is no valid regular expression: {error}") from error
