"""Opens a model, as it is in memory, in ONNX Runtime without copying its weights."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import onnx_ir as ir

from qcompiler.errors import ModelError, NoKernelError, OutputError
from qcompiler.graph.files import MODEL_FILE, external_tensors, first_line, write_model
from qcompiler.graph.runtime_library import SILENT
from qcompiler.graph.runtime_library import onnxruntime as onnxruntime_library
from qcompiler.graph.walk import graphs_of

if TYPE_CHECKING:
    import onnxruntime

INLINE_SESSION = 512 << 20  # bytes of new constants that a session may be handed in memory (protobuf's limit is 2 GiB)


def session(
    model: ir.Model,
    options: onnxruntime.SessionOptions | None = None,
    providers: tuple[str, ...] = ("CPUExecutionProvider",),
) -> onnxruntime.InferenceSession:
    """Open a model, as it is in memory, in ONNX Runtime.

    External weights that lie in one folder are read there by ONNX Runtime itself and never enter Python. Constants
    made in memory travel inside the model up to `INLINE_SESSION` bytes; beyond that, or where the external weights
    lie in several folders, everything is written to a temporary folder that is gone when this returns.
    `options` are used as they are, plus the weights folder. ModelError if ONNX Runtime refuses the model.
    """
    ort = onnxruntime_library()

    if options is None:
        options = ort.SessionOptions()
        options.log_severity_level = SILENT
    folders = {str(Path(tensor.base_dir).resolve()) for tensor in external_tensors(model)}
    try:
        if len(folders) > 1 or _bytes_in_memory(model) > INLINE_SESSION:
            with tempfile.TemporaryDirectory(prefix="qcompiler-session-") as folder:
                write_model(model, Path(folder))
                return ort.InferenceSession(Path(folder) / MODEL_FILE, options, providers=list(providers))
        for folder in folders:
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
        return ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=list(providers))
    except OSError as error:
        raise OutputError(f"a temporary copy of the model cannot be written: {error.strerror or error}") from error
    except Exception as error:
        if not type(error).__module__.startswith("onnxruntime"):
            raise
        kind = NoKernelError if type(error).__name__ == "NotImplemented" else ModelError
        raise kind(f"ONNX Runtime refuses the model: {first_line(error)}") from error


def _bytes_in_memory(model: ir.Model) -> int:
    tensors = [value.const_value for graph in graphs_of(model) for value in graph.initializers.values()]
    return sum(t.nbytes for t in tensors if t is not None and not isinstance(t, ir.ExternalTensor))
