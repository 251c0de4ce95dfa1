"""Which kernels ran, and what share of the time each operator took: onnxruntime's profile of a few runs."""

from __future__ import annotations

import json
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnxruntime

KERNEL = "_kernel_time"  # ends the name of a node's event
RUN = "model_run"


@dataclass(frozen=True)
class OperatorShare:
    """An operator of the graph that onnxruntime made of a model."""

    operator: str
    provider: str
    """What ran it, as onnxruntime calls it: CPUExecutionProvider."""
    nodes: int
    share: float
    """Of the time in kernels, 0 to 1."""


def profiled(
    opened: Callable[[onnxruntime.SessionOptions], onnxruntime.InferenceSession],
    options: onnxruntime.SessionOptions,
    run: Callable[[onnxruntime.InferenceSession], object],
    count: int,
) -> tuple[OperatorShare, ...]:
    """Run a session of its own `count` times after a first one that does not count; the most time comes first."""
    with tempfile.TemporaryDirectory(prefix="qcompiler-") as folder:
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = opened(options)
        for _ in range(count + 1):
            run(session)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    return shares(events)


def shares(events: Sequence[Mapping[str, Any]]) -> tuple[OperatorShare, ...]:
    """What a profile tells: the time of each node in the run that disturbed it least.

    A node with a body (If, Loop) has the time that the nodes of the body do not have.
    """
    runs = sorted((event["ts"], event["ts"] + event["dur"]) for event in events if event.get("name") == RUN)
    runs = runs[1:] or runs  # the first also allocates
    kernels = [event for event in events if event.get("cat") == "Node" and event["name"].endswith(KERNEL)]
    nodes: dict[str, tuple[str, str]] = {}
    least: dict[str, float] = {}
    for start, end in runs:
        inside = [event for event in kernels if start <= event["ts"] <= end]
        nodes |= {event["name"]: (event["args"]["op_name"], event["args"]["provider"]) for event in inside}
        for name, time in _own_times(inside).items():
            least[name] = min(time, least.get(name, time))
    total = sum(least.values()) or 1.0
    times: dict[tuple[str, str], float] = defaultdict(float)
    for name, kind in nodes.items():
        times[kind] += least[name]
    counts = Counter(nodes.values())
    found = [OperatorShare(*kind, counts[kind], time / total) for kind, time in times.items()]
    return tuple(sorted(found, key=lambda one: (-one.share, one.operator)))


def _own_times(events: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """By node, without what runs inside of it."""
    times: dict[str, float] = defaultdict(float)
    around: dict[object, list[tuple[float, str]]] = defaultdict(list)  # the end and the node, by thread
    for event in sorted(events, key=lambda event: (event["ts"], -event["dur"])):
        stack = around[event.get("tid")]
        while stack and stack[-1][0] <= event["ts"]:
            stack.pop()
        if stack:
            times[stack[-1][1]] -= event["dur"]
        times[event["name"]] += event["dur"]
        stack.append((event["ts"] + event["dur"], event["name"]))
    return {name: max(0.0, time) for name, time in times.items()}
