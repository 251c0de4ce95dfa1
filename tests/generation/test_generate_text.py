"""From prompts to text: drawing tokens, text that comes token by token, and the command that does it all."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from models.export import CHECKPOINT
from qcompiler import generate
from qcompiler.cli import app as cli
from qcompiler.generation.sampling import Sampling
from qcompiler.generation.text_stream import TextStream

WITHOUT_CUDA = pytest.mark.skipif(
    "CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="this onnxruntime has CUDA"
)
WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven"]


def test_drawing_keeps_to_what_is_left_and_to_the_chances() -> None:
    chances = np.array([0.5, 0.2, 0.15, 0.1, 0.05])
    logits = np.log(chances)[[3, 0, 4, 1, 2]].astype(np.float32)  # the likeliest is token 1, then 3, 4, 0, 2

    def drawn(**options: Any) -> np.ndarray:
        generator, sampling = np.random.default_rng(5), Sampling(**options)
        return np.bincount([sampling.choose(logits, generator) for _ in range(2000)], minlength=5) / 2000

    assert np.abs(drawn(temperature=1) - chances[[3, 0, 4, 1, 2]]).max() < 0.04
    squared = chances**2 / (chances**2).sum()
    assert np.abs(drawn(temperature=0.5) - squared[[3, 0, 4, 1, 2]]).max() < 0.04
    assert np.flatnonzero(drawn(temperature=1, top_k=2)).tolist() == [1, 3]
    assert np.flatnonzero(drawn(temperature=1, top_p=0.6)).tolist() == [1, 3]
    assert np.flatnonzero(drawn(temperature=1, top_p=0.8)).tolist() == [1, 3, 4]
    assert np.flatnonzero(drawn(temperature=1, top_p=0.01)).tolist() == [1]
    assert drawn(temperature=0).tolist() == [0, 1, 0, 0, 0]


def streamed(text: str, prompt: str = "", stops: tuple[str, ...] = ()) -> tuple[list[str], bool]:
    tokenizer = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    stream = TextStream(tokenizer, tokenizer.encode(prompt).ids, stops)
    parts = [stream.push(token) for token in tokenizer.encode(text).ids]
    return [*parts, stream.finish()], stream.stopped


@pytest.mark.parametrize("text", ["It was — 𝄞 and “naïve” 漢字 🙂🙂 said he.", "plain words only", "\n\n  \té"])
@pytest.mark.parametrize("prompt", ["", "Once upon a time — there was"])
def test_characters_of_several_tokens_come_whole(text: str, prompt: str) -> None:
    parts, stopped = streamed(text, prompt)
    assert "".join(parts) == text
    assert not any("�" in part for part in parts)
    assert not stopped
    assert len([part for part in parts if part]) > 1


def test_bytes_that_never_become_a_character_are_shown_at_the_end() -> None:
    tokenizer = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    stream = TextStream(tokenizer, [])
    first, *_ = tokenizer.encode("𝄞").ids
    assert [stream.push(token) for token in (*tokenizer.encode("so").ids, first)][-1] == ""
    assert stream.finish() == "�"


@pytest.mark.parametrize(
    ("stops", "wanted"),
    [
        (("was a cat",), "There "),
        (("a dog", "cat"), "There was a "),
        (("a catalogue", "He"), "There was a cat. "),
        (("nothing", "slept. He"), "There was a cat. He slept. She slept."),
        (("",), "There was a cat. He slept. She slept."),
    ],
)
def test_nothing_of_a_stop_text_is_shown(stops: tuple[str, ...], wanted: str) -> None:
    text = "There was a cat. He slept. She slept."
    parts, stopped = streamed(text, stops=stops)
    assert "".join(parts) == wanted
    assert stopped == (wanted != text)


# ------------------------------------------------------------------------- the command


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model in whose texts seven words follow one another in a circle, and its tokenizer."""
    table = 9 * np.eye(8, dtype=np.float32)[[7, 2, 3, 4, 5, 6, 7, 1]]  # after a word the next; "zero" stands apart
    model = ir.from_onnx_text(
        f"""<ir_version: 10, opset_import: ["" : 21]>
        circle (int64[b, s] input_ids, int64[b, t] attention_mask, float[b, 1, p, 1] "past_key_values.0.key")
            => (float[b, s, 8] logits, float[b, 1, t, 1] "present.0.key")
        <float[8, 8] table = {{{", ".join(["0"] * 64)}}}, int64[2] inner = {{1, 3}}> {{
            logits = Gather(table, input_ids)  ids = Cast<to=1>(input_ids)  new = Unsqueeze(ids, inner)
            "present.0.key" = Concat<axis=2>("past_key_values.0.key", new) }}"""
    )
    model.graph.initializers["table"].const_value = ir.tensor(table, name="table")
    out = tmp_path / "out"
    out.mkdir()
    ir.save(model, out / "model.onnx")
    tokenizer = Tokenizer(models.WordLevel(dict(zip(WORDS, range(8), strict=True)), unk_token="zero"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["seven"])
    tokenizer.save(str(out / "tokenizer.json"))
    return out


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["qcompiler", "generate", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return caught.value.code if isinstance(caught.value.code, int) else 0


def test_one_prompt_and_several(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    assert run(monkeypatch, folder, "--prompt", "one", "--max-new-tokens", 4) == 0
    assert capsys.readouterr().out == " two three four five\n"
    assert run(monkeypatch, folder / "model.onnx", "-p", "one", "-p", "one two three", "--max-new-tokens", 2) == 0
    assert capsys.readouterr().out == "[1]  two three\n[2]  four five\n"


def test_text_is_shown_as_it_comes(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    shown: list[str] = []
    monkeypatch.setattr("typer.echo", lambda text, nl=True: shown.append(text + "\n" * nl))
    assert run(monkeypatch, folder, "--prompt", "one", "--max-new-tokens", 3) == 0
    assert shown == [" two", " three", " four", "\n"]


def test_json_and_where_a_text_ends(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    assert run(monkeypatch, folder, "--prompt", "two", "--prompt", "six", "--stop", "five", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    first, second = found["results"]
    assert first == {
        "prompt": "two", "text": " three four ", "prompt_tokens": 1, "ids": [3, 4, 5], "finish": "stop"
    }  # fmt: skip
    assert second["text"] == " one two three four "  # "seven" is a special token, which shows in no text
    assert second["ids"] == [7, 1, 2, 3, 4, 5]
    assert found["tokens_per_second"] == pytest.approx(9 / found["seconds"])
    (folder / "genai_config.json").write_text(json.dumps({"model": {"eos_token_id": 6, "context_length": 9}}))
    for stop, last in (("seven", 6), ("no such text", 6)):
        assert run(monkeypatch, folder, "--prompt", "four", "--json", "--stop", stop) == 0
        assert json.loads(capsys.readouterr().out)["results"][0]["ids"][-1] == last
    (folder / "genai_config.json").unlink()
    assert run(monkeypatch, folder, "--prompt", "four", "--json", "--stop", "seven") == 0
    assert json.loads(capsys.readouterr().out)["results"][0]["ids"] == [5, 6, 7]


def test_drawing_by_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    arguments = [folder, "--prompt", "one", "--max-new-tokens", 12, "--temperature", 30]
    texts = []
    for seed in (1, 1, 2):
        assert run(monkeypatch, *arguments, "--seed", seed) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]
    assert run(monkeypatch, *arguments, "--top-k", 1) == 0
    assert capsys.readouterr().out.startswith(" two three four")
    drawn = [generate(folder, [1], max_new_tokens=12, temperature=30, seed=seed)[0].ids for seed in (1, 2)]
    assert drawn[0] != drawn[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", ""], "prompt 1 is empty"),
        (["--prompt", "one " * 9], "has 9 tokens, and the model reads at most 9"),
        (["--prompt", "one", "--tokenizer", "absent.json"], "the tokenizer 'absent.json' does not exist"),
        (["--prompt", "one", "--top-k", "3"], "give a temperature above 0"),
        pytest.param(["--prompt", "one", "--cuda"], "has no CUDAExecutionProvider", marks=WITHOUT_CUDA),
    ],
)
def test_bad_input_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    folder: Path,
    arguments: list[str],
    message: str,
) -> None:
    (folder / "genai_config.json").write_text(json.dumps({"model": {"context_length": 9}}))
    assert run(monkeypatch, folder, *arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert len(captured.err.strip().splitlines()) == 1
    assert message in captured.err


def test_no_tokenizer_and_no_model(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    (folder / "tokenizer.json").unlink()
    assert run(monkeypatch, folder, "--prompt", "one") == 2
    assert "there is no tokenizer.json beside" in capsys.readouterr().err
    assert run(monkeypatch, folder / "absent", "--prompt", "one") == 2
    assert "does not exist" in capsys.readouterr().err
    assert run(monkeypatch, folder) == 2
    assert "Missing option" in capsys.readouterr().err
