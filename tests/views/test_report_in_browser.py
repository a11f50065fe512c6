"""The report in a real browser: drawn, quiet, offline, and tied together along its steps."""

from __future__ import annotations

import math
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from streamlens.views.report import write_report
from streamlens.views.theme import NOT_FINITE
from tests.helpers.browsers import running_browser
from tests.views.fakes import LAYERS, FakeRun, count_pixels, tables

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

ARTIFACTS = Path(__file__).parents[2] / "artifacts" / "report"
CHARTS = 8
SCATTER = 4
"""The one chart whose axis is not the step."""
HOSTILE = "</script><img src=x onerror=\"document.title='hurt'\"><b class=hurt>"

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with running_browser() as running:
        yield running


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = tables(layers=(*LAYERS, HOSTILE))
    data["uw_ratio"].loc[data["uw_ratio"]["step"] == 60, "value"] = math.nan
    settings = {"model": "AlexNetMini", "dataset": "digits", "optimizer": "Adam", "note": HOSTILE}
    return write_report(FakeRun(data, settings), tmp_path_factory.mktemp("report") / "report.html")


class Visit:
    """A page opened and drawn, with all that it asked for and complained about."""

    def __init__(self, browser: Browser, report: Path, **options: Any) -> None:
        self.page: Page = browser.new_page(**options)
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.goto(report.as_uri())
        self.page.wait_for_selector("html[data-drawn], html[data-failed]", state="attached", timeout=60_000)

    def pixels(self, chart: int) -> np.ndarray[Any, Any]:
        png = self.page.locator(".chart canvas").nth(chart).screenshot()
        return np.asarray(Image.open(BytesIO(png)).convert("RGB")).astype(int)

    def keep(self, name: str) -> None:
        ARTIFACTS.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=str(ARTIFACTS / name), full_page=True)


@pytest.fixture(params=[("light", 1180), ("dark", 1180), ("light", 390)], ids=["light", "dark", "narrow"])
def visit(request: pytest.FixtureRequest, browser: Browser, report: Path) -> Iterator[Visit]:
    scheme, width = request.param
    opened = Visit(browser, report, color_scheme=scheme, viewport={"width": width, "height": 900})
    opened.keep(f"report-{scheme}-{width}.png")
    yield opened
    opened.page.close()


def test_every_chart_is_drawn_and_nothing_is_loaded_or_complained_about(visit: Visit, report: Path) -> None:
    assert visit.complaints == []
    assert [url for url in visit.requests if not url.startswith("data:")] == [report.as_uri()]
    assert visit.page.locator(".chart canvas").count() == CHARTS
    for chart in range(CHARTS):
        pixels = visit.pixels(chart)
        # Saturated pixels are data: text, axes and the page are grey.
        assert ((pixels.max(axis=-1) - pixels.min(axis=-1)) > 60).sum() > 300, chart
    assert count_pixels(visit.pixels(3), NOT_FINITE) > 50
    # Nothing is cut off at the side, on a telephone either.
    assert visit.page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_hostile_names_make_no_element_and_run_nothing(visit: Visit) -> None:
    assert visit.page.title() == "AlexNetMini on digits"
    assert visit.page.locator("img, .hurt").count() == 0
    assert HOSTILE in visit.page.locator(".settings").inner_text()
    # The tooltip of the hostile layer's row, the last of the heatmap.
    heatmap = visit.page.locator(".chart canvas").nth(3)
    heatmap.scroll_into_view_if_needed()
    box = heatmap.bounding_box()
    assert box is not None
    visit.page.mouse.move(box["x"] + box["width"] * 0.7, box["y"] + box["height"] - 50)
    visit.page.wait_for_selector("#vg-tooltip-element.visible", timeout=3_000)
    assert "img src=x" in visit.page.locator("#vg-tooltip-element").inner_text()
    assert visit.page.locator("img, .hurt").count() == 0


@pytest.mark.parametrize(
    ("chart", "words"),
    [
        (0, ["value of", "each step"]),
        (2, ["measured on", "t"]),
        (5, ["layer", "features.", "gradient norm"]),
        (7, ["eigenvalue", "λ"]),
    ],
)
def test_pointing_near_a_line_says_what_it_is(
    browser: Browser, report: Path, chart: int, words: list[str]
) -> None:
    visit = Visit(browser, report, viewport={"width": 1180, "height": 900})
    canvas = visit.page.locator(".chart canvas").nth(chart)
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    assert box is not None
    visit.page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] - 60)
    visit.page.wait_for_selector("#vg-tooltip-element.visible", timeout=3_000)
    said = visit.page.locator("#vg-tooltip-element").inner_text()
    visit.page.close()
    assert "undefined" not in said
    assert all(word in said for word in ["step", "epoch", *words]), said


def test_the_step_axes_of_all_charts_start_and_end_at_the_same_places(browser: Browser, report: Path) -> None:
    visit = Visit(browser, report, viewport={"width": 1180, "height": 900})
    ends = []
    for chart in set(range(CHARTS)) - {SCATTER}:
        pixels = visit.pixels(chart)
        # The longest grey horizontal line of a chart is its step axis.
        axis = np.abs(pixels - np.array([0xD0, 0xD7, 0xDE])).max(axis=-1) < 10
        row = axis.sum(axis=1).argmax()
        ends.append((int(axis[row].argmax()), int(len(axis[row]) - axis[row][::-1].argmax())))
    visit.page.close()
    assert max(start for start, _ in ends) - min(start for start, _ in ends) <= 1
    assert max(end for _, end in ends) - min(end for _, end in ends) <= 1


def differ(before: np.ndarray[Any, Any], after: np.ndarray[Any, Any]) -> bool:
    """Whether one sees it: a part that is drawn anew may round the edge of a line otherwise."""
    return bool((np.abs(before - after) > 20).any())


def test_zooming_one_chart_zooms_all_and_a_double_click_goes_back(browser: Browser, report: Path) -> None:
    visit = Visit(browser, report, viewport={"width": 1180, "height": 900})
    before = [visit.pixels(chart) for chart in range(CHARTS)]
    canvas = visit.page.locator(".chart canvas").nth(0)
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    assert box is not None
    visit.page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    visit.page.keyboard.down("Control")
    visit.page.mouse.wheel(0, -400)
    visit.page.keyboard.up("Control")
    visit.page.wait_for_timeout(400)
    visit.page.mouse.move(5, 5)
    visit.page.wait_for_timeout(200)
    zoomed = [visit.pixels(chart) for chart in range(CHARTS)]
    assert [differ(a, b) for a, b in zip(before, zoomed, strict=True)] == [True] * CHARTS
    canvas.scroll_into_view_if_needed()
    canvas.dblclick(position={"x": box["width"] / 2, "y": box["height"] / 2})
    visit.page.mouse.move(5, 5)
    visit.page.wait_for_timeout(400)
    after = [visit.pixels(chart) for chart in range(CHARTS)]
    visit.page.close()
    assert [differ(a, b) for a, b in zip(before, after, strict=True)] == [False] * CHARTS
    assert visit.complaints == []


def test_the_charts_follow_the_colour_scheme_when_it_changes(browser: Browser, report: Path) -> None:
    visit = Visit(browser, report, color_scheme="light", viewport={"width": 1180, "height": 900})
    bright = visit.pixels(0).mean()
    visit.page.emulate_media(color_scheme="dark")
    visit.page.wait_for_timeout(1500)
    assert visit.page.locator(".chart canvas").count() == CHARTS
    assert visit.pixels(0).mean() < bright / 3
    visit.page.close()
    assert visit.complaints == []
