"""What lies where: questions about paths that no name can break, and whether results can be written to a place.

What could go wrong there is said before anything is computed.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from qcompiler.errors import OutputError

LONGEST = 255  # bytes of a name, on all file systems in use
WHILE_WRITTEN = 55  # bytes that a name has more while its folder or file is made


def exists(path: str | Path) -> bool:
    """As `Path.exists`, which raises where a name is too long, or may not be looked at."""
    return os.path.exists(path)  # noqa: PTH110


def is_file(path: str | Path) -> bool:
    """Whether a file is there, or a link to one: no folder, pipe or device."""
    return os.path.isfile(path)  # noqa: PTH113


def is_folder(path: str | Path) -> bool:
    """Whether a folder is there, or a link to one."""
    return os.path.isdir(path)  # noqa: PTH112


def check_place(path: Path) -> None:
    """Raise OutputError where neither a file nor a folder could be made of this name."""
    try:
        size = len(path.name.encode())
        os.fspath(path).encode()
    except UnicodeEncodeError as error:
        raise OutputError(f"the name {path} is not UTF-8, so few programs can open it; choose another name") from error
    if size > LONGEST - WHILE_WRITTEN:
        raise OutputError(
            f"the name {path.name[:40]}… has {size} bytes; file systems take {LONGEST}, of which the writing needs "
            f"{WHILE_WRITTEN}, so choose a shorter one"
        )
    try:
        own = path.resolve()
        with contextlib.suppress(FileNotFoundError, NotADirectoryError, PermissionError):
            path.lstat()
    except (OSError, RuntimeError) as error:  # the latter for links in a circle
        reason = error.strerror if isinstance(error, OSError) else "its links lead in a circle"
        raise OutputError(f"{path} cannot be written: {reason}; choose another name") from error
    if own == Path.cwd():
        raise OutputError(f"{str(path)!r} is the current folder; give the output a name of its own")
    above = own.parent
    while not exists(above):
        above = above.parent
    if not above.is_dir():
        raise OutputError(f"{path} cannot be written: {above} is no folder; choose another place")
    if not os.access(above, os.W_OK | os.X_OK):
        raise OutputError(f"{path} cannot be written: nothing may be made in {above}; choose another place")


def check_file(path: Path, overwrite: bool) -> None:
    """Raise OutputError where a file of this name could not be written."""
    check_place(path)
    if path.is_dir():
        raise OutputError(f"{path} is a folder, and a file is to be written; choose another name")
    if path.exists() and not overwrite:
        raise OutputError(f"{path} exists already; choose another name, or give --overwrite")
    if not path.parent.is_dir():
        raise OutputError(f"{path} cannot be written: there is no folder {path.parent}; make it first")
    if path.exists() and not os.access(path, os.W_OK):
        raise OutputError(f"{path} cannot be written: it is read-only; choose another name")
