"""A page in headless Chromium, with whatever it asked for and whatever it complained of."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
WIDTHS = (390, 820, 1440)
"""In px: of a phone, of a tablet, of a screen."""


@dataclass
class Opened:
    """A page, and what its browser had to say."""

    page: Page
    requests: list[str] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)

    def shown(self) -> list[str]:
        """The rows of the layer table that no filter hides, by their first cell."""
        return self.page.locator("#table tbody tr:visible th").all_inner_texts()


@contextmanager
def launched() -> Iterator[Browser]:
    """Skips the test, saying why, where there is no browser."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (extra: test)")
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    with playwright.sync_playwright() as driver:
        if found is None and not Path(driver.chromium.executable_path).exists():
            pytest.skip("there is no Chromium: apt-get install chromium, or playwright install chromium")
        browser = driver.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def visit(browser: Browser, file: Path) -> Iterator[Opened]:
    """Fails at the end where the page fetched anything beyond the file itself, or said anything to the console."""
    found = Opened(browser.new_page(viewport={"width": 1280, "height": 900}))
    found.page.on("request", lambda request: found.requests.append(request.url))
    found.page.on("console", lambda message: found.messages.append(message.text))
    found.page.on("pageerror", lambda error: found.messages.append(str(error)))
    found.page.goto(file.as_uri())
    yield found
    assert found.requests == [file.as_uri()]
    assert found.messages == []
    found.page.close()


def assert_fits_and_can_be_read(opened: Opened, width: int, scheme: str, picture: Path, *, texts: int) -> None:
    """Nothing is wider than the window, and every text, of which there are over `texts`, stands out from its paper."""
    page = opened.page
    page.set_viewport_size({"width": width, "height": 900})
    page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
    assert page.evaluate("document.documentElement.scrollWidth") == width
    contrasts = page.evaluate(CONTRASTS)
    assert len(contrasts) > texts
    low = {text: round(ratio, 2) for text, ratio in contrasts if ratio < 4.5}
    assert low == {}, "WCAG 2 asks for 4.5 of text (level AA)"
    page.screenshot(path=picture, full_page=True)
    assert picture.stat().st_size > 50_000


CONTRASTS = """
() => {
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const luminance = (rgb) => rgb.slice(0, 3).map((c) => c / 255)
    .map((c) => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const paper = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const color = parse(getComputedStyle(e).backgroundColor);
      if (color.length === 3 || color[3] === 1) return color;
    }
    return [255, 255, 255];
  };
  const found = [];
  for (const element of document.querySelectorAll("main *:not(svg *), nav *")) {
    const text = [...element.childNodes].filter((n) => n.nodeType === 3).map((n) => n.textContent.trim()).join("");
    if (!text || !element.checkVisibility() || element.closest(".step-skipped, template")) continue;
    const [a, b] = [luminance(parse(getComputedStyle(element).color)), luminance(paper(element))].sort((x, y) => y - x);
    found.push([text.slice(0, 60), (a + 0.05) / (b + 0.05)]);
  }
  return found;
}
"""
