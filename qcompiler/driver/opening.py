"""Whether onnxruntime opens the model: as it comes, before any work, and as it is written, before anyone is told so."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import onnx_ir as ir

from qcompiler.errors import ModelError, NoKernelError, PassError
from qcompiler.graph import files as model_io
from qcompiler.graph.runtime_library import SILENT, onnxruntime
from qcompiler.graph.session import session
from qcompiler.sessions.runtime import RecordedOptions, lean_options, open_file, session_options_of

if TYPE_CHECKING:
    from onnxruntime import InferenceSession


def check_input(model: str | Path | ir.Model) -> None:
    """Raise ModelError where onnxruntime refuses the model as it comes; that it has no kernel here is no refusal."""
    options = lean_options()
    options.graph_optimization_level = onnxruntime().GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        if isinstance(model, ir.Model):
            session(model, options)
        else:
            open_file(model_io.find_model(model), options, RecordedOptions())
    except NoKernelError:
        return
    except ModelError as error:
        raise ModelError(f"the model does not run as it comes: {error}; repair or export it again") from error


@contextlib.contextmanager
def written(
    model: ir.Model, work_dir: str | Path | None, *, lean: bool
) -> Iterator[Callable[[], InferenceSession] | None]:
    """What opens the model as its users do, from a written copy; None where onnxruntime has no kernel here for it.

    Raises PassError where it does not open, OutputError where there is no room for the copy.
    """
    recorded = session_options_of(model)
    with model_io.written(model, work_dir) as file:

        def opened() -> InferenceSession:
            options = lean_options() if lean else onnxruntime().SessionOptions()
            options.log_severity_level = SILENT
            return open_file(file, options, recorded)

        try:
            opened()
        except NoKernelError:
            yield None
            return
        except ModelError as error:
            raise PassError(
                f"the compiled model does not open, though the float model does: {error} "
                "(--dump-dir shows the graph after each pass)"
            ) from error
        yield opened
