"""``python -m qcompiler`` is the command line."""

from qcompiler.cli.app import main

main()
