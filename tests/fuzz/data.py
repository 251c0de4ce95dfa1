"""Calibration data, right and wrong, in every form that a SPEC may name."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from onnx import numpy_helper

Rng = np.random.Generator
Shape = tuple[int, ...]
KINDS: list[Callable[[Path, Shape, Rng], str]] = []
LINES = (
    '{"x": [1, 2]}', '{"x": null}', '{"x": "a"}', "{}", "[]", "3", "", "{", '{"text": "hello"}', '{"text": 3}',
    "[" * 100000,
    '{"x": ' + "[" * 3000 + "]" * 3000 + "}", '{"x": 1e999}', '{"x": NaN}', '{"x": [[1, 2], [3]]}',
    '{"x": ' + "9" * 5000 + "}",
    '{"x": {"a": 1}}', '{"text": "\\ud800"}', '{"x": [true]}', '{"": [1]}', '{"x": [1], "x": [2]}', "\x00",
    '{"input_ids": [1]}',
    '{"\\u001b[31m": [1]}', '{"x": [' + "1," * 1000 + "1]}", '{"x": [99999999999999999999]}', "null", '"text"',
    "\ufeff{}",
)  # fmt: skip
TOKENIZERS = (
    "", "{}", "[]", "null", '{"version": "1.0"}', "[" * 5000,
    json.dumps({"version": "1.0", "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "[UNK]"}}),
    json.dumps({"version": "1.0", "model": {"type": "WordLevel", "vocab": {"hello": 7, "[UNK]": 99999},
    "unk_token": "[UNK]"}}),
    json.dumps({"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []}}),
)  # fmt: skip


def _kind(function: Callable[[Path, Shape, Rng], str]) -> Callable[[Path, Shape, Rng], str]:
    KINDS.append(function)
    return function


def right(folder: Path, shape: Shape, rng: Rng, count: int = 6) -> str:
    np.savez(folder / "data.npz", x=rng.normal(size=(count, *shape)).astype(np.float32))
    return "data.npz"


@_kind
def odd_arrays(folder: Path, shape: Shape, rng: Rng) -> str:
    array = rng.normal(size=(4, *shape)).astype(np.float32)
    choices: tuple[dict[str, np.ndarray], ...] = (
        {"x": array[:, :0]}, {"x": array[:0]}, {"x": array[:1]}, {"y": array}, {"x": array, "y": array}, {},
        {"x": np.array(3.0)},
        {"x": array.astype("S4")}, {"x": array.astype("U4")}, {"x": array.astype(complex)},
        {"x": array.astype(np.float64)},
        {"x": array.astype(bool)}, {"x": np.full_like(array, np.nan)}, {"x": np.full_like(array, np.inf)},
        {"x": array * 0},
        {"x": array * np.float32(1e30)}, {"x": array[..., None]}, {"x": array[0]},
        {"x": array, "ids": np.array([5, -3, 10**6, 2])},
        {"x": array.astype(np.int64)}, {"x": array.astype("datetime64[s]")}, {"x\n": array},
        {"x": array, "ids": array[:, 0]},
        {"x": array.astype([("a", "f4")])}, {"../x": array}, {"x": array * np.float32(1e-42)}, {"x": array[:, :1]},
    )  # fmt: skip
    np.savez(folder / "odd.npz", **choices[int(rng.integers(len(choices)))])  # type: ignore[arg-type]
    return "odd.npz"


@_kind
def odd_zip(folder: Path, shape: Shape, rng: Rng) -> str:
    """Headers that lie, other members, a .npy of another name, pickles, a bomb, cut files."""
    stream = io.BytesIO()
    np.save(stream, rng.normal(size=(4, *shape)).astype(np.float32))
    good = stream.getvalue()
    header = b"\x93NUMPY\x01\x00v\x00" + b"{'descr': '<f4', 'fortran_order': False, 'shape': (%s), }"
    lies = [
        header % size
        for size in (b"9" * 18 + b",", b"-1,", b"2,", b"1000000000,", b"'a',", b"1.5,", b"2,)*99999999+(1,")
    ]
    pickled = io.BytesIO()
    np.save(pickled, np.array([{"a": 1}], dtype=object))
    members: list[dict[str, bytes]] = [{"x.npy": lie[:-1].ljust(127) + b"\n" + good[128:]} for lie in lies]
    members += [
        {"x.txt": b"hello"}, {"x.npy": pickled.getvalue()}, {"x.npy": good, "readme": b"hello"}, {"x.npy": good[:100]},
        {"x.npy": b""}, {"x/": b""}, {"x.npy": good, "x": good}, {"x.npy": good[:128] + bytes(4 * 10**7)},
        {"x.npy": header % b"10000000," + b"\n" + bytes(4 * 10**7)},
    ]  # fmt: skip
    with zipfile.ZipFile(folder / "zip.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
        for name, content in members[int(rng.integers(len(members)))].items():
            file.writestr(name, content)
    return "zip.npz"


@_kind
def broken_bytes(folder: Path, shape: Shape, rng: Rng) -> str:
    from tests.fuzz.damage import bytes_damaged

    place = folder / right(folder, shape, rng)
    data = place.read_bytes()
    place.write_bytes(good if (good := bytes_damaged(data, data, rng)) else b"x")
    return "data.npz"


@_kind
def renamed(folder: Path, shape: Shape, rng: Rng) -> str:
    np.save(folder / "x.npy", rng.normal(size=(4, *shape)))
    (folder / "x.npy").rename(folder / "x.npz")
    return "x.npz"


@_kind
def lines(folder: Path, shape: Shape, rng: Rng) -> str:
    drawn = [LINES[int(rng.integers(len(LINES)))] for _ in range(int(rng.integers(1, 4)))]
    if rng.random() < 0.5:
        drawn.insert(0, json.dumps({"x": rng.normal(size=(1, *shape)).tolist()}))
    (folder / "data.jsonl").write_bytes(
        "\n".join(drawn).encode("utf-8", "surrogatepass") + rng.bytes(int(rng.integers(0, 2)))
    )
    return "data.jsonl"


@_kind
def text(folder: Path, shape: Shape, rng: Rng) -> str:
    contents = (
        b"",
        b"hello world " * 50,
        b"\xff\xfe",
        b"\0" * 10,
        b"\n\n\n",
        "\ud800".encode("utf-8", "surrogatepass"),
    )
    (folder / "text.txt").write_bytes(contents[int(rng.integers(len(contents)))])
    return "text.txt"


@_kind
def tensors(folder: Path, shape: Shape, rng: Rng) -> str:
    place = folder / "test_data_set_0"
    place.mkdir()
    names = ("x", "", "y", "x")
    data = numpy_helper.from_array(
        rng.normal(size=(1, *shape)).astype(np.float32), str(rng.choice(names))
    ).SerializeToString()
    if rng.random() < 0.6:
        changed = bytearray(data)
        for _ in range(int(rng.integers(1, 4))):
            changed[int(rng.integers(min(len(changed), 30)))] = int(rng.integers(256))
        data = bytes(changed[: int(rng.integers(len(changed)))]) if rng.random() < 0.2 else bytes(changed)
    (place / str(rng.choice(["input_0.pb", "input_0.pb", "input_9.pb", "input_x.pb"]))).write_bytes(data)
    return str(rng.choice(["pb:.", "pb:test_data_set_0", "pb:", "pb:nothing", "pb:model.onnx"]))


@_kind
def python(folder: Path, shape: Shape, rng: Rng) -> str:
    bodies = (
        "raise SystemExit(3)", "yield 3", "yield {}", "yield {'x': None}", "return None", "return 3", "1 / 0",
        "yield {1: 2}",
        "yield {'x': [[1], [2, 3]]}", "raise KeyboardInterrupt", "import sys; sys.exit()", "yield {'x': object()}",
        "raise BaseException('no')", "yield from ()", "return iter([])", "yield {'x': 'a' * 10}",

    )  # fmt: skip
    (folder / "mine.py").write_text(f"def f():\n    {bodies[int(rng.integers(len(bodies)))]}\n")
    return str(
        rng.choice(
            ["py:mine:f", "py:mine:f", "py:mine:f", "py:mine:g", "py:none:f", "py:", "py:mine", "py:os.path:sep"]
        )
    )


@_kind
def odd_names(folder: Path, shape: Shape, rng: Rng) -> str:
    names = ("nothing.npz", "", ".", "..", "/dev/null", "a" * 300, "a" * 300 + ".npz", "x.csv", "empty", "link.npz",
    " ", "~", "random ",
             "model.onnx", "/proc/self/mem", "\x1b[31m.npz", "random", "pipe.npz")  # fmt: skip
    (folder / "empty").mkdir()
    (folder / "link.npz").symlink_to("link.npz")
    return names[int(rng.integers(len(names)))]


def hostile(folder: Path, shape: Shape, rng: Rng) -> list[str]:
    """Write data into the folder; returns what the command line names it by."""
    spec = KINDS[int(rng.integers(len(KINDS)))](folder, shape, rng)
    extra: list[str] = []
    if spec.endswith((".jsonl", ".txt")) or rng.random() < 0.05:
        if rng.random() < 0.8:
            (folder / "tok.json").write_text(TOKENIZERS[int(rng.integers(len(TOKENIZERS)))])
            extra = ["--tokenizer", "tok.json"]
        if rng.random() < 0.3:
            extra += ["--seq-len", str(rng.choice([1, 4, 100000]))]
    return [spec, *extra]
