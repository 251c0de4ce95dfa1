"""Arrays in .npz files, read sample by sample: a file says how large its arrays are, and may say anything.

A file is a zip of .npy members. Their headers are checked against what lies behind them, and no more of a member is
unpacked than the samples that are asked for.
"""

from __future__ import annotations

import contextlib
import math
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from qcompiler.errors import DataError
from qcompiler.graph.places import is_file

LARGEST_SAMPLE = 1 << 30  # bytes
MAGIC = b"\x93NUMPY"
ADVICE = "save the data with numpy.savez(input_name=array)"
# What zipfile, zlib and numpy raise where a file is not what it says.
_BROKEN = (
    OSError, ValueError, EOFError, KeyError, TypeError, NotImplementedError, RuntimeError, SyntaxError, MemoryError,
    zipfile.BadZipFile, zlib.error,
)  # fmt: skip


@dataclass(frozen=True)
class Member:
    """An array of a file, by what its header says; axis 0 counts the samples."""

    name: str
    file: str
    shape: tuple[int, ...]
    dtype: np.dtype
    fortran: bool

    @property
    def row(self) -> int:
        """Bytes of a sample."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize


def members(path: Path) -> list[Member]:
    """What a file holds, by the names of its arrays; their numbers are not read. Raises DataError."""
    if not is_file(path):
        raise DataError(f"{path} is no file (but a folder, pipe or device); {ADVICE}")
    with _told(path), path.open("rb") as opened:
        if opened.read(len(MAGIC)) == MAGIC:
            raise DataError(f"{path} holds one nameless array; {ADVICE}")
    with _told(path), zipfile.ZipFile(path) as archive:
        found = [_member(archive, entry, path) for entry in archive.infolist()]
    names = [member.name for member in found]
    if len(set(names)) < len(names):
        raise DataError(f"{path} holds two arrays of one name; {ADVICE}")
    if len({member.shape[0] for member in found}) > 1:
        sizes = ", ".join(f"{member.name!r} {member.shape[0]}" for member in found)
        raise DataError(f"{path}: axis 0 must count the samples, and the arrays disagree: {sizes}")
    return found


def rows(path: Path) -> Iterator[dict[str, np.ndarray]]:
    """The samples of a file, each array without axis 0. Raises DataError."""
    found = members(path)
    with _told(path), zipfile.ZipFile(path) as archive, contextlib.ExitStack() as stack:
        whole = {member.name: _whole(archive, member) for member in found if member.fortran}
        streams = {member.name: stack.enter_context(_behind_header(archive, member))
                   for member in found if not member.fortran}  # fmt: skip
        for index in range(found[0].shape[0] if found else 0):
            yield {
                member.name: whole[member.name][index] if member.fortran else _row(streams[member.name], member)
                for member in found
            }


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except DataError:
        raise
    except _BROKEN as error:
        reason = "it holds pickled Python objects, which are never loaded"
        if "allow_pickle" not in str(error):
            reason = f"it cannot be read ({' '.join(str(error).split()) or type(error).__name__})"
        raise DataError(f"{path} is no usable .npz file: {reason}") from error


def _member(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, path: Path) -> Member:
    name = entry.filename.removesuffix(".npy")
    if name == entry.filename or not name:
        raise DataError(f"{path} holds {entry.filename!r}, which is no array by name; {ADVICE}")
    with archive.open(entry) as stream:
        shape, fortran, dtype = _header(stream)
        behind = entry.file_size - stream.tell()
    member = Member(name, entry.filename, shape, dtype, fortran)
    if dtype.hasobject:
        raise ValueError("Object arrays need allow_pickle")
    if not shape:
        raise DataError(f"{path}: {name!r} is a single number; axis 0 of every array must count the samples")
    if any(size < 0 for size in shape) or shape[0] * member.row != behind:
        raise DataError(
            f"{path}: {name!r} should be {list(shape)} in {dtype}, and {behind} bytes are there; save the data again"
        )
    if member.row > LARGEST_SAMPLE or (fortran and behind > LARGEST_SAMPLE):
        larger = "a sample" if member.row > LARGEST_SAMPLE else "the array, saved column by column,"
        raise DataError(f"{path}: {larger} of {name!r} is larger than 1 GiB; give smaller samples in C order")
    return member


def _header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    try:
        shape, fortran, dtype = read(stream)
    except (RecursionError, MemoryError) as error:
        raise ValueError("its header is nested too deeply") from error
    except (SyntaxError, tokenize.TokenError, TypeError) as error:  # numpy reads it as Python
        raise ValueError(f"its header is damaged: {error}") from error
    return tuple(shape), bool(fortran), dtype


def _behind_header(archive: zipfile.ZipFile, member: Member) -> IO[bytes]:
    stream = archive.open(member.file)
    _header(stream)
    return stream


def _row(stream: IO[bytes], member: Member) -> np.ndarray:
    return _array(stream, member.row, member.dtype).reshape(member.shape[1:])


def _whole(archive: zipfile.ZipFile, member: Member) -> np.ndarray:
    with _behind_header(archive, member) as stream:
        flat = _array(stream, member.shape[0] * member.row, member.dtype)
    return flat.reshape(member.shape[::-1]).transpose()


def _array(stream: IO[bytes], size: int, dtype: np.dtype) -> np.ndarray:
    data = stream.read(size)
    if len(data) != size:
        raise ValueError("an array ends too early")
    return np.frombuffer(bytearray(data), dtype)
