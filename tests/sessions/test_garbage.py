"""A search for garbage costs every small model dearly, and large ones need it."""

from __future__ import annotations

import gc

import pytest

from qcompiler.sessions.garbage import WORTH, Garbage


def test_it_is_searched_for_when_there_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    searches: list[int] = []
    monkeypatch.setattr(gc, "collect", lambda: searches.append(1))
    garbage = Garbage()
    for _ in range(3):
        garbage.left(WORTH // 4)
    assert not searches
    garbage.left(WORTH // 4)
    assert len(searches) == 1
    garbage.left(WORTH - 1)
    assert len(searches) == 1
