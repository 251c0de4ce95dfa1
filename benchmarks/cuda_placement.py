"""Which provider runs each node of compiled models:  python benchmarks/cuda_placement.py OUT…

Needs onnxruntime-gpu and onnx alone, and a CUDA provider that starts: on a GPU, or on stand-ins for the CUDA libraries,
as no number is computed. Prints a line for each folder; exits with 1 where a node that is no shape arithmetic is left
to the CPU.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections import Counter
from pathlib import Path

import onnx
import onnxruntime as ort

SHAPE_ARITHMETIC = {
    "Add", "Cast", "Concat", "ConstantOfShape", "Div", "Equal", "Expand", "Gather", "Identity", "Max", "Min", "Mul",
    "Range", "ReduceProd", "Reshape", "Shape", "Size", "Slice", "Squeeze", "Sub", "Unsqueeze", "Where",
}  # fmt: skip
CUDA = "CUDAExecutionProvider"


def placement(file: Path) -> tuple[dict[str, Counter[str]], int]:
    """Operators by provider, and the number of copies between host and device."""
    recorded = {entry.key: entry.value for entry in onnx.load(file, load_external_data=False).metadata_props}
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    for key, value in json.loads(recorded.get("qcompiler.session_options", "{}")).items():
        options.add_session_config_entry(key, str(value))
    disabled = json.loads(recorded.get("qcompiler.disabled_optimizers", "[]"))
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        session = ort.InferenceSession(
            str(file), options, providers=[CUDA, "CPUExecutionProvider"], disabled_optimizers=disabled
        )
        optimized = onnx.load(options.optimized_model_filepath, load_external_data=False)
    if CUDA not in session.get_providers():
        raise SystemExit("the CUDA provider did not start")
    by_provider: dict[str, Counter[str]] = {}
    for subgraph in session.get_provider_graph_assignment_info():
        counts = by_provider.setdefault(subgraph.ep_name, Counter())
        counts.update(node.op_type for node in subgraph.get_nodes())
    return by_provider, sum(node.op_type.startswith("Memcpy") for node in optimized.graph.node)


def main() -> None:
    failed = False
    for folder in map(Path, sys.argv[1:]):
        by_provider, copies = placement(folder / "model.onnx")
        cuda, cpu = by_provider.get(CUDA, Counter()), by_provider.get("CPUExecutionProvider", Counter())
        left = {op: count for op, count in cpu.items() if op not in SHAPE_ARITHMETIC}
        failed |= bool(left)
        told = f"not on the GPU: {left}" if left else "all but shape arithmetic on the GPU"
        print(f"{folder.name}: {cuda.total()} nodes on CUDA, {cpu.total()} on the CPU, {copies} copies; {told}")
    sys.exit(failed)


if __name__ == "__main__":
    main()
