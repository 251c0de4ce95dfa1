"""What a compilation gives: the model in memory, its report, and the folder that they are saved to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from qcompiler.driver.checkpoint import Checkpoint
from qcompiler.graph import files as model_io
from qcompiler.recipes import Recipe
from qcompiler.report import Report


@dataclass(frozen=True)
class Compiled:
    """A compiled model in memory; `save` writes the folder that ONNX Runtime runs. Notebooks show its report."""

    model: ir.Model
    report: Report
    recipe: Recipe
    source: Path | None
    checkpoint: Checkpoint | None = None

    def save(self, folder: str | Path, *, overwrite: bool = False) -> None:
        """Write model, recipe and report to `folder`, whole or not at all. Raises OutputError."""
        from qcompiler.report.html import page

        files = {"recipe.yaml": self.recipe.to_yaml(), "report.json": self.report.to_json()}
        files["report.html"] = page(self.report)
        model_io.save(self.model, Path(folder), source_folder=self.source, overwrite=overwrite, extra_files=files)
        if self.checkpoint is not None:
            self.checkpoint.remove()

    def __repr__(self) -> str:
        return f"Compiled({self.report})"

    def _repr_html_(self) -> str:
        from qcompiler.report.html import card

        return card(self.report)
