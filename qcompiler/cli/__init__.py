"""The command line: `app.py` has the commands of the main line, every other file one or two more."""

from qcompiler.cli.app import main

__all__ = ["main"]
