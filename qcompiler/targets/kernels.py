"""The kernel registry of an installed ONNX Runtime, cut down to what quantization concerns.

``python -m qcompiler.targets.kernels OUT.json`` writes the table of the installed onnxruntime; run it where another
build is installed to get that build's. The tables beside this file were made so.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

OPEN_END = 2**31 - 1  # what ONNX Runtime writes for "and every later version"

# Operators that read or write quantized data, and the float ones they stand in for.
RELEVANT = re.compile(
    r"(Dynamic)?(Quantize|Dequantize)Linear|QLinear\w+|Q(Gemm|MoE|Attention|EmbedLayerNormalization)|QOrdered\w+"
    r"|(Quantize|Dequantize)WithOrder|(MatMul|Conv)Integer(ToFloat)?|DynamicQuantizeMatMul|MatMulNBits|MatMulBnb4"
    r"|GatherBlockQuantized|GemmFloat8|MatMulBlockQuantized\w+|GroupQueryAttention|(Sparse)?PagedAttention|TensorScatter"
    r"|MatMul|Gemm|FusedMatMul|Conv"
)
CPU_TABLE = Path(__file__).parent / "kernels-ort-cpu-1.32.0.json"
PROVIDERS = ("CPUExecutionProvider", "CUDAExecutionProvider")


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
    types: tuple[tuple[str, tuple[str, ...]], ...]
    """Type constraint and the types it allows, without the ``tensor()`` around them."""


def installed_kernels() -> list[RegisteredKernel]:
    """The relevant part of the registry of the onnxruntime that this Python imports."""
    from onnxruntime.capi import _pybind_state

    return select(
        {
            "op": kernel.op_name,
            "domain": kernel.domain,
            "ep": kernel.provider,
            "ver": kernel.version_range,
            "tc": kernel.type_constraints,
        }
        for kernel in _pybind_state.get_all_opkernel_def()
    )


def select(registry: Iterable[dict[str, Any]]) -> list[RegisteredKernel]:
    """Relevant kernels of a raw registry (entries with op, domain, ep, ver, tc), sorted so that dumps compare."""
    found = {
        RegisteredKernel(
            domain="" if entry["domain"] == "ai.onnx" else entry["domain"],
            op=entry["op"],
            provider=entry["ep"],
            since=entry["ver"][0],
            until=None if entry["ver"][1] == OPEN_END else entry["ver"][1],
            types=tuple(
                (name, tuple(sorted(item.removeprefix("tensor(").removesuffix(")") for item in types)))
                for name, types in sorted(entry["tc"].items())
            ),
        )
        for entry in registry
        if entry["ep"] in PROVIDERS and RELEVANT.fullmatch(entry["op"])
    }
    return sorted(found, key=lambda kernel: (kernel.domain, kernel.op, kernel.provider, kernel.since, kernel.types))


def write(path: Path, kernels: Iterable[RegisteredKernel], runtime: str) -> None:
    """Save a table, one kernel a line, so that two versions differ line by line."""
    lines = []
    for kernel in kernels:
        entry = asdict(kernel)
        entry["types"] = dict(kernel.types)
        lines.append("    " + json.dumps(entry))
    body = ",\n".join(lines)
    path.write_text(f'{{\n  "runtime": {json.dumps(runtime)},\n  "kernels": [\n{body}\n  ]\n}}\n', encoding="utf-8")


def read(path: Path) -> list[RegisteredKernel]:
    """The kernels of a saved table."""
    entries = json.loads(path.read_text(encoding="utf-8"))["kernels"]
    return [
        RegisteredKernel(**{**entry, "types": tuple((name, tuple(types)) for name, types in entry["types"].items())})
        for entry in entries
    ]


def missing_on_cpu(operators: Iterable[tuple[str, str]]) -> tuple[str, ...]:
    """Which of the operators (domain, name) the CPU has no kernel for, sorted; those that no table is about are had."""
    known = {(kernel.domain, kernel.op) for kernel in read(CPU_TABLE)}
    relevant = {(domain, op) for domain, op in operators if domain in ("", "com.microsoft") and RELEVANT.fullmatch(op)}
    return tuple(sorted(op for domain, op in relevant if (domain, op) not in known))


if __name__ == "__main__":
    import onnxruntime

    write(Path(sys.argv[1]), installed_kernels(), f"onnxruntime {onnxruntime.__version__}")
