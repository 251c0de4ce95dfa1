"""Writing on with a cache gives, token for token, what reading the whole text anew gives, whatever the cache is."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import qcompiler
from models.export import CHECKPOINT, MissingEnvironmentError, genai_python, model_path
from qcompiler.errors import DataError, ModelError
from qcompiler.generation.write import Generation, generate
from qcompiler.graph.model_inputs import Signature
from qcompiler.sessions.cache_io import find_cache_io
from qcompiler.sessions.decoder import Decoder
from tests.there import dims, operand

NEW = 16
EXPORTED = ["dynamo-past", "optimum", pytest.param("genai", marks=pytest.mark.exporters)]


def exported(variant: str) -> Path:
    try:
        return model_path(variant).parent
    except MissingEnvironmentError as error:
        pytest.skip(str(error))


@cache
def prompts() -> list[list[int]]:
    from tokenizers import Tokenizer

    ids = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json")).encode((CHECKPOINT / "heldout.txt").read_text()).ids
    return [ids[:9], ids[40:43], ids[100:121]]


@cache
def recomputed(folder: Path) -> list[tuple[int, ...]]:
    """The likeliest tokens after each prompt, alone, by a plain session that reads the whole text for each."""
    session = qcompiler.load_session(folder, threads=1)
    signature = Signature(ir.load(folder / "model.onnx"))
    found = []
    for prompt in prompts():
        ids = list(prompt)
        for _ in range(NEW):
            feeds = signature.complete({"input_ids": np.array([ids])}, "the text so far")
            ids.append(int(session.run(["logits"], feeds)[0][0, -1].argmax()))
        found.append(tuple(ids[len(prompt) :]))
    return found


def written(found: list[Generation]) -> list[tuple[int, ...]]:
    return [entry.ids for entry in found]


@pytest.mark.parametrize("shared_buffer", [True, False])
@pytest.mark.parametrize("variant", EXPORTED)
def test_with_the_cache_as_without_it(variant: str, shared_buffer: bool) -> None:
    """Three prompts of different lengths as one batch, and the longest of them alone."""
    folder = exported(variant)
    decoder = Decoder(folder, threads=1, shared_buffer=shared_buffer)
    assert decoder.shared_buffer == (shared_buffer and variant == "genai")
    assert decoder.padding == {"dynamo-past": "none", "optimum": "left", "genai": "right"}[variant]
    assert written(generate(decoder, prompts(), max_new_tokens=NEW, stop=())) == recomputed(folder)
    assert written(generate(decoder, prompts()[2], max_new_tokens=NEW, stop=())) == recomputed(folder)[2:]
    stop = recomputed(folder)[0][2]  # the others go on beside a row that has ended
    cut = [ids[: ids.index(stop) + 1] if stop in ids else ids for ids in recomputed(folder)]
    assert written(generate(decoder, prompts(), max_new_tokens=NEW, stop=[stop])) == cut


def test_a_model_without_a_cache_reads_the_text_again() -> None:
    folder = exported("dynamo")
    with pytest.warns(UserWarning, match="has no cache, so each step reads the whole text again"):
        found = generate(folder, prompts(), max_new_tokens=NEW, threads=1)
    assert written(found) == recomputed(folder)


@pytest.mark.parametrize("variant", EXPORTED)
def test_a_text_read_in_chunks_has_the_logits_of_one_pass(variant: str) -> None:
    decoder = Decoder(exported(variant), threads=1)
    ids = np.array(prompts()[2])
    once = decoder.read(ids, prefill=len(ids), chunk=1)
    for prefill, chunk in ((1, 1), (5, 3), (4, 100)):
        found = decoder.read(ids, prefill=prefill, chunk=chunk)
        assert np.abs(found - once).max() < 1e-4 * np.abs(once).max()


@pytest.mark.exporters
def test_a_row_at_the_end_of_the_context_does_not_go_on(tmp_path: Path) -> None:
    """The model has rotary tables for 2048 positions; the shorter row beside it goes on."""
    folder = exported("genai")
    long, short = (prompts()[2] * 100)[:2045], prompts()[1]
    both = generate(folder, [long, short], max_new_tokens=8, stop=(), threads=1)
    assert [(len(entry.ids), entry.finish) for entry in both] == [(3, "context"), (8, "length")]
    assert both[1].ids == recomputed(folder)[1][:8]


GENAI = """
import json, sys
import onnxruntime_genai as og
folder, prompt, new = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
model = og.Model(folder)
parameters = og.GeneratorParams(model)
parameters.set_search_options(max_length=len(prompt) + new, do_sample=False)
generator = og.Generator(model, parameters)
generator.append_tokens(prompt)
while not generator.is_done():
    generator.generate_next_token()
print(json.dumps([int(token) for token in generator.get_sequence(0)][len(prompt):]))
"""


def by_genai(folder: Path, prompt: list[int]) -> tuple[int, ...]:
    """The likeliest tokens after a prompt, by onnxruntime-genai in its own environment."""
    try:
        python = genai_python()
    except MissingEnvironmentError as error:
        pytest.skip(str(error))
    command = [str(python), "-c", GENAI, str(folder), json.dumps(prompt), str(NEW)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return tuple(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.exporters
@pytest.mark.parametrize("recipe", ["rtn-w4", "int8-weights", "kv-int8", "kv-int4"])
def test_onnxruntime_genai_writes_the_same_from_a_compiled_folder(tmp_path: Path, recipe: str) -> None:
    data = {"calibration": str(CHECKPOINT / "calibration.txt"), "tokenizer": CHECKPOINT / "tokenizer.json"}
    compiled = qcompiler.compile(exported("genai"), recipe, samples=8, sequence_length=64, **data)  # type: ignore[arg-type]
    compiled.save(tmp_path / "out")
    ours = generate(tmp_path / "out", prompts()[0], max_new_tokens=NEW, stop=(), threads=1)
    assert by_genai(tmp_path / "out", prompts()[0]) == ours[0].ids


def with_quantized_cache(folder: Path, bits: int) -> Path:
    """genai's variant with GroupQueryAttention's own int8 or int4 cache, by scales that fit the demo model roughly."""
    source = exported("genai")
    shutil.copytree(source, folder)
    model = ir.load(source / "model.onnx")
    for value in (*model.graph.inputs, *model.graph.outputs):
        if str(value.name).startswith(("past", "present")):
            value.type = ir.TensorType(ir.DataType.INT8 if bits == 8 else ir.DataType.UINT8)
            value.shape = ir.Shape([*dims(value)[:3], 32 * bits // 8])
    for node in [node for node in model.graph if node.op_type == "GroupQueryAttention"]:
        node.resize_inputs(14)
        for index, largest in ((12, 8.0), (13, 3.0)):
            name = f"{node.name}/scale_{index}"
            scale = ir.tensor(np.array([largest / (2 ** (bits - 1) - 1)], np.float32), name=name)
            node.replace_input_with(index, ir.Value(name=name, const_value=scale))
            model.graph.register_initializer(operand(node, index))
        kinds = {"k_quant_type": "PER_TENSOR", "v_quant_type": "PER_TENSOR", "kv_cache_bit_width": bits}
        for attribute in ir.convenience.convert_attributes(kinds):
            node.attributes.add(attribute)
    (folder / "model.onnx.data").unlink()
    ir.save(model, folder / "model.onnx", external_data="model.onnx.data")
    return folder


@pytest.mark.exporters
@pytest.mark.parametrize("bits", [8, 4])
def test_the_quantized_cache_of_groupqueryattention(tmp_path: Path, bits: int) -> None:
    """Shared buffer or not, together or alone, in one pass or token by token, here or in genai: the same."""
    folder = with_quantized_cache(tmp_path / "m", bits)
    decoder = Decoder(folder, threads=1)
    found = written(generate(decoder, prompts(), max_new_tokens=NEW, stop=()))
    assert found == [generate(decoder, prompt, max_new_tokens=NEW, stop=())[0].ids for prompt in prompts()]
    assert found == written(generate(folder, prompts(), max_new_tokens=NEW, stop=(), threads=1, shared_buffer=False))
    ids = np.array(prompts()[2])
    once, stepwise = (decoder.read(ids, prefill=first, chunk=1) for first in (len(ids), 1))
    assert np.abs(once - stepwise).max() < 1e-4 * np.abs(once).max()
    exact = Decoder(exported("genai"), threads=1).read(ids, prefill=1, chunk=1)
    assert 1e-4 < np.linalg.norm(stepwise - exact) / np.linalg.norm(exact) < 0.3
    assert by_genai(folder, prompts()[0]) == found[0]


# ------------------------------------------------------------------------- a model that counts

VOCABULARY = 11
NAMES = {
    "optimum": ("past_key_values.0.key", "present.0.key"),
    "transformers": ("input.past_key_values.layers.0.keys", "output.past_key_values.layers.0.keys"),
    "gpt2": ("past_0", "present_0"),
    "by the graph": ("past_key_values.0.key", "cache_out"),
}
POSITIONS = "positions = Identity(position_ids)"
OWN_POSITIONS = """
    where = Shape(past)  length = Gather<axis=0>(where, two)  ids_shape = Shape(input_ids)
    new = Gather<axis=0>(ids_shape, one)  end = Add(length, new)  steps = Range(length, end, one)
    row = Unsqueeze(steps, axis0)  zeros = Mul(input_ids, zero)  positions = Add(row, zeros)"""


def counting(
    folder: Path, kind: str = "float", names: tuple[str, str] = NAMES["optimum"], positions: bool = True,
    scales: bool = False,
) -> Path:  # fmt: skip
    """After ids 0 … t comes (their sum + 3 times t's position) mod 11. The ids before t come from the cache alone.

    The cache has the type `kind`; with `scales` a second one holds a factor of 2 for each position.
    """
    past, present = names
    number = int(ir.DataType[{"float8e4m3fn": "FLOAT8E4M3FN"}.get(kind, kind.upper())])
    scale_in = f', float16[b, 1, p, 1] "{past}_scale"' if scales else ""
    scale_out = f', float16[b, 1, t, 1] "{present}_scale"' if scales else ""
    scaling = (
        f"""factors = Add(entries, two_)  same = Sub(factors, entries)  factors16 = Cast<to=10>(same)
            "{present}_scale" = Concat<axis=2>("{past}_scale", factors16)
            factor = Cast<to=1>("{present}_scale")  half = Div(factor, two_)  values = Mul(stored, half)"""
        if scales
        else "values = Identity(stored)"
    )
    text = f"""<ir_version: 10, opset_import: ["" : 21]>
        counting (int64[b, s] input_ids, int64[b, t] attention_mask{", int64[b, s] position_ids" if positions else ""},
                  {kind}[b, 1, p, 1] "{past}"{scale_in})
            => (float[b, s, 11] logits, {kind}[b, 1, t, 1] "{present}"{scale_out})
        <int64 zero = {{0}}, int64 one = {{1}}, int64 two = {{2}}, int64 three = {{3}}, int64[1] axis0 = {{0}},
         float two_ = {{2.0}}, int64 eleven = {{11}}, float[2] offon = {{0.0, 5.0}},
         int64[2] inner = {{1, 3}}, int64[1] axis1 = {{1}}, int64[1] far = {{9223372036854775807}}>
        {{
            past = Cast<to=1>("{past}")
            floats = Cast<to=1>(input_ids)  entries = Unsqueeze(floats, inner)
            all = Concat<axis=2>(past, entries)
            "{present}" = Cast<to={number}>(all)
            stored = Cast<to=1>("{present}")
            {scaling}
            maskf = Cast<to=1>(attention_mask)  mask = Unsqueeze(maskf, inner)  known = Mul(values, mask)
            sums4 = CumSum(known, two)  sums = Squeeze(sums4, inner)
            news = Shape<start=1, end=2>(input_ids)  begin = Neg(news)
            tail = Slice(sums, begin, far, axis1)  tails = Cast<to=7>(tail)
            {POSITIONS if positions else OWN_POSITIONS}
            weighed = Mul(positions, three)  both = Add(tails, weighed)  next = Mod(both, eleven)
            logits = OneHot(next, eleven, offon)
        }}"""
    folder.mkdir(exist_ok=True)
    ir.save(ir.from_onnx_text(text), folder / "model.onnx")
    return folder


def counted(prompt: list[int], new: int) -> tuple[int, ...]:
    ids = list(prompt)
    for _ in range(new):
        ids.append((sum(ids) + 3 * (len(ids) - 1)) % VOCABULARY)
    return tuple(ids[len(prompt) :])


ROWS = [[3, 1, 4], [1], [5, 9, 2, 6, 5], [3, 5, 8]]


@pytest.mark.parametrize("kind", ["float", "float16", "bfloat16", "int8", "uint8", "float8e4m3fn"])
def test_caches_of_every_type(tmp_path: Path, kind: str) -> None:
    found = generate(counting(tmp_path / "m", kind), ROWS, max_new_tokens=9)
    assert written(found) == [counted(row, 9) for row in ROWS]


@pytest.mark.parametrize("names", NAMES.values(), ids=NAMES)
def test_caches_of_every_name(tmp_path: Path, names: tuple[str, str]) -> None:
    assert written(generate(counting(tmp_path / "m", names=names), ROWS, max_new_tokens=5)) == [
        counted(row, 5) for row in ROWS
    ]


def test_scales_travel_with_the_cache(tmp_path: Path) -> None:
    folder = counting(tmp_path / "m", "int8", scales=True)
    assert [cache.past.name for cache in Decoder(folder).caches] == [
        "past_key_values.0.key",
        "past_key_values.0.key_scale",
    ]
    assert written(generate(folder, ROWS, max_new_tokens=5)) == [counted(row, 5) for row in ROWS]


def test_a_model_that_counts_positions_itself_is_not_padded(tmp_path: Path) -> None:
    folder = counting(tmp_path / "m", positions=False)
    assert Decoder(folder).padding == "none"
    seen: list[tuple[int, int]] = []
    found = generate(folder, ROWS, max_new_tokens=5, on_token=lambda row, token: seen.append((row, token)))
    assert written(found) == [counted(row, 5) for row in ROWS]
    assert [entry.prompt for entry in found] == [tuple(row) for row in ROWS]
    assert [tuple(token for number, token in seen if number == row) for row in range(4)] == written(found)


def test_where_a_text_ends(tmp_path: Path) -> None:
    folder = counting(tmp_path / "m")
    want = [counted(row, 6) for row in ROWS]
    stop = want[2][1]
    cut = [ids[: ids.index(stop) + 1] if stop in ids else ids for ids in want]
    assert len({len(ids) for ids in cut}) > 1
    found = generate(folder, ROWS, max_new_tokens=6, stop=[stop])
    assert written(found) == cut
    assert [entry.finish for entry in found] == ["stop" if stop in ids else "length" for ids in want]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [stop]}))
    (folder / "config.json").write_text(json.dumps({"eos_token_id": 99, "max_position_embeddings": 7}))
    assert written(generate(folder, ROWS[2:3], max_new_tokens=6)) == cut[2:3]
    found = generate(folder, ROWS, max_new_tokens=6, stop=())
    assert [(len(entry.ids), entry.finish) for entry in found] == [
        (4, "context"),
        (6, "length"),
        (2, "context"),
        (4, "context"),
    ]
    assert written(generate(folder, ROWS[0], on_token=lambda row, token: True)) == [want[0][:1]]


def test_a_table_of_positions_bounds_a_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No configuration says how many positions a model with learned ones has; its table does."""
    rows = ",".join(map(str, range(7)))
    nodes = f"""learned = Constant<value = int64[7,1] {{{rows}}}>()  looked_up = Gather(learned, position_ids)
        last = Constant<value_ints = [-1]>()  positions = Squeeze(looked_up, last)"""
    monkeypatch.setattr(sys.modules[__name__], "POSITIONS", nodes)
    folder = counting(tmp_path / "m")
    found = generate(folder, [1, 2, 3], max_new_tokens=6, stop=())
    assert (found[0].ids, found[0].finish) == (counted([1, 2, 3], 4), "context")
    with pytest.raises(DataError, match="has 7 tokens, and the model reads at most 7"):
        generate(folder, [1] * 7)


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, "there is no prompt"),
        ([[1], []], {}, "prompt 2 is empty"),
        ([[1, 2], [3, 11]], {}, "prompt 2 holds the token id 11, which the vocabulary of the model .0 to 10. lacks"),
        ([-1], {}, "the token id -1"),
        ([0.5], {}, "must be a list of token ids"),
        ([1] * 40, {}, "has 40 tokens, and the model reads at most 40 with what it writes"),
        ([1], {"max_new_tokens": 0}, "max_new_tokens is 0"),
        ([1], {"temperature": -0.5}, "the temperature is -0.5"),
        ([1], {"temperature": 1, "top_p": 0}, "top_p is 0"),
        ([1], {"temperature": 1, "top_k": -1}, "top_k is -1"),
        ([1], {"top_k": 5}, "give a temperature above 0"),
        ([1], {"seed": -1}, "the seed is -1"),
    ],
)
def test_what_cannot_be_continued(tmp_path: Path, prompt: Any, options: dict[str, Any], message: str) -> None:
    folder = counting(tmp_path / "m")
    (folder / "config.json").write_text(json.dumps({"max_position_embeddings": 40}))
    with pytest.raises(DataError, match=message):
        generate(folder, prompt, **options)


def respelled(folder: Path, old: str, new: str) -> Path:
    model = ir.load(folder / "model.onnx")
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.name == old:
            value.name = new
    ir.save(model, folder / "model.onnx")
    return folder


def test_models_that_cannot_be_decoded(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"reads the input 'speaker'.*, which decoding cannot give"):
        Decoder(respelled(counting(tmp_path / "a"), "position_ids", "speaker"))
    folder = counting(tmp_path / "b")
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config.json cannot be read"):
        generate(folder, [1])
    (folder / "config.json").write_text('{"eos_token_id": "end"}')
    with pytest.raises(ModelError, match="gives eos_token_id as 'end'"):
        generate(folder, [1])


def paired(inputs: str, outputs: str, body: str) -> dict[str, str]:
    model = ir.from_onnx_text(f'<ir_version: 10, opset_import: ["" : 21]> g ({inputs}) => ({outputs}) {{ {body} }}')
    return {cache.past.name: cache.present for cache in find_cache_io(model, Signature(model))}


def test_pairs_by_name_and_else_by_the_graph() -> None:
    two = "float[b, 2, p, 4] past_0, float[b, 2, p, 4] past_1, float[b, 2, s, 4] x"
    join = "c = Concat<axis=2>(past_0, x)  d = Concat<axis=2>(past_1, x)"
    named = join.replace("c =", "present_0 =").replace("d =", "present_1 =")
    shapes = "float[b, 2, t, 4] {}, float[b, 2, t, 4] {}"
    assert paired(two, shapes.format("present_1", "present_0"), named) == {"past_0": "present_0", "past_1": "present_1"}
    assert paired(two, shapes.format("d", "c"), join) == {"past_0": "c", "past_1": "d"}
    unknown = named.replace("Concat<axis=2>(past_0, x)", "Max(past_0, x)")
    assert paired(two, shapes.format("present_0", "present_1"), unknown)["past_0"] == "present_0"
    with pytest.raises(ModelError, match="no output continues the cache input 'past_1'; its outputs are c"):
        paired(two, "float[b, 2, t, 4] c", join)
    with pytest.raises(ModelError, match="two cache inputs would be continued by the output 'c'"):
        paired(two, "float[b, 2, t, 4] c", "c = Concat<axis=2>(past_0, past_1, x)")
    one = "float[b, 2, p, 4] past_0, int8[b, 2, s, 4] x"
    with pytest.raises(ModelError, match="'past_0' has the type FLOAT, and its output 'present_0' INT8"):
        paired(one, "int8[b, 2, t, 4] present_0", "q = Cast<to=3>(past_0)  present_0 = Concat<axis=2>(q, x)")
    with pytest.raises(ModelError, match="does not show which axis grows"):
        paired(two.replace("b, 2, p, 4", "1, 2, 8, 4"), shapes.format("present_1", "present_0"), named)


def test_the_names_that_are_promised() -> None:
    assert qcompiler.generate is generate
    code = (
        "import sys, qcompiler; print('numpy' in sys.modules)\n"
        "import qcompiler.sessions.runtime; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
