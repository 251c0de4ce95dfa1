"""Perplexity and divergence are those of the definitions, on models with and without a cache."""

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from qcompiler import load_session
from qcompiler.calibration.samples import from_python, open_samples
from qcompiler.errors import DataError, ModelError
from qcompiler.evaluation.evaluate import Steps, evaluate
from qcompiler.graph.metadata import DISABLED_OPTIMIZERS, SESSION_OPTIONS
from qcompiler.sessions.runtime import one_line, session_options_of
from tests import tiny
from tests.oracles.difference import sqnr_db
from tests.there import there

VOCABULARY = 9
Text = tuple[Path, np.ndarray]


def saved(
    folder: Path, noise: float = 0.0, vocabulary: int = VOCABULARY, past: bool = False,
    metadata: dict[str, str] | None = None,
) -> tuple[Path, np.ndarray]:  # fmt: skip
    """A bigram model: logits[t] depend on ids[t] alone. With `past` it also has a cache, which it hands on longer."""
    cache = ', float[b, 1, p, 2] "past_key_values.0.key"' if past else ""
    present = ', float[b, 1, total, 2] "present.0.key"' if past else ""
    model = ir.from_onnx_text(
        f"""<ir_version: 10, opset_import: ["" : 21]>
        lm (int64[b, s] input_ids{cache}) => (float[b, s, v] logits{present})
        <float[{vocabulary}, {vocabulary}] table = {{{", ".join("0" for _ in range(vocabulary**2))}}}>
        {{
            logits = Gather (table, input_ids)
            {'"present.0.key" = Identity ("past_key_values.0.key")' if past else ""}
        }}"""
    )
    table = np.random.default_rng(0).standard_normal((vocabulary, vocabulary)).astype(np.float32)
    table += noise * np.random.default_rng(1).standard_normal(table.shape).astype(np.float32)
    model.graph.initializers["table"].const_value = ir.tensor(table, name="table")
    model.metadata_props.update(metadata or {})
    folder.mkdir(exist_ok=True)
    ir.save(model, folder / "model.onnx")
    return folder, table


@pytest.fixture
def text(tmp_path: Path) -> tuple[Path, np.ndarray]:
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    ids = np.random.default_rng(3).integers(0, VOCABULARY, 25)
    (tmp_path / "t.txt").write_text(" ".join(f"w{i}" for i in ids))
    return tmp_path / "t.txt", ids


def log_probabilities(table: np.ndarray) -> np.ndarray:
    p = np.exp(table.astype(np.float64))
    return np.asarray(np.log(p / p.sum(-1, keepdims=True)))


@pytest.mark.parametrize("past", [False, True])
def test_perplexity_over_windows_of_the_whole_text(tmp_path: Path, text: Text, past: bool) -> None:
    file, ids = text
    folder, table = saved(tmp_path / "m", past=past)
    found = evaluate(folder, str(file), tokenizer=tmp_path, sequence_length=10)
    windows = [ids[0:10], ids[10:20], ids[20:25]]
    nll = [-log_probabilities(table)[a, b] for w in windows for a, b in pairwise(w)]
    assert (found.samples, found.tokens) == (3, 22)
    assert found.nll == pytest.approx(np.mean(nll), rel=1e-6)
    assert found.perplexity == pytest.approx(math.exp(np.mean(nll)), rel=1e-6)
    assert found.to_dict().keys() == {"samples", "tokens", "nll", "perplexity"}
    assert evaluate(folder / "model.onnx", str(file), tokenizer=tmp_path, sequence_length=10, limit=1).tokens == 9


def test_against_a_reference(tmp_path: Path, text: Text) -> None:
    file, ids = text
    reference, p = saved(tmp_path / "float")
    candidate, q = saved(tmp_path / "int8", noise=0.3, past=True)
    found = evaluate(candidate, str(file), reference=reference, tokenizer=tmp_path, sequence_length=10)
    one, other = log_probabilities(p)[ids], log_probabilities(q)[ids]
    assert found.kl == pytest.approx((np.exp(one) * (one - other)).sum(-1).mean(), rel=1e-5)
    assert found.top1 == pytest.approx((one.argmax(-1) == other.argmax(-1)).mean())
    x, y = p[ids].ravel().astype(np.float64), q[ids].ravel().astype(np.float64)
    assert found.cosine == pytest.approx(x @ y / np.linalg.norm(x) / np.linalg.norm(y), rel=1e-6)
    assert found.sqnr_db == pytest.approx(sqnr_db(p[ids], q[ids]), rel=1e-5)
    assert found.perplexity_ratio == pytest.approx(found.perplexity / there(found.reference_perplexity))
    same = evaluate(reference, str(file), reference=reference, tokenizer=tmp_path, sequence_length=10)
    assert (same.kl, same.top1, same.perplexity_ratio, same.sqnr_db) == (0, 1, 1, math.inf)


SLOPE = 0.1


def forgetful(folder: Path, slope: float) -> tuple[Path, np.ndarray]:
    """The bigram model with a cache that does harm: each position in it adds `slope` to the logit of token 0."""
    folder, table = saved(folder)
    model = ir.from_onnx_text(
        f"""<ir_version: 10, opset_import: ["" : 21]>
        lm (int64[b, s] input_ids, int64[b, t] attention_mask, int8[b, 1, p, 1] "past_key_values.0.key")
            => (float[b, s, {VOCABULARY}] logits, int8[b, 1, t, 1] "present.0.key")
        <float[{VOCABULARY}, {VOCABULARY}] table = {{{", ".join("0" for _ in range(VOCABULARY**2))}}},
         float[{VOCABULARY}] push = {{{", ".join([str(slope), *"0" * (VOCABULARY - 1)])}}},
         int64[2] inner = {{1, 3}}> {{
            exact = Gather(table, input_ids)
            sizes = Shape<start=2, end=3>("past_key_values.0.key")  size = Cast<to=1>(sizes)  harm = Mul(push, size)
            logits = Add(exact, harm)
            ids = Cast<to=3>(input_ids)  new = Unsqueeze(ids, inner)
            "present.0.key" = Concat<axis=2>("past_key_values.0.key", new) }}"""
    )
    model.graph.initializers["table"].const_value = ir.tensor(table, name="table")
    ir.save(model, folder / "model.onnx")
    return folder, table


@pytest.mark.parametrize(("chunk", "prefill"), [(1, None), (4, None), (3, 5), (1, 50)])
def test_decoding_sees_what_the_cache_does(tmp_path: Path, text: Text, chunk: int, prefill: int | None) -> None:
    file, ids = text
    harmed, table = forgetful(tmp_path / "harmed", SLOPE)
    exact, _ = forgetful(tmp_path / "exact", 0)
    found = evaluate(
        harmed, str(file), reference=exact, tokenizer=tmp_path, sequence_length=10, decode=Steps(chunk, prefill)
    )
    first = prefill or chunk
    nll, kl = [], []
    for window in (ids[0:10], ids[10:20], ids[20:25]):
        begins = [0 if place < first else place - (place - first) % chunk for place in range(len(window))]
        logits = table[window].astype(np.float64)
        logits[:, 0] += SLOPE * np.array(begins)
        wanted, other = log_probabilities(logits), log_probabilities(table)[window]
        nll += [-wanted[place, window[place + 1]] for place in range(len(window) - 1)]
        kl += (np.exp(other) * (other - wanted)).sum(-1).tolist()
    assert found.nll == pytest.approx(np.mean(nll), rel=1e-5)
    assert found.kl == pytest.approx(np.mean(kl), rel=1e-4, abs=1e-9)
    whole = evaluate(harmed, str(file), reference=exact, tokenizer=tmp_path, sequence_length=10)
    assert whole.kl == pytest.approx(0, abs=1e-9)
    assert found.reference_perplexity == pytest.approx(whole.reference_perplexity)


def test_decoding_leaves_padding_out(tmp_path: Path) -> None:
    harmed, table = forgetful(tmp_path / "m", SLOPE)
    ids = np.random.default_rng(4).integers(0, VOCABULARY, (2, 6))
    mask = np.ones_like(ids)
    mask[0, :2] = mask[1, 4:] = 0
    rows = [ids[0, 2:], ids[1, :4]]
    logits = [table[row] + SLOPE * np.outer(np.arange(4), np.eye(VOCABULARY)[0]) for row in rows]
    nll = [
        -log_probabilities(scores)[place, row[place + 1]]
        for row, scores in zip(rows, logits, strict=True)
        for place in range(3)
    ]
    samples = from_python([{"input_ids": ids, "attention_mask": mask}], model=ir.load(harmed / "model.onnx"))
    found = evaluate(harmed, samples, decode=Steps())
    assert found.tokens == 6
    assert found.nll == pytest.approx(np.mean(nll), rel=1e-5)


def test_padding_counts_for_neither_model(tmp_path: Path) -> None:
    folder, table = forgetful(tmp_path / "m", 0)
    ids = np.random.default_rng(4).integers(0, VOCABULARY, (2, 6))
    mask = np.ones_like(ids)
    mask[0, 4:] = 0
    samples = from_python([{"input_ids": ids, "attention_mask": mask}], model=ir.load(folder / "model.onnx"))
    found = evaluate(folder, samples, reference=folder)
    nll = [-log_probabilities(table)[a, b] for row in (ids[0, :4], ids[1]) for a, b in pairwise(row)]
    assert (found.tokens, found.perplexity_ratio) == (8, 1)
    assert found.reference_perplexity == pytest.approx(math.exp(np.mean(nll)), rel=1e-5)


def test_decoding_without_a_cache_and_with_a_past_in_the_data(tmp_path: Path, text: Text) -> None:
    file, _ = text
    folder, _ = saved(tmp_path / "m")
    with pytest.warns(UserWarning, match="has no cache"):
        found = evaluate(folder, str(file), tokenizer=tmp_path, sequence_length=10, decode=Steps(4))
    assert found == evaluate(folder, str(file), tokenizer=tmp_path, sequence_length=10)
    harmed, _ = forgetful(tmp_path / "harmed", SLOPE)
    sample = {"input_ids": np.array([[1, 2, 3]]), "past_key_values.0.key": np.zeros((1, 1, 2, 1), np.int8)}
    samples = from_python([sample], model=ir.load(harmed / "model.onnx"))
    with pytest.raises(DataError, match="sample 0 has a past of its own"):
        evaluate(harmed, samples, decode=Steps())
    with pytest.raises(DataError, match="in steps of 1 token or more"):
        evaluate(harmed, str(file), tokenizer=tmp_path, decode=Steps(0))


def test_samples_that_are_opened_already_and_the_tokenizer_beside_the_model(tmp_path: Path, text: Text) -> None:
    file, _ = text
    folder, _ = saved(tmp_path / "m")
    (tmp_path / "tokenizer.json").rename(folder / "tokenizer.json")
    found = evaluate(folder, str(file), sequence_length=10)
    samples = open_samples(
        str(file),
        model=ir.load(folder / "model.onnx"),
        tokenizer=folder,
        sequence_length=10,
        contiguous=True,
        limit=None,
    )
    assert evaluate(folder, samples) == found


def test_what_cannot_be_evaluated(tmp_path: Path, text: Text) -> None:
    file, _ = text
    folder, _ = saved(tmp_path / "m")
    other, _ = saved(tmp_path / "wide", vocabulary=VOCABULARY + 1)
    with pytest.raises(ModelError, match="the models have different vocabularies"):
        evaluate(folder, str(file), reference=other, tokenizer=tmp_path)
    (tmp_path / "short.jsonl").write_text(json.dumps({"input_ids": [1]}))
    with pytest.raises(DataError, match="has no sample of two tokens or more"):
        evaluate(folder, str(tmp_path / "short.jsonl"))
    (tmp_path / "wrong.jsonl").write_text(json.dumps({"input_ids": [VOCABULARY]}))
    with pytest.raises(DataError, match="the token id 9, and the model's vocabulary has 9"):
        evaluate(folder, str(tmp_path / "wrong.jsonl"))
    with pytest.raises(ModelError, match="does not exist"):
        evaluate(tmp_path / "absent", str(file))
    model = ir.load(folder / "model.onnx")
    for node in model.graph:
        node.outputs[0].name = "scores"
    model.graph.outputs[0].shape = None
    ir.save(model, folder / "model.onnx")
    with pytest.raises(ModelError, match="no output is called 'logits'; its outputs are scores"):
        evaluate(folder, str(file), tokenizer=tmp_path)


def test_a_session_takes_the_options_that_the_model_records(tmp_path: Path) -> None:
    metadata = {
        SESSION_OPTIONS: json.dumps({"session.qdqisint8allowed": "1"}),
        DISABLED_OPTIMIZERS: json.dumps(["MatMulNBitsFusion"]),
    }
    folder, _ = saved(tmp_path / "m", metadata=metadata)
    recorded = session_options_of(ir.load(folder / "model.onnx"))
    assert recorded.config_entries == {"session.qdqisint8allowed": "1"}
    assert recorded.disabled_optimizers == ("MatMulNBitsFusion",)
    session = load_session(folder, threads=1)
    options = session.get_session_options()
    assert options.get_session_config_entry("session.qdqisint8allowed") == "1"
    assert options.intra_op_num_threads == 1
    assert session.get_providers() == ["CPUExecutionProvider"]


@pytest.mark.parametrize("disabled", [[], ["ConstantFolding"]])
def test_a_disabled_optimizer_does_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, disabled: list[str]
) -> None:
    """ONNX Runtime folds the sum of two constants, unless the model says that it must not."""
    import onnxruntime as ort

    model = tiny.build("g (float[8] x, float[8] a, float[8] b) => (float[8] y) { c = Add(a, b) y = Mul(x, c) }",
                       a="normal", b="normal")  # fmt: skip
    model.metadata_props[DISABLED_OPTIMIZERS] = json.dumps(disabled)
    ir.save(model, tmp_path / "model.onnx")
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    monkeypatch.setattr("onnxruntime.SessionOptions", lambda: options)
    load_session(tmp_path / "model.onnx")
    assert ("Add" in tiny.operators(ir.load(tmp_path / "optimized.onnx"))) is bool(disabled)


@pytest.mark.parametrize(
    ("metadata", "providers", "message"),
    [
        ({SESSION_OPTIONS: "{"}, None, "is not JSON"),
        ({DISABLED_OPTIMIZERS: "{}"}, None, "where a list is due"),
        ({}, ["NoSuchProvider"], "this onnxruntime has no NoSuchProvider"),
    ],
)
def test_a_session_that_cannot_be_opened(
    tmp_path: Path, metadata: dict[str, Any], providers: list[str] | None, message: str
) -> None:
    folder, _ = saved(tmp_path / "m", metadata=metadata)
    with pytest.raises(ModelError, match=message):
        load_session(folder, providers=providers)


ODD: list[tuple[str, str]] = [
    (SESSION_OPTIONS, json.dumps({"session.collect_node_memory_stats_to_file": "VICTIM"})),
    (SESSION_OPTIONS, json.dumps({"session.node_partition_config_file": "VICTIM"})),
    (SESSION_OPTIONS, json.dumps({"optimization.minimal_build_optimizations": "save"})),
    (SESSION_OPTIONS, json.dumps({"": "1"})),
    (SESSION_OPTIONS, json.dumps({"session.qdqisint8allowed": ""})),
    (SESSION_OPTIONS, json.dumps({"session.qdqisint8allowed": {"a": 1}})),
    (SESSION_OPTIONS, json.dumps({"session.qdqisint8allowed": "1" * 5000})),
    (SESSION_OPTIONS, json.dumps({"\ud800": "1"})),
    (SESSION_OPTIONS, json.dumps({"\x1b[2J": "1"})),
    (SESSION_OPTIONS, ""),
    (SESSION_OPTIONS, "[" * 100_000),
    (SESSION_OPTIONS, '{"session.qdqisint8allowed": ' + "9" * 5000 + "}"),
    (DISABLED_OPTIMIZERS, json.dumps([["a"]])),
    (DISABLED_OPTIMIZERS, json.dumps(["\ud800"])),
    (DISABLED_OPTIMIZERS, "[" * 100_000),
]


@pytest.mark.parametrize(("key", "text"), ODD)
def test_a_strangers_model_sets_no_options(tmp_path: Path, key: str, text: str) -> None:
    """Session options of onnxruntime can write files: those that our targets write are taken, and no other."""
    victim = tmp_path / "victim.txt"
    victim.write_text("precious")
    folder, _ = saved(tmp_path / "m", metadata={key: text.replace("VICTIM", str(victim))})
    with pytest.raises(ModelError, match=key) as caught:
        load_session(folder)
    assert len(str(caught.value)) < 400
    assert str(caught.value).isprintable()
    assert victim.read_text() == "precious"


def test_a_model_that_onnxruntime_refuses(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path / "m")
    model = ir.load(folder / "model.onnx")
    model.graph.inputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    ir.save(model, folder / "model.onnx")
    with pytest.raises(ModelError, match=r"onnxruntime cannot open .*Type Error") as caught:
        load_session(folder)
    assert "\n" not in str(caught.value)


def test_errors_of_onnxruntime_become_one_clause() -> None:
    raw = (
        "[ONNXRuntimeError] : 1 : FAIL : Non-zero status code returned while running MatMul node. Name:'a/b' "
        "Status Message: /onnxruntime_src/onnxruntime/core/providers/cpu/math/matmul_helper.h:144 "
        "onnxruntime::common::Status onnxruntime::MatMulComputeHelper::Compute(const onnxruntime::TensorShape&, bool) "
        "MatMul dimension mismatch\n"
    )
    assert one_line(RuntimeError(raw)) == "node 'a/b' (MatMul) failed: MatMul dimension mismatch"
