"""report.html in a real browser: it stands alone, sorts, filters, opens blocks, and fits a phone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from qcompiler.compiler import compile
from qcompiler.formats.scheme import PerToken, Scheme
from qcompiler.report import Gate, Report, SiteReport
from qcompiler.report.html import card, page
from qcompiler.report.report import CacheSizes
from qcompiler.rewriting.contract import CacheChange
from tests import tiny
from tests.browser import WIDTHS, Opened, assert_fits_and_can_be_read, launched, visit
from tests.there import there

if TYPE_CHECKING:
    from playwright.sync_api import Browser

BLOCK = """
  n{n} = LayerNormalization <epsilon = 1e-5> (x{n}, gain{n})
  g{n} = MatMul(n{n}, gate{n})
  u{n} = MatMul(n{n}, up{n})
  s{n} = Sigmoid(g{n})
  m{n} = Mul(s{n}, u{n})
  d{n} = MatMul(m{n}, down{n})
  x{next} = Add(x{n}, d{n})"""
MODULES = {"n": "norm", "g": "mlp.gate_proj", "u": "mlp.up_proj", "s": "mlp.act", "m": "mlp", "d": "mlp.down_proj"}


def module(value: str) -> str:
    """What an exporter would have called the module that gives a value: g1 → model/layers.1/mlp/gate_proj."""
    letter, number = value[0], value[1:]
    if letter == "y":
        return "head"
    if letter == "x":
        return f"model/layers.{int(number) - 1}"
    return f"model/layers.{number}/{MODULES[letter].replace('.', '/')}"


@pytest.fixture(scope="module")
def report() -> Report:
    """Of a model of two blocks with planted outliers."""
    blocks, inputs = "", ""
    constants: dict[str, Any] = {}
    for n in range(2):
        blocks += BLOCK.format(n=n, next=n + 1)
        inputs += f", float[32] gain{n}, float[32,48] gate{n}, float[32,48] up{n}, float[48,32] down{n}"
        constants |= {f"gain{n}": "outliers", f"gate{n}": "normal", f"up{n}": "normal", f"down{n}": "normal"}
    text = f"g (float[2,S,32] x0{inputs}, float[32,16] head) => (float[2,S,16] y) {{{blocks}"
    model = tiny.build(text + "\n  y = MatMul(x2, head)\n}", **constants, head="normal")
    for node in model.graph:
        node.name = f"/{module(there(node.name))}/{node.op_type}"
    rng = np.random.default_rng(0)
    data = [{"x0": rng.normal(size=(2, 8, 32)).astype(np.float32)} for _ in range(8)]
    return compile(model, "smoothquant", calibration=data, exclude=["head"], options=["smooth-quant.alpha=0.5"]).report


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with launched() as found:
        yield found


@contextmanager
def shown(browser: Browser, report: Report, folder: Path) -> Iterator[Opened]:
    file = folder / "report.html"
    file.write_text(page(report), encoding="utf-8")
    with visit(browser, file) as found:
        yield found


@pytest.fixture
def opened(browser: Browser, report: Report, tmp_path: Path) -> Iterator[Opened]:
    with shown(browser, report, tmp_path) as found:
        yield found


def test_the_verdict_is_seen_first(opened: Opened, report: Report) -> None:
    heading = opened.page.locator("h1")
    assert heading.inner_text() == "smoothquant for ort-cpu"
    box = heading.bounding_box()
    assert box is not None
    assert box["y"] < 200
    figures = dict(zip(opened.page.locator(".tile dt").all_inner_texts(),
                       opened.page.locator(".tile .figure").all_inner_texts(), strict=True))  # fmt: skip
    assert figures["Layers quantized"] == "6 of 7"
    assert figures["SQNR"] == f"{report.outputs['y']['sqnr_db']:.1f} dB"
    assert figures["Speed against float"] == "not measured"
    worst = min((site for site in report.sites if site.status == "quantized"), key=lambda site: site.sqnr_db or 0)
    assert figures["Worst layer"] == f"{worst.sqnr_db:.1f} dB"


def test_the_map_has_every_layer(opened: Opened, report: Report) -> None:
    rows = opened.page.locator(".heat tbody tr")
    assert rows.count() == 2
    assert rows.nth(0).locator(".cell").count() == 3
    assert opened.page.locator(".others .step-excluded").count() == 1
    assert opened.page.locator(".map .cell[data-layer]").count() == len(report.sites)


def test_sorting_by_keyboard(opened: Opened, report: Report) -> None:
    button = opened.page.get_by_role("button", name="SQNR dB")
    header = opened.page.locator("#table th", has=opened.page.get_by_role("button", name="SQNR dB"))
    button.focus()
    opened.page.keyboard.press("Enter")
    assert header.get_attribute("aria-sort") == "ascending"
    measured = sorted((site for site in report.sites if site.sqnr_db is not None), key=lambda site: site.sqnr_db or 0)
    assert [name.split(" ")[0] for name in opened.shown()] == [site.module_path for site in measured]
    opened.page.keyboard.press("Enter")
    assert header.get_attribute("aria-sort") == "descending"
    assert opened.shown()[0].startswith(measured[-1].module_path)


def test_blanks_come_last_in_either_order(browser: Browser, report: Report, tmp_path: Path) -> None:
    levels = dict(zip((3, 1, 5), (9.5, math.inf, 10.25), strict=True))
    sites = [replace(site, sqnr_db=levels.get(place), kernel=f"k{place}" if place in levels else "")
             for place, site in enumerate(report.sites)]  # fmt: skip
    with shown(browser, replace(report, sites=sites), tmp_path) as opened:
        paths = [site.module_path for site in sites]
        for column, up in (("SQNR dB", (3, 5, 1)), ("kernel", (1, 3, 5))):
            button = opened.page.get_by_role("button", name=column)
            for order in (up, up[::-1]):
                button.press("Enter")
                names = [name.split(" ")[0] for name in opened.shown()]
                assert names[:3] == [paths[place] for place in order]
                assert set(names[3:]) == {paths[place] for place in range(len(sites)) if place not in levels}
        assert "exact" in opened.page.locator("#table tbody").inner_text()


def test_what_the_keyboard_is_at_is_seen(opened: Opened) -> None:
    """All that can be clicked, in the order of the page, with an outline."""
    stops = []
    while True:
        opened.page.keyboard.press("Tab")
        place = opened.page.evaluate(
            """() => {const e = document.activeElement;
            return [e.tagName, e.id || e.className || e.dataset.sort || "", getComputedStyle(e).outlineStyle]}"""
        )
        if place[0] == "BODY":  # after the last
            break
        stops.append(place)
    names = [name for _, name, _ in stops]
    assert {"filter", "status", "open", "tall"} <= set(names)
    assert names.count("text") + names.count("number") == 9, "a button in each head of the table"
    assert [stop for stop in stops if stop[2] == "none"] == []


def test_nothing_moves(opened: Opened) -> None:
    css = opened.page.locator("style").first.text_content() or ""
    assert "transition" not in css
    assert "animation" not in css
    assert "scroll-behavior" not in css


def test_filtering(opened: Opened) -> None:
    opened.page.get_by_label("Filter").fill("layers.1 down")
    assert opened.shown() == ["model.layers.1.mlp.down_proj MatMul"]
    assert opened.page.locator("#count").inner_text() == "1 of 7"
    opened.page.get_by_label("Filter").fill("")
    opened.page.get_by_label("Status").select_option("excluded")
    assert opened.shown() == ["head MatMul"]
    opened.page.get_by_label("Filter").fill("nowhere")
    assert opened.shown() == []
    assert opened.page.locator("#nothing").is_visible()


def test_a_cell_leads_to_its_row_though_a_filter_hid_it(opened: Opened) -> None:
    opened.page.get_by_label("Filter").fill("head")
    opened.page.locator(".heat .cell").first.click()
    row = opened.page.locator("#table tr:target")
    assert row.is_visible()
    assert "model.layers.0.mlp.gate_proj" in row.inner_text()


def test_opening_a_block(opened: Opened) -> None:
    opened.page.locator(".heat .open").nth(1).click()
    panel = opened.page.locator("#drawing")
    assert panel.locator("h3").inner_text() == "model.layers.1"
    before, after = panel.locator("svg.drawing").all()
    assert before.locator(".unit.quantized").count() == after.locator(".unit.quantized").count() == 3
    assert before.locator(".unit.added").count() == 0
    labels = after.locator(".unit.added .label").all_text_contents()
    assert labels == ["QuantizeLinear", "QuantizeLinear"], "one for gate and up together, one for down"
    assert "norm" in after.locator(".unit.changed .label").all_text_contents(), "smoothing went into its gain"
    assert "48×32 int8" in after.locator(".unit.quantized .operators").all_text_contents()
    opened.page.keyboard.press("Escape")
    assert panel.is_hidden()
    assert opened.page.evaluate("document.activeElement.dataset.block") == "model.layers.1"


def test_outliers_before_and_after(opened: Opened, report: Report) -> None:
    smoothed = [one for one in report.pictures.channels if one.after]
    assert {one.sites for one in smoothed} >= {
        tuple(f"/model/layers.{n}/mlp/{kind}/MatMul" for kind in ("gate_proj", "up_proj")) for n in range(2)
    }
    norms = [one for one in smoothed if len(one.sites) == 2]
    assert all(one.spread_after is not None and one.spread_before > max(10, 3 * one.spread_after) for one in norms)
    assert opened.page.locator("#outliers svg path.before").count() == len(report.pictures.channels)
    assert opened.page.locator("#outliers svg path.after").count() == len(smoothed)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_and_can_be_read(opened: Opened, width: int, scheme: str, tmp_path: Path) -> None:
    opened.page.set_viewport_size({"width": width, "height": 900})
    opened.page.locator(".chips .open").first.click()
    assert_fits_and_can_be_read(opened, width, scheme, tmp_path / "page.png", texts=60)


@pytest.mark.parametrize("width", [1180, 1440])
def test_no_table_of_the_verdict_is_cut(browser: Browser, report: Report, width: int, tmp_path: Path) -> None:
    measures = {"sqnr_db": 29.3, "cosine": 0.999418, "max_abs_error": 1.15, "kl": 0.00571, "top1": 0.939,
                "perplexity": 34.3, "perplexity_ratio": 1.0118}  # fmt: skip
    outputs = {"logits": measures, "present.0.value": {"sqnr_db": math.inf}}
    gates = [Gate("kl", 0.01, 0.00571, True)]
    with shown(browser, replace(report, outputs=outputs, gates=gates), tmp_path) as opened:
        opened.page.set_viewport_size({"width": width, "height": 900})
        assert opened.page.locator("#verdict .scroll").count() == 2
        for scroll in opened.page.locator("#verdict .scroll").all():
            assert scroll.evaluate("element => element.scrollWidth <= element.clientWidth")


STRANGE = ["<script>alert(1)</script>", '"quo\'ted" & [bold]', "ünïcödé-模型", "x" * 200, "a&amp;b", "${js}`", ""]


def test_strange_names(browser: Browser, report: Report, tmp_path: Path) -> None:
    """They are shown as they are, at any width, and a long one pushes nothing out of the page."""
    sites = [replace(site, module_path=f"layers.0.{STRANGE[n]}", block="layers.0")
             for n, site in enumerate(report.sites)]  # fmt: skip
    with shown(browser, replace(report, sites=sites, model=STRANGE[0], warnings=STRANGE), tmp_path) as opened:
        for width in (390, 1180):
            opened.page.set_viewport_size({"width": width, "height": 900})
            assert opened.page.evaluate("document.documentElement.scrollWidth") == width
        names = opened.page.locator("#table tbody th").all_inner_texts()
        assert names == [f"layers.0.{name} MatMul" for name in STRANGE]
        table = opened.page.locator("#weights table")
        assert table.evaluate("element => element.scrollWidth") < 1000
        opened.page.get_by_label("Filter").fill("[bold]")
        assert len(opened.shown()) == 1


def test_caches_are_on_the_map(browser: Browser, report: Report, tmp_path: Path) -> None:
    stored = Scheme("int8", PerToken(), dynamic=True)
    change = CacheChange("past", "present", "float32", "int8", 256, 68, stored)
    site = SiteReport("past.0.key", "model.layers.0.attention.key_cache", "key cache", "quantized",
                      block="model.layers.0", scheme=str(stored), sqnr_db=17.2, cache=change)  # fmt: skip
    with_cache = replace(report, sites=[*report.sites, site], cache=CacheSizes(256, 68))
    with shown(browser, with_cache, tmp_path) as opened:
        cell = opened.page.locator('.heat .cell[data-layer="past-0-key"]')
        assert cell.inner_text().split() == ["17", "8"]
        cell.click()
        assert "key_cache" in opened.page.locator("#table tr:target").inner_text()
        figures = opened.page.locator(".tile").all_inner_texts()
        assert any("6 of 7" in text for text in figures), "a cache is no layer"
        assert any("68 B" in text and "1 cache quantized" in text for text in figures)
        assert any("Worst cache" in text and "17.2 dB" in text for text in figures)


def test_print_opens_what_is_folded(opened: Opened) -> None:
    """On white paper, whatever the screen is like."""
    opened.page.emulate_media(media="print", color_scheme="dark")
    assert opened.page.evaluate("getComputedStyle(document.querySelector('.qcompiler')).color") == "rgb(29, 37, 48)"
    recorded = "matchMedia('print').matches && [...document.querySelectorAll('details')].map((item) => item.open)"
    opened.page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert opened.page.evaluate(recorded)
    assert all(opened.page.evaluate(recorded))
    opened.page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert not any(opened.page.evaluate(recorded))


def test_print_shows_every_layer(opened: Opened) -> None:
    opened.page.emulate_media(media="print")
    assert opened.page.locator("nav").is_hidden()
    table = opened.page.locator(".tall")
    assert table.evaluate("element => element.scrollHeight <= element.clientHeight + 1"), "nothing is cut off"


# What follows needs no browser.


def test_one_file_with_nothing_of_others(report: Report) -> None:
    text = page(report)
    assert "http://" not in text.replace("http://www.w3.org", "")
    assert "https://" not in text
    assert "default-src 'none'" in text
    assert len(text) < 400_000


def test_a_broken_gate_is_the_first_thing_said(report: Report) -> None:
    failed = replace(report, gates=[Gate("output_sqnr_db", 90.0, 31.0, False)])
    text = page(failed)
    assert text.index("output_sqnr_db 31 is not ≥ 90 dB") < text.index("Layers quantized")
    assert "<title>✗" in text
    assert "gate ≥ 90: broken" in text


def test_names_are_text_and_never_markup(report: Report) -> None:
    evil = "</script><img src=x onerror=alert(1)>"
    sites = [replace(report.sites[0], module_path=evil, details={"p": evil}), *report.sites[1:]]
    for text in (page(replace(report, sites=sites, warnings=[evil])), card(replace(report, sites=sites))):
        assert "<img" not in text
        assert "&lt;img" in text


def test_a_report_with_nothing_in_it_is_a_page(report: Report) -> None:
    bare = Report(recipe="w8", target="portable", sites=[], sizes=report.sizes)
    assert "not measured" in page(bare), "its error"
    assert "w8" in card(bare)


def test_json_keeps_the_pictures(report: Report) -> None:
    again = Report.from_json(report.to_json())
    assert again.pictures == report.pictures
    assert page(again) == page(report)


def test_a_large_model_has_a_small_report(report: Report) -> None:
    """Of 40 blocks of 7 layers, all channels and histograms among them."""
    channel, weight = report.pictures.channels[0], report.pictures.weights[0]
    sites = [replace(report.sites[0], name=f"/model/layers.{n}/self_attn/q_proj/MatMul") for n in range(280)]
    pictures = replace(
        report.pictures,
        channels=tuple(replace(channel, before=(1.234,) * 75, after=(1.234,) * 75) for _ in range(160)),
        weights=tuple(replace(weight, site=site.name) for site in sites),
    )
    large = replace(report, sites=sites, pictures=pictures)
    assert len(large.to_json()) < 700_000
    assert len(page(large)) < 2_000_000


def test_notebooks_show_a_card_without_script(report: Report) -> None:
    text = card(report)
    assert "<script" not in text
    assert "6 of 7" in text


def test_infinite_numbers(report: Report) -> None:
    channel = replace(report.pictures.channels[0], spread_before=math.inf)
    sites = [replace(report.sites[0], sqnr_db=math.inf), *report.sites[1:]]
    strange = replace(report, sites=sites, pictures=replace(report.pictures, channels=(channel,)))
    assert "exact" in page(strange)
    assert "inf dB" not in page(strange)
    assert Report.from_json(strange.to_json()).pictures.channels[0].spread_before == math.inf
