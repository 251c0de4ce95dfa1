"""What all rounding passes for weights share: which constants they work on, and how codes come into the graph.

for constant in self.constants(model, changes):         each once, however many layers read it
    quantized = …                                       the pass's own arithmetic
    self.install(constant, quantized, rw, changes)   codes, scales and one DequantizeLinear
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import onnx
import onnx_ir as ir
from pydantic import Field
from pydantic.dataclasses import dataclass as options

from qcompiler.errors import SchemeError
from qcompiler.formats.arithmetic import Quantized
from qcompiler.formats.scheme import FORMATS, PerChannel, Scheme, find_format
from qcompiler.functions.binary import FORMAT as BINARY
from qcompiler.graph.edit import constant, node_graph, remove_unused_constant
from qcompiler.graph.rewriter import Rewriter
from qcompiler.rewriting.bias_room import make_room
from qcompiler.rewriting.contract import OPTIONS, Changed, Changes, Pass, Skipped
from qcompiler.rewriting.write_codes import BinaryCodes, Codes, lazy_codes, packed_codes, storage
from qcompiler.sites.analyses import sites_of
from qcompiler.sites.find import Convolution, Embedding, Linear, Sites, matches

if TYPE_CHECKING:
    from qcompiler.targets import Target

Reader = Linear | Convolution | Embedding
LayerKind = Literal["linear", "head", "convolution", "embedding"]
GROUP_SIZE = 128


@dataclass(frozen=True, eq=False)
class WeightConstant:
    """A float constant to quantize, and the layers that will read its codes."""

    value: ir.Value
    tensor: ir.TensorProtocol
    readers: tuple[Reader, ...]
    """In graph order; all have their output channels along the same axis."""
    scheme: Scheme

    @property
    def name(self) -> str:
        """The module path of its first reader."""
        return self.readers[0].module_path

    @property
    def channel_axis(self) -> int:
        """The axis of the constant that holds output channels (rows of an embedding)."""
        return self.readers[0].channel_axis

    @property
    def reported(self) -> Scheme:
        """The scheme as it is told: a group that holds all inputs is a channel."""
        return self.scheme.over(self.linears[0].in_features) if self.linears else self.scheme

    @cached_property
    def linears(self) -> tuple[Linear, ...]:
        return tuple(reader for reader in self.readers if isinstance(reader, Linear))


@options(frozen=True, config=OPTIONS)
class WeightPass(Pass):
    """Base of the passes that round weights: the options of a scheme, and the layers to work on."""

    format: str = "int8"
    """Number format of the codes: int8, uint8 (the same with zero point 128), int4, uint4, int3, int2, fp8_e4m3, …"""
    granularity: Literal["tensor", "channel", "group"] = "channel"
    """What shares one scale: the whole tensor, an output channel, or `group_size` input features of a channel."""
    group_size: int | None = Field(default=None, ge=1)
    """Input features in a group (granularity group); open: what the target runs fastest, else 128."""
    symmetric: bool = True
    """Without a zero point of its own for each scale."""
    positive_scales: bool = False
    """Choose no negative scales (a search may, for symmetric codes of few bits), for runtimes that take none."""
    layers: tuple[LayerKind, ...] = ("linear", "head", "convolution", "embedding")
    """Kinds of layers to work on; a head is a linear layer with one output for each row of an embedding (logits)."""
    bits: dict[str, int] = field(default_factory=dict)
    """Bits of single layers in the place of the format's, as ``{lm_head: 8}``: patterns as in `targets`, of which the
    first that fits counts. Layers that share a constant share its bits; `mixed-precision` fills in what is open."""

    def __post_init__(self) -> None:
        scheme = self.scheme()
        for bits in dict.fromkeys(self.bits.values()):
            try:
                replace(self, format=with_bits(scheme, bits).format, bits={})
            except SchemeError as error:
                raise SchemeError(f"{self.name}.bits: {error}") from error
        if find_format(self.format).kind == "codebook" or self.format == "int32":
            raise SchemeError(f"{self.name}.format: DequantizeLinear cannot decode weights in {self.format}.")
        if self.format == BINARY and self.granularity == "tensor":
            raise SchemeError(f"{self.name}: binary weights have a scale for each output channel or group: "
                              "set granularity to channel or group.")  # fmt: skip

    def scheme(self) -> Scheme:
        """The options as a scheme; raises `SchemeError` where they do not go together."""
        group_size = self.group_size
        if self.granularity == "group" and group_size is None:
            group_size = GROUP_SIZE
        scheme = Scheme.from_options(self.format, self.granularity, group_size, self.symmetric)
        return replace(scheme, positive=self.positive_scales)

    def decided(self, bits: Mapping[str, int]) -> Pass:
        return replace(self, bits=self.bits | {name: found for name, found in bits.items() if name not in self.bits})

    @property
    def patterns(self) -> tuple[str, ...]:
        return (*super().patterns, *self.bits)

    def for_target(self, target: Target) -> Pass:
        if self.granularity != "group" or self.group_size is not None or target.block_size is None:
            return self
        return replace(self, group_size=target.block_size)

    def constants(self, model: ir.Model, changes: Changes) -> list[WeightConstant]:
        """What the pass is to quantize, in graph order; what it cannot goes to `changes.skipped`.

        Raises `SchemeError` where the model's opset cannot decode the format at all.
        """
        self._operators(self.format, model)
        sites = sites_of(model)
        changes.skipped.extend(Skipped(site.name, site.reason) for site in self.selected(sites.unsupported))
        by_constant: dict[ir.Value, list[Reader]] = {}
        for site in self.wanted(sites):
            by_constant.setdefault(_weight(site), []).append(site)
        found = []
        for weight, readers in by_constant.items():
            bits = self._bits_of(readers)
            operators = self._operators(self.scheme_for(readers, bits).format, model)
            fitting: list[Reader] = []
            for site in readers:
                obstacle = self._obstacle(site, fitting or [site], operators)
                if obstacle is None:
                    fitting.append(site)
                else:
                    changes.skipped.append(Skipped(site.name, obstacle))
            if fitting:
                scheme = self.scheme_for(fitting, bits)
                found.append(WeightConstant(weight, _tensor(weight), tuple(fitting), scheme))
        return found

    def wanted(self, sites: Sites) -> list[Reader]:
        """The sites that the options name."""
        rows = {_rows(embedding) for embedding in sites.embeddings}
        linears = [s for s in sites.linears if ("head" if s.out_features in rows else "linear") in self.layers]
        convolutions = sites.convolutions if "convolution" in self.layers else ()
        embeddings = sites.embeddings if "embedding" in self.layers else ()
        return self.selected([*linears, *convolutions, *embeddings])

    def scheme_for(self, readers: list[Reader], bits: int | None) -> Scheme:
        """Embeddings are dequantized row by row, so a constant that one of them reads has a scale for each row."""
        scheme = self.scheme()
        if bits is not None:
            scheme = with_bits(scheme, bits)
        if any(isinstance(site, Embedding) for site in readers):
            scheme = replace(scheme, granularity=PerChannel())
        return scheme

    def install(
        self, constant: WeightConstant, quantized: Quantized, rw: Rewriter, changes: Changes, *,
        details: dict[str, str] | None = None, nearest: bool = False,
    ) -> None:  # fmt: skip
        """Let the readers of a constant read `quantized`, and note them as changed (`details`: a line for each site).

        `nearest` says that the codes are the nearest ones, so that they can be computed again when they are written.
        """
        if quantized.format == BINARY:
            _install_signs(constant, quantized, rw)
        else:
            _install_codes(constant, quantized, rw, nearest)
        for site in constant.readers:
            detail = (details or {}).get(site.name, "")
            changes.changed.append(Changed(site.name, weight=constant.reported, detail=detail))
        remove_unused_constant(constant.value)

    def _bits_of(self, readers: list[Reader]) -> int | None:
        """The bits that the options give a constant; None where they say nothing of its readers."""
        named = (bits for site in readers for pattern, bits in self.bits.items() if matches(pattern, site))
        return next(named, None)

    def _operators(self, format: str, model: ir.Model) -> _Operators:
        operators = _Operators.of(format, model)
        if format != BINARY:
            operators.check()
        return operators

    def _obstacle(self, site: Reader, before: list[Reader], operators: _Operators) -> str | None:
        """Why this reader of a constant, which the layers `before` it read as well, cannot have codes; or None."""
        dtype = _tensor(_weight(site)).dtype
        if not isinstance(site, Embedding) and site.dequantize is not None:
            return "its weight is quantized already"
        if self.format == BINARY and not isinstance(site, Linear):
            return "binary weights are decoded for linear layers alone: choose int8 or uint8 for this one"
        if not operators.scales_can_be(dtype) and self.format != BINARY:
            return f"its weight is {dtype.name}, and DequantizeLinear has no scales of that type"
        if isinstance(site, Convolution) and self.granularity == "group":
            return "convolutions have no groups of input features: use granularity channel"
        if isinstance(site, Embedding) and not operators.codes_can_be_gathered:
            return f"Gather does not take {operators.format} codes: choose int8 or uint8 for embeddings"
        if site.channel_axis != before[0].channel_axis:
            return f"{before[0].name} shares its constant and needs scales along the other axis"
        return None


def _install_signs(constant: WeightConstant, quantized: Quantized, rw: Rewriter) -> None:
    codes = BinaryCodes(constant.linears[0], quantized, rw)  # other sites have an obstacle
    for site in constant.linears:
        codes.dequantize_for(site, rw)


def _install_codes(
    constant: WeightConstant, quantized: Quantized, rw: Rewriter, nearest: bool
) -> None:  # fmt: skip
    graph, name = node_graph(constant.readers[0].node), f"{constant.value.name}.codes"
    stored = storage(quantized.format, graph.opset_imports[""])
    tensor = lazy_codes(constant.tensor, quantized, stored, name) if nearest else packed_codes(quantized, stored, name)
    codes = Codes(constant.value, tensor, quantized, graph, rw)
    for site in constant.readers:
        if isinstance(site, Embedding):
            codes.gather_for(site, rw)
        else:
            codes.dequantize_for(site, rw)
            make_room(site, rw)  # where the model came with a quantized input


def with_bits(scheme: Scheme, bits: int) -> Scheme:
    """The scheme in another number of bits, signed as before. Raises `SchemeError` where there is no such format."""
    stem = scheme.format.rstrip("0123456789")
    integers = (item for item in FORMATS.values() if item.kind == "integer" and item.bits < 32)  # which biases have
    known = {item.bits for item in integers if item.name == f"{stem}{item.bits}"}
    if bits not in known:
        choice = f"choose of {', '.join(map(str, sorted(known)))}" if known else "only integers do"
        raise SchemeError(f"{scheme.format} does not come in {bits} bits; {choice}.")
    return replace(scheme, format=f"{stem}{bits}")


@dataclass(frozen=True)
class _Operators:
    """What the standard operators of an opset can do with codes of a type."""

    opset: int
    format: str
    storage: ir.DataType

    @staticmethod
    def of(format: str, model: ir.Model) -> _Operators:
        opset = model.opset_imports[""]
        return _Operators(opset, format, storage(format, opset))

    def check(self) -> None:
        """Raise `SchemeError` where no DequantizeLinear decodes the codes."""
        if _type(self.storage.name) not in self._types("DequantizeLinear", 0):
            raise SchemeError(
                f"DequantizeLinear of opset {self.opset} has no {self.storage.name} for {self.format}; "
                "choose another format, or export the model with a newer opset."
            )

    def scales_can_be(self, dtype: ir.DataType) -> bool:
        return _type(dtype.name) in self._types("DequantizeLinear", 1)

    @property
    def codes_can_be_gathered(self) -> bool:
        return _type(self.storage.name) in self._types("Gather", 0)

    def _types(self, operator: str, index: int) -> Collection[str]:
        types: Collection[str] = onnx.defs.get_schema(operator, self.opset).inputs[index].types
        return types


def _type(name: str) -> str:
    return f"tensor({name.lower()})"


def _rows(embedding: Embedding) -> int:
    return int(_tensor(embedding.table).shape.numpy()[embedding.channel_axis])


def _weight(site: Reader) -> ir.Value:
    return site.table if isinstance(site, Embedding) else site.weight


def _tensor(weight: ir.Value) -> ir.TensorProtocol:
    tensor = constant(weight)
    assert tensor is not None  # recognisers only report constants
    return tensor
