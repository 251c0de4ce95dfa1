"""A progress bar with the time left, on stderr, for work that takes more than a moment."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Progress = Callable[[int, int | None], None]
"""Called with what is done and, where it is known, how much there is in all."""

DELAY = 2.0
"""Seconds of work before a bar appears."""


@contextmanager
def progress_bar(title: str, enabled: bool) -> Iterator[Progress | None]:
    """Gives a function to call as work goes on; None where nothing would be shown.

    The bar needs a terminal at stderr (rich takes FORCE_COLOR or TTY_COMPATIBLE for one) and vanishes at the end.
    """
    if not enabled:
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=console, transient=True)
    task = bar.add_task(title, total=None)
    begin = time.monotonic()

    def report(done: int, total: int | None) -> None:
        bar.update(task, completed=done, total=total)
        if not bar.live.is_started and time.monotonic() - begin > DELAY:
            bar.start()

    try:
        yield report
    finally:
        bar.stop()
