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
expect.set_options(timeout=15_000)  # for a busy machine


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


def screenshot(page: Page, path: Path) -> None:
    """A PNG of what the window shows, in 256 colors to keep it small."""
    page.wait_for_load_state("networkidle")
    Image.open(io.BytesIO(page.screenshot())).convert("RGB").quantize(256).save(path, optimize=True)


if __name__ == "__main__":
    with chromium() as browser, opened(browser, sys.argv[1], viewport={"width": 1100, "height": 760}) as page:
        screenshot(page, Path(sys.argv[2]))
