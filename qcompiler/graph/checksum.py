"""Whether a file of tensors that we wrote is still what we wrote."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np


def checksum(text: str, tensors: Mapping[str, np.ndarray]) -> str:
    """SHA-256 of a description, and of the tensors with their names, types and shapes."""
    digest = hashlib.sha256(text.encode())
    for key in sorted(tensors):
        digest.update(f"{key}:{tensors[key].dtype}{tensors[key].shape};".encode())
        digest.update(np.ascontiguousarray(tensors[key]).tobytes())
    return digest.hexdigest()
