"""The page of a diff in a real browser: it stands alone, sorts, filters, opens its details, and fits a phone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.compiler import compile
from qcompiler.model_diff import Diff, diff
from tests import tiny
from tests.browser import WIDTHS, Opened, assert_fits_and_can_be_read, launched, visit
from tests.there import there

if TYPE_CHECKING:
    from playwright.sync_api import Browser

BLOCK = """
  n{n} = LayerNormalization <epsilon = 1e-5> (x{n}, gain{n})
  u{n} = MatMul(n{n}, up{n})
  a{n} = Relu(u{n})
  d{n} = MatMul(a{n}, down{n})
  x{next} = Add(x{n}, d{n})"""
NAMES = {"n": "layers.{n}/norm", "u": "layers.{n}/mlp/up_proj", "a": "layers.{n}/mlp/act",
         "d": "layers.{n}/mlp/down_proj"}  # fmt: skip
LINEARS = [f"model.layers.{n}.mlp.{kind}_proj" for n in range(2) for kind in ("up", "down")]


@pytest.fixture(scope="module")
def model() -> ir.Model:
    """Of two blocks, with planted outliers."""
    blocks, inputs = "", ""
    constants: dict[str, Any] = {}
    for n in range(2):
        blocks += BLOCK.format(n=n, next=n + 1)
        inputs += f", float[32] gain{n}, float[32,48] up{n}, float[48,32] down{n}"
        constants |= {f"gain{n}": "outliers", f"up{n}": "normal", f"down{n}": "normal"}
    text = f"g (float[2,S,32] x0{inputs}, float[32,16] head) => (float[2,S,16] y) {{{blocks}"
    model = tiny.build(text + "\n  y = MatMul(x2, head)\n}", **constants, head="normal")
    for node in model.graph:
        name = there(node.name)
        letter, number = name[0], name[1:]
        path = f"/model/{NAMES[letter].format(n=number)}" if letter in NAMES else f"/{node.name}"
        node.name = "/head/MatMul" if letter == "y" else f"{path}/{node.op_type}"
    return model


@pytest.fixture(scope="module")
def difference(model: ir.Model) -> Diff:
    """Between the model and what smooth-quant and the rounding made of it."""
    rng = np.random.default_rng(0)
    data = [{"x0": rng.normal(size=(2, 8, 32)).astype(np.float32)} for _ in range(4)]
    options = ["smooth-quant.alpha=0.5"]
    return diff(model, compile(model, "smoothquant", calibration=data, exclude=["head"], options=options).model)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with launched() as found:
        yield found


@pytest.fixture
def opened(browser: Browser, difference: Diff, tmp_path: Path) -> Iterator[Opened]:
    file = tmp_path / "diff.html"
    file.write_text(difference.to_html("float.onnx → compiled"), encoding="utf-8")
    with visit(browser, file) as found:
        yield found


def paths(opened: Opened) -> list[str]:
    return [name.split()[0] for name in opened.shown()]


def test_the_figures_are_seen_first(opened: Opened, difference: Diff) -> None:
    assert opened.page.locator("h1").inner_text() == "float.onnx → compiled"
    figures = dict(zip(opened.page.locator(".tile dt").all_inner_texts(),
                       opened.page.locator(".tile .figure").all_inner_texts(), strict=True))  # fmt: skip
    assert (figures["layers quantized"], figures["layers untouched"]) == ("4", "1")
    nodes = [sum(totals.nodes.values()) for totals in (difference.before, difference.after)]
    assert figures["nodes"] == f"{nodes[0]} → {nodes[1]}"


def test_sorting_by_keyboard(opened: Opened, difference: Diff) -> None:
    button = opened.page.get_by_role("button", name="weight error")
    header = opened.page.locator("#table th", has=opened.page.get_by_role("button", name="weight error"))
    button.focus()
    opened.page.keyboard.press("Enter")
    assert header.get_attribute("aria-sort") == "ascending"
    expected = [story.module_path for story in sorted(difference.layers, key=lambda story: story.weight_error or 0)]
    assert paths(opened) == expected
    assert expected[0] == "head", "its error is 0, and 0 is a number"
    opened.page.keyboard.press("Enter")
    assert header.get_attribute("aria-sort") == "descending"
    assert paths(opened) == expected[::-1]


def test_filtering(opened: Opened) -> None:
    assert paths(opened) == [*LINEARS, "head"]
    opened.page.get_by_label("Filter").fill("layers.1 smooth-quant norm")
    assert paths(opened) == ["model.layers.1.mlp.up_proj"]
    opened.page.get_by_label("Filter").fill("down_proj")
    assert paths(opened) == [path for path in LINEARS if "down" in path]
    assert opened.page.locator("#count").inner_text() == "2 of 5"
    opened.page.get_by_label("Filter").fill("")
    opened.page.get_by_label("What became of it").select_option("untouched")
    assert paths(opened) == ["head"]
    opened.page.get_by_label("Filter").fill("nowhere")
    assert paths(opened) == []
    assert opened.page.locator("#nothing").is_visible()


def test_opening_a_block(opened: Opened, difference: Diff) -> None:
    block = opened.page.locator("#blocks details", has_text="model.layers.1")
    assert block.locator("summary").inner_text() == "model.layers.1 2 quantized"
    assert block.locator("li").first.is_hidden()
    block.locator("summary").focus()
    opened.page.keyboard.press("Enter")
    told = block.locator("li").all_inner_texts()
    stories = [story for story in difference.layers if story.block == "model.layers.1"]
    assert len(told) == len(stories) == 2
    for text, story in zip(told, stories, strict=True):
        assert text.startswith(story.text)
        assert f"touched by {', '.join(story.passes)}" in text
    assert "touched by smooth-quant, quantize-weights" in told[0]
    assert "input scaled by smooth-quant into model.layers.1.norm" in told[0]


def test_a_block_opens_its_drawing(opened: Opened, difference: Diff) -> None:
    """Before and after, with what became of each node: smoothing went into the norm, and codes are added."""
    block = opened.page.locator("#blocks details", has_text="model.layers.1")
    assert block.locator("svg").count() == 0
    block.locator("summary").press("Enter")
    block.locator("svg.drawing").first.wait_for()  # drawn when the browser says that it was opened
    before, after = block.locator("svg.drawing").all()
    assert before.get_by_text("before").count() == 1
    for side in (before, after):
        assert side.locator(".unit.quantized .label").all_text_contents() == ["mlp.up_proj", "mlp.down_proj"]
        assert side.locator(".unit.changed .label").all_text_contents() == ["norm"]
        assert set(side.locator(".unit.same .label").all_text_contents()) == {"mlp.act"}
    assert before.locator(".unit.added").count() == 0
    assert after.locator(".unit.added .label").all_text_contents() == ["QuantizeLinear", "QuantizeLinear"]
    assert "48×32 int8" in after.locator(".unit.quantized .operators").all_text_contents()
    assert block.locator(".unit title").first.text_content()


def test_blocks_that_look_alike_share_a_drawing(opened: Opened, difference: Diff) -> None:
    assert len(difference.drawings) == opened.page.locator("template").count()
    drawn = {block for drawing in difference.drawings for block in drawing.blocks}
    assert drawn == {"", "model.layers.0", "model.layers.1"}
    assert "drawings" not in difference.to_dict()


def test_nodes_are_the_same_under_other_names(difference: Diff, model: ir.Model) -> None:
    """Of a model that another exporter wrote, in the blocks of the first one."""
    other = model.clone()
    for number, node in enumerate(other.graph):
        node.name = there(node.name).replace("/model/layers", "/transformer/h")
        for value in node.outputs:
            if not value.is_graph_output():
                value.name = f"value_{number}"
    found = diff(model, other)
    assert not any(story.fate != "untouched" for story in found.layers)
    assert {block for drawing in found.drawings for block in drawing.blocks} == {
        "", "model.layers.0", "model.layers.1"
    }  # fmt: skip
    for drawing in found.drawings:
        assert drawing.before == drawing.after
        assert {unit.fate for unit in drawing.after.units} <= {"same", "outside"}


def test_opening_nodes_and_constants(opened: Opened, difference: Diff) -> None:
    nodes = opened.page.locator("#nodes details")
    assert nodes.locator("table").is_hidden()
    nodes.locator("summary").click()
    counts = nodes.locator("tbody td:nth-child(2)").all_inner_texts()
    assert sum(map(int, counts)) == len(difference.nodes)
    constants = opened.page.locator("#constants details")
    constants.locator("summary").click()
    names = constants.locator("tbody th").all_inner_texts()
    assert names == [change.name for change in difference.initializers if change.kind == "changed"]
    assert {"gain0", "gain1"} <= set(names), "smoothing went into them"


def test_moved_scales_and_untouched_nodes(opened: Opened, difference: Diff) -> None:
    rows = opened.page.locator("#scales tbody tr")
    assert rows.count() == len(difference.scales) > 1
    assert rows.first.locator("th").inner_text() == "model.layers.0.norm"
    assert rows.first.locator("td").last.inner_text() == "up_proj"
    untouched = opened.page.locator("#nodes .hint").inner_text().replace("\u00a0", " ")
    assert untouched.startswith("5 nodes are untouched: 2 × Add, 2 × Relu, 1 × MatMul")


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_and_can_be_read(opened: Opened, width: int, scheme: str, tmp_path: Path) -> None:
    for summary in opened.page.locator("summary").all():
        summary.click()
    assert_fits_and_can_be_read(opened, width, scheme, tmp_path / "page.png", texts=60)


def test_print_shows_every_layer(opened: Opened) -> None:
    opened.page.emulate_media(media="print")
    assert opened.page.locator("nav").is_hidden()
    table = opened.page.locator(".tall")
    assert table.evaluate("element => element.scrollHeight <= element.clientHeight + 1"), "nothing is cut off"


# What follows needs no browser.


def test_equal_models_have_a_page(difference: Diff) -> None:
    model = tiny.build("g (float[M,32] x, float[32,16] A) => (float[M,16] y) { y = MatMul(x, A) }", A="normal")
    text = diff(model, model).to_html()
    assert "The models are equal." in text
    assert 'id="scales"' not in text
    assert "http" not in difference.to_html().replace("http-equiv", "")
