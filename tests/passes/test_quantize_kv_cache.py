"""quantize-kv-cache: caches hold codes, attention reads what they stand for, and nothing else changes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
import pytest

import qcompiler
from passes.quantize_kv_cache import QuantizeKvCache
from qcompiler.calibration.samples import from_python
from qcompiler.calibration.stored_past import Adapted
from qcompiler.errors import DataError, RecipeError, SchemeError
from qcompiler.evaluation.compare import compare
from qcompiler.formats.scheme import Scheme
from qcompiler.graph.rewriter import Rewriter
from qcompiler.recipes import Recipe, Step
from qcompiler.report import Report
from qcompiler.rewriting.cache_storage import Coder, Storage
from qcompiler.rewriting.contract import Changes
from qcompiler.sites.caches import Cache, find_caches
from qcompiler.statistics import HeadRange, StatisticsStore
from tests import decoders, tiny
from tests.oracles import kv_cache as oracle
from tests.there import held, numpy_type, there

FORMS = ("concat", "attention", "attention-past")
SCHEMES: dict[str, dict[str, Any]] = {
    "int8": {},
    "int8, not normalized": {"normalize": False},
    "int8, static": {"key_granularity": "channel", "value_granularity": "tensor"},
    "int8, KIVI": {"key_granularity": "channel", "value_granularity": "token"},
    "int4": {"format": "int4"},
    "int4, asymmetric": {"format": "int4", "symmetric": False},
    "int4, static": {"format": "int4", "key_granularity": "channel", "value_granularity": "channel"},
    "int4, float32 scales": {"format": "int4", "scale_dtype": "float32", "normalize": False},
}


def build(form: str = "concat", **given: Any) -> ir.Model:
    return decoders.build(form, opset=21 if form == "concat" else 24, **given)


def quantize(model: ir.Model, **options: Any) -> tuple[ir.Model, Changes]:
    after = model.clone()
    step = QuantizeKvCache(**options)
    return after, tiny.compile(after, [step], decoders.calibration(model))[0]


def simulated(model: ir.Model, step: QuantizeKvCache) -> dict[str, oracle.Cache]:
    """The caches of the simulation, calibrated on the same windows."""
    seen: dict[str, list[np.ndarray]] = {}
    for sample in decoders.calibration(model):
        for name, array in decoders.Simulation(model).read(sample["x"])[1].items():
            seen.setdefault(name, []).append(array)
    found = {}
    for name, arrays in seen.items():
        calibrated, role = np.concatenate(arrays), name.rpartition(".")[2]
        granularity = (step.key_granularity if role == "key" else step.value_granularity) or "token"
        cache = oracle.Cache(step.format, symmetric=step.symmetric, scale_dtype=step.scale_dtype)
        if granularity != "token":
            cache.scale = oracle.static_scale(calibrated, step.format, granularity)
        elif role == "key" and step.normalize:
            cache.center, cache.reach = oracle.center_and_reach(calibrated)
        found[name] = cache
    return found


def decode(reader: decoders.Reader, x: np.ndarray, prefill: int = 5) -> np.ndarray:
    """What the model answers to a text that it reads in steps."""
    steps = [x[:, :prefill], *(x[:, i : i + 1] for i in range(prefill, x.shape[1]))]
    return np.concatenate([reader.read(step) for step in steps], 1)


# --------------------------------------------------------------------------------------------- against the simulation


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("form", FORMS)
def test_prefill_and_decoding_equal_the_simulation(form: str, scheme: str) -> None:
    model = build(form)
    step = QuantizeKvCache(**SCHEMES[scheme])
    after, _ = quantize(model, **SCHEMES[scheme])
    x = decoders.text(7, 12)
    reader, caches = decoders.Reader(after, len(x)), simulated(model, step)
    got = decode(reader, x)
    expected, floats = decoders.Simulation(model).read(x, caches)

    differing = 0.0
    for name, cache in caches.items():
        stored = reader.caches[f"past_key_values.{name}"]
        assert stored.dtype == (np.uint8 if step.format == "int4" else np.int8)
        codes = oracle.unpacked(stored) if step.format == "int4" else stored
        wanted, scale, _ = cache.encode(floats[name])
        assert np.abs(codes - wanted).max() <= 1
        differing = max(differing, float((codes != wanted).mean()))
        if f"past_key_values.{name}_scale" in reader.caches:
            np.testing.assert_allclose(reader.caches[f"past_key_values.{name}_scale"], scale, rtol=2e-3)
    assert differing <= 0.01  # ties, which float32 and float64 break differently
    assert tiny.relative_error(got, expected) < (0.01 if differing else 1e-5)
    plain, _ = decoders.Simulation(model).read(x)
    assert tiny.relative_error(got, plain) > (0.01 if step.format == "int4" else 3e-4)


@pytest.mark.parametrize("dtype", ["float", "float16"])
@pytest.mark.parametrize("repeat", [1, 4])
@pytest.mark.parametrize("format", ["int8", "int4"])
def test_heads_types_and_names(format: str, repeat: int, dtype: str) -> None:
    model = build(repeat=repeat, dtype=dtype, names="transformers", layers=2)
    after, changes = quantize(model, format=format)
    assert len(changes.changed) == 4
    x = decoders.text(3, 9)
    got = decode(decoders.Reader(after, len(x)), x)
    expected = decode(decoders.Reader(model, len(x)), x)
    assert 0 < tiny.relative_error(got, expected) < (0.02 if format == "int8" else 0.2)
    kept = {value.name: value for value in after.graph.inputs}
    assert kept["input.past_key_values.layers.1.keys"].dtype == (
        ir.DataType.INT8 if format == "int8" else ir.DataType.UINT8
    )
    assert kept["input.past_key_values.layers.1.keys_scale"].dtype == ir.DataType.FLOAT16


@pytest.mark.parametrize("scheme", ["int8", "int4, asymmetric", "int4, static"])
def test_a_cache_of_fixed_size(scheme: str) -> None:
    """TensorScatter writes codes, and scales beside them, to their places."""
    room = 10
    model = build("scatter", room=room)
    samples = [sample | {"at": np.zeros(2, np.int64)} for sample in decoders.calibration(model, length=room)]
    after = model.clone()
    tiny.compile(after, [QuantizeKvCache(**SCHEMES[scheme])], samples)
    x, answers = decoders.text(5, 8), []
    for subject in (model, after):
        reader, found = decoders.Reader(subject, len(x)), []
        for start, stop in ((0, 4), (4, 5), (5, 8)):
            rows = np.arange(start, stop)
            at = np.full(2, start, np.int64)
            found.append(reader.read(x[:, start:stop], bias=decoders.causal(rows, room), at=at))
        answers.append(np.concatenate(found, 1))
    assert 0 < tiny.relative_error(answers[1], answers[0]) < (0.02 if scheme == "int8" else 0.2)


@pytest.mark.parametrize("scheme", ["int8", "int4, asymmetric", "int8, static"])
def test_a_row_padded_on_the_left_gives_what_it_gives_alone(scheme: str) -> None:
    after, _ = quantize(build(layers=2), **SCHEMES[scheme])
    x = decoders.text(9, 11)
    padding = np.array([0, 4])
    alone = decode(decoders.Reader(after, 1), x[1:, 4:], prefill=3)
    together = decoders.Reader(after, 2)
    found = []
    for start, stop in ((0, 7), *((i, i + 1) for i in range(7, 11))):
        rows, keys = np.arange(start, stop), np.arange(stop)
        allowed = (keys[None, None] <= rows[None, :, None]) & (keys[None, None] >= padding[:, None, None])
        bias = np.where(allowed, 0.0, -1e4)[:, None]
        found.append(together.read(x[:, start:stop], np.maximum(rows - padding[:, None], 0), bias))
    np.testing.assert_allclose(np.concatenate(found, 1)[1:, 4:], alone, atol=1e-5)


@pytest.mark.parametrize("scheme", ["int8", "int4, asymmetric", "int4, static"])
def test_a_thousand_steps_give_what_reading_at_once_gives(scheme: str) -> None:
    """The caches of the second layer depend on what the first one read from its own."""
    after, _ = quantize(build(layers=2), **SCHEMES[scheme])
    x = decoders.text(11, 1010, batch=1)
    stepwise, at_once = decoders.Reader(after, 1), decoders.Reader(after, 1)
    got = decode(stepwise, x, prefill=10)
    expected = at_once.read(x)
    errors = np.abs(got - expected).max((0, 2))
    # Now and then a code is a tie that two orders of summation break differently; what counts is that none adds up.
    assert np.median(errors) < 1e-4
    assert errors[-200:].mean() < 3 * errors[:200].mean() + 1e-4
    for name, stored in stepwise.caches.items():
        assert np.mean(stored != at_once.caches[name]) < 5e-3


@pytest.mark.parametrize("granularity", ["tensor", "channel", None])
@pytest.mark.parametrize("format", ["int8", "int4"])
def test_the_operator_that_keeps_its_own_cache(
    format: Literal["int8", "int4"], granularity: Literal["tensor", "channel"] | None
) -> None:
    """GroupQueryAttention quantizes and reads it; left open, scales are static for each channel."""
    model = build("fused")
    step = QuantizeKvCache(format=format, key_granularity=granularity, value_granularity=granularity)
    static = QuantizeKvCache(format=format, key_granularity=granularity or "channel",
                             value_granularity=granularity or "channel")  # fmt: skip
    after = model.clone()
    (changes,) = tiny.compile(after, [step], decoders.calibration(model))
    assert [there(changed.cache).after for changed in changes.changed] == ["uint8" if format == "int4" else "int8"] * 2
    x, caches = decoders.text(7, 12), simulated(model, static)
    expected, floats = decoders.Simulation(model).read(x, caches)
    reader = decoders.Reader(after, len(x))
    differing = 0.0
    got = decode(reader, x)
    for name, cache in caches.items():
        stored = reader.caches[f"past_key_values.{name}"]
        codes = oracle.unpacked(stored) if format == "int4" else stored
        differing = max(differing, float(np.mean(codes != cache.encode(floats[name])[0])))
    assert differing <= 0.01
    assert tiny.relative_error(got, expected) < (0.01 if differing else 1e-5)


def test_the_operator_that_keeps_its_own_cache_takes_no_scales_per_token() -> None:
    after, changes = quantize(build("fused"), key_granularity="token")
    assert len(changes.skipped) == 2
    assert all("token" in skip.reason for skip in changes.skipped)
    assert {value.dtype for value in after.graph.inputs if "past" in there(value.name)} == {ir.DataType.FLOAT}


# -------------------------------------------------------------------------------------------------------- calibration


def test_a_roll_out_measures_what_one_sweep_does() -> None:
    model = build(layers=2)
    x = decoders.text(2, 20)
    names = [str(cache.present.name) for cache in caches_of(model)]
    sweep = {name: HeadRange() for name in names}
    roll_out = {name: HeadRange() for name in names}
    (whole,) = [sample for sample in decoders.calibration(model, 20, 3) if np.array_equal(sample["x"], x)]
    for name, array in zip(names, tiny.run(model, whole, names), strict=True):
        sweep[name].update(array)
    reader = decoders.Reader(model, len(x), optimized=False)
    for start, stop in ((0, 7), (7, 8), (8, 9), (9, 15), (15, 20)):
        reader.read(x[:, start:stop])
        for name in names:
            roll_out[name].update(reader.caches[name.replace("present", "past_key_values")])
    for name in names:
        for a, b in zip(sweep[name].result(), roll_out[name].result(), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("heads_axis", [1, 2])
def test_ranges_of_shards_are_those_of_the_whole(tmp_path: Path, heads_axis: int) -> None:
    keys = np.random.default_rng(3).normal(size=(4, 3, 20, 6)).astype(np.float32)
    lo, hi = keys.min((0, 2)), keys.max((0, 2))
    batches = [batch if heads_axis == 1 else batch.swapaxes(1, 2) for batch in (keys[:1], keys[1:, :, :0], keys[1:])]
    first, second = HeadRange(heads_axis), HeadRange(heads_axis)
    first.update(batches[0])
    for batch in batches[1:]:
        second.update(batch)
    first.merge(second)
    store = StatisticsStore()
    store.put("present", first)
    store.save(tmp_path / "statistics", {})
    found = StatisticsStore.load(tmp_path / "statistics")[0].get("present", HeadRange(heads_axis)).result()
    np.testing.assert_array_equal(found[0], lo)
    np.testing.assert_array_equal(found[1], hi)
    with pytest.raises(DataError, match="cannot join"):
        first.update(keys[:, :, :, :4] if heads_axis == 1 else keys[:, :, :, :4].swapaxes(1, 2))
    with pytest.raises(DataError, match="has no heads"):
        first.update(keys[0])


def test_samples_with_a_past_of_their_own() -> None:
    """They calibrate as the whole text does, and the compiled model is compared on codes of the same past."""
    model = build(layers=2)
    reader = decoders.Reader(model, 2, optimized=False)
    x = decoders.text(0, 24)
    reader.read(x[:, :15])
    rest = decoders.inputs(x[:, 15:], 15 + decoders.whole(x[:, 15:]))
    sample = {name: array.astype(np.float32) for name, array in (rest | reader.caches).items()}
    (whole,) = decoders.calibration(model, count=1)
    outcomes = []
    for samples in ([sample], [whole]):
        after = model.clone()
        tiny.compile(after, [QuantizeKvCache(key_granularity="channel", value_granularity="channel")], samples)
        outcomes.append({name: held(value) for name, value in after.graph.initializers.items()})
    for name, numbers in outcomes[0].items():
        np.testing.assert_allclose(numbers, outcomes[1][name], rtol=1e-5)

    for options in ({"format": "int4", "symmetric": False}, {"key_granularity": "channel"}):
        after, _ = quantize(model, **options)
        adapted = next(iter(Adapted(from_python([sample], model=model), after)))
        codes = decoders.Reader(after, 2)
        codes.read(x[:, :15])
        for name in ("past_key_values.0.key", "past_key_values.0.value"):  # the first layer's do not depend on codes
            assert adapted[name].dtype == codes.caches[name].dtype
            assert np.mean(adapted[name] != codes.caches[name]) < 0.01
        found = compare(model, after, from_python([sample], model=model), outputs=["y"])
        assert found.outputs["y"].sqnr_db > (15 if "format" in options else 30)


def test_channels_that_differ_cost_nothing_with_normalized_keys() -> None:
    """One channel of the keys is large; without `normalize` the others are lost in 4 bits."""
    model = build()
    x = decoders.text(4, 16)
    plain = decode(decoders.Reader(model, 2), x)
    errors = [
        tiny.relative_error(decode(decoders.Reader(after, 2), x), plain)
        for after in (quantize(model, format="int4", normalize=n, ignore=("*.value",))[0] for n in (True, False))
    ]
    assert errors[0] < 0.7 * errors[1]


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [None, 4])
def test_widened_ranges_hold_at_every_position(rotary_dim: int | None, interleaved: bool) -> None:
    """The same keys at other positions, which calibration did not see."""
    options: dict[str, Any] = {"widen": True, "rotary_dim": rotary_dim, "rotary_interleaved": interleaved}
    step = QuantizeKvCache(key_granularity="channel", value_granularity="channel", **options)
    model = build()
    statistic = next(tap.statistic for tap in step.taps(model) if tap.value.endswith("key"))
    rng = np.random.default_rng(0)
    keys = rng.normal(size=(1, 2, 30, 8)) * rng.uniform(0.1, 5, size=8)
    turned = rotary_dim or 8
    pairs = [(2 * i, 2 * i + 1) if interleaved else (i, i + turned // 2) for i in range(turned // 2)]

    def at(angle: float) -> np.ndarray:
        found = keys.copy()
        for i, j in pairs:
            found[..., i] = keys[..., i] * np.cos(angle) - keys[..., j] * np.sin(angle)
            found[..., j] = keys[..., j] * np.cos(angle) + keys[..., i] * np.sin(angle)
        return found

    statistic.update(at(0.3))
    lo, hi = statistic.result()
    reached = np.max([np.abs(at(angle)).max((0, 2)) for angle in np.linspace(0, 7, 400)], 0)
    bound = np.maximum(-lo, hi)
    assert (reached <= bound * 1.0001).all()
    assert (reached >= bound * 0.99).all()  # and no wider than that
    tap = next(tap for tap in step.taps(model) if tap.value.endswith("value"))
    assert tap.statistic.key == HeadRange().key


@pytest.mark.parametrize("interleaved", [0, 1])
def test_an_operator_that_rotates_has_its_keys_widened(interleaved: int) -> None:
    model = build("fused")
    (node,) = [node for node in model.graph if node.op_type == "GroupQueryAttention"]

    def pairs(**options: Any) -> list[str]:
        statistics = [tap.statistic for tap in QuantizeKvCache(**options).taps(model)]
        return [statistic.pairs for statistic in statistics if isinstance(statistic, HeadRange)]

    assert pairs() == ["", ""]
    node.attributes.update({"do_rotary": ir.AttrInt64("do_rotary", 1)})
    node.attributes.update({"rotary_interleaved": ir.AttrInt64("rotary_interleaved", interleaved)})
    assert pairs() == ["interleaved" if interleaved else "half", ""]
    assert pairs(widen=False) == ["", ""]


# --------------------------------------------------------------------------------------------------- what is recognised


def caches_of(model: ir.Model) -> list[Cache]:
    return [site for site in find_caches(model) if isinstance(site, Cache)]


@pytest.mark.parametrize("form", [*FORMS, "scatter"])
def test_structure_tells_keys_from_values(form: str) -> None:
    model = build(form, room=10 if form == "scatter" else 0)
    for given in model.graph.inputs:  # names that say nothing, or the wrong thing
        if there(given.name).startswith("past"):
            given.name = "past.a_value" if there(given.name).endswith("key") else "past.a_key"
    key, value = caches_of(model)
    assert (key.role, value.role) == ("key", "value")
    assert (key.name, key.heads, key.head_size, key.axis, key.bytes) == ("past.a_value", 2, 8, 2, 64)


def test_positions_before_heads() -> None:
    model = tiny.build(
        """g (float[B,P,2,8] "past_key_values.0.key", float[B,S,2,8] new, float[B,2,S,8] q)
        => (float[B,T,2,8] "present.0.key", float[B,2,S,T] y) {
        "present.0.key" = Concat<axis=1>("past_key_values.0.key", new)
        k = Transpose<perm=[0,2,3,1]>("present.0.key") y = MatMul(q, k) }"""
    )
    (cache,) = caches_of(model)
    assert (cache.axis, cache.heads_axis, cache.heads) == (1, 2, 2)
    choices: list[dict[str, Any]] = [{}, {"key_granularity": "channel"}]
    for options in choices:
        after = model.clone()
        samples = [{"past_key_values.0.key": np.zeros((2, 0, 2, 8), np.float32), "new": f["new"], "q": f["q"]}
                   for f in tiny.feeds(model)]  # fmt: skip
        tiny.compile(after, [QuantizeKvCache(**options)], samples)
        feed = dict(samples[0])
        expected = tiny.run(model, feed, ["y"])[0]
        for value in after.graph.inputs:
            if there(value.name).startswith("past"):
                feed[there(value.name)] = decoders.empty(value, 2)
        assert tiny.relative_error(tiny.run(after, feed, ["y"], optimized=True)[0], expected) < 0.02


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("present = Concat<axis=2>(PAST, new, new)  y = Neg(q)", "Concat joins 3 values"),
        ("p = Concat<axis=2>(PAST, new)  present = Neg(p)  y = Neg(q)", "is no output of the graph"),
        ("present = Concat<axis=2>(PAST, new)  y = Neg(PAST)", "Neg reads its past, too"),
        ("present = Concat<axis=3>(PAST, new)  y = Neg(q)", "its layout is unknown (rank 4, positions along axis 3)"),
        ("present = Neg(PAST)  y = Neg(q)", "Neg reads it, and those known to append to a cache are Concat, "),
    ],
)
def test_other_forms_are_skipped_with_the_reason(body: str, reason: str) -> None:
    name = '"past_key_values.0.key"'
    model = tiny.build(
        f"""g (float[B,2,P,8] {name}, float[B,2,P,8] new, float[B,2,S,8] q)
        => (float[B,2,T,K] present, float[B,2,Q,8] y) {{ {body.replace("PAST", name)} }}"""
    )
    before = tiny.operators(model)
    changes = QuantizeKvCache(value_granularity="token").apply(model, StatisticsStore())
    assert reason in tiny.reasons(changes)["past_key_values.0.key"]
    assert tiny.operators(model) == before


@pytest.mark.parametrize(("name", "shape", "reason"), [
    ("past_key_values.0.key", "B,H,P,8", "the number or the size of its heads is not known; export it with numbers"),
    ("past.0", "B,2,P,8", "nothing shows whether it holds keys or values"),
])  # fmt: skip
def test_caches_that_say_too_little_of_themselves(name: str, shape: str, reason: str) -> None:
    model = tiny.build(
        f"""g (float[{shape}] "{name}", float[{shape}] new) => (float[{shape}] present) {{
        present = Concat <axis = 2> ("{name}", new) }}"""
    )
    assert tiny.reasons(QuantizeKvCache().apply(model, StatisticsStore())) == {name: reason}


def test_a_cache_inside_of_a_body_is_left_alone() -> None:
    model = tiny.build(
        """g (float[B,2,P,8] "past_key_values.0.key", float[B,2,S,8] new, bool c) => (float[B,2,T,8] present) {
        present = If (c) <
            then_branch = t () => (float[B,2,T,8] a) { a = Concat <axis = 2> ("past_key_values.0.key", new) },
            else_branch = e () => (float[B,2,T,8] b) { b = Identity (new) }> }"""
    )
    (reason,) = tiny.reasons(QuantizeKvCache().apply(model, StatisticsStore())).values()
    assert reason == "it is read inside the body of an If, Loop or Scan"


def test_a_cache_whose_elements_are_counted_has_no_pairs_of_four_bits() -> None:
    model = tiny.build(
        """g (float[B,2,S,8] k, float[B,2,P,8] "past_key_values.0.key") => (float[B,2,T,8] "present.0.key", int64 n) {
        "present.0.key" = Concat <axis = 2> ("past_key_values.0.key", k)  n = Size ("past_key_values.0.key") }"""
    )
    changes = QuantizeKvCache(format="int4", normalize=False).apply(model, StatisticsStore())
    assert tiny.reasons(changes) == {
        "past_key_values.0.key":
            "Size counts the elements of its past, and packed ones are half as many: use format int8"
    }  # fmt: skip


def test_what_attention_keeps_itself_is_quantized_whole_or_not_at_all() -> None:
    model = build("attention-past")
    past = next(value for value in model.graph.inputs if there(value.name).endswith("value"))
    (attention,) = (node for node in model.graph if node.op_type == "Attention")
    model.graph.insert_before(attention, ir.node("Size", [past], name="count"))
    changes = QuantizeKvCache(format="int4", normalize=False).apply(model, StatisticsStore())
    assert tiny.reasons(changes) == {
        "past_key_values.0.key": "Attention takes keys and values together, and one is skipped",
        "past_key_values.0.value":
            "Size counts the elements of its past, and packed ones are half as many: use format int8",
    }  # fmt: skip


def test_twice_is_once() -> None:
    after, _ = quantize(build(), format="int4", symmetric=False)
    before = tiny.operators(after)
    changes = QuantizeKvCache().apply(after, StatisticsStore())
    assert tiny.operators(after) == before
    assert {skip.site: skip.reason for skip in changes.skipped} == dict.fromkeys(
        ["past_key_values.0.key", "past_key_values.0.value"], "it is quantized already (uint8)"
    )


def test_float8_is_skipped() -> None:
    after, changes = quantize(build(), format="fp8_e4m3")
    assert {skip.reason for skip in changes.skipped} == {"ONNX Runtime has no Concat for float8: use format int8"}
    assert len(changes.skipped) == 2
    assert tiny.operators(after) == tiny.operators(build())


def test_one_half_of_what_attention_keeps_itself_is_left_alone() -> None:
    model = build("attention-past")
    after, changes = quantize(model, ignore=("*.value",))
    assert "one is left out" in tiny.reasons(changes)["past_key_values.0.key"]
    assert tiny.operators(after) == tiny.operators(model)
    after, changes = quantize(build("attention"), ignore=("*.value",))
    assert [changed.site for changed in changes.changed] == ["past_key_values.0.key"]


@pytest.mark.parametrize(
    "options",
    [
        {"symmetric": False, "value_granularity": "channel"},
        {"symmetric": False, "format": "fp8_e4m3"},
        {"widen": True, "key_granularity": "token", "normalize": False},
    ],
)
def test_options_that_do_not_go_together(options: dict[str, Any]) -> None:
    with pytest.raises(SchemeError):
        QuantizeKvCache(**options)


# ------------------------------------------------------------------------------------------------ whole compilations


def compile_tiny(model: ir.Model, *steps: Step, **given: Any) -> qcompiler.Compiled:
    recipe = Recipe(name="test", passes=(*steps, Step(name="quantize-kv-cache", options={"format": "int4"})))
    return qcompiler.compile(model, recipe, calibration=decoders.calibration(model, count=6), **given)


def test_the_report_lists_every_cache(tmp_path: Path) -> None:
    model = build(layers=2)
    compiled = compile_tiny(model, exclude=["past_key_values.1.value"])
    report = Report.from_json(compiled.report.to_json())
    found = {site.name: site for site in report.sites if "cache" in site.op}
    assert {name: site.status for name, site in found.items()} == {
        "past_key_values.0.key": "quantized", "past_key_values.0.value": "quantized",
        "past_key_values.1.key": "quantized", "past_key_values.1.value": "excluded",
    }  # fmt: skip
    change, sizes = there(found["past_key_values.0.key"].cache), there(report.cache)
    assert (change.before, change.after, change.bytes_before, change.bytes_after) == ("float", "uint8", 64, 12)
    assert (sizes.float_bytes, sizes.bytes) == (4 * 64, 3 * 12 + 64)
    assert 10 < there(found["past_key_values.0.key"].sqnr_db) < 40
    assert found["past_key_values.0.key"].scheme == "int4 per-token symmetric dynamic, channels normalized"
    assert 5 < report.outputs["y"]["sqnr_db"] < 60
    assert not [site for site in qcompiler.compile(model, "int8-weights").report.sites if "cache" in site.op]
    with pytest.raises(RecipeError, match="past_key_values"):
        compile_tiny(model, exclude=["past_key_values.7.key"])


@pytest.mark.parametrize("target", ["portable", "ort-cpu"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("weights", ["quantize-weights", "gptq"])
def test_after_a_weight_recipe(tmp_path: Path, weights: str, form: str, target: str) -> None:
    model = build(form)
    if weights == "gptq":
        pytest.importorskip("torch")
    step = Step(name=weights, options={"format": "int4"} if weights == "gptq" else {})
    compiled = compile_tiny(model, step, target=target)
    assert {site.status for site in compiled.report.sites} == {"quantized"}
    x = decoders.text(6, 10)
    got = decode(decoders.Reader(compiled.model, 2), x)
    only_cache = decode(decoders.Reader(quantize(model, format="int4")[0], 2), x)
    assert 0 < tiny.relative_error(got, only_cache) < 0.5
    compiled.save(tmp_path / "out")
    session = qcompiler.load_session(tmp_path / "out")
    assert {item.name: item.type for item in session.get_inputs()}["past_key_values.0.key"] == "tensor(uint8)"


@pytest.mark.parametrize("opset", [21, 23])
def test_int8_caches_before_shape_operators_load(opset: int) -> None:
    """ONNX Runtime on x86 refuses int8 Q/DQ pairs before Reshape and Transpose from opset 21 on."""
    model = decoders.build("concat", opset=opset)
    for options in ({}, {"key_granularity": "tensor", "value_granularity": "channel"}):
        after, _ = quantize(model, **options)
        assert not {"QuantizeLinear", "DequantizeLinear"} & set(tiny.operators(after))
        tiny.session(after, optimized=True)


# ------------------------------------------------------------------------------------------------------ the demo model


@pytest.mark.parametrize("variant", ["dynamo-past", "optimum"])
def test_the_demo_model_keeps_its_quality(variant: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from models.export import CHECKPOINT, model_path
    from qcompiler.evaluation.evaluate import evaluate

    source = model_path(variant).parent
    text = CHECKPOINT / "calibration.txt"
    for recipe, quality, size in (("kv-int8", 1.005, 0.27), ("kv-int4", 1.05, 0.16)):
        compiled = qcompiler.compile(source, recipe, calibration=str(text), tokenizer=CHECKPOINT / "tokenizer.json",
                                     samples=4, sequence_length=128)  # fmt: skip
        sizes = there(compiled.report.cache)
        assert sizes.bytes <= size * sizes.float_bytes
        folder = tmp_path / recipe
        compiled.save(folder)
        found = evaluate(folder, str(CHECKPOINT / "heldout.txt"), reference=source, sequence_length=128, limit=6)
        assert 0 < there(found.kl) < (1e-3 if recipe == "kv-int8" else 0.05)
        assert there(found.perplexity_ratio) <= quality
        assert re.search("present.0.key", " ".join(compiled.report.outputs))


def test_heads_of_odd_size_have_no_pairs_of_four_bits() -> None:
    model = tiny.build(
        """g (float[B,2,S,7] k, float[B,2,P,7] "past_key_values.0.key") => (float[B,2,T,7] "present.0.key",
            float[B,2,T,7] y) {
        "present.0.key" = Concat <axis = 2> ("past_key_values.0.key", k)  y = Neg ("present.0.key") }"""
    )
    changes = {
        format: QuantizeKvCache(format=format, normalize=False).apply(model.clone(), StatisticsStore())
        for format in ("int4", "int8")
    }
    assert [skipped.reason for skipped in changes["int4"].skipped] == [
        "heads of 7 channels cannot be packed in pairs: use format int8"
    ]
    assert changes["int8"].changed


@pytest.mark.parametrize("dtype", ["float", "float16"])
def test_channels_that_hardly_move_are_divided_by_a_number_that_is_there(dtype: str) -> None:
    """Half of their range would be 0 in float16, and what is divided by it no number."""
    model = build(dtype=dtype)
    (cache,) = (site for site in find_caches(model) if isinstance(site, Cache) and site.role == "key")
    lo = np.ones((decoders.HEADS, decoders.CHANNELS), np.float32)
    hi = lo * np.where(np.arange(decoders.CHANNELS) == 3, 1 + 2.0**-30, 2).astype(np.float64)
    scheme = Scheme.from_options("int8", "token", symmetric=True, dynamic=True)
    Coder(Rewriter(model, "p"), cache, Storage(scheme, normalize=True), (lo, hi))
    (reach,) = (value for name, value in model.graph.initializers.items() if "reach" in name)
    numbers = held(reach).astype(np.float64)
    assert (numbers >= np.finfo(numpy_type(reach)).smallest_normal).all()
    assert numbers.max() == 0.5
