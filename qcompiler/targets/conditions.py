"""The conditions under which a runtime takes a kernel, each once: for lowering passes, and for placement.

    obstacles("fpA_intB-4", call)       what does not hold, one clause each; empty where the kernel is taken
    call_of(node, session)              a node as its kernel sees it; `Call(…)` for one that is yet to be written

A target's file names conditions by their key here; one of a package of its own as `module:name`. A condition that looks
at what is not known (a size that depends on the input) counts as met.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from qcompiler.errors import TargetError, closest

if TYPE_CHECKING:
    import onnx_ir as ir


@dataclass(frozen=True)
class Operand:
    """An input as far as it is known."""

    type: str = ""
    """As kernel registries write it: float, float16, uint8; empty where it is not known."""
    shape: tuple[int | None, ...] | None = None


@dataclass(frozen=True)
class Call:
    """A node as its kernel sees it."""

    attributes: Mapping[str, Any] = field(default_factory=dict)
    inputs: Sequence[Operand | None] = ()
    session: Mapping[str, str] | None = None
    """Entries of the session's configuration; None where they are not known."""

    def input(self, index: int) -> Operand | None:
        return self.inputs[index] if index < len(self.inputs) else None


def call_of(node: ir.Node, session: Mapping[str, str] | None = None) -> Call:
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    return Call(attributes, [operand_of(value) for value in node.inputs], session)


def operand_of(value: ir.Value | None) -> Operand | None:
    if value is None:
        return None
    shape = value.shape
    sizes = None if shape is None else tuple(size if isinstance(size, int) else None for size in shape)
    return Operand(type_name(value), sizes)


def type_name(value: ir.Value | None) -> str:
    """A value's type as the registry writes it; empty where there is no value, or its type is not known."""
    return "" if value is None or value.name == "" else dtype_name(value.dtype)


def dtype_name(dtype: ir.DataType | None) -> str:
    import onnx  # here, so that listing targets is quick

    return "" if dtype is None else str(onnx.TensorProto.DataType.Name(dtype.value)).lower()


@dataclass(frozen=True)
class Condition:
    """What a kernel wants of a call."""

    text: str
    """As a clause: N is a multiple of 64."""
    look: Callable[[Call], object | None]
    """What it looks at; empty text where that is not given, None where it is not known."""
    holds: Callable[[Any], bool]
    broken: str
    """Why it does not hold, one clause about a layer, with {found} in it: N = {found} is no multiple of 64."""
    shows: bool = True
    """Whether what was found says more than that the condition does not hold."""
    source: str = ""
    """How it is known, where that is not how the rest of the kernel's rule is known."""
    subject: str = ""
    """What a size is of: K, N."""

    def unmet(self, call: Call) -> object | None:
        """What was found where that is not as wanted, else None."""
        found = self.look(call)
        return None if found is None or self.holds(found) else found

    def clause(self, found: object) -> str:
        """The condition, with what is there instead."""
        return f"{self.text} (here {found})" if self.shows and found != "" else self.text


def conditions(key: str) -> tuple[Condition, ...]:
    """Those of a kernel. Raises TargetError where there are none of this name."""
    if key in CONDITIONS:
        return CONDITIONS[key]
    module, _, name = key.partition(":")
    if not name:
        raise TargetError(
            f"there are no conditions {key!r}{closest(key, list(CONDITIONS))}; those of your own are module:name"
        )
    try:
        found = getattr(importlib.import_module(module), name)
    except Exception as error:
        raise TargetError(f"the conditions {key!r} cannot be imported: {type(error).__name__}: {error}") from error
    if not (isinstance(found, tuple) and all(isinstance(item, Condition) for item in found)):
        raise TargetError(f"{key!r} is no tuple of qcompiler.targets.conditions.Condition")
    return found


def obstacles(key: str, call: Call) -> list[str]:
    """Why a kernel does not take a call, one clause for each condition that does not hold."""
    return [condition.broken.format(found=found) for condition, found in unmet(key, call)]


def unmet(key: str, call: Call) -> list[tuple[Condition, object]]:
    """The conditions of a kernel that a call does not meet, each with what is there instead."""
    looked = [(condition, condition.unmet(call)) for condition in conditions(key)]
    return [(condition, found) for condition, found in looked if found is not None]


# ---------------------------------------------------------------------------------------------------- kinds of them


def attribute(name: str) -> Callable[[Call], object | None]:
    return lambda call: call.attributes.get(name, "")


def dimension(index: int, axis: int) -> Callable[[Call], object | None]:
    """The size of an input along an axis."""

    def look(call: Call) -> object | None:
        operand = call.input(index)
        shape = operand.shape if operand is not None else None
        return shape[axis] if shape is not None and axis < len(shape) else None

    return look


def multiple(name: str, step: int, look: Callable[[Call], object | None], source: str = "") -> Condition:
    return Condition(
        f"{name} is a multiple of {step}", look,
        # An attribute that is not given has a default, which is a multiple of all that is asked for here.
        lambda found: found == "" or found % step == 0, f"{name} = {{found}} is no multiple of {step}",
        source=source, subject=name,
    )  # fmt: skip


def typed(text: str, index: int, types: Sequence[str], broken: str) -> Condition:
    def look(call: Call) -> object | None:
        operand = call.input(index)
        return operand.type or None if operand is not None else None

    return Condition(text, look, lambda found: found in types, broken)


def absent(text: str, index: int, broken: str) -> Condition:
    return Condition(text, lambda call: call.input(index) is not None, lambda there: not there, broken, shows=False)


# ---------------------------------------------------------------------------------------------------- CUDA: fpA_intB


@dataclass(frozen=True)
class Fused:
    """What CUDA's fused kernel (fpA_intB) takes of weights of some bits, and how far the others get."""

    block: int
    outputs: int
    """The layer's outputs are a multiple of this."""
    tokens: int
    """From so many tokens on, the other kernels dequantize the whole weight."""


FUSED = {2: Fused(64, 128, 9), 4: Fused(32, 64, 17), 8: Fused(32, 32, 6)}
FUSED_FEATURES = 64
"""Inputs must be a multiple of this. ONNX Runtime 1.31 only checks that they are one of the block, and fails from 9
tokens on where they are not: "No valid fpA_intB MatMulNBits tactic"."""
FUSED_OPTION = "ep.cuda.fpa_intb_gemm"
HALF = ("float16", "bfloat16")


def _fused(fused: Fused, order: bool) -> tuple[Condition, ...]:
    """Of MatMulNBits: A, B, scales, zero points, order of features, bias. `order`: whether one is refused."""
    return (
        Condition(f"the session option {FUSED_OPTION} is 1",
                  lambda call: None if call.session is None else call.session.get(FUSED_OPTION, ""),
                  lambda found: found == "1", f"the session option {FUSED_OPTION} is not 1"),
        typed("activations have 16 bits", 0, HALF, "the model computes in {found}, not in 16 bits"),
        absent("there are no zero points", 3, "its codes have zero points"),
        *([absent("there is no order of input features (g_idx)", 4, "its input features have an order of their own")]
          if order else []),
        absent("the bias is an Add of its own", 5, "its bias is an input of the operator"),
        multiple("N", fused.outputs, attribute("N")),
        multiple("K", FUSED_FEATURES, attribute("K"),
                 "the provider run against stub CUDA libraries: it checks only that K is a multiple of the block, and "
                 'fails from 9 tokens on where K is no multiple of 64 ("No valid fpA_intB MatMulNBits tactic")'),
        Condition(f"blocks have {fused.block} inputs", attribute("block_size"), lambda found: found == fused.block,
                  f"its blocks are {{found}} wide, not {fused.block}"),
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------- the table

CODES = 16
"""What K and N of a float8 product, and K and the block of the weight-only kernel, have to be multiples of."""
UNPADDED = 32
"""K and N that are no multiple of it make the provider copy an operand into a padded one on every run."""


def _same_halves(pads: object) -> bool:
    sizes = list(pads) if isinstance(pads, tuple | list) else []
    return sizes[: len(sizes) // 2] == sizes[len(sizes) // 2 :]


CONDITIONS: dict[str, tuple[Condition, ...]] = {
    # ONNX Runtime, CPU
    "rounded-in-blocks": (
        Condition("accuracy_level is 4", attribute("accuracy_level"), lambda found: found == 4,
                  "its accuracy_level is {found}, not 4"),
    ),
    "unsigned-activations": (
        typed("activations are uint8", 0, ("uint8",), "its activation is {found}, not uint8"),
    ),
    # ONNX Runtime, CUDA
    **{f"fpA_intB-{bits}": _fused(fused, order=bits != 2) for bits, fused in FUSED.items()},
    "fp8-tensor-cores": (
        multiple("K", 64, dimension(1, 1)),
        Condition("K is 256 or more", dimension(1, 1), lambda found: found >= 256, "K = {found} is less than 256"),
        multiple("the block", 64, attribute("block_size")),
    ),
    "fp8-codes": (multiple("K", CODES, dimension(1, 1)), multiple("the block", CODES, attribute("block_size"))),
    "fp8-product": (multiple("K", CODES, dimension(1, 1)), multiple("N", CODES, dimension(1, 0))),
    "unpadded-int8": (multiple("K", UNPADDED, dimension(1, 0)), multiple("N", UNPADDED, dimension(1, 1))),
    "unblocked-scales": (
        Condition("scales are not blocked", attribute("block_size"), lambda found: found in ("", 0),
                  "its scales are in blocks of {found}"),
    ),
    "even-pads": (
        Condition("pads are given", attribute("auto_pad"), lambda found: found in ("", "NOTSET", "VALID"),
                  "its pads are {found}"),
        Condition("pads are the same on both sides", attribute("pads"), _same_halves, "its pads are {found}"),
    ),
}  # fmt: skip
"""By the key that a target's file uses."""
