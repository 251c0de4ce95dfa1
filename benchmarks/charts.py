"""Draws the picture that the README shows, from `results/quality.json`: `python benchmarks/charts.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot
from matplotlib.lines import Line2D

ROOT = Path(__file__).parent.parent
OURS, PEERS = "#1f6feb", "#8a8f98"


def quality(report: dict[str, Any], path: Path) -> None:
    """The KL of every method, as the model is and with planted outliers, on a logarithmic axis; the best come first."""
    found = {(row["method"], row["variant"]): row["kl"] for row in report["rows"] if "kl" in row}
    size = {row["method"]: row["bytes"] for row in report["rows"] if row["variant"] == "dynamo"}
    methods = sorted({method for method, _ in found}, key=lambda method: -found[method, "dynamo-outliers"])
    pyplot.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "quality", "font.family": "sans-serif"})
    figure, axes = pyplot.subplots(figsize=(8.4, 0.34 * len(methods) + 1.1), layout="constrained")
    for row, method in enumerate(methods):
        colour = PEERS if method.startswith("onnxruntime") else OURS
        plain, outliers = found[method, "dynamo"], found[method, "dynamo-outliers"]
        axes.plot([plain, outliers], [row, row], color=colour, linewidth=1.4, alpha=0.5, zorder=1)
        axes.scatter([plain], [row], s=46, color=colour, zorder=2)
        axes.scatter([outliers], [row], s=46, facecolor="white", edgecolor=colour, linewidth=1.6, zorder=3)
    axes.set_yticks(range(len(methods)), [f"{method} · {size[method] / 1e6:.1f} MB" for method in methods])
    axes.set_xscale("log")
    axes.set_xlabel("KL from the float model, nats a token (less is better)")
    axes.grid(axis="x", color="#e3e6ea", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    marks = [
        Line2D([], [], linestyle="", marker="o", color=OURS, label="as the model is"),
        Line2D([], [], linestyle="", marker="o", markerfacecolor="white", color=OURS, label="outliers planted"),
        Line2D([], [], linestyle="", marker="s", color=OURS, label="qcompiler"),
        Line2D([], [], linestyle="", marker="s", color=PEERS, label="onnxruntime's quantizers"),
    ]
    axes.legend(handles=marks, loc="lower left", frameon=False, ncols=2, fontsize=9)
    figure.savefig(path, metadata={"Date": None}, facecolor="white")
    pyplot.close(figure)


def main() -> None:
    report = json.loads((ROOT / "benchmarks/results/quality.json").read_text(encoding="utf-8"))
    quality(report, ROOT / "docs/images/quality.svg")


if __name__ == "__main__":
    main()
