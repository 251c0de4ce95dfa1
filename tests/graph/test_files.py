"""Loading says what is wrong in one sentence; saving is whole or not at all; sessions need no copy of the weights."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from qcompiler.errors import ModelError, OutputError, QCompilerError
from qcompiler.graph import files as model_io
from qcompiler.graph.files import DATA_FILE, MODEL_FILE, check_free, find_model, load, save
from qcompiler.graph.model_folder import companions_in
from qcompiler.graph.session import session
from tests import tiny

K, N = 300, 1000  # 1.2 MB: beyond what stays in one file
WEIGHT = np.random.default_rng(0).standard_normal((K, N)).astype(np.float32)
TEXT = (
    '<ir_version: 10, opset_import: ["" : {opset}, "com.microsoft" : 1]> g ({inputs}) => (float[B,{n}] y) {{ {body} }}'
)


def build(weight: np.ndarray = WEIGHT, body: str = "p = MatMul(x, w) y = Add(p, b)", opset: int = 21) -> ir.Model:
    k, n = weight.shape
    model = ir.from_onnx_text(
        TEXT.format(opset=opset, inputs=f"float[B,{k}] x, float[{k},{n}] w, float[{n}] b", n=n, body=body)
    )
    for value, array in zip(model.graph.inputs[1:], (weight, np.ones(n, np.float32)), strict=True):
        value.const_value = ir.tensor(array, name=value.name)
        model.graph.register_initializer(value)
    del model.graph.inputs[1:]
    return model


def small() -> ir.Model:
    return build(np.eye(4, dtype=np.float32))


def result(model: ir.Model) -> np.ndarray:
    k = tiny.sizes(model.graph.inputs[0])[1]
    (y,) = session(model).run(None, {"x": np.linspace(-1, 1, 2 * k, dtype=np.float32).reshape(2, k)})
    return np.asarray(y)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A folder as an exporter writes it: a model with external weights, and other files."""
    folder = tmp_path / "source"
    folder.mkdir()
    ir.save(build(), folder / "model.onnx", external_data="weights.xyz", size_threshold_bytes=100)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "genai_config.json").write_text('{"model": 1}')
    (folder / "model.safetensors").write_bytes(b"large")
    (folder / ".cache").write_text("hidden")
    (folder / "sub").mkdir()
    return folder


# ---------------------------------------------------------------------------------------------------- load


def sentence(excinfo: pytest.ExceptionInfo[QCompilerError]) -> str:
    text = str(excinfo.value)
    assert "\n" not in text
    return text


def test_load_a_folder_or_a_file(source: Path) -> None:
    for path in (source, source / "model.onnx", str(source)):
        model = load(path)
        assert isinstance(model.graph.initializers["w"].const_value, ir.ExternalTensor)
    (source / "model.onnx").rename(source / "decoder.onnx")
    assert find_model(source) == source / "decoder.onnx"


def test_which_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not exist") as excinfo:
        load(tmp_path / "nothing.onnx")
    sentence(excinfo)
    with pytest.raises(ModelError, match=r"holds no \.onnx"):
        load(tmp_path)
    for name in ("a.onnx", "b.onnx"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(ModelError, match=r"holds 2 models \(a\.onnx, b\.onnx\)"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"", "empty graph"), (b"this is no protobuf" * 9, "no ONNX model"), (None, "no ONNX model")],
)
def test_files_that_are_no_models(tmp_path: Path, content: bytes | None, words: str) -> None:
    whole = ir.to_proto(small()).SerializeToString()
    (tmp_path / "m.onnx").write_bytes(whole[: len(whole) // 2] if content is None else content)
    with pytest.raises(ModelError, match=words) as excinfo:
        load(tmp_path / "m.onnx")
    sentence(excinfo)


def test_missing_data(source: Path) -> None:
    (source / "weights.xyz").unlink()
    with pytest.raises(ModelError, match=r"weights\.xyz, which does not exist"):
        load(source)


def test_short_data_is_found_without_reading(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(ir.ExternalTensor, "_load")
    load(source)
    size = (source / "weights.xyz").stat().st_size
    os.truncate(source / "weights.xyz", size - 1)
    with pytest.raises(ModelError, match=f"the file ends at {size - 1}") as excinfo:
        load(source)
    sentence(excinfo)


def test_linked_data(source: Path, tmp_path: Path) -> None:
    blob = tmp_path / "blob"
    (source / "weights.xyz").rename(blob)
    (source / "weights.xyz").symlink_to(blob)
    with pytest.raises(ModelError, match="cp -rL") as excinfo:
        load(source)
    sentence(excinfo)
    (source / "weights.xyz").unlink()
    (source / "weights.xyz").hardlink_to(blob)
    with pytest.raises(ModelError, match="hard links"):
        load(source)
    blob.unlink()
    load(source)


def test_a_link_inside_of_the_folder_is_fine(source: Path) -> None:
    (source / "weights.xyz").rename(source / "real")
    (source / "weights.xyz").symlink_to(source / "real")
    load(source)


def test_data_elsewhere(source: Path) -> None:
    proto = onnx.load(source / "model.onnx", load_external_data=False)
    for location in ("../weights.xyz", "/etc/passwd"):
        for tensor in proto.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = location
        (source / "model.onnx").write_bytes(proto.SerializeToString())
        with pytest.raises(ModelError, match="outside of the model's folder"):
            load(source)


def test_data_of_another_size(source: Path) -> None:
    proto = onnx.load(source / "model.onnx", load_external_data=False)
    proto.graph.initializer[0].dims[0] = K + 1
    (source / "model.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(ModelError, match="their shape needs"):
        load(source)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (lambda: build(opset=12), "opset 12"),
        (lambda: build(opset=26), "opset 26"),
        (lambda: build(body="y = mine.Special(x)"), "domain 'mine'"),
        (lambda: build(body="y = MatMul(x)"), "has 1 inputs but needs 2"),
        (lambda: build(body="y = MatMul(x, gone)"), "'gone', which nothing writes"),
    ],
)
def test_models_that_cannot_run(tmp_path: Path, model: Callable[[], ir.Model], words: str) -> None:
    ir.save(model(), tmp_path / "m.onnx")
    with pytest.raises(ModelError, match=words) as excinfo:
        load(tmp_path / "m.onnx")
    sentence(excinfo)


def test_newer_formats_are_refused(tmp_path: Path) -> None:
    model = build()
    model.ir_version = 99
    ir.save(model, tmp_path / "m.onnx")
    with pytest.raises(ModelError, match="IR version 99"):
        load(tmp_path / "m.onnx")


def test_functions_may_bring_their_own_domain(tmp_path: Path) -> None:
    text = """<ir_version: 10, opset_import: ["" : 21, "qcompiler" : 1]>
        g (float[2] x) => (float[2] y) { y = qcompiler.Half(x) }
        <domain: "qcompiler", opset_import: ["" : 21]> Half (a) => (b) { b = Abs(a) }"""
    ir.save(ir.from_onnx_text(text), tmp_path / "m.onnx")
    load(tmp_path / "m.onnx")


# ---------------------------------------------------------------------------------------------------- save


def test_small_models_are_one_file(tmp_path: Path) -> None:
    save(small(), tmp_path / "out")
    assert [file.name for file in (tmp_path / "out").iterdir()] == [MODEL_FILE]
    np.testing.assert_array_equal(result(load(tmp_path / "out")), result(small()))


def test_a_large_model_keeps_its_weights_beside_it(tmp_path: Path, source: Path) -> None:
    model = load(source)
    before = result(model)
    save(model, tmp_path / "out", source_folder=source, extra_files={"recipe.yaml": "a: 1\n", "b.bin": b"\0\1"})
    out = tmp_path / "out"
    names = {MODEL_FILE, DATA_FILE, "tokenizer.json", "genai_config.json", "recipe.yaml", "b.bin"}
    assert {file.name for file in out.iterdir()} == names
    assert (out / MODEL_FILE).stat().st_size < 10_000
    assert (out / "b.bin").read_bytes() == b"\0\1"
    np.testing.assert_array_equal(result(load(out)), before)
    np.testing.assert_array_equal(result(model), before)  # the one in memory still works
    assert isinstance(model.graph.initializers["w"].const_value, ir.ExternalTensor)
    assert out.stat().st_mode & 0o777 == 0o755


def test_a_model_that_became_small_takes_its_weights_in(tmp_path: Path, source: Path) -> None:
    model = load(source)
    model.graph.initializers["w"].const_value = ir.tensor(np.zeros((K, N), np.int8))
    model.graph.initializers["w"].dtype = ir.DataType.INT8
    save(model, tmp_path / "out")
    assert [file.name for file in (tmp_path / "out").iterdir()] == [MODEL_FILE]
    loaded = load(tmp_path / "out")
    assert not any(isinstance(v.const_value, ir.ExternalTensor) for v in loaded.graph.initializers.values())


def test_lazy_constants_are_written(tmp_path: Path) -> None:
    model = build()
    calls = []

    def compute() -> ir.TensorProtocol:
        calls.append(1)
        return ir.tensor(WEIGHT * 2)

    lazy = ir.LazyTensor(compute, dtype=ir.DataType.FLOAT, shape=ir.Shape((K, N)), cache=False, name="w")
    model.graph.initializers["w"].const_value = lazy
    save(model, tmp_path / "out")
    assert calls
    loaded = load(tmp_path / "out").graph.initializers["w"].const_value
    assert loaded is not None
    np.testing.assert_array_equal(loaded.numpy(), WEIGHT * 2)


def test_the_place_is_taken(tmp_path: Path) -> None:
    out = tmp_path / "out"
    save(small(), out)
    with pytest.raises(OutputError, match="--overwrite"):
        save(small(), out)
    with pytest.raises(OutputError, match="--overwrite"):
        check_free(out, overwrite=False)
    check_free(out, overwrite=True)
    check_free(tmp_path / "new", overwrite=False)
    (out / "recipe.yaml").write_text("old")
    (out / "chat_template.jinja").write_text("old")
    save(small(), out, overwrite=True, extra_files={"recipe.yaml": "new"})
    assert {file.name for file in out.iterdir()} == {MODEL_FILE, "recipe.yaml"}
    assert [file.name for file in tmp_path.iterdir()] == ["out"]  # nothing is left over


def test_an_empty_folder_is_used(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    save(small(), tmp_path / "out")
    assert (tmp_path / "out" / MODEL_FILE).exists()


@pytest.mark.parametrize("files", [["notes.txt"], [MODEL_FILE, "tokenizer.json"]])
def test_foreign_folders_are_never_overwritten(tmp_path: Path, files: list[str]) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name in files:
        (out / name).write_text("mine")
    with pytest.raises(OutputError, match="no earlier output"):
        save(small(), out, overwrite=True)
    assert {file.name for file in out.iterdir()} == set(files)


def test_the_source_is_never_overwritten(source: Path, tmp_path: Path) -> None:
    (source / "recipe.yaml").write_text("")  # the source may itself be an earlier output
    model = load(source)
    (tmp_path / "link").symlink_to(source)
    for folder in (source, tmp_path / "source" / ".." / "source", tmp_path / "link", tmp_path):
        with pytest.raises(OutputError, match="being compiled"):
            save(model, folder, overwrite=True)
    with pytest.raises(OutputError, match="being compiled"):
        save(small(), source, source_folder=source, overwrite=True)
    assert result(load(source)).shape == (2, N)


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(OutputError, match="is no folder"):
        save(small(), tmp_path / "out", overwrite=True)
    with pytest.raises(OutputError, match="cannot be written"):
        save(small(), tmp_path / "out" / "below")


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("step", ["write_model", "copy_companions", "_move"])
def test_a_full_disk_leaves_what_was_there(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, step: str, existing: bool
) -> None:
    out = tmp_path / "out"
    if existing:
        save(small(), out, extra_files={"recipe.yaml": "old"})
    before = sorted(tmp_path.rglob("*"))

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(model_io, step, full)
    with pytest.raises(OutputError, match="disk is full") as excinfo:
        save(build(), out, source_folder=source, overwrite=True)
    sentence(excinfo)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_failing_rename_brings_the_old_output_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    save(small(), out, extra_files={"recipe.yaml": "old"})
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if ".partial-" in self.name:
            raise OSError(errno.EACCES, "Permission denied")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    monkeypatch.setattr(model_io, "_exchanged", lambda a, b: False)
    with pytest.raises(OutputError, match="Permission denied"):
        save(small(), out, overwrite=True)
    assert (out / "recipe.yaml").read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_a_failing_computation_leaves_nothing(tmp_path: Path) -> None:
    model = build()

    def compute() -> ir.TensorProtocol:
        raise ModelError("the weights are damaged")

    lazy = ir.LazyTensor(compute, dtype=ir.DataType.FLOAT, shape=ir.Shape((K, N)), cache=False, name="w")
    model.graph.initializers["w"].const_value = lazy
    with pytest.raises(ModelError, match="damaged"):
        save(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------------- sessions


def test_a_session_reads_external_weights_itself(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(source)
    monkeypatch.delattr(ir.ExternalTensor, "_load")  # reading them in Python would fail
    probe = model.clone()
    (hidden,) = (node.outputs[0] for node in probe.graph if node.op_type == "MatMul")
    probe.graph.outputs.append(hidden)
    model.graph.initializers["b"].const_value = ir.tensor(np.zeros(N, np.float32), name="b")
    x = np.linspace(-1, 1, 2 * K, dtype=np.float32).reshape(2, K)
    y, product = session(probe).run(None, {"x": x})
    np.testing.assert_allclose(product, x @ WEIGHT, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(y, product + 1)
    (y,) = session(model).run(None, {"x": x})  # a constant changed in memory counts
    np.testing.assert_allclose(y, product, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("limit", "through"), [(1000, "file"), (1 << 24, "memory")])
def test_large_new_constants_go_through_a_file(
    source: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, limit: int, through: str
) -> None:
    import onnxruntime

    opened = []

    class Noting(onnxruntime.InferenceSession):  # type: ignore[misc]
        def __init__(self, model: Path | bytes, *arguments: Any, **options: Any) -> None:
            opened.append("memory" if isinstance(model, bytes) else "file")
            super().__init__(model, *arguments, **options)

    monkeypatch.setattr("onnxruntime.InferenceSession", Noting)
    monkeypatch.setattr("qcompiler.graph.session.INLINE_SESSION", limit)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    model = load(source)
    model.graph.initializers["w"].const_value = ir.tensor(WEIGHT * 2, name="w")
    expected = result(build(WEIGHT * 2))
    opened.clear()
    np.testing.assert_array_equal(result(model), expected)
    assert opened == [through]
    assert [file.name for file in tmp_path.iterdir()] == ["source"]


def test_weights_from_two_folders(source: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    ir.save(build(WEIGHT * 3), other / "model.onnx", external_data="w", size_threshold_bytes=2000)
    model = load(source)
    model.graph.initializers["w"].const_value = load(other).graph.initializers["w"].const_value
    np.testing.assert_array_equal(result(model), result(build(WEIGHT * 3)))


def test_what_onnx_runtime_refuses(tmp_path: Path) -> None:
    model = build(body="y = Nonsense(x)")
    with pytest.raises(ModelError, match="ONNX Runtime refuses") as excinfo:
        session(model)
    sentence(excinfo)


PLACES = {
    "dotdot": ("../secret.bin", "outside of the model's folder"),
    "absolute": ("{outside}/secret.bin", "outside of the model's folder"),
    "device": ("/dev/zero", "outside of the model's folder"),
    "missing": ("nope.bin", "does not exist"),
    "pipe": ("pipe", "is no file"),
    "folder": ("inner", "is no file"),
    "link": ("link.bin", "a link to"),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("where", ["graph", "constant", "function", "body of an If"])
@pytest.mark.parametrize("named", ["with its folder", "alone"])
def test_weights_outside_of_the_folder_are_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, where: str, named: str
) -> None:
    folder, (location, message) = tmp_path / "m", PLACES[place]
    (folder / "inner").mkdir(parents=True)
    (tmp_path / "secret.bin").write_bytes(bytes(range(256)) * 8)
    os.mkfifo(folder / "pipe")
    (folder / "link.bin").symlink_to(tmp_path / "secret.bin")
    tensor = onnx.TensorProto(name="k", data_type=1, dims=[16, 8], data_location=onnx.TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value=location.format(outside=tmp_path))
    onnx.save_model(_with_external(tensor, where), folder / "model.onnx")
    monkeypatch.chdir(folder)
    with pytest.raises(ModelError, match=message):
        model_io.load("model.onnx" if named == "alone" else folder)


def _with_external(tensor: onnx.TensorProto, where: str) -> onnx.ModelProto:
    """y = x k, with the external constant k in a place of its own."""
    info, node = onnx.helper.make_tensor_value_info, onnx.helper.make_node
    constant = onnx.NodeProto(op_type="Constant", output=["k"], name="constant")
    constant.attribute.add(name="value", type=onnx.AttributeProto.TENSOR).t.CopyFrom(tensor)
    opsets, functions, kept = [onnx.helper.make_opsetid("", 21)], [], []
    nodes = [constant, node("MatMul", ["x", "k"], ["y"], name="fc")]
    if where == "graph":
        nodes, kept = nodes[1:], [tensor]
    elif where == "function":
        functions = [onnx.helper.make_function("local", "Proj", ["x"], ["y"], nodes, opsets)]
        nodes, opsets = [node("Proj", ["x"], ["y"], name="fc", domain="local")], [
            *opsets, onnx.helper.make_opsetid("local", 1),
        ]  # fmt: skip
    elif where == "body of an If":
        bodies = [
            onnx.helper.make_graph([node("MatMul", ["x", "k"], [name])], name, [], [info(name, 1, ["n", 8])], [tensor])
            for name in ("a", "b")
        ]
        nodes = [node("If", ["c"], ["y"], name="fc", then_branch=bodies[0], else_branch=bodies[1])]
    inputs = [info("x", 1, ["n", 16]), info("c", onnx.TensorProto.BOOL, [])]
    graph = onnx.helper.make_graph(nodes, "g", inputs, [info("y", 1, ["n", 8])], kept)
    return onnx.helper.make_model(graph, functions=functions, opset_imports=opsets, ir_version=10)


def test_only_what_belongs_to_a_model_goes_along(tmp_path: Path) -> None:
    """Calibration data, scripts, and what links outside of the folder lead to are somebody's own."""
    source = tmp_path / "source"
    (source / "inner").mkdir(parents=True)
    (tmp_path / "secret.json").write_text("secret")
    mine = ["tokenizer.json", "tokenizer_config.json", "genai_config.json", "chat_template.jinja", "vocab.txt",
            "merges.txt", "preprocessor_config.json", "config.json", "LICENSE"]  # fmt: skip
    other = ["calibration.npz", "train.py", "notes.txt", "data.jsonl"]
    for name in (*mine, *other, ".hidden.json", "weights.bin"):
        (source / name).write_text(name)
    (source / "special_tokens_map.json").symlink_to(tmp_path / "secret.json")
    (source / "vocab.json").symlink_to(source / "vocab.txt")
    save(small(), tmp_path / "out", source_folder=source)
    copied = {path.name for path in (tmp_path / "out").iterdir()} - {MODEL_FILE, DATA_FILE}
    assert copied == {*mine, "vocab.json"}
    taken, left = companions_in(source)
    assert {path.name for path in taken} == copied
    assert {path.name for path in left} == {*other, "special_tokens_map.json", "inner"}


def test_files_of_somebody_else_are_not_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "out"
    save(small(), out, extra_files={"recipe.yaml": "old", "tokenizer.json": "{}"})
    (out / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"holds 'notes.txt', which no compilation wrote"):
        save(small(), out, overwrite=True)
    assert (out / "notes.txt").read_text() == "mine"
    (out / "notes.txt").unlink()
    save(small(), out, overwrite=True, extra_files={"recipe.yaml": "new"})
    assert (out / "recipe.yaml").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("can", [True, False])
def test_there_is_always_an_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can: bool) -> None:
    """The earlier and the new one change places at once, where the system can."""
    out, seen = tmp_path / "out", []
    save(small(), out, extra_files={"recipe.yaml": "old"})
    rename = Path.rename

    def counted(self: Path, target: Path) -> Path:
        seen.append(self.name)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", counted)
    if not can:
        monkeypatch.setattr(model_io, "_exchanged", lambda a, b: False)
    save(small(), out, overwrite=True, extra_files={"recipe.yaml": "new"})
    assert (out / "recipe.yaml").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert bool(seen) != (can and sys.platform == "linux")


def test_what_killed_runs_have_left_goes(tmp_path: Path) -> None:
    """But not what another run is writing now."""
    done = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True, check=True
    )
    dead = tmp_path / f".out.partial-{done.stdout.strip()}-abc"
    alive, other = tmp_path / f".out.partial-{os.getpid()}-abc", tmp_path / f".other.partial-{done.stdout.strip()}-abc"
    for folder in (dead, alive, other):
        folder.mkdir()
    save(small(), tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"out", alive.name, other.name}


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_the_output_follows_the_umask(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        save(small(), tmp_path / "out")
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o777 & ~mask
    assert (tmp_path / "out" / MODEL_FILE).stat().st_mode & 0o777 == 0o666 & ~mask
