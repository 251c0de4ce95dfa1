"""A run that was killed goes on where it was and gives the same bytes; the work of another run is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from safetensors.numpy import save_file

import qcompiler
from passes.awq import Awq
from qcompiler.driver.checkpoint import Checkpoint
from qcompiler.errors import DataError, OutputError
from qcompiler.formats.arithmetic import Quantized
from qcompiler.recipes import Recipe
from qcompiler.recipes.registry import pass_class
from qcompiler.rewriting.gptq import solve
from qcompiler.rewriting.staged import Computed, StagedPass, Unit
from qcompiler.statistics import StatisticsStore
from tests import tiny
from tests.there import tensors

BLOCKS = 3
RECIPE = {
    "name": "w4",
    "target": "portable",
    "passes": [{"gptq": {"group_size": 16, "damping": 0.02}}],
    "calibration": {"held_out": 0},
}


def model() -> ir.Model:
    """Blocks of two linear layers around a nonlinearity, named as exporters name them."""
    lines: list[str] = []
    weights: dict[str, Any] = {}
    for i in range(BLOCKS):
        lines += [
            f'["model.layers.{i}.mlp.up_proj"] u_{i} = MatMul (h_{i}, U_{i})',
            f"a_{i} = Tanh (u_{i})",
            f'["model.layers.{i}.mlp.down_proj"] d_{i} = MatMul (a_{i}, D_{i})',
            f"h_{i + 1} = Add (h_{i}, d_{i})",
        ]
        weights |= {f"U_{i}": "normal", f"D_{i}": "normal"}
    shapes = ", ".join(f"float[32, 48] U_{i}, float[48, 32] D_{i}" for i in range(BLOCKS))
    body = "\n".join(["h_0 = Identity (x)", *lines, f"y = Identity (h_{BLOCKS})"])
    return tiny.build(f"m (float[n, 32] x, {shapes}) => (float[n, 32] y) {{ {body} }}", **weights)


def samples(seed: int = 0) -> list[dict[str, np.ndarray]]:
    generator = np.random.default_rng(seed)
    mixing = generator.standard_normal((32, 32)).astype(np.float32)
    return [{"x": generator.standard_normal((40, 32)).astype(np.float32) @ mixing} for _ in range(3)]


def compiled(
    work: Path, *, resume: bool = False, recipe: dict[str, Any] | None = None, seed: int = 0
) -> qcompiler.Compiled:
    return qcompiler.compile(
        model(), Recipe.from_dict(recipe or RECIPE), calibration=samples(seed), work_dir=work, resume=resume
    )


def weights(result: qcompiler.Compiled) -> dict[str, tuple[object, ...]]:
    return {name: (held.dtype, held.shape, held.tobytes()) for name, held in tensors(result.model).items()}


class Killed(BaseException):
    pass


def interrupt(monkeypatch: pytest.MonkeyPatch, after: int) -> list[int]:
    """Let the solver die in its `after`-th call; returns the list that counts the calls."""
    calls: list[int] = []

    def dying(*args: object, **settings: Any) -> Quantized:
        calls.append(len(calls))
        if len(calls) == after:
            raise Killed
        return solve(*args, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr("passes.gptq.solve", dying)
    return calls


def test_the_same_bytes_after_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = compiled(tmp_path / "whole")
    interrupt(monkeypatch, after=4)  # in the second block
    with pytest.raises(Killed):
        compiled(tmp_path / "work")
    assert len(list((tmp_path / "work").glob("*.safetensors"))) == 1
    calls = interrupt(monkeypatch, after=99)
    resumed = compiled(tmp_path / "work", resume=True)
    assert len(calls) == 2 * (BLOCKS - 1)  # the first block was not computed again
    assert weights(resumed) == weights(whole)
    assert [site.details for site in resumed.report.sites] == [site.details for site in whole.report.sites]


def test_what_is_finished_is_removed_once_the_output_is_there(tmp_path: Path) -> None:
    result = compiled(tmp_path / "work")
    assert (tmp_path / "work").exists()
    result.save(tmp_path / "out")
    assert not (tmp_path / "work").exists()


def test_a_run_that_finished_no_stage_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(monkeypatch, after=2)
    with pytest.raises(Killed):
        compiled(tmp_path / "work")
    assert not (tmp_path / "work").exists()


def test_unfinished_work_is_not_thrown_away_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(monkeypatch, after=3)
    with pytest.raises(Killed):
        compiled(tmp_path / "work")
    with pytest.raises(OutputError, match=r"unfinished run.*--resume"):
        compiled(tmp_path / "work")


@pytest.mark.parametrize("other", ["recipe", "calibration"])
def test_the_work_of_another_run_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: str) -> None:
    interrupt(monkeypatch, after=3)
    with pytest.raises(Killed):
        compiled(tmp_path / "work")
    changed = {**RECIPE, "passes": [{"gptq": {"group_size": 16, "damping": 0.03}}]} if other == "recipe" else RECIPE
    with pytest.raises(OutputError, match=f"another {other}"):
        compiled(tmp_path / "work", resume=True, recipe=changed, seed=int(other == "calibration"))


def test_blocks_are_calibrated_on_the_quantized_blocks_before(tmp_path: Path) -> None:
    """Sequential and one sweep agree on the first block and on no other."""
    at_once = {**RECIPE, "passes": [{"gptq": {"group_size": 16, "damping": 0.02, "sequential": False}}]}
    sequential, together = weights(compiled(tmp_path / "a")), weights(compiled(tmp_path / "b", recipe=at_once))
    assert sequential["U_0.codes"] == together["U_0.codes"]
    assert sequential["D_0.codes"] == together["D_0.codes"]
    assert sequential["U_1.codes"] != together["U_1.codes"]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_kind_of_codes_survives(tmp_path: Path, dtype: str) -> None:
    scale = np.array([0.5, 0.25], np.float32).astype(ir.DataType[{"float32": "FLOAT", "float16": "FLOAT16",
                                                                 "bfloat16": "BFLOAT16"}[dtype]].numpy())  # fmt: skip
    codes = np.array([[1, -2], [3, 0]], np.int8)
    before = Computed.of({"W": Quantized(codes, scale, None, 1, None, "int4")}, details={"W": "a detail"})
    Checkpoint(tmp_path / "work", {"model": "m"}, resume=False).write(2, "gptq", 7, {"unit": before})
    again = Checkpoint(tmp_path / "work", {"model": "m"}, resume=True)
    assert again.has(2, "gptq", 7)
    assert not again.has(1, "gptq", 7)
    after = again.read(2, "gptq", 7)["unit"]
    assert after.facts == before.facts
    found = after.quantized("W")
    assert found.scale.dtype == scale.dtype
    np.testing.assert_array_equal(found.scale, scale)
    np.testing.assert_array_equal(found.codes, codes)
    assert (found.axis, found.block_size, found.zero_point) == (1, None, None)


TWICE = {**RECIPE, "passes": [
    {"gptq": {"format": "int8", "group_size": 16, "targets": ["*.down_proj"]}},
    {"gptq": {"format": "int4", "group_size": 16, "ignore": ["*.down_proj"]}},
]}  # fmt: skip


def test_one_pass_may_run_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps are told apart by their position: what the first has finished is not taken for work of the second."""
    whole = compiled(tmp_path / "whole", recipe=TWICE)
    formats = {site.name.split(".")[-1]: str(site.scheme).split()[0] for site in whole.report.sites}
    assert formats == {"down_proj": "int8", "up_proj": "int4"}
    interrupt(monkeypatch, after=BLOCKS + 2)  # in the second step
    with pytest.raises(Killed):
        compiled(tmp_path / "work", recipe=TWICE)
    names = sorted(path.name for path in (tmp_path / "work").glob("*.safetensors"))
    assert [name.split(".")[0] for name in names] == ["00-gptq"] * BLOCKS + ["01-gptq"]
    calls = interrupt(monkeypatch, after=99)
    assert weights(compiled(tmp_path / "work", resume=True, recipe=TWICE)) == weights(whole)
    assert len(calls) == BLOCKS - 1


@pytest.mark.parametrize("name", ["awq", "hqq", "nf4"])
def test_all_long_passes_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    options = {"nf4": {"block_size": 16}, "awq": {"group_size": 16, "grid": 3, "insert_mul": True}}
    rounding: list[dict[str, Any]] = [{"quantize-weights": {}}] if name == "awq" else []
    recipe = {**RECIPE, "passes": [{name: options.get(name, {"group_size": 16})}, *rounding]}
    whole = compiled(tmp_path / "whole", recipe=recipe)
    cls, calls = pass_class(name), list[int]()
    assert issubclass(cls, StagedPass)
    compute = cls.compute

    def dying(self: StagedPass, *args: Any) -> Computed:
        calls.append(1)
        if len(calls) == 3:
            raise Killed
        return compute(self, *args)

    monkeypatch.setattr(cls, "compute", dying)
    with pytest.raises(Killed):
        compiled(tmp_path / "work", recipe=recipe)
    assert len(list((tmp_path / "work").glob("*.safetensors"))) == 2
    before = len(calls)
    resumed = compiled(tmp_path / "work", resume=True, recipe=recipe)
    assert len(calls) - before == len(list((tmp_path / "whole").glob("*.safetensors"))) - 2 > 0
    assert weights(resumed) == weights(whole)
    assert [site.details for site in resumed.report.sites] == [site.details for site in whole.report.sites]


def test_awq_holds_the_moments_of_one_stage_at_a_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    held, compute = [], Awq.compute

    def counted(self: Awq, unit: Unit, statistics: StatisticsStore) -> Computed:
        held.append([value for value, _ in statistics])
        return compute(self, unit, statistics)

    monkeypatch.setattr(Awq, "compute", counted)
    compiled(tmp_path, recipe={**RECIPE, "passes": [{"awq": {"group_size": 16, "grid": 2, "insert_mul": True}}]})
    together = ["a_1", "h_1", "h_2"]  # an Add reads h_1 once a_1 is there, so nothing divides them
    assert held == [["x"], ["a_0"], together, together, together, ["a_2"]]


def interrupted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of the one stage that was finished."""
    with monkeypatch.context() as patched:
        interrupt(patched, after=4)
        with pytest.raises(Killed):
            compiled(folder)
    (stage,) = folder.glob("*.safetensors")
    return stage


def test_stages_without_a_fingerprint_are_nobodys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when a run dies while it cleans up: with another model they would be wrong, so they are not taken."""
    whole = compiled(tmp_path / "whole")
    stage = interrupted(tmp_path / "work", monkeypatch)
    (tmp_path / "work" / "run.json").unlink()
    stage.write_bytes(b"of another run")
    for resume in (False, True):
        assert weights(compiled(tmp_path / "work", resume=resume)) == weights(whole)
        (tmp_path / "work" / "run.json").unlink()


@pytest.mark.parametrize("place", [-1, -200, 200])
def test_a_flipped_bit_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: int) -> None:
    stage = interrupted(tmp_path / "work", monkeypatch)
    content = bytearray(stage.read_bytes())
    content[place] ^= 1
    stage.write_bytes(content)
    with pytest.raises(DataError, match=r"is damaged .*remove it"):
        compiled(tmp_path / "work", resume=True)


def test_a_file_without_notes_of_what_it_holds_is_damaged(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "work", {"model": "1"}, resume=False)
    checkpoint.write(0, "gptq", 0, {"a": Computed({"scale": np.ones(1, np.float32)}, {})})
    (stage,) = (tmp_path / "work").glob("*.safetensors")
    save_file({"0.scale": np.ones(1, np.float32)}, stage)
    with pytest.raises(DataError, match=r"is damaged \('sha256'\); remove it"):
        checkpoint.read(0, "gptq", 0)


def test_nothing_of_somebody_else_is_removed(tmp_path: Path) -> None:
    result = compiled(tmp_path / "work")
    (tmp_path / "work" / "notes.txt").write_text("mine")
    result.save(tmp_path / "out")
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["notes.txt"]


def test_a_folder_that_says_less_than_the_run_is_another_run(tmp_path: Path) -> None:
    """A checkpoint of an older version may lack a key: that the run is the same is not known then."""
    computed = {"a": Computed({"scale": np.ones(1, np.float32)}, {})}
    Checkpoint(tmp_path / "work", {"model": "1"}, resume=False).write(0, "gptq", 0, computed)
    with pytest.raises(OutputError, match="with another data"):
        Checkpoint(tmp_path / "work", {"model": "1", "data": "2"}, resume=True)
    assert Checkpoint(tmp_path / "work", {"model": "1"}, resume=True).has(0, "gptq", 0)


def test_a_stage_that_was_written_by_half_is_not_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(tensors: object, file: Path, metadata: object = None) -> None:
        file.write_bytes(b"half of it")
        raise OSError("no space left on device")

    checkpoint = Checkpoint(tmp_path / "work", {"model": "1"}, resume=False)
    computed = {"a": Computed({"scale": np.ones(1, np.float32)}, {})}
    with monkeypatch.context() as patched:
        patched.setattr("safetensors.numpy.save_file", full)
        with pytest.raises(OutputError, match="no space left"):
            checkpoint.write(0, "gptq", 0, computed)
    assert not checkpoint.has(0, "gptq", 0)
    checkpoint.write(0, "gptq", 0, computed)
    np.testing.assert_array_equal(checkpoint.read(0, "gptq", 0)["a"].arrays["scale"], [1])
