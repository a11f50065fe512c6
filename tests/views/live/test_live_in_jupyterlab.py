"""Live charts in JupyterLab, in a real browser: moving while the cell runs, and saved with the notebook."""

from __future__ import annotations

import json
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from tests.helpers.browsers import running_browser
from tests.helpers.jupyter import Lab, jupyter_lab, wait_for
from tests.views.fakes import count_pixels

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.browser

ARTIFACTS = Path(__file__).parents[3] / "artifacts" / "notebook"
NAME = "training.ipynb"
HOSTILE = "</script><img src=x onerror=\"document['title']='hurt'\">"
MAKE = f"""
import json, pathlib, time, torch, streamlens as sl
parts = {{name: torch.nn.Linear(8, 8) for name in ["first", {HOSTILE!r}, "last"]}}
model = torch.nn.Sequential()
for name, part in parts.items():
    model.add_module(name, part)
optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
criterion = torch.nn.MSELoss()
lens = sl.observe(model, loss=criterion)
x = torch.randn(32, 8)
"""
SHOW = "live = sl.live(lens, views=['loss', 'uw_ratio'], hz=5)"
# It trains until it is told to end, then says what the charts hold before the cell ends.
TRAIN = """
until, steps = time.monotonic() + 180, 0
while not pathlib.Path("enough").exists() and time.monotonic() < until:
    optimizer.zero_grad()
    criterion(model(x), 0.3 * x).backward()
    optimizer.step()
    steps += 1
    time.sleep(0.01)
live.chart.drain(10)
rows = live.chart.board.whole().content["rows"]
pathlib.Path("sent.part").write_text(json.dumps({"steps": steps, "rows": rows}))
pathlib.Path("sent.part").rename("sent.json")
while not pathlib.Path("seen").exists() and time.monotonic() < until + 30:
    time.sleep(0.05)
"""
SHOWN = """() => {
  const screen = document.querySelector(".streamlens-live")?.streamlens;
  return screen && Object.fromEntries([...screen.places].map(([key, { view, el }]) => [
    key,
    { rows: view?.data("data-0").length ?? 0, drawn: el.dataset.drawn, failed: el.dataset.failed },
  ]));
}"""

RANGES = """() => [...document.querySelector(".streamlens-live").streamlens.places.values()].map(
  ({ view }) => view.signal("steps_step") ?? null,
)"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with jupyter_lab(tmp_path_factory.mktemp("lab")) as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with running_browser() as running:
        yield running


def keep(page: Page, name: str) -> None:
    ARTIFACTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=str(ARTIFACTS / name))


def shown(page: Page) -> dict[str, Any]:
    return page.evaluate(SHOWN) or {}


def wait_for_rows(page: Page, count: int) -> dict[str, Any]:
    page.wait_for_function(f"count => (({SHOWN})()?.loss?.rows ?? 0) >= count", arg=count, timeout=60_000)
    return shown(page)


def pixels(page: Page, chart: int) -> np.ndarray[Any, Any]:
    png = page.locator(".streamlens-live canvas").nth(chart).screenshot()
    return np.asarray(Image.open(BytesIO(png)).convert("RGB")).astype(int)


def rows_of(charts: dict[str, Any]) -> dict[str, int]:
    return {key: chart["rows"] for key, chart in charts.items()}


def sent(lab: Lab) -> dict[str, int]:
    """How many rows each chart has to show, as the kernel says."""
    told = json.loads((lab.folder / "sent.json").read_text())["rows"]
    counts = {part["topic"]: part["count"] for part in told}
    return {"loss": counts["loss"] + counts["loss.ema"], "update_to_weight_ratio": counts["uw_ratio"]}


def zoom(page: Page, chart: int) -> None:
    page.locator(".streamlens-live canvas").nth(chart).hover(position={"x": 300, "y": 150})
    page.keyboard.down("Control")
    page.mouse.wheel(0, -400)
    page.keyboard.up("Control")


def test_charts_move_while_the_cell_runs_and_stay_in_the_saved_notebook(browser: Browser, lab: Lab) -> None:
    lab.write(NAME, [MAKE, SHOW, TRAIN])
    page = browser.new_page(viewport={"width": 1300, "height": 1250})
    requests: list[str] = []
    failures: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.on("pageerror", lambda error: failures.append(str(error)))
    lab.open(page, NAME)
    lab.command(page, "notebook:run-all-cells")

    # Points arrive while the kernel is busy, and charts are not drawn anew for them.
    first = wait_for_rows(page, 20)
    later = wait_for_rows(page, first["loss"]["rows"] + 60)
    assert "*" in page.locator(".jp-InputPrompt").last.inner_text(), "the cell is still running"
    assert set(later) == {"loss", "update_to_weight_ratio"}
    assert int(later["loss"]["drawn"]) <= 4
    assert all(chart["failed"] is None for chart in later.values())

    # They show their series' colours, and the hostile layer as text.
    assert count_pixels(pixels(page, 0), "#0072b2") > 100
    heat = pixels(page, 1)
    assert ((heat.max(axis=-1) - heat.min(axis=-1)) > 25).sum() > 5000
    assert page.title() != "hurt"
    assert page.locator(".streamlens-live img").count() == 0
    keep(page, "live.png")

    # Zooming one zooms the other, while both go on.
    zoom(page, 0)
    page.wait_for_function(f"() => ({RANGES})().every((range) => range !== null)", timeout=10_000)
    [chosen, followed] = page.evaluate(RANGES)
    assert chosen == followed
    assert chosen[0] < chosen[1] < wait_for_rows(page, later["loss"]["rows"] + 80)["loss"]["rows"] / 2
    assert page.evaluate(RANGES) == [chosen, chosen]
    page.locator(".streamlens-live canvas").nth(0).dblclick(position={"x": 300, "y": 150})
    page.wait_for_function(f"() => ({RANGES})().every((range) => range === null)", timeout=10_000)

    # What was sent is what is shown.
    (lab.folder / "enough").touch()
    wait_for(lambda: (lab.folder / "sent.json").exists())
    page.wait_for_timeout(1000)
    assert rows_of(shown(page)) == sent(lab)
    (lab.folder / "seen").touch()

    # The cell has ended: its output is a picture, and the notebook that is saved now keeps it.
    page.wait_for_selector(".jp-RenderedVegaCommon5 canvas, .jp-RenderedVegaCommon5 svg", timeout=60_000)
    assert page.locator(".streamlens-live").count() == 0
    lab.command(page, "docmanager:save")
    page.wait_for_timeout(1500)
    keep(page, "ended.png")
    page.close()
    [output] = lab.read(NAME).cells[1].outputs
    assert sorted(output["data"]) == ["application/vnd.vegalite.v5+json", "image/png", "text/plain"]

    # Opened again it shows the charts, without a cell having run.
    again = browser.new_page(viewport={"width": 1300, "height": 1250})
    again.on("request", lambda request: requests.append(request.url))
    lab.open(again, NAME)
    again.wait_for_selector(".jp-RenderedVegaCommon5 canvas, .jp-RenderedVegaCommon5 svg", timeout=60_000)
    keep(again, "reopened.png")
    again.close()
    assert failures == []
    assert {url.split("/")[2].split(":")[0] for url in requests if "://" in url} == {"127.0.0.1"}
