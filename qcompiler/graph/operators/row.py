"""What a row of the operator table says, and how a row is written.

    row(domain, "DequantizeLinear", "x:code x_scale:scale(x) x_zero_point:zero(x)", "y", "decodes elementwise")

Inputs and outputs are named as their schema names them, in its order. Behind a colon stands the role (none: data), in
brackets the operand that a scale, a zero point, a past or a present belongs to. `~` says that a float has the type that
the model computes in. What follows a `*` repeats as often as the node has inputs.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import onnx_ir as ir

Role = Literal[
    "data", "weight", "code", "scale", "zero", "offset", "bias", "gain", "shift", "query", "key", "value", "past",
    "present", "index", "mask", "setting", "statistic", "angle",
]  # fmt: skip
"""gain and shift: of a norm. setting: shapes, axes, lengths. offset: a float that is added to codes times their scale.
statistic: a mean or deviation, which stays float32. angle: cosines and sines."""

Trait = Literal[
    "moves",  # its output holds numbers of its inputs at other places, or in another type
    "whole",  # … each number of the first input
    "ordered",  # … in row-major order
    "picks",  # … those that an input tells by their index
    "joins",  # puts what is new into what is past, outside of an attention operator
    "elementwise",  # an element of the output depends on the elements at its place, and has their shape, broadcast
    "homogeneous",  # a positive factor of the first input is one of the output
    "bilinear",  # … and so is one of the second
    "product",  # multiplies matrices: sums of products
    "convolution",
    "rows",  # reads its weight as [outputs, inputs, …]
    "reduction",
    "accumulates",  # sums, or multiplies, along axes
    "attention",
    "norm",
    "measures",  # reads a shape, and no numbers
    "random",
    "quantizes",  # floats to codes
    "decodes",  # codes to floats
    "cache",  # a function on the codes of a KV-cache
    "rounds",  # rounds its float input by itself (MatMulNBits: where its accuracy level says so)
    "opaque",  # its codes lie in an order, or a form, that only its kernel knows
    "half",  # ONNX Runtime's own operator, which computes in 16 bits, too
    "typed",  # the attribute output_dtype tells the type of its result
    "propagates",  # ONNX Runtime's optimizer moves a QuantizeLinear up past it
]  # fmt: skip
TRAITS: frozenset[str] = frozenset(get_args(Trait))
ROLES: frozenset[str] = frozenset(get_args(Role))
_SLOT = re.compile(r"(?P<name>\w+)(?P<half>~?)(?::(?P<role>[a-z]+)(?:\((?P<of>\w+)\))?)?")


@dataclass(frozen=True)
class Slot:
    """An input or output of an operator."""

    name: str
    role: Role
    of: str = ""
    """The operand that a scale, zero point, past or present belongs to, by its name."""
    follows: bool = False
    """Whether it is a float of the type that the model computes in; told of qcompiler's functions alone."""


@dataclass(frozen=True)
class Place:
    """One of a node's inputs or outputs, by its index."""

    index: int
    output: bool = False

    def of(self, node: ir.Node) -> ir.Value | None:
        values = node.outputs if self.output else node.inputs
        return values[self.index] if self.index < len(values) else None


@dataclass(frozen=True)
class QuantizedOperand:
    """A quantized operand: codes that an operator reads or gives, and where their scale and zero point are."""

    name: str
    role: Role
    codes: Place
    scale: Place | None
    zero_point: Place | None


@dataclass(frozen=True)
class Operator:
    """What is known of an operator."""

    domain: str
    name: str
    inputs: tuple[Slot, ...]
    outputs: tuple[Slot, ...]
    traits: frozenset[str]
    repeated: tuple[Slot, ...] = ()
    """Inputs behind the others, together as often as a node has them."""

    def input(self, index: int) -> Slot | None:
        """The input of this index; None where the operator has none."""
        if index < len(self.inputs):
            return self.inputs[index] if index >= 0 else None
        return self.repeated[(index - len(self.inputs)) % len(self.repeated)] if self.repeated else None

    def places(self, *roles: Role) -> tuple[int, ...]:
        """The inputs that have one of the roles."""
        return tuple(index for index, slot in enumerate(self.inputs) if slot.role in roles)

    @cached_property
    def quantized(self) -> tuple[QuantizedOperand, ...]:
        """Its quantized operands, but for repeated ones, in the order of the operator; the result comes last."""
        return tuple(_quantized([*_placed(self.inputs), *_placed(self.outputs, output=True)]))

    def quantized_of(self, count: int) -> tuple[QuantizedOperand, ...]:
        """The quantized operands of a node with so many inputs; the result comes last."""
        if not self.repeated:
            return self.quantized
        starts = range(len(self.inputs), count, len(self.repeated))
        repeated = [operand for start in starts for operand in _quantized(_placed(self.repeated, start))]
        return tuple(sorted((*self.quantized, *repeated), key=lambda operand: operand.codes.output))

    @cached_property
    def coded(self) -> bool:
        """Whether it works on codes by its nature; attention with codes in its cache does so only where they are."""
        slots = (*self.inputs, *self.outputs, *self.repeated)
        caches = {slot.name for slot in slots if slot.role == "past"}
        return any(slot.role in ("code", "scale", "zero") and slot.of not in caches for slot in slots)


Placed = list[tuple[Slot, Place]]


def _placed(slots: tuple[Slot, ...], start: int = 0, *, output: bool = False) -> Placed:
    return [(slot, Place(start + index, output)) for index, slot in enumerate(slots)]


def _quantized(placed: Placed) -> list[QuantizedOperand]:
    """The operands that a scale or zero point belongs to."""
    parts = {(slot.of, slot.role): place for slot, place in placed if slot.role in ("scale", "zero")}
    owners = {name for name, _ in parts}
    return [
        QuantizedOperand(slot.name, slot.role, place, parts.get((slot.name, "scale")), parts.get((slot.name, "zero")))
        for slot, place in placed if slot.name in owners
    ]  # fmt: skip


def row(domain: str, name: str, inputs: str, outputs: str, traits: str = "") -> Operator:
    """A row from its text. Raises ValueError where that is no such."""
    fixed, _, repeated = inputs.partition("*")
    unknown = set(traits.split()) - TRAITS
    if unknown:
        raise ValueError(f"{name}: no trait is called {', '.join(sorted(unknown))}")
    sides = [tuple(_slot(name, text) for text in side.split()) for side in (fixed, outputs, repeated)]
    slots = [slot for side in sides for slot in side]
    known = {slot.name for slot in slots}
    for slot in slots:
        if slot.of and slot.of not in known:
            raise ValueError(f"{name}: {slot.name} belongs to {slot.of}, which the operator does not have")
    return Operator(domain, name, sides[0], sides[1], frozenset(traits.split()), sides[2])


def _slot(operator: str, text: str) -> Slot:
    match = _SLOT.fullmatch(text)
    role = match["role"] or "data" if match is not None else ""
    if match is None or role not in ROLES:
        raise ValueError(f"{operator}: {text!r} is no input or output")
    return Slot(match["name"], role, match["of"] or "", bool(match["half"]))  # type: ignore[arg-type]  # looked up above
