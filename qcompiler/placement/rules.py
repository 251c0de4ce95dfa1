"""Which path a provider takes for a node, by the rules of a target that no kernel registry says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

from qcompiler.placement.lookup import operator, type_name
from qcompiler.targets import Requirement, Rule, Target


@dataclass(frozen=True)
class Path:
    """A rule that is about a node, and what of it does not hold."""

    rule: Rule
    unmet: tuple[str, ...]
    """Each requirement that does not hold, as a clause with what is there instead."""

    @property
    def fails(self) -> bool:
        return bool(self.unmet) and self.rule.effect == "fails"

    def text(self) -> str:
        """In one sentence: the kernel, or why it is not taken and what is."""
        if not self.unmet:
            return self.rule.kernel + (f"; {self.rule.note}" if self.rule.note else "")
        kernel = self.rule.kernel.partition(",")[0]
        return f"not {kernel}, which wants that {' and that '.join(self.unmet)}: {self.rule.otherwise}"


def path_of(node: ir.Node, target: Target) -> Path | None:
    """The first rule of the target that is about this node; None where there is none."""
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    for rule in target.rules:
        if (
            rule.operator == operator(node)
            and all(attributes.get(name) == value for name, value in rule.when.items())
            and (not rule.outputs or type_name(node.outputs[0]) in rule.outputs)
        ):
            unmet = [_unmet(item, node, attributes, target.session_options) for item in rule.requires]
            return Path(rule, tuple(filter(None, unmet)))
    return None


def _unmet(item: Requirement, node: ir.Node, attributes: Mapping[str, object], session: Mapping[str, str]) -> str:
    """The requirement, and what is there instead, where it does not hold; empty where it does, or nothing is known."""
    if item.absent is not None and item.input is not None:
        there = item.input < len(node.inputs) and node.inputs[item.input] is not None
        return item.text if there is item.absent else ""
    found = _found(item, node, attributes, session)
    if found is None or _holds(item, found):
        return ""
    return f"{item.text} (here {found})" if found != "" else item.text


def _found(
    item: Requirement, node: ir.Node, attributes: Mapping[str, object], session: Mapping[str, str]
) -> object | None:
    """What the requirement looks at; empty text where it is not given, None where it is not known."""
    if item.attribute is not None:
        return attributes.get(item.attribute, "")
    if item.session is not None:
        return session.get(item.session, "")
    value = node.inputs[item.input] if item.input is not None and item.input < len(node.inputs) else None
    if value is None:
        return None
    if item.axis is None:
        return type_name(value) or None
    if value.shape is None or item.axis >= len(value.shape) or not isinstance(value.shape[item.axis], int):
        return None
    return value.shape[item.axis]


def _holds(item: Requirement, found: object) -> bool:
    if item.symmetric:
        sizes = list(found) if isinstance(found, tuple | list) else []
        return sizes[: len(sizes) // 2] == sizes[len(sizes) // 2 :]
    if item.among is not None:
        return found in item.among
    if not isinstance(found, int):
        return found == ""  # an attribute that is not given has a default that the rule allows
    if item.multiple_of is not None:
        return found % item.multiple_of == 0
    return item.at_least is None or found >= item.at_least
