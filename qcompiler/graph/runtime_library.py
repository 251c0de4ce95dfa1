"""ONNX Runtime itself: imported where it is used, as much works without it, and silent, as our sentences say it all."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from qcompiler.errors import QCompilerError

SILENT = 4  # onnxruntime's severity of what ends the process; its errors reach us as exceptions
_quiet = False


def silence() -> None:
    """Let it log nothing in this process, also where no session is open yet. For programs, not for libraries."""
    global _quiet
    _quiet = True


def onnxruntime() -> Any:
    """The module. Raises QCompilerError, which says what to install, where it is not there or does not load."""
    try:
        import onnxruntime as found
    except ImportError as error:
        absent = isinstance(error, ModuleNotFoundError) and str(error.name).startswith("onnxruntime")
        reason = "is not installed" if absent else f"cannot be loaded ({' '.join(str(error).split())})"
        raise QCompilerError(
            f"onnxruntime {reason}, and models are run with it; install it with `pip install onnx-qcompiler[cpu]`, "
            "or [cuda] for a GPU of NVIDIA"
        ) from error
    module: ModuleType = found
    if _quiet:
        found.set_default_logger_severity(SILENT)
    return module
