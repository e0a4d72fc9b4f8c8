"""A real browser, without a window, for pages that are served: an installed Chromium, driven by playwright.

python tests/browser.py http://127.0.0.1:8000/#text=bell page.png        takes a picture for the README
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
QUIET = [
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
]
expect.set_options(timeout=15_000)  # a busy machine is slow


@contextmanager
def chromium() -> Iterator[Browser]:
    """The installed browser; where there is none, the test is skipped, and says so."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if not found:
        pytest.skip(f"no browser on PATH ({', '.join(NAMES)}); apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=QUIET)
        yield browser
        browser.close()


@contextmanager
def opened(browser: Browser, url: str, **options) -> Iterator[Page]:
    """A page in a fresh profile, that asked nobody but its own server and wrote no error into its console.

    Args:
        options: of Browser.new_context: viewport, color_scheme, ...
    """
    origin, strangers, complaints = "/".join(url.split("/")[:3]), [], []
    with browser.new_context(**options) as context:
        page = context.new_page()
        page.on(
            "request",
            lambda request: (
                request.url.startswith((origin, "data:", f"blob:{origin}")) or strangers.append(request.url)
            ),
        )
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on(
            "console",
            lambda said: complaints.append(said.text) if said.type in ("error", "warning") else None,
        )
        page.goto(url)
        yield page
        # A browser notes each answer that refuses; the page shows its sentence.
        assert (
            strangers,
            [each for each in complaints if "the server responded with a status of" not in each],
        ) == ([], [])


def overflow_px(page: Page) -> int:
    """By how much a page is wider than its window."""
    return page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")


def screenshot(page: Page, path: Path) -> None:
    """A PNG of what the window shows, of 256 colors, so that it is small."""
    page.wait_for_load_state("networkidle")
    Image.open(io.BytesIO(page.screenshot())).convert("RGB").quantize(256).save(path, optimize=True)


if __name__ == "__main__":
    with chromium() as browser, opened(browser, sys.argv[1], viewport={"width": 1100, "height": 760}) as page:
        screenshot(page, Path(sys.argv[2]))
