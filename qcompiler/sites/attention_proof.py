"""Runs a part of a graph that should be attention, and compares it with causal attention in float64.

    y_i = Σ_j softmax_j(scale · q_i k_j) v_j,   j ≤ past + i  and  attention_mask[j] = 1

The part is cut out between query, new keys, new values, caches and the result, with all that its mask and its shapes
are computed from, and run on random numbers: without a past, with one, and with several tokens after one, each with
rows that are whole, padded on the right and padded on the left. Only what real (not padded) queries give is compared.

A sliding window or a chunk shows only when the cache is longer than it; so for each number above 2 that the mask is
computed from, the mask is computed again over a cache that is longer than twice that number.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from qcompiler.errors import QCompilerError
from qcompiler.functions.library import DOMAIN
from qcompiler.graph.edit import constant
from qcompiler.graph.model_inputs import IDS, Input, Signature
from qcompiler.graph.operators import has
from qcompiler.graph.runtime_library import onnxruntime as onnxruntime_library
from qcompiler.sites.attention import CachedAttention, Mask
from qcompiler.sites.attention_cases import MaskCase, far_cases, mask_cases

MASK, POSITIONS = "attention_mask", ("position_ids", "cache_position")
TOLERANCES = {ir.DataType.FLOAT: 1e-4, ir.DataType.FLOAT16: 2e-2}
HIDDEN = -1e4
"""What is added to a score to hide it is at most this."""
LONGEST = 1 << 22
"""A window of more positions than these is none."""
SMALL = 8  # constants of up to so many elements are looked at as numbers
LARGE = 1 << 16  # a float constant with more elements is a weight


@dataclass(frozen=True)
class Proof:
    """What an attention was found to compute."""

    scale: float
    padding: ir.Value | None
    """The graph input attention_mask [batch, past + new], where the mask reads it."""
    ids: ir.Value
    """The graph input whose axes are batch and new positions."""
    interior: frozenset[ir.Node]
    """The nodes between query, caches and result."""


class _RefusedError(Exception):
    """A reason why the attention cannot be proved to be causal attention."""


def prove(model: ir.Model, site: CachedAttention, signature: Signature) -> Proof | str:
    """What the site computes, or the reason why it cannot be fused. `signature` is the model's."""
    try:
        return _prove(model, site, signature)
    except _RefusedError as refused:
        return str(refused)


def _prove(model: ir.Model, site: CachedAttention, signature: Signature) -> Proof:
    by_name = {str(value.name): value for value in model.graph.inputs}
    ids = next((name for name in IDS if name in signature.inputs), None)
    if ids is None:
        raise _RefusedError(f"the model has none of the inputs {', '.join(IDS)}, whose axes are batch and positions")
    masks = _Part(model, [mask.value for mask in site.masks], {}, signature)
    read = masks.data & signature.inputs.keys()
    unknown = sorted(read - {MASK, *POSITIONS})
    if unknown:
        raise _RefusedError(f"its mask is computed from the input {unknown[0]!r}")
    padded = MASK in read
    cases = list(mask_cases(signature.inputs[ids], padded))
    scale = _scale(model, site, signature, cases[0])

    leaves = {value: f"leaf.{value.name}" for value in (site.query, site.key.new, site.value.new)}
    part = _Part(model, [site.output], leaves, signature)
    for case in cases:
        _check_numbers(site, part, scale, case, leaves)
    for case in far_cases(signature.inputs[ids], masks.numbers(), padded):
        _check_reach(site, masks, case)
    return Proof(scale, by_name[MASK] if padded else None, by_name[ids], frozenset(part.nodes))


def _scale(model: ir.Model, site: CachedAttention, signature: Signature, case: MaskCase) -> float:
    if site.scale is not None:
        return site.scale
    if site.node.op_type == "Attention":
        return float(site.head_size**-0.5)
    if not site.factors:
        return 1.0
    values = [value for value, _ in site.factors]
    part = _Part(model, values, {}, signature)
    if part.data:
        raise _RefusedError("its scale depends on the data")
    found = part.run(case, {})
    numbers = [float(array.reshape(-1)[0]) ** power for array, (_, power) in zip(found, site.factors, strict=True)]
    return float(np.prod(numbers))


# ------------------------------------------------------------------------------------------- what is run


class _Part:
    """The nodes that some values are computed by, from leaves and inputs of the graph, as a session of its own.

    Where only the shape of a value counts and its symbols are those of graph inputs, the value is not computed.
    """

    def __init__(
        self, model: ir.Model, outputs: Sequence[ir.Value], leaves: Mapping[ir.Value, str], signature: Signature
    ) -> None:
        self._model, self._outputs, self._leaves, self._signature = model, outputs, leaves, signature
        self._symbols = {
            size for item in signature.inputs.values() for size in item.dims or () if isinstance(size, str)
        }
        self._shaped: dict[ir.Value, str] = {}  # values of which only the shape is read
        self._constants: dict[str, ir.Value] = {}
        self.data: set[str] = set()
        """The graph inputs whose numbers are read."""
        self.nodes = self._collect()
        self._session: Any = None

    def _collect(self) -> list[ir.Node]:
        found: set[ir.Node] = set()
        pending = [value for value in self._outputs if value not in self._leaves]
        while pending:
            value = pending.pop()
            if value in self._leaves:
                continue
            if constant(value) is not None:
                self._keep_constant(value)
                continue
            node = value.producer()
            if node is None:
                self.data.add(str(value.name))
                continue
            if node in found:
                continue
            if node.domain not in ("", "com.microsoft") or node.domain == DOMAIN or node.graph is not self._model.graph:
                raise _RefusedError(f"its mask is computed by {node.op_type}, which is not known")
            found.add(node)
            for source in node.inputs:
                if source is None:
                    continue
                if has(node, "measures") and self._is_shape_only(source):
                    self._shaped[source] = f"shape.{source.name}"
                else:
                    pending.append(source)
        return [node for node in self._model.graph if node in found]

    def _is_shape_only(self, value: ir.Value) -> bool:
        if constant(value) is not None or value in self._leaves:
            return False
        if value.is_graph_input():
            return True
        return value.dtype is not None and value.shape is not None and all(
            isinstance(size, int) or size.value in self._symbols for size in value.shape
        )  # fmt: skip

    def _keep_constant(self, value: ir.Value) -> None:
        tensor = constant(value)
        assert tensor is not None
        if tensor.dtype.is_floating_point() and tensor.size > LARGE:
            raise _RefusedError(f"its mask depends on the weights {value.name!r}")
        self._constants[str(value.name)] = value

    def numbers(self) -> list[int]:
        """The whole numbers above 2 among the constants, by magnitude: a window or a chunk would be one of them."""
        found = set()
        for value in self._constants.values():
            tensor = constant(value)
            if tensor is not None and tensor.size <= SMALL and tensor.dtype != ir.DataType.STRING:
                array = np.abs(np.asarray(tensor.numpy(), np.float64)).reshape(-1)
                found |= {int(number) for number in array if 2 < number < LONGEST}
        return sorted(found)

    def run(self, case: MaskCase, leaves: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        feed = dict(leaves)
        symbols: dict[str, int] = {}
        for item in self._signature.inputs.values():
            feed[item.name] = _fill(item, case, symbols)
        for value, name in self._shaped.items():
            if value.is_graph_input():
                feed[name] = feed[str(value.name)]
            else:
                sizes = [size if isinstance(size, int) else symbols[str(size.value)] for size in value.shape or ()]
                feed[name] = np.zeros(sizes, value.dtype.numpy() if value.dtype is not None else np.float32)
        session = self._open()
        try:
            arrays = session.run(None, {item.name: feed[item.name] for item in session.get_inputs()})
        except Exception as error:
            raise _RefusedError(f"it cannot be run apart ({_first_sentence(error)})") from error
        return [np.asarray(array) for array in arrays]

    def input(self, name: str, case: MaskCase) -> np.ndarray:
        """What a run of the case feeds to a graph input."""
        return _fill(self._signature.inputs[name], case, {})

    def _open(self) -> Any:
        if self._session is None:
            try:
                onnxruntime = onnxruntime_library()
            except QCompilerError as error:
                raise _RefusedError(str(error)) from error
            settings = onnxruntime.SessionOptions()
            settings.intra_op_num_threads = 1
            settings.log_severity_level = 4
            try:
                self._session = onnxruntime.InferenceSession(
                    self._proto().SerializeToString(), settings, providers=["CPUExecutionProvider"]
                )
            except Exception as error:
                raise _RefusedError(f"it cannot be loaded apart ({_first_sentence(error)})") from error
        return self._session

    def _proto(self) -> onnx.ModelProto:
        nodes = [ir.serde.serialize_node(node) for node in self.nodes]
        renamed = {str(value.name): name for value, name in self._leaves.items()}
        for node in nodes:
            for index, name in enumerate(node.input):
                if name in renamed:
                    node.input[index] = renamed[name]
        for kept, node in zip(self.nodes, nodes, strict=True):
            if has(kept, "measures") and kept.inputs[0] in self._shaped:
                node.input[0] = self._shaped[kept.inputs[0]]
        typed = [(name, value) for value, name in (*self._leaves.items(), *self._shaped.items())]
        typed += [(str(value.name), value) for value in self._model.graph.inputs if value.name in self.data]
        used = {name for node in nodes for name in node.input}
        inputs = [_info(name, value) for name, value in typed if name in used]
        # An output that is an input or a constant itself is handed on by an Identity of another name.
        for index, value in enumerate(self._outputs):
            nodes.append(onnx.helper.make_node("Identity", [str(value.name)], [f"result.{index}"]))
        inputs += [_info(str(value.name), value) for value in self._outputs if value.is_graph_input()
                   and str(value.name) not in used]  # fmt: skip
        outputs = [_info(f"result.{index}", value) for index, value in enumerate(self._outputs)]
        constants = [
            onnx.numpy_helper.from_array(np.asarray(tensor.numpy()), name)
            for name, value in self._constants.items()
            if (tensor := constant(value)) is not None
        ]
        graph = onnx.helper.make_graph(nodes, "part", inputs, outputs, constants)
        opsets = [onnx.helper.make_opsetid(domain, version) for domain, version in self._model.opset_imports.items()]
        return onnx.helper.make_model(graph, opset_imports=opsets, ir_version=self._model.ir_version or 10)


def _fill(item: Input, case: MaskCase, symbols: dict[str, int]) -> np.ndarray:
    """A graph input; the caches among them are random, so that what reads them is seen to."""
    dims = item.dims or ()
    if item.name == MASK:
        array = case.kept
    elif item.name in POSITIONS:
        array = case.positions[0] if item.rank == 1 else case.positions
    else:
        length, axis = (case.past, item.past_axis) if item.is_past else (case.new, 1)
        symbolic = [length if index == axis else (case.batch if index == 0 else 1) for index in range(len(dims))]
        sizes = [size if isinstance(size, int) else other for size, other in zip(dims, symbolic, strict=True)]
        seed = zlib.crc32(item.name.encode())
        array = np.random.default_rng(seed).standard_normal(sizes) if item.is_past else np.zeros(sizes)
    if len(dims) != array.ndim or any(isinstance(a, int) and a != b for a, b in zip(dims, array.shape, strict=True)):
        raise _RefusedError(f"the input {item.name!r} has a shape in which it could not be run")
    for size, number in zip(dims, array.shape, strict=True):
        if isinstance(size, str) and symbols.setdefault(size, number) != number:
            raise _RefusedError(f"the size {size!r} of the input {item.name!r} is another's, too")
    return array.astype(item.dtype.numpy())


def _info(name: str, value: ir.Value) -> onnx.ValueInfoProto:
    dtype = value.dtype if value.dtype is not None else ir.DataType.FLOAT
    return onnx.helper.make_tensor_value_info(name, int(dtype), None)


def _first_sentence(error: Exception) -> str:
    return re.split(r"\n|\. ", str(error).strip())[0][:160]


# ------------------------------------------------------------------------------------------- what is compared


def _check_numbers(
    site: CachedAttention, part: _Part, scale: float, case: MaskCase, leaves: Mapping[ir.Value, str]
) -> None:
    """Raise unless the part gives what causal attention gives."""
    rng = np.random.default_rng(0)
    arrays: dict[str, np.ndarray] = {}
    read = ((site.query, site.num_heads), (site.key.new, site.kv_heads), (site.value.new, site.kv_heads))
    for value, heads in read:
        numbers = rng.standard_normal((case.batch, heads, case.new, site.head_size)) * 2
        if value.shape is not None and len(value.shape) == 3:
            numbers = numbers.swapaxes(1, 2).reshape(case.batch, case.new, -1)
        arrays[leaves[value]] = numbers.astype(value.dtype.numpy() if value.dtype is not None else np.float32)
    (got,) = part.run(case, arrays)
    query, *new = (_heads(arrays[leaves[value]], site.head_size) for value, _ in read)
    pasts = [part.input(str(joined.past.name), case).astype(np.float64) for joined in site.joined]
    keys, values = (np.concatenate(both, axis=2) for both in zip(pasts, new, strict=True))
    wanted = attention(query, keys, values, scale, case.visible)
    if site.output.shape is not None and len(site.output.shape) == 3:
        got = _heads(got, site.head_size)
    if got.shape != wanted.shape:
        raise _RefusedError(f"its result has the shape {list(got.shape)} where {list(wanted.shape)} was expected")
    real = case.real[:, None, :, None]
    error = np.where(real, got.astype(np.float64) - wanted, 0.0)
    tolerance = TOLERANCES[site.query.dtype or ir.DataType.FLOAT]
    if not np.linalg.norm(error) <= tolerance * np.linalg.norm(np.where(real, wanted, 0.0)):
        what = f"{case.new} tokens after {case.past}" + ("" if case.kept.all() else ", some padded")
        raise _RefusedError(f"it does not compute causal attention ({what}): it has another mask or a bias")


def _heads(array: np.ndarray, head_size: int) -> np.ndarray:
    """[batch, heads, positions, head size] in float64."""
    if array.ndim == 3:
        array = array.reshape(*array.shape[:2], -1, head_size).swapaxes(1, 2)
    return array.astype(np.float64)


def attention(query: np.ndarray, key: np.ndarray, value: np.ndarray, scale: float, visible: np.ndarray) -> np.ndarray:
    """softmax(scale · q kᵀ) v of [batch, heads, positions, head size]; visible [batch, new, all]; keys are shared."""
    group = query.shape[1] // key.shape[1]
    key, value = np.repeat(key, group, axis=1), np.repeat(value, group, axis=1)
    scores = scale * query @ key.swapaxes(2, 3)
    scores = np.where(visible[:, None], scores, -np.inf)
    highest = scores.max(axis=-1, keepdims=True)
    weights = np.exp(scores - np.where(np.isfinite(highest), highest, 0.0))
    total = weights.sum(axis=-1, keepdims=True)
    result: np.ndarray = (weights / np.where(total > 0, total, 1.0)) @ value
    return result


def _check_reach(site: CachedAttention, masks: _Part, case: MaskCase) -> None:
    """Raise where the mask hides what is far away."""
    shown = np.ones((1, 1, 1, 1), bool)
    for mask, array in zip(site.masks, masks.run(case, {}), strict=True):
        shown = shown & _shown(mask, array)
    if not np.array_equal(np.broadcast_to(shown, (case.batch, 1, *case.visible.shape[1:]))[:, 0], case.visible):
        raise _RefusedError("its mask hides what lies further back (a sliding window, or chunks)")


def _shown(mask: Mask, array: np.ndarray) -> np.ndarray:
    shown: np.ndarray = array > HIDDEN if mask.kind == "add" else (array if mask.kind == "keep" else ~array)
    return shown[(None,) * (4 - shown.ndim)] if shown.ndim < 4 else shown
