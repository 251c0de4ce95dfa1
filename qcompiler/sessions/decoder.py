"""A language model that reads a text step by step, and whose cache stays with onnxruntime in between.

A cache goes out of one step and into the next as an OrtValue of the model's own type (float32, float16, bfloat16,
int8, uint8, float8), bound by name and never seen by numpy. Where GroupQueryAttention keeps it, one buffer for all
positions is bound as input and output, and each step writes its own positions only.

Rows of different lengths are padded as the model needs it (`Decoder.padding`). A model without a cache works, too:
each step then reads the whole text again.
"""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
import onnx_ir as ir

from qcompiler.errors import DataError, ModelError
from qcompiler.graph import files as model_io
from qcompiler.graph.model_inputs import Signature
from qcompiler.graph.runtime_library import onnxruntime as onnxruntime_library
from qcompiler.sessions.cache_io import CachePort, find_cache_io
from qcompiler.sessions.runtime import load_session, one_line

if TYPE_CHECKING:
    import onnxruntime

Padding = Literal["left", "right", "none"]
RANKS = {
    "attention_mask": (2,), "position_ids": (1, 2), "cache_position": (1,), "token_type_ids": (2,),
    "use_cache_branch": (0, 1),
}  # fmt: skip
"""The inputs beside token ids and caches that a step can give, with the ranks that are understood."""
DEVICES = {"CUDAExecutionProvider": "cuda", "TensorrtExecutionProvider": "cuda", "DmlExecutionProvider": "dml"}
"""Where a provider wants its caches; the CPU's memory for all others."""


class Decoding(Protocol):
    """Some rows of text that are being read."""

    def feed(self, ids: np.ndarray, known: np.ndarray) -> np.ndarray:
        """Read on: ids [batch, new], and which of them count [batch, new]. Logits [batch, new, vocabulary] in float32.

        Ids that do not count are padding, on the model's side of the row; the cache forgets them. Models that give
        the last token's logits only return [batch, 1, vocabulary].
        """
        ...


class Decoder:
    """A language model, open in onnxruntime, that reads step by step.

    `shared_buffer` binds one buffer as past and present where GroupQueryAttention keeps the cache (default: wherever
    that is so); False lets onnxruntime allocate each step's cache anew.
    """

    def __init__(
        self, path: str | Path, *, threads: int | None = None, providers: Sequence[str] | None = None,
        shared_buffer: bool = True,
    ) -> None:  # fmt: skip
        """Raises ModelError where the model is no language model, cannot be opened, or reads what no step can give."""
        self.path = Path(path)
        model = model_io.load(path)
        self._signature = Signature(model)
        try:
            self.ids_name = self._signature.token_input()
        except DataError as error:
            raise ModelError(f"{path} is no language model, as no single input takes token ids") from error
        self._check_inputs()
        self.logits_name = logits_output(model, path)
        self.caches = find_cache_io(model, self._signature)
        self.shared_buffer = shared_buffer and any(cache.shareable for cache in self.caches)
        self.padding: Padding = self._padding(model)
        self.vocabulary = self._vocabulary(model)
        self.session: onnxruntime.InferenceSession = load_session(path, threads=threads, providers=providers)
        self._device = DEVICES.get(self.session.get_providers()[0], "cpu")

    def start(self, batch: int, capacity: int) -> Decoding:
        """Begin rows of at most `capacity` tokens each, padding included."""
        if self.caches:
            return _Cached(self, batch, capacity)
        warnings.warn(f"{self.path} has no cache, so each step reads the whole text again", stacklevel=2)
        return _Recomputed(self, batch)

    def read(self, ids: np.ndarray, *, prefill: int, chunk: int) -> np.ndarray:
        """Logits [tokens, vocabulary] of one text [tokens]: the first `prefill` at once, then `chunk` at a time."""
        if prefill < 1 or chunk < 1:
            raise DataError(f"a text is read in steps of 1 token or more, and not {prefill} and then {chunk}")
        decoding = self.start(1, len(ids))
        bounds = [0, *range(min(prefill, len(ids)), len(ids), chunk), len(ids)]
        parts = []
        for start, stop in pairwise(bounds):
            part = ids[None, start:stop]
            logits = decoding.feed(part, np.ones(part.shape, bool))
            if logits.shape[1] != stop - start:
                raise ModelError(
                    f"{self.path} gives logits of the shape {list(logits.shape)} for {stop - start} tokens; evaluation "
                    "needs logits for every token, so read one at a time"
                )
            parts.append(logits[0])
        return np.concatenate(parts)

    def inputs(self, ids: np.ndarray, mask: np.ndarray, positions: np.ndarray, past: int) -> dict[str, np.ndarray]:
        """What a step reads beside its cache, in the model's types.

        `ids` and `positions` are [batch, new], `mask` is [batch, total]; `past` is how many positions the cache holds,
        padding included.
        """
        axis = np.arange(past, past + ids.shape[1])
        known = {
            self.ids_name: ids, "attention_mask": mask, "position_ids": positions, "cache_position": axis,
            "token_type_ids": np.zeros_like(ids), "use_cache_branch": np.array([past > 0]),
        }  # fmt: skip
        feeds = {}
        for name, item in self._signature.inputs.items():
            if item.is_past:
                continue
            array = axis if name == "position_ids" and item.rank == 1 else known[name]
            feeds[name] = np.asarray(array.reshape(()) if item.rank == 0 else array, item.dtype.numpy(), order="C")
        return feeds

    def run(
        self, feeds: Mapping[str, np.ndarray], pasts: Mapping[str, onnxruntime.OrtValue], buffers: Mapping[str, object]
    ) -> tuple[np.ndarray, dict[str, onnxruntime.OrtValue]]:
        """One step. `buffers` holds, by the past's name, where a present is to be written; others are allocated.

        Returns logits and the presents by their past's name.
        """
        binding = self.session.io_binding()
        try:
            for name, array in feeds.items():
                binding.bind_cpu_input(name, array)
            for name, value in pasts.items():
                binding.bind_ortvalue_input(name, value)
            binding.bind_output(self.logits_name, "cpu")
            for cache in self.caches:
                if cache.past.name in buffers:
                    binding.bind_ortvalue_output(cache.present, buffers[cache.past.name])
                else:
                    binding.bind_output(cache.present, self._device)
            self.session.run_with_iobinding(binding)
        except Exception as error:  # onnxruntime's errors share no base class
            raise ModelError(f"{self.path} cannot take this step: {one_line(error)}") from error
        logits, *presents = binding.get_outputs()
        return as_float32(logits), dict(zip((cache.past.name for cache in self.caches), presents, strict=True))

    def empty(self, cache: CachePort, batch: int, positions: int) -> onnxruntime.OrtValue:
        """A cache of zeros, on the device, for so many positions."""
        ort = onnxruntime_library()

        shape, dtype = cache.shape(batch, positions), cache.past.dtype
        if positions == 0 or (self._device != "cpu" and dtype.numpy().kind == "V"):
            return ort.OrtValue.ortvalue_from_shape_and_type(shape, int(dtype), self._device)
        if dtype.numpy().kind != "V":
            return ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, dtype.numpy()), self._device)
        zeros = np.zeros(shape, f"u{dtype.numpy().itemsize}")  # a type of ml_dtypes, which onnxruntime takes as bytes
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(zeros, int(dtype))

    def _check_inputs(self) -> None:
        for name, item in self._signature.inputs.items():
            if item.is_past or name == self.ids_name:
                continue
            if name not in RANKS or item.rank not in (*RANKS[name], None):
                shape = "" if item.dims is None else f" of the shape {list(item.dims)}"
                raise ModelError(
                    f"{self.path} reads the input {name!r}{shape}, which decoding cannot give; it gives token ids, "
                    f"caches, {', '.join(RANKS)}"
                )

    def _padding(self, model: ir.Model) -> Padding:
        """GroupQueryAttention counts the mask, so a row begins at its first position and ends where the count says.

        Without a cache the model is causal, and what follows a row's end does no harm. Otherwise rows end together,
        which needs positions from outside; a model that counts them itself would count the padding.
        """
        masked = "attention_mask" in self._signature.inputs
        inside = any(node.op_type == "GroupQueryAttention" for node in model.graph.all_nodes())
        if not self.caches or (inside and masked):
            return "right"
        positions = self._signature.inputs.get("position_ids")
        return "left" if masked and positions is not None and positions.rank == 2 else "none"

    @property
    def positions(self) -> int | None:
        """Rows of the table of positions, where the model has one: no text can be longer."""
        item = self._signature.inputs.get("position_ids")
        return None if item is None else item.vocabulary

    def _vocabulary(self, model: ir.Model) -> int | None:
        rows = self._signature.inputs[self.ids_name].vocabulary
        if rows is not None:
            return rows
        shape = next(value.shape for value in model.graph.outputs if value.name == self.logits_name)
        return shape[-1] if shape is not None and isinstance(shape[-1], int) else None


class _Cached:
    """Rows in the cache of a model."""

    def __init__(self, decoder: Decoder, batch: int, capacity: int) -> None:
        self._decoder = decoder
        self._mask = np.zeros((batch, 0), bool)
        self._lengths = np.zeros(batch, np.int64)
        shared = [cache for cache in decoder.caches if cache.shareable and decoder.shared_buffer]
        # These own the memory: what comes out of a step only points there.
        self._buffers = {cache.past.name: decoder.empty(cache, batch, capacity) for cache in shared}
        self._pasts = {
            cache.past.name: self._buffers.get(cache.past.name) or decoder.empty(cache, batch, 0)
            for cache in decoder.caches
        }

    def feed(self, ids: np.ndarray, known: np.ndarray) -> np.ndarray:
        past = self._mask.shape[1]
        if self._decoder.padding == "right":
            positions = self._lengths[:, None] + np.arange(ids.shape[1])
            self._lengths = self._lengths + known.sum(1)
            # A row that is given nothing writes its last position again, as something must be written.
            positions = np.minimum(positions, self._lengths[:, None] - 1)
            self._mask = np.arange(self._lengths.max())[None] < self._lengths[:, None]
        else:
            self._mask = np.concatenate([self._mask, known], 1)
            positions = np.maximum(self._mask.cumsum(1)[:, past:] - 1, 0)
        feeds = self._decoder.inputs(ids, self._mask, positions, past)
        logits, self._pasts = self._decoder.run(feeds, self._pasts, self._buffers)
        return logits


class _Recomputed:
    """Rows that are kept as ids and read from the beginning at every step."""

    def __init__(self, decoder: Decoder, batch: int) -> None:
        self._decoder = decoder
        self._rows = [np.zeros(0, np.int64) for _ in range(batch)]

    def feed(self, ids: np.ndarray, known: np.ndarray) -> np.ndarray:
        start = np.array([len(row) for row in self._rows])
        pairs = zip(self._rows, ids, known, strict=True)
        self._rows = [np.concatenate([row, new[counts]]) for row, new, counts in pairs]
        lengths = np.array([len(row) for row in self._rows])
        axis = np.arange(lengths.max())
        whole = np.stack([np.pad(row, (0, len(axis) - len(row))) for row in self._rows])
        positions = np.minimum(axis[None], lengths[:, None] - 1)
        feeds = self._decoder.inputs(whole, axis[None] < lengths[:, None], positions, past=0)
        logits, _ = self._decoder.run(feeds, {}, {})
        if logits.shape[1] != len(axis):  # of the last token alone
            if logits.shape[1] == 1 and (lengths == len(axis)).all():
                return logits
            raise ModelError(
                f"{self._decoder.path} gives logits of the shape {list(logits.shape)} for {len(axis)} tokens in a row; "
                "without a cache, prompts of several lengths need logits for every token"
            )
        new = np.minimum(start[:, None] + np.arange(ids.shape[1]), lengths[:, None] - 1)
        return np.take_along_axis(logits, new[:, :, None], 1)


def as_float32(value: onnxruntime.OrtValue) -> np.ndarray:
    """Logits from memory of the CPU, whatever floating-point type they have."""
    if value.data_type() != "tensor(bfloat16)":
        return np.asarray(value.numpy(), np.float32)
    data = ctypes.string_at(value.data_ptr(), value.tensor_size_in_bytes())
    return np.frombuffer(data, ir.DataType.BFLOAT16.numpy()).reshape(value.shape()).astype(np.float32)


def logits_output(model: ir.Model, path: str | Path) -> str:
    """The output called logits, or the only floating-point output of rank 3. Raises ModelError."""
    names = [str(value.name) for value in model.graph.outputs]
    if "logits" in names:
        return "logits"
    floats = [
        str(value.name)
        for value in model.graph.outputs
        if value.dtype is not None
        and value.dtype.is_floating_point()
        and value.shape is not None
        and len(value.shape) == 3
    ]
    if len(floats) != 1:
        raise ModelError(
            f"{path} is no language model: no output is called 'logits'; its outputs are {', '.join(names)}"
        )
    return floats[0]
