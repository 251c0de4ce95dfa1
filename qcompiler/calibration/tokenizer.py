"""A tokenizer.json, and the ids of a text: whatever the library says, or prints, of either becomes one sentence."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from qcompiler.errors import DataError
from qcompiler.graph.places import is_file, is_folder

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PANIC = "PanicException"  # what the library's Rust raises where it gives up: no Exception, and of no module to import


def open_tokenizer(path: Path | None, needed_for: str) -> Tokenizer:
    """A tokenizer.json, or the one in a folder, with truncation and padding switched off."""
    if path is None:
        raise DataError(f"{needed_for} is text and needs a tokenizer; give --tokenizer tokenizer.json")
    file = path / "tokenizer.json" if is_folder(path) else path
    if not is_file(file):
        raise DataError(f"the tokenizer {str(file)!r} does not exist")
    from tokenizers import Tokenizer

    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"the tokenizer {str(file)!r} cannot be read ({error})") from error
    with _told(f"the tokenizer {str(file)!r} cannot be read"):
        tokenizer = Tokenizer.from_str(text)
        tokenizer.no_truncation()
        tokenizer.no_padding()
    return tokenizer


def encode(tokenizer: Tokenizer, text: str, where: str) -> list[int]:
    """The ids of a text. Raises DataError, which begins with `where`."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where} holds half a character (a lone surrogate); give text that is UTF-8") from error
    with _told(f"{where} cannot be turned into tokens, as the tokenizer fails"):
        ids: list[int] = tokenizer.encode(text).ids
    return ids


@contextlib.contextmanager
def _told(what: str) -> Iterator[None]:
    try:
        with _unheard():
            yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != PANIC:
            raise
        raise DataError(f"{what} ({' '.join(str(error).split())}); is it the one that belongs to the model?") from error


@contextlib.contextmanager
def _unheard() -> Iterator[None]:
    """What is printed on the second file descriptor meanwhile, past Python, goes nowhere: Rust prints its panics."""
    sys.stderr.flush()
    before, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)
        os.close(nowhere)
