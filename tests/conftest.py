"""Options that all tests share; the builders of small models are in `tiny.py`."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite the `after` part of the golden cases")
