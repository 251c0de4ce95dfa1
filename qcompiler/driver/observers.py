"""What looks on while passes run: verification, numbered dumps, and a reproducer when a pass fails."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import onnx_ir as ir

from qcompiler.calibration.calibrator import model_hash, save_statistics
from qcompiler.calibration.samples import Samples, write_samples
from qcompiler.driver.inputs import load
from qcompiler.errors import DataError, OutputError, PassError, QCompilerError
from qcompiler.evaluation.compare import check_structure, compare
from qcompiler.graph.check import forget_checked
from qcompiler.graph.files import save
from qcompiler.graph.model_inputs import Signature
from qcompiler.recipes import Recipe, Step
from qcompiler.rewriting.contract import Changes, Pass
from qcompiler.sites.analyses import let_go
from qcompiler.statistics import StatisticsStore

# An exact pass moves factors between constants, which changes the last bits of a float and nothing else.
EXACT_SQNR_DB = {
    ir.DataType.FLOAT: 60.0,
    ir.DataType.DOUBLE: 60.0,
    ir.DataType.FLOAT16: 30.0,
    ir.DataType.BFLOAT16: 20.0,
}


class Snapshots:
    """The model as it was before the step that runs, copied only where something has changed since."""

    def __init__(self) -> None:
        self._copy: ir.Model | None = None

    def of(self, model: ir.Model) -> ir.Model:
        """A copy that nobody may change."""
        if self._copy is None:
            self._copy = model.clone()
            forget_checked(self._copy)
            let_go(self._copy)  # what was found in the model, whose weights would live as long as the copy
        return self._copy

    def changed(self) -> None:
        """The model is another one now."""
        self._copy = None


class Verify:
    """After every pass the graph is well-formed; after an exact pass it computes what it did before."""

    def __init__(self, samples: Samples | None, memory_limit: int | None = None, snapshots: Snapshots | None = None):
        self._samples, self._memory_limit = samples, memory_limit
        self._snapshots = snapshots or Snapshots()
        self._before: ir.Model | None = None

    def before(self, step: Pass, rest: Sequence[Pass], model: ir.Model, statistics: StatisticsStore) -> None:
        exact = step.kind == "exact" and self._samples is not None
        self._before = self._snapshots.of(model) if exact else None

    def after(self, step: Pass, model: ir.Model, changes: Changes) -> None:
        check_structure(model)
        if self._before is None or self._samples is None or not changes.modified:
            return
        comparison = compare(self._before, model, self._samples, limit=1, memory_limit=self._memory_limit)
        if comparison.reshaped:
            raise PassError(
                f"{step.name} should keep the function, but output {comparison.reshaped[0]!r} now has another shape"
            )
        types = {output.name: output.dtype for output in model.graph.outputs}
        for name, measures in comparison.outputs.items():
            floor = EXACT_SQNR_DB.get(types.get(name) or ir.DataType.FLOAT)
            if floor is not None and measures.sqnr_db < floor:
                raise PassError(
                    f"{step.name} should keep the function, but output {name!r} now differs from before by "
                    f"{measures.sqnr_db:.1f} dB SQNR (at least {floor:.0f} dB are expected)"
                )
        self._before = None

    def failed(self, step: Pass, error: Exception) -> None:
        self._before = None


class Dump:
    """ONNX text of the graph before the first and after every pass: `00-input.txt`, `01-smooth-quant.txt`, …"""

    def __init__(self, folder: Path) -> None:
        self._folder, self._count = folder, 0

    def before(self, step: Pass, rest: Sequence[Pass], model: ir.Model, statistics: StatisticsStore) -> None:
        if self._count == 0:
            self._write("input", model)

    def after(self, step: Pass, model: ir.Model, changes: Changes) -> None:
        self._write(step.name, model)

    def failed(self, step: Pass, error: Exception) -> None:
        """Nothing to write: the reproducer holds the model before the pass."""

    def _write(self, name: str, model: ir.Model) -> None:
        text = ir.to_onnx_text(model, exclude_initializers=True)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            (self._folder / f"{self._count:02d}-{name}.txt").write_text(text, encoding="utf-8")
        except OSError as error:
            raise OutputError(
                f"the dumps cannot be written to {self._folder} ({error.strerror or error}); choose another --dump-dir"
            ) from error
        self._count += 1


class Reproducer:
    """When a pass fails by its own fault: a folder with what shows it again.

    That is the model before it, the rest of the recipe, what was measured, and two samples, as an exact pass fails by
    numbers alone. A lowering pass is shown with those before it, on the portable model.
    """

    def __init__(
        self, folder: Path | None, recipe: Recipe, snapshots: Snapshots, samples: Samples | None = None
    ) -> None:
        """`folder` is None where nothing is known to lie beside: then one for temporary files is made."""
        self._folder, self._recipe, self._snapshots, self._samples = folder, recipe, snapshots, samples
        self._model: ir.Model | None = None
        self._rest: Sequence[Pass] = ()
        self._statistics: StatisticsStore | None = None

    def before(self, step: Pass, rest: Sequence[Pass], model: ir.Model, statistics: StatisticsStore) -> None:
        if self._model is None or not (step.kind == "lowering" and self._rest and self._rest[0].kind == "lowering"):
            self._model, self._rest, self._statistics = self._snapshots.of(model), rest, statistics

    def after(self, step: Pass, model: ir.Model, changes: Changes) -> None:
        if step.kind != "analysis":  # a pass may change what is no layer, and then names none
            self._snapshots.changed()

    def failed(self, step: Pass, error: Exception) -> None:
        if self._model is None or self._statistics is None:
            return
        if isinstance(error, QCompilerError) and not isinstance(error, PassError):
            return  # the user's input is at fault, and the message says so
        place = self._folder or Path(tempfile.mkdtemp(prefix="qcompiler-"))
        folder = place / f"reproduce-{step.name}"
        try:
            data = self._write(folder, step, self._model, self._statistics)
        except OutputError as obstacle:
            raise PassError(f"the pass {step.name} failed: {error} (no reproducer, as {obstacle})") from error
        raise PassError(
            f"the pass {step.name} failed: {error} (this is a defect of the pass; "
            f"qcompiler compile {folder} --recipe {folder / 'recipe.yaml'} "
            f"--statistics {folder / 'statistics.safetensors'}{data} -o OUT shows it again)"
        ) from error

    def _write(self, folder: Path, step: Pass, model: ir.Model, statistics: StatisticsStore) -> str:
        """The folder; returns what the command says of samples."""
        steps = tuple(Step(name=item.name, options=asdict(item)) for item in self._rest)
        recipe = self._recipe.model_copy(update={"passes": steps, "lowering": (), "name": f"reproduce-{step.name}"})
        save(model, folder, overwrite=True, extra_files={"recipe.yaml": recipe.to_yaml()})
        again, _ = load(folder)  # statistics are taken for the model as it is read
        save_statistics(folder / "statistics.safetensors", statistics, model_hash(again), "")
        if self._samples is None:
            return ""
        try:
            adopted = [Signature(again).adopt(sample, "the sample") for sample in islice(self._samples, 2)]
        except DataError:  # the inputs are others by now (a filled cache in codes), and the graph alone has to show it
            return ""
        write_samples(folder / "samples", [adopted[-1], adopted[0]])  # the second is held out again
        return f" --calibration pb:{folder / 'samples'}"


def onlookers(
    recipe: Recipe, held_out: Samples | None, memory_limit: int | None, dump_dir: Path | None, snapshots: Snapshots,
    beside: Path | None = None,
) -> list[Verify | Dump | Reproducer]:  # fmt: skip
    """What looks on in a compilation, in this order; a reproducer goes to the dumps, or `beside` the output."""
    dumps = [Dump(dump_dir)] if dump_dir is not None else []
    return [
        Verify(held_out, memory_limit, snapshots),
        *dumps,
        Reproducer(dump_dir or beside, recipe, snapshots, held_out),
    ]
