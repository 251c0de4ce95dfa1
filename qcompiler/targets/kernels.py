"""The kernel registry of an ONNX Runtime: which provider has what kernel, for which opset versions and types.

``python -m qcompiler.targets.kernels OUT.json [PROVIDER]`` writes the table of a provider (default: the CPU's) of the
installed onnxruntime; run it where another build is installed to get that build's. The tables beside this file were
made so. Of other providers than the CPU's, what their kernels keep in host memory is measured, too (`host_memory.py`),
for which the provider must start; `make cuda-kernels` does it without a GPU.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

OPEN_END = 2**31 - 1  # what ONNX Runtime writes for "and every later version"
CPU = "CPUExecutionProvider"
DOMAINS = ("", "ai.onnx.ml", "com.microsoft")

# Operators that read or write quantized data, and the float ones they stand in for.
RELEVANT = re.compile(
    r"(Dynamic)?(Quantize|Dequantize)Linear|QLinear\w+|Q(Gemm|MoE|Attention|EmbedLayerNormalization)|QOrdered\w+"
    r"|(Quantize|Dequantize)WithOrder|(MatMul|Conv)Integer(ToFloat)?|DynamicQuantizeMatMul|MatMulNBits|MatMulBnb4"
    r"|GatherBlockQuantized|GemmFloat8|MatMulBlockQuantized\w+|GroupQueryAttention|(Sparse)?PagedAttention|TensorScatter"
    r"|MatMul|Gemm|FusedMatMul|Conv"
)
CPU_TABLE = Path(__file__).parent / "kernels-ort-cpu-1.32.0.json"

Types = tuple[tuple[str, tuple[str, ...]], ...]
"""Type constraint and the types it allows, without the ``tensor()`` around them."""


@dataclass(frozen=True, order=True)
class RegisteredKernel:
    """One kernel: the operator, the provider that has it, the opset versions and the types that it takes."""

    domain: str
    """Empty for ai.onnx."""
    op: str
    provider: str
    since: int
    until: int | None
    """Last opset version; None means that it is open-ended."""
    types: Types
    host_inputs: tuple[int, ...] = ()
    """Inputs that the kernel reads from host memory."""
    host_outputs: tuple[int, ...] = ()
    """Outputs that it leaves in host memory."""

    def fits(self, since: int) -> bool:
        """Whether ONNX Runtime takes it for an operator of this version: an open end is only known to fit the start."""
        return self.since == since or (self.until is not None and self.since <= since <= self.until)


@dataclass(frozen=True)
class OperatorSignature:
    """The formal parameters of an operator: name and type constraint (or type) of each. The last may repeat."""

    inputs: tuple[tuple[str, str], ...]
    outputs: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class KernelTable:
    """What one provider has, and the signatures of operators that are not ONNX's own."""

    runtime: str
    kernels: tuple[RegisteredKernel, ...]
    signatures: dict[tuple[str, str], OperatorSignature]
    """By domain and operator."""


def installed_kernels(provider: str = CPU) -> list[RegisteredKernel]:
    """The registry of a provider of the onnxruntime that this Python imports."""
    from onnxruntime.capi import _pybind_state

    registry = (
        {"op": kernel.op_name, "domain": kernel.domain, "ep": kernel.provider, "ver": kernel.version_range,
         "tc": kernel.type_constraints}
        for kernel in _pybind_state.get_all_opkernel_def()
    )  # fmt: skip
    return select(registry, provider)


def installed_signatures(kernels: Iterable[RegisteredKernel]) -> dict[tuple[str, str], OperatorSignature]:
    """The signatures of the kernels' operators that ONNX does not define."""
    import onnx
    from onnxruntime.capi import _pybind_state

    wanted = {(k.domain, k.op) for k in kernels if not onnx.defs.has(k.op, k.domain)}
    found = {}
    for schema in _pybind_state.get_all_operator_schema():
        key = ("" if schema.domain == "ai.onnx" else schema.domain, schema.name)
        if key in wanted:
            sides = (schema.inputs, schema.outputs)
            found[key] = OperatorSignature(
                *(tuple((item.name, _bare(item.typeStr)) for item in side) for side in sides)
            )
    return dict(sorted(found.items()))


def select(registry: Iterable[dict[str, Any]], provider: str = CPU) -> list[RegisteredKernel]:
    """A provider's kernels in a raw registry (entries with op, domain, ep, ver, tc), sorted so that dumps compare.

    Kernels that differ in the types of one constraint only are written as one.
    """
    found: dict[tuple[str, str, int, int], set[Types]] = defaultdict(set)
    for entry in registry:
        domain = "" if entry["domain"] == "ai.onnx" else entry["domain"]
        if entry["ep"] == provider and domain in DOMAINS:
            types = tuple((name, tuple(sorted(map(_bare, types)))) for name, types in sorted(entry["tc"].items()))
            found[domain, entry["op"], *entry["ver"]].add(types)
    kernels = [
        RegisteredKernel(domain, op, provider, since, None if until == OPEN_END else until, types)
        for (domain, op, since, until), combinations in found.items()
        for types in _merged(combinations)
    ]
    return sorted(kernels, key=lambda kernel: (kernel.domain, kernel.op, kernel.since, kernel.types))


def _merged(combinations: Iterable[Types]) -> list[Types]:
    """The same combinations of types in fewer entries."""
    entries = sorted(set(combinations))
    names = {name for entry in entries for name, _ in entry}
    for chosen in sorted(names):
        groups: dict[Types, set[str]] = defaultdict(set)
        plain = [entry for entry in entries if chosen not in dict(entry)]
        for entry in entries:
            if chosen in dict(entry):
                groups[tuple(item for item in entry if item[0] != chosen)].update(dict(entry)[chosen])
        entries = plain + [
            tuple(sorted((*rest, (chosen, tuple(sorted(types)))))) for rest, types in sorted(groups.items())
        ]
    return entries


def _bare(text: str) -> str:
    return text.removeprefix("tensor(").removesuffix(")") if text.startswith("tensor(") else text


def write(path: Path, table: KernelTable) -> None:
    """Save a table, one kernel a line, so that two versions differ line by line."""
    signatures = [
        f"    {json.dumps(f'{domain}::{op}')}: "
        + json.dumps({"inputs": dict(signature.inputs), "outputs": dict(signature.outputs)})
        for (domain, op), signature in table.signatures.items()
    ]
    lines = [f"    {json.dumps(_entry(kernel))}" for kernel in table.kernels]
    text = (
        f'{{\n  "runtime": {json.dumps(table.runtime)},\n  "signatures": {{\n'
        + ",\n".join(signatures) + '\n  },\n  "kernels": [\n' + ",\n".join(lines) + "\n  ]\n}\n"
    )  # fmt: skip
    path.write_text(text, encoding="utf-8")


def _entry(kernel: RegisteredKernel) -> dict[str, Any]:
    memory = {"host_inputs": kernel.host_inputs, "host_outputs": kernel.host_outputs}
    return {
        "domain": kernel.domain, "op": kernel.op, "provider": kernel.provider, "since": kernel.since,
        "until": kernel.until, "types": dict(kernel.types), **{name: at for name, at in memory.items() if at},
    }  # fmt: skip


@cache
def read(path: Path) -> KernelTable:
    """A saved table."""
    data = json.loads(path.read_text(encoding="utf-8"))
    kernels = tuple(
        RegisteredKernel(
            entry["domain"], entry["op"], entry["provider"], entry["since"], entry["until"],
            tuple((name, tuple(types)) for name, types in entry["types"].items()),
            tuple(entry.get("host_inputs", ())), tuple(entry.get("host_outputs", ())),
        )
        for entry in data["kernels"]
    )  # fmt: skip
    signatures = {}
    for key, sides in data["signatures"].items():
        domain, _, op = key.partition("::")
        signatures[domain, op] = OperatorSignature(tuple(sides["inputs"].items()), tuple(sides["outputs"].items()))
    return KernelTable(data["runtime"], kernels, signatures)


def missing_on_cpu(operators: Iterable[tuple[str, str]]) -> tuple[str, ...]:
    """Which of the operators (domain, name) the CPU has no kernel for, sorted; of those that concern quantization."""
    known = {(kernel.domain, kernel.op) for kernel in read(CPU_TABLE).kernels}
    relevant = {(domain, op) for domain, op in operators if domain in ("", "com.microsoft") and RELEVANT.fullmatch(op)}
    return tuple(sorted(op for domain, op in relevant if (domain, op) not in known))
