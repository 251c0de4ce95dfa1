"""Models on disk: load memory-mapped, save whole or not at all, and open in ONNX Runtime without copying weights."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import onnx
import onnx_ir as ir

from qcompiler.errors import ModelError, OutputError
from qcompiler.graph.check import without_weights
from qcompiler.graph.given import check_given
from qcompiler.graph.model_folder import copy_companions, is_companion
from qcompiler.graph.places import check_place, exists, is_file
from qcompiler.graph.walk import all_nodes, graphs_of

if TYPE_CHECKING:
    pass

MODEL_FILE, DATA_FILE = "model.onnx", "model.onnx.data"
OUTPUT_FILES = frozenset({MODEL_FILE, DATA_FILE, "recipe.yaml", "report.json", "report.html"})
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of linux/fcntl.h and linux/fs.h
OLDEST_OPSET, NEWEST_OPSET = 13, 25

INLINE_MODEL = 1 << 20  # bytes of constants up to which a model is one file
INLINE_TENSOR = 1 << 10  # bytes up to which a constant stays in the .onnx file of a larger model


# ---------------------------------------------------------------------------------------------------- load


def find_model(path: str | Path) -> Path:
    """The .onnx file that a path means: the file itself, or a folder's model.onnx or only .onnx file."""
    path = Path(path)
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError as error:
        raise ModelError(f"the path {path} is not UTF-8, so ONNX Runtime cannot open it; rename it") from error
    if is_file(path):
        return path
    if not exists(path):
        raise ModelError(f"the model {path} does not exist; give a .onnx file or a folder that holds one")
    if not path.is_dir():
        raise ModelError(f"the model {path} is neither a file nor a folder (but a pipe or device); give a .onnx file")
    try:
        found = sorted(path / name for name in os.listdir(path) if name.endswith(".onnx") and (path / name).is_file())  # noqa: PTH208  (a glob hides errors)
    except OSError as error:
        raise ModelError(f"the folder {path} cannot be read: {error.strerror or error}") from error
    if (path / MODEL_FILE) in found:
        return path / MODEL_FILE
    if not found:
        raise ModelError(f"the folder {path} holds no .onnx file; give the folder that the exporter wrote")
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise ModelError(f"the folder {path} holds {len(found)} models ({names}); name one of the files")
    return found[0]


def load(path: str | Path) -> ir.Model:
    """Read a model; external weights stay in their files, memory-mapped when they are used.

    Every reason why the model cannot be worked on later is a ModelError here: a missing or damaged file, missing,
    short or linked-away external data, an opset or operator that ONNX Runtime would not run.
    """
    file = find_model(path).absolute()  # without a folder, onnx_ir would not look where external data is
    try:
        # IR of a half-read file would be an arbitrary model, so any failure is the file's.
        proto = onnx.load(file, format="protobuf", load_external_data=False)
    except OSError as error:
        raise ModelError(f"the model {file} cannot be read: {error.strerror or error}") from error
    except Exception as error:
        raise ModelError(f"{file} is no ONNX model, or is cut off ({first_line(error)}); export it again") from error
    _check_versions(proto, file)
    unsorted = check_given(proto, file)
    try:
        model: ir.Model = ir.from_proto(proto)
    except Exception as error:
        raise ModelError(f"{file} is no model that can be read ({first_line(error)}); export it again") from error
    ir.external_data.set_base_dir(model.graph, file.parent)
    if unsorted:
        for graph in (model.graph, *(function.graph for function in model.functions.values())):
            graph.sort()
    for tensor in external_tensors(model):
        _check_external(tensor, file.parent)
    return model


def take(model: str | Path | ir.Model) -> ir.Model:
    """A model of one's own, to change: a copy, or read from its file. Raises ModelError as `load` does."""
    if not isinstance(model, ir.Model):
        return load(model)
    check_given(without_weights(model), "the model")
    return model.clone()


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].strip().rstrip(".") if lines else type(error).__name__


def _check_versions(model: onnx.ModelProto, file: Path) -> None:
    if not model.graph.node:
        raise ModelError(f"{file} holds an empty graph, or is no ONNX model; export it again")
    if model.ir_version > onnx.IR_VERSION:
        raise ModelError(f"{file} has IR version {model.ir_version}, but {onnx.IR_VERSION} is the newest that is known")
    for entry in model.opset_import:
        if entry.domain in ("", "ai.onnx") and not OLDEST_OPSET <= entry.version <= NEWEST_OPSET:
            raise ModelError(
                f"{file} has opset {entry.version}; export it again with opset {OLDEST_OPSET} to {NEWEST_OPSET}"
            )


def external_tensors(model: ir.Model) -> Iterator[ir.ExternalTensor]:
    for graph in graphs_of(model):
        for value in graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                yield value.const_value
    for graph in (model.graph, *(function.graph for function in model.functions.values())):
        for node in all_nodes(graph):
            for attribute in node.attributes.values():
                yield from _external_in(attribute)


def _external_in(attribute: ir.Attr) -> Iterator[ir.ExternalTensor]:
    """In the attribute itself, and among the constants of a body; the nodes of a body are visited by themselves."""
    held: list[object] = []
    match attribute.type:
        case ir.AttributeType.TENSOR:
            held = [attribute.value]
        case ir.AttributeType.TENSORS:
            held = [*attribute.value]
        case ir.AttributeType.GRAPH:
            held = [value.const_value for value in attribute.as_graph().initializers.values()]
        case ir.AttributeType.GRAPHS:
            held = [value.const_value for body in attribute.as_graphs() for value in body.initializers.values()]
    yield from (tensor for tensor in held if isinstance(tensor, ir.ExternalTensor))


def _check_external(tensor: ir.ExternalTensor, folder: Path) -> None:
    """Raise unless the bytes of a tensor are there to be mapped; reads only the file's entry."""
    path = folder / tensor.location
    where = f"the weights {tensor.name!r} should be in {path}"
    if Path(tensor.location).is_absolute() or ".." in Path(tensor.location).parts:
        raise ModelError(f"{where}, which is outside of the model's folder; move them beside the model")
    if not exists(path):
        raise ModelError(f"{where}, which does not exist; put the file beside the model")
    if not path.is_file():
        raise ModelError(f"{where}, which is no file (but a folder, pipe or device); export the model again")
    if not os.access(path, os.R_OK):
        raise ModelError(f"{where}, which may not be read; change its permissions")
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ModelError(
            f"{where}, but that is a link to {path.resolve()} outside of the model's folder, which ONNX Runtime "
            f"refuses; copy the folder with `cp -rL {folder} COPY` and give the copy"
        )
    status = path.stat()
    if status.st_nlink > 1:
        raise ModelError(f"{where}, but that file has several hard links, which is refused; give a copy of the folder")
    begin, length = tensor.offset or 0, tensor.length if tensor.length is not None else tensor.nbytes
    if length != tensor.nbytes:
        raise ModelError(f"{where} with {length} bytes, but their shape needs {tensor.nbytes}; export the model again")
    if begin + length > status.st_size:
        raise ModelError(
            f"{where} up to byte {begin + length}, but the file ends at {status.st_size}; copy or export it again"
        )


# ---------------------------------------------------------------------------------------------------- save


def save(
    model: ir.Model,
    folder: str | Path,
    *,
    source_folder: str | Path | None = None,
    overwrite: bool = False,
    extra_files: Mapping[str, bytes | str] | None = None,
) -> None:
    """Write `model.onnx`, `model.onnx.data` where the constants are large, and other files, into a folder.

    The folder appears whole or not at all: it is built beside its place and moved there at the end. Tensors are
    written one by one. The companions of the model in `source_folder` (tokenizer, configuration, see
    `model_folder`) are copied; `extra_files` (name → content) come last and win. The model is left as it was.
    OutputError if the place is taken, is the source itself, or cannot be written.
    """
    folder = Path(folder)
    _check_not_source(model, folder, source_folder)
    check_free(folder, overwrite)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_partial(folder)
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.partial-{os.getpid()}-", dir=folder.parent))
    except OSError as error:
        raise _output_error(folder, error) from error
    try:
        partial.chmod(0o777 & ~_umask())  # mkdtemp gives 0o700
        write_model(model, partial)
        if source_folder is not None:
            copy_companions(Path(source_folder), partial)
        for name, content in (extra_files or {}).items():
            (partial / name).write_bytes(content.encode() if isinstance(content, str) else content)
        _move(partial, folder)
    except OSError as error:
        raise _output_error(folder, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _output_error(folder: Path, error: OSError) -> OutputError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT) or _is_short_write(error):
        return OutputError(f"the disk is full: {folder} was not written; free some space or choose another place")
    return OutputError(f"{folder} cannot be written: {error.strerror or error}")


def _is_short_write(error: OSError) -> bool:
    """Numpy's `tofile`, which writes large tensors, says only how many items it wrote before the disk was full."""
    return error.errno is None and "requested and" in str(error)


def _check_not_source(model: ir.Model, folder: Path, source_folder: str | Path | None) -> None:
    place = folder.resolve()
    sources = {Path(tensor.base_dir).resolve() for tensor in external_tensors(model)}
    if source_folder is not None:
        sources.add(Path(source_folder).resolve())
    if place in sources or any(source.is_relative_to(place) for source in sources):
        raise OutputError(f"{folder} holds the model that is being compiled; choose another output folder")


def check_free(folder: Path, overwrite: bool) -> None:
    """Raise OutputError where an output folder could not be written, so that nobody computes for an hour first."""
    check_place(folder)
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise OutputError(f"{folder} is no folder; choose another output folder")
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not overwrite:
        raise OutputError(f"{folder} exists already; choose another output folder, or overwrite it with --overwrite")
    names = {file.name for file in folder.iterdir()}
    if MODEL_FILE not in names or not (names & {"recipe.yaml", "report.json"} or names <= {MODEL_FILE, DATA_FILE}):
        raise OutputError(f"{folder} is no earlier output, so it is not overwritten; choose another output folder")
    foreign = sorted(name for name in names if name not in OUTPUT_FILES and not is_companion(name))
    if foreign:
        raise OutputError(
            f"{folder} holds {foreign[0]!r}, which no compilation wrote, so it is not overwritten; "
            "move the file away, or choose another output folder"
        )


def write_model(model: ir.Model, folder: Path) -> None:
    constants = [value.const_value for graph in graphs_of(model) for value in graph.initializers.values()]
    total = sum(tensor.nbytes for tensor in constants if tensor is not None)
    limit = INLINE_TENSOR if total > INLINE_MODEL else INLINE_MODEL
    with _strings_inline(model):
        ir.save(model, folder / MODEL_FILE, format="protobuf", external_data=DATA_FILE, size_threshold_bytes=limit)
    data = folder / DATA_FILE
    if data.exists() and data.stat().st_size == 0:
        data.unlink()


class _InlineStrings(ir.StringTensor):
    """Strings that onnx_ir leaves in the model's file, as ONNX has no other place for them: it goes by the size."""

    @property
    def nbytes(self) -> int:
        return 0


@contextlib.contextmanager
def _strings_inline(model: ir.Model) -> Iterator[None]:
    values = [value for graph in graphs_of(model) for value in graph.initializers.values()]
    strings = {value: value.const_value for value in values if isinstance(value.const_value, ir.StringTensor)}
    for value, tensor in strings.items():
        value.const_value = _InlineStrings(tensor.string_data(), shape=tensor.shape, name=tensor.name)
    try:
        yield
    finally:
        for value, tensor in strings.items():
            value.const_value = tensor


def _move(partial: Path, folder: Path) -> None:
    """Put the finished folder into its place; an earlier output goes only once the new one is there."""
    if not folder.exists() or not any(folder.iterdir()):
        partial.rename(folder)
        return
    if _exchanged(partial, folder):
        return  # and the earlier one goes, as it stands where the partial one did
    old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old-", dir=folder.parent))
    folder.rename(old)
    try:
        partial.rename(folder)
    except OSError:
        old.rename(folder)
        raise
    shutil.rmtree(old)


def _exchanged(a: Path, b: Path) -> bool:
    """Let two folders change places in one step, where the system has that (Linux), so that there is always one."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    return rename is not None and rename(AT_FDCWD, os.fsencode(a), AT_FDCWD, os.fsencode(b), RENAME_EXCHANGE) == 0


def _remove_partial(folder: Path) -> None:
    """What runs that were killed while they wrote this folder have left."""
    prefix = f".{folder.name}.partial-"
    for path in folder.parent.iterdir():
        process = path.name.removeprefix(prefix).split("-")[0]
        if path.name.startswith(prefix) and process.isdigit() and not _runs(int(process)):
            shutil.rmtree(path, ignore_errors=True)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _umask() -> int:
    mask = os.umask(0)  # it can only be read by setting it
    os.umask(mask)
    return mask


@contextlib.contextmanager
def written(model: ir.Model, work_dir: str | Path | None = None) -> Iterator[Path]:
    """The model.onnx of a copy on disk, as `save` would write it, which is gone afterwards.

    It lies in `work_dir`, or where temporary files do. Raises OutputError.
    """
    with contextlib.ExitStack() as stack:
        try:
            if work_dir is None:
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="qcompiler-")))
            else:
                folder = Path(work_dir) / "written"
                stack.callback(_remove, folder)
                shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
                folder.mkdir(parents=True)
            write_model(model, folder)
        except OSError as error:
            raise _output_error(folder, error) from error
        yield folder / MODEL_FILE


def _remove(folder: Path) -> None:
    """A folder, and the one that it is in where that holds nothing else."""
    shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):
        folder.parent.rmdir()
