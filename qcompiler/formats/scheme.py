"""Number formats, granularities, and the scheme that joins them: what a tensor is to be quantized to.

    Scheme.from_options("int4", "group", group_size=128)            int4 group(128) symmetric
    Scheme(format="uint8", granularity=PerTensor(), symmetric=False)  uint8 per-tensor asymmetric
    Scheme("fp4", PerGroup(32), scale_type="e8m0")                  fp4 group(32) symmetric, scales e8m0
    Scheme("nf4", PerGroup(64), scales=Scheme("int8", PerGroup(256)))
                                                                    nf4 group(64) symmetric, scales int8 group(256)

Everything here is data: how numbers are rounded to a scheme is the business of `arithmetic.py` and `search.py`.

A scheme is what the numbers are, however their codes are stored: 128 may be added to int8 codes and their zero point,
and 3 bits may lie in 4. So symmetric integers go by the name of the signed format, others by that of the unsigned one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Any, Literal

import ml_dtypes
import numpy as np

from qcompiler.errors import SchemeError
from qcompiler.formats.codebooks import CODEBOOKS


@dataclass(frozen=True)
class NumberFormat:
    """One number format: what its codes are, how they are held in numpy, and how ONNX stores them.

    `qmin` and `qmax` bound the codes of an integer format, and the representable values of a float format.
    `symmetric_divisor` is what a symmetric scale is made with, `scale = absmax / symmetric_divisor`:

    - 8 bits and more use the *restricted* range: ±absmax is ±127 in int8, the divisor is 127. One code of 256 costs
      nothing. (Code -128 is met only where a range is chosen narrower than the values, which then saturate.)
    - 4 bits and fewer use the *full* range, as one code of 16 is worth having: int4 codes are -8..7, the divisor is
      (7 - -8) / 2 = 7.5. A value at +absmax is rounded to 8 and saturates at 7: half a step of error, never more.
      (A search for the least error may take a negative scale, which gives the code -8 to the larger end.)
    - Unsigned formats are the signed ones moved up by `middle`: symmetric uint8 has zero point 128, codes 1..255.
    - The float formats map absmax to their largest value, nf4 and fp4_bnb to 1, binary's scale is the code's magnitude.
    """

    name: str
    bits: int
    kind: Literal["integer", "float", "codebook", "sign"]
    signed: bool
    qmin: float
    qmax: float
    symmetric_divisor: float
    storage: str  # the name of the ONNX data type that holds the codes, the narrowest: INT4 of 3 bits
    dtype: np.dtype[Any]  # the numpy dtype of the codes: one element a code, never packed

    @property
    def middle(self) -> int:
        """The zero point of a symmetric scheme: 0 when signed, else half the number of codes (uint8: 128)."""
        return 0 if self.signed else 2 ** (self.bits - 1)


def _integer(bits: int, signed: bool) -> NumberFormat:
    name = f"{'int' if signed else 'uint'}{bits}"
    qmin, qmax = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    divisor = (2**bits - 1) / 2 if bits < 8 else 2 ** (bits - 1) - 1
    storage = f"{'' if signed else 'U'}INT{_container(bits)}"
    dtype = np.dtype(f"{'int' if signed else 'uint'}{max(bits, 8)}")
    return NumberFormat(name, bits, "integer", signed, qmin, qmax, divisor, storage, dtype)


def _codebook(name: str, entries: int) -> NumberFormat:
    bits = math.ceil(math.log2(entries))
    storage = f"UINT{_container(bits)}"
    return NumberFormat(name, bits, "codebook", True, 0, entries - 1, 1.0, storage, np.dtype(np.uint8))


def _container(bits: int) -> int:
    """The bits of the narrowest integer type of ONNX that holds so many."""
    return next(size for size in (2, 4, 8, 16, 32) if size >= bits)


def _float(name: str, bits: int, largest: float, storage: str, dtype: Any) -> NumberFormat:
    return NumberFormat(name, bits, "float", True, -largest, largest, largest, storage, np.dtype(dtype))


FORMATS: dict[str, NumberFormat] = {
    number_format.name: number_format
    for number_format in (
        *(_integer(bits, signed) for bits in (2, 3, 4, 8, 16) for signed in (True, False)),
        _integer(32, True),  # biases: no search, no zero point
        _float("fp8_e4m3", 8, 448.0, "FLOAT8E4M3FN", ml_dtypes.float8_e4m3fn),
        _float("fp8_e5m2", 8, 57344.0, "FLOAT8E5M2", ml_dtypes.float8_e5m2),
        _float("fp4", 4, 6.0, "FLOAT4E2M1", ml_dtypes.float4_e2m1fn),
        # Codes are indices into a table of codebooks.py, whose ends are -1 and 1. fp4_bnb is bitsandbytes' fp4.
        *(_codebook(name, len(codebook.table)) for name, codebook in CODEBOOKS.items()),
        # Codes are -1 and 1. ONNX has no signed type below two bits; `functions/binary.py` stores them in one.
        NumberFormat("binary", 1, "sign", True, -1, 1, 1.0, "INT2", np.dtype(np.int8)),
    )
}


@dataclass(frozen=True)
class PerTensor:
    """One scale for the whole tensor: x [8, 64] has a scale of shape []."""

    kind: Literal["tensor"] = field(default="tensor", kw_only=True, repr=False)

    def __str__(self) -> str:
        return "per-tensor"


@dataclass(frozen=True)
class PerChannel:
    """One scale for each output channel: a weight [out 8, in 64] has scales [8]."""

    kind: Literal["channel"] = field(default="channel", kw_only=True, repr=False)

    def __str__(self) -> str:
        return "per-channel"


@dataclass(frozen=True)
class PerToken:
    """One scale for each row of an activation, found at run time: x [2, 10, 64] has scales [2, 10, 1]."""

    kind: Literal["token"] = field(default="token", kw_only=True, repr=False)

    def __str__(self) -> str:
        return "per-token"


@dataclass(frozen=True)
class PerGroup:
    """One scale for each `size` values along the reduction axis: a weight [out 8, in 64] in groups of 16 has [8, 4].

    The last group of a channel may be shorter: [8, 70] in groups of 16 has scales [8, 5].
    """

    size: int
    kind: Literal["group"] = field(default="group", kw_only=True, repr=False)

    def __str__(self) -> str:
        return f"group({self.size})"


@dataclass(frozen=True)
class PerBlock:
    """One scale for each tile of `rows` output channels × `columns` inputs: [256, 512] in 128 × 128 has 2 · 4."""

    rows: int
    columns: int
    kind: Literal["block"] = field(default="block", kw_only=True, repr=False)

    def __str__(self) -> str:
        return f"block({self.rows}×{self.columns})"


@dataclass(frozen=True)
class UnknownGranularity:
    """Scales that lie in no way that has a name, or are not constants: in models that other tools wrote."""

    kind: Literal["unknown"] = field(default="unknown", kw_only=True, repr=False)

    def __str__(self) -> str:
        return ""


Granularity = PerTensor | PerChannel | PerToken | PerGroup | PerBlock | UnknownGranularity

GRANULARITIES = ("tensor", "channel", "token", "group", "block")

ScaleType = Literal["", "float32", "float16", "e8m0", "e4m3"]


@dataclass(frozen=True)
class Scheme:
    """What a tensor is quantized to: number format × granularity × symmetric or not × static or dynamic.

    Raises `SchemeError` where the parts do not go together.
    """

    format: str
    granularity: Granularity
    symmetric: bool | None = True
    """None where it is not known, in models that other tools wrote."""
    dynamic: bool = False
    positive: bool = False
    """No scale may be negative (see `quantize.scale_and_zero_point`), because some runtimes take none that is."""
    scale_type: ScaleType = ""
    """What the scales are stored in; empty: the float type of the model."""
    scales: Scheme | None = None
    """What the scales themselves are quantized to, where there are two levels of them."""
    normalized: bool = False
    """Of a cache: every channel is put into -1 … 1 by its calibrated range first."""

    def __post_init__(self) -> None:
        number_format = find_format(self.format)
        if not isinstance(self.granularity, Granularity):
            raise SchemeError(
                f"a scheme's granularity is a PerTensor, PerChannel, PerToken, PerGroup or PerBlock, "
                f"not {self.granularity!r}."
            )
        _check_sizes(self.granularity)
        if self.symmetric is False and (number_format.kind != "integer" or number_format.name == "int32"):
            raise SchemeError(f"{self.format} has no zero point: make it symmetric, or choose an integer format.")
        if isinstance(self.granularity, PerToken) and not self.dynamic:
            raise SchemeError("per-token scales are only known at run time: set dynamic to true, or choose per-tensor.")
        if self.dynamic and isinstance(self.granularity, PerChannel | PerBlock):
            raise SchemeError(f"{self.granularity} scales cannot be dynamic: choose per-tensor, per-token or group.")
        if self.scale_type and self.scales is not None:
            raise SchemeError(f"scales are {self.scale_type} or quantized to {self.scales}: leave one of the two out.")
        if self.scales is not None and self.scales.scales is not None:
            raise SchemeError("scales have two levels at most: let those of the scales be floats.")

    @property
    def number_format(self) -> NumberFormat:
        return FORMATS[self.format]

    @property
    def numbers(self) -> Scheme:
        """The scheme without what only says how codes are stored and scales were chosen: equal for equal numbers."""
        name = self.format
        if self.symmetric is not None:  # others than integers are symmetric, and none begins with a u
            name = f"{'' if self.symmetric else 'u'}{name.removeprefix('u')}"
        scale_type: ScaleType = "" if self.scale_type.startswith("float") else self.scale_type
        return replace(self, format=name, positive=False, scale_type=scale_type)

    def over(self, features: int) -> Scheme:
        """The scheme where a layer has that many input features: a group that holds them all is a channel, or token.

        Groups of a codebook stay groups, because they run on over the ends of channels.
        """
        grain = self.granularity
        if isinstance(grain, PerGroup) and grain.size >= features and self.number_format.kind != "codebook":
            return replace(self, granularity=PerToken() if self.dynamic else PerChannel())
        return self

    def __str__(self) -> str:
        symmetry = {True: "symmetric", False: "asymmetric", None: ""}[self.symmetric]
        said = (self.numbers.format, str(self.granularity), symmetry, "dynamic" if self.dynamic else "")
        scales: str = self.numbers.scale_type
        if self.scales is not None:
            scales = f"{self.scales.numbers.format} {self.scales.granularity}".rstrip()
        return ", ".join(filter(None, (
            " ".join(filter(None, said)), f"scales {scales}" if scales else "",
            "channels normalized" if self.normalized else "",
        )))  # fmt: skip

    @classmethod
    def from_options(
        cls,
        format: str,
        granularity: str,
        group_size: int | None = None,
        symmetric: bool = True,
        dynamic: bool = False,
    ) -> Scheme:
        """The scheme that a pass's flat options name.

        `granularity` is tensor, channel, token, group or block; `group_size` is required by the last two (a block is
        `group_size` × `group_size`) and refused by the others. Raises `SchemeError`.
        """
        if granularity not in GRANULARITIES:
            raise SchemeError(f"granularity {granularity!r} is unknown: choose one of {', '.join(GRANULARITIES)}.")
        if granularity in ("group", "block"):
            if group_size is None:
                raise SchemeError(f"granularity {granularity} needs a group_size: 32, 64 and 128 are usual.")
            shape = PerGroup(group_size) if granularity == "group" else PerBlock(group_size, group_size)
            return cls(format, shape, symmetric, dynamic)
        if group_size is not None:
            raise SchemeError(
                f"group_size {group_size} has no meaning for granularity {granularity}: leave it out, or choose group."
            )
        plain: dict[str, Granularity] = {"tensor": PerTensor(), "channel": PerChannel(), "token": PerToken()}
        return cls(format, plain[granularity], symmetric, dynamic)


def in_words(weight: Scheme | None, activation: Scheme | None = None, cache: Scheme | None = None) -> str:
    """How a layer is quantized: ``int8 per-channel symmetric, activations uint8 per-tensor asymmetric``; or empty."""
    activations = f"activations {activation}" if activation is not None else ""
    return ", ".join(str(part) for part in (weight, cache, activations) if part)


def find_format(name: str) -> NumberFormat:
    """The number format called `name`; raises `SchemeError` with the closest names where there is none."""
    if name in FORMATS:
        return FORMATS[name]
    close = get_close_matches(str(name), FORMATS, n=3) or list(FORMATS)
    raise SchemeError(f"number format {name!r} is unknown: did you mean {' or '.join(close)}?")


def _check_sizes(granularity: Granularity) -> None:
    sizes: tuple[int, ...] = ()
    if isinstance(granularity, PerGroup):
        sizes = (granularity.size,)
    elif isinstance(granularity, PerBlock):
        sizes = (granularity.rows, granularity.columns)
    for size in sizes:
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise SchemeError(f"the size of a group or block is a whole number of at least 1, not {size!r}.")
