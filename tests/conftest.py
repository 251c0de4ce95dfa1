"""Options and paths that all tests share; the builders of small models are in `tiny.py`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# The checkout under test comes before an installed copy; `models` holds scripts, not a package.
for folder in (ROOT / "models", ROOT):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite the `after` part of the golden cases")
