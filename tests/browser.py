"""A real browser without a window, for the pages: an installed Chromium, driven by playwright.

python tests/browser.py http://127.0.0.1:8000/#text=bell page.png        takes a screenshot for the docs

Pages forbid eval in their Content-Security-Policy, so wait with locators (expect, locator.wait_for), not with
page.wait_for_function("a string").
"""

import io
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome")
ARGUMENTS = [
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
]
expect.set_options(timeout=60_000)  # for a busy machine


_running: list[Browser] = []


@contextmanager
def chromium() -> Iterator[Browser]:
    """The installed browser; one that is already running is used again, as by the fixture `browser`."""
    if _running:
        yield _running[0]
        return
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if not path:
        pytest.skip(f"no browser on PATH ({', '.join(NAMES)}); apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        _running.append(browser)
        try:
            yield browser
        finally:
            _running.clear()
            browser.close()


@contextmanager
def opened(browser: Browser, url: str, **options) -> Iterator[Page]:
    """A page in a fresh profile; at the end, it has requested nothing from other hosts and logged no error.

    Args:
        url: http://..., or file://... of one page.
        options: Of Browser.new_context: viewport, color_scheme, ...
    """
    origin = url if url.startswith("file:") else "/".join(url.split("/")[:3])
    foreign, errors = [], []

    def on_request(request) -> None:
        if not request.url.startswith((origin, "data:", f"blob:{origin}")):
            foreign.append(request.url)

    def on_console(message) -> None:
        # The browser logs each refused response; the page shows its sentence.
        if (
            message.type in ("error", "warning")
            and "the server responded with a status of" not in message.text
        ):
            errors.append(message.text)

    with browser.new_context(**options) as context:
        page = context.new_page()
        page.on("request", on_request)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", on_console)
        page.goto(url)
        yield page
        assert (foreign, errors) == ([], [])


def overflow_px(page: Page) -> int:
    """By how much a page is wider than its window."""
    return page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")


def sideways_scrollers(page: Page) -> list[str]:
    """Elements within the page that scroll sideways."""
    return page.evaluate(
        """() => [...document.querySelectorAll("body *")]
          .filter((element) => /auto|scroll/.test(getComputedStyle(element).overflowX))
          .filter((element) => element.scrollWidth > element.clientWidth)
          .map((element) => element.outerHTML.slice(0, 100))"""
    )


LOW_CONTRAST = """(least) => {
  const context = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const parse = (color) => {  // [r, g, b, alpha], each in [0, 1]
    context.clearRect(0, 0, 1, 1);
    context.fillStyle = color;
    context.fillRect(0, 0, 1, 1);
    return [...context.getImageData(0, 0, 1, 1).data].map((value) => value / 255);
  };
  const over = ([r, g, b, alpha], below) =>
    [r, g, b].map((value, n) => value * alpha + below[n] * (1 - alpha));
  const linear = (value) => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
  const luminance = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  const contrast = (one, two) => {
    const [dark, light] = [luminance(one), luminance(two)].sort((a, b) => a - b);
    return (light + 0.05) / (dark + 0.05);
  };
  const probe = document.body.appendChild(document.createElement("i"));
  probe.style.background = "Canvas";
  const canvas = parse(getComputedStyle(probe).backgroundColor).slice(0, 3);
  probe.remove();
  const backgroundOf = (element) => element
    ? over(parse(getComputedStyle(element).backgroundColor), backgroundOf(element.parentElement)) : canvas;
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), found = [];
  for (let node; node = walker.nextNode();) {
    const element = node.parentElement;
    if (!node.data.trim() || element.closest("svg, script, style, :disabled")) continue;
    if (!element.checkVisibility({ visibilityProperty: true })) continue;
    const background = backgroundOf(element), [r, g, b, alpha] = parse(getComputedStyle(element).color);
    let opacity = alpha;
    for (let up = element; up; up = up.parentElement) opacity *= getComputedStyle(up).opacity;
    const reached = contrast(over([r, g, b, opacity], background), background);
    if (reached < least) found.push(`${reached.toFixed(2)}: ${node.data.trim().slice(0, 60)}`);
  }
  return found;
}"""


def low_contrast(page: Page, least: float = 4.5) -> list[str]:
    """Visible texts with less contrast to their background than WCAG 2 asks for, outside of plots."""
    return page.evaluate(LOW_CONTRAST, least)


def screenshot(page: Page, path: Path) -> None:
    """A PNG of what the window shows, in 256 colors to keep it small."""
    page.wait_for_load_state("networkidle")
    Image.open(io.BytesIO(page.screenshot())).convert("RGB").quantize(256).save(path, optimize=True)


if __name__ == "__main__":
    with chromium() as browser, opened(browser, sys.argv[1], viewport={"width": 1100, "height": 760}) as page:
        screenshot(page, Path(sys.argv[2]))
