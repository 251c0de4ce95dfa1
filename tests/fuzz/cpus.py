"""The same compilation on processors that this one is not, by qemu-user: `python tests/fuzz/cpus.py`.

The compiled bytes must be those of this processor, and the answers near those of the float model, whichever kernels
ONNX Runtime has for the processor. Needs `qemu-x86_64` (Debian: apt-get install qemu-user) and minutes. Exit code 1
where one is not so.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from tests.fuzz.kills import content, prepare  # noqa: E402

CPUS = {"Nehalem": "SSE4.2", "Haswell": "AVX2"}
RECIPES: Sequence[Sequence[str]] = (("w8",), ("int8-static", "--calibration", "data.npz"))
NEAR = 20.0  # dB
ANSWER = """
import numpy as np, onnxruntime, sys
from qcompiler import load_session
x = np.load("data.npz")["x"][0]
options = onnxruntime.SessionOptions()
options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
wanted = onnxruntime.InferenceSession("in/model.onnx", options).run(None, {"x": x})[0].astype(float)
got = load_session(sys.argv[1]).run(None, {"x": x})[0]
print(10 * np.log10(np.square(wanted).sum() / np.square(wanted - got).sum()))
"""


def run(words: Sequence[str], folder: Path, cpu: str) -> str:
    emulated = ["qemu-x86_64", "-cpu", cpu] if cpu else []
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [*emulated, sys.executable, *words]
    ran = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=1200
    )
    if ran.returncode:
        raise SystemExit(
            f"{cpu or 'this processor'}: {' '.join(words[:6])} ended with {ran.returncode}: {ran.stderr[-500:]}"
        )
    return ran.stdout


def main() -> int:
    if shutil.which("qemu-x86_64") is None:
        print("there is no qemu-x86_64; on Debian: apt-get install qemu-user")
        return 1
    failures = 0
    with tempfile.TemporaryDirectory(prefix="qcompiler-cpus-") as temporary:
        folder = Path(temporary) / "here"
        prepare(folder, layers=2, width=32)
        for recipe, *more in RECIPES:
            wanted = None
            for cpu, instructions in {"": "this processor", **CPUS}.items():
                out = f"{recipe}-{cpu}"
                run(["-m", "qcompiler", "compile", "in", "-r", recipe, "-o", out, *more], folder, cpu)
                found, decibels = content(folder / out), float(run(["-c", ANSWER, out], folder, cpu))
                wanted = wanted or found
                same = "the same bytes" if found == wanted else "OTHER BYTES"
                failures += found != wanted or not np.isfinite(decibels) or decibels < NEAR
                print(f"{recipe:12} {cpu or '-':8} {instructions:15} {same}, {decibels:.1f} dB", flush=True)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
