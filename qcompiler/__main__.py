"""``python -m qcompiler`` is the command line."""

from qcompiler.cli import main

main()
