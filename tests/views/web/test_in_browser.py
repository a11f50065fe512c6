"""The live page in a real browser: rows arrive, stay put, and can be looked at by pointer and by keys."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from tests.helpers.pages import LAYERS, Client, action, alert, rows_of, serving, write_run

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

ROOT = Path(__file__).parents[3]
CHROMIUM = Path("/usr/bin/chromium")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
ARTIFACTS = ROOT / "artifacts" / "page"
HOSTILE = "</script><img src=x onerror=\"document.title='hurt'\"><b class=hurt>"
DRAWN = "[...document.querySelectorAll('.chart')].filter((p) => streamlensBoard.viewOf(p))"

# A chart has more sets of rows than one: the loss itself is the one that says so.
STEPS = f"""{DRAWN}.flatMap((place) => ["data-0", "data-1", "data-2"].flatMap((name) => {{
  try {{ return streamlensBoard.viewOf(place).data(name); }} catch {{ return []; }}
}})).filter((row) => row.kind === "each step").map((row) => row.step)"""

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not CHROMIUM.exists(), reason=f"no browser at {CHROMIUM}"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=str(CHROMIUM), args=FLAGS)
        yield running
        running.close()


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    root = tmp_path_factory.mktemp("runs")
    extra = [alert(30, HOSTILE), action(40, "rate halved")]
    write_run(root / "first" / "run.db", 60, run="1", layers=(*LAYERS, HOSTILE), metadata={"seed": 1})
    write_run(root / "second" / "run.db", 90, run="2", layers=(*LAYERS, HOSTILE), extra=extra)
    with serving(root) as found:
        yield found


class Visit:
    """A page opened and drawn, with all that it asked for and complained about."""

    def __init__(self, browser: Browser, url: str, **options: Any) -> None:
        self.page: Page = browser.new_page(**{"viewport": {"width": 1280, "height": 900}, **options})
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.goto(url)
        self.until("document.documentElement.dataset.drawn > 0")

    def until(self, condition: str) -> None:
        # Playwright's own waiting evaluates strings, which the page's policy forbids.
        deadline = time.monotonic() + 60
        while not self.page.evaluate(f"Boolean({condition})"):
            assert time.monotonic() < deadline, condition
            self.page.wait_for_timeout(100)

    def title_of(self) -> str:
        return self.page.locator("h1").inner_text()

    def steps(self) -> list[int]:
        """The steps of the loss as the browser's chart holds them."""
        found: list[int] = self.page.evaluate(STEPS)
        return found

    def keep(self, name: str) -> None:
        ARTIFACTS.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=str(ARTIFACTS / name), full_page=True)


@pytest.mark.parametrize(
    ("scheme", "width"), [("light", 1280), ("dark", 1280), ("dark", 390), ("light", 390)]
)
def test_it_is_drawn_quiet_offline_and_fits(
    browser: Browser, client: Client, scheme: Any, width: int
) -> None:
    visit = Visit(browser, client.url, color_scheme=scheme, viewport={"width": width, "height": 900})
    visit.keep(f"page-{scheme}-{width}.png")
    assert visit.complaints == []
    outside = [u for u in visit.requests if not u.startswith((client.url, "data:", "blob:"))]
    assert outside == []
    charts = visit.page.locator(".chart canvas")
    assert charts.count() == int(visit.page.evaluate("document.documentElement.dataset.drawn")) >= 4
    for i in range(charts.count()):
        pixels = np.asarray(Image.open(BytesIO(charts.nth(i).screenshot())).convert("RGB")).astype(int)
        # Saturated pixels are data: text, axes and the page are grey.
        assert ((pixels.max(axis=-1) - pixels.min(axis=-1)) > 60).sum() > 200, i
    assert visit.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    # Hostile names are texts, wherever they stand.
    assert visit.page.locator("img, .hurt").count() == 0
    assert HOSTILE in visit.page.locator("#alert-list").inner_text()
    visit.page.close()


def test_all_rows_sent_are_in_the_chart(browser: Browser, client: Client) -> None:
    visit = Visit(browser, client.url)
    rows = [row for found in rows_of(client.charts(), "loss").values() for row in found]
    sent = [row["step"] for row in rows if row.get("kind") == "each step"]
    assert visit.steps() == sent == list(range(90))
    visit.page.close()


def test_keys_alone_choose_compare_filter_and_close(browser: Browser, client: Client) -> None:
    visit = Visit(browser, client.url)
    page = visit.page
    stops = []
    for _ in range(8):
        page.keyboard.press("Tab")
        stops.append(page.evaluate("document.activeElement.id || document.activeElement.className"))
    assert [stop for stop in stops if stop in ("skip", "find", "run", "layers", "layer", "from", "to")] == [
        "skip",
        "find",
        "run",
        "layers",
        "layer",
        "from",
        "to",
    ]
    page.locator(".run[tabindex='0']").focus()
    page.keyboard.press("ArrowDown")
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline != "none"
    page.keyboard.press("Space")
    visit.until("document.querySelector('h1').textContent === '2 runs compared'")
    visit.until("!document.getElementById('differences').hidden")
    visit.keep("page-compared.png")
    page.keyboard.press("Enter")
    visit.until("document.querySelectorAll('.run[aria-selected=true]').length === 1")
    visit.until("document.getElementById('to').value === '60'")
    page.locator("#layers").focus()
    page.keyboard.type("classifier")
    visit.until(f"{DRAWN}.length && location.hash.includes('layers=classifier')")
    rows = "streamlensBoard.viewOf(p).data('data-0')"
    of_one = f"{rows}.every((r) => r.layer === 'classifier.2')"
    visit.until(f"{DRAWN}.some((p) => p.classList.contains('rows') && {of_one})")
    page.locator("#from").fill("10")
    page.keyboard.press("Tab")
    page.locator("#to").fill("20")
    page.keyboard.press("Enter")
    visit.until("JSON.stringify(streamlensBoard.range) === '[10,20]'")
    assert visit.complaints == []
    page.close()


def test_a_click_on_a_heatmaps_row_shows_its_lines_and_a_reload_keeps_them(
    browser: Browser, client: Client
) -> None:
    visit = Visit(browser, client.url)
    canvas = visit.page.locator(".chart.rows canvas").first
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    assert box is not None
    # The last of the rows, above the axis: the layer with the hostile name.
    visit.page.mouse.click(box["x"] + box["width"] * 0.6, box["y"] + box["height"] - 55)
    visit.until("document.querySelector('[data-detail] canvas')")
    assert visit.page.locator("[data-detail] > div h3").inner_text() == HOSTILE
    assert visit.page.locator("[data-detail] section.card").count() >= 3
    visit.page.reload()
    visit.until("document.querySelector('[data-detail] canvas')")
    visit.keep("page-row.png")
    visit.page.keyboard.press("Escape")
    visit.until("!document.querySelector('[data-detail]')")
    assert visit.page.locator("img, .hurt").count() == 0
    assert visit.complaints == []
    visit.page.close()


WRITER = """
import sys, time
from tests.helpers.pages import frames_of
from streamlens.runs import RunWriter
with RunWriter(sys.argv[1], "live", metadata={}) as writer:
    for step in range(100000):
        writer.write(frames_of(step), [time.time()] * 4)
        time.sleep(0.02)
"""


def test_points_arrive_in_two_browsers_while_a_process_writes_and_zoom_and_a_reload_survive(
    browser: Browser, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", WRITER, str(tmp_path / "run.db")]
    with subprocess.Popen(command, cwd=ROOT) as writer, serving(tmp_path) as client:
        deadline = time.monotonic() + 60
        while not client.runs() and time.monotonic() < deadline:
            time.sleep(0.2)
        one, two = Visit(browser, client.url), Visit(browser, client.url)
        one.until("document.querySelector('.status.recording')")
        place = "document.querySelector('.chart')"
        one.page.evaluate(f"globalThis.before = streamlensBoard.viewOf({place})")
        one.page.evaluate("streamlensBoard.zoom([2, 8])")
        first, other = one.steps(), two.steps()
        one.until(f"{STEPS}.some((step) => step >= {first[-1] + 20})")
        two.until(f"{STEPS}.some((step) => step >= {other[-1] + 20})")
        # The chart is the one it was, its rows are more, its zoom is the same.
        assert one.page.evaluate(f"streamlensBoard.viewOf({place}) === before")
        assert one.page.evaluate("streamlensBoard.range") == [2, 8]
        assert one.page.evaluate(f"streamlensBoard.viewOf({place}).scale('x').domain()") == [2, 8]
        assert two.page.evaluate(f"streamlensBoard.viewOf({place}).scale('x').domain()")[1] >= other[-1] + 20
        assert writer.poll() is None
        two.page.reload()
        two.until("document.documentElement.dataset.drawn > 0")
        seen = two.steps()
        assert seen == list(range(len(seen)))
        assert len(seen) >= len(other) + 20
        assert one.complaints == two.complaints == []
        writer.terminate()
        one.page.close()
        two.page.close()
