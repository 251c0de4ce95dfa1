"""report.html: the report as one page that needs nothing else, and the card that a notebook shows.

`environment()` is what any page of ours is made with; the pages' look is in `templates/style.css`.
"""

from __future__ import annotations

import re
from functools import cache
from typing import TYPE_CHECKING

from qcompiler.report import views
from qcompiler.report.report import Report

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup


@cache
def environment() -> Environment:
    """Templates of `qcompiler/report/templates`, everything escaped; a name that is not there is an error."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    made = Environment(
        loader=PackageLoader("qcompiler.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    made.filters |= {"size": views.size, "number": views.number, "anchor": anchor, "breakable": breakable}
    return made


def page(report: Report) -> str:
    """The whole of report.html: no file, font or script is fetched from anywhere."""
    return environment().get_template("report.html.j2").render(view=views.View(report), report=report)


def card(report: Report) -> str:
    """Verdict, figures and the map of layers, for the output cell of a notebook; no script."""
    return environment().get_template("card.html.j2").render(view=views.View(report), report=report)


def breakable(text: str) -> Markup:
    """A text whose lines may end where a name has a dot or an underscore."""
    from markupsafe import Markup, escape

    return Markup(re.sub(r"([._])(?=[^\W\d])", r"\1<wbr>", str(escape(text))))


def anchor(text: str) -> str:
    """A name as an id of the page."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", text).strip("-") or "outside"
