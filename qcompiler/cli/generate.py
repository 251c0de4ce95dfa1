"""`qcompiler generate`: text from a compiled language model, as it comes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qcompiler.cli.common import MOST
from qcompiler.errors import DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from qcompiler.generation.write import Generation


def generate(
    model: Annotated[
        Path,
        typer.Argument(
            readable=False, metavar="OUT", help="A compiled folder, or any language model.", show_default=False
        ),
    ],
    prompt: Annotated[list[str], typer.Option("--prompt", "-p", help="What to continue; several are one batch.")],
    tokenizer: Annotated[
        Path | None, typer.Option(readable=False, help="tokenizer.json; by default the one beside the model.")
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, max=MOST, help="Tokens to write after each prompt at most.")
    ] = 128,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token; above, one is drawn.")] = 0.0,
    top_k: Annotated[int, typer.Option(min=0, max=MOST, help="Draw from so many likeliest tokens; 0: from all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens of this probability together.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, max=MOST, help="The same seed draws the same text.")] = 0,
    stop: Annotated[
        list[str] | None, typer.Option("--stop", help="End before this text; may be repeated. A special token, too.")
    ] = None,
    cuda: Annotated[bool, typer.Option("--cuda", help="Run on a GPU (onnxruntime-gpu).")] = False,
    threads: Annotated[int | None, typer.Option(min=1, max=MOST, help="Threads of ONNX Runtime.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, at the end.")] = False,
) -> None:
    """Continue a text with a language model, through its cache. Only what is new is printed.

    A text ends at the tokens that the configuration beside the model names, at --stop, or at --max-new-tokens.
    """
    from qcompiler.calibration.tokenizer import encode, open_tokenizer
    from qcompiler.generation.text_stream import TextStream
    from qcompiler.generation.write import generate
    from qcompiler.graph.files import find_model
    from qcompiler.graph.model_folder import companions_of, tokenizer_beside
    from qcompiler.sessions.decoder import Decoder

    find_model(model)
    file = tokenizer or tokenizer_beside(model)
    if file is None:
        raise DataError(f"there is no tokenizer.json beside {model}; give --tokenizer tokenizer.json")
    coder = open_tokenizer(file, "the prompt")
    special, texts = _stops(coder, stop or ())
    prompts = [encode(coder, text, "the prompt") for text in prompt]
    ends = companions_of(model).stop
    decoder = Decoder(model, threads=threads, providers=["CUDAExecutionProvider"] if cuda else None)
    streams = [TextStream(coder, ids, texts) for ids in prompts]
    written = [""] * len(prompt)
    live = len(prompt) == 1 and not json_

    def on_token(row: int, token: int) -> bool:
        new = streams[row].push(token)
        written[row] += new
        if live:
            typer.echo(new, nl=False)
        return streams[row].stopped

    begin = time.perf_counter()
    found = generate(
        decoder, prompts, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed,
        stop=(*ends, *special), on_token=on_token,
    )  # fmt: skip
    seconds = time.perf_counter() - begin
    rests = [stream.finish() for stream in streams]
    if json_:
        from qcompiler.cli.common import print_json

        pairs = zip(prompt, found, written, rests, strict=True)
        print_json(_result([_entry(text, entry, new + rest) for text, entry, new, rest in pairs], seconds))
    elif live:
        typer.echo(rests[0])
    else:
        for number, (new, rest) in enumerate(zip(written, rests, strict=True), 1):
            typer.echo(f"[{number}] {new}{rest}")


def _stops(tokenizer: Tokenizer, stops: Sequence[str]) -> tuple[list[int], list[str]]:
    """Special tokens, which never show in a text, by id; the others as text."""
    special = {added.content: number for number, added in tokenizer.get_added_tokens_decoder().items() if added.special}
    return [special[text] for text in stops if text in special], [text for text in stops if text not in special]


def _entry(prompt: str, found: Generation, text: str) -> dict[str, Any]:
    return {"prompt": prompt, "text": text, "prompt_tokens": len(found.prompt), "ids": list(found.ids),
            "finish": found.finish}  # fmt: skip


def _result(results: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
    count = sum(len(entry["ids"]) for entry in results)
    return {"results": results, "seconds": seconds, "tokens_per_second": count / seconds if seconds else None}
