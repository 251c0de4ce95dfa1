"""Whether onnxruntime opens the model: as it comes, before any work, and as it is written, before anyone is told so."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import onnx_ir as ir

from qcompiler.errors import ModelError, NoKernelError, PassError
from qcompiler.graph import files as model_io
from qcompiler.graph.runtime_library import SILENT, onnxruntime
from qcompiler.graph.session import session
from qcompiler.sessions.runtime import RecordedOptions, lean_options, open_file, session_options_of

if TYPE_CHECKING:
    from onnxruntime import InferenceSession, SessionOptions


def check_input(model: str | Path | ir.Model) -> bool:
    """Raise ModelError where onnxruntime refuses the model as it comes; returns whether it has all its kernels here."""
    options = lean_options()
    options.graph_optimization_level = onnxruntime().GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        if isinstance(model, ir.Model):
            session(model, options)
        else:
            open_file(model_io.find_model(model), options, RecordedOptions())
    except NoKernelError:
        return False
    except ModelError as error:
        raise ModelError(f"the model does not run as it comes: {error}; repair or export it again") from error
    return True


def float_session(model: str | Path | ir.Model, options: SessionOptions) -> InferenceSession:
    """The model as it comes, opened as its users do. Raises ModelError."""
    if isinstance(model, ir.Model):
        return session(model, options)
    file = model_io.find_model(model)
    return open_file(file, options, session_options_of(model_io.load(file)))


def _check_optimized(model: str | Path | ir.Model) -> None:
    """Raise ModelError where only onnxruntime's optimizer sees why the model as it comes cannot be opened."""
    try:
        float_session(model, lean_options())
    except NoKernelError:
        return
    except ModelError as error:
        raise ModelError(f"the model does not run as it comes: {error}; repair or export it again") from error


class Opened(Protocol):
    """Opens a model; with `options` in the place of those that spare memory or are onnxruntime's own."""

    def __call__(self, options: SessionOptions | None = None) -> InferenceSession: ...


@contextlib.contextmanager
def written(
    model: ir.Model, work_dir: str | Path | None, *, lean: bool, came: str | Path | ir.Model | None = None,
    runs_here: bool = False,
) -> Iterator[Opened | None]:  # fmt: skip
    """What opens the model as its users do, from a written copy; None where onnxruntime has no kernel here for it.

    Raises PassError where it does not open, ModelError where the one that `came` does not open so either, or where that
    `runs_here` and the compiled one has no kernel here, OutputError where there is no room for the copy.
    """
    recorded = session_options_of(model)
    with model_io.written(model, work_dir) as file:

        def opened(options: SessionOptions | None = None) -> InferenceSession:
            options = options or (lean_options() if lean else onnxruntime().SessionOptions())
            options.log_severity_level = SILENT
            return open_file(file, options, recorded)

        try:
            opened()
        except NoKernelError as error:
            if runs_here:
                raise ModelError(
                    f"the compiled model does not open, though the float model does: {error}, as it is of opset "
                    f"{model.opset_imports['']} now; export the model in float32, or with that opset"
                ) from error
            yield None
            return
        except ModelError as error:
            if came is not None:
                _check_optimized(came)
            raise PassError(
                f"the compiled model does not open, though the float model does: {error} "
                "(--dump-dir shows the graph after each pass)"
            ) from error
        yield opened
