"""What a browser is told of a run's charts: the same as it would see had it been told all at the end."""

from __future__ import annotations

import logging
import math
from typing import Any

import altair as alt
import numpy as np
import pytest
import torch

import streamlens as sl
from streamlens.frame import Frame, Kind
from streamlens.views.live.board import Board
from streamlens.views.live.panel import OwnChart, panel_of
from tests.views.live.mirror import Mirror

LAYERS = ("features.0", "features.3", "classifier")
HOSTILE = "</script><img src=x onerror=alert(1)>"


def frame(topic: str, step: int, values: list[float] | dict[str, float], **more: Any) -> Frame:
    if isinstance(values, dict):
        numbers = torch.tensor(list(values.values()), dtype=torch.float64)
        return Frame(topic, step, tuple(values), numbers, **more)
    return Frame(topic, step, ("",), torch.tensor(values, dtype=torch.float64), **more)


def ratios(step: int, value: float = 1e-3) -> Frame:
    return frame("uw_ratio", step, dict.fromkeys(LAYERS, value))


def alert(step: int, text: str = "the loss is NaN: lower the rate") -> Frame:
    meta = {"rule": "nan", "state": "start", "severity": "critical", "text": text, "of": ""}
    return frame("alerts.nan", step, [1.0], meta=meta, kind=Kind.EVENT)


def test_rows_told_bit_by_bit_are_those_that_are_there_at_the_end() -> None:
    generator = np.random.default_rng(1)
    board, mirror, late = Board(most_points=1000), Mirror(), Mirror()
    for step in range(900):
        value = float(generator.normal()) ** 2 if step % 97 else math.nan
        board.take([frame("loss", step, [value]), ratios(step, float(generator.uniform(1e-5, 1e-2)))])
        if step % 7 == 6:
            mirror.take(board.changes())
    mirror.take(board.changes())
    late.take(board.whole())
    assert mirror.received == sorted(set(mirror.received))
    assert (
        mirror.rows.keys()
        == late.rows.keys()
        == {("loss", "line"), ("loss.ema", "line"), ("uw_ratio", "cell")}
    )
    for key, rows in late.rows.items():
        np.testing.assert_array_equal(np.array(sorted(rows)), np.array(sorted(mirror.rows[key])))
    assert mirror.charts.keys() == late.charts.keys() == {"loss", "update_to_weight_ratio"}
    assert sum(len(rows) for rows in mirror.rows.values()) <= 1000


def test_nothing_is_told_where_nothing_has_come() -> None:
    board = Board()
    assert board.changes() is None
    board.take([frame("loss", 0, [1.0])])
    assert board.changes() is not None
    assert board.changes() is None


def test_only_what_is_new_is_told_and_charts_stand() -> None:
    board = Board()
    board.take([frame("loss", step, [1.0 + step]) for step in range(100)])
    first = board.changes()
    board.take([frame("loss", step, [1.0 + step]) for step in range(100, 110)])
    second = board.changes()
    assert first is not None
    assert second is not None
    assert [chart["key"] for chart in first.content["charts"]] == ["loss"]
    assert second.content["charts"] == []
    # The ten, and the last of before: where a cell ends is known when the next begins.
    assert {part["topic"]: part["count"] for part in second.content["rows"]} == {"loss": 11, "loss.ema": 11}


def test_the_moving_average_of_the_loss_is_an_exponential_one() -> None:
    board, mirror = Board(), Mirror()
    values = [4.0, 2.0, math.nan, 8.0, math.inf, 1.0]
    board.take([frame("loss", step, [value]) for step, value in enumerate(values)])
    mirror.take(board.changes())
    decay, state, expected = 0.5 ** (1 / 25), math.nan, []
    for value in values:
        if math.isfinite(value):
            state = value if math.isnan(state) else decay * state + (1 - decay) * value
            expected.append(state)
        else:
            expected.append(math.nan)
    np.testing.assert_allclose([value for _, value in mirror.line("loss.ema")], expected)


def test_a_runs_own_average_takes_the_place_of_ours() -> None:
    board, mirror = Board(), Mirror()
    board.take([frame("loss", 0, [4.0]), frame("loss.ema", 0, [7.0])])
    board.take([frame("loss", 1, [2.0]), frame("loss.ema", 1, [6.0])])
    mirror.take(board.changes())
    assert mirror.line("loss.ema") == [(0.0, 7.0), (1.0, 6.0)]


@pytest.mark.parametrize(
    ("topic", "key", "forms"),
    [
        ("loss", "loss", {("loss", "line"), ("loss.ema", "line")}),
        ("uw_ratio", "update_to_weight_ratio", {("uw_ratio", "cell")}),
        ("uw_ratio.ema", "update_to_weight_ratio.ema", {("uw_ratio.ema", "cell")}),
        ("weights.norm2", "weight_norms", {("weights.norm2", "line")}),
        ("G/uw_ratio", "G/update_to_weight_ratio", {("G/uw_ratio", "cell")}),
        ("validation_loss", "validation_loss", {("validation_loss", "line")}),
    ],
)
def test_a_topic_has_the_chart_of_its_view_and_its_rows_follow(
    topic: str, key: str, forms: set[tuple[str, str]]
) -> None:
    board, mirror = Board(), Mirror()
    for step in range(3):
        board.take([frame(topic, step, dict.fromkeys(LAYERS, 0.001 * (step + 1)))])
    mirror.take(board.changes())
    assert mirror.charts.keys() == {key}
    assert mirror.forms(key) == forms


def test_a_nan_that_comes_later_gets_its_mark() -> None:
    board, mirror = Board(), Mirror()
    board.take([frame("loss", 0, [1.0]), ratios(0)])
    mirror.take(board.changes())
    assert ("loss", "flag") not in mirror.forms("loss")
    board.take([frame("loss", 1, [math.nan]), ratios(1, math.nan)])
    mirror.take(board.changes())
    assert ("loss", "flag") in mirror.forms("loss")
    assert ("uw_ratio", "bad") in mirror.forms("update_to_weight_ratio")
    # Each layer can have a bad cell from now on, not only those that had one.
    bad = next(b for b in mirror.charts["update_to_weight_ratio"]["bindings"] if b["form"] == "bad")
    assert bad["names"] == list(LAYERS)


def test_an_axis_is_no_longer_logarithmic_where_a_loss_falls_below_zero() -> None:
    board, mirror = Board(), Mirror()
    board.take([frame("loss", 0, [1.0]), frame("loss", 1, [100.0])])
    mirror.take(board.changes())
    assert all(binding["log"] for binding in mirror.charts["loss"]["bindings"])
    board.take([frame("loss", 2, [-3.0])])
    mirror.take(board.changes())
    assert not any(binding["log"] for binding in mirror.charts["loss"]["bindings"])


def test_a_view_that_has_to_be_drawn_anew_is_and_has_its_data_with_it() -> None:
    board, mirror = Board(), Mirror()
    for step in range(3):
        board.take([frame("test_accuracy", step, [0.5 + 0.1 * step])])
        mirror.take(board.changes())
        [rows] = [rows for rows in mirror.charts["accuracy"]["datasets"].values() if "series" in rows[0]]
        assert [row["value"] for row in rows] == pytest.approx([0.5 + 0.1 * s for s in range(step + 1)])
    assert mirror.charts["accuracy"]["bindings"] == []


def test_alerts_and_actions_stand_in_every_chart_with_their_sentences() -> None:
    board, mirror = Board(), Mirror()
    board.take([frame("loss", 0, [1.0]), ratios(0)])
    mirror.take(board.changes())
    action = frame("learning_rate.action", 1, [0.1], meta={"text": f"halved {HOSTILE}", "cause": "a plateau"})
    board.take([alert(1, f"NaN {HOSTILE}"), action])
    mirror.take(board.changes())
    assert mirror.charts.keys() == {"loss", "update_to_weight_ratio"}
    for chart in mirror.charts.values():
        said = {row["text"] for rows in chart["datasets"].values() for row in rows if "text" in row}
        assert said == {f"NaN {HOSTILE}", f"halved {HOSTILE}"}


def test_a_histogram_is_its_first_layers_and_bounded() -> None:
    board, mirror = Board(), Mirror()
    g = torch.Generator().manual_seed(0)
    frames: list[Frame] = []
    feed = sl.Feed()
    feed.pipe(sl.histogram("weights", bins=8)).subscribe(frames.append)
    for step in range(450):
        feed.push(step, weights={"a": torch.randn(50, generator=g), "b": torch.randn(50, generator=g)})
    board.take(frames)
    mirror.take(board.changes())
    [chart] = mirror.charts.values()
    assert chart["bindings"] == []
    assert 0 < sum(map(len, chart["datasets"].values())) <= 5000


def test_a_chart_of_ones_own_gets_the_rows_that_data_promises() -> None:
    chart = (
        alt.Chart(sl.views.data("uw_ratio.ema")).mark_line().encode(x="step:Q", y="value:Q", color="layer:N")
    )
    board, mirror = Board([OwnChart(key="mine", title="", reading="", given=chart)]), Mirror()
    for step in range(2):
        board.take([frame("uw_ratio.ema", step, {"a": 1.0 + step, "b": 2.0})])
        mirror.take(board.changes())
    assert mirror.charts.keys() == {"mine"}
    [binding] = mirror.charts["mine"]["bindings"]
    assert binding["form"] == "topic"
    assert binding["names"] == [("a", ""), ("b", "")]
    assert binding["dataset"] in str(mirror.charts["mine"]["specification"])
    assert mirror.line("uw_ratio.ema", 0) == [(0.0, 1.0), (1.0, 2.0)]


def test_a_chart_that_cannot_be_drawn_is_left_out_and_the_others_are_drawn(
    caplog: pytest.LogCaptureFixture,
) -> None:
    broken = panel_of("loss")
    broken.view = type(broken.view)("loss", "", "", ("loss",), lambda _: [][0])
    board, mirror = Board([broken]), Mirror()
    with caplog.at_level(logging.ERROR, logger="streamlens"):
        board.take([frame("loss", 0, [1.0]), ratios(0)])
        mirror.take(board.changes())
    assert mirror.charts.keys() == {"update_to_weight_ratio"}
    assert "the chart 'loss' cannot be drawn" in caplog.text


def test_a_run_that_goes_back_forgets_what_it_will_do_again() -> None:
    board, mirror = Board(), Mirror()
    board.take([frame("loss", step, [float(step + 1)]) for step in range(10)])
    mirror.take(board.changes())
    board.cut(3)
    board.take([frame("loss", 4, [0.5])])
    mirror.take(board.changes())
    assert mirror.line("loss") == [(0, 1.0), (1, 2.0), (2, 3.0), (3, 4.0), (4, 0.5)]


def test_the_picture_holds_all_charts_and_rows_and_is_vega_lite_5() -> None:
    own = alt.Chart(sl.views.data("loss")).mark_point().encode(x="step:Q", y="value:Q")
    board = Board([panel_of("loss"), OwnChart(key="mine", title="", reading="", given=own)])
    assert board.picture() is None
    board.take([frame("loss", step, [step + 1.0]) for step in range(5)])
    board.take([ratios(0)])
    picture = board.picture()
    assert picture is not None
    assert picture["$schema"].endswith("/v5.json")
    assert len(picture["vconcat"]) == 3
    assert [row["value"] for row in picture["datasets"]["topic:loss"]] == [1.0, 2.0, 3.0, 4.0, 5.0]
