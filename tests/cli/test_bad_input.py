"""Every bad input is one sentence on stderr and exit code 2: no traceback, no line of a library's, nothing written."""

from __future__ import annotations

import json
import os
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import load_file, save_file

from qcompiler.cli import app as cli
from qcompiler.compiler import calibrate

X = np.random.default_rng(1).normal(size=(12, 4, 16)).astype(np.float32)
LONG = "n" * 300
FARTHER = "/".join(["p" * 200] * 30)
DEEP = 100_000
VOCABULARY = {"[UNK]": 0, **{chr(97 + index): index + 1 for index in range(12)}}


def save(folder: Path, nodes: list[onnx.NodeProto], inputs: dict[str, tuple[int, list[object]]]) -> None:
    """A model that reads these and has the weight w [16, 16]; it gives what its last node does."""
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in inputs.items()],
        [helper.make_tensor_value_info(nodes[-1].output[0], TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.random.default_rng(0).normal(size=(16, 16)).astype(np.float32), "w"),
         numpy_helper.from_array(np.array([4, 4, 4]), "shape")],
    )  # fmt: skip
    folder.mkdir(exist_ok=True)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    (folder / "model.onnx").write_bytes(made.SerializeToString())


@pytest.fixture
def f(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model of floats, a language model, a tokenizer and data; the current folder is an empty one."""
    product = helper.make_node("MatMul", ["x", "w"], ["y"], name="up")
    save(tmp_path / "m", [product], {"x": (TensorProto.FLOAT, ["n", 16])})
    reads = [helper.make_node("Gather", ["w", "input_ids"], ["e"]), helper.make_node("MatMul", ["e", "w"], ["logits"])]
    save(tmp_path / "lm", reads, {"input_ids": (TensorProto.INT64, ["b", "s"])})
    save(tmp_path / "fixed", reads, {"input_ids": (TensorProto.INT64, ["b", 512])})
    two = [helper.make_node("Add", ["x", "z"], ["s"], name="sum"), helper.make_node("MatMul", ["s", "w"], ["y"])]
    save(tmp_path / "two", two, {name: (TensorProto.FLOAT, ["n", 16]) for name in "xz"})
    shaped = [helper.make_node("MatMul", ["x", "w"], ["p"]), helper.make_node("Reshape", ["p", "shape"], ["y"])]
    save(tmp_path / "shaped", shaped, {"x": (TensorProto.FLOAT, ["n", 16])})
    tokenizer(tmp_path, {"type": "WordLevel", "vocab": VOCABULARY, "unk_token": "[UNK]"})
    np.savez(tmp_path / "x.npz", x=X)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path


def tokenizer(folder: Path, model: dict[str, object], **parts: object) -> Path:
    file = folder / "tokenizer.json"
    whole: dict[str, object] = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"}, "post_processor": None, "decoder": None, "model": model,
    }  # fmt: skip
    file.write_text(json.dumps(whole | parts))
    return file


def put(file: Path, content: str | bytes) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return file


Words = list[str | Path]


def compile_(f: Path, *more: str | Path, model: str = "m", recipe: str | Path = "int8-static") -> Words:
    return ["compile", f / model, "-r", recipe, "-o", f / "out", *more]


def data(f: Path, spec: str | Path, *more: str | Path, model: str = "m") -> Words:
    return compile_(f, "--calibration", spec, *more, model=model)


def recipe(content: str | bytes) -> Callable[[Path], Words]:
    return lambda f: compile_(f, "--calibration", f / "x.npz", recipe=put(f / "r.yaml", content))


def setting(value: str, option: str = "quantize-weights.group_size") -> Callable[[Path], Words]:
    return lambda f: data(f, f / "x.npz", "--set", f"{option}={value}")


def zipped(**members: bytes) -> Callable[[Path], Words]:
    def make(f: Path) -> Words:
        with zipfile.ZipFile(f / "d.npz", "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in members.items():
                archive.writestr(name.replace("_npy", ".npy"), content)
        return data(f, f / "d.npz")

    return make


def header(shape: str, behind: bytes = b"0" * 100, dtype: str = "<f4") -> bytes:
    text = f"{{'descr': {dtype!r}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    text += b" " * (63 - (len(text) + 10) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + behind


def array(values: np.ndarray, model: str = "m", **others: Any) -> Callable[[Path], Words]:
    def make(f: Path) -> Words:
        np.savez(f / "d.npz", x=values, **others)
        return data(f, f / "d.npz", model=model)

    return make


def renamed(f: Path) -> Words:
    np.save(f / "d.npy", X)
    return data(f, (f / "d.npy").rename(f / "d.npz"))


def line(text: str) -> Callable[[Path], Words]:
    return lambda f: data(f, put(f / "d.jsonl", text), "--tokenizer", f, model="lm")


def words(model: dict[str, object], **parts: object) -> Callable[[Path], Words]:
    def make(f: Path) -> Words:
        tokenizer(f, model, **parts)
        return data(f, put(f / "t.txt", "a b zzz " * 100), "--tokenizer", f, model="lm")

    return make


def python(code: str) -> Callable[[Path], Words]:
    """A module of a name of its own, as Python keeps what it has imported."""

    def make(f: Path) -> Words:
        name = f"own_{abs(hash((code, str(f))))}"
        put(f / "here" / f"{name}.py", code)
        return data(f, f"py:{name}:f")

    return make


def statistics(spoil: Callable[[Path], object]) -> Callable[[Path], Words]:
    def make(f: Path) -> Words:
        file = f / "s.safetensors"
        calibrate(f / "m", "int8-static", calibration=str(f / "x.npz"), output=file)
        spoil(file)
        return compile_(f, "--statistics", file)

    return make


def other_numbers(file: Path) -> None:
    """What was measured, damaged so that the file is still one of tensors."""
    head = json.loads(file.read_bytes()[8 : 8 + struct.unpack("<Q", file.read_bytes()[:8])[0]])
    save_file({key: value * 0 for key, value in load_file(file).items()}, file, metadata=head["__metadata__"])


def fifo(file: Path) -> Path:
    os.mkfifo(file)
    return file


CASES: dict[str, tuple[Callable[[Path], Words], str]] = {
    # what lies beside the model
    "only a folder called x.onnx": (lambda f: compile_(f, model=put(f / "n/x.onnx/a", "").parts[-3]), "no .onnx file"),
    "a pipe as model": (lambda f: compile_(f, model=fifo(f / "p.onnx").name), "neither a file nor a folder"),
    "a configuration of brackets": (
        lambda f: ["generate", put(f / "lm/config.json", "[" * DEEP).parent, "-p", "a", "--tokenizer", f],
        "config.json cannot be read",
    ),
    # names
    "a long model": (lambda f: compile_(f, model=LONG), "does not exist"),
    "a far model": (lambda f: compile_(f, model=FARTHER), "does not exist"),
    "a long recipe": (lambda f: compile_(f, recipe=LONG), "no recipe"),
    "a long recipe file": (lambda f: compile_(f, recipe=LONG + ".yaml"), "no recipe file"),
    "long data": (lambda f: data(f, LONG + ".npz"), "does not exist"),
    "long test data": (lambda f: data(f, "pb:" + LONG), "does not exist"),
    "a long tokenizer": (
        lambda f: data(f, put(f / "t.txt", "a"), "--tokenizer", f / LONG, model="lm"), "does not exist"
    ),
    "a long output": (lambda f: ["compile", f / "m", "-r", "rtn-w4", "-o", f / LONG], "has 300 bytes"),
    "an output of 250 letters": (lambda f: ["compile", f / "m", "-r", "rtn-w4", "-o", f / LONG[:250]], "has 250 bytes"),
    "a far output": (lambda f: ["compile", f / "m", "-r", "rtn-w4", "-o", f / FARTHER], "too long"),
    "long statistics": (lambda f: compile_(f, "--statistics", f / LONG), "no statistics file"),
    "a long page": (lambda f: ["diff", f / "m", f / "m", "--html", f / LONG], "has 300 bytes"),
    "statistics into a long file": (
        lambda f: ["calibrate", f / "m", "-r", "int8-static", "--calibration", f / "x.npz", "-o", f / LONG],
        "has 300 bytes",
    ),
    "the current folder": (lambda f: ["compile", f / "m", "-r", "rtn-w4", "-o", "."], "is the current folder"),
    "a page in no folder": (lambda f: ["diff", f / "m", f / "m", "--html", f / "no/x.html"], "there is no folder"),
    "a recipe in no folder": (
        lambda f: ["debug", f / "m", f / "m", "--calibration", f / "x.npz", "--apply", f / "no/x"], "there is no folder"
    ),
    "an output in a file": (lambda f: ["compile", f / "m", "-r", "rtn-w4", "-o", f / "x.npz/out"], "is no folder"),
    "a model that is not UTF-8": (lambda f: compile_(f, model=os.fsdecode(b"caf\xe9")), "is not UTF-8"),
    "an output that is not UTF-8": (
        lambda f: ["compile", f / "m", "-r", "rtn-w4", "-o", f / os.fsdecode(b"caf\xe9")], "is not UTF-8"
    ),
    # YAML
    "a list as key": (recipe("? [a, b]\n: 1\n"), "a key is a word"),
    "a list as key of options": (recipe("passes: [{quantize-weights: {[a]: 1}}]"), "a key is a word"),
    "a date that is none": (recipe("description: 2020-99-99\npasses: [quantize-weights]"), "'2020-99-99' is no timest"),
    "5,000 digits": (recipe(f"passes: [quantize-weights]\ncalibration: {{samples: {'9' * 5000}}}"), "is no int that"),
    "2,000 brackets": (recipe("[" * 2000), "nested too deeply"),
    "a count beyond 2 to the 63": (
        recipe("passes: [quantize-weights]\ncalibration: {samples: 9223372036854775808}"), "larger than any number"
    ),
    "a count beyond 2 to the 31": (
        recipe("passes: [quantize-weights]\ncalibration: {samples: 2147483648}"), "calibration"
    ),
    "a tag that does not fit": (recipe("passes: !!timestamp x"), "'x' is no timestamp"),
    "a lone surrogate": (recipe('name: "\\ud800"\npasses: [quantize-weights]'), "half a character"),
    "a gate that is no number": (recipe("passes: [quantize-weights]\ngates: {output_sqnr_db: .nan}"), "output_sqnr_db"),
    "too many passes": (recipe("passes: [" + "quantize-weights," * 101 + "]"), "101 entries"),
    "a setting of 5,000 digits": (setting("9" * 5000), "is no int that"),
    "a setting that is no date": (setting("2020-99-99"), "is no timestamp"),
    "a setting of 2,000 brackets": (setting("[" * 2000), "nested too deeply"),
    "a setting with a list as key": (setting("{[a]: 1}"), "a key is a word"),
    "a setting in hexadecimal": (setting("0x" + "f" * 5000, "quantize-weights.format"), "larger than any number"),
    "a setting longer than a screen": (setting("x" * 9000, "nothing.at_all"), "the recipe has no pass 'nothing'"),
    # arrays
    "a renamed .npy": (renamed, "one nameless array"),
    "another member": (zipped(**{"readme.txt": b"x"}), "'readme.txt', which is no array"),
    "no array": (zipped(x_npy=b"no"), "no usable .npz file"),
    "a header of more": (zipped(x_npy=header("(4000000000, 4, 16)")), "100 bytes are there"),
    "a header of less than nothing": (zipped(x_npy=header("(-1, 4, 16)")), "100 bytes are there"),
    "a header of 5,000 digits": (zipped(x_npy=header(f"({'9' * 5000},)")), "no usable .npz file"),
    "a header of brackets": (zipped(x_npy=header("(" * 3000 + ")" * 3000)), "no usable .npz file"),
    "a header without an end": (zipped(x_npy=header("((4, 4, 16)")), "(its header is damaged: "),
    "a header of words": (zipped(x_npy=header("('a', 4)")), "no usable .npz file"),
    "a header of objects": (zipped(x_npy=header("(4, 4, 16)", dtype="|O")), "pickled Python objects"),
    "an empty file": (lambda f: data(f, put(f / "d.npz", b"")), "no usable .npz file"),
    "a pipe as data": (lambda f: data(f, fifo(f / "d.npz")), "is no file"),
    # shapes
    "flat data": (array(np.ones(64, np.float32)), "'x' has the shape [64], the model reads [n, 16]"),
    "too many axes": (array(np.ones((2, 3, 4, 16), np.float32)), "'x' has the shape [2, 3, 4, 16]"),
    "another width": (array(np.ones((8, 4, 15), np.float32)), "'x' has the shape [8, 4, 15]"),
    "inputs that disagree": (
        array(np.ones((8, 4, 16), np.float32), "two", z=np.ones((8, 5, 16), np.float32)), "'x' has n = 4 and 'z' has n"
    ),
    "a Reshape inside": (array(np.ones((8, 5, 16), np.float32), "shaped"), "sample 0 does not go through the model"),
    "a model of 512 tokens": (
        lambda f: data(f, put(f / "t.txt", "a b " * 999), "--tokenizer", f, model="fixed"), "give --seq-len 512"
    ),
    "a line of 512 tokens": (
        lambda f: data(f, put(f / "d.jsonl", json.dumps({"input_ids": [1] * 512})), model="fixed"), "--seq-len 512"
    ),
    # lines
    "100,000 brackets": (line("[" * DEEP), "nested too deeply"),
    "100,000 brackets in an entry": (line('{"input_ids": ' + "[" * DEEP + "]" * DEEP + "}"), "nested too deeply"),
    "digits in a line": (line('{"input_ids": [' + "9" * 5000 + "]}"), "line 1 is not JSON that can be read"),
    "half a character": (line('{"text": "\\ud800 a"}'), "half a character"),
    # tokenizers
    "no unknown token": (words({"type": "WordLevel", "vocab": {"a": 1, "b": 2}, "unk_token": "[UNK]"}), "turned into"),
    "no unknown token in BPE": (
        words({"type": "BPE", "vocab": {"a": 1, "b": 2}, "merges": [], "unk_token": "[UNK]"}), "turned into tokens"
    ),
    "a tokenizer that panics": (
        words({"type": "WordLevel", "vocab": VOCABULARY, "unk_token": "[UNK]"}, post_processor={
            "type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "[CLS]", "type_id": 0}}], "pair": [],
            "special_tokens": {}}),
        "belongs to the model",
    ),
    "a prompt of half a character": (
        lambda f: ["generate", f / "lm", "-p", os.fsdecode(b"\xff a"), "--tokenizer", f], "half a character"
    ),
    # Python
    "a module that exits": (python("raise SystemExit(0)"), "failed with SystemExit"),
    "a function that exits": (python("def f():\n raise SystemExit('bye')"), "failed with SystemExit: bye"),
    "a generator that exits": (
        python("import numpy as np\ndef f():\n yield {'x': np.ones((4, 16), 'f4')}\n raise SystemExit"), "SystemExit"
    ),
    "an array that exits": (
        python("class A:\n def __array__(self, *a, **k): raise SystemExit\ndef f():\n while True: yield {'x': A()}"),
        "SystemExit",
    ),
    "an error of one's own kind": (python("class E(BaseException): pass\ndef f():\n raise E('x')"), "failed with E: x"),
    "an error of two lines": (python("def f():\n raise ValueError('a\\nb')"), "ValueError: a b"),
    # statistics
    "statistics cut short": (
        statistics(lambda s: s.write_bytes(s.read_bytes()[:-20])), "not a statistics file, or a damaged one"
    ),
    "statistics with a bit turned": (
        statistics(lambda s: s.write_bytes(s.read_bytes()[:-1] + bytes([s.read_bytes()[-1] ^ 1]))), "its checksum"
    ),
    "statistics with other numbers": (statistics(other_numbers), "its checksum"),
    "statistics that are text": (lambda f: compile_(f, "--statistics", put(f / "s", "hello")), "not a statistics file"),
    "a pipe as statistics": (lambda f: compile_(f, "--statistics", fifo(f / "s")), "is no file"),
    # test data
    "a short tensor": (
        lambda f: data(f, f"pb:{put(f / 'd/input_0.pb', short()).parent}"), "there are 255 bytes"
    ),
    "a tensor elsewhere": (
        lambda f: data(f, f"pb:{put(f / 'd/input_0.pb', elsewhere()).parent}"), "lies in another file"
    ),
}  # fmt: skip


def short() -> bytes:
    tensor = numpy_helper.from_array(np.ones((4, 16), np.float32), "x")
    tensor.raw_data = tensor.raw_data[:-1]
    return bytes(tensor.SerializeToString())


def elsewhere() -> bytes:
    tensor = TensorProto(name="x", data_type=1, dims=[4, 16], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="/etc/passwd")
    return bytes(tensor.SerializeToString())


def run(monkeypatch: pytest.MonkeyPatch, arguments: Words) -> object:
    monkeypatch.setattr(sys, "argv", ["qcompiler", *map(str, arguments)])
    monkeypatch.setenv("NO_COLOR", "1")
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return caught.value.code


@pytest.mark.parametrize("case", CASES)
def test_one_sentence(case: str, f: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    make, message = CASES[case]
    arguments = make(f)
    before = sorted(f.rglob("*"))
    capfd.readouterr()
    code = run(monkeypatch, arguments)
    said = capfd.readouterr()
    assert code == 2, said.err
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert len(said.err.splitlines()) == 1
    assert len(said.err) < 1100
    assert message in said.err
    assert [path for path in sorted(f.rglob("*")) if "__pycache__" not in path.parts] == before


LIMIT, HUGE = "--memory-limit", "9223372036854775808"


@pytest.mark.parametrize(
    ("option", "value"),
    [(LIMIT, "9" * 30 + "G"), (LIMIT, "9" * 5000), (LIMIT, "0"), ("--samples", HUGE), ("--seq-len", HUGE)],
)
def test_counts_that_no_machine_has(option: str, value: str, f: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(monkeypatch, data(f, f / "x.npz", option, value)) == 2


@pytest.mark.parametrize("beside", ["broken.onnx", "folder.onnx/file"])
def test_another_onnx_beside_the_model_harms_nobody(beside: str, f: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(f / "m" / beside, b"\xff" * 50)
    assert run(monkeypatch, compile_(f, recipe="rtn-w4")) == 0


def test_a_bomb_is_unpacked_no_further_than_it_is_read(f: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred thousand times the samples that are asked for: 2.5 GB of zeros, of which 36 samples are unpacked."""
    with zipfile.ZipFile(f / "d.npz", "w", zipfile.ZIP_DEFLATED) as archive, archive.open("x.npy", "w") as member:
        member.write(header("(1000000, 4, 16)", b""))
        for _ in range(250):
            member.write(bytes(1024000))
    unpacked = 0
    read = zipfile.ZipExtFile.read

    def counted(stream: zipfile.ZipExtFile, count: int = -1) -> bytes:
        nonlocal unpacked
        found = read(stream, count)
        unpacked += len(found)
        return found

    monkeypatch.setattr(zipfile.ZipExtFile, "read", counted)
    run(monkeypatch, data(f, f / "d.npz"))
    assert 0 < unpacked < 1 << 20
