"""A real browser for tests, with nothing of the user's own and nothing from the network."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from playwright.sync_api import Browser

__all__ = ["running_browser"]

_CHROMIUM = Path("/usr/bin/chromium")
_FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@contextmanager
def running_browser() -> Iterator[Browser]:
    """Run the browser. Where it or Playwright is missing, tests fail: they are not left out."""
    from playwright.sync_api import sync_playwright

    assert _CHROMIUM.exists(), f"no browser at {_CHROMIUM}: apt install chromium, or make test"
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=str(_CHROMIUM), args=list(_FLAGS))
        try:
            yield running
        finally:
            running.close()
