"""What the report says of a site is what the passes said of it, the word of a later one before that of an earlier."""

from __future__ import annotations

from importlib.metadata import version

import numpy as np
import onnx_ir as ir
import pytest

import qcompiler
from passes.lower_int8 import LowerInt8
from passes.lower_integer_chain import LowerIntegerChain
from passes.quantize_activations import QuantizeActivations
from passes.quantize_kv_cache import QuantizeKvCache
from passes.quantize_weights import QuantizeWeights
from passes.smooth_quant import SmoothQuant
from qcompiler.formats.scheme import PerChannel, PerTensor, PerToken, Scheme
from qcompiler.recipes import Recipe
from qcompiler.report import PassReport, PassSkip, Report, SiteReport
from qcompiler.report.build import cache_sizes, constant_bytes, report, versions
from qcompiler.report.facts import SiteFacts, inventory
from qcompiler.report.report import CacheSizes
from qcompiler.rewriting.contract import CacheChange, Changed, Changes, Pass, PassRun, Skipped
from qcompiler.sites.kinds import Site
from tests import tiny

MODEL = tiny.build(
    """g (float[M,8] x, float[8,8] W, float[8,4] V, float[M,4] c) => (float[M,4] y) {
    [fc] h = MatMul (x, W)  [odd] y = Gemm (h, V, c) }""",
    W="normal", V="normal",
)  # fmt: skip
W8, W4 = Scheme("int8", PerChannel()), Scheme("int4", PerChannel())
A8 = Scheme("uint8", PerTensor(), symmetric=False)


def cache(name: str, role: str, size: int) -> SiteFacts:
    path = f"a.{role}_cache"
    site = Site(ir.node("Concat", []), name, path, "")
    return SiteFacts(name, path, "", f"{role} cache", "", "", 0, "", site, works_on="caches", cache_bytes=size)


CACHE = cache("past", "key", 256)
CHANGE = CacheChange("past", "present", "float32", "int8", 256, 68, Scheme("int8", PerToken(), dynamic=True))


def ran(step: Pass, *said: Changed | Skipped, excluded: tuple[Skipped, ...] = (), narrowed: int = 0) -> PassRun:
    changes = Changes(
        [item for item in said if isinstance(item, Changed)], [item for item in said if isinstance(item, Skipped)],
        list(excluded), narrowed=narrowed,
    )  # fmt: skip
    return PassRun(step, changes, 0.12345, 1000)


def built(*runs: PassRun, before: dict[str, int] | None = None, facts: tuple[SiteFacts, ...] = ()) -> Report:
    recipe = Recipe.from_dict({"name": "r", "target": "portable", "passes": ["quantize-weights"]})
    return report(recipe, MODEL, facts or inventory(MODEL), runs, None, before or constant_bytes(MODEL), {})


def of(name: str, *runs: PassRun) -> SiteReport:
    return next(site for site in built(*runs, facts=(*inventory(MODEL), CACHE)).sites if site.name == name)


def outcome(site: SiteReport) -> tuple[str, str, str]:
    return site.status, site.pass_name, site.reason


WEIGHTS, ACTIVATIONS = QuantizeWeights(), QuantizeActivations()
LEFT_OUT = ("excluded", "", "the recipe leaves it out")


def test_a_layer_that_no_pass_speaks_of_was_left_out() -> None:
    assert outcome(of("fc")) == LEFT_OUT
    # A pass that keeps the function, or one for caches, cannot have quantized it.
    assert outcome(of("fc", ran(SmoothQuant(), Skipped("fc", "no norm writes its input")))) == LEFT_OUT
    assert outcome(of("fc", ran(QuantizeKvCache(), Skipped("fc", "odd heads")))) == LEFT_OUT
    assert outcome(of("fc", ran(WEIGHTS, Changed("odd", weight=W8), Skipped("odd", "because")))) == LEFT_OUT
    sensitive = ran(WEIGHTS, excluded=(Skipped("fc", "it is sensitive"), Skipped("odd", "other")))
    assert outcome(of("fc", sensitive)) == ("excluded", "quantize-weights", "it is sensitive")


def test_a_layer_that_a_pass_could_not_quantize_is_skipped_by_the_first_that_says_so() -> None:
    exact = ran(SmoothQuant(), Skipped("fc", "no norm"))
    runs = exact, ran(WEIGHTS, Skipped("fc", "its type")), ran(ACTIVATIONS, Skipped("fc", "no data"))
    assert outcome(of("fc", *runs)) == ("skipped", "quantize-weights", "its type")
    assert outcome(of("fc", exact, ran(WEIGHTS), runs[2])) == ("skipped", "quantize-activations", "no data")


def test_what_cannot_be_quantized_is_skipped_for_its_own_reason() -> None:
    reason = "what it adds is computed, not a constant"
    # Whether the pass that was to quantize it repeats the reason, says another or none; who asked for it is told.
    assert outcome(of("odd", ran(WEIGHTS))) == ("skipped", "", reason)
    said = ran(WEIGHTS, Skipped("odd", "no form"))
    assert outcome(of("odd", said)) == ("skipped", "quantize-weights", reason)
    assert outcome(of("odd", ran(QuantizeWeights(ignore=("odd",))))) == LEFT_OUT
    assert outcome(of("odd", ran(QuantizeWeights(ignore=("odd",))), ran(ACTIVATIONS))) == ("skipped", "", reason)


def test_a_later_pass_says_a_scheme_again_and_the_first_that_quantized_is_named() -> None:
    site = of(
        "fc",
        ran(SmoothQuant(), Changed("fc", detail="alpha 0.50")),
        ran(WEIGHTS, Changed("fc", weight=W8, detail="mse")),
        ran(ACTIVATIONS, Changed("fc", activation=A8)),
        ran(LowerInt8(), Changed("fc", weight=W4, kernel="MatMulNBits")),
        ran(LowerIntegerChain(), Changed("fc", detail="in a chain")),
    )
    assert (site.status, site.pass_name, site.reason) == ("quantized", "quantize-weights", "")
    assert (site.weight, site.activation, site.kernel) == (W4, A8, "MatMulNBits")
    assert site.scheme == "int4 per-channel symmetric, activations uint8 per-tensor asymmetric"
    assert site.details == {
        "smooth-quant": "alpha 0.50",
        "quantize-weights": "mse",
        "lower-integer-chain": "in a chain",
    }


def test_what_a_pass_did_not_do_to_a_quantized_layer_is_a_detail() -> None:
    site = of("fc", ran(WEIGHTS, Changed("fc", weight=W8)), ran(ACTIVATIONS, Skipped("fc", "no data")))
    assert outcome(site) == ("quantized", "quantize-weights", "")
    assert site.details == {"quantize-activations": "skipped: no data"}
    assert outcome(of("fc", ran(ACTIVATIONS, Changed("fc", activation=A8))))[0] == "quantized"
    assert outcome(of("past", ran(QuantizeKvCache(), Changed("past", cache=CHANGE))))[0] == "quantized"


@pytest.mark.parametrize("said", [Changed("fc", float_input=True), Skipped("fc", "no kernel", undone="activation")])
def test_an_input_that_is_float_again_has_no_scheme(said: Changed | Skipped) -> None:
    quantized = ran(WEIGHTS, Changed("fc", weight=W8)), ran(ACTIVATIONS, Changed("fc", activation=A8))
    site = of("fc", *quantized, ran(LowerInt8(), said))
    assert (site.status, site.weight, site.activation) == ("quantized", W8, None)


def test_a_layer_that_is_float_again_was_skipped() -> None:
    runs = ran(WEIGHTS, Changed("fc", weight=W8, kernel="k")), ran(LowerInt8(), Skipped("fc", "no kernel", "layer"))
    site = of("fc", *runs)
    assert outcome(site) == ("skipped", "lower-int8", "no kernel")
    assert (site.weight, site.activation, site.cache, site.kernel, site.scheme) == (None, None, None, "", "")


def test_caches_are_told_where_a_pass_works_on_them() -> None:
    facts = (*inventory(MODEL), CACHE)
    without, quantized = built(ran(WEIGHTS), facts=facts), ran(QuantizeKvCache(), Changed("past", cache=CHANGE))
    assert [site.name for site in without.sites] == ["fc", "odd"]
    assert without.cache is None
    told = built(ran(WEIGHTS, Skipped("past", "as if it were a layer")), quantized, facts=facts)
    site = told.sites[-1]
    assert (site.name, site.cache, *outcome(site)) == ("past", CHANGE, "quantized", "quantize-kv-cache", "")
    assert (site.scheme, told.cache) == ("int8 per-token symmetric dynamic", CacheSizes(256, 68))
    lowered = ran(LowerInt8(), Changed("past", kernel="Attention"))
    assert built(quantized, lowered, facts=facts).sites[-1].cache == CHANGE
    skipped = built(ran(QuantizeKvCache(), Skipped("past", "odd heads")), facts=facts)
    assert (outcome(skipped.sites[-1]), skipped.cache) == (
        ("skipped", "quantize-kv-cache", "odd heads"), CacheSizes(256, 256)
    )  # fmt: skip


def test_caches_are_counted_together_those_that_stay_float_too() -> None:
    other = cache("v", "value", 100)
    done = SiteReport("past", "a.key_cache", "key cache", "quantized", cache=CHANGE)
    assert cache_sizes([CACHE, other], [done]) == CacheSizes(356, 168)
    assert cache_sizes(inventory(MODEL), []) is None


def test_passes_are_told_by_what_they_changed_and_skipped() -> None:
    twice = Changed("fc", weight=W8), Changed("fc", activation=A8), Skipped("odd", "no form")
    assert built(ran(WEIGHTS, *twice)).passes == [
        PassReport("quantize-weights", 0.123, 1000, 1, (PassSkip("odd", "no form"),))
    ]


def test_bytes_that_constants_lost_without_being_quantized_are_no_bytes_of_codes() -> None:
    """V had 136 bytes and has 128; W, of 256, is what was quantized."""
    told = built(ran(WEIGHTS, Changed("fc", weight=W8), narrowed=8), before={"W": 256, "V": 136})
    assert (told.sizes.bytes, told.sizes.float_bytes) == (256 + 128, 256 + 136)
    assert (told.sizes.quantized_float_bytes, told.sizes.quantized_bytes) == (256, 256)


def test_constants_count_once_each_by_their_types() -> None:
    model = tiny.build(
        """g (float[M,4] x, float[4,4] W, float16[3] h) => (float[M,4] y, float16[3] z) {
        y = MatMul (x, W)  z = Neg (h) }""",
        W="normal", h=np.ones(3, np.float16),
    )  # fmt: skip
    assert constant_bytes(model) == {"W": 64, "h": 6}


def test_bfloat16_is_compared_as_a_processor_that_has_it_would_compute() -> None:
    """ONNX Runtime has hardly a kernel for it on CPUs, and the graph as it is would not run."""
    model = tiny.build("g (float[M,8] x, float[8,8] W) => (float[M,8] y) { [fc] y = MatMul (x, W) }", W="normal")
    recipe = Recipe.from_dict({"name": "r", "target": "portable", "passes": [{"convert-float": {"dtype": "bf16"}}]})
    told = qcompiler.compile(model, recipe, calibration=tiny.feeds(model, 4)).report
    assert 40 < told.outputs["y"]["sqnr_db"] < 70


@pytest.mark.parametrize("odd", [np.nan, np.inf])
def test_weights_that_stay_are_pictured_without_what_is_no_number(odd: float) -> None:
    weights = [np.full((16, 16), odd, np.float32), np.eye(16, dtype=np.float32)]
    weights[1][3, 3] = odd
    model = tiny.build(
        "g (float[M,16] x, float[16,16] V, float[16,16] W) => (float[M,16] y) { h = MatMul(x, V) y = MatMul(h, W) }",
        V=weights[0],
        W=weights[1],
    )
    pictures = qcompiler.compile(model, "w8", exclude=["*"]).report.pictures
    assert pictures is not None
    assert [(picture.site, picture.absmax, sum(picture.histogram)) for picture in pictures.weights] == [("y", 1.0, 255)]


def test_versions_are_of_what_is_installed() -> None:
    found = versions()
    assert found["numpy"] == version("numpy")
    assert "onnxruntime" in found or "onnxruntime-gpu" in found
    assert None not in found.values()
