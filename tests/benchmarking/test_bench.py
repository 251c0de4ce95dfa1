"""`bench`: the structure of what is measured, on what, and one sentence for what cannot be."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

import qcompiler
from qcompiler import cli
from qcompiler.benchmarking import bench as module
from qcompiler.benchmarking.runner import Runner
from qcompiler.benchmarking.timing import Limits, Spread, in_turns
from qcompiler.errors import DataError, ModelError
from qcompiler.graph.files import save
from tests import tiny

LAYER = "g (float[M,16] x, float[16,16] W) => (float[M,16] y) { y = MatMul(x, W) }"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = tiny.build(LAYER, W="normal")
    save(model, tmp_path / "float")
    qcompiler.compile(model, "int8-static", calibration=tiny.feeds(model)).save(tmp_path / "out")
    return tmp_path


def decoder(place: Path) -> Path:
    text = """g (int64[B,S] input_ids, float[B,2,P,8] past_0, float[50,16] E, int64[4] shape)
        => (float[B,S,16] logits, float[B,2,T,8] present_0) {
        logits = Gather(E, input_ids) new = Reshape(logits, shape) turned = Transpose<perm=[0,2,1,3]>(new)
        present_0 = Concat<axis=2>(past_0, turned) }"""
    save(tiny.build(text, E="normal", shape=np.array([0, 0, 2, 8])), place)
    return place


def test_models_are_timed_in_turns_on_the_same_case(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each clock tick is a run: so the models take 1 and 3 seconds of CPU, and twice as much of the wall."""
    now, order = [0.0], []

    def called(self: Runner, number: int) -> None:
        name = Path(self.name).name
        order.append(name)
        now[0] += {"float": 3.0, "out": 1.0}[name]
        real(self, number)

    real = Runner.__call__
    monkeypatch.setattr(Runner, "__call__", called)
    clocks = functools.partial(in_turns, cpu=lambda: now[0], wall=lambda: 2 * now[0])
    monkeypatch.setattr(module, "in_turns", clocks)
    monkeypatch.setattr(module, "LIMITS", Limits(rounds=4, seconds=1e9, precision=0.0))
    found = qcompiler.bench(folder / "float", folder / "out")
    assert found.threads == 1
    (case,) = found.cases
    assert (case.title, case.rounds) == ("random numbers", 4)
    assert order[:10] == ["float", "out", "out", "float", "float", "out", "out", "float", "float", "out"]
    one, other = case.models
    assert (one.cpu, one.wall, one.cpu_ratio) == (Spread(3, 3, 3), Spread(6, 6, 6), Spread(1, 1, 1))
    assert (other.cpu, other.cpu_ratio, other.wall_ratio) == (Spread(1, 1, 1), Spread(3, 3, 3), Spread(3, 3, 3))
    assert [operator.operator for operator in one.operators] == ["MatMul"]
    assert {"QuantizeLinear", "MatMulIntegerToFloat"} == {operator.operator for operator in other.operators}
    assert json.loads(json.dumps(found.to_dict()))["cases"][0]["models"][1]["cpu_ratio"]["median"] == 3
    assert "3 ×" in repr(found)


def test_a_language_model_reads_tokens_after_an_empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LIMITS", Limits(rounds=1, seconds=0.0, precision=0.0))
    path = decoder(tmp_path / "decoder")
    assert [case.title for case in qcompiler.bench(path).cases] == ["1 token", "128 tokens"]
    assert [case.title for case in qcompiler.bench(path, tokens=[3]).cases] == ["3 tokens"]
    seen: list[dict[str, tuple[int, ...]]] = []
    real = Runner.__init__

    def noted(self: Runner, name: str, session: object, samples: list[dict[str, np.ndarray]]) -> None:
        seen.append({name: array.shape for name, array in samples[0].items()})
        real(self, name, session, samples)

    monkeypatch.setattr(Runner, "__init__", noted)
    qcompiler.bench(path, tokens=[3])
    assert seen[0] == {"input_ids": (1, 3), "past_0": (1, 2, 0, 8)}


def test_other_models_take_their_own_shapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LIMITS", Limits(rounds=1, seconds=0.0, precision=0.0))
    for name, text in (
        ("fixed", "g (float[B,3,4] x) => (float[B,3,4] y) { y = Neg(x) }"),
        ("open", "g (float[B,N,4] x) => (float[B,N,4] y) { y = Neg(x) }"),
        ("words", "g (string[B] x, string[B] z) => (bool[B] y) { y = Equal(x, z) }"),
    ):
        save(tiny.build(text), tmp_path / name)
    assert [case.title for case in qcompiler.bench(tmp_path / "fixed", tokens=[1, 7]).cases] == ["random numbers"]
    titles = [case.title for case in qcompiler.bench(tmp_path / "open", tokens=[1, 7]).cases]
    assert titles == ["random numbers, 1 along open axes", "random numbers, 7 along open axes"]
    with pytest.raises(DataError, match="random data cannot be made for the text input 'x'"):
        qcompiler.bench(tmp_path / "words")
    (tmp_path / "words.jsonl").write_text('{"x": ["a", "b"], "z": ["a", "c"]}\n')
    (case,) = qcompiler.bench(tmp_path / "words", data=str(tmp_path / "words.jsonl")).cases
    assert case.models[0].operators[0].operator == "Equal"


def test_data_is_what_all_models_run_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LIMITS", Limits(rounds=3, seconds=1e9, precision=0.0))
    data = folder / "x.npz"
    np.savez(data, x=np.ones((5, 2, 16), np.float32))
    (case,) = qcompiler.bench(folder / "float", folder / "out", data=str(data), samples=3).cases
    assert case.title == f"3 samples of {data}"
    assert len(case.models) == 2


def test_what_cannot_be_timed_is_one_sentence(folder: Path) -> None:
    with pytest.raises(DataError, match="no model to time"):
        qcompiler.bench()
    with pytest.raises(DataError, match="give one of them"):
        qcompiler.bench(folder / "float", tokens=[1], data="x.npz")
    for wrong in ({"threads": 0}, {"tokens": [0]}, {"samples": 0}):
        with pytest.raises(DataError, match="counts of 1 or more"):
            qcompiler.bench(folder / "float", **wrong)
    for tokens in ([], [1, 1 << 21]):
        with pytest.raises(DataError, match="one or more counts of up to 1048576"):
            qcompiler.bench(folder / "float", tokens=tokens)
    with pytest.raises(ModelError, match="does not exist"):
        qcompiler.bench(folder / "float", folder / "nothing")
    np.savez(folder / "wide.npz", x=np.ones((2, 2, 9), np.float32))
    with pytest.raises(DataError, match="has the shape"):
        qcompiler.bench(folder / "float", data=str(folder / "wide.npz"))


def test_what_fails_in_a_run_is_one_sentence(tmp_path: Path) -> None:
    text = "g (float[B,N] x, float[B,4] z) => (float[B,4] y) { y = Add(x, z) }"
    save(tiny.build(text), tmp_path / "model")
    with pytest.raises(DataError, match=r"the sample does not go through .*model: node 'y' \(Add\) failed"):
        qcompiler.bench(tmp_path / "model", tokens=[3])


def test_no_more_tokens_than_the_model_reads(tmp_path: Path) -> None:
    path = decoder(tmp_path / "decoder")
    (path / "config.json").write_text('{"max_position_embeddings": 8}')
    with pytest.raises(DataError, match="reads 8 tokens at most, and 9 are asked for"):
        qcompiler.bench(path, tokens=[9])


def run(monkeypatch: pytest.MonkeyPatch, *args: object) -> object:
    monkeypatch.setattr(sys, "argv", ["qcompiler", "bench", *map(str, args)])
    monkeypatch.setattr(module, "LIMITS", Limits(rounds=2, seconds=1e9, precision=0.0))
    try:
        cli.main()
    except SystemExit as end:
        return end.code
    return None


def test_the_command(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, folder / "float", folder / "out") in (None, 0)
    text = capsys.readouterr().out
    assert "1 thread" in text
    assert "random numbers, 2 rounds, ratios of CPU time" in text
    assert "MatMulIntegerToFloat" in text
    assert "100.0% of 1" in text
    assert run(monkeypatch, folder / "float", "--json", "--threads", "2") in (None, 0)
    assert json.loads(capsys.readouterr().out)["threads"] == 2
    assert run(monkeypatch, decoder(folder / "decoder"), "--tokens", "2,3", "--threads", "2") in (None, 0)
    text = capsys.readouterr().out
    assert "2 tokens, 2 rounds, ratios of wall time" in text
    assert "3 tokens" in text


@pytest.mark.parametrize("tokens", ["1,x", "", "0", "-1", "9" * 5000, "²"])
def test_odd_tokens_are_refused(
    tokens: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, folder / "float", f"--tokens={tokens}") == 2
    assert "write it like 1,128" in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_names_of_a_stranger_reach_no_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ports = [helper.make_tensor_value_info(name, 1, ["\x1b[2J", 4]) for name in ("x\x1b[2J", "y\n")]
    graph = helper.make_graph([helper.make_node("Neg", ["x\x1b[2J"], ["y\n"], name="\x1b[31m")], "g", *zip(ports))
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), tmp_path / "m.onnx")
    assert run(monkeypatch, tmp_path / "m.onnx") in (None, 0)
    assert {letter for letter in capsys.readouterr().out if not letter.isprintable()} <= {"\n"}
