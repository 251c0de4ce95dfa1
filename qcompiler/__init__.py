"""A quantization compiler for ONNX: from an exported graph to int8 and int4 execution on ONNX Runtime.

compiled = qcompiler.compile("model.onnx", "smoothquant", calibration="text.txt", tokenizer="tokenizer.json")
compiled.save("out")
session = qcompiler.load_session("out")
written = qcompiler.generate("out", [17, 4, 99])  # language models
measured = qcompiler.bench("model.onnx", "out")
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qcompiler.benchmarking.bench import bench
    from qcompiler.calibration.calibrator import Hook
    from qcompiler.compiler import compile
    from qcompiler.diagnosis import debug
    from qcompiler.driver.compiled import Compiled
    from qcompiler.errors import QCompilerError
    from qcompiler.generation.write import generate
    from qcompiler.inspection import inspect
    from qcompiler.model_diff import diff
    from qcompiler.recipes import Recipe
    from qcompiler.rewriting.contract import Pass
    from qcompiler.sessions.runtime import load_session
    from qcompiler.statistics import Statistic

# Names are looked up when first used, so that `import qcompiler` (and `qcompiler --help`) loads no library.
_PUBLIC = {
    "Compiled": "driver.compiled",
    "Hook": "calibration.calibrator",
    "Pass": "rewriting.contract",
    "QCompilerError": "errors",
    "Recipe": "recipes",
    "Statistic": "statistics",
    "bench": "benchmarking.bench",
    "compile": "compiler",
    "debug": "diagnosis",
    "diff": "model_diff",  # not diff.py: a submodule of that name would hide the function
    "generate": "generation.write",
    "inspect": "inspection",
    "load_session": "sessions.runtime",
}

__all__ = [
    "Compiled", "Hook", "Pass", "QCompilerError", "Recipe", "Statistic", "bench", "compile", "debug", "diff",
    "generate", "inspect", "load_session",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'qcompiler' has no attribute {name!r}")
    return getattr(import_module(f"qcompiler.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
