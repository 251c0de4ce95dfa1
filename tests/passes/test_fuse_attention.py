"""fuse-attention: the operator computes what exporters spell out, at every step of decoding and for every padding."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import qcompiler
from models.export import CHECKPOINT, model_path
from passes.fuse_attention import FuseAttention
from qcompiler.driver import inputs
from qcompiler.graph.model_inputs import Signature
from qcompiler.recipes import Recipe, Step
from qcompiler.sites.attention import CachedAttention, find_cached_attention
from qcompiler.sites.attention_proof import prove
from qcompiler.statistics import StatisticsStore
from tests import tiny
from tests.there import there

VARIANTS = ("dynamo-past", "optimum")
VOCABULARY, LAYERS, KV_HEADS, HEAD_SIZE = 3072, 4, 2, 32


def loaded(variant: str) -> ir.Model:
    model, _ = inputs.load(model_path(variant))
    ir.external_data.load_to_model(model)
    return model


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request: pytest.FixtureRequest) -> tuple[ir.Model, ir.Model]:
    before = loaded(request.param)
    after = before.clone()
    changes = FuseAttention().apply(after, StatisticsStore())
    assert len(changes.changed) == LAYERS
    assert not changes.skipped
    tiny.check(after)
    pasts = [value for value in after.graph.inputs if there(value.name).startswith("past")]
    # Nothing asks a past for its length, which is that of a buffer where past and present share one.
    assert {node.op_type for value in pasts for node, _ in value.uses()} == {"GroupQueryAttention"}
    return before, after


class Decoder:
    """Runs a model step by step and keeps its cache."""

    def __init__(self, model: ir.Model) -> None:
        self.session = tiny.session(model, optimized=True)
        self.reads = [item.name for item in self.session.get_inputs()]
        self.writes = [item.name for item in self.session.get_outputs()]

    def run(self, ids: np.ndarray, mask: np.ndarray, chunks: list[int]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Logits [batch, positions, vocabulary] and the last presents; mask covers all positions."""
        batch, start = len(ids), 0
        past = {
            name: np.zeros((batch, KV_HEADS, 0, HEAD_SIZE), np.float32)
            for name in self.reads
            if name.startswith("past")
        }
        logits = []
        for count in chunks:
            end = start + count
            feed = {"input_ids": ids[:, start:end], "attention_mask": mask[:, :end], **past}
            if "position_ids" in self.reads:
                feed["position_ids"] = np.maximum(np.cumsum(mask, axis=1) - 1, 0)[:, start:end]
            found = dict(zip(self.writes, self.session.run(None, feed), strict=True))
            logits.append(found.pop("logits"))
            past = {name.replace("present", "past_key_values"): array for name, array in found.items()}
            start = end
        return np.concatenate(logits, axis=1), past


def rows(length: int, prompt: int) -> dict[str, np.ndarray]:
    whole = np.ones((3, length), np.int64)
    right, left, mixed = whole.copy(), whole.copy(), whole.copy()
    right[1, prompt - 4 : prompt] = right[2, 1:prompt] = 0
    left[1, :4] = left[2, : prompt - 1] = 0
    mixed[0, :3] = mixed[1, prompt - 5 : prompt] = mixed[2, 2:5] = 0
    return {"whole": whole, "right": right, "left": left, "mixed": mixed}


@pytest.mark.parametrize("padding", ["whole", "right", "left", "mixed"])
def test_the_same_logits_in_prefill_and_decoding(pair: tuple[ir.Model, ir.Model], padding: str) -> None:
    prompt, steps = 20, 8
    mask = rows(prompt + steps, prompt)[padding]
    ids = np.random.default_rng(0).integers(1, VOCABULARY, mask.shape)
    (wanted, cache), (got, fused) = (Decoder(model).run(ids, mask, [prompt] + [1] * steps) for model in pair)
    real = mask[..., None] != 0
    assert tiny.relative_error(np.where(real, got, 0), np.where(real, wanted, 0)) < 2e-6
    assert {name: array.shape for name, array in fused.items()} == {name: array.shape for name, array in cache.items()}
    if padding == "whole":
        assert all(tiny.relative_error(fused[name], cache[name]) < 2e-6 for name in cache)


def test_several_tokens_after_a_past(pair: tuple[ir.Model, ir.Model]) -> None:
    ids = np.random.default_rng(1).integers(1, VOCABULARY, (1, 17))
    mask = np.ones_like(ids)
    mask[:, :2] = 0
    (wanted, _), (got, _) = (Decoder(model).run(ids, mask, [6, 5, 1, 5]) for model in pair)
    assert tiny.relative_error(got[:, 2:], wanted[:, 2:]) < 2e-6


@pytest.mark.parametrize("padding", ["whole", "right"])
def test_right_padding_needs_no_order(padding: str) -> None:
    before = loaded("dynamo-past")
    after = before.clone()
    FuseAttention(padding="right").apply(after, StatisticsStore())
    assert "TopK" not in {node.op_type for node in after.graph}
    mask = rows(24, 20)[padding]
    ids = np.random.default_rng(2).integers(1, VOCABULARY, mask.shape)
    (wanted, _), (got, _) = (Decoder(model).run(ids, mask, [20, 1, 1, 1, 1]) for model in (before, after))
    real = mask[..., None] != 0
    assert tiny.relative_error(np.where(real, got, 0), np.where(real, wanted, 0)) < 2e-6


def test_past_and_present_may_share_a_longer_buffer(pair: tuple[ir.Model, ir.Model]) -> None:
    import onnxruntime as ort

    ids = np.random.default_rng(3).integers(1, VOCABULARY, (2, 9))
    mask = np.ones_like(ids)
    mask[1, :3] = 0
    wanted, _ = Decoder(pair[0]).run(ids, mask, [6, 1, 1, 1])
    decoder = Decoder(pair[1])
    shape = (2, KV_HEADS, 32, HEAD_SIZE)
    names = [name for name in decoder.reads if name.startswith("past")]
    buffers = {name: ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, np.float32)) for name in names}
    got, start = [], 0
    for count in (6, 1, 1, 1):
        end = start + count
        binding = decoder.session.io_binding()
        feed = {"input_ids": ids[:, start:end], "attention_mask": mask[:, :end],
                "position_ids": np.maximum(np.cumsum(mask, axis=1) - 1, 0)[:, start:end]}  # fmt: skip
        for name in decoder.reads:
            if name in buffers:
                binding.bind_ortvalue_input(name, buffers[name])
                binding.bind_ortvalue_output(name.replace("past_key_values", "present"), buffers[name])
            else:
                binding.bind_cpu_input(name, np.ascontiguousarray(feed[name]))
        binding.bind_output("logits")
        decoder.session.run_with_iobinding(binding)
        got.append(binding.copy_outputs_to_cpu()[-1])
        start = end
    real = mask[..., None] != 0
    assert tiny.relative_error(np.where(real, np.concatenate(got, axis=1), 0), np.where(real, wanted, 0)) < 2e-6


def test_compiled_with_its_check_it_runs(tmp_path: Path) -> None:
    recipe = Recipe(name="fused", passes=(Step(name="fuse-attention"),))
    compiled = qcompiler.compile(
        model_path("optimum"), recipe, target="ort-cpu", calibration=str(CHECKPOINT / "calibration.txt"),
        tokenizer=CHECKPOINT / "tokenizer.json", samples=2, sequence_length=32,
    )  # fmt: skip
    assert compiled.report.outputs["logits"]["sqnr_db"] > 100
    compiled.save(tmp_path / "out")
    session = qcompiler.load_session(tmp_path / "out")
    assert {item.name for item in session.get_inputs()} >= {"past_key_values.0.key", "attention_mask"}


def test_without_a_cache_it_says_so() -> None:
    changes = FuseAttention().apply(loaded("opset23"), StatisticsStore())
    assert not changes.changed
    assert len(changes.skipped) == LAYERS
    assert all("no cache" in skipped.reason for skipped in changes.skipped)


def test_names_of_caches_do_not_matter() -> None:
    model = loaded("dynamo-past")
    for value in (*model.graph.inputs, *model.graph.outputs):
        kind, *rest = str(value.name).rsplit(".", 2)
        if len(rest) == 2:  # as transformers 5 calls them
            side = "input" if kind == "past_key_values" else "output"
            value.name = f"{side}.past_key_values.layers.{rest[0]}.{rest[1]}s"
    changes = FuseAttention().apply(model, StatisticsStore())
    assert len(changes.changed) == LAYERS
    tiny.check(model)
    assert model.graph.outputs[1].name == "output.past_key_values.layers.0.keys"
    assert there(model.graph.outputs[1].producer()).op_type == "GroupQueryAttention"


def test_on_cuda_float32_is_left_alone() -> None:
    changes = FuseAttention(half_precision_only=True).apply(loaded("dynamo-past"), StatisticsStore())
    assert not changes.changed
    assert all("half precision" in skipped.reason for skipped in changes.skipped)
    recipe = Recipe(name="fused", passes=(Step(name="fuse-attention"),)).for_target("ort-cuda").resolved()
    assert recipe.passes[0].options["half_precision_only"]


def test_the_operator_of_the_builder_is_left_alone() -> None:
    changes = FuseAttention().apply(loaded("genai"), StatisticsStore())
    assert not changes.changed
    assert not changes.skipped


# ------------------------------------------------------------------------------------------- what is proved

SPELLED_OUT = """layer (int64[B,S] input_ids, int64[B,A] attention_mask,
       float[B,2,Q,8] past_key, float[B,2,Q,8] past_value,
       float[4,32] table, float[32,16] narrow, int64[4] heads, int64[4] kv_heads, int64[1] last, int64[1] third,
       int64[5] copies, int64[4] together, int64[2] inner, int64[1] zeros, int64[1] ones,
       float scale, float low, float nil)
    => (float[B,4,S,8] y, float[B,2,A,8] present_key, float[B,2,A,8] present_value) {
    x = Gather (table, input_ids)
    xk = MatMul (x, narrow)
    apart_q = Reshape (x, heads)
    apart_k = Reshape (xk, kv_heads)
    q = Transpose <perm = [0, 2, 1, 3]> (apart_q)
    k = Transpose <perm = [0, 2, 1, 3]> (apart_k)
    v = Neg (k)
    present_key = Concat <axis = 2> (past_key, k)
    present_value = Concat <axis = 2> (past_value, v)
    five_k = Unsqueeze (present_key, third)
    five_v = Unsqueeze (present_value, third)
    wide_k = Expand (five_k, copies)
    wide_v = Expand (five_v, copies)
    all_k = Reshape (wide_k, together)
    all_v = Reshape (wide_v, together)
    turned = Transpose <perm = [0, 1, 3, 2]> (all_k)
    product = MatMul (q, turned)
    scores = Mul (product, scale)
    old = Shape <start = 2, end = 3> (past_key)
    new = Shape <start = 1, end = 2> (input_ids)
    all = Add (old, new)
    begin = Squeeze (old)
    end = Squeeze (all)
    zero = Squeeze (zeros)
    one = Squeeze (ones)
    places = Range (zero, end, one)
    own = Range (begin, end, one)
    column = Unsqueeze (own, last)
    causal = LessOrEqual (places, column)
    real = Cast <to = 9> (attention_mask)
    row = Unsqueeze (real, inner)
    keep = And (causal, row)
    bias = Where (keep, nil, low)
    masked = Add (scores, bias)
    weights = Softmax <axis = -1> (masked)
    [attention] y = MatMul (weights, all_v)
}"""
CONSTANTS: dict[str, Any] = {
    "table": "normal", "narrow": "normal", "heads": np.array([0, 0, 4, 8]), "kv_heads": np.array([0, 0, 2, 8]),
    "last": np.array([-1]), "third": np.array([2]), "copies": np.array([1, 1, 2, 1, 1]),
    "together": np.array([0, 4, -1, 8]), "inner": np.array([1, 2]), "zeros": np.array([0]), "ones": np.array([1]),
    "scale": np.float32(0.3), "low": np.float32(-np.inf), "nil": np.float32(0.0),
}  # fmt: skip


def verdict(*edits: tuple[str, str], **constants: Any) -> str:
    """What is said of the attention above after some edits of its text; empty where it is proved."""
    text = SPELLED_OUT
    for old, new in edits:
        assert old in text
        text = text.replace(old, new)
    model = tiny.build(text, **{**CONSTANTS, **constants})
    (site,) = find_cached_attention(model)
    if not isinstance(site, CachedAttention):
        return site.reason
    proof = prove(model, site, Signature(model))
    return proof if isinstance(proof, str) else ""


def test_the_text_above_is_proved() -> None:
    assert verdict() == ""
    assert verdict(("keep = And (causal, row)", "keep = And (row, causal)")) == ""
    assert verdict(low=np.float32(-1e4)) == ""


@pytest.mark.parametrize(
    ("edits", "constants"),
    [
        pytest.param([("LessOrEqual (places", "Less (places")], {}, id="does not see itself"),
        pytest.param([("Range (begin, end", "Range (zero, end")], {}, id="counts queries from the start"),
        pytest.param([("keep = And (causal, row)", "keep = Or (causal, row)")], {}, id="or"),
        pytest.param([("nil, low", "low, nil")], {}, id="polarity"),
        pytest.param([], {"low": np.float32(-5.0)}, id="hides too little"),
        pytest.param([], {"nil": np.float32(0.5), "low": np.float32(-0.5)}, id="bias"),
        pytest.param([], {"third": np.array([1]), "copies": np.array([1, 2, 1, 1, 1])}, id="heads tiled, not repeated"),
        pytest.param([("[attention] y = MatMul (weights, all_v)", "[attention] y = MatMul (weights, all_k)")], {},
                     id="keys for values"),
    ],
)  # fmt: skip
def test_what_is_not_causal_attention_is_refused(edits: list[tuple[str, str]], constants: dict[str, Any]) -> None:
    assert verdict(*edits, **constants)


def test_a_window_is_seen_though_it_is_long() -> None:
    window = (
        ("float nil)", "float nil, int64 window)"),
        ("keep = And (causal, row)", "distance = Sub (column, places)\n near = Less (distance, window)\n"
         "    both = And (causal, near)\n    keep = And (both, row)"),
    )  # fmt: skip
    assert "further back" in verdict(*window, window=np.array(4096))
    assert verdict(*window, window=np.array(2**31)) == ""  # no window at all


def test_a_mask_that_depends_on_more_than_padding_is_refused() -> None:
    row = "some = Cast <to = 9> (input_ids)\n    row = Unsqueeze (some, inner)"
    assert verdict(("row = Unsqueeze (real, inner)", row)) == "its mask is computed from the input 'input_ids'"


def test_caches_that_something_else_reads_are_left_alone() -> None:
    text = SPELLED_OUT.replace("float[B,2,A,8] present_value)", "float[B,2,A,8] present_value, float[B,2,A,8] extra)")
    model = tiny.build(text.replace("five_k =", "extra = Neg (present_key)\n    five_k ="), **CONSTANTS)
    changes = FuseAttention().apply(model, StatisticsStore())
    assert [skipped.reason for skipped in changes.skipped] == ["its keys or values are read by extra, too"]


def test_heads_that_the_operator_does_not_take() -> None:
    text = (
        SPELLED_OUT.replace(",8] past", ",4] past").replace("[B,2,A,8]", "[B,2,A,4]").replace("[B,4,S,8]", "[B,4,S,4]")
    )
    sizes = {"heads": np.array([0, 0, 4, 4]), "kv_heads": np.array([0, 0, 2, 4]), "together": np.array([0, 4, -1, 4])}
    text = text.replace("float[4,32] table, float[32,16] narrow", "float[4,16] table, float[16,8] narrow")
    changes = FuseAttention().apply(tiny.build(text, **{**CONSTANTS, **sizes}), StatisticsStore())
    assert changes.skipped[0].reason == "its heads have 4 numbers, and GroupQueryAttention takes multiples of 8"


def test_half_precision() -> None:
    text = SPELLED_OUT.replace("float", "float16")
    halves = {name: np.float16(CONSTANTS[name]) for name in ("scale", "low", "nil")}
    model = tiny.build(text, **{**CONSTANTS, **halves})
    after = model.clone()
    assert FuseAttention().apply(after, StatisticsStore()).changed
    tiny.check(after)
    rng = np.random.default_rng(0)
    feed = {
        "input_ids": rng.integers(0, 4, (2, 1)), "attention_mask": np.array([[0, 1, 1, 1], [1, 1, 1, 1]]),
        "past_key": rng.normal(size=(2, 2, 3, 8)).astype(np.float16),
        "past_value": rng.normal(size=(2, 2, 3, 8)).astype(np.float16),
    }  # fmt: skip
    feed["past_key"][0, :, 0], feed["past_value"][0, :, 0] = 0, 0
    wanted = tiny.run(model, feed)[0]
    compact = {**feed, **{name: np.roll(feed[name], -1, axis=2) for name in ("past_key", "past_value")}}
    compact["past_key"][1], compact["past_value"][1] = feed["past_key"][1], feed["past_value"][1]
    assert tiny.relative_error(tiny.run(after, compact, optimized=True)[0], wanted) < 5e-3


def test_layers_that_read_a_mask_and_layers_that_do_not_are_not_fused_together() -> None:
    """The operator is told once, for all layers, how long rows are."""
    ports, body = SPELLED_OUT.rstrip().removesuffix("}").split("{", 1)
    own = {line.split(" = ")[0].split()[-1] for line in body.strip().splitlines()} | {"past_key", "past_value"}
    second = re.sub(r"\b\w+\b(?! = \d)", lambda word: f"{word[0]}_2" if word[0] in own else word[0], body)
    second = second.replace("[attention]", "[more]").replace("Where (keep_2", "Where (causal_2")
    second = "\n".join(line for line in second.splitlines() if not re.search(r"\b(keep|row|real)_2 =", line))
    pasts = "float[B,2,Q,8] past_key_2, float[B,2,Q,8] past_value_2"
    presents = "float[B,4,S,8] y_2, float[B,2,A,8] present_key_2, float[B,2,A,8] present_value_2"
    ports = ports.replace("past_value,", f"past_value, {pasts},").replace(
        "present_value)", f"present_value, {presents})"
    )
    model = tiny.build(f"{ports} {{ {body} {second} }}", **CONSTANTS)
    before = model.clone()
    changes = FuseAttention().apply(model, StatisticsStore())
    assert [changed.site for changed in changes.changed] == ["attention"]
    assert tiny.reasons(changes) == {"more": "some layers read attention_mask and some do not"}
    rng = np.random.default_rng(0)
    pasts_of = {name: rng.normal(size=(2, 2, 3, 8)).astype(np.float32) for name in ("past_key", "past_value")}
    feed: dict[str, np.ndarray] = {**pasts_of, **{f"{name}_2": array for name, array in pasts_of.items()}}
    feed |= {"input_ids": rng.integers(0, 4, (2, 1)), "attention_mask": np.ones((2, 4), np.int64)}
    for got, wanted in zip(tiny.run(model, feed, optimized=True), tiny.run(before, feed), strict=True):
        assert tiny.relative_error(got, wanted) < 2e-6


ATTENDING = """layer (FLOAT[B,4,S,8] q, FLOAT[B,2,S,8] k, FLOAT[B,2,S,8] v, FLOAT[B,2,P,8] past_k,
    FLOAT[B,2,P,8] past_v, float half) => (FLOAT[B,4,S,8] y, FLOAT[B,2,T,8] present_k, FLOAT[B,2,T,8] present_v) {
    [attention] y, present_k, present_v = Attention (q, k, v, , past_k, past_v) }"""


def of_the_operator(*edits: tuple[str, str], dtype: str = "float") -> str:
    """Why the standard operator with a cache of its own is not taken; empty where its structure is."""
    text = ATTENDING
    for old, new in edits:
        assert old in text
        text = text.replace(old, new)
    (site,) = find_cached_attention(tiny.build(text.replace("FLOAT", dtype), opset=24, half=np.float32(0.5)))
    return "" if isinstance(site, CachedAttention) else site.reason


def test_the_standard_operator_is_recognised() -> None:
    assert of_the_operator() == ""
    assert of_the_operator(dtype="float16") == ""


@pytest.mark.parametrize(("edits", "dtype", "reason"), [
    ([("Attention (", "Attention <softcap = 5.0> (")], "float", "it caps its scores (softcap)"),
    ([("y, present_k, present_v = Attention (q, k, v, , past_k, past_v)", "y = Attention (q, k)")], "float",
     "it lacks an input"),
    ([("past_v) }", "past_v, counts) }"), ("float half", "float half, int64[B] counts")], "float",
     "it is told how many positions of its keys count (nonpad_kv_seqlen), and no cache says so"),
    ([("present_v = Attention", "present_v, s = Attention"), ("present_v) {", "present_v, FLOAT[B,4,S,T] s) {")],
     "float", "its scores are read by something else, too"),
    ([("[attention] y, present_k, present_v = Attention (q, k, v, , past_k, past_v)",
       "present_k = Concat <axis = 2> (past_k, k) present_v = Concat <axis = 2> (past_v, v)"
       " scaled = Mul (present_k, half) [attention] y = Attention (q, scaled, present_v)")], "float",
     "its keys or values are scaled between the cache and the operator"),
    ([("FLOAT[B,2,P,8] past_v", "FLOAT[B,1,P,8] past_v")], "float",
     "its keys and values have other numbers of heads or other head sizes"),
    ([("FLOAT[B,2,P,8] past_v", "FLOAT[B,H,P,8] past_v"), ("FLOAT[B,2,P,8] past_k", "FLOAT[B,H,P,8] past_k")],
     "float", "the shapes do not say how many heads it has, or how large they are"),
    ([("FLOAT[B,4,S,8] q", "FLOAT[B,3,S,8] q")], "float",
     "its 3 heads of queries cannot share 2 of keys and values evenly"),
    ([], "double", "it computes in DOUBLE"),
    ([("FLOAT[B,2,S,8] k", "float16[B,2,S,8] k")], "float", "queries, keys, values and cache are not of one type"),
])  # fmt: skip
def test_what_the_standard_operator_does_that_the_kernel_does_not(
    edits: list[tuple[str, str]], dtype: str, reason: str
) -> None:
    assert of_the_operator(*edits, dtype=dtype) == reason


@pytest.mark.parametrize(("edits", "reason"), [
    ([("Softmax <axis = -1>", "Softmax <axis = 1>")], "its Softmax is not over the last axis"),
    ([("wide_v = Expand (five_v, copies)", "loud = Mul (five_v, scale) wide_v = Expand (loud, copies)")],
     "its values are scaled between the cache and the product with them"),
    ([("[attention] y", "extra = Neg (weights) [attention] y"),
      ("present_value) {", "present_value, float[B,4,S,A] extra) {")],
     "its attention weights are read by something else, too"),
    ([("Softmax <axis = -1> (masked)", "Softmax <axis = -1> (given)"),
      ("float nil)", "float nil, float[B,4,S,A] given)")], "its scores are an input of the graph"),
    ([("Add (scores, bias)", "Add (scores, product)")], "two products are added to its scores"),
    ([("Add (scores, bias)", "Sub (scores, bias)")], "Sub stands between its scores and its Softmax"),
    ([("MatMul (weights, all_v)", "MatMul (weights, all_k)")], "its keys and values are the same cache"),
    ([("input_ids", "tokens")], "the model has none of the inputs "),
    ([("Mul (product, scale)", "Mul (product, temperature)"), ("float scale,", "float scale, float temperature,")],
     "its scale depends on the data"),
    ([("int64[B,A] attention_mask", "int64[B,A,C] attention_mask")],
     "the input 'attention_mask' has a shape in which it could not be run"),
    ([("int64[B,A] attention_mask", "int64[B,S] attention_mask")],
     "the size 'S' of the input 'attention_mask' is another's, too"),
    ([("keep = And (causal, row)", "odd = Reshape (row, heads) keep = And (causal, odd)")], "it cannot be run apart ("),
    ([("keep = And (causal, row)", "keep = And (causal, old)")], "it cannot be loaded apart ("),
])  # fmt: skip
def test_why_attention_that_is_spelled_out_stays(edits: list[tuple[str, str]], reason: str) -> None:
    assert verdict(*edits).startswith(reason)


def test_a_cache_that_is_an_output_under_another_form_is_left_alone() -> None:
    text = SPELLED_OUT.replace("float[B,2,A,8] present_value)", "float[B,2,A,8] present_value, float[B,2,A,8] turned)")
    text = text.replace("turned = Transpose <perm = [0, 1, 3, 2]>", "turned = Transpose <perm = [0, 1, 3, 2]>")
    changes = FuseAttention().apply(tiny.build(text, **CONSTANTS), StatisticsStore())
    assert [skipped.reason for skipped in changes.skipped] == [
        "its keys or values are read by the graph's outputs, too"
    ]


def test_a_mask_of_weights_and_of_unknown_operators_is_refused() -> None:
    learned = [("bias = Where (keep, nil, low)", "first = Where (keep, nil, low) bias = Add (first, learned)"),
               ("float nil)", "float nil, float[1,70000] learned)")]  # fmt: skip
    assert verdict(*learned, learned="zeros") == "its mask depends on the weights 'learned'"
    model = tiny.build(SPELLED_OUT, **CONSTANTS)
    (both,) = (node for node in model.graph if node.op_type == "And")
    both.domain = "elsewhere"
    (site,) = find_cached_attention(model)
    assert isinstance(site, CachedAttention)
    assert prove(model, site, Signature(model)) == "its mask is computed by And, which is not known"


def test_a_result_of_another_shape_is_refused() -> None:
    """The mask brings a dimension of its own."""
    told = "its result has the shape [3, 3, 4, 5, 8] where [3, 4, 5, 8] was expected"
    assert verdict(inner=np.array([1, 2, 3])) == told


def test_a_cache_with_positions_before_heads_is_refused() -> None:
    model = tiny.build(
        """layer (float[B,4,S,8] q, float[B,S,2,8] k, float[B,S,2,8] v, float[B,P,2,8] past_key,
            float[B,P,2,8] past_value) => (float[B,4,S,8] y, float[B,T,2,8] present_key, float[B,T,2,8] present_value) {
        present_key = Concat <axis = 1> (past_key, k)  present_value = Concat <axis = 1> (past_value, v)
        all_k = Transpose <perm = [0, 2, 1, 3]> (present_key)  all_v = Transpose <perm = [0, 2, 1, 3]> (present_value)
        y = Attention (q, all_k, all_v) }""",
        opset=24,
    )
    (site,) = find_cached_attention(model)
    assert not isinstance(site, CachedAttention)
    assert site.reason == "its cache does not lie as [batch, heads, positions, head size]"
