"""300 hostile cases in every run of the tests; `make fuzz` runs 5,000. One process forks, so each part is its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz.cases import make
from tests.paths import ROOT

PARTS, EACH, SEED = 2, 150, 2


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
@pytest.mark.parametrize("part", range(PARTS))
def test_no_case_is_bad(part: int, tmp_path: Path) -> None:
    words = ["--seed", str(SEED), "--first", str(part * EACH), "--count", str(EACH), "--jobs", "1"]
    command = [sys.executable, str(ROOT / "tests" / "fuzz" / "run.py"), *words, "--keep", str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=environment)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert f"{EACH} cases in" in ran.stdout


def test_a_case_is_the_same_again(tmp_path: Path) -> None:
    for number in range(20):
        made = []
        for name in ("a", "b"):
            folder = tmp_path / f"{name}{number}"
            folder.mkdir()
            case = make(3, number, folder)
            model = folder / "in" / "model.onnx"
            made.append((case, model.read_bytes()))
        assert made[0] == made[1]
