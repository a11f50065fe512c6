"""The report: complete, self-contained, and harmless whatever the run is called."""

from __future__ import annotations

import json
import math
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import altair as alt
import pandas as pd
import pytest
import torch

from streamlens import views
from streamlens.errors import RunStoreError
from streamlens.frame import Frame
from streamlens.runs import Run, RunWriter
from streamlens.views.report import write_report
from tests.views.fakes import LAYERS, FakeRun, rows, tables

METADATA = {"model": "AlexNetMini", "dataset": "digits", "optimizer": "Adam", "learning_rate": 3e-3}
HOSTILE = [
    "<script>document.title='hurt'</script>",
    "</script><img src=x onerror=\"document.title='hurt'\">",
    "\"'>&<!--",
    "../../etc/passwd",
    "\u2028\u2029\U0001f984",
]


class Page(HTMLParser):
    """What a browser would make of a page: its elements, the text of each, the data embedded."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.embedded: dict[str, Any] = {}
        self._open: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "br"):
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        tag = self._open[-1] if self._open else ""
        self.texts.setdefault(tag, []).append(data)
        if tag == "script" and self.tags[-1][1].get("type") == "application/json":
            self.embedded[self.tags[-1][1]["id"] or ""] = json.loads(data)

    @property
    def shape(self) -> list[tuple[str, list[str]]]:
        return [(tag, sorted(attributes)) for tag, attributes in self.tags]

    @property
    def titles(self) -> list[str]:
        return self.texts.get("h3", [])

    @property
    def words(self) -> str:
        return " ".join(" ".join(t) for tag, t in self.texts.items() if tag not in ("script", "style"))


def report(tmp_path: Path, data: dict[str, pd.DataFrame], metadata: dict[str, Any] | None = None) -> Page:
    return Page(write_report(FakeRun(data, metadata), tmp_path / "report.html"))


def values_of(page: Page) -> list[dict[str, Any]]:
    return [
        row
        for chart in page.embedded["charts"]
        for data in chart["spec"]["datasets"].values()
        for row in data
    ]


def test_the_page_has_a_section_a_chart_and_a_sentence_for_each_topic(tmp_path: Path) -> None:
    page = report(tmp_path, tables(), METADATA)
    assert page.titles == [
        "Loss",
        "Learning rate",
        "Accuracy",
        "Update-to-weight ratio",
        "Ratio against loss decrease",
        "Gradient norms",
        "Weight norms",
        "Curvature",
    ]
    places = [attributes["id"] for _, attributes in page.tags if attributes.get("class") == "chart"]
    assert places == [chart["id"] for chart in page.embedded["charts"]]
    assert "Not recorded" not in page.words


def test_the_head_names_model_data_and_every_setting(tmp_path: Path) -> None:
    page = report(tmp_path, tables(), {**METADATA, "nested": {"beta": [0.9, 0.999]}, "unset": None})
    assert page.texts["h1"] == ["AlexNetMini on digits"]
    assert {"optimizer", "learning rate", "nested.beta"} <= set(page.texts["dt"])
    assert {"Adam", "0.003", "[0.9, 0.999]"} <= set(page.texts["dd"])
    assert "unset" not in page.words


def test_a_run_without_metadata_has_a_title_all_the_same(tmp_path: Path) -> None:
    assert report(tmp_path, tables()).texts["h1"] == ["Training run"]


def test_absent_topics_have_no_section_but_a_note_on_how_to_record_them(tmp_path: Path) -> None:
    page = report(tmp_path, {"loss": rows({"": [2.0, 1.0]})})
    assert page.titles == ["Loss"]
    assert 'lens.emit("test_accuracy", share)' in page.texts["code"]
    assert "lens.pipe(sl.uw_ratio()).subscribe(store)" in page.texts["code"]
    assert not any("observe(" in how for how in page.texts["code"])


@pytest.mark.parametrize("data", [{}, {"loss": rows({"": []})}, {"batch_started": rows({"": [1.0]})}])
def test_a_run_with_nothing_to_show_gives_a_page_that_says_so(
    tmp_path: Path, data: dict[str, pd.DataFrame]
) -> None:
    page = report(tmp_path, data)
    assert page.titles == ["Nothing was recorded"]
    assert page.embedded["charts"] == []


def test_several_models_have_a_heading_each_and_layers_without_its_name(tmp_path: Path) -> None:
    page = report(tmp_path, {**tables(prefix="G"), **tables(prefix="D")})
    assert page.texts["h2"] == ["G", "D"]
    assert page.titles == 2 * page.titles[:8]
    assert {row["layer"] for row in values_of(page) if "layer" in row} == set(LAYERS)


def test_a_slash_in_a_name_of_the_users_own_does_not_make_a_model(tmp_path: Path) -> None:
    page = report(tmp_path, {**tables(), "validation/error": rows({"": [1.0, 2.0]})})
    assert "h2" not in page.texts


def test_the_page_stays_within_its_points_and_its_size_for_a_long_run_of_many_layers(
    tmp_path: Path,
) -> None:
    page = report(tmp_path, tables(steps=3000, layers=[f"block{i}.conv" for i in range(60)]))
    assert 5_000 < len(values_of(page)) <= 10_500
    assert (tmp_path / "report.html").stat().st_size < 2_000_000


def test_nan_everywhere_still_makes_a_page_and_no_invalid_json(tmp_path: Path) -> None:
    data = {topic: table.assign(value=math.nan) for topic, table in tables().items()}
    page = report(tmp_path, data)
    assert len(page.embedded["charts"]) == 8
    assert "NaN" in page.texts["dd"]


@pytest.mark.parametrize("hostile", HOSTILE)
def test_hostile_names_are_shown_as_text_and_make_no_element(tmp_path: Path, hostile: str) -> None:
    def made(name: str) -> Page:
        layers = [f"{name}{i}" for i in range(3)]
        named = tables(24, layers, prefix=name)
        data = {"uw_ratio": tables(24, layers)["uw_ratio"], f"{name}/loss": named[f"{name}/loss"]}
        return report(tmp_path, data, {"model": name, "dataset": name, name: name, "note": {name: [name]}})

    page = made(hostile)
    assert page.shape == made("harmless").shape
    assert page.texts["h1"] == [f"{hostile} on {hostile}"]
    assert page.texts["h2"] == [hostile]
    assert f"{hostile}0" in {row.get("layer") for row in values_of(page)}


def test_a_name_that_is_no_valid_text_still_makes_a_page(tmp_path: Path) -> None:
    page = report(tmp_path, {"loss": rows({"": [1.0]})}, {"model": "b\ud800"})
    assert page.texts["h1"] == ["b?"]


def test_the_page_forbids_itself_everything_but_its_own_scripts(tmp_path: Path) -> None:
    page = report(tmp_path, tables())
    (policy,) = [a["content"] or "" for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe-eval" not in policy
    assert "'unsafe-inline'" not in policy.split("style-src")[0]
    outside = [
        a for _, a in page.tags for key in ("src", "href") if not (a.get(key) or "data:").startswith("data:")
    ]
    assert outside == []


def test_a_run_store_is_read_from_its_path(tmp_path: Path) -> None:
    store = RunWriter(tmp_path / "run.db", "one", metadata={"model": "Tiny"})
    for step in range(20):
        store.write([Frame("uw_ratio", step, ("a", "b"), torch.tensor([1e-3, math.nan]))])
    store.close()
    page = Page(write_report(tmp_path / "run.db", tmp_path / "report.html"))
    assert page.texts["h1"] == ["Tiny"]
    assert page.titles == ["Update-to-weight ratio"]
    cells = [row for row in values_of(page) if row.get("layer")]
    assert [row["layer"] for row in cells if row.get("holds")] == ["b"] * 20
    assert [row["value"] for row in cells if "value" in row] == [-3] * 20


def test_a_long_run_is_read_through_its_roll_ups_and_keeps_its_spikes_and_its_nan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = RunWriter(tmp_path / "run.db", "one")
    losses = torch.full((6000,), 2.0)
    losses[1234], losses[4321] = 50.0, math.nan
    store.write([Frame("loss", step, ("",), losses[step : step + 1]) for step in range(6000)])
    store.close()
    monkeypatch.setattr(Run, "dataframe", lambda *_, **__: pytest.fail("every frame was read"))
    rows = values_of(Page(write_report(tmp_path / "run.db", tmp_path / "report.html")))
    drawn = [row["value"] for row in rows if row.get("kind") == "each step"]
    assert 500 < len(drawn) < 2000
    assert max(value for value in drawn if value is not None) == 50.0
    (flag,) = [row for row in rows if row.get("flag") == "NaN" and row["series"] == "(model)"]
    assert abs(flag["step"] - 4321) < 20


def test_a_chart_of_ones_own_is_the_first_section_and_has_its_rows(tmp_path: Path) -> None:
    own: alt.Chart = alt.Chart(views.data("weights.var")).mark_line()
    chart = own.encode(x="step:Q", y="value:Q")
    run = FakeRun({**tables(), "weights.var": rows({"mine": [1.0, math.nan]})})
    page = Page(write_report(run, tmp_path / "report.html", views={"<b>Mine": chart}))
    assert page.titles[:2] == ["<b>Mine", "Loss"]
    (filled,) = page.embedded["charts"][0]["spec"]["datasets"].values()
    assert [(row["layer"], row["value"], row["flag"]) for row in filled] == [
        ("mine", 1.0, ""),
        ("mine", None, "NaN"),
    ]
    other = Page(write_report(FakeRun(tables()), tmp_path / "report.html", views={"Mine": chart}))
    assert "Mine" not in other.titles


def test_what_is_no_run_store_is_the_readers_error_and_leaves_no_page(tmp_path: Path) -> None:
    (tmp_path / "run.db").write_text("not a database")
    with pytest.raises(RunStoreError):
        write_report(tmp_path / "run.db", tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_a_place_that_cannot_be_written_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot write the report: .*report\.html"):
        write_report(FakeRun(tables()), tmp_path / "file" / "report.html")


def test_an_interrupted_write_leaves_the_old_page_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = write_report(FakeRun(tables()), tmp_path / "report.html")
    before = out.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="cannot write the report: No space left on device"):
        write_report(FakeRun({}), out)
    assert out.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
