"""Options and paths that all tests share; the builders of small models are in `tiny.py`."""

from __future__ import annotations

import sys

import pytest
from paths import ROOT, TESTS

# The checkout under test comes before an installed copy; `models` holds scripts, not a package. The folders of tests,
# one for each room, are here so that a test finds the layers of another.
for folder in (*sorted({path.parent for path in TESTS.rglob("test_*.py")}), ROOT / "models", ROOT):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite the `after` part of the golden cases")
