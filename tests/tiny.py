"""Tiny models from ONNX text, and what runs them and passes on them."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from qcompiler.calibration.calibrator import Calibrator
from qcompiler.calibration.samples import from_python
from qcompiler.driver import pipeline
from qcompiler.driver.observers import Verify
from qcompiler.graph.check import check_structure
from qcompiler.rewriting.contract import Changes, Pass
from qcompiler.sites.canonicalize import canonicalize
from qcompiler.statistics import StatisticsStore
from tests.stand_ins import on_cpu
from tests.there import dims, held, numpy_type, there

Feeds = Mapping[str, np.ndarray]
# Of symbolic dimensions; P positions of a past and one token make L, an empty past of N and S tokens make T.
SIZES = {"B": 2, "S": 5, "M": 7, "P": 3, "L": 4, "N": 0, "T": 5}


def build(graph: str, *, opset: int | Any = 21, **constants: Any) -> ir.Model:
    """A canonicalized model from the text of a graph whose inputs named in `constants` become initializers.

    A constant is an array, or the name of a recipe (see `weight`), which takes shape and type from the text. The nodes
    are named as the text names them, else by their first output.
    """
    model = ir.from_onnx_text(f'<ir_version: 10, opset_import: ["" : {opset}, "com.microsoft" : 1]> {graph}')
    for value in list(model.graph.inputs):
        if value.name in constants:
            data = constants[value.name]
            array = weight(value, data) if isinstance(data, str) else np.asarray(data)
            value.const_value = ir.tensor(array, name=value.name)
            model.graph.inputs.remove(value)
            model.graph.register_initializer(value)
            value.shape = ir.Shape(array.shape)
    for node in model.graph.all_nodes():
        node.name = node.name or node.outputs[0].name
    canonicalize(model)
    return model


def weight(value: ir.Value, recipe: str) -> np.ndarray:
    """Numbers by the name alone: `normal`, `gain` (near 1), `outliers` (a gain with channels × 30), `zeros`."""
    rng = np.random.default_rng(zlib.crc32(str(value.name).encode()))
    numbers = rng.normal(size=there(value.shape).numpy())
    if recipe == "gain":
        numbers = 1 + 0.1 * numbers
    elif recipe == "outliers":
        numbers = 1 + 0.1 * numbers
        numbers.reshape(-1)[1::7] *= 30
    elif recipe == "zeros":
        numbers *= 0
    elif recipe != "normal":
        raise ValueError(f"there is no recipe {recipe!r}")
    return numbers.astype(numpy_type(value))


def sizes(value: ir.Value) -> list[int]:
    """The shape, with `SIZES` for symbolic dimensions."""
    return [size if isinstance(size, int) else SIZES[str(size)] for size in dims(value)]


def feeds(model: ir.Model, count: int = 3, ids: int = 4, seed: int = 0) -> list[dict[str, np.ndarray]]:
    """Deterministic samples: normal numbers, and ids below `ids`."""
    rng = np.random.default_rng(seed)
    samples = []
    for _ in range(count):
        sample = {}
        for value in model.graph.inputs:
            shape = sizes(value)
            integer = not there(value.dtype).is_floating_point()
            numbers = rng.integers(0, ids, shape) if integer else rng.normal(size=shape)
            if value.name == "attention_mask":
                numbers = np.ones(shape)
            sample[there(value.name)] = numbers.astype(numpy_type(value))
        samples.append(sample)
    return samples


def run(
    model: ir.Model, feed: Feeds, outputs: Sequence[str] | None = None, *, optimized: bool = False
) -> list[np.ndarray]:
    """What ONNX Runtime computes: each operator by itself in float, or with all of its optimizations."""
    return list(session(model, optimized=optimized).run(outputs, dict(feed)))


def session(model: ir.Model, *, optimized: bool = False) -> Any:
    import onnxruntime as ort

    settings = ort.SessionOptions()
    settings.intra_op_num_threads = 1
    settings.log_severity_level = 3
    if not optimized:
        settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    proto = ir.to_proto(on_cpu(model))
    return ort.InferenceSession(proto.SerializeToString(), settings, providers=["CPUExecutionProvider"])


def multiplied(model: ir.Model, *, optimized: bool = False) -> np.ndarray:
    """The matrix that a layer alone multiplies its only input by, [inputs, outputs]: its answer to the unit vectors."""
    (value,) = model.graph.inputs
    size = sizes(value)[-1]
    rows = np.eye(size, dtype=numpy_type(value)).reshape(*[1] * (len(dims(value)) - 2), size, size)
    return run(model, {there(value.name): rows}, optimized=optimized)[0].reshape(size, -1)


def optimized_nodes(model: ir.Model, path: Path) -> list[onnx.NodeProto]:
    """The nodes of the graph that ONNX Runtime makes of a model; `path` is a file to write it to."""
    import onnxruntime as ort

    settings = ort.SessionOptions()
    settings.log_severity_level = 3
    settings.optimized_model_filepath = str(path)
    ort.InferenceSession(ir.to_proto(model).SerializeToString(), settings, providers=["CPUExecutionProvider"])
    return list(onnx.load(path).graph.node)


def measure(model: ir.Model, steps: Sequence[Pass], samples: Sequence[Feeds], store: StatisticsStore) -> None:
    """Run the samples and put what the passes ask for, and the store lacks, into the store."""
    taps = [tap for step in steps for tap in step.taps(model)]
    pipeline.measure(model, taps, store, Calibrator(from_python(list(samples), model=model)), steps)


def compile(model: ir.Model, steps: Sequence[Pass], samples: Sequence[Feeds]) -> list[Changes]:
    """Run passes in place through the compiler's own pipeline, and check the graph after each."""
    data = from_python(list(samples), model=model) if samples else None
    observers = (Verify(data), _Check())
    runs = pipeline.run(model, steps, StatisticsStore(), None if data is None else Calibrator(data), observers)
    return [run.changes for run in runs]


class _Check:
    """Looks on in the pipeline: after every pass the graph is as `check` wants it."""

    def before(self, step: Pass, rest: Sequence[Pass], model: ir.Model, statistics: StatisticsStore) -> None: ...

    def after(self, step: Pass, model: ir.Model, changes: Changes) -> None:
        check(model)

    def failed(self, step: Pass, error: Exception) -> None: ...


def check(model: ir.Model) -> None:
    """Well-formed: schemas, types, order of nodes, unique names, no unused constants."""
    check_structure(model)
    onnx.shape_inference.infer_shapes(ir.to_proto(model), check_type=True, strict_mode=True)
    unused = [
        name for name, value in model.graph.initializers.items() if not value.uses() and not value.is_graph_output()
    ]
    assert not unused


def relative_error(got: np.ndarray, expected: np.ndarray) -> float:
    """‖got - expected‖ / ‖expected‖ in float64."""
    got, expected = got.astype(np.float64), expected.astype(np.float64)
    scale = np.linalg.norm(expected)
    return float(np.linalg.norm(got - expected) / (scale if scale > 0 else 1.0))


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def reasons(changes: Changes) -> dict[str, str]:
    return {skipped.site: skipped.reason for skipped in changes.skipped}


def data(model: ir.Model, name: str) -> np.ndarray:
    """The numbers of an initializer."""
    return held(model.graph.initializers[name])
