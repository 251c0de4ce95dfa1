"""Text of a model on a terminal: a stranger chose its names, and a terminal obeys what some of them could hold."""

from __future__ import annotations

from collections.abc import Iterable

from rich import markup
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from qcompiler.errors import printable


def escape(text: str) -> str:
    """For rich: what a name holds is neither markup nor a command."""
    return markup.escape(printable(text))


class PlainConsole(Console):
    """Whatever else reaches it: of control characters nothing but the ends of lines."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            if segment.control or segment.text.isprintable():
                yield segment
            else:
                lines = segment.text.split("\n")
                yield Segment("\n".join(map(printable, lines)), segment.style)
