"""The live page in a real browser: rows arrive, stay put, and can be looked at by pointer and by keys."""

from __future__ import annotations

import time
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from tests.helpers.browsers import running_browser
from tests.helpers.pages import Client, rows_of, serving
from tests.helpers.written_runs import LAYERS, WritingProcess, action, alert, write_run, writing

if TYPE_CHECKING:
    from playwright.sync_api import Browser

ARTIFACTS = Path(__file__).parents[3] / "artifacts" / "page"
HOSTILE = "</script><img src=x onerror=\"document.title='hurt'\"><b class=hurt>"
DRAWN = "[...document.querySelectorAll('.chart')].filter((p) => streamlensBoard.viewOf(p))"

# A chart has more sets of rows than one: the loss itself is the one that says so.
STEPS = f"""{DRAWN}.flatMap((place) => ["data-0", "data-1", "data-2"].flatMap((name) => {{
  try {{ return streamlensBoard.viewOf(place).data(name); }} catch {{ return []; }}
}})).filter((row) => row.kind === "each step").map((row) => row.step)"""

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with running_browser() as running:
        yield running


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, WritingProcess]]:
    """A process that writes into a folder of its own; it gets ready while the browser starts."""
    folder = tmp_path_factory.mktemp("live")
    with writing(folder / "run.db") as process:
        process.ask(60)
        yield folder, process


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory, writer: tuple[Path, WritingProcess]) -> Iterator[Client]:
    root = tmp_path_factory.mktemp("runs")
    extra = [alert(30, HOSTILE), action(40, "rate halved")]
    write_run(root / "first" / "run.db", 60, run="1", layers=(*LAYERS, HOSTILE), metadata={"seed": 1})
    write_run(root / "second" / "run.db", 90, run="2", layers=(*LAYERS, HOSTILE), extra=extra)
    with serving(root) as found:
        yield found


@pytest.fixture(scope="module")
def kept(browser: Browser) -> Iterator[Visit]:
    visit = Visit(browser)
    yield visit
    visit.page.close()


@pytest.fixture
def visit(kept: Visit, client: Client) -> Iterator[Visit]:
    """The page, opened and drawn anew; it has complained of nothing when the test is over."""
    kept.open(client.url)
    yield kept
    assert kept.complaints == []


class Visit:
    """A browser's page, with all that it asked for and complained about."""

    def __init__(self, browser: Browser) -> None:
        self.page = browser.new_page(viewport={"width": 1280, "height": 900})
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))

    def open(self, url: str) -> None:
        self.page.goto(url)
        self.until("document.documentElement.dataset.drawn > 0")

    def until(self, condition: str) -> None:
        # Playwright's own waiting evaluates strings, which the page's policy forbids.
        deadline = time.monotonic() + 60
        while not self.page.evaluate(f"Boolean({condition})"):
            assert time.monotonic() < deadline, condition
            self.page.wait_for_timeout(25)

    def steps(self) -> list[int]:
        """The steps of the loss as the browser's chart holds them."""
        found: list[int] = self.page.evaluate(STEPS)
        return found

    def picture(self, name: str) -> np.ndarray[Any, Any]:
        """The whole page's pixels; the picture is kept as a file too."""
        ARTIFACTS.mkdir(parents=True, exist_ok=True)
        png = self.page.screenshot(path=str(ARTIFACTS / name), full_page=True)
        return np.asarray(Image.open(BytesIO(png)).convert("RGB")).astype(int)


@pytest.mark.parametrize(("scheme", "width"), [("dark", 390), ("light", 1280)])
def test_it_is_drawn_quiet_offline_and_fits(kept: Visit, client: Client, scheme: Any, width: int) -> None:
    kept.page.emulate_media(color_scheme=scheme)
    kept.page.set_viewport_size({"width": width, "height": 900})
    kept.open(client.url)
    page = kept.page
    assert [u for u in kept.requests if not u.startswith((client.url, "data:", "blob:"))] == []
    pixels = kept.picture(f"page-{scheme}-{width}.png")
    places = page.evaluate("""[...document.querySelectorAll('.chart canvas')].map((canvas) => {
      const { left, top, right, bottom } = canvas.getBoundingClientRect();
      return [left + scrollX, top + scrollY, right + scrollX, bottom + scrollY].map(Math.round);
    })""")
    assert len(places) == int(page.evaluate("document.documentElement.dataset.drawn")) >= 4
    for left, top, right, bottom in places:
        chart = pixels[top:bottom, left:right]
        # Saturated pixels are data: text, axes and the page are grey.
        assert ((chart.max(axis=-1) - chart.min(axis=-1)) > 60).sum() > 200, (left, top)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    # Hostile names are texts, wherever they stand.
    assert page.locator("img, .hurt").count() == 0
    assert HOSTILE in page.locator("#alert-list").inner_text()
    assert kept.complaints == []


def test_all_rows_sent_are_in_the_chart(visit: Visit, client: Client) -> None:
    rows = [row for found in rows_of(client.charts(), "loss").values() for row in found]
    sent = [row["step"] for row in rows if row.get("kind") == "each step"]
    assert visit.steps() == sent == list(range(90))


def test_what_stands_above_the_charts_keeps_its_distance_also_without_settings(
    visit: Visit, client: Client
) -> None:
    visit.page.evaluate("document.getElementById('settings').replaceChildren()")
    gap = """document.getElementById('tools').getBoundingClientRect().top
      - document.getElementById('title').getBoundingClientRect().bottom"""
    assert visit.page.evaluate(f"document.getElementById('settings').hidden = true, {gap}") >= 12


def test_keys_alone_choose_compare_filter_and_close(visit: Visit) -> None:
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
    visit.picture("page-compared.png")
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


def test_a_click_on_a_heatmaps_row_shows_its_lines_and_a_reload_keeps_them(visit: Visit) -> None:
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
    visit.picture("page-row.png")
    visit.page.keyboard.press("Escape")
    visit.until("!document.querySelector('[data-detail]')")
    assert visit.page.locator("img, .hurt").count() == 0


def test_points_arrive_in_two_browsers_while_a_process_writes_and_zoom_and_a_reload_survive(
    browser: Browser, kept: Visit, writer: tuple[Path, WritingProcess]
) -> None:
    folder, process = writer
    one, two = kept, Visit(browser)
    assert process.wait() == 60
    with serving(folder) as client:
        one.open(client.url)
        two.open(client.url)
        one.until("document.querySelector('.status.recording')")
        place = "document.querySelector('.chart')"
        domain = f"streamlensBoard.viewOf({place}).scale('x').domain()"
        one.page.evaluate(f"void (globalThis.before = streamlensBoard.viewOf({place}))")
        one.page.evaluate("void streamlensBoard.zoom([2, 8])")
        assert one.steps() == two.steps() == list(range(60))
        process.ask(100)
        # They come while it writes, not only when it is done.
        for visit in (one, two):
            visit.until(f"Math.max(...{STEPS}) > 60")
        assert process.wait() == 160
        for visit in (one, two):
            visit.until(f"Math.max(...{STEPS}) === 159")
            assert visit.steps() == list(range(160))
        # The chart is the one it was, its rows are more, its zoom is the same.
        assert one.page.evaluate(f"streamlensBoard.viewOf({place}) === before")
        assert one.page.evaluate("streamlensBoard.range") == [2, 8]
        assert one.page.evaluate(domain) == [2, 8]
        assert two.page.evaluate(domain)[1] >= 159
        two.page.reload()
        two.until("document.documentElement.dataset.drawn > 0")
        assert two.steps() == list(range(160))
        assert process.is_running()
        assert one.complaints == two.complaints == []
        two.page.close()
