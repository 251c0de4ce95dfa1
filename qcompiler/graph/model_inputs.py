"""What a model reads: checks samples against its inputs, and fills in the inputs that have one right value."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qcompiler.errors import DataError, ModelError, persons_code
from qcompiler.graph.operators import continuations, has

IDS = ("input_ids", "decoder_input_ids", "inputs_embeds")
"""The inputs that set batch size and sequence length, the first that the model has."""
PAST = re.compile(r"^(input[._])?past(_key_values)?[._]")
POSITIONS = ("position_ids", "cache_position")
MOST_NOISE = 1 << 21  # numbers of an input, where several axes have no size of their own
LARGEST_NOISE = 1 << 28  # numbers of an input, which are 1 GiB in float32


@dataclass(frozen=True)
class Input:
    """An input that the caller must feed."""

    name: str
    dtype: ir.DataType
    dims: tuple[int | str | None, ...] | None
    """Static sizes as numbers, symbolic ones as names (None: unnamed); None where even the rank is unknown."""
    vocabulary: int | None
    """Rows of the embedding that the input indexes, where the graph shows it."""
    is_past: bool
    """Whether it is a cache, by its name or because an output continues it."""

    @property
    def rank(self) -> int | None:
        return None if self.dims is None else len(self.dims)

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether an array of this shape can be fed."""
        return self.dims is None or (
            len(shape) == len(self.dims)
            and all(not isinstance(size, int) or size == actual for size, actual in zip(self.dims, shape, strict=True))
        )

    def shape_text(self) -> str:
        """Its shape, for messages."""
        return _shape(self)

    def sizes(self, length: int) -> list[int]:
        """Of one sample: batch 1, and `length` along the other symbolic axes."""
        if self.dims is None:
            raise DataError(f"random data needs the rank of the input {self.name!r}, and the model does not tell it")
        return [size if isinstance(size, int) else (length if axis else 1) for axis, size in enumerate(self.dims)]

    @property
    def past_axis(self) -> int | None:
        """The axis of a cache along which positions lie, or None where the shape does not show it."""
        if self.dims is None:
            return None
        symbolic = [axis for axis, size in enumerate(self.dims) if axis > 0 and not isinstance(size, int)]
        if len(symbolic) > 1:
            symbolic = [axis for axis in symbolic if re.search("past|seq|len", str(self.dims[axis]))]
        return symbolic[0] if len(symbolic) == 1 else None


class Signature:
    """The inputs of a model, in the order of the graph."""

    def __init__(self, model: ir.Model) -> None:
        graph = model.graph
        self.inputs = {
            str(value.name): _describe(value) for value in graph.inputs if value.name not in graph.initializers
        }
        self._ids = next((name for name in IDS if name in self.inputs), None)

    def token_input(self) -> str:
        """The name of the input that takes token ids; raises DataError where the model has no such input."""
        if "input_ids" in self.inputs:
            return "input_ids"
        candidates = [item.name for item in self.inputs.values() if item.vocabulary is not None]
        if len(candidates) != 1:
            raise DataError(
                f"text needs a model with one input of token ids, and this one reads {_listed(self.inputs)}; "
                "give arrays by name in an .npz file instead"
            )
        return candidates[0]

    def required(self) -> list[Input]:
        """The inputs that no rule fills in."""
        return [item for item in self.inputs.values() if not _has_rule(item)]

    def complete(self, sample: Mapping[str, object], where: str) -> dict[str, np.ndarray]:
        """The sample with every input of the model, each in the model's type; `where` opens the error messages.

        Safe casts are made (int64 to int32 where the numbers fit, float64 to float32 or float16). Missing inputs are
        filled in where there is one right value: attention_mask (ones), position_ids and cache_position (0, 1, …, after
        the past), token_type_ids (zeros), use_cache_branch (false), and an empty past.

        Raises DataError for an unknown name, a wrong type or shape, NaN or infinity, a token id outside the
        vocabulary, and an input that is missing and cannot be filled in.
        """
        for name in sample:
            if name not in self.inputs:
                raise DataError(f"{where} has {name!r}, which the model does not read{self._hint(name)}")
        given = {name: check(self.inputs[name], value, where) for name, value in sample.items()}
        missing = [item for name, item in self.inputs.items() if name not in given]
        if missing:
            filler = _Filler(given, self._ids, past_length=self._past_length(given))
            for item in missing:
                value = filler.fill(item)
                if value is None:
                    raise DataError(
                        f"{where} lacks the input {item.name!r} {_shape(item)}, which cannot be filled in; "
                        f"the data has {_listed(sample)}"
                    )
                given[item.name] = check(item, value, f"{where} (filled in)")
        return {name: given[name] for name in self.inputs}

    def adopt(self, sample: Mapping[str, np.ndarray], where: str) -> dict[str, np.ndarray]:
        """A complete sample of another model's as this model reads it.

        What this model does not read is left out, and an empty past of another type is made anew.
        """
        known = {name: array for name, array in sample.items() if name in self.inputs}
        kept = {name: array for name, array in known.items() if array.size or not self._remade(name, array)}
        return self.complete(kept, where)

    def _remade(self, name: str, past: np.ndarray) -> bool:
        item = self.inputs[name]
        return item.is_past and past.dtype != item.dtype.numpy()

    def random(self, generator: np.random.Generator, sequence_length: int) -> dict[str, np.ndarray]:
        """Noise in the right types: batch 1, `sequence_length` along other symbolic axes, ids within the vocabulary.

        The length is less where several such axes would make an input of more than `MOST_NOISE` numbers.
        """
        items, length = self.required(), sequence_length
        while length > 1 and any(math.prod(item.sizes(length)) > MOST_NOISE for item in items):
            length //= 2
        return {item.name: _noise(item, item.sizes(length), generator) for item in items}

    def _past_length(self, given: Mapping[str, np.ndarray]) -> int | None:
        """Positions in the cache that the sample gives; 0 for none, None where it gives some only for a part of it."""
        pasts = [item for item in self.inputs.values() if item.is_past]
        named = [item for item in pasts if item.name in given]
        if all(given[item.name].size == 0 for item in named):
            return 0
        axis = named[0].past_axis
        return None if len(named) < len(pasts) or axis is None else given[named[0].name].shape[axis]

    def _hint(self, name: str) -> str:
        close = difflib.get_close_matches(name, self.inputs, n=1)
        return f"; did you mean {close[0]!r}?" if close else f"; it reads {_listed(self.inputs)}"


def check(item: Input, value: object, where: str) -> np.ndarray:
    """One input of one sample as an array of the model's type; raises DataError (see `Signature.complete`)."""
    with persons_code(DataError, f"{where}: {item.name!r} is no array of numbers; making one"):
        array = np.asarray(value)
    strings = item.dtype == ir.DataType.STRING and all(isinstance(element, str) for element in array.flat)
    if array.dtype == object and not strings:
        raise DataError(
            f"{where}: {item.name!r} holds Python objects or rows of unequal length, not an array of numbers"
        )
    if array.size == 0 and not item.is_past:
        raise DataError(f"{where}: {item.name!r} is empty")
    array = _cast(array, item, where)
    if not item.fits(array.shape):
        raise DataError(f"{where}: {item.name!r} has shape {list(array.shape)}, the model reads {_shape(item)}")
    if item.dtype.is_floating_point() and not np.isfinite(array).all():
        raise DataError(
            f"{where}: {item.name!r} holds NaN or infinity as {item.dtype.name}; every number must be finite"
        )
    if item.vocabulary is not None and array.size and not (array.min() >= 0 and array.max() < item.vocabulary):
        wrong = array.min() if array.min() < 0 else array.max()
        if item.name in POSITIONS:
            raise DataError(
                f"{where}: {item.name!r} holds the position {wrong}, and the model has {item.vocabulary}; "
                "give shorter samples (--seq-len, --tokens)"
            )
        raise DataError(
            f"{where}: {item.name!r} holds the token id {wrong}, and the model's vocabulary has {item.vocabulary}; "
            "the tokenizer may belong to another model"
        )
    return array


def _cast(array: np.ndarray, item: Input, where: str) -> np.ndarray:
    wanted = np.dtype(object) if item.dtype == ir.DataType.STRING else item.dtype.numpy()
    if array.dtype == wanted:
        return array
    refusal = (
        f"{where}: {item.name!r} has type {array.dtype}, which does not safely become the model's {item.dtype.name}"
    )
    if item.dtype == ir.DataType.STRING:
        if array.dtype.kind != "U":
            raise DataError(refusal)
        return array.astype(object)
    if item.dtype.is_floating_point() and _is_float(array.dtype):
        with np.errstate(over="ignore"):  # what overflows is found as infinity afterwards, and said so
            return array.astype(wanted)
    if array.dtype.kind not in "biu":
        raise DataError(refusal)
    cast = array.astype(wanted)
    if not np.array_equal(cast.astype(array.dtype), array):
        raise DataError(f"{refusal}: not every number fits")
    return cast


def _is_float(dtype: np.dtype) -> bool:
    return dtype.kind == "f" or dtype.name in ("bfloat16", "float8_e4m3fn", "float8_e5m2")


class _Filler:
    """Gives the inputs that have one right value, from those that the sample gives."""

    def __init__(self, given: Mapping[str, np.ndarray], ids: str | None, past_length: int | None) -> None:
        self._past = past_length
        shape = given[ids].shape if ids is not None and ids in given else None
        self._sizes: tuple[int, int] | None = None
        if shape is not None:
            self._sizes = (1, shape[0]) if len(shape) == 1 else (shape[0], shape[1])

    def fill(self, item: Input) -> np.ndarray | None:
        if item.name == "use_cache_branch":
            return np.zeros(1, bool)
        if self._sizes is None or self._past is None:
            return None
        batch, length = self._sizes
        if item.name == "attention_mask" and item.rank in (2, None):
            return np.ones((batch, self._past + length), np.int64)
        if item.name == "token_type_ids" and item.rank in (2, None):
            return np.zeros((batch, length), np.int64)
        positions = np.arange(self._past, self._past + length)
        if item.name == "cache_position" or (item.name == "position_ids" and item.rank == 1):
            return positions
        if item.name == "position_ids" and item.rank in (2, None):
            return np.tile(positions, (batch, 1))
        if item.is_past and self._past == 0 and item.dims is not None and item.past_axis is not None:
            sizes = [0 if axis == item.past_axis else size for axis, size in enumerate(item.dims)]
            sizes[0] = sizes[0] if isinstance(sizes[0], int) else batch
            known = [size for size in sizes if isinstance(size, int)]
            return np.zeros(known, item.dtype.numpy()) if len(known) == len(sizes) else None
        return None


def _has_rule(item: Input) -> bool:
    named = item.name in ("use_cache_branch", "attention_mask", "token_type_ids", "position_ids", "cache_position")
    return (named and (item.rank is None or item.rank <= 2)) or (item.is_past and item.past_axis is not None)


def _noise(item: Input, sizes: list[int], generator: np.random.Generator) -> np.ndarray:
    if math.prod(sizes) > LARGEST_NOISE:
        raise DataError(f"random data for the input {item.name!r} {_shape(item)} would be larger than 1 GiB; give data")
    if item.dtype.is_floating_point():
        return generator.standard_normal(sizes).astype(item.dtype.numpy())
    if item.dtype == ir.DataType.STRING:
        raise DataError(f"random data cannot be made for the text input {item.name!r}")
    return generator.integers(0, item.vocabulary or 2, sizes).astype(item.dtype.numpy())


def _describe(value: ir.Value) -> Input:
    if not isinstance(value.type, ir.TensorType | None):
        raise ModelError(f"the model's input {value.name!r} is no tensor, and only tensors can be fed")
    if value.dtype is None:
        raise ModelError(f"the model's input {value.name!r} has no element type")
    dims = None
    if value.shape is not None:
        dims = tuple(size if isinstance(size, int) else size.value for size in value.shape)
        if dims and not isinstance(dims[-1], int):
            dims = (*dims[:-1], _cache_width(value) or dims[-1])
    is_past = PAST.match(str(value.name)) is not None or _is_continued(value)
    return Input(str(value.name), value.dtype, dims, _vocabulary(value), is_past)


def _is_continued(value: ir.Value) -> bool:
    """Whether an output of the model is this input with more appended to it, as a cache of any name is."""
    if value.shape is None or len(value.shape) < 3:
        return False
    return any(
        (node.domain, node.op_type) == ("", "Concat") and index == 0 and len(node.inputs) == 2
        and node.outputs[0].is_graph_output()
        for node, index in value.uses()
    )  # fmt: skip


def _cache_width(past: ir.Value) -> int | None:
    """The last axis of a cache that GroupQueryAttention reads, where the exporter left it open."""
    for node, index in past.uses():
        if node.op_type != "GroupQueryAttention" or index not in continuations(node):
            continue
        heads, shape = node.attributes.get_int("num_heads", 0), node.outputs[0].shape
        if heads and shape is not None and isinstance(shape[-1], int):
            codes_in_a_byte = 2 if node.attributes.get_int("kv_cache_bit_width", 8) == 4 else 1
            return -(-shape[-1] // heads // codes_in_a_byte)
    return None


def _vocabulary(ids: ir.Value) -> int | None:
    """Rows of the table that a Gather takes by these ids, through Transpose and DequantizeLinear of a constant."""
    if ids.dtype not in (ir.DataType.INT64, ir.DataType.INT32):
        return None
    handed_on = [use.node.outputs[0] for use in ids.uses() if has(use.node, "moves", "ordered") and use.idx == 0]
    for value in (ids, *handed_on):
        for node, index in value.uses():
            rows = _rows(node) if node.op_type in ("Gather", "GatherBlockQuantized") and index == 1 else None
            if rows is not None:
                return rows
    return None


def _rows(gather: ir.Node) -> int | None:
    axis = gather.attributes.get_int("axis", gather.attributes.get_int("gather_axis", 0))
    table, swapped = gather.inputs[0], False
    while table is not None and table.const_value is None:
        producer = table.producer()
        if producer is None or producer.op_type not in ("Transpose", "DequantizeLinear", "Cast", "Constant"):
            return None
        if producer.op_type == "Constant":
            tensor = ir.convenience.get_const_tensor(table)
            return None if tensor is None or axis != 0 or len(tensor.shape) != 2 else _size(tensor, swapped)
        swapped ^= producer.op_type == "Transpose"
        table = producer.inputs[0]
    if table is None or table.const_value is None or axis != 0 or len(table.const_value.shape) != 2:
        return None
    return _size(table.const_value, swapped)


def _size(table: ir.TensorProtocol, swapped: bool) -> int:
    return int(table.shape.numpy()[1 if swapped else 0])


def _shape(item: Input) -> str:
    if item.dims is None:
        return f"({item.dtype.name})"
    return f"[{', '.join('?' if size is None else str(size) for size in item.dims)}] ({item.dtype.name})"


def _listed(names: Iterable[str]) -> str:
    listed = sorted(names)
    shown = ", ".join(repr(name) for name in listed[:6])
    return (shown or "nothing") + (f" and {len(listed) - 6} more" if len(listed) > 6 else "")
