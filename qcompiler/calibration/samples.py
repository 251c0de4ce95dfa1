"""Calibration and evaluation data: from what a person names on the command line to the inputs of one run of the model.

A *sample* is what one run of the model reads: a dict from input name to array. `open_samples` reads the forms of SPEC:

    data.npz | FOLDER     arrays by input name, axis 0 = samples; each sample keeps a leading axis of 1
    data.jsonl            one sample a line: {"input_ids": […]} or {"text": "…"} (other keys of a text line are ignored)
    text.txt              windows of `sequence_length` tokens, spread evenly over the text
    pb:DIR                ONNX test data: DIR/test_data_set_N/input_K.pb
    py:module:function    yields dicts, or returns an object with get_next() and perhaps rewind()
    random                noise of the right types: exercises the graph, but says nothing about real activations
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Protocol

import numpy as np
import onnx
import onnx_ir as ir

from qcompiler.calibration import sources
from qcompiler.calibration.sources import Source
from qcompiler.errors import DataError, OutputError
from qcompiler.graph.model_inputs import Signature
from qcompiler.graph.places import exists

Sample = dict[str, np.ndarray]
MOST_AXES_OF_ROWS = 3  # batch, tokens, features; an input of more is a picture
DEFAULT_LIMIT, DEFAULT_SEQUENCE_LENGTH, RANDOM_SEQUENCE_LENGTH = 128, 256, 32


class Samples:
    """A source of samples that can be read again and again; each is checked and completed as it is read.

    Iterating raises DataError at the first sample that does not fit the model. `description` is one line for people.
    """

    def __init__(self, source: Source, signature: Signature, *, limit: int | None = None) -> None:
        if limit is not None and limit < 1:
            raise DataError(f"at least one sample is needed, and the limit is {limit}")
        self.description = source.description
        self._source, self._signature = source, signature
        self._start, self._stop = 0, limit
        self._hash: str | None = None
        self._rows: int | None = None
        if next(iter(self), None) is None:
            raise DataError(f"{source.description} holds no samples")

    def __iter__(self) -> Iterator[Sample]:
        for where, raw in itertools.islice(self._source.read(), self._start, self._stop):
            yield self._signature.complete(raw, where)

    @property
    def count(self) -> int | None:
        """How many samples there are, or None where only reading them would tell."""
        length = self._source.length
        if length is None:
            return None
        return max(0, min(length, length if self._stop is None else self._stop) - self._start)

    def __len__(self) -> int:
        count = self.count
        if count is None:
            raise TypeError(f"the number of samples in {self.description} is not known before they are read")
        return count

    def __bool__(self) -> bool:
        return True  # not by the length, which may be unknown; there is at least one sample

    def part(self, start: int, stop: int) -> Samples:
        """The samples from number `start` up to but without `stop`, counted from 0."""
        part = copy.copy(self)
        part._start = self._start + start
        part._stop = self._start + stop if self._stop is None else min(self._stop, self._start + stop)
        part._hash = None
        return part

    def rows(self) -> int | None:
        """How many tokens, or rows of features, there are; None for samples without any (images). Reads as `hash`."""
        self.hash()
        return self._rows

    def hash(self) -> str:
        """SHA-256 over names, types, shapes and contents of all samples; reads them once."""
        if self._hash is None:
            digest = hashlib.sha256()
            self._rows = 0
            for sample in self:
                rows = _rows(sample)
                self._rows = None if rows is None or self._rows is None else self._rows + rows
                for name, array in sample.items():
                    digest.update(f"{name}:{array.dtype}:{array.shape};".encode())
                    digest.update(str(array.tolist()).encode() if array.dtype == object else array.tobytes())
            self._hash = digest.hexdigest()
        return self._hash


def _rows(sample: Sample) -> int | None:
    """Of one sample: its tokens, else what shares all indices but the last of its widest input of floats."""
    if "input_ids" in sample:
        return sample["input_ids"].size
    floats = [array for array in sample.values() if array.dtype.kind == "f"]
    if not floats or any(array.ndim > MOST_AXES_OF_ROWS for array in floats):
        return None
    return max(array.size // max(1, array.shape[-1]) if array.ndim else 1 for array in floats)


def open_samples(
    spec: str,
    *,
    model: ir.Model,
    tokenizer: Path | None = None,
    limit: int | None = DEFAULT_LIMIT,
    sequence_length: int | None = None,
    seed: int = 0,
    contiguous: bool = False,
) -> Samples:
    """Samples for `model` from a SPEC (see the module's docstring), at most `limit` of them.

    `tokenizer` is a tokenizer.json or the folder that holds it, for text. `sequence_length` is in tokens: windows of
    text.txt (default 256) have this length, lines of data.jsonl are cut to it. `contiguous` takes windows one after
    another from the beginning instead of spreading them. Raises DataError, one sentence, for whatever is wrong.
    """
    if sequence_length is not None and sequence_length < 1:
        raise DataError(f"the sequence length must be positive, and is {sequence_length}")
    signature = Signature(model)
    source = _source(spec, signature, tokenizer, limit, sequence_length, seed, contiguous)
    return Samples(source, signature, limit=limit)


def _source(
    spec: str, signature: Signature, tokenizer: Path | None, limit: int | None, sequence_length: int | None,
    seed: int, contiguous: bool,
) -> Source:  # fmt: skip
    if spec == "random":
        warnings.warn(
            "random calibration data says nothing about real activations: use it to exercise the graph only",
            stacklevel=3,
        )
        return _random(signature, limit or DEFAULT_LIMIT, sequence_length or RANDOM_SEQUENCE_LENGTH, seed)
    if spec.startswith("pb:"):
        return sources.onnx_test_data(Path(spec[3:]).expanduser(), signature)
    if spec.startswith("py:"):
        return sources.python_function(spec)
    path = Path(spec).expanduser()
    if not spec.strip():
        raise DataError("the data has an empty name; give data.npz, text.txt, …, or leave it out")
    if not exists(path):
        raise DataError(f"the data {spec!r} does not exist")
    if path.is_dir():
        return sources.npz_folder(path, signature)
    if not path.is_file():
        raise DataError(f"the data {spec!r} is no file (but a pipe or device); write it to a file first")
    if not os.access(path, os.R_OK):
        raise DataError(f"the data {spec!r} may not be read; change its permissions")
    match path.suffix:
        case ".npz":
            return sources.npz_files(str(path), [path], signature)
        case ".jsonl":
            return sources.json_lines(path, signature, tokenizer, sequence_length)
        case ".txt":
            length = sequence_length or DEFAULT_SEQUENCE_LENGTH
            return sources.text(path, signature, tokenizer, length, limit, contiguous)
    raise DataError(
        f"the data {spec!r} has an unknown suffix: give .npz, .jsonl, .txt, a folder of .npz, pb:DIR, "
        "py:module:function, or random"
    )


def write_samples(folder: Path, samples: Iterable[Mapping[str, np.ndarray]]) -> None:
    """Write samples as ONNX test data, which `pb:FOLDER` reads. Raises OutputError."""
    try:
        for number, sample in enumerate(samples):
            (place := folder / f"test_data_set_{number}").mkdir(parents=True, exist_ok=True)
            for index, (name, array) in enumerate(sample.items()):
                tensor = onnx.numpy_helper.from_array(array, name)
                (place / f"input_{index}.pb").write_bytes(tensor.SerializeToString())
    except OSError as error:
        raise OutputError(f"{folder} cannot be written: {error.strerror or error}") from error


class Reader(Protocol):
    """onnxruntime's CalibrationDataReader, or anything like it."""

    def get_next(self) -> Mapping[str, object] | None: ...


def from_python(
    data: Iterable[Mapping[str, object]] | Callable[[], Iterable[Mapping[str, object]]] | Reader,
    *,
    model: ir.Model,
    limit: int | None = None,
) -> Samples:
    """Samples from Python: dicts in a list or any iterable, a function that returns one, or a reader with `get_next`.

    An iterator that cannot start again is kept in memory, up to `limit` samples.
    """
    if isinstance(data, Iterator):
        data = list(itertools.islice(data, limit))
    return Samples(sources.python_object("the calibration data", data), Signature(model), limit=limit)


def _random(signature: Signature, count: int, sequence_length: int, seed: int) -> Source:
    def read() -> Iterator[tuple[str, Mapping[str, object]]]:
        generator = np.random.default_rng(seed)
        for index in range(count):
            yield f"random sample {index}", signature.random(generator, sequence_length)

    return Source(f"random data (seed {seed})", read, count)
