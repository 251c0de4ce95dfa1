"""Says what is in a model, ours or any other: format, inputs and outputs, layers and their weights, where bytes are.

inspection = inspect("model.onnx", recipe="smoothquant")
inspection.layers               by module path: operator, type, scheme, shape, bytes, statistics of the weight
inspection.touched              what each pass of the recipe would work on
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from qcompiler.graph import files as model_io
from qcompiler.graph import metadata
from qcompiler.inspection.layers import InspectedLayer, layers_of
from qcompiler.inspection.touched import Touched, touched
from qcompiler.inspection.weights import WeightStatistics
from qcompiler.sites.analyses import caches_of
from qcompiler.sites.canonicalize import canonicalize
from qcompiler.sites.stored_caches import stored_cache

__all__ = ["Inspection", "InspectedLayer", "Port", "Touched", "WeightStatistics", "inspect"]

LONGEST = 200  # characters of a metadata entry
MOST_SHOWN = 4  # operators in a repr


@dataclass(frozen=True)
class Port:
    """An input or output of the graph."""

    name: str
    type: str
    shape: tuple[int | str, ...] | None
    """Symbolic sizes by their names, ``?`` where they have none; None where the rank is unknown."""
    cache: str = ""
    """How the cache that it holds is quantized; empty where it holds floats, or none."""


@dataclass(frozen=True)
class Inspection:
    """What is in a model."""

    file: str
    producer: str
    ir_version: int
    opsets: dict[str, int]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    operators: dict[str, int]
    """Nodes by operator, those of subgraphs too, the most first."""
    functions: tuple[str, ...]
    """Model-local functions."""
    bytes: dict[str, int]
    """Of the constants, by type, the most first."""
    external: dict[str, int]
    """Bytes of constants in each file beside the model; empty where they are all in it."""
    metadata: dict[str, str]
    """The model's entries; those of qcompiler without their prefix, and its recipe by name."""
    made_by_qcompiler: bool
    layers: tuple[InspectedLayer, ...]
    touched: tuple[Touched, ...]
    """What each pass of the recipe would work on; empty where no recipe was given."""

    def __repr__(self) -> str:
        operators = ", ".join(f"{count} {name}" for name, count in list(self.operators.items())[:MOST_SHOWN])
        size = f"{sum(self.bytes.values()) / 1e6:.1f} MB of constants"
        return (
            f"Inspection({self.file or 'a model'}: {len(self.layers)} layers, {size}; {operators} …;\n"
            f"  {len(self.inputs)} inputs, {len(self.outputs)} outputs, {self.producer or 'unknown producer'})"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return dataclasses.asdict(self)


def inspect(
    model: str | Path | ir.Model, *, recipe: str | Path | None = None, target: str | None = None,
    options: Sequence[str] = (), exclude: Sequence[str] = (), statistics: bool = True,
) -> Inspection:  # fmt: skip
    """Look at a model; weights are read only for their `statistics`, a piece at a time.

    With `recipe` (and, as for `compile`, target, options, exclude), say what its passes would work on. Raises
    ModelError, RecipeError.
    """
    given = model_io.take(model)
    facts: dict[str, Any] = {
        "file": "" if isinstance(model, ir.Model) else str(model_io.find_model(model)),
        "producer": " ".join(part for part in (given.producer_name, given.producer_version) if part),
        "ir_version": given.ir_version, "opsets": {name or "ai.onnx": v for name, v in given.opset_imports.items()},
        "inputs": tuple(_port(value) for value in given.graph.inputs if value.name not in given.graph.initializers),
        "outputs": tuple(_port(value) for value in given.graph.outputs),
        "operators": _counted(f"{node.domain}.{node.op_type}" if node.domain else node.op_type
                              for node in given.graph.all_nodes()),
        "functions": tuple(f"{domain}.{name}" for domain, name, _ in given.functions),
        "bytes": _bytes(given), "external": _external(given), "metadata": _metadata(given),
        "made_by_qcompiler": any(key.startswith(metadata.PREFIX) for key in given.metadata_props),
    }  # fmt: skip
    canonicalize(given)
    names = {site.name for site in caches_of(given)}
    caches = {str(value.name): stored_cache(value) for value in given.graph.inputs if value.name in names}
    facts["inputs"] = tuple(replace(port, cache=str(caches.get(port.name) or "")) for port in facts["inputs"])
    return Inspection(
        **facts, layers=tuple(layers_of(given, statistics=statistics)),
        touched=touched(given, recipe, target, options, exclude) if recipe is not None else (),
    )  # fmt: skip


def _port(value: ir.Value) -> Port:
    shape = value.shape
    sizes = None if shape is None else tuple(
        size if isinstance(size, int) else str(size.value or "?") for size in shape
    )  # fmt: skip
    return Port(str(value.name), value.dtype.name.lower() if value.dtype is not None else str(value.type or "?"), sizes)


def _counted(names: Any) -> dict[str, int]:
    return dict(Counter(names).most_common())


def _tensors(model: ir.Model) -> list[ir.TensorProtocol]:
    """All constants, whether initializers or nodes, each once."""
    found = [value.const_value for graph in model.graphs() for value in graph.initializers.values()]
    for node in model.graph.all_nodes():
        attribute = node.attributes.get("value") if node.op_type == "Constant" else None
        if attribute is not None and attribute.type == ir.AttributeType.TENSOR:
            found.append(attribute.as_tensor())
    return [tensor for tensor in found if tensor is not None]


def _bytes(model: ir.Model) -> dict[str, int]:
    sizes: Counter[str] = Counter()
    for tensor in _tensors(model):
        sizes[tensor.dtype.name.lower()] += tensor.nbytes
    return dict(sizes.most_common())


def _external(model: ir.Model) -> dict[str, int]:
    sizes: Counter[str] = Counter()
    for tensor in _tensors(model):
        if isinstance(tensor, ir.ExternalTensor):
            sizes[str(tensor.location)] += tensor.nbytes
    return dict(sizes.most_common())


def _metadata(model: ir.Model) -> dict[str, str]:
    found = {}
    for key, text in model.metadata_props.items():
        name = key.removeprefix(metadata.PREFIX)
        if key == metadata.RECIPE:
            text = next((line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("name:")), "")
        found[name] = text if len(text) <= LONGEST else f"{text[:LONGEST]} …"
    return found
