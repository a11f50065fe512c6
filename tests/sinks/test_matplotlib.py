"""Matplotlib: what is drawn of a run, written as pictures and shown live."""

from __future__ import annotations

import builtins
import math
import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

import streamlens as sl
from streamlens.errors import SinkError
from streamlens.frame import Frame
from streamlens.sink import RunInfo
from streamlens.sinks._chart import Chart, Line
from streamlens.sinks._drawing import draw
from streamlens.sinks._window import Window, has_screen
from streamlens.sinks.matplotlib import Matplotlib
from tests.helpers.sinks import Connected, norms, written


def chart_of(*frames: Frame) -> Chart:
    chart = Chart()
    for frame in frames:
        chart.add(frame)
    return chart


def panels(chart: Chart) -> dict[str, Any]:
    """Axes by title, as drawn."""
    figure = Figure()
    draw(figure, chart)
    figure.canvas.draw()
    return {panel.get_title(loc="left"): panel for panel in figure.axes}


def lines(panel: Any) -> dict[str, list[tuple[float, float]]]:
    """Points by the legend's labels."""
    legend = panel.get_legend()
    labels = [text.get_text() for text in legend.get_texts()]
    found = [line for line in panel.get_lines() if line.get_linestyle() == "-"]
    return {
        label: list(zip(line.get_xdata(), line.get_ydata(), strict=True))
        for label, line in zip(labels, found, strict=True)
    }


def test_numbers_are_lines_over_steps_by_layer_and_component() -> None:
    loss = [
        Frame("loss", step, ("",), torch.tensor([[1.0, 2.0]]), components=("a", "b")) for step in range(2)
    ]
    drawn = panels(chart_of(*(norms(step, [1.0 + step, 5.0]) for step in range(3)), *loss))
    assert list(drawn) == ["norm", "loss"]
    assert lines(drawn["norm"]) == {
        "layer0": [(0, 1.0), (1, 2.0), (2, 3.0)],
        "layer1": [(0, 5.0), (1, 5.0), (2, 5.0)],
    }
    assert lines(drawn["loss"]) == {"a": [(0, 1.0), (1, 1.0)], "b": [(0, 2.0), (1, 2.0)]}
    assert drawn["norm"].get_yscale() == "linear"


def test_positive_numbers_over_two_decades_are_on_a_logarithmic_axis() -> None:
    frames = [norms(0, [0.01]), norms(1, [1.0])]
    assert panels(chart_of(*frames))["norm"].get_yscale() == "log"
    assert panels(chart_of(*frames, norms(2, [0.0])))["norm"].get_yscale() == "linear"


def test_what_is_not_finite_is_a_gap_and_a_mark_at_the_foot() -> None:
    drawn = panels(chart_of(norms(0, [1.0]), norms(1, [math.nan]), norms(2, [math.inf]), norms(3, [2.0])))
    panel = drawn["norm, not finite where marked"]
    line, marks = panel.get_lines()
    assert np.isnan(line.get_ydata()).tolist() == [False, True, True, False]
    assert (marks.get_xdata().tolist(), marks.get_marker()) == ([1, 2], "|")


def test_alerts_are_dashed_lines_and_no_panels() -> None:
    alert = Frame("alerts.nan", 1, ("fc",), torch.ones(1), meta={"text": "fc is NaN"})
    drawn = panels(chart_of(norms(0, [1.0]), alert, norms(2, [1.0])))
    assert list(drawn) == ["norm"]
    dashed = [line for line in drawn["norm"].get_lines() if line.get_linestyle() == "--"]
    assert [line.get_xdata()[0] for line in dashed] == [1]


def test_a_histogram_is_the_latest_share_of_elements_in_its_bins() -> None:
    counted: list[Frame] = []
    feed = sl.Feed()
    feed.pipe(sl.histogram("weights", bins=2, range=(0, 1))).subscribe(counted.append)
    for step, elements in enumerate(([0.1] * 8, [-9.0, 0.25, 0.5, 0.75, 1.0, 1.5, math.nan, math.inf])):
        feed.push(step, weights={"fc": np.array(elements, dtype=np.float32)})
    feed.close()
    ((title, panel),) = panels(chart_of(*counted)).items()
    assert title == "weights.histogram at step 1, 2 not finite"
    (stairs,) = panel.patches
    # What lies beyond the range is drawn as wide as the bin beside it.
    assert stairs.get_data().edges.tolist() == [-0.5, 0, 0.5, 1, 1.5]
    assert stairs.get_data().values == pytest.approx([1 / 6, 1 / 6, 3 / 6, 1 / 6])


def test_tensors_are_histograms_of_their_finite_elements() -> None:
    elements = torch.randn(500, generator=torch.Generator().manual_seed(0))
    tensor = torch.cat([elements, torch.tensor([math.nan])])
    nothing = Frame("v", 3, ("a", "b"), (torch.zeros(0), torch.full((2,), math.nan)))
    ((title, panel),) = panels(chart_of(Frame("w", 3, ("fc",), (tensor,)), nothing)).items()
    assert title == "w at step 3, 1 not finite"
    counts, edges = np.histogram(elements.numpy(), bins=64)
    (stairs,) = panel.patches
    assert stairs.get_data().values == pytest.approx(counts / 500)
    assert stairs.get_data().edges == pytest.approx(edges, abs=1e-6)


def test_logarithmic_bins_have_a_symmetric_logarithmic_axis() -> None:
    counted: list[Frame] = []
    feed = sl.Feed()
    feed.pipe(sl.histogram("weights")).subscribe(counted.append)
    feed.push(0, weights={"fc": np.logspace(-6, 0, 50, dtype=np.float32)})
    feed.close()
    (panel,) = panels(chart_of(*counted)).values()
    assert panel.get_xscale() == "symlog"


def test_a_long_line_keeps_its_spikes_its_gaps_and_little_memory() -> None:
    line = Line()
    for step in range(20_000):
        line.add(step, 50.0 if step == 7_777 else math.nan if step == 12_345 else math.sin(step / 100))
    assert len(line.steps) < 4_000
    steps, values = line.thinned(500)
    assert len(steps) <= 500
    assert (steps[0], steps[-1]) == (0, 19_999)
    assert steps[np.nanargmax(values)] == 7_777
    assert steps[np.isnan(values)].tolist() == [12_345]


def test_a_figure_of_everything_at_once_stays_within_bounds() -> None:
    names = [f"encoder.layers.{i}.self_attention.in_projection" for i in range(200)]
    frames = [Frame(f"topic{i}", step, names, torch.rand(200)) for i in range(30) for step in range(2)]
    drawn = panels(chart_of(*frames))
    assert len(drawn) == 24
    panel = drawn["topic0 (60 of 200)"]
    assert len(panel.get_lines()) == 60
    labels = [text.get_text() for text in panel.get_legend().get_texts()]
    assert len(labels) == 8
    assert labels[0] == "…f_attention.in_projection"[-26:]


def test_names_are_shown_as_they_are_and_are_no_formulas() -> None:
    chart = chart_of(Frame("$x_$", 0, ("_a$b$", "two\nlines"), torch.ones(2)))
    ((title, panel),) = panels(chart).items()
    assert title == r"\$x_\$"
    assert [text.get_text() for text in panel.get_legend().get_texts()] == [r" _a\$b\$", "two lines"]


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_a_picture_is_there_after_a_run_without_a_screen(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DISPLAY", raising=False)
    path = tmp_path / "deep" / f"run{suffix}"
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with sl.observe(model) as lens:
        lens.pipe(sl.norm("weights")).subscribe(Matplotlib(path))
        for _ in range(3):
            model(torch.ones(1, 2)).sum().backward()
            optimizer.step()
    assert os.listdir(path.parent) == [path.name]
    data = path.read_bytes()
    assert data.startswith({".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}[suffix])
    if suffix == ".png":
        assert matplotlib.image.imread(path).std() > 0.01
    if suffix == ".svg":
        ET.fromstring(data)


def test_the_picture_follows_the_run(tmp_path: Path) -> None:
    chain = Connected(Matplotlib(tmp_path / "run.png"))
    assert chain.send(norms(0, [1.0]), norms(1, [2.0]))
    before = (tmp_path / "run.png").read_bytes()
    assert chain.send(norms(2, [9.0]))
    assert (tmp_path / "run.png").read_bytes() != before
    assert chain.close()


def test_drawing_takes_a_small_share_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sink = Matplotlib(tmp_path / "run.png", seconds=0.5)
    ticks = iter([0.0, 3.0])
    monkeypatch.setattr("streamlens.sinks.matplotlib.time", SimpleNamespace(monotonic=lambda: next(ticks)))
    sink.open(RunInfo("a"))
    sink.write([norms(0, [1.0])])
    sink.flush()
    sink.flush()  # draws nothing: nothing has come
    assert sink.max_latency == 60


def test_a_picture_that_is_there_stays_as_it_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "run.png").write_bytes(b"mine")
    sink = Matplotlib(tmp_path / "run.png")
    for step in range(2):
        written(sink, norms(step, [1.0]), run=RunInfo("a"))
    assert sink.path == tmp_path / "run-2.png"
    written(sink, norms(0, [1.0]), run=RunInfo("b"))
    assert (tmp_path / "run.png").read_bytes() == b"mine"
    assert sorted(os.listdir(tmp_path)) == ["run-2.png", "run-3.png", "run.png"]
    assert len(caplog.messages) == 2


def test_a_run_that_goes_back_to_a_snapshot_forgets_what_lay_beyond(tmp_path: Path) -> None:
    sink = Matplotlib(tmp_path / "run.png")
    alert = Frame("alerts.nan", 4, ("",), torch.ones(1), meta={"text": "NaN"})
    weights = Frame("w", 4, ("a",), (torch.ones(3, 2),))
    written(sink, *(norms(step, [1.0]) for step in range(5)), alert, weights, run=RunInfo("a"))
    written(sink, norms(3, [2.0]), run=RunInfo("a", resumed_at=2, resumption="x"))
    written(sink, norms(4, [3.0]), run=RunInfo("a", resumed_at=2, resumption="x"))
    line = sink._chart.lines["norm"]["layer0"]
    assert (line.steps, line.values) == ([0, 1, 2, 3, 4], [1.0, 1.0, 1.0, 2.0, 3.0])
    assert (sink._chart.alerts, sink._chart.bars) == ([], {"w": {}})
    assert os.listdir(tmp_path) == ["run.png"]


def test_a_picture_that_cannot_be_written_is_drawn_again_when_it_can(tmp_path: Path) -> None:
    (tmp_path / "folder").touch()
    chain = Connected(Matplotlib(tmp_path / "folder" / "run.png"))
    assert not chain.send(norms(0, [1.0]))
    assert len(chain.reports) == 1
    (tmp_path / "folder").unlink()
    assert chain.send()
    assert (tmp_path / "folder" / "run.png").stat().st_size > 1000
    chain.close()


# -- live --------------------------------------------------------------------------------------


def test_in_a_notebook_the_picture_is_in_the_cell_that_made_the_sink(monkeypatch: pytest.MonkeyPatch) -> None:
    interactiveshell = pytest.importorskip("IPython.core.interactiveshell")
    displaypub = pytest.importorskip("IPython.core.displaypub")
    shell = interactiveshell.InteractiveShell.instance()
    try:
        monkeypatch.setattr(shell, "display_pub", displaypub.CapturingDisplayPublisher())
        monkeypatch.setattr(shell, "kernel", object(), raising=False)
        assert Matplotlib.can_show()
        chain = Connected(Matplotlib())
        assert chain.send(norms(0, [1.0]))
        assert chain.send(norms(1, [1.0]))
        assert chain.close()
        first, *later = shell.display_pub.outputs
        assert first["data"] == {"text/plain": "streamlens draws the run here"}
        assert len(later) == 2
        for output in later:
            assert output["data"]["image/png"].startswith(b"\x89PNG")
            assert output["update"]
            assert output["transient"] == first["transient"]
    finally:
        shell.clear_instance()
        monkeypatch.undo()
        builtins.__dict__.pop("get_ipython", None)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_window_shows_the_run_until_somebody_closes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MPLBACKEND", "module://tests.helpers.windows")
    monkeypatch.setenv("STREAMLENS_TEST_WINDOWS", str(tmp_path))
    sink = Matplotlib()
    chain = Connected(sink)
    assert chain.send(norms(0, [1.0]), norms(1, [2.0]))
    until((tmp_path / "window.png").exists)
    before = (tmp_path / "window.png").read_bytes()
    assert chain.send(norms(2, [9.0]))
    until(lambda: (tmp_path / "window.png").read_bytes() != before)
    (tmp_path / "close").touch()
    assert sink._window is not None
    assert sink._window._process is not None
    assert sink._window._process.wait(30) == 0
    # Training knows nothing of it.
    assert chain.send(norms(3, [1.0]))
    assert chain.send(norms(4, [1.0]))
    assert chain.close()
    assert chain.reports == []


def test_a_window_that_cannot_open_is_an_error_once(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    window = Window()
    errors: list[str] = []

    def failed() -> bool:
        try:
            window.show(Chart())
        except SinkError as error:
            errors.append(str(error))
        return bool(errors)

    until(failed)
    window.show(Chart())
    (error,) = errors
    assert error.startswith("no window can be opened to show the run in, for the reason above: pass a path")


def test_where_nothing_can_be_shown_a_path_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "MPLBACKEND"):
        monkeypatch.delenv(name, raising=False)
    assert not has_screen()
    with pytest.raises(
        ValueError, match=r"neither a notebook nor a screen .* such as Matplotlib\('run.png'\)"
    ):
        Matplotlib()
    with pytest.raises(ValueError, match="without live=True"):
        Matplotlib("run.png", live=True)
    monkeypatch.setenv("DISPLAY", ":0")
    assert has_screen()
    monkeypatch.setenv("MPLBACKEND", "Agg")
    assert not has_screen()


def test_pyplot_and_the_users_backend_are_left_alone(tmp_path: Path) -> None:
    program = f"""
import sys, torch
from streamlens.frame import Frame
from streamlens.sink import RunInfo
from streamlens.sinks import Matplotlib
sink = Matplotlib({str(tmp_path / "run.png")!r})
sink.open(RunInfo("a"))
sink.write([Frame("loss", 0, ("",), torch.ones(1))])
sink.close()
print("matplotlib.pyplot" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert done.stdout == "False\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"path": "run.gif"}, "is a picture such as 'run.png', or .svg or .pdf; got 'run.gif'"),
        ({"path": "run"}, "got 'run'"),
        ({"path": "run.png", "seconds": 0}, "seconds above 0; got 0"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Matplotlib(**arguments)
