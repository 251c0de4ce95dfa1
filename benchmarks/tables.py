"""Write the figures of `results/*.json` between their marks in README.md and docs/benchmarks.md.

python benchmarks/tables.py [--check]     with --check only say which are not up to date, exit code 1
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
TEXTS = ("README.md", "docs/benchmarks.md")


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---", *("---:" for _ in head[1:])], *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def source(report: dict[str, Any], script: str) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    return f"`{script}`, {report['date']}, {report['machine']}, {versions}."


def quality(report: dict[str, Any]) -> str:
    base = {row["variant"]: row["perplexity"] for row in report["rows"] if row["method"] == "float"}
    parts = []
    for variant, title in (("dynamo", "as it is"), ("dynamo-outliers", "with planted outliers")):
        rows = []
        for row in (row for row in report["rows"] if row["variant"] == variant):
            peer = row["method"].startswith("onnxruntime") or row["method"] == "float"
            name = row["method"] if peer else f"**{row['method']}**"
            rows.append([
                name, f"{row['perplexity']:.3f}", f"{row['perplexity'] / base[variant]:.4f}",
                f"{row['kl']:.5f}" if "kl" in row else "", f"{row['top1']:.1%}" if "top1" in row else "",
                f"{row['bytes'] / 1e6:.2f}", f"{row['speed']:.2f} ×",
            ])  # fmt: skip
        head = [title, "perplexity", "ratio", "KL", "same top-1", "MB", "speed"]
        parts.append(table(head, rows))
    tokens = report["rows"][0]["tokens"]
    note = f"{tokens:,} tokens; speed is one window of 256 tokens on one thread. " + source(
        report, "benchmarks/quality.py"
    )
    return "\n\n".join([*parts, note])


def int8(report: dict[str, Any]) -> str:
    """What `quality` says of the recipes that most will take, and of every peer, in one table."""
    shown = ("smoothquant", "int8-dynamic", "llm-int8", "int8-weights", "fp8")
    found = {(row["method"], row["variant"]): row for row in report["rows"]}
    rows = []
    for method in dict.fromkeys(row["method"] for row in report["rows"]):
        if method in shown or method.startswith("onnxruntime"):
            plain, outliers = found[method, "dynamo"], found[method, "dynamo-outliers"]
            rows.append([
                f"**{method}**" if method in shown else method, f"{plain['kl']:.4f}", f"{outliers['kl']:.4f}",
                f"{outliers['top1']:.1%}", f"{plain['bytes'] / 1e6:.1f}", f"{plain['speed']:.2f} ×",
            ])  # fmt: skip
    head = ["8 bits", "KL", "KL, outliers", "same top-1, outliers", "MB", "speed"]
    return (
        table(head, rows)
        + f"\n\n{report['rows'][0]['tokens']:,} tokens; the float model has "
        + (f"{found['float', 'dynamo']['bytes'] / 1e6:.1f} MB. " + source(report, "benchmarks/quality.py"))
    )


def four_bits(report: dict[str, Any]) -> str:
    """KL alone, of all that `weight_only` says of 4 bits."""
    rows = [row for row in report["rows"] if row.get("bits") == 4]
    places = [(symmetric, group) for symmetric in (True, False) for group in (128, 32)]
    found = {(row["tool"], row["method"], row["symmetric"], row["group"]): row["kl"] for row in rows}
    lines = []
    for tool, method in sorted(dict.fromkeys((row["tool"], row["method"]) for row in rows), key=_ours_first):
        values = [found.get((tool, method, *place)) for place in places]
        name = f"**{method}**" if tool == "qcompiler" else f"{tool} {method}"
        lines.append([name, *("" if value is None else f"{value:.4f}" for value in values)])
    head = ["KL with weights in 4 bits", "symmetric, 128", "32", "zero points, 128", "32"]
    return table(head, lines) + f"\n\n{report['tokens']:,} tokens. " + source(report, "benchmarks/weight_only.py")


def _ours_first(row: tuple[str, str]) -> bool:
    return row[0] != "qcompiler"


def speed(report: dict[str, Any]) -> str:
    methods = list(dict.fromkeys(row["method"] for row in report["rows"]))
    found = {(row["method"], row["tokens"]): row for row in report["rows"]}
    tokens = sorted({row["tokens"] for row in report["rows"]}, reverse=True)
    rows = [[name, *(f"{found[name, count]['speed']:.2f} ×" for count in tokens)] for name in methods]
    head = ["against float, one thread", *(f"{count} token{'s' if count > 1 else ''}" for count in tokens)]
    title = f"A Llama decoder block, hidden size {report['hidden']}. "
    return "\n\n".join([table(head, rows), title + source(report, "benchmarks/speed.py")])


def memory(report: dict[str, Any]) -> str:
    rows = [
        [row["recipe"], f"{row['gb_before']:.2f} GB", f"{row['gb_after']:.2f} GB", f"{row['peak_gb']:.2f} GB",
         f"{row['seconds']:.0f} s"]
        for row in report["rows"]
    ]  # fmt: skip
    head = ["compiling a Llama-shaped model", "float weights", "result", "peak memory", "time"]
    data = f"{report['samples']} samples of {report['sequence']} tokens"
    title = f"smoothquant with {data}, --memory-limit {report['memory_limit']}. "
    return "\n\n".join([table(head, rows), title + source(report, "benchmarks/memory.py")])


def weight_only(report: dict[str, Any]) -> str:
    parts = []
    for bits, symmetric in dict.fromkeys((row["bits"], row["symmetric"]) for row in report["rows"] if "bits" in row):
        rows = [row for row in report["rows"] if (row.get("bits"), row.get("symmetric")) == (bits, symmetric)]
        groups = sorted({row["group"] for row in rows}, reverse=True)
        found = {(row["tool"], row["method"], row["group"]): row for row in rows}
        lines = []
        for tool, method in dict.fromkeys((row["tool"], row["method"]) for row in rows):
            cells = [f"**{method}**" if tool == "qcompiler" else f"{tool} {method}"]
            for group in groups:
                row = found.get((tool, method, group), {})
                cells += [f"{row['kl']:.5f}" if row else "", f"{row['closed']:.0%}" if "closed" in row else "",
                          f"{row['perplexity']:.2f}" if row else ""]  # fmt: skip
            lines.append(cells)
        title = f"{bits} bits, {'symmetric' if symmetric else 'with zero points'}"
        head = [title, *(name for group in groups for name in (f"KL, group {group}", "closed", "perplexity"))]
        parts.append(table(head, lines))
    parts.append(as_they_come(report))
    note = f"{report['tokens']:,} tokens, calibrated on {report['calibration']}; only the blocks' linear layers are "
    note += "quantized, and all arithmetic is float, except in the last table. "
    return "\n\n".join([*parts, note + source(report, "benchmarks/weight_only.py")])


def as_they_come(report: dict[str, Any]) -> str:
    """The recipes with their own settings, embedding and lm_head included, with the kernels of ort-cpu."""
    rows = [
        [row["method"] if row["method"] == "float" else f"**{row['method']}**", f"{row['kl']:.5f}",
         f"{row['perplexity']:.2f}", f"{row['top1']:.1%}", f"{row['bytes'] / 1e6:.2f}"]
        for row in report["rows"] if row.get("shipped")
    ]  # fmt: skip
    return table(["as they come, for ort-cpu", "KL", "perplexity", "same top-1", "MB"], rows)


def weight_only_memory(report: dict[str, Any]) -> str:
    rows = [
        [f"{row['tool']} {row['recipe']}", f"{row['blocks']}", f"{row['parameters'] / 1e9:.2f}",
         f"{row['peak_gb']:.2f} GB", f"{row['seconds']:.0f} s",
         f"{row['floor_seconds']:.0f} s" if "floor_seconds" in row else ""]
        for row in report["rows"]
    ]  # fmt: skip
    head = ["GPTQ of a Llama-shaped model", "blocks", "10⁹ parameters", "peak memory", "time", "floor"]
    data = f"{report['samples']} samples of {report['sequence']} tokens"
    title = f"{data}, {report['cores']} cores, --memory-limit {report['memory_limit']}; the floor is operations ÷ "
    title += "measured GEMM rate. "
    return "\n\n".join([table(head, rows), title + source(report, "benchmarks/weight_only_memory.py")])


def kv_quality(report: dict[str, Any]) -> str:
    rows = [
        [row["variant"], f"**{row['recipe']}**", f"{row['kl']:.5f}", f"{row['perplexity_ratio']:.4f}",
         f"{row['top1']:.1%}", f"{row['cache_bytes'] / row['cache_float_bytes']:.3f}" if row["cache_bytes"] else "1"]
        for row in report["rows"]
    ]  # fmt: skip
    head = ["exporter", "recipe", "KL", "perplexity ratio", "same top-1", "bytes a token, × float32"]
    title = f"{report['rows'][0]['tokens']:,} held-out tokens, read one by one through the cache, against the float "
    title += "model of the same exporter. "
    return "\n\n".join([table(head, rows), title + source(report, "benchmarks/kv_quality.py")])


def kv_cache(report: dict[str, Any]) -> str:
    models = list(dict.fromkeys(row["model"] for row in report["rows"]))
    found = {(row["cache"], row["model"]): row for row in report["rows"]}
    rows = [
        [cache, *(f"{found[cache, model]['speed']:.2f} ×" for model in models)]
        for cache in dict.fromkeys(row["cache"] for row in report["rows"]) if "right padding" not in cache
    ]  # fmt: skip
    head = [f"a step after {report['past']:,} tokens", *models]
    note = "Against the float cache as exported, one thread; shared: past and present in one buffer. "
    return "\n\n".join([table(head, rows), note + source(report, "benchmarks/kv_cache.py")])


TABLES = {
    "int8": ("quality", int8), "quality": ("quality", quality), "speed": ("speed", speed), "memory": ("memory", memory),
    "four_bits": ("weight_only", four_bits), "weight_only": ("weight_only", weight_only),
    "weight_only_memory": ("weight_only_memory", weight_only_memory), "kv_quality": ("kv_quality", kv_quality),
    "kv_cache": ("kv_cache", kv_cache),
}  # fmt: skip
"""A mark, whose results it takes, and what it writes."""


def filled(text: str) -> str:
    """A text with the tables of today's results between its marks."""
    for name in re.findall(r"^<!-- (\w+) -->$", text, re.MULTILINE):
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        before, rest = text.split(begin)
        results, write = TABLES[name]
        report = json.loads((RESULTS / f"{results}.json").read_text(encoding="utf-8"))
        text = f"{before}{begin}\n{write(report)}\n{end}{rest.split(end)[1]}"
    return text


def stale() -> list[str]:
    """The texts whose tables are not those of today's results."""
    texts = {name: (ROOT / name).read_text(encoding="utf-8") for name in TEXTS}
    return [name for name, text in texts.items() if filled(text) != text]


def main() -> None:
    names = stale()
    if "--check" in sys.argv and names:
        sys.exit(f"run python benchmarks/tables.py: {', '.join(names)} is not what benchmarks/results say")
    for name in names:
        path = ROOT / name
        path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
