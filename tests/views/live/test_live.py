"""Live charts in a notebook that has no browser: what is shown, what is subscribed, and how it ends."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from typing import Any

import altair as alt
import pytest
import torch
from torch import nn

import streamlens as sl
from streamlens.lens import Lens
from streamlens.views.live import Live, LiveChart
from tests.helpers.notebooks import Notebook, notebook

VEGA = "application/vnd.vegalite.v5+json"
WIDGET = "application/vnd.jupyter.widget-view+json"
PNG = "image/png"


@pytest.fixture
def cells(monkeypatch: pytest.MonkeyPatch) -> Iterator[Notebook]:
    with notebook(monkeypatch) as running:
        running.run("one", 1)
        yield running


class Training:
    """A small network, its lens and its steps."""

    def __init__(self, **options: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.loss = nn.MSELoss()
        self.batch = torch.randn(16, 4), torch.randn(16, 2)
        self.lens: Lens = sl.observe(self.model, loss=self.loss, on_error="raise", **options)

    def steps(self, count: int = 3) -> None:
        for _ in range(count):
            self.optimizer.zero_grad()
            self.loss(self.model(self.batch[0]), self.batch[1]).backward()
            self.optimizer.step()


@pytest.fixture
def training() -> Iterator[Training]:
    made = Training()
    yield made
    made.lens.close()


def shown(picture: dict[str, Any]) -> list[str]:
    """The titles of a picture's charts."""
    spec = picture[VEGA]
    return [part.get("title", "") for part in spec.get("vconcat", [spec])]


def rows(picture: dict[str, Any], column: str) -> list[dict[str, Any]]:
    return [row for table in picture[VEGA]["datasets"].values() for row in table if column in row]


def test_a_cell_shows_a_widget_and_keeps_a_picture_once_a_cell_that_trained_has_ended(
    cells: Notebook, training: Training
) -> None:
    live = sl.live(training.lens, views=["loss", "uw_ratio"], hz=20)
    assert WIDGET in cells.outputs[0]["data"]
    cells.finish()
    assert len(cells.outputs) == 1, "nothing has come that could be shown"
    training.steps(4)
    cells.finish()
    assert cells.outputs[-1]["update"]
    assert cells.outputs[-1]["transient"] == cells.outputs[0]["transient"]
    picture = cells.last()
    assert WIDGET not in picture
    assert picture[PNG].startswith("iVBOR")
    assert shown(picture) == ["Loss", "Update-to-weight ratio"]
    assert {row["step"] for row in rows(picture, "kind") if row["kind"] == "each step"} == {0, 1, 2, 3}
    live.close()


def test_what_is_drawn_is_what_the_run_did(cells: Notebook, training: Training) -> None:
    table = sl.sinks.Table()
    training.lens.pipe(sl.topic("loss")).subscribe(table)
    live = sl.live(training.lens, views="loss")
    training.steps(5)
    live.close()
    drawn = [row["value"] for row in rows(cells.last(), "kind") if row["kind"] == "each step"]
    assert drawn == pytest.approx(table["loss"].iloc[:, 0].tolist(), rel=1e-4)


def test_it_moves_again_with_the_next_frames_and_then_rests_again(
    cells: Notebook, training: Training
) -> None:
    live = sl.live(training.lens, views=["loss"], hz=20)
    training.steps()
    cells.finish()
    training.steps()
    assert live.chart.drain(5)
    assert WIDGET in cells.last()
    cells.finish()
    assert VEGA in cells.last()
    assert len(rows(cells.last(), "kind")) == 12
    live.close()


def test_a_chain_ends_in_live_charts_in_one_line(cells: Notebook, training: Training) -> None:
    training.lens.pipe(sl.uw_ratio(), sl.ema(0.9)).subscribe(sl.sinks.LiveChart())
    training.steps()
    training.lens.close()
    cells.finish()
    assert shown(cells.last()) == ["Update-to-weight ratio, moving average"]


def test_the_cell_run_again_ends_what_it_made_before_and_nothing_doubles(
    cells: Notebook, training: Training, caplog: pytest.LogCaptureFixture
) -> None:
    def cell() -> None:
        sl.live(training.lens, views=["loss"])
        training.lens.pipe(sl.uw_ratio()).subscribe(sl.sinks.LiveChart())

    cell()
    before = len(training.lens.source.chains)
    training.steps()
    cells.finish()
    cells.run("one", 2)
    with caplog.at_level(logging.INFO, logger="streamlens"):
        cell()
    assert caplog.text.count("its earlier live charts have ended") == 2
    assert len(training.lens.source.chains) == before
    earlier = len(cells.outputs)
    training.steps()
    cells.finish()
    assert len(cells.outputs) == earlier + 2


def test_charts_of_other_cells_stay(cells: Notebook, training: Training) -> None:
    sl.live(training.lens, views=["loss"])
    cells.run("two", 2)
    sl.live(training.lens, views=["loss"])
    training.steps()
    cells.finish()
    assert [VEGA in output["data"] for output in cells.outputs].count(True) == 2


def test_closing_ends_what_was_subscribed_and_leaves_the_lens(cells: Notebook, training: Training) -> None:
    with sl.live(training.lens, views=["loss", "uw_ratio", "gradient_norms"]) as live:
        assert len(training.lens.source.chains) == 4
        assert repr(live) == "Live(observe(), LiveChart(5 Hz))"
    assert training.lens.source.chains == []
    assert repr(live) == "Live(observe(), LiveChart(ended))"
    live.close()
    assert not training.lens.closed


def test_charts_that_end_before_anything_came_leave_words_and_no_dead_widget(
    cells: Notebook, training: Training
) -> None:
    live = sl.live(training.lens)
    live.close()
    live.close()
    assert [output["update"] for output in cells.outputs] == [False, True]
    assert cells.last() == {"text/plain": "streamlens: nothing has come to be drawn"}


def test_a_cell_that_ends_in_the_handle_shows_the_picture(cells: Notebook, training: Training) -> None:
    live = sl.live(training.lens, views="loss")
    show = cells.shell.display_formatter.format
    assert show(live)[0] == {"text/plain": repr(live)}
    training.steps(4)
    assert live.chart.drain(5)
    data, _ = show(live)
    assert data[PNG].startswith("iVBOR")
    assert {row["step"] for row in rows(data, "kind")} == {0, 1, 2, 3}
    live.close()


def test_closing_the_lens_ends_the_charts_and_the_cell_keeps_the_picture(
    cells: Notebook, training: Training
) -> None:
    from ipywidgets.widgets import widget  # type: ignore[import-untyped]

    before = len(widget._instances)
    sl.live(training.lens, views=["loss"])
    assert len(widget._instances) > before
    training.steps()
    assert training.lens.close()
    cells.finish()
    assert VEGA in cells.last()
    assert len(widget._instances) == before


def test_nothing_of_it_changes_the_run(cells: Notebook) -> None:
    runs = [Training(), Training()]
    live = sl.live(runs[0].lens, views=["loss", "uw_ratio", "weights.histogram"])
    state = torch.get_rng_state()
    for run in runs:
        run.steps(5)
    assert torch.equal(state, torch.get_rng_state())
    live.close()
    for a, b in zip(*(run.model.parameters() for run in runs), strict=True):
        assert torch.equal(a, b)
    for run in runs:
        run.lens.close()


# -- what can be asked for ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("view", "title"),
    [
        ("uw_ratio", "Update-to-weight ratio"),
        ("weights.norm2", "Weight norms"),
        ("learning_rate", "Learning rate"),
        ("uw_ratio.ema", "Update-to-weight ratio, moving average"),
        ("weight_gradients.percentile_bands", ""),
        ("weights.histogram", "Weights"),
        ("step_time", "Step time"),
        (sl.norm("biases"), ""),
    ],
    ids=["view", "norm", "rate", "average", "bands", "histogram", "clock", "operator"],
)
def test_views_are_names_topics_and_operators(
    cells: Notebook, training: Training, view: Any, title: str
) -> None:
    live = sl.live(training.lens, views=[view])
    training.steps()
    live.close()
    [found] = shown(cells.last())
    assert title in found
    assert sum(map(len, cells.last()[VEGA]["datasets"].values())) >= 2


def test_views_are_charts_of_ones_own_and_chains_beside_names(cells: Notebook, training: Training) -> None:
    chart = alt.Chart(sl.views.data("uw_ratio"), title="mine").mark_line().encode(x="step:Q", y="value:Q")
    chain = training.lens.pipe(sl.norm("weights"), sl.ema(0.5))
    live = sl.live(training.lens, views=["uw_ratio", chart, chain])
    assert sum("uw_ratio" in chain.plan for chain in training.lens.source.chains) == 1
    training.steps()
    live.close()
    assert shown(cells.last()) == ["Update-to-weight ratio", "mine", "Weight norms, moving average"]
    assert len(rows(cells.last(), "run")) == 6


def test_accuracies_that_the_user_emits_are_drawn(cells: Notebook) -> None:
    training = Training(emits=["test_accuracy"])
    live = sl.live(training.lens, views=["accuracy"])
    training.steps(1)
    training.lens.emit("test_accuracy", 0.5)
    training.steps(1)
    training.lens.emit("test_accuracy", 0.75)
    live.close()
    assert [row["value"] for row in rows(cells.last(), "series")] == [0.5, 0.75]
    training.lens.close()


def test_alerts_and_actions_are_marks_also_of_those_that_are_added_later(
    cells: Notebook, training: Training
) -> None:
    live = sl.live(training.lens, views=["loss"])

    def alarm(frame: sl.Frame) -> sl.Frame:
        meta = {"rule": "mine", "state": "start", "severity": "info", "text": "look here", "of": ""}
        return frame.replace(topic="alerts.mine", meta=meta)

    from reactivex import operators as ops

    training.steps(1)
    training.lens.derive("alerts", training.lens.pipe(sl.topic("loss"), sl.every(40), ops.map(alarm)))
    training.steps(60)
    live.close()
    assert [row["step"] for row in rows(cells.last(), "alert")] == [40]
    assert [row["text"] for row in rows(cells.last(), "alert")] == ["look here"]


def test_a_named_models_topics_have_their_charts(cells: Notebook) -> None:
    training = Training(name="G")
    live = sl.live(training.lens, views=["loss", "uw_ratio"])
    training.steps()
    live.close()
    assert shown(cells.last()) == ["G: Loss", "G: Update-to-weight ratio"]
    assert {row["layer"] for row in rows(cells.last(), "end")} == {"G.0", "G.2"}
    training.lens.close()


# -- errors ------------------------------------------------------------------------------------


def test_without_a_notebook_it_says_what_to_use_instead(training: Training) -> None:
    for make in (lambda: sl.live(training.lens), LiveChart):
        with pytest.raises(sl.StreamlensError, match=r"streamlens ui .*report .*Matplotlib"):
            make()
    assert training.lens.source.chains == []


@pytest.mark.parametrize(
    ("views", "error", "message"),
    [
        (["los"], ValueError, "did you mean 'loss'"),
        ([], ValueError, "nothing to show"),
        ([3], TypeError, "got 3"),
        (["hessian_eigenvalues"], sl.StreamlensError, r"views=\[lens.pipe\(...\)\]"),
        (["accuracy"], sl.StreamlensError, r"emits=\['train_accuracy', 'test_accuracy'\]"),
        (["weights"], sl.StreamlensError, "tensors and no numbers: reduce it, as in weights.norm2"),
        (["uw_rato"], ValueError, "did you mean 'uw_ratio'"),
        ([alt.Chart("x.csv").mark_line()], ValueError, r"over one, alt.Chart\(sl.views.data\('loss'\)\)"),
        (
            [alt.Chart(sl.views.data("weights")).mark_line()],
            sl.StreamlensError,
            "tensors and no numbers: reduce it, as in weights.norm2",
        ),
    ],
    ids=lambda value: str(value)[:24],
)
def test_wrong_views_are_errors_at_once_and_subscribe_and_show_nothing(
    cells: Notebook, training: Training, views: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        sl.live(training.lens, views=views)
    assert training.lens.source.chains == []
    assert cells.outputs == []


def test_wrong_arguments_are_errors(
    cells: Notebook, training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(TypeError, match="the lens that observe"):
        sl.live(training.model)  # type: ignore[arg-type]
    for hz in (0, -1, 100, "5", True, float("nan")):
        with pytest.raises(ValueError, match=r"hz=\) is a number above 0"):
            LiveChart(hz=hz)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'auto', 'widget' or 'output'"):
        LiveChart(host="page")  # type: ignore[arg-type]
    with pytest.raises(sl.StreamlensError, match="reduce them first"):
        training.lens.pipe(sl.topic("weights")).subscribe(LiveChart())


# -- other front ends --------------------------------------------------------------------------


@pytest.mark.parametrize("reason", ["asked for", "colab", "vscode", "no anywidget"])
def test_where_there_are_no_widgets_the_output_is_replaced(
    cells: Notebook, training: Training, monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    if reason == "colab":
        monkeypatch.setitem(sys.modules, "google.colab", sys)
    elif reason == "vscode":
        monkeypatch.setenv("VSCODE_PID", "1")
    elif reason == "no anywidget":
        monkeypatch.setattr("streamlens.views.live.place.find_spec", lambda _: None)
    live = sl.live(training.lens, views=["loss"], host="output" if reason == "asked for" else "auto")
    assert cells.last() == {"text/plain": "streamlens draws the run here"}
    training.steps(2)
    assert live.chart.drain(10)
    assert len(rows(cells.last(), "kind")) == 4
    training.steps(2)
    cells.finish()
    assert len(rows(cells.last(), "kind")) == 8
    assert all(WIDGET not in output["data"] for output in cells.outputs)
    live.close()


def test_a_widget_that_is_asked_for_and_cannot_be_had_names_the_extra(
    cells: Notebook, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streamlens.views.live.chart.find_spec", lambda _: None)
    with pytest.raises(ImportError, match=r"pip install 'streamlens\[notebook\]'"):
        LiveChart(host="widget")


def test_without_vl_convert_there_is_the_chart_and_a_hint(
    cells: Notebook, training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    live: Live = sl.live(training.lens, views=["loss"])
    training.steps()
    live.close()
    assert VEGA in cells.last()
    assert PNG not in cells.last()
    assert "pip install 'streamlens[export]'" in cells.last()["text/plain"]
