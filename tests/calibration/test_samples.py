"""Data in every form becomes samples that fit the model, or one sentence that says what is wrong."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from qcompiler.calibration.samples import from_python, open_samples, write_samples
from qcompiler.errors import DataError, OutputError
from tests.there import numpy_type

VOCABULARY = 20


def language_model() -> ir.Model:
    model = ir.from_onnx_text(
        """<ir_version: 10, opset_import: ["" : 21]>
        lm (int64[batch, seq] input_ids, int64[batch, total] attention_mask, int64[batch, seq] position_ids,
            float16[batch, 2, past, 4] "past_key_values.0.key", float[20, 3] table) => (float[batch, seq, 3] y) {
            y = Gather (table, input_ids)
        }"""
    )
    table = model.graph.inputs.pop()
    table.const_value = ir.tensor(np.zeros((VOCABULARY, 3), np.float32), name="table")
    model.graph.register_initializer(table)
    return model


def vision_model() -> ir.Model:
    return ir.from_onnx_text(
        """<ir_version: 10, opset_import: ["" : 21]>
        cnn (float[batch, 3, h, w] image, float16[3] mean, int32[batch] size) => (float[batch, 3, h, w] y) {
            y = Relu (image)
        }"""
    )


def read(spec: str | Path, model: ir.Model | None = None, **options: Any) -> list[dict[str, np.ndarray]]:
    return list(open_samples(str(spec), model=model or language_model(), **options))


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    words = {"[s]": 0, **{f"w{index}": index for index in range(1, VOCABULARY)}, "alien": VOCABULARY + 5}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[s]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="[s] $A", special_tokens=[("[s]", 0)])
    tokenizer.enable_truncation(5)  # as saved tokenizers often have it; it must not cut a text
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def test_missing_inputs_are_filled_in_with_the_one_right_value() -> None:
    (sample,) = from_python([{"input_ids": [[3, 4, 5]]}], model=language_model())
    assert sample["input_ids"].dtype == np.int64
    assert sample["attention_mask"].tolist() == [[1, 1, 1]]
    assert sample["position_ids"].tolist() == [[0, 1, 2]]
    assert sample["past_key_values.0.key"].shape == (1, 2, 0, 4)
    assert sample["past_key_values.0.key"].dtype == np.float16


def test_a_cache_of_any_name_may_be_empty() -> None:
    model = ir.from_onnx_text(
        """<ir_version: 10, opset_import: ["" : 21]>
        lm (int64[b, s] input_ids, float[b, 2, s, 4] new, float[b, 2, p, 4] old) => (float[b, 2, t, 4] y) {
            y = Concat <axis = 2> (old, new)
        }"""
    )
    new = np.ones((1, 2, 3, 4), np.float32)
    (sample,) = from_python([{"input_ids": [[3, 4, 5]], "new": new}], model=model)
    assert sample["old"].shape == (1, 2, 0, 4)
    with pytest.raises(DataError, match="'new' is empty"):
        from_python([{"input_ids": [[3]], "new": new[:, :, :0], "old": new}], model=model)


def test_more_tokens_than_the_model_has_positions() -> None:
    model = language_model()
    model.graph.append(ir.node("Gather", [model.graph.initializers["table"], model.graph.inputs[2]]))
    with pytest.raises(DataError, match=r"holds the position 20, and the model has 20; give shorter samples"):
        from_python([{"input_ids": [[1] * 21]}], model=model)


def test_mask_and_positions_continue_after_a_past_that_is_given() -> None:
    past = np.zeros((1, 2, 5, 4), np.float32)
    (sample,) = from_python([{"input_ids": [[3, 4]], "past_key_values.0.key": past}], model=language_model())
    assert sample["attention_mask"].shape == (1, 7)
    assert sample["position_ids"].tolist() == [[5, 6]]


def test_ragged_samples_and_reading_twice(tmp_path: Path) -> None:
    lines = [{"input_ids": [1, 2, 3]}, {"input_ids": [[4, 5]]}, {"input_ids": list(range(9))}]
    (tmp_path / "a.jsonl").write_text("\n\n".join(map(json.dumps, lines)))
    samples = open_samples(str(tmp_path / "a.jsonl"), model=language_model(), sequence_length=8)
    for _ in range(2):
        assert [sample["input_ids"].shape for sample in samples] == [(1, 3), (1, 2), (1, 8)]
    assert len(samples) == 3
    assert [s["input_ids"].shape[1] for s in samples.part(1, 3)] == [2, 8]
    assert len(samples.part(1, 3)) == 2


def test_a_part_ends_with_what_it_is_a_part_of() -> None:
    samples = from_python([{"input_ids": [[i]]} for i in range(5)], model=language_model(), limit=3)
    for start, stop, expected in ((0, 5, [0, 1, 2]), (1, 2, [1]), (2, 9, [2]), (3, 5, [])):
        part = samples.part(start, stop)
        assert [sample["input_ids"].item() for sample in part] == expected
        assert len(part) == len(expected)
    assert [s["input_ids"].item() for s in samples.part(1, 3).part(0, 5)] == [1, 2]


def test_npz_keeps_a_batch_axis_and_loses_it_where_the_model_has_none(tmp_path: Path) -> None:
    images, means = np.random.default_rng(0).random((4, 3, 2, 2)), np.ones((4, 3))
    np.savez(tmp_path / "a.npz", image=images, mean=means, size=np.arange(4))
    samples = read(tmp_path / "a.npz", vision_model(), limit=3)
    assert len(samples) == 3
    assert samples[2]["image"].shape == (1, 3, 2, 2)
    assert samples[2]["image"].dtype == np.float32
    assert samples[2]["mean"].shape == (3,)
    assert samples[2]["mean"].dtype == np.float16
    assert samples[2]["size"].tolist() == [2]
    assert samples[2]["size"].dtype == np.int32
    np.testing.assert_array_equal(samples[2]["image"][0], images[2].astype(np.float32))


def test_folder_of_npz_in_order_of_names(tmp_path: Path) -> None:
    for name, value in (("b", 2), ("a", 1)):
        np.savez(tmp_path / f"{name}.npz", input_ids=np.full((2, value + 1), value))
    assert [s["input_ids"].tolist() for s in read(tmp_path)] == [[[1, 1]], [[1, 1]], [[2, 2, 2]], [[2, 2, 2]]]


def test_text_windows_are_spread_over_the_text(tmp_path: Path, tokenizer: Path) -> None:
    words = [f"w{1 + index % 19}" for index in range(99)]
    (tmp_path / "t.txt").write_text(" ".join(words))
    windows = read(tmp_path / "t.txt", tokenizer=tokenizer, sequence_length=10, limit=4)
    ids = [0, *(1 + index % 19 for index in range(99))]
    assert [w["input_ids"][0].tolist() for w in windows] == [ids[start : start + 10] for start in (0, 25, 50, 75)]
    everything = read(tmp_path / "t.txt", tokenizer=tokenizer.parent, sequence_length=30, limit=None, contiguous=True)
    assert [w["input_ids"].shape[1] for w in everything] == [30, 30, 30, 10]
    (short,) = read(tmp_path / "t.txt", tokenizer=tokenizer, sequence_length=1000)
    assert short["input_ids"].shape == (1, 100)
    (tmp_path / "long.txt").write_text(" ".join(words * 6))
    assert {w["input_ids"].shape for w in read(tmp_path / "long.txt", tokenizer=tokenizer)} == {(1, 256)}


def test_of_a_very_long_text_only_the_places_of_the_windows_are_read(tmp_path: Path, tokenizer: Path) -> None:
    (tmp_path / "t.txt").write_text("w1 " * 1500 + "w2 " * 2500)
    windows = read(tmp_path / "t.txt", tokenizer=tokenizer, sequence_length=4, limit=2)
    assert [w["input_ids"].tolist() for w in windows] == [[[0, 1, 1, 1]], [[0, 2, 2, 2]]]
    (tmp_path / "u.txt").write_text("aö " * 3000)  # a place may fall into the middle of a character
    assert [
        w["input_ids"].shape for w in read(tmp_path / "u.txt", tokenizer=tokenizer, sequence_length=4, limit=7)
    ] == [(1, 4)] * 7


def test_a_window_does_not_begin_within_a_word(tmp_path: Path, tokenizer: Path) -> None:
    text = "w15 " * 4001
    assert text[len(text) // 2 :].startswith("5 "), "the second place lies within a word"
    (tmp_path / "t.txt").write_text(text)
    windows = read(tmp_path / "t.txt", tokenizer=tokenizer, sequence_length=4, limit=2)
    assert [w["input_ids"].tolist() for w in windows] == [[[0, 15, 15, 15]]] * 2


def test_json_text_and_numbers(tmp_path: Path, tokenizer: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "w3 w4", "url": "x"}\n{"input_ids": [7]}\n')
    samples = read(tmp_path / "a.jsonl", tokenizer=tokenizer)
    assert [s["input_ids"].tolist() for s in samples] == [[[0, 3, 4]], [[7]]]


def test_onnx_test_data(tmp_path: Path) -> None:
    for index in (10, 2):
        folder = tmp_path / f"test_data_set_{index}"
        folder.mkdir()
        for number, array in enumerate((np.full((1, 2), index), np.zeros((1, 2), np.int64))):
            (folder / f"input_{number}.pb").write_bytes(onnx.numpy_helper.from_array(array).SerializeToString())
    samples = read(f"pb:{tmp_path}")
    assert [s["input_ids"].tolist() for s in samples] == [[[2, 2]], [[10, 10]]]
    assert samples[0]["attention_mask"].tolist() == [[0, 0]]
    assert len(read(f"pb:{tmp_path / 'test_data_set_2'}")) == 1


def test_python_function_generator_and_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_data.py").write_text(
        "import numpy as np\n"
        "def batches():\n    yield {'input_ids': np.array([[1]])}\n    yield {'input_ids': np.array([[2]])}\n"
        "class Reader:\n"
        "    def __init__(self): self.left = [1, 2]\n"
        "    def get_next(self): return {'input_ids': [[self.left.pop(0)]]} if self.left else None\n"
        "    def rewind(self): self.left = [1, 2]\n"
        "reader = Reader()\n"
        "def broken():\n    raise ZeroDivisionError('my own fault')\n    yield {}\n"
    )
    monkeypatch.chdir(tmp_path)
    for name in ("batches", "Reader", "reader"):
        samples = open_samples(f"py:own_data:{name}", model=language_model())
        for _ in range(2):
            assert [s["input_ids"].tolist() for s in samples] == [[[1]], [[2]]]
    assert samples.count is None
    assert samples, "a source of unknown length counts as true"
    with pytest.raises(DataError, match="py:own_data:broken failed with ZeroDivisionError: my own fault"):
        read("py:own_data:broken")
    with pytest.raises(DataError, match="the import of py:own_data:absent failed"):
        read("py:own_data:absent")
    with pytest.raises(DataError, match="should read py:module:function"):
        read("py:own_data")


def test_iterators_that_run_dry_are_kept() -> None:
    samples = from_python(({"input_ids": [[i]]} for i in range(5)), model=language_model(), limit=3)
    assert [len(list(samples)), len(list(samples)), len(samples)] == [3, 3, 3]


@pytest.mark.filterwarnings("ignore:random calibration data")
def test_random_data_where_nothing_is_said_is_128_samples_of_seed_0() -> None:
    samples = read("random")
    assert len(samples) == len(read("random", limit=None)) == 128
    for one, other in zip(samples, read("random", seed=0), strict=True):
        np.testing.assert_array_equal(one["input_ids"], other["input_ids"])


def test_a_length_has_one_token_at_least(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"input_ids": [1, 2, 3]}')
    (sample,) = read(tmp_path / "a.jsonl", sequence_length=1)
    assert sample["input_ids"].tolist() == [[1]]
    with pytest.raises(DataError, match="the sequence length must be positive, and is 0"):
        read(tmp_path / "a.jsonl", sequence_length=0)


def test_a_length_that_is_not_known_has_no_number() -> None:
    samples = from_python(lambda: iter([{"input_ids": [[1]]}]), model=language_model())
    with pytest.raises(TypeError, match="is not known before they are read"):
        len(samples)


def test_samples_are_written_as_they_are_read(tmp_path: Path) -> None:
    samples = [{"input_ids": np.array([[i, i + 1]]), "attention_mask": np.ones((1, 2), np.int64)} for i in range(2)]
    write_samples(tmp_path / "out", samples)
    again = read(f"pb:{tmp_path / 'out'}")
    assert [sample["input_ids"].tolist() for sample in again] == [[[0, 1]], [[1, 2]]]
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"file cannot be written: Not a directory$"):
        write_samples(tmp_path / "file", samples)


def test_samples_that_cannot_be_written_for_a_reason_without_a_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("the share is gone")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(OutputError, match="cannot be written: the share is gone"):
        write_samples(tmp_path, [{"x": np.ones(1)}])


def test_random_data_fits_and_warns() -> None:
    with pytest.warns(UserWarning, match="says nothing about real activations"):
        samples = read("random", limit=3)
    with pytest.warns(UserWarning, match="random"):
        again = read("random", limit=3)
    assert samples[0]["input_ids"].shape == (1, 32)
    assert max(s["input_ids"].max() for s in samples) < VOCABULARY
    assert max(s["input_ids"].max() for s in samples) > 10
    np.testing.assert_array_equal(samples[1]["input_ids"], again[1]["input_ids"])
    with pytest.warns(UserWarning, match="random"):
        (seven,) = read("random", limit=1, sequence_length=7)
    assert seven["input_ids"].shape == (1, 7)
    with pytest.warns(UserWarning, match=r"random data \(seed 1\)|says nothing"):
        other = read("random", limit=3, seed=1)
    ids = [tuple(s["input_ids"].ravel()) for s in (*samples, *other)]
    assert len(set(ids)) == 6, "neither two samples nor two seeds are alike"
    with pytest.warns(UserWarning, match="random"):
        (image,) = read("random", vision_model(), limit=1)
    assert image["image"].shape == (1, 3, 32, 32)


@pytest.mark.parametrize(("shape", "expected"), [("n,a,b,c", (1, 128, 128, 128)), ("n,a,b", (1, 256, 256))])
def test_random_data_of_many_axes_stays_small(shape: str, expected: tuple[int, ...]) -> None:
    text = f'<ir_version: 10, opset_import: ["" : 21]> m (float[{shape}] x) => (float[{shape}] y) {{ y = Abs (x) }}'
    with pytest.warns(UserWarning, match="random"):
        (sample,) = read("random", ir.from_onnx_text(text), limit=1, sequence_length=256)
    assert sample["x"].shape == expected


def test_random_data_that_would_fill_the_memory_is_refused() -> None:
    text = """<ir_version: 10, opset_import: ["" : 21]>
              m (float[n,2000000,3000] x) => (float[n,2000000,3000] y) { y = Abs (x) }"""
    with (
        pytest.warns(UserWarning, match="random"),
        pytest.raises(DataError, match=r"the input 'x' \[n, 2000000, 3000\] .*would be larger than 1 GiB; give data"),
    ):
        read("random", ir.from_onnx_text(text), limit=1)


def test_hash_follows_the_content() -> None:
    def of(*values: int) -> str:
        return from_python([{"input_ids": [[v]]} for v in values], model=language_model()).hash()

    assert of(1, 2) == of(1, 2)
    assert len({of(1, 2), of(2, 1), of(1), of(1, 2, 3)}) == 4


def test_hash_follows_texts() -> None:
    def of(*words: str) -> str:
        model = ir.from_onnx_text(
            """<ir_version: 10, opset_import: ["" : 21]> m (string[n] x) => (string[n] y) { y = Identity (x) }"""
        )
        return from_python([{"x": np.array([word + "!" for word in words])}], model=model).hash()

    assert of("a", "b") == of("a", "b") != of("a", "c")


def test_hash_follows_shapes_and_types() -> None:
    def of(type: str, *rows: list[int]) -> str:
        model = ir.from_onnx_text(
            f"""<ir_version: 10, opset_import: ["" : 21]>
            m ({type}[a, b] x) => ({type}[a, b] y) {{ y = Identity (x) }}"""
        )
        return from_python([{"x": np.array(rows, numpy_type(model.graph.inputs[0]))}], model=model).hash()

    assert of("int32", [1, 2]) == of("int32", [1, 2])
    assert of("int32", [1, 2]) != of("int32", [1], [2]), "the same bytes in another shape"
    assert of("int32", [0, 0]) != of("float", [0, 0]), "the same bytes of another type"


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        ({"input_id": [[1]]}, "has 'input_id', which the model does not read; did you mean 'input_ids'?"),
        (
            {"attention_mask": [[1]]},
            "lacks the input 'input_ids' .* cannot be filled in; the data has 'attention_mask'",
        ),
        ({"input_ids": [1, 2]}, r"'input_ids' has shape \[2\], the model reads \[batch, seq\]"),
        ({"input_ids": [[1.0]]}, "type float64, which does not safely become the model's INT64"),
        ({"input_ids": [[1], [2, 3]]}, "'input_ids' is no array of numbers"),
        ({"input_ids": np.array([[None]])}, "'input_ids' holds Python objects"),
        ({"input_ids": [[1, 20]]}, "token id 20, and the model's vocabulary has 20"),
        ({"input_ids": [[-1, 2]]}, "token id -1"),
        ({"input_ids": [[]]}, "'input_ids' is empty"),
        ({"input_ids": [[1]], "past_key_values.0.key": np.full((1, 2, 1, 4), np.nan)}, "holds NaN or infinity"),
        ({"input_ids": [[1]], "past_key_values.0.key": np.full((1, 2, 1, 4), 1e6)}, "infinity as FLOAT16"),
        ({"input_ids": [[1]], "past_key_values.0.key": np.zeros((1, 3, 1, 4))}, r"has shape \[1, 3, 1, 4\]"),
    ],
)
def test_what_is_wrong_with_a_sample_is_said(sample: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        from_python([sample], model=language_model())


def test_a_later_sample_is_checked_when_it_is_read() -> None:
    samples = from_python([{"input_ids": [[1]]}, {"input_ids": [[99]]}], model=language_model())
    with pytest.raises(DataError, match="sample 1: 'input_ids' holds the token id 99"):
        list(samples)


def test_integers_that_do_not_fit_are_refused() -> None:
    data = {"image": np.zeros((1, 3, 1, 1)), "mean": np.zeros(3)}
    assert next(iter(from_python([{**data, "size": [7]}], model=vision_model())))["size"].dtype == np.int32
    with pytest.raises(DataError, match="INT32: not every number fits"):
        from_python([{**data, "size": [1 << 40]}], model=vision_model())
    pixels = np.full((1, 3, 1, 1), 255, np.uint8)
    assert next(iter(from_python([{**data, "image": pixels, "size": [1]}], model=vision_model())))["image"].max() == 255


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.npz", None, "does not exist"),
        ("a.csv", b"1,2", "unknown suffix"),
        ("a.npz", b"no zip", "is no usable .npz file"),
        ("a.jsonl", b'{"input_ids": [1]}\n{"input', "line 2 is not JSON"),
        ("a.jsonl", b"[1, 2]", "line 1 is not a JSON object"),
        ("a.jsonl", b"", "holds no samples"),
        ("a.jsonl", b'{"text": "w1"}', "is text and needs a tokenizer"),
        ("a.jsonl", b'{"text": 1}', "'text' is not a string"),
        ("a.jsonl", b"\xff\xfe", "cannot be read as UTF-8"),
        ("a.txt", b"w1", "is text and needs a tokenizer"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read(tmp_path / name)


@pytest.mark.parametrize("spec", ["", "  "])
def test_data_without_a_name_is_not_the_folder_at_hand(spec: str) -> None:
    with pytest.raises(DataError, match="the data has an empty name"):
        read(spec)


def test_pickles_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", input_ids=np.array([[None]], object))
    with pytest.raises(DataError, match="pickled Python objects, which are never loaded"):
        read(tmp_path / "a.npz")


def test_npz_whose_arrays_disagree_or_are_empty(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", input_ids=np.zeros((2, 3), int), attention_mask=np.ones((3, 3), int))
    with pytest.raises(DataError, match="the arrays disagree: 'input_ids' 2, 'attention_mask' 3"):
        read(tmp_path / "a.npz")
    np.savez(tmp_path / "b.npz", input_ids=np.zeros((0, 3), int))
    with pytest.raises(DataError, match="holds no samples"):
        read(tmp_path / "b.npz")
    np.savez(tmp_path / "c.npz", input_ids=np.int64(3))
    with pytest.raises(DataError, match="'input_ids' is a single number"):
        read(tmp_path / "c.npz")


def test_text_needs_the_right_tokenizer_and_model(tmp_path: Path, tokenizer: Path) -> None:
    (tmp_path / "a.txt").write_text("w1 alien")
    with pytest.raises(DataError, match="the token id 25, and the model's vocabulary has 20"):
        read(tmp_path / "a.txt", tokenizer=tokenizer)
    with pytest.raises(DataError, match="text needs a model with one input of token ids"):
        read(tmp_path / "a.txt", vision_model(), tokenizer=tokenizer)
    with pytest.raises(DataError, match="does not exist"):
        read(tmp_path / "a.txt", tokenizer=tmp_path / "absent.json")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(DataError, match="cannot be read"):
        read(tmp_path / "a.txt", tokenizer=tmp_path / "bad.json")


def test_folders_that_hold_nothing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no \.npz files"):
        read(tmp_path)
    with pytest.raises(DataError, match="holds no ONNX test data"):
        read(f"pb:{tmp_path}")
    with pytest.raises(DataError, match="the limit is 0"):
        from_python([{"input_ids": [[1]]}], model=language_model(), limit=0)


def test_a_cache_whose_shape_is_not_known_cannot_be_filled_in() -> None:
    model = language_model()
    model.graph.inputs[3].shape = ir.Shape(["batch", 2, "past", "width"])
    with pytest.raises(DataError, match=r"lacks the input 'past_key_values\.0\.key' \[batch, 2, past, width\]"):
        from_python([{"input_ids": [[1]]}], model=model)
