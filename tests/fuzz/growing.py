"""A model while it grows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "float64": TensorProto.DOUBLE}
ODD_NAMES = (
    "a b", "/model/layers.{i}/mlp/down_proj/MatMul", "layers.{i}.weight", "weight_scale", "W_quantized", "ü", "\u202e",
    "x" * 300, "../up", "{i}", "model.layers.{i}.self_attn.q_proj", "re:.*", "*", "a\nb", "\x1b[31m", "x_{i}_scale",
)  # fmt: skip
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Value:
    """A float value; `shape` without the batch, which comes first."""

    name: str
    shape: Shape


@dataclass
class Graph:
    """A model while it grows."""

    rng: np.random.Generator
    dtype: str = "float32"
    odd: bool = False
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: list[onnx.TensorProto] = field(default_factory=list)
    inputs: list[onnx.ValueInfoProto] = field(default_factory=list)
    functions: list[onnx.FunctionProto] = field(default_factory=list)
    pool: list[Value] = field(default_factory=list)
    count: int = 0

    def name(self, base: str) -> str:
        self.count += 1
        if self.odd and self.rng.random() < 0.3:
            return str(self.rng.choice(np.array(ODD_NAMES, dtype=object))).replace("{i}", str(self.count)) + (
                f"{self.count}" if self.rng.random() < 0.9 else ""
            )
        return f"{base}_{self.count}"

    def pick(self, items: Sequence[int]) -> int:
        return int(self.rng.choice(np.array(items)))

    def maybe(self, chance: float = 0.5) -> bool:
        return bool(self.rng.random() < chance)

    def constant(self, array: np.ndarray, base: str = "const") -> str:
        name = self.name(base)
        tensor = numpy_helper.from_array(np.ascontiguousarray(array), name)
        if self.maybe(0.1):
            self.nodes.append(helper.make_node("Constant", [], [name], value=tensor))
        else:
            self.constants.append(tensor)
        return name

    def numbers(self, *shape: int) -> np.ndarray:
        """A weight: normal mostly; sometimes with outliers, dead channels, zeros, or all the same."""
        array = self.rng.normal(size=shape) / np.sqrt(max(1, shape[0] if shape else 1))
        kind = self.rng.random()
        if kind < 0.08 and array.size:
            array.reshape(-1)[:: self.pick([3, 7, 17])] *= 30
        elif kind < 0.12 and array.ndim == 2:
            array[:, : 1 + array.shape[1] // 4] = 0
        elif kind < 0.14:
            array[...] = 0
        elif kind < 0.16:
            array[...] = 0.5
        elif kind < 0.18:
            array *= self.rng.choice([1e-20, 1e-8, 1e4])
        return np.asarray(array, self.dtype)

    def node(self, op: str, inputs: Sequence[str], shape: Shape, domain: str = "", **attributes: object) -> Value:
        name = self.name(op)
        label = self.name(op) if self.maybe(0.8) else ""
        self.nodes.append(helper.make_node(op, list(inputs), [name], name=label, domain=domain, **attributes))
        return Value(name, shape)

    def ints(self, *values: int) -> str:
        return self.constant(np.array(values, np.int64), "ints")

    def scalar(self, number: float) -> str:
        return self.constant(np.array(number, self.dtype), "scalar")
