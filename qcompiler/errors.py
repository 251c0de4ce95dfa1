"""Every error that qcompiler raises on purpose.

    QCompilerError              what the user can mend; the command line prints it as one sentence and exits with 2
    ├── ModelError              the model cannot be read, or holds what qcompiler does not support
    │   └── NoKernelError       onnxruntime has no kernel here for one of its nodes
    ├── DataError               calibration or evaluation data is missing, misshapen or not finite
    ├── RecipeError             a recipe, a pass option or a name pattern is wrong
    │   └── SchemeError         a number format, granularity or their combination is wrong
    ├── TargetError             the target has no kernel for what the recipe asks
    ├── OutputError             the output cannot be written, or would overwrite something
    └── PassError               a pass broke the model: the defect is ours, and a reproducer says how to show it

A message is one sentence that names where, what and what to do.
"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterable, Iterator

MOST_LISTED = 12  # names in an error message


class QCompilerError(Exception):
    """Base of all errors that a person can act on."""


class ModelError(QCompilerError):
    """The model cannot be read, or holds something that qcompiler does not support."""


class NoKernelError(ModelError):
    """The model is well-formed, and onnxruntime has no kernel on this machine for one of its nodes."""


class DataError(QCompilerError):
    """Calibration or evaluation data is missing, misshapen or not finite."""


class RecipeError(QCompilerError):
    """A recipe, an option of a pass, or a name pattern is wrong."""


class SchemeError(RecipeError):
    """A number format, a granularity, or their combination is wrong."""


class TargetError(QCompilerError):
    """The target has no kernel for what the recipe asks."""


class OutputError(QCompilerError):
    """The output cannot be written, or would overwrite something."""


class PassError(QCompilerError):
    """A pass broke the model; this is a defect of the pass, not of the user's input."""


class StoppedError(BaseException):
    """SIGINT or SIGTERM; what is being written cleans up behind itself."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


@contextlib.contextmanager
def persons_code(kind: type[QCompilerError], where: str) -> Iterator[None]:
    """Whatever a person's own code raises, SystemExit too, is one sentence; what stops the program goes on."""
    try:
        yield
    except (QCompilerError, StoppedError, KeyboardInterrupt):
        raise
    except BaseException as error:
        raise kind(f"{where} failed with {type(error).__name__}: {' '.join(str(error).split())}") from error


def closest(name: str, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown name: what was probably meant, or what there is."""
    known = list(known)
    matches = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if matches:
        return "; did you mean " + " or ".join(repr(match) for match in matches) + "?"
    if len(known) > MOST_LISTED:
        return f"; there are {len(known)}, such as {', '.join(known[:3])}"
    return f"; there are {', '.join(known)}" if known else ""


def printable(text: str) -> str:
    """On one line, with what does not print written out: escape sequences, newlines, bidirectional marks."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)
