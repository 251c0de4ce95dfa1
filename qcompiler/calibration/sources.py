"""The forms in which calibration data comes, each read sample by sample; `samples.py` says which SPEC names which."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from qcompiler.calibration.arrays import members, rows
from qcompiler.calibration.tokenizer import encode, open_tokenizer
from qcompiler.errors import DataError, persons_code
from qcompiler.graph.given import check_tensor
from qcompiler.graph.model_inputs import Input, Signature
from qcompiler.graph.places import is_folder
from qcompiler.recipes.registry import users_own

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Raw = tuple[str, Mapping[str, object]]
"""Where a sample comes from, for error messages, and what it says, unchecked."""
LONGEST_NUMBER = 18  # digits of the number of an input
LONG_TEXT = 16
"""Bytes for each token asked for, above which a text is read in places instead of as a whole."""


@dataclass(frozen=True)
class Source:
    """`read()` starts from the first sample every time; `length` is None where it is not known beforehand."""

    description: str
    read: Callable[[], Iterator[Raw]]
    length: int | None


def npz_folder(folder: Path, signature: Signature) -> Source:
    """All .npz files of a folder, in the order of their names."""
    paths = sorted(folder.glob("*.npz"))
    if not paths:
        raise DataError(f"the folder {str(folder)!r} holds no .npz files (ONNX test data is named pb:{folder})")
    return npz_files(str(folder), paths, signature)


def npz_files(name: str, paths: Sequence[Path], signature: Signature) -> Source:
    """Arrays by input name, axis 0 = samples; a sample keeps it with size 1, if the model's input has as many axes."""

    def checked(path: Path) -> int:
        found = members(path)
        for member in found:
            item = signature.inputs.get(member.name)
            if item is not None and not item.fits(_sample_shape(member.shape, item)):
                raise DataError(
                    f"{path}: {member.name!r} has the shape {list(member.shape)}, the model reads {item.shape_text()}, "
                    "and axis 0 of the data counts the samples; reshape it"
                )
        return found[0].shape[0] if found else 0

    def read() -> Iterator[Raw]:
        for path in paths:
            checked(path)
            for index, row in enumerate(rows(path)):
                shaped = {key: _shaped(array, signature.inputs.get(key)) for key, array in row.items()}
                yield f"{path.name}, sample {index}", shaped

    return Source(name, read, None if len(paths) > 1 else checked(paths[0]))


def _sample_shape(shape: tuple[int, ...], item: Input) -> tuple[int, ...]:
    return shape[1:] if item.rank == len(shape) - 1 else (1, *shape[1:])


def _shaped(row: np.ndarray, item: Input | None) -> np.ndarray:
    return row if item is not None and item.rank == row.ndim else row[None]


def json_lines(path: Path, signature: Signature, tokenizer: Path | None, sequence_length: int | None) -> Source:
    """One JSON object a line: lists of numbers by input name, or ``{"text": …}``. Empty lines are skipped."""
    loaded: list[Tokenizer] = []

    def parse(line: str, where: str) -> Mapping[str, object]:
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
            raise DataError(f"{where} is not JSON that can be read ({reason})") from error
        if not isinstance(entry, dict):
            raise DataError(f"{where} is not a JSON object such as {{'input_ids': [1, 2, 3]}}")
        if "text" not in entry:
            return {key: _batched(value, key, signature, sequence_length) for key, value in entry.items()}
        if not isinstance(entry["text"], str):
            raise DataError(f"{where}: 'text' is not a string")
        if not loaded:
            loaded.append(open_tokenizer(tokenizer, where))
        ids = encode(loaded[0], entry["text"], where)[:sequence_length]
        return {signature.token_input(): np.array([ids], np.int64)}

    def read() -> Iterator[Raw]:
        for number, line in _lines(path):
            where = f"{path.name}, line {number}"
            yield where, parse(line, where)

    return Source(str(path), read, sum(1 for _ in _lines(path)))


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        with path.open(encoding="utf-8") as file:
            yield from ((number, line) for number, line in enumerate(file, start=1) if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as UTF-8 text ({error})") from error


def _check_length(item: Input, sequence_length: int, where: str) -> None:
    """A model for one length alone can be given no other; what is cut to another would blame the data."""
    fixed = item.dims[-1] if item.dims and item.rank in (1, 2) else None
    if isinstance(fixed, int) and fixed != sequence_length:
        raise DataError(
            f"{where} is read in pieces of {sequence_length} tokens, and the model reads {fixed} at once, no more and "
            f"no fewer; give --seq-len {fixed}"
        )


def _batched(value: object, key: str, signature: Signature, sequence_length: int | None) -> object:
    """Give a flat list the batch axis that the model's input has, and cut ids to the sequence length."""
    item = signature.inputs.get(key)
    if item is None or not isinstance(value, list):
        return value
    flat = not (value and isinstance(value[0], list))
    if flat and item.rank == 2:
        value = [value]
    if item.rank != 2 or sequence_length is None:
        return value
    if any(isinstance(row, list) and len(row) > sequence_length for row in value):
        _check_length(item, sequence_length, f"{key!r} of a line")
    return [row[:sequence_length] if isinstance(row, list) else row for row in value]


def text(
    path: Path, signature: Signature, tokenizer: Path | None, sequence_length: int, limit: int | None, contiguous: bool
) -> Source:
    """Windows of `sequence_length` tokens that do not overlap: spread evenly over the text, or one after another.

    A text shorter than one window gives one short window; `contiguous` also gives the short rest at the end. Of a text
    very much longer than what is asked for only the places of the windows are read.
    """
    name = signature.token_input()
    _check_length(signature.inputs[name], sequence_length, str(path))
    encoder = open_tokenizer(tokenizer, str(path))
    if limit is not None and not contiguous and path.stat().st_size > LONG_TEXT * 4 * limit * sequence_length:
        windows = _windows_of_places(path, encoder, sequence_length, limit)
    else:
        ids = np.array(encode(encoder, _read_text(path), str(path)), np.int64)
        windows = _contiguous(ids, sequence_length) if contiguous else _spread(ids, sequence_length, limit)
    windows = [window for window in windows if len(window)]

    def read() -> Iterator[Raw]:
        for index, window in enumerate(windows):
            yield f"{path.name}, window {index}", {name: window[None]}

    return Source(f"{path} in windows of {sequence_length} tokens", read, len(windows))


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as UTF-8 text ({error})") from error


def _contiguous(ids: np.ndarray, length: int) -> list[np.ndarray]:
    return [ids[start : start + length] for start in range(0, len(ids), length)]


def _spread(ids: np.ndarray, length: int, limit: int | None) -> list[np.ndarray]:
    whole = max(1, len(ids) // length)
    count = whole if limit is None else min(limit, whole)
    return [ids[start : start + length] for start in (index * len(ids) // count for index in range(count))]


def _windows_of_places(path: Path, encoder: Tokenizer, length: int, limit: int) -> list[np.ndarray]:
    """Like `_spread`, but each window comes from a piece of its own, cut at white space."""
    size, piece = path.stat().st_size, LONG_TEXT * length
    windows = []
    with path.open("rb") as file:
        for index in range(limit):
            file.seek(index * size // limit)
            # A place may lie within a character or a word: what is broken goes.
            words = file.read(piece).decode("utf-8", errors="ignore")
            _, _, words = words.partition(" ") if index else ("", "", words)
            windows.append(np.array(encode(encoder, words, str(path))[:length], np.int64))
    return windows


def onnx_test_data(folder: Path, signature: Signature) -> Source:
    """ONNX test data: DIR/test_data_set_N/input_K.pb, or one such set. K counts the model's inputs."""
    if not is_folder(folder):
        raise DataError(f"the folder {str(folder)!r} of ONNX test data does not exist")
    sets = [path for path in folder.glob("test_data_set_*") if path.is_dir()] or [folder]
    if not any(list(path.glob("input_*.pb")) for path in sets):
        raise DataError(f"{str(folder)!r} holds no ONNX test data (test_data_set_0/input_0.pb and so on)")
    sets.sort(key=_number)
    names = list(signature.inputs)

    def read() -> Iterator[Raw]:
        for path in sets:
            yield f"{path}", dict(_load_tensor(file, names) for file in sorted(path.glob("input_*.pb"), key=_number))

    return Source(f"ONNX test data in {folder}", read, len(sets))


def _number(path: Path) -> int:
    digits = re.findall(r"\d+", path.stem)
    return int(digits[-1][:LONGEST_NUMBER]) if digits else 0


def _load_tensor(path: Path, names: Sequence[str]) -> tuple[str, np.ndarray]:
    import onnx

    if not path.is_file():
        raise DataError(f"{path} is no file (but a folder, pipe or device); write it as ONNX test data")
    tensor = onnx.TensorProto()
    try:
        tensor.ParseFromString(path.read_bytes())
        check_tensor(tensor, f"the sample {path}")
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            raise DataError(f"the sample {path} lies in another file; write its numbers into it")
        array = onnx.numpy_helper.to_array(tensor)
    except DataError:
        raise
    except Exception as error:  # protobuf's and onnx's errors share no base class
        raise DataError(f"{path} is no ONNX tensor ({' '.join(str(error).split())})") from error
    if tensor.name in names:
        return tensor.name, array
    if _number(path) >= len(names):
        raise DataError(f"{path} is for input number {_number(path)}, and the model reads {len(names)} inputs")
    return names[_number(path)], array


def python_function(spec: str) -> Source:
    """py:module:function, with the current folder on the import path."""
    parts = spec.split(":")
    if len(parts) != 3 or not all(parts):
        raise DataError(f"{spec!r} should read py:module:function")
    with persons_code(DataError, f"the import of {spec}"):
        found = users_own(f"{parts[1]}:{parts[2]}")
    return python_object(spec, found)


def python_object(name: str, data: object) -> Source:
    """Dicts in an iterable, a function that returns such, or a reader with get_next() and perhaps rewind()."""

    def read() -> Iterator[Raw]:
        with persons_code(DataError, name):
            current = data() if callable(data) else data
            entries = _from_reader(current) if hasattr(current, "get_next") else current
            if not isinstance(entries, Iterable):
                raise DataError(f"{name} gives a {type(current).__name__}, not dicts of arrays by input name")
            numbered = _numbered(name, entries)
        while True:
            with persons_code(DataError, name):  # which a `yield` must not stand in: it would hear what others raise
                entry = next(numbered, None)
            if entry is None:
                return
            yield entry

    with persons_code(DataError, name):
        length = len(data) if isinstance(data, Sequence) else None
    return Source(name, read, length)


def _numbered(name: str, entries: Iterable[object]) -> Iterator[Raw]:
    for index, entry in enumerate(entries):
        if isinstance(entry, Mapping):
            entry = {str(key): value for key, value in entry.items()}
        else:
            raise DataError(f"{name}, sample {index} is a {type(entry).__name__}, not a dict of arrays by input name")
        yield f"{name}, sample {index}", entry


def _from_reader(reader: object) -> Iterator[object]:
    if hasattr(reader, "rewind"):
        reader.rewind()
    while (entry := reader.get_next()) is not None:  # type: ignore[attr-defined]
        yield entry
