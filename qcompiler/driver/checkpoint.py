"""What the finished stages of a long pass have computed, on disk: a run that was killed goes on where it was.

A folder beside the output holds one file for each stage, written whole or not at all, and the fingerprint of the run:
model, data, recipe and versions. Only a run with the same fingerprint goes on with it, and gives the same bytes.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from qcompiler.errors import DataError, OutputError
from qcompiler.formats.arithmetic import Quantized
from qcompiler.statistics import Solved

FINGERPRINT = "run.json"
_BYTES_ONLY = {"bfloat16": ml_dtypes.bfloat16}  # types that the file format's numpy side does not know


class Journal:
    """The stages of one run, in `folder`."""

    def __init__(self, folder: Path, fingerprint: Mapping[str, str], *, resume: bool) -> None:
        """Begin, or go on with `resume`. Raises OutputError where the folder holds the work of another run, or of an
        unfinished one that nobody said to go on with."""
        self._folder, self._fingerprint = folder, dict(fingerprint)
        noted = folder / FINGERPRINT
        if not noted.exists():
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

    def stages(self, pass_name: str) -> dict[int, dict[str, Solved]]:
        """What the finished stages of a pass computed, by number; constants by name. Raises DataError."""
        prefix = f"{pass_name}."
        files = sorted(self._folder.glob(f"{prefix}*.safetensors"))
        return {int(file.stem.removeprefix(prefix)): _read(file) for file in files}

    def write(self, pass_name: str, stage: int, solved: Mapping[str, Solved]) -> None:
        """Note a finished stage. Raises OutputError."""
        from safetensors import SafetensorError
        from safetensors.numpy import save_file

        tensors: dict[str, np.ndarray] = {}
        entries = []
        for number, (name, found) in enumerate(solved.items()):
            quantized = found.quantized
            arrays = {"codes": quantized.codes, "scale": quantized.scale, "zero_point": quantized.zero_point}
            given = {kind: array for kind, array in arrays.items() if array is not None}
            tensors |= {f"{number}.{kind}": _plain(array) for kind, array in given.items()}
            entries.append(
                {"name": name, "detail": found.detail, "format": quantized.format, "axis": quantized.axis,
                 "block_size": quantized.block_size, "types": {kind: str(a.dtype) for kind, a in given.items()}}
            )  # fmt: skip
        path = self._folder / f"{pass_name}.{stage:05}.safetensors"
        partial = path.with_suffix(".partial")
        try:
            self._begin()
            save_file(tensors, partial, metadata={"entries": json.dumps(entries)})
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            partial.replace(path)
        except (OSError, SafetensorError) as error:
            raise OutputError(f"{path} cannot be written: {error}") from error

    def _begin(self) -> None:
        """Make the folder with the first finished stage, so that a run that fails before leaves nothing."""
        noted = self._folder / FINGERPRINT
        if not noted.exists():
            self._folder.mkdir(parents=True, exist_ok=True)
            noted.write_text(json.dumps(self._fingerprint, indent=2) + "\n", encoding="utf-8")

    def remove(self) -> None:
        """The run is finished and its output written."""
        if self._folder.exists():
            shutil.rmtree(self._folder)


def _read(path: Path) -> dict[str, Solved]:
    from safetensors import SafetensorError, safe_open

    found: dict[str, Solved] = {}
    try:
        with safe_open(path, framework="numpy") as file:
            for number, entry in enumerate(json.loads((file.metadata() or {})["entries"])):
                arrays = {
                    kind: _typed(file.get_tensor(f"{number}.{kind}"), dtype) for kind, dtype in entry["types"].items()
                }
                quantized = Quantized(
                    arrays["codes"], arrays["scale"], arrays.get("zero_point"), entry["axis"], entry["block_size"],
                    entry["format"],
                )  # fmt: skip
                found[entry["name"]] = Solved(quantized, entry["detail"])
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
    array = np.ascontiguousarray(array)
    return array.view(np.uint16) if str(array.dtype) in _BYTES_ONLY else array


def _typed(array: np.ndarray, dtype: str) -> np.ndarray:
    return array.view(_BYTES_ONLY[dtype]) if dtype in _BYTES_ONLY else array.astype(dtype, copy=False)
