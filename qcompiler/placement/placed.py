"""What is known of a model's placement, and how two such findings differ."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Role = Literal["", "shape", "fallback", "follows", "none", "expanded", "fails"]
NAMED = 3  # nodes that a warning names


@dataclass(frozen=True)
class PlacedNode:
    """A node and the provider that runs it."""

    name: str
    op: str
    """With its domain where that is not ONNX's own: com.microsoft::MatMulNBits."""
    provider: str
    """Without "ExecutionProvider"; empty where none has a kernel."""
    role: Role = ""
    """Empty where all is as the target wants it. Else

    - "shape": shape arithmetic, which the runtime moves to the CPU as its operands are there
    - "fallback": the target's first provider has no kernel, so it runs on the CPU
    - "follows": on the CPU because it reads only what a node that fell back gives
    - "none": no provider has a kernel
    - "expanded": no provider has a kernel, but the runtime takes the operator apart into others, not told here
    - "fails": placed on that provider, which is known to fail when it runs it
    """
    reason: str = ""
    """Why; of a node that follows one that fell back: the name of that one."""


@dataclass(frozen=True)
class Copy:
    """A value that is copied between the host's memory and the device's on every run."""

    value: str
    to: Literal["host", "device"]
    warning: str = ""
    """Set where it is neither shape arithmetic nor part of a fallback: who reads what from where."""


@dataclass(frozen=True)
class Placement:
    """Every node that runs, in order, and every copy."""

    measured: bool
    """By a session of ONNX Runtime, or else predicted from the kernel tables."""
    runtime: str
    """The distribution and version that was asked, or whose tables were."""
    nodes: tuple[PlacedNode, ...]
    copies: tuple[Copy, ...]

    def with_role(self, *roles: Role) -> list[PlacedNode]:
        return [node for node in self.nodes if node.role in roles]

    @property
    def warnings(self) -> list[str]:
        """A sentence for each reason why nodes are not where the target wants them; none for shape arithmetic."""
        groups: dict[tuple[str, Role, str], list[PlacedNode]] = defaultdict(list)
        for node in self.with_role("fallback", "none", "fails"):
            groups[node.op, node.role, node.reason].append(node)
        followers: dict[str, int] = defaultdict(int)
        for node in self.with_role("follows"):
            followers[node.reason] += 1
        found = []
        for (op, role, reason), nodes in groups.items():
            count = sum(followers[node.name] for node in nodes)
            found.append(f"{_named(op, nodes)} {_fate(role, len(nodes), count)}: {reason}")
        return found + [copy.warning for copy in self.copies if copy.warning]

    def summary(self) -> str:
        """In one line: how many nodes run where, how many of them are shape arithmetic, how many copies there are."""
        counts: dict[str, int] = defaultdict(int)
        for node in self.nodes:
            counts[node.provider or "none"] += 1
        shape = len(self.with_role("shape"))
        places = ", ".join(f"{_nodes(count)} on {provider}" for provider, count in counts.items())
        arithmetic = f" ({shape} of them shape arithmetic)" if shape else ""
        copies = "1 copy" if len(self.copies) == 1 else f"{len(self.copies)} copies"
        return f"{places}{arithmetic}, {copies} between host and device"


@dataclass(frozen=True)
class PlacementDifference:
    """How a measured placement differs from a predicted one."""

    moved: tuple[tuple[PlacedNode, PlacedNode], ...]
    """(predicted, measured) of nodes that both know and that run on different providers."""
    removed: tuple[PlacedNode, ...]
    """Predicted, but taken out by the runtime's optimizers before nodes are placed."""
    made: tuple[PlacedNode, ...]
    """Measured, but made by the optimizers."""
    copies: tuple[int, int]
    """Predicted and measured."""


def compare(predicted: Placement, measured: Placement) -> PlacementDifference:
    """Nodes are the same where their names are."""
    theirs = {node.name: node for node in measured.nodes}
    mine = {node.name: node for node in predicted.nodes}
    both = [(mine[name], theirs[name]) for name in mine if name in theirs]
    return PlacementDifference(
        moved=tuple((a, b) for a, b in both if a.provider != b.provider),
        removed=tuple(node for name, node in mine.items() if name not in theirs),
        made=tuple(node for name, node in theirs.items() if name not in mine),
        copies=(len(predicted.copies), len(measured.copies)),
    )


def _nodes(count: int) -> str:
    return "1 node" if count == 1 else f"{count} nodes"


def _fate(role: Role, count: int, followers: int) -> str:
    """What becomes of so many nodes, and of those that follow them."""
    if role == "none":
        return f"{'has' if count == 1 else 'have'} no kernel at all, so no session will start"
    if role == "fails":
        return "fails when it runs" if count == 1 else "fail when they run"
    they = "it gives" if count == 1 else "they give"
    follow = f", as does the node that reads only what {they}"
    if followers > 1:
        follow = f", as do the {followers} nodes that read only what {they}"
    return ("runs on the CPU" if count == 1 else "run on the CPU") + (follow if followers else "")


def _named(op: str, nodes: Sequence[PlacedNode]) -> str:
    if len(nodes) == 1:
        return f"{nodes[0].name} ({op})"
    rest = f" and {len(nodes) - NAMED} more" if len(nodes) > NAMED else ""
    return f"{len(nodes)} × {op} ({', '.join(node.name for node in nodes[:NAMED])}{rest})"
