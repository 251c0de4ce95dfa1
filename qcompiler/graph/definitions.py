"""How operators are defined: how many inputs and outputs, which must be there, and what their attributes hold.

Those of ONNX come from its schemas. Those of ONNX Runtime are kept in `runtime_operators.json`, so that a model can X
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import onnx

RUNTIME_OPERATORS = frozenset({"SimplifiedLayerNormalization", "Affine", "ParametricSoftplus", "ScaledTanh"})
"""What ONNX Runtime defines under ONNX's own domain, so that ONNX's checker does not know it."""
RUNTIME_DOMAIN = "com.microsoft"
FILE = Path(__file__).parent / "runtime_operators.json"
INPUT_KINDS = {"Single": "1", "Optional": "0", "Variadic": "*"}


@dataclass(frozen=True)
class Definition:
    """An operator of one version."""

    inputs: str
    """A letter each: 1 must be there, 0 may be left out, * repeats and must be there, ~ repeats and may be left out."""
    fewest_inputs: int
    outputs: str
    attributes: Mapping[str, tuple[int, bool]]
    """By name: the `AttributeProto.AttributeType`, and whether it must be there."""
    closed: bool
    """Whether there are no other inputs and attributes; a newer ONNX Runtime may know more than our table."""

    def needs(self, index: int) -> bool:
        """Whether the input of this index must be there, where the node has so many."""
        return bool(self.inputs) and self.inputs[min(index, len(self.inputs) - 1)] in "1*"

    @property
    def most_inputs(self) -> int | None:
        """None where there may be any number."""
        return len(self.inputs) if self.closed and self.inputs[-1:] not in ("*", "~") else None

    @property
    def most_outputs(self) -> int | None:
        return len(self.outputs) if self.closed and self.outputs[-1:] not in ("*", "~") else None


@lru_cache(maxsize=2048)
def definition(op_type: str, domain: str, version: int) -> Definition | None:
    """What is known of an operator in a version of its domain; None where nothing is."""
    if domain == RUNTIME_DOMAIN or (domain == "" and op_type in RUNTIME_OPERATORS):
        return _runtime().get((domain, op_type))
    if not onnx.defs.has(op_type, max_inclusive_version=version, domain=domain):
        return None
    return _of(onnx.defs.get_schema(op_type, max_inclusive_version=version, domain=domain), closed=True)


def is_operator(name: str, domain: str, versions: Mapping[str, int]) -> bool:
    """Whether ONNX Runtime has an operator of that name, which it runs where a model has a function of it, too."""
    domain = "" if domain == "ai.onnx" else domain
    return definition(name, domain, versions.get(domain, 1)) is not None


def _of(schema: Any, *, closed: bool) -> Definition:
    """From a schema of onnx, or one of onnxruntime, which looks the same."""
    attributes = {
        name: (_number(attribute.type), bool(attribute.required)) for name, attribute in schema.attributes.items()
    }
    return Definition(_kinds(schema.inputs), schema.min_input, _kinds(schema.outputs), attributes, closed)


def _number(kind: Any) -> int:
    return int(onnx.AttributeProto.AttributeType.Value(kind.name))


def _kinds(parameters: Iterable[Any]) -> str:
    """The inputs of a loop differ in type and may be left out; those of a Concat are alike, and may not."""
    kinds = ((INPUT_KINDS[parameter.option.name], parameter) for parameter in parameters)
    return "".join("~" if kind == "*" and not _alike(parameter) else kind for kind, parameter in kinds)


def _alike(parameter: Any) -> bool:
    return bool(parameter.is_homogeneous if hasattr(parameter, "is_homogeneous") else parameter.isHomogeneous)


@cache
def _runtime() -> dict[tuple[str, str], Definition]:
    found = {}
    for key, entry in json.loads(FILE.read_text(encoding="utf-8"))["operators"].items():
        domain, _, name = key.partition("::")
        attributes = {
            attribute: (int(onnx.AttributeProto.AttributeType.Value(kind.rstrip("!"))), kind.endswith("!"))
            for attribute, kind in entry["attributes"].items()
        }
        found[domain, name] = Definition(
            entry["inputs"], entry["fewest_inputs"], entry["outputs"], attributes, closed=False
        )
    return found


def installed() -> dict[str, Any]:
    """What the file holds, as the installed onnxruntime says."""
    import onnxruntime
    from onnxruntime.capi.onnxruntime_pybind11_state import get_all_operator_schema

    operators = {}
    for schema in sorted(get_all_operator_schema(), key=lambda schema: (schema.domain, schema.name)):
        if schema.domain != RUNTIME_DOMAIN and not (schema.domain == "" and schema.name in RUNTIME_OPERATORS):
            continue
        known = _of(schema, closed=False)
        operators[f"{schema.domain}::{schema.name}"] = {
            "inputs": known.inputs, "fewest_inputs": known.fewest_inputs, "outputs": known.outputs,
            "attributes": {
                name: onnx.AttributeProto.AttributeType.Name(kind) + ("!" if required else "")
                for name, (kind, required) in sorted(known.attributes.items())
            },
        }  # fmt: skip
    return {"runtime": f"onnxruntime {onnxruntime.__version__}", "operators": operators}


def write() -> None:
    """Save the table, one operator a line, so that two versions differ line by line."""
    table = installed()
    lines = [f"    {json.dumps(key)}: {json.dumps(entry)}" for key, entry in table["operators"].items()]
    text = f'{{\n  "runtime": {json.dumps(table["runtime"])},\n  "operators": {{\n' + ",\n".join(lines) + "\n  }\n}\n"
    FILE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write()
