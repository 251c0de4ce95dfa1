"""One onnxruntime session over a part of a graph, and the arrays that are kept between such sessions."""

from __future__ import annotations

import ctypes
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

import numpy as np
import onnx_ir as ir

from qcompiler.errors import DataError, ModelError, OutputError
from qcompiler.graph.runtime_library import SILENT
from qcompiler.graph.runtime_library import onnxruntime as onnxruntime_library
from qcompiler.graph.session import session
from qcompiler.sessions.runtime import lean_options, one_line

if TYPE_CHECKING:
    import onnxruntime

# Types that numpy lacks and ml_dtypes has: onnxruntime hands them over as bytes only.
BYTES_ONLY = {
    "tensor(bfloat16)": ir.DataType.BFLOAT16,
    "tensor(float8e4m3fn)": ir.DataType.FLOAT8E4M3FN,
    "tensor(float8e5m2)": ir.DataType.FLOAT8E5M2,
}
LARGE_BYTES = 256 << 20
"""Of a constant that sessions take as it is stored: not turned, not packed."""
HALF_BYTES = ("tensor(int4)", "tensor(uint4)", "tensor(int2)", "tensor(uint2)", "tensor(float4e2m1)")


class Kept:
    """Arrays by name and sample. In memory up to `capacity` bytes, the rest in a temporary folder."""

    def __init__(self, capacity: int | None) -> None:
        self._capacity = capacity
        self._arrays: dict[str, dict[int, np.ndarray | tuple[Path, np.dtype]]] = {}
        self._bytes = 0
        self._files = 0
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self.types: dict[str, tuple[ir.DataType, int]] = {}
        """Element type and rank of each value kept so far."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._folder is not None:
            self._folder.cleanup()

    def put(self, name: str, sample: int, array: np.ndarray) -> None:
        self.types[name] = (_data_type(array), array.ndim)
        full = self._capacity is not None and self._bytes + array.nbytes > self._capacity
        entry = self._write(array) if full and array.dtype != object else array
        self._bytes += entry.nbytes if isinstance(entry, np.ndarray) else 0
        self._arrays.setdefault(name, {})[sample] = entry

    def get(self, name: str, sample: int) -> np.ndarray:
        entry = self._arrays[name][sample]
        return entry if isinstance(entry, np.ndarray) else np.load(entry[0]).view(entry[1])

    def drop_all_but(self, names: Collection[str]) -> None:
        for name in self._arrays.keys() - set(names):
            for entry in self._arrays.pop(name).values():
                if isinstance(entry, np.ndarray):
                    self._bytes -= entry.nbytes
                else:
                    entry[0].unlink()

    @property
    def bytes(self) -> int:
        """Of the arrays in memory."""
        return self._bytes

    @property
    def on_disk(self) -> int:
        """How many arrays went to disk in all."""
        return self._files

    def _write(self, array: np.ndarray) -> tuple[Path, np.dtype]:
        try:
            if self._folder is None:
                self._folder = tempfile.TemporaryDirectory(prefix="qcompiler-")
            path = Path(self._folder.name) / f"{self._files}.npy"
            # As plain numbers of the same size, because .npy does not know the types of ml_dtypes.
            np.save(path, array.view(f"u{array.itemsize}") if array.dtype.kind == "V" else array)
        except OSError as error:
            raise OutputError(
                f"the values between segments do not fit into {tempfile.gettempdir()} ({error}); "
                "set TMPDIR to a folder with more room, or raise the memory limit"
            ) from error
        self._files += 1
        return path, array.dtype


def _data_type(array: np.ndarray) -> ir.DataType:
    return ir.DataType.STRING if array.dtype.kind in "OU" else ir.DataType.from_numpy(array.dtype)


class Session:
    """An onnxruntime session that takes and gives arrays of every type that numpy or ml_dtypes has."""

    def __init__(self, session: onnxruntime.InferenceSession, outputs: Sequence[str]) -> None:
        """Raises ModelError where one of the `outputs` is of a type that cannot be measured."""
        self._session, self._outputs = session, list(outputs)
        self._inputs = {item.name for item in session.get_inputs()}
        self._types = {item.name: item.type for item in session.get_outputs() if item.name in outputs}
        self._exotic = [kind for kind in self._types.values() if kind in BYTES_ONLY]
        for name, kind in self._types.items():
            if kind in HALF_BYTES or not kind.startswith("tensor("):
                raise ModelError(f"the value {name!r} has the type {kind}, which cannot be measured")

    @staticmethod
    def of_part(
        model: ir.Model, inputs: Sequence[str], outputs: Sequence[str], kept: Kept, *, limited: bool
    ) -> Session:
        """Over the part of a model between some inputs and some outputs, without onnxruntime's optimizer.

        `kept` knows the types of inputs that are no graph inputs; `limited` spares memory at some cost in speed.
        """
        return Session(_open(_part(model, inputs, outputs, kept), limited), outputs)

    def run(self, feeds: Mapping[str, np.ndarray], sample: int) -> Iterator[tuple[str, np.ndarray]]:
        """The outputs by name; raises DataError where the sample does not go through."""
        feeds = {name: array for name, array in feeds.items() if name in self._inputs}
        try:
            if self._exotic or any(array.dtype.kind == "V" for array in feeds.values()):
                arrays = self._run_bytes(feeds)
            else:
                arrays = self._session.run(self._outputs, feeds)
        except Exception as error:  # onnxruntime's errors share no base class
            if "NOT_IMPLEMENTED" in str(error):
                raise ModelError(f"onnxruntime cannot run the model: {one_line(error)}") from error
            raise DataError(
                f"sample {sample} does not go through the model: {self._disagreement(feeds) or one_line(error)}"
            ) from error
        arrays.reverse()
        for name in self._outputs:
            yield name, arrays.pop()  # each may go once it was looked at

    def _disagreement(self, feeds: Mapping[str, np.ndarray]) -> str:
        """Two inputs that should have a size in common, and have not; empty where there are none."""
        seen: dict[str, tuple[str, int]] = {}
        for item in self._session.get_inputs():
            for symbol, size in zip(item.shape or (), feeds[item.name].shape, strict=False):
                if not isinstance(symbol, str):
                    continue
                other, first = seen.setdefault(symbol, (item.name, size))
                if first != size:
                    return f"{other!r} has {symbol} = {first} and {item.name!r} has {symbol} = {size}; make them agree"
        return ""

    def _run_bytes(self, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        results = self._session.run_with_ort_values(self._outputs, ort_values(feeds))
        return [self._array(name, value) for name, value in zip(self._outputs, results, strict=True)]

    def _array(self, name: str, value: onnxruntime.OrtValue) -> np.ndarray:
        kind = BYTES_ONLY.get(self._types[name])
        if kind is None:
            return value.numpy()  # type: ignore[no-any-return]
        data = ctypes.string_at(value.data_ptr(), value.tensor_size_in_bytes())
        return np.frombuffer(data, kind.numpy()).reshape(value.shape())


def ort_values(feeds: Mapping[str, np.ndarray]) -> dict[str, onnxruntime.OrtValue]:
    """Arrays of any type but text, as onnxruntime holds them."""
    ort = onnxruntime_library()

    values = {}
    for name, array in feeds.items():
        array = np.ascontiguousarray(array) if array.ndim else array
        if array.dtype.kind == "V":
            plain = array.view(f"u{array.itemsize}")
            values[name] = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(plain, int(_data_type(array)))
        else:
            values[name] = ort.OrtValue.ortvalue_from_numpy(array)
    return values


def _part(model: ir.Model, inputs: Sequence[str], outputs: Sequence[str], kept: Kept) -> ir.Model:
    """A model of its own that computes `outputs` from `inputs`; it shares the tensors with the whole."""
    graph = ir.convenience.extract(model.graph, inputs, outputs)
    own = {str(value.name) for value in model.graph.inputs}
    for value in graph.inputs:
        if value.name not in own:
            dtype, rank = kept.types[str(value.name)]
            value.type, value.shape = ir.TensorType(dtype), ir.Shape([None] * rank)
    part = ir.Model(graph, ir_version=model.ir_version, functions=list(model.functions.values()))
    _multiply_as_stored(part)
    return part


def _multiply_as_stored(part: ir.Model) -> None:
    """Let products read a large matrix as it is stored, in the place of a transposed copy in memory (tied heads)."""
    for transpose in [node for node in part.graph if node.op_type == "Transpose" and node.domain == ""]:
        turned, shape = transpose.outputs[0], transpose.inputs[0].shape if transpose.inputs[0] is not None else None
        products = [use.node for use in turned.uses() if use.idx == 1 and use.node.op_type == "MatMul"]
        large = shape is not None and shape.is_static() and shape.rank() == 2 and prod(shape.numpy()) * 4 > LARGE_BYTES
        if not large or turned.dtype != ir.DataType.FLOAT or len(products) != len(turned.uses()):
            continue
        for product in products:
            product.domain, product.op_type = "com.microsoft", "FusedMatMul"
            product.attributes["transB"] = ir.AttrInt64("transB", 1)
            product.replace_input_with(1, transpose.inputs[0])
        part.graph.opset_imports.setdefault("com.microsoft", 1)
        part.graph.remove(transpose, safe=True)


def _open(part: ir.Model, limited: bool) -> onnxruntime.InferenceSession:
    ort = onnxruntime_library()

    constants = (value.const_value for value in part.graph.initializers.values())
    largest = max((constant.nbytes for constant in constants if constant is not None), default=0)
    options = lean_options() if limited or largest > LARGE_BYTES else ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.enable_cpu_mem_arena = False  # which grows by doubling and gives nothing back: many values are looked at
    options.log_severity_level = SILENT
    return session(part, options)
