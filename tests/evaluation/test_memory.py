"""Logits of a large vocabulary take the memory of one sample, however many there are, and keep to a limit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.graph.files import save
from tests import tiny
from tests.paths import ROOT

VOCABULARY, HIDDEN, TOKENS = 262_144, 16, 64
LOGITS = VOCABULARY * TOKENS * 4
"""Bytes of the logits of one sample: 67 MB."""
SCRIPT = """
import json, resource, sys
import qcompiler
model, data, limit = json.loads(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
report = qcompiler.compile(model, "int8-static", calibration=data, memory_limit=limit).report
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"bytes": 1024 * after, "begin": 1024 * before, "outputs": report.outputs}))
"""


def decoder() -> ir.Model:
    """Two tiny layers between an embedding and a head that is tied to it."""
    layer = """
        ["model.layers.{n}.mlp.up_proj"] u{n} = MatMul (h{n}, U{n})
        t{n} = Tanh (u{n})
        ["model.layers.{n}.mlp.down_proj"] d{n} = MatMul (t{n}, D{n})
        h{next} = Add (h{n}, d{n})"""
    return tiny.build(
        f"""g (int64[B, S] input_ids, float[{VOCABULARY}, {HIDDEN}] E, float[16, 32] U0, float[32, 16] D0,
               float[16, 32] U1, float[32, 16] D1) => (float[B, S, {VOCABULARY}] logits) {{
            ["model.embed_tokens"] h0 = Gather (E, input_ids)
            {layer.format(n=0, next=1)}{layer.format(n=1, next=2)}
            T = Transpose <perm = [1, 0]> (E)
            ["lm_head"] logits = MatMul (h2, T) }}""",
        E="normal", U0="normal", D0="normal", U1="normal", D1="normal",
    )  # fmt: skip


def peak(folder: Path, samples: int, limit: int | None) -> tuple[float, dict[str, dict[str, float]]]:
    """(bytes that a process takes at most beyond what it begins with, the errors of the outputs)."""
    data = folder / f"{samples}.jsonl"
    generator = np.random.default_rng(0)
    lines = [{"input_ids": generator.integers(0, VOCABULARY, TOKENS).tolist()} for _ in range(samples)]
    data.write_text("\n".join(map(json.dumps, lines)))
    arguments = json.dumps([str(folder / "model"), str(data), limit])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, arguments], cwd=ROOT, capture_output=True, text=True, check=True
    )
    told = json.loads(done.stdout)
    return told["bytes"] - told["begin"], told["outputs"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("vocabulary")
    save(decoder(), made / "model")
    return made


def test_memory_does_not_grow_with_the_samples(folder: Path) -> None:
    few, outputs = peak(folder, 4, None)
    many, others = peak(folder, 6, None)
    assert set(outputs["logits"]) == set(others["logits"]) >= {"kl", "top1", "perplexity_ratio"}
    assert few < 4 * LOGITS, "both models' logits of one sample, the weights, and the process itself"
    assert many < few + LOGITS / 2


def test_a_limit_is_kept(folder: Path) -> None:
    limit = 512 << 20
    taken, outputs = peak(folder, 4, limit)
    assert taken < limit
    assert np.isfinite(outputs["logits"]["kl"])
