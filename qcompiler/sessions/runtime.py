"""ONNX Runtime sessions for compiled models, with the options that the compiler recorded in them."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import onnx_ir as ir

from qcompiler.errors import ModelError, NoKernelError
from qcompiler.graph import files as model_io
from qcompiler.graph.metadata import DISABLED_OPTIMIZERS, SESSION_OPTIONS
from qcompiler.graph.runtime_library import SILENT
from qcompiler.graph.runtime_library import onnxruntime as onnxruntime_library
from qcompiler.targets import usable_targets

if TYPE_CHECKING:
    import onnxruntime

WORD = r"[A-Za-z0-9_.-]{1,100}"
SHOWN = 60  # characters of an odd value in a message
Recorded = TypeVar("Recorded", dict[str, object], list[object])


@dataclass(frozen=True)
class RecordedOptions:
    """What a model says about how it wants to be run."""

    config_entries: dict[str, str] = field(default_factory=dict)
    disabled_optimizers: tuple[str, ...] = ()


def session_options_of(model: ir.Model) -> RecordedOptions:
    """What the metadata of a model records; empty where it records nothing.

    Raises ModelError where it is damaged, or asks for more than our targets do: session options of onnxruntime can
    write files, and a model may be a stranger's.
    """
    entries = _json(model, SESSION_OPTIONS, dict[str, object]())
    disabled = _json(model, DISABLED_OPTIMIZERS, list[object]())
    known = {key for target in usable_targets()[0] for key in target.session_options}
    for key, value in entries.items():
        if key not in known:
            raise ModelError(
                f"the model's metadata asks for the session option {_shown(key)}, which no target sets "
                f"(they set {', '.join(sorted(known))}); take the entry {SESSION_OPTIONS!r} out of the model"
            )
        _check_word(value, SESSION_OPTIONS)
    for name in disabled:
        _check_word(name, DISABLED_OPTIMIZERS)
    return RecordedOptions({key: str(value) for key, value in entries.items()}, tuple(map(str, disabled)))


def _check_word(value: object, key: str) -> None:
    """A name or number, as our targets write them."""
    if not isinstance(value, str) or re.fullmatch(WORD, value) is None:
        raise ModelError(
            f"the model's metadata entry {key!r} holds {_shown(value)}, where a word is due; take it out of the model"
        )


def _shown(value: object) -> str:
    """For a message: never long, never with characters that a terminal obeys."""
    text = ascii(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]} …"


def _json(model: ir.Model, key: str, default: Recorded) -> Recorded:
    text = model.metadata_props.get(key)
    if text is None:
        return default
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"the model's metadata entry {key!r} is not JSON ({_shown(str(error))})") from error
    if not isinstance(value, type(default)):
        kind = type(default).__name__
        raise ModelError(f"the model's metadata entry {key!r} holds {_shown(text)}, where a {kind} is due")
    return value


def load_session(
    folder_or_file: str | Path, *, threads: int | None = None, providers: Sequence[str] | None = None
) -> onnxruntime.InferenceSession:
    """An onnxruntime session with the session options that the model records.

    `threads` bounds the threads within an operator (default: onnxruntime's own choice); `providers` are names of
    execution providers (default: the CPU's). Raises ModelError where the model or a provider is not usable.
    """
    ort = onnxruntime_library()

    file = model_io.find_model(folder_or_file)
    chosen = list(providers or ["CPUExecutionProvider"])
    absent = [name for name in chosen if name not in ort.get_available_providers()]
    if absent:
        raise ModelError(
            f"this onnxruntime has no {absent[0]}; it has {', '.join(ort.get_available_providers())} "
            "(onnxruntime-gpu brings the CUDA one)"
        )
    options = ort.SessionOptions()
    options.log_severity_level = SILENT
    if threads is not None:
        options.intra_op_num_threads = threads
    return open_file(file, options, session_options_of(model_io.load(file)), chosen)


def open_file(
    file: Path,
    options: onnxruntime.SessionOptions,
    recorded: RecordedOptions,
    providers: Sequence[str] = ("CPUExecutionProvider",),
) -> onnxruntime.InferenceSession:
    """A session over a .onnx file with `options` and what the model records. Raises ModelError, NoKernelError."""
    ort = onnxruntime_library()

    for key, value in recorded.config_entries.items():
        options.add_session_config_entry(key, value)
    try:
        return ort.InferenceSession(
            str(file), options, providers=list(providers), disabled_optimizers=list(recorded.disabled_optimizers)
        )
    except Exception as error:  # onnxruntime's errors share no base class
        kind = NoKernelError if type(error).__name__ == "NotImplemented" else ModelError
        raise kind(f"onnxruntime cannot open {file}: {one_line(error)}") from error


def lean_options() -> onnxruntime.SessionOptions:
    """Of sessions that leave the weights in the mapped file and keep no memory for later, at some cost in speed."""
    options = onnxruntime_library().SessionOptions()
    options.log_severity_level = SILENT
    options.enable_cpu_mem_arena = False
    options.enable_mem_pattern = False
    # Prepacking copies every weight; without it they stay in the mapped file.
    options.add_session_config_entry("session.disable_prepacking", "1")
    return options


def one_line(error: BaseException) -> str:
    """An error of onnxruntime as one clause: without error codes, source paths and C++ signatures."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", text)
    text = re.sub(r"/\S+\.(cc|h|cpp):\d+ .*?\)( const)?( \[[^\]]*\])? ", "", text)
    found = re.match(
        r"Non-zero status code returned while running (\w+) node\. Name:'([^']*)' Status Message: (.*)", text
    )
    if found:
        text = f"node {found[2]!r} ({found[1]}) failed: {found[3]}"
    return text.rstrip(" .")
