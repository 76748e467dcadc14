"""The page in a real browser, on a phone and on a desk, in light and dark."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from shoulders.report import write_report
from tests.report.browser import Tab, browser, find_chromium
from tests.report.test_page import SECTIONS

# elements of text whose contrast to what lies behind them is below 4.5 (WCAG 2.2, 1.4.3)
PALE = """
(() => {
  const rgb = text => (text.match(/[\\d.]+/g) || []).map(Number);
  const light = c => [0.2126, 0.7152, 0.0722].reduce((sum, share, i) => {
    const v = c[i] / 255; return sum + share * (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4); }, 0);
  const behind = one => {
    const c = rgb(getComputedStyle(one).backgroundColor);
    return c.length == 3 || c[3] == 1 ? c : one.parentElement ? behind(one.parentElement) : [255, 255, 255]; };
  const pale = [];
  for (const one of document.querySelectorAll("main *, footer *")) {
    if (![...one.childNodes].some(node => node.nodeType == 3 && node.data.trim())) continue;
    const style = getComputedStyle(one), svg = one.namespaceURI.endsWith("svg");
    const [a, b] = [light(rgb(svg ? style.fill : style.color)), light(behind(one))];
    const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (contrast < 4.5) pale.push(one.textContent.slice(0, 30) + " " + contrast.toFixed(2));
  }
  return pale;
})()
"""
# elements that reach out of the window, those inside of a box that scrolls apart
WIDE = """
[...document.querySelectorAll("body *")].filter(one => !one.closest(".scroll, pre, caption"))
  .filter(one => one.getBoundingClientRect().right > innerWidth + 0.5).map(one => one.tagName + " " + one.className)
"""
# words in charts that reach out of them, or lie on each other
CUT = """
[...document.querySelectorAll("figure svg[role=img]")].flatMap(svg => {
  const box = svg.getBoundingClientRect();
  const words = [...svg.querySelectorAll("text")].map(one => [one.textContent, one.getBoundingClientRect()]);
  const cut = words.filter(([, w]) => w.right > box.right + 1 || w.left < box.left - 1 || w.bottom > box.bottom + 1);
  const names = [...svg.querySelectorAll("text.name")].map(one => one.getBoundingClientRect());
  names.sort((a, b) => a.y - b.y);
  const close = names.filter((w, i) => i && w.y - names[i - 1].y < w.height * 0.7);
  return [...cut.map(([text]) => text), ...close.map(() => "names on each other")];
})
"""


@pytest.fixture(scope="module")
def file(run: Path) -> Path:
    return write_report(run)


@pytest.fixture(scope="module")
def tab() -> Iterator[Tab]:
    program = find_chromium()
    if program is None:
        pytest.skip("no Chromium here: install one, or set SHOULDERS_CHROMIUM to the program")
    with browser(program) as opened:
        yield opened


@pytest.mark.parametrize(("width", "scheme"), [(360, "light"), (360, "dark"), (768, "light"), (1280, "dark")])
def test_it_fits_and_can_be_read(file: Path, tab: Tab, width: int, scheme: str) -> None:
    tab.open(file, width, scheme=scheme)
    tab.value("document.querySelectorAll('details').forEach(one => one.open = true)")
    assert tab.value("innerWidth") == width
    assert tab.value("document.documentElement.scrollWidth") <= width
    assert tab.value(WIDE) == []
    assert tab.value(CUT) == []
    assert tab.value(PALE) == []
    heights = tab.value("[...document.querySelectorAll('section')].map(one => [one.id, one.offsetHeight])")
    assert [name for name, height in heights if height > 100] == SECTIONS
    assert tab.value("[...document.images].every(one => one.naturalWidth > 0)")
    dark = tab.value("getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"
    assert dark == (scheme == "dark")


def test_it_asks_for_nothing_and_complains_of_nothing(file: Path, tab: Tab) -> None:
    tab.asked.clear()
    tab.trouble.clear()
    tab.open(file, 1280)
    assert [address for address in tab.asked if not address.startswith("data:")] == [file.resolve().as_uri()]
    assert tab.trouble == []


def test_it_prints(file: Path, tab: Tab, tmp_path: Path) -> None:
    tab.open(file, 1280, scheme="dark")
    tab.call("Emulation.setEmulatedMedia", media="print")
    assert tab.value("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    tab.pdf(tmp_path / "page.pdf")
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")
