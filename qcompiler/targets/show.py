"""A target as a person reads it: its kernels with conditions and measured speed, what it refuses, what it prefers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.markup import escape
from rich.padding import Padding

from qcompiler.targets import Kernel, Rule, Target
from qcompiler.targets.conditions import conditions
from qcompiler.targets.machines import this_cpu

if TYPE_CHECKING:
    from rich.console import Console


MODELS = {"decoder": "language models with a cache", "convolution": "convolutional networks", "other": "other models"}


def render_target(target: Target, console: Console) -> None:
    """Print everything that a target's file says."""
    console.print(f"[bold]{target.name}[/bold]  {escape(target.title)}")
    console.print(target.description, markup=False, highlight=False)
    facts = {
        "kernels of": target.runtime,
        "providers": ", ".join(target.providers),
        "lowering": ", ".join(target.lowering),
        "disabled optimizers": ", ".join(target.disabled_optimizers),
        "session options": ", ".join(f"{key}={value}" for key, value in target.session_options.items()),
        "preferences": "; ".join(
            f"{name} " + ", ".join(f"{key}={value}" for key, value in options.items())
            for name, options in target.pass_defaults.items()
        ),
    }
    console.print()
    for title, text in facts.items():
        if text:
            console.print(f"{title}: {text}", markup=False, highlight=False)
    console.print()
    for kernel in target.kernels:
        console.print(f"[bold]{escape(kernel.scheme)}[/bold]  {escape(kernel.operator)}", highlight=False)
        for line in _lines(target, kernel):
            console.print(Padding(escape(line), (0, 0, 0, 4)), highlight=False)
    console.print()
    for rule in target.rules:
        when = "".join(f", {name} {value}" for name, value in rule.when.items())
        console.print(f"[bold]rule[/bold]  {escape(rule.operator)}{when}: {escape(rule.kernel)}", highlight=False)
        for line in _conditions(rule):
            console.print(Padding(escape(line), (0, 0, 0, 4)), highlight=False)
    console.print()
    for advice in target.advice:
        console.print(
            f"for {MODELS[advice.models]}: --recipe {advice.recipe}; {advice.because}", markup=False, highlight=False
        )
    console.print()
    for refusal in target.refuses:
        console.print(f"refuses {refusal.scheme}: {refusal.sentence}", markup=False, highlight=False)


def _conditions(rule: Rule) -> list[str]:
    lines = _where(rule.requires)
    if rule.fallback is not None:
        lines += [f"else {rule.fallback.kernel}", *_where(rule.fallback.requires)]
    if rule.otherwise:
        lines.append(f"else {rule.otherwise}")
    return [*lines, *filter(None, [rule.note]), f"known from: {rule.source}"]


def _where(key: str) -> list[str]:
    found = conditions(key) if key else ()
    return [f"where {item.text}" + (f" ({item.source})" if item.source else "") for item in found]


def _lines(target: Target, kernel: Kernel) -> list[str]:
    speeds = [
        f"{speed.ratio:g} × {speed.against}: {speed.case}; {speed.machine}; {speed.date}"
        + ("; this CPU" if target.is_for(speed, this_cpu()) else "")
        for speed in kernel.speed
    ]
    texts = [kernel.types, kernel.conditions, kernel.note, *speeds, "" if speeds else "speed not measured"]
    return [*(text for text in texts if text), f"known from: {kernel.source}"]
