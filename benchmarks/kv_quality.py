"""What a quantized KV-cache costs in quality, and how many bytes it takes: `results/kv_quality.json`.

    python benchmarks/kv_quality.py [--windows 16]

Held-out text is read token by token through the cache, so that every prediction rests on keys and values that were
stored; the float model of the same exporter is read in the same way. KL is taken token by token between both.
"""

from __future__ import annotations

import argparse
import json
import sys
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.quality import machine, versions  # noqa: E402
from models.export import model_path  # noqa: E402
from qcompiler import compiler  # noqa: E402
from qcompiler.evaluation.evaluate import Steps, evaluate  # noqa: E402

DEMO, CACHE = ROOT / "models" / "demo", ROOT / "benchmarks" / ".cache" / "kv"
SEQUENCE, SAMPLES = 256, 32
BY_EXPORTER = ("kv-int8", "kv-int4")
RECIPES = {
    "dynamo-past": (*BY_EXPORTER, "kv-int8-fused", "kv-int4-fused", "gptq-w4", "gptq-w4-kv8"),
    "optimum": BY_EXPORTER,
    "genai": BY_EXPORTER,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=16, help=f"held-out windows of {SEQUENCE} tokens")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "kv_quality.json")
    arguments = parser.parse_args()
    rows = [measure(variant, recipe, arguments.windows) for variant, recipes in RECIPES.items() for recipe in recipes]
    report = {"date": date.today().isoformat(), "machine": machine(), "versions": versions(), "rows": rows}
    arguments.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def measure(variant: str, recipe: str, windows: int) -> dict[str, Any]:
    source, folder = model_path(variant), CACHE / f"{variant}-{recipe}"
    compiled = compiler.compile(
        source, recipe, calibration=str(DEMO / "calibration.txt"), tokenizer=DEMO / "tokenizer.json", samples=SAMPLES,
        sequence_length=SEQUENCE,
    )  # fmt: skip
    compiled.save(folder, overwrite=True)
    found = evaluate(
        folder / "model.onnx", str(DEMO / "heldout.txt"), tokenizer=DEMO / "tokenizer.json", sequence_length=SEQUENCE,
        reference=source, limit=windows, threads=1, decode=Steps(chunk=1),
    )  # fmt: skip
    cache = compiled.report.cache
    row = {
        "variant": variant, "recipe": recipe, "tokens": found.tokens, "perplexity": found.perplexity, "kl": found.kl,
        "perplexity_ratio": found.perplexity_ratio, "top1": found.top1,
        "cache_bytes": cache.bytes if cache else None, "cache_float_bytes": cache.float_bytes if cache else None,
    }  # fmt: skip
    print(row, flush=True)
    return row


if __name__ == "__main__":
    main()
