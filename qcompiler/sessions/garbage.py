"""Lets sessions and the weights that they mapped go soon after they are done, not at some later time."""

from __future__ import annotations

import ctypes
import gc

WORTH = 32 << 20
"""Bytes that are worth a search: Python looks at every object for it, 80 ms and more where libraries are loaded."""


class Garbage:
    """What the sessions of one run have left behind, and nobody uses any more."""

    def __init__(self) -> None:
        self._bytes = 0

    def left(self, count: int) -> None:
        """A session is gone that held so many bytes of weights and values."""
        self._bytes += count
        if self._bytes >= WORTH:
            gc.collect()
            trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc, which keeps what was freed
            if trim is not None:
                trim(0)
            self._bytes = 0
