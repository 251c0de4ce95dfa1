"""The verdict of a report in a word, a sentence and a colour, for terminal and page alike."""

from __future__ import annotations

from dataclasses import dataclass

from qcompiler.report.report import Report, State


@dataclass(frozen=True)
class Verdict:
    word: str
    said: str
    mark: str
    mood: str
    """Its class in a page."""
    style: str
    """Its style in a terminal."""


SHOWN: dict[State, tuple[str, str, str, str]] = {
    # state: word, mark, mood, style
    "good": ("Good", "✓", "good", "bold green"),
    "look": ("Look", "!", "look", "bold yellow"),
    "failed": ("Failed", "✗", "bad", "bold red"),
    "not checked": ("Not checked", "–", "neutral", "bold"),
}


def verdict(report: Report) -> Verdict:
    word, mark, mood, style = SHOWN[report.state]
    return Verdict(word, _said(report), mark, mood, style)


def _said(report: Report) -> str:
    gates = len(report.gates)
    match report.state:
        case "failed":
            return "; ".join(report.failures)
        case "look":
            count = len(report.looks)
            return "1 thing to look at before shipping it" if count == 1 else f"{count} things to look at"
        case "not checked":
            return "not compared with the float model: give --calibration with two samples or more"
    if gates:
        return "the gate holds" if gates == 1 else f"all {gates} gates hold"
    return "near the float model on the samples held out"
