"""The report: what was done to every site, at what error, and what was not done and why."""

from qcompiler.recipes.gates import GATES, GateKind
from qcompiler.report.report import Gate, PassReport, PassSkip, Report, SiteReport, Sizes, check_gates
from qcompiler.report.table import render

__all__ = [
    "GATES",
    "Gate",
    "GateKind",
    "PassReport",
    "PassSkip",
    "Report",
    "SiteReport",
    "Sizes",
    "check_gates",
    "render",
]
