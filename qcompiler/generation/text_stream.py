"""Text from tokens that come one by one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer

UNFINISHED = "�"
"""What a tokenizer puts for bytes that are no character, or not yet."""
CONTEXT = 8
"""Tokens decoded together with new ones, as a token's text may depend on those before it (spaces, split characters)."""


class TextStream:
    """Gives text as soon as it is certain: whole characters, and nothing that may be the beginning of a stop text."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stops: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt)[-CONTEXT:]
        self._before, self._done = 0, len(self._ids)
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.stopped = False
        """A stop text has come; it and all that follows are left out."""

    def push(self, token: int) -> str:
        """The text that this token makes certain; may be empty."""
        if self.stopped:
            return ""
        self._ids.append(token)
        new = self._new_text()
        if not new or new.endswith(UNFINISHED):
            return ""
        self._before, self._done = max(self._done - CONTEXT, 0), len(self._ids)
        return self._release(new)

    def finish(self) -> str:
        """What was held back, at the end of the text; bytes that never became a character are shown as such."""
        if self.stopped:
            return ""
        text = self._release(self._new_text())
        rest, self._held = self._held, ""
        self._done = len(self._ids)
        return text + rest

    def _new_text(self) -> str:
        known = self._decode(self._ids[self._before : self._done])
        return self._decode(self._ids[self._before :])[len(known) :]

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    def _release(self, new: str) -> str:
        text = self._held + new
        at = min((place for stop in self._stops if (place := text.find(stop)) >= 0), default=None)
        if at is not None:
            self.stopped, self._held = True, ""
            return text[:at]
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """The longest end of the text, in characters, that the stop text begins with."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)
