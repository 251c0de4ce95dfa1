"""Peak memory and time of compiling a model with 4 GB of float weights: `results/memory.json`.

    python benchmarks/memory.py [--gigabytes 4] [--folder DIR]

A Llama-shaped model (hidden 2048, SwiGLU 5632, GroupQueryAttention, float32) with generated weights is written tensor
by tensor, then `qcompiler compile` runs on it as a process of its own, whose peak resident memory the operating system
reports: once with the data-free recipe int8-weights, once with smoothquant and calibration under ``--memory-limit``.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (numpy learns bfloat16, which onnx_ir needs)
import numpy as np
import onnx_ir as ir

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.quality import machine, versions


@dataclass(frozen=True)
class Shape:
    """A Llama; every figure but the layers as in models of about a billion parameters."""

    layers: int
    hidden: int = 2048
    inner: int = 5632
    heads: int = 32
    kv_heads: int = 8
    vocabulary: int = 16384
    tied: bool = True

    @property
    def kv(self) -> int:
        return self.hidden // self.heads * self.kv_heads

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of a block's linear layers."""
        h, inner = self.hidden, self.inner
        return {"q_proj": (h, h), "k_proj": (h, self.kv), "v_proj": (h, self.kv), "o_proj": (h, h),
                "gate_proj": (h, inner), "up_proj": (h, inner), "down_proj": (inner, h)}  # fmt: skip

    @property
    def block_parameters(self) -> int:
        return sum(k * n for k, n in self.linears.values()) + 2 * self.hidden

    @property
    def parameters(self) -> int:
        tables = self.vocabulary * self.hidden * (1 if self.tied else 2)
        return self.layers * self.block_parameters + tables + self.hidden


class Builder:
    """Builds the graph with weights that exist only while they are written."""

    def __init__(self) -> None:
        self.nodes: list[ir.Node] = []
        self.initializers: list[ir.Value] = []

    def weight(self, name: str, *shape: int, scale: float = 0.02) -> ir.Value:
        seed = len(self.initializers)

        def make() -> ir.TensorProtocol:
            values = np.random.default_rng(seed).standard_normal(shape, dtype=np.float32) * np.float32(scale)
            return ir.Tensor(values + np.float32(1) if len(shape) == 1 else values, name=name)

        tensor = ir.LazyTensor(make, dtype=ir.DataType.FLOAT, shape=ir.Shape(shape), cache=False, name=name)
        return self._initializer(name, tensor)

    def constant(self, name: str, value: np.ndarray) -> ir.Value:
        return self._initializer(name, ir.tensor(value, name=name))

    def _initializer(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)  # type: ignore[arg-type]
        self.initializers.append(value)
        return value

    def node(
        self, op: str, inputs: list[ir.Value | None], name: str, outputs: int = 1, domain: str = "", **attributes: Any
    ) -> Any:
        attrs = [ir.convenience.convert_attribute(key, value) for key, value in attributes.items()]
        values = [ir.Value(name=f"{name}/output_{i}") for i in range(outputs)]
        self.nodes.append(ir.Node(domain, op, inputs, attrs, outputs=values, name=f"{name}/{op}"))
        return values[0] if outputs == 1 else values


def shape_of(gigabytes: float) -> Shape:
    """As many layers as make so many gigabytes of float32."""
    one = Shape(1)
    return Shape(max(1, math.ceil((gigabytes * 1e9 / 4 - one.vocabulary * one.hidden) / one.block_parameters)))


def build(shape: Shape, folder: Path) -> Path:
    """Write the model with external data; returns its path."""
    b = Builder()
    ids = ir.Value(name="input_ids", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(["batch", "sequence"]))
    mask = ir.Value(name="attention_mask", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(["batch", "total"]))
    table = b.weight("model.embed_tokens.weight", shape.vocabulary, shape.hidden)
    x = b.node("Gather", [table, ids], "/model/embed_tokens")
    lengths = b.node("ReduceSum", [mask, b.constant("one", np.array([1], np.int64))], "/model/lengths", keepdims=0)
    lengths = b.node("Sub", [lengths, b.constant("minus", np.array(1, np.int64))], "/model/last")
    lengths = b.node("Cast", [lengths], "/model/seqlens", to=6)
    total = b.node("Shape", [mask], "/model/shape")
    total = b.node("Gather", [total, b.constant("second", np.array(1, np.int64))], "/model/total64")
    total = b.node("Cast", [total], "/model/total", to=6)
    for i in range(shape.layers):
        at = f"/model/layers.{i}"

        def linear(value: ir.Value, name: str, at: str = at) -> Any:
            weight = b.weight(f"{at[1:].replace('/', '.')}.{name}.weight", *shape.linears[name])
            return b.node("MatMul", [value, weight], f"{at}/{name}")

        def norm(value: ir.Value, name: str, at: str = at) -> Any:
            gain = b.weight(f"{at[1:].replace('/', '.')}.{name}.weight", shape.hidden, scale=0.2)
            return b.node("SimplifiedLayerNormalization", [value, gain], f"{at}/{name}", epsilon=1e-5, axis=-1)

        n = norm(x, "input_layernorm")
        q, k, v = linear(n, "q_proj"), linear(n, "k_proj"), linear(n, "v_proj")
        attention = b.node(
            "GroupQueryAttention", [q, k, v, None, None, lengths, total], f"{at}/attn", 3, "com.microsoft",
            num_heads=shape.heads, kv_num_heads=shape.kv_heads,
        )  # fmt: skip
        x = b.node("Add", [x, linear(attention[0], "o_proj")], f"{at}/residual")
        n = norm(x, "post_attention_layernorm")
        gate, up = linear(n, "gate_proj"), linear(n, "up_proj")
        silu = b.node("Mul", [gate, b.node("Sigmoid", [gate], f"{at}/act")], f"{at}/silu")
        x = b.node("Add", [x, linear(b.node("Mul", [silu, up], f"{at}/product"), "down_proj")], f"{at}/out")
    gain = b.weight("model.norm.weight", shape.hidden, scale=0.2)
    x = b.node("SimplifiedLayerNormalization", [x, gain], "/model/norm", epsilon=1e-5, axis=-1)
    if shape.tied:
        head = b.node("Transpose", [table], "/lm_head/turn", perm=[1, 0])
    else:
        head = b.weight("lm_head.weight", shape.hidden, shape.vocabulary)
    logits = b.node("MatMul", [x, head], "/lm_head")
    logits.name, logits.type = "logits", ir.TensorType(ir.DataType.FLOAT)
    logits.shape = ir.Shape(["batch", "sequence", shape.vocabulary])
    graph = ir.Graph([ids, mask], [logits], nodes=b.nodes, initializers=b.initializers,
                     opset_imports={"": 21, "com.microsoft": 1}, name="llama")  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    ir.save(ir.Model(graph, ir_version=10), folder / "model.onnx", external_data="model.onnx.data")
    return folder / "model.onnx"


def run(arguments: list[str]) -> tuple[float, int]:
    """Seconds and peak resident bytes of `qcompiler …` as a process of its own."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "qcompiler", *arguments])
    _, status, usage = os.wait4(process.pid, 0)
    if os.waitstatus_to_exitcode(status) != 0:
        raise SystemExit(f"qcompiler {' '.join(arguments)} failed")
    return time.perf_counter() - start, usage.ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--folder", type=Path, default=None, help="where the model goes (default: a temporary folder)")
    parser.add_argument("--memory-limit", default="1.5GiB")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--sequence", type=int, default=128)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "memory.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        shape = shape_of(arguments.gigabytes)
        source = build(shape, folder / "source")
        weights = (folder / "source" / "model.onnx.data").stat().st_size
        generator = np.random.default_rng(0)
        ids = generator.integers(0, shape.vocabulary, (arguments.samples, arguments.sequence))
        np.savez(folder / "data.npz", input_ids=ids)
        rows = []
        for recipe, extra in (
            ("int8-weights", []),
            ("smoothquant", ["--calibration", str(folder / "data.npz"), "--samples", str(arguments.samples - 4),
                             "--memory-limit", arguments.memory_limit]),
        ):  # fmt: skip
            output = folder / recipe
            seconds, peak = run(["compile", str(source), "--recipe", recipe, "-o", str(output), "--overwrite", *extra])
            size = sum(file.stat().st_size for file in output.glob("model.onnx*"))
            rows.append({"recipe": recipe, "seconds": round(seconds, 1), "peak_gb": round(peak / 1e9, 3),
                         "gb_before": round(weights / 1e9, 3), "gb_after": round(size / 1e9, 3)})  # fmt: skip
            print(rows[-1], flush=True)
    report = {"date": date.today().isoformat(), "machine": machine(), "versions": versions(),
              "samples": arguments.samples, "sequence": arguments.sequence, "memory_limit": arguments.memory_limit,
              "rows": rows}  # fmt: skip
    arguments.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
