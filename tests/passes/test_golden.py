"""Golden cases: what a pass makes of a graph, as text and in numbers.

A case is a file of three parts divided by lines of `---`: settings in YAML, the graph before, the graph after.

    options: {alpha: 0.5}           the options of the pass that the folder is named after
    constants: {W: normal}          graph inputs that are weights, and how they are filled (`tiny.weight`), or numbers
    first: [quantize-weights]       passes that run on the graph before (name, or name: options)
    opset: 23                       where it is not 21
    tolerance: 0.02                 how far the outputs may be from those before (in the norm), where not the default
    ids: 4                          integer inputs are below this

`pytest tests/passes/test_golden.py --update-golden` writes the graph after anew.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import yaml

from passes import PASSES
from qcompiler.calibration.stored_past import StoredPasts
from qcompiler.recipes.registry import pass_class
from qcompiler.rewriting.contract import Changes, Pass
from tests import tiny
from tests.paths import GOLDEN
from tests.there import held, there

CASES = sorted(GOLDEN.glob("*/*.txt"))
DIVIDER = "\n---\n"
SHOWN = 12  # numbers of a constant

# ‖after - before‖ / ‖before‖ that each kind of pass is allowed; a rounding pass says its own in the case.
TOLERANCES = {"analysis": 0.0, "exact": 5e-6, "rounding": 0.02, "lowering": 1e-5}


def test_every_pass_has_cases() -> None:
    assert {path.parent.name for path in CASES} == set(PASSES)
    for name in PASSES:
        assert len([path for path in CASES if path.parent.name == name]) >= 3


@pytest.mark.parametrize("path", CASES, ids=[f"{path.parent.name}/{path.stem}" for path in CASES])
def test_golden(path: Path, request: pytest.FixtureRequest) -> None:
    settings_text, before_text, after_text = path.read_text(encoding="utf-8").split(DIVIDER)
    settings: dict[str, Any] = yaml.safe_load(settings_text) or {}
    step = _step({path.parent.name: settings.get("options", {})})
    before = tiny.build(before_text, opset=settings.get("opset", 21), **_constants(settings))
    samples = tiny.feeds(before, ids=settings.get("ids", 4))
    for item in settings.get("first", []):  # each measures the model that it finds
        tiny.compile(before, [_step(item)], samples)
    after = before.clone()
    (changes,) = tiny.compile(after, [step], samples)

    tolerance = settings.get("tolerance", TOLERANCES[step.kind])
    codes = {changed.cache.present for changed in changes.changed if changed.cache is not None}
    outputs = [name for value in before.graph.outputs if (name := there(value.name)) not in codes]
    pasts = StoredPasts(after)
    for sample in samples:
        # The graph after a lowering is run as users run it; the portable one by the definitions of its operators.
        got = tiny.run(after, pasts.encode(sample), outputs, optimized=step.kind == "lowering")
        for now, then in zip(got, tiny.run(before, sample, outputs), strict=True):
            assert now.dtype == then.dtype
            assert tiny.relative_error(now, then) <= tolerance
            if step.kind == "rounding" and changes.modified:
                assert tiny.relative_error(now, then) > 0  # codes that lose nothing would say that nothing was rounded

    text = printed(after, changes)
    if request.config.getoption("--update-golden"):
        path.write_text(DIVIDER.join([settings_text, before_text, text]), encoding="utf-8")
    else:
        assert text == after_text, "the graph has changed; if that is meant, run pytest with --update-golden"


def _step(item: str | dict[str, Any]) -> Pass:
    ((name, options),) = item.items() if isinstance(item, dict) else [(item, {})]
    return pass_class(name)(**options)


def _constants(settings: dict[str, Any]) -> dict[str, Any]:
    """As `tiny.build` takes them; a number becomes an array of float32, a list of whole numbers of int64."""
    found = {}
    for name, given in settings.get("constants", {}).items():
        whole = isinstance(given, list) and all(isinstance(item, int) for item in given)
        found[name] = given if isinstance(given, str) else np.array(given, np.int64 if whole else np.float32)
    return found


def printed(model: ir.Model, changes: Changes) -> str:
    """The graph as ONNX text, the numbers of its constants to 4 digits, and what the pass said about the sites."""
    lines = [line.rstrip() for line in ir.to_onnx_text(model, exclude_initializers=True).splitlines()]
    for name, value in model.graph.initializers.items():
        lines.append(f"# {name} = {_numbers(held(value))}")
    for changed in changes.changed:
        what = ", ".join(part for part in (changed.scheme, changed.kernel, changed.detail) if part)
        lines.append(f"# changed {changed.site}: {what}")
    lines += [f"# skipped {skipped.site}: {skipped.reason}" for skipped in changes.skipped]
    lines += [f"# excluded {excluded.site}: {excluded.reason}" for excluded in changes.excluded]
    return "\n".join(lines) + "\n"


def _numbers(array: np.ndarray) -> str:
    flat = array.reshape(-1)
    shown = [f"{float(number):.4g}" if array.dtype.kind in "fV" else str(int(number)) for number in flat[:SHOWN]]
    return " ".join(shown) + (" …" if flat.size > SHOWN else "")
