"""Names of a stranger's model never reach a terminal as commands: escape sequences, newlines, C1, bidi marks."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from qcompiler import cli
from qcompiler.errors import printable

NASTY = [
    "\x1b[2J", "\x1b]0;title\x07", "a\nbroken", "a\rb", "\x9b31m", "\u202eabc", "\x00", "\x7f", "\u2028",
    "[red]x[/red]",
]  # fmt: skip


def name(base: str) -> str:
    return base + "".join(NASTY)


def model(scale: float = 1.0) -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    weights = [
        numpy_helper.from_array((scale * rng.normal(size=(16, 16))).astype(np.float32), name(letter)) for letter in "VW"
    ]
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", [name("x"), name("W")], [name("h")], name=name("first")),
            helper.make_node("Relu", [name("h")], [name("r")], name=name("relu"), doc_string=name("doc")),
            helper.make_node("MatMul", [name("r"), name("V")], [name("y")], name=name("second")),
        ],
        name("g"),
        [helper.make_tensor_value_info(name("x"), 1, [name("n"), 16])],
        [helper.make_tensor_value_info(name("y"), 1, [name("n"), 16])],
        weights,
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    made.producer_name = name("p")
    made.metadata_props.add(key=name("key"), value=name("value"))
    return made


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    onnx.save(model(), tmp_path / "a.onnx")
    onnx.save(model(2.0), tmp_path / "b.onnx")
    rng = np.random.default_rng(1)
    np.save(tmp_path / "x.npy", rng.normal(size=(8, 16)).astype(np.float32))
    lines = [json.dumps({name("x"): rng.normal(size=(8, 16)).tolist()}) for _ in range(6)]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    return tmp_path


COMMANDS: dict[str, Callable[[Path], list[str]]] = {
    "inspect": lambda f: ["inspect", f"{f}/a.onnx", "--recipe", "int8-static"],
    "inspect --json": lambda f: ["inspect", f"{f}/a.onnx", "--json"],
    "diff": lambda f: ["diff", f"{f}/a.onnx", f"{f}/b.onnx"],
    "diff --json": lambda f: ["diff", f"{f}/a.onnx", f"{f}/b.onnx", "--json"],
    "compile": lambda f: [
        "compile", f"{f}/a.onnx", "-r", "int8-static", "--calibration", f"{f}/data.jsonl", "-o", f"{f}/o"
    ],
    "compile --json": lambda f: ["compile", f"{f}/a.onnx", "-r", "rtn-w4", "-o", f"{f}/o", "--json"],
    "compile, a wrong pattern": lambda f: ["compile", f"{f}/a.onnx", "-r", "rtn-w4", "-o", f"{f}/o", "--exclude", "z"],
    "placement": lambda f: ["placement", f"{f}/a.onnx", "--target", "ort-cpu"],
    "placement, CUDA": lambda f: ["placement", f"{f}/a.onnx", "--target", "ort-cuda"],
    "targets --best": lambda f: ["targets", "--best", f"{f}/a.onnx"],
    "eval": lambda f: ["eval", f"{f}/a.onnx", "--data", f"{f}/data.jsonl"],
    "debug": lambda f: ["debug", f"{f}/a.onnx", f"{f}/b.onnx", "--calibration", f"{f}/data.jsonl"],
    "generate": lambda f: ["generate", f"{f}/a.onnx", "--prompt", "x"],
}  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_prints_what_a_terminal_obeys(
    command: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["qcompiler", *COMMANDS[command](folder)])
    monkeypatch.setenv("NO_COLOR", "1")
    code: object = 0
    try:
        cli.main()
    except SystemExit as end:
        code = end.code
    assert code in (None, 0, 1, 2), code
    said = capsys.readouterr()
    text = said.out + said.err
    assert text
    assert {letter for letter in text if not letter.isprintable()} <= {"\n"}
    assert not re.search(r"^broken", text, re.MULTILINE)  # a newline of a name
    if "--json" in command and code == 0:
        assert "first" in json.dumps(json.loads(said.out))


def test_printable() -> None:
    assert printable("ü [x] ✓ 漢") == "ü [x] ✓ 漢"
    assert printable("a\n\x1b[2J\x9b\u202e") == "a\\n\\x1b[2J\\x9b\\u202e"
