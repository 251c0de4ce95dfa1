"""The main job on the demo model, start to end: export, compile with two recipes, evaluate on held-out text, show a
table.

    make demo

Runs in a few minutes on two cores. `quality.py` is the same on the whole held-out text, with onnxruntime's own
quantization beside it.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.quality import DEMO, SEQUENCE, print_table, row  # noqa: E402
from models.export import model_path  # noqa: E402

OUTPUT = ROOT / "demo-output"
WINDOWS = 40


def main() -> None:
    rows = []
    for variant in ("dynamo", "dynamo-outliers"):
        source = model_path(variant)
        rows.append(row(variant, "float", source, source, WINDOWS))
        for recipe in ("int8-static", "smoothquant"):
            output = OUTPUT / variant / recipe
            qcompiler(
                "compile", source, "--recipe", recipe, "--calibration", DEMO / "calibration.txt",
                "--tokenizer", DEMO / "tokenizer.json", "--seq-len", SEQUENCE, "-o", output, "--overwrite",
            )  # fmt: skip
            rows.append(row(variant, recipe, output / "model.onnx", source, WINDOWS))
    print_table(rows)
    print(
        "dynamo-outliers is the same function with outliers planted in its activations (models/README.md).\n"
        f"The compiled models are in {OUTPUT.relative_to(ROOT)}/, each with its recipe and a report.json.\n"
        "Next: docs/guide.md; and .venv/bin/qcompiler explain smooth-quant, recipes, targets ort-cpu, diff A B."
    )


def qcompiler(*arguments: object) -> None:
    """Run the command line as a person would, and show the command."""
    words = [
        str(word.relative_to(ROOT)) if isinstance(word, Path) and word.is_relative_to(ROOT) else str(word)
        for word in arguments
    ]
    print(f"\n$ qcompiler {shlex.join(words)}", flush=True)
    subprocess.run([sys.executable, "-m", "qcompiler", *words], check=True, cwd=ROOT)


if __name__ == "__main__":
    main()
