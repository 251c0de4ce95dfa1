"""Which path a provider takes for a node, by the rules of a target that no kernel registry says."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from qcompiler.placement.lookup import operator
from qcompiler.targets import Rule, Target
from qcompiler.targets.conditions import Call, call_of, type_name, unmet


@dataclass(frozen=True)
class Path:
    """A rule that is about a node, and what of it does not hold."""

    rule: Rule
    unmet: tuple[str, ...]
    """Each condition that does not hold, as a clause with what is there instead."""
    instead: str = ""
    """What is taken then."""

    @property
    def fails(self) -> bool:
        return bool(self.unmet) and self.rule.effect == "fails"

    def text(self) -> str:
        """In one sentence: the kernel, or why it is not taken and what is."""
        if not self.unmet:
            return self.rule.kernel + (f"; {self.rule.note}" if self.rule.note else "")
        kernel = self.rule.kernel.partition(",")[0]
        return f"not {kernel}, which wants that {' and that '.join(self.unmet)}: {self.instead}"


def path_of(node: ir.Node, target: Target) -> Path | None:
    """The first rule of the target that is about this node; None where there is none."""
    shown = operator(node)
    about = [rule for rule in target.rules if rule.operator == shown]
    if not about:
        return None
    call = call_of(node, target.session_options)
    for rule in about:
        if all(call.attributes.get(name) == value for name, value in rule.when.items()) and (
            not rule.outputs or type_name(node.outputs[0]) in rule.outputs
        ):
            fallback = rule.fallback
            taken = fallback is not None and not _unmet(fallback.requires, call)
            instead = fallback.kernel if fallback is not None and taken else rule.otherwise
            return Path(rule, _unmet(rule.requires, call), instead)
    return None


def _unmet(key: str, call: Call) -> tuple[str, ...]:
    return tuple(condition.clause(found) for condition, found in unmet(key, call)) if key else ()
