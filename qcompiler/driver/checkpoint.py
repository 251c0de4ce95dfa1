"""What the finished stages of long passes have computed, on disk: a run that was killed goes on where it was.

A folder beside the output holds one file for each stage, written whole or not at all, and the fingerprint of the run:
model, data, recipe and versions. Only a run with the same fingerprint goes on with it, and gives the same bytes. The
fingerprint is written first and removed last, so stages without one are nobody's, and are removed. Steps of a recipe
are told apart by their position, as one pass may run twice.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from qcompiler.errors import DataError, OutputError
from qcompiler.graph.checksum import checksum
from qcompiler.rewriting.staged import Computed

FINGERPRINT = "run.json"
STAGE_FILE = re.compile(r"\d+-[\w.-]+\.\d{5}\.(safetensors|partial)")
_BYTES_ONLY = {"bfloat16": ml_dtypes.bfloat16}  # types that the file format's numpy side does not know


class Checkpoint:
    """The stages of one run, in `folder`."""

    def __init__(self, folder: Path, fingerprint: Mapping[str, str], *, resume: bool) -> None:
        """Begin, or go on with `resume`. Raises OutputError where the folder holds the work of another run, or of an
        unfinished one that nobody said to go on with."""
        self._folder, self._fingerprint = folder, dict(fingerprint)
        noted = folder / FINGERPRINT
        if not noted.exists():
            self._remove_stages()
            return
        if not resume:
            raise OutputError(
                f"{folder} holds the work of an unfinished run; go on with it (--resume), or remove the folder"
            )
        before = _read_json(noted)
        for key in fingerprint:
            if before.get(key) != fingerprint[key]:
                raise OutputError(
                    f"{folder} holds the work of a run with another {key}, which cannot be gone on with; "
                    "remove the folder to start anew"
                )

    def has(self, position: int, pass_name: str, stage: int) -> bool:
        """Whether a stage of the recipe's step at `position` is finished."""
        return self._file(position, pass_name, stage).exists()

    def read(self, position: int, pass_name: str, stage: int) -> dict[str, Computed]:
        """What a finished stage computed, by the names of its units. Raises DataError."""
        return _read(self._file(position, pass_name, stage))

    def write(self, position: int, pass_name: str, stage: int, computed: Mapping[str, Computed]) -> None:
        """Note a finished stage. Raises OutputError."""
        from safetensors import SafetensorError
        from safetensors.numpy import save_file

        tensors: dict[str, np.ndarray] = {}
        entries = []
        for number, (name, found) in enumerate(computed.items()):
            tensors |= {f"{number}.{key}": _plain(array) for key, array in found.arrays.items()}
            types = {key: str(array.dtype) for key, array in found.arrays.items()}
            entries.append({"name": name, "facts": found.facts, "types": types})
        path = self._file(position, pass_name, stage)
        partial = path.with_suffix(".partial")
        try:
            self._begin()
            text = json.dumps(entries)
            save_file(tensors, partial, metadata={"entries": text, "sha256": checksum(text, tensors)})
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            partial.replace(path)
        except (OSError, SafetensorError) as error:
            raise OutputError(f"{path} cannot be written: {error}") from error

    def remove(self) -> None:
        """The run is finished and its output written. What somebody else put into the folder stays."""
        self._remove_stages()
        (self._folder / FINGERPRINT).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # not empty, or not there
            self._folder.rmdir()

    def _remove_stages(self) -> None:
        for path in self._folder.glob("*"):
            if STAGE_FILE.fullmatch(path.name):
                path.unlink(missing_ok=True)

    def _file(self, position: int, pass_name: str, stage: int) -> Path:
        return self._folder / f"{position:02}-{pass_name}.{stage:05}.safetensors"

    def _begin(self) -> None:
        """Make the folder with the first finished stage, so that a run that fails before leaves nothing."""
        noted = self._folder / FINGERPRINT
        if not noted.exists():
            self._folder.mkdir(parents=True, exist_ok=True)
            noted.write_text(json.dumps(self._fingerprint, indent=2) + "\n", encoding="utf-8")


def _read(path: Path) -> dict[str, Computed]:
    from safetensors import SafetensorError, safe_open

    found: dict[str, Computed] = {}
    try:
        with safe_open(path, framework="numpy") as file:
            noted = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (no mapping)
            if noted["sha256"] != checksum(noted["entries"], tensors):
                raise ValueError("its checksum is not that of what it holds")
            for number, entry in enumerate(json.loads(noted["entries"])):
                arrays = {key: _typed(tensors[f"{number}.{key}"], dtype) for key, dtype in entry["types"].items()}
                found[entry["name"]] = Computed(arrays, entry["facts"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} is damaged ({error}); remove it, and its layers are computed again") from error
    return found


def _read_json(path: Path) -> dict[str, Any]:
    try:
        read: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return read
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is damaged ({error}); remove its folder to start anew") from error


def _plain(array: np.ndarray) -> np.ndarray:
    array = np.asarray(array, order="C")  # ascontiguousarray would make a row of a scalar
    return array.view(np.uint16) if str(array.dtype) in _BYTES_ONLY else array


def _typed(array: np.ndarray, dtype: str) -> np.ndarray:
    return array.view(_BYTES_ONLY[dtype]) if dtype in _BYTES_ONLY else array.astype(dtype, copy=False)
