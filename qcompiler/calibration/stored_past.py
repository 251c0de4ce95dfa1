"""Turns the keys and values of a sample into what a model with quantized caches reads.

A sample of the float model may come with a past of its own. The compiled model's own nodes make codes of it, those that
append to the cache, so that it reads what it would hold had it read the text itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from qcompiler.calibration.samples import Sample
from qcompiler.functions.cache import PACK, QUANTIZE, add_cache_function, is_cache_function
from qcompiler.functions.library import DOMAIN
from qcompiler.graph.edit import add_constant, constant, new_node
from qcompiler.graph.metadata import CACHE_SOURCE
from qcompiler.graph.model_inputs import Signature
from qcompiler.graph.operators import has, quantized
from qcompiler.graph.session import session
from qcompiler.sites.caches import CODES

if TYPE_CHECKING:
    import onnxruntime


@dataclass(frozen=True)
class _Encoder:
    """The nodes that make codes from what they read, as a model of its own."""

    part: ir.Model
    source: str
    inputs: tuple[ir.Value, ...]
    """The graph inputs that take what the outputs of `part` are, in order."""

    def empty(self, past: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        """What stands for a past without positions."""
        for value in self.inputs:
            width = value.shape[-1] if value.shape is not None else None
            if value.dtype is not None and isinstance(width, int):
                yield str(value.name), np.zeros((*past.shape[:-1], width), value.dtype.numpy())


class StoredPasts:
    """The quantized caches of a model."""

    def __init__(self, model: ir.Model) -> None:
        self._encoders = {str(past.name): encoder for past, encoder in _encoders(model)}
        self._sessions: dict[str, onnxruntime.InferenceSession] = {}

    def __bool__(self) -> bool:
        return bool(self._encoders)

    def encode(self, sample: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The sample with codes, and scales beside them, for every float past of a cache that the model quantizes."""
        found = dict(sample)
        for name, encoder in self._encoders.items():
            past = found.get(name)
            if past is None or past.dtype.kind != "f":
                continue
            if not past.size:
                found.update(encoder.empty(past))
                continue
            if name not in self._sessions:
                self._sessions[name] = session(encoder.part)
            wanted = encoder.part.graph.inputs[0].dtype or ir.DataType.FLOAT
            codes = self._sessions[name].run(None, {encoder.source: past.astype(wanted.numpy())})
            found.update(zip((str(value.name) for value in encoder.inputs), codes, strict=True))
        return found


class Adapted:
    """Samples as another model reads them; keeps `count`, which the progress bar wants."""

    def __init__(self, samples: Iterable[Sample], model: ir.Model) -> None:
        self._samples, self._signature, self._pasts = samples, Signature(model), StoredPasts(model)
        count = getattr(samples, "count", None)  # of a list it is a method
        self.count = count if isinstance(count, int) else None

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        for index, sample in enumerate(self._samples):
            yield self._signature.adopt(self._pasts.encode(sample), f"sample {index}")


def _encoders(model: ir.Model) -> Iterator[tuple[ir.Value, _Encoder]]:
    """The inputs that hold codes, each with what makes them."""
    for past in model.graph.inputs:
        if past.dtype not in CODES:
            continue
        for node, index in past.uses():
            if has(node, "joins") and index == 0 and _quantize(node.inputs[1]) is not None:
                yield past, _joined(model, node)
            elif (scale := _scale_of_past(node, index)) is not None:
                yield past, _fused(model, past, scale)


def _scale_of_past(node: ir.Node, index: int) -> ir.Value | None:
    """The scale of the past that attention reads as codes."""
    for codes in quantized(node):
        if codes.role == "past" and codes.codes.index == index and codes.scale is not None:
            return codes.scale.of(node)
    return None


def _quantize(codes: ir.Value | None) -> ir.Node | None:
    """The node that made codes, behind PackInt4 where they are packed."""
    node = codes.producer() if codes is not None else None
    if is_cache_function(node, PACK) and node is not None and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    return node if node is not None and CACHE_SOURCE in node.metadata_props else None


def _joined(model: ir.Model, join: ir.Node) -> _Encoder:
    """The nodes before a Concat or TensorScatter; those of scales and offsets come with them."""
    codes = join.inputs[1]
    quantize = _quantize(codes)
    if codes is None or quantize is None:
        raise ValueError(f"nothing makes codes for {join.name!r}")
    source = quantize.metadata_props[CACHE_SOURCE]
    outputs: list[ir.Value] = [codes, *quantize.outputs[1:]]
    inputs = tuple(past for value in outputs for past in _pasts(value, join.op_type))
    graph = ir.convenience.extract(model.graph, [source], [str(value.name) for value in outputs])
    graph.opset_imports.update(model.graph.opset_imports)
    part = ir.Model(graph, ir_version=model.ir_version, functions=list(model.functions.values()))
    return _Encoder(part, source, inputs)


def _pasts(new: ir.Value, op_type: str) -> Iterator[ir.Value]:
    """The input to which a value is appended."""
    for node, index in new.uses():
        if node.op_type == op_type and index == 1 and node.inputs[0] is not None:
            yield node.inputs[0]


def _fused(model: ir.Model, past: ir.Value, scale: ir.Value | None) -> _Encoder:
    """What GroupQueryAttention does inside, as nodes."""
    tensor = constant(scale)
    if tensor is None:
        raise ValueError(f"the scale of {past.name!r} is not a constant")
    part = ir.Model(
        ir.Graph([], [], nodes=[], opset_imports={"": model.opset_imports[""]}, name="encode"),
        ir_version=model.ir_version,
    )
    graph = part.graph
    bits = 4 if past.dtype == ir.DataType.UINT8 else 8
    graph.inputs.append(ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([None] * 4)))
    s = add_constant(graph, "scale", tensor.numpy())
    attributes: dict[str, object] = {"qmin": -(2.0 ** (bits - 1)), "qmax": 2.0 ** (bits - 1) - 1}
    nodes = [new_node(add_cache_function(part, QUANTIZE), [graph.inputs[0], s], "codes", domain=DOMAIN,
                      dtype=ir.DataType.INT8, attributes=attributes)]  # fmt: skip
    if bits == 4:
        nodes.append(new_node(add_cache_function(part, PACK), [nodes[0].outputs[0]], "packed", domain=DOMAIN,
                              dtype=ir.DataType.UINT8))  # fmt: skip
    graph.extend(nodes)
    graph.outputs.append(nodes[-1].outputs[0])
    return _Encoder(part, "x", (past,))
