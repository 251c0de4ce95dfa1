"""Float weights in an exported graph, so that quantized weights from anywhere are judged on the same arithmetic."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from qcompiler.graph.edit import add_constant, remove_node_if_unused  # noqa: E402
from qcompiler.graph.files import load  # noqa: E402
from qcompiler.graph.session import session  # noqa: E402
from qcompiler.sites.find import find_sites  # noqa: E402


def insert(source: Path, weights: Mapping[str, np.ndarray], output: Path) -> int:
    """Write `source` with the weights of a transformers checkpoint, and return how many linear layers got theirs.

    Linear layers are matched by module path, whose weights [out, in] are turned where the graph holds [in, out]; norms
    by the name of their gain. Raises ValueError where a weight has no place or another shape.
    """
    model = load(source)
    left = dict(weights)
    sites = find_sites(model)
    embedding = sites.embeddings[0]
    for site in sites.linears:
        weight = left.pop(f"{site.module_path}.weight")
        if site.weight is not embedding.table:
            _set(site.weight, weight if site.transposed else weight.T)
    table = left.pop(f"{embedding.module_path}.weight")
    _set(embedding.table, table.T if embedding.transposed else table)
    for name in list(left):
        if name not in model.graph.initializers:
            raise ValueError(f"the graph has no place for {name}")
        _set(model.graph.initializers[name], left.pop(name))
    _save(model, output)
    return len(sites.linears)


def _set(value: ir.Value, array: np.ndarray) -> None:
    if value.shape is None or tuple(value.shape.numpy()) != array.shape:
        raise ValueError(f"{value.name} is {value.shape}, and its new weight {list(array.shape)}")
    value.const_value = ir.tensor(np.ascontiguousarray(array, dtype=np.float32), name=value.name)


def dequantize(model: ir.Model, output: Path) -> int:
    """Write a portable quantized model with its weights computed once and stored in float; returns how many these are.

    onnxruntime would fuse DequantizeLinear and MatMul into a kernel that rounds activations as well
    (`session.qdq_matmulnbits_accuracy_level` is 4 when left alone); what is written here has nothing to fuse.
    """
    graph = model.graph
    weights = list(_dequantized(graph))
    kept = list(graph.outputs)
    graph.outputs[:] = [*kept, *weights]
    opened = session(model)
    token = {value.name: np.ones((1, 1), np.int64) for value in opened.get_inputs()}
    arrays = opened.run([str(value.name) for value in weights], token)
    graph.outputs[:] = kept
    for value, array in zip(weights, arrays, strict=True):
        constant = add_constant(graph, f"{value.name}_float", np.asarray(array))
        value.replace_all_uses_with(constant)
        producer = value.producer()
        if producer is not None:
            remove_node_if_unused(producer)
    _save(model, output)
    return len(weights)


def _dequantized(graph: ir.Graph) -> dict[ir.Value, None]:
    """What Dequantize… nodes make of constants; not the scales that another one reads (double quantization)."""
    comes_from: dict[ir.Value, set[ir.Value]] = {value: set() for value in graph.initializers.values()}
    found: dict[ir.Value, None] = {}
    for node in graph:
        inputs = [value for value in node.inputs if value is not None]
        if not inputs or any(value not in comes_from for value in inputs):
            continue
        before = set().union(*(comes_from[value] for value in inputs))
        if node.op_type.startswith("Dequantize"):
            for scales in before:
                found.pop(scales, None)
            found[node.outputs[0]] = None
            before = {node.outputs[0]}
        comes_from.update((value, before) for value in node.outputs)
    return found


def _save(model: ir.Model, output: Path) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    ir.save(model, output, external_data=f"{output.name}.data")
