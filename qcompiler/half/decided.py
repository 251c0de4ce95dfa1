"""What `plan` decides of a model, and `rewrite` carries out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import onnx_ir as ir

from qcompiler.half.norms import Mode
from qcompiler.half.types import HalfPorts

ValueKind = Literal["data", "table", "constant"]


@dataclass
class HalfPlan:
    """What `plan` decided."""

    dtype: ir.DataType
    modes: dict[ir.Node, Mode] = field(default_factory=dict)
    kinds: dict[ir.Value, ValueKind] = field(default_factory=dict)
    """Of every float32 value that is no constant."""
    forms: dict[ir.Node, HalfPorts] = field(default_factory=dict)
    reasons: dict[ir.Node, str] = field(default_factory=dict)
    """Why a node stays in float32 that would compute in 16 bits by its operator."""
    bounds: dict[ir.Value, float] = field(default_factory=dict)
    """No number of a table is larger; infinite where that is not known."""
    large: set[ir.Value] = field(default_factory=set)
    """Values with numbers that are too large."""

    def is_half(self, value: ir.Value) -> bool:
        """Whether a value is written in 16 bits."""
        producer = value.producer()
        if producer is None:
            return value in self.kinds and value not in self.large
        if self.modes.get(producer) == "half":
            form = self.forms.get(producer)
            return form is None or value.index() in form.outputs
        return False
