"""Environments of peers whose packages do not go together with ours, made on demand under benchmarks/.cache."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
CACHE = HERE.parent / ".cache"


def python_of(peer: str) -> Path:
    """The interpreter of ``venv-PEER``; the environment is made anew where requirements-PEER.txt has changed."""
    folder, requirements = CACHE / f"venv-{peer}", HERE / f"requirements-{peer}.txt"
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    complete = folder / "complete"
    wanted = requirements.read_text(encoding="utf-8")
    if complete.exists() and complete.read_text(encoding="utf-8") == wanted:
        return python
    print(f"making {folder} (over 1 GB)", file=sys.stderr, flush=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
    subprocess.run([str(python), "-m", "pip", "install", "--quiet", "-r", str(requirements)], check=True)
    complete.write_text(wanted, encoding="utf-8")
    return python


def run(peer: str, script: str, *arguments: object) -> None:
    """Run a script of this folder in a peer's environment, offline; its output is shown where it fails."""
    command = [str(python_of(peer)), str(HERE / script), *map(str, arguments)]
    done = subprocess.run(
        command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    if done.returncode != 0:
        raise SystemExit(f"{script} failed with exit code {done.returncode}: …{done.stdout[-3000:]}")
