"""The demo model by a recipe for a target: each compilation is made once, for all tests and processes that run them.

What is made lies below `models/.cache/compiled`, under the hash of everything that it could depend on: the sources of
the engine and the passes as they are when the tests begin, the exporter's model, the data, the arguments, and the
versions of the libraries. Each caller gets a model of its own.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from functools import cache
from importlib import metadata
from pathlib import Path

import qcompiler
from models.export import CACHE, CHECKPOINT, locked, model_path
from qcompiler.graph import files as model_io
from qcompiler.recipes import Recipe
from qcompiler.report import Report
from tests.paths import ROOT

FOLDER = CACHE / "compiled"
PACKAGES = ("onnxruntime", "onnx", "onnx-ir", "onnxscript", "numpy", "ml_dtypes", "torch", "tokenizers")
DATA, TOKENIZER = CHECKPOINT / "calibration.txt", CHECKPOINT / "tokenizer.json"
KEPT = 2  # states of the sources


def compiled(
    variant: str, recipe: str, target: str, *options: str, samples: int = 8, sequence_length: int = 64
) -> qcompiler.Compiled:
    """As `qcompiler.compile` gives it, read from where it was saved. Raises what compiling raises."""
    model = model_path(variant)
    arguments = [variant, _of(model.parent), recipe, target, list(options), samples, sequence_length]
    key = hashlib.sha256(json.dumps(arguments).encode()).hexdigest()[:16]
    sources = FOLDER / SOURCES
    folder = sources / key
    with locked(key, sources):
        if not folder.exists():
            result = qcompiler.compile(
                model, recipe, target=target, calibration=str(DATA), tokenizer=TOKENIZER, samples=samples,
                sequence_length=sequence_length, options=options,
            )  # fmt: skip
            result.save(folder)  # whole or not at all
    report = Report.from_json((folder / "report.json").read_text(encoding="utf-8"))
    return qcompiler.Compiled(model_io.load(folder), report, Recipe.load(folder / "recipe.yaml"), folder)


@cache
def _of(folder: Path) -> str:
    """The hash of every file in a folder and below."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts):
        digest.update(f"{path.relative_to(folder)}\n".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _sources() -> str:
    versions = [metadata.version(package) for package in PACKAGES]
    state = [_of(ROOT / "qcompiler"), _of(ROOT / "passes"), _of(CHECKPOINT), versions]
    return hashlib.sha256(json.dumps(state).encode()).hexdigest()[:16]


def _forget() -> None:
    """Leave what the latest states of the sources gave, and nothing older."""
    with locked("forget", FOLDER):
        known = sorted((path for path in FOLDER.iterdir() if path.is_dir()), key=lambda path: path.stat().st_mtime)
        for path in known[:-KEPT]:
            shutil.rmtree(path)


SOURCES = _sources()
(FOLDER / SOURCES).mkdir(parents=True, exist_ok=True)
(FOLDER / SOURCES).touch()  # so that it is the latest
_forget()
