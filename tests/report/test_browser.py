"""The page in a real browser, on phones and desktops, in light and dark mode."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from shoulders.report import write_report
from tests.report.browser import Tab, browser, find_chromium
from tests.report.test_page import SECTIONS

# elements with text whose contrast to the background is below 4.5 (WCAG 2.2, 1.4.3)
LOW_CONTRAST = """
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
# elements that are wider than the window, except those in a box that scrolls
TOO_WIDE = """
[...document.querySelectorAll("body *")].filter(one => !one.closest(".scroll, pre, caption"))
  .filter(one => one.getBoundingClientRect().right > innerWidth + 0.5).map(one => one.tagName + " " + one.className)
"""
# text in charts that is cut off, or overlaps
CUT_OFF = """
[...document.querySelectorAll("figure svg[role=img]")].flatMap(svg => {
  const box = svg.getBoundingClientRect();
  const words = [...svg.querySelectorAll("text")].map(one => [one.textContent, one.getBoundingClientRect()]);
  const cut = words.filter(([, w]) => w.right > box.right + 1 || w.left < box.left - 1 || w.bottom > box.bottom + 1);
  const names = [...svg.querySelectorAll("text.name")].map(one => one.getBoundingClientRect());
  names.sort((a, b) => a.y - b.y);
  const close = names.filter((w, i) => i && w.y - names[i - 1].y < w.height * 0.7);
  return [...cut.map(([text]) => text), ...close.map(() => "names overlap")];
})
"""


@pytest.fixture(scope="module")
def file(run: Path) -> Path:
    return write_report(run)


@pytest.fixture(scope="module")
def tab() -> Iterator[Tab]:
    program = find_chromium()
    if program is None:
        pytest.skip("no Chromium: install it, or set SHOULDERS_CHROMIUM to its path")
    with browser(program) as opened:
        yield opened


@pytest.mark.parametrize(("width", "scheme"), [(360, "light"), (360, "dark"), (768, "light"), (1280, "dark")])
def test_the_page_fits_the_window_and_has_enough_contrast(file: Path, tab: Tab, width: int, scheme: str) -> None:
    tab.open(file, width, scheme=scheme)
    tab.value("document.querySelectorAll('details').forEach(one => one.open = true)")
    assert tab.value("innerWidth") == width
    assert tab.value("document.documentElement.scrollWidth") <= width
    assert tab.value(TOO_WIDE) == []
    assert tab.value(CUT_OFF) == []
    assert tab.value(LOW_CONTRAST) == []
    heights = tab.value("[...document.querySelectorAll('section')].map(one => [one.id, one.offsetHeight])")
    assert [name for name, height in heights if height > 100] == SECTIONS
    assert tab.value("[...document.images].every(one => one.naturalWidth > 0)")
    dark = tab.value("getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"
    assert dark == (scheme == "dark")


def test_the_page_loads_nothing_and_has_no_errors(file: Path, tab: Tab) -> None:
    tab.requests.clear()
    tab.errors.clear()
    tab.open(file, 1280)
    assert [address for address in tab.requests if not address.startswith("data:")] == [file.resolve().as_uri()]
    assert tab.errors == []


def test_the_page_prints_on_white(file: Path, tab: Tab, tmp_path: Path) -> None:
    tab.open(file, 1280, scheme="dark")
    tab.command("Emulation.setEmulatedMedia", media="print")
    assert tab.value("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    tab.pdf(tmp_path / "page.pdf")
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")
