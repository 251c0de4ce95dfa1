"""A model's file damaged: its messages changed, or its bytes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from google.protobuf.message import DecodeError
from onnx import ModelProto
from onnx.checker import ValidationError

from tests.fuzz import damage_data, damage_nodes  # noqa: F401  (they fill the table)
from tests.fuzz.messages import DAMAGE, Rng

NOTHING_TO_CHANGE = (ValueError, TypeError, OverflowError, OSError, DecodeError, ValidationError)
"""An earlier change left nothing that this one could work on."""


def damaged(model: ModelProto, rng: Rng) -> list[str]:
    """Change a model in one to three ways; returns which."""
    done = []
    for _ in range(int(rng.choice([1, 1, 1, 2, 3]))):
        change = DAMAGE[int(rng.integers(len(DAMAGE)))]
        try:
            change(model, rng)
        except NOTHING_TO_CHANGE:
            continue
        done.append(change.__name__)
    return done


def write_external(folder: Path, rng: Rng) -> None:
    """What names of external data may lead to."""
    (folder / "weights.bin").write_bytes(rng.normal(size=1024).astype(np.float32).tobytes())
    (folder / "dir").mkdir()
    (folder / "link").symlink_to("/etc/passwd")


def bytes_damaged(data: bytes, other: bytes, rng: Rng) -> bytes:
    """Flips, cuts, splices, repeats and runs of one byte."""
    changed = bytearray(data)
    for _ in range(int(rng.integers(1, 5))):
        if not changed:
            break
        at, length = int(rng.integers(len(changed))), int(rng.integers(1, 64))
        match int(rng.integers(7)):
            case 0:
                changed[at] ^= 1 << int(rng.integers(8))
            case 1:
                del changed[at:]
            case 2:
                del changed[at : at + length]
            case 3:
                begin = int(rng.integers(max(1, len(other))))
                changed[at:at] = other[begin : begin + length]
            case 4:
                changed[at : at + length] = bytes([int(rng.choice([0, 255, 127, 128]))]) * length
            case 5:
                changed[at:at] = changed[at : at + length]
            case 6:
                changed[at] = int(rng.integers(256))
    return bytes(changed)


def early_bytes_damaged(data: bytes, rng: Rng) -> bytes:
    """A flip where names and nodes are: weights, which come later, make most of a file."""
    changed = bytearray(data)
    for _ in range(int(rng.integers(1, 4))):
        changed[int(rng.integers(min(len(changed), 400)))] = int(rng.integers(256))
    return bytes(changed)
