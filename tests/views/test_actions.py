"""Actions of controllers in the report and in TensorBoard: a mark each, with its sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

import streamlens as sl
from streamlens.views.actions import actions, with_action_marks
from streamlens.views.loss import loss
from streamlens.views.report import write_report
from tests._runs import small_model, steps_of


def run(folder: Path, *sinks: sl.sinks.Sink) -> None:
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with sl.observe(model, on_error="raise") as lens:
        lens.pipe(sl.uw_ratio()).subscribe(sl.control.RatioLR(mode="current"))
        for sink in sinks:
            lens.pipe(sl.topic("learning_rate")).subscribe(sink)
            lens.pipe(sl.topic("learning_rate.action")).subscribe(sink)
        list(steps_of(model, optimizer, 4))


def test_a_report_marks_each_action_with_its_cause(tmp_path: Path) -> None:
    run(tmp_path, sl.sinks.RunStore(tmp_path / "run.db"))
    page = write_report(tmp_path / "run.db", tmp_path / "report.html").read_text()
    assert page.count("RatioLR set learning_rate from ") == 4
    assert "is the target" in page


def test_tensorboard_has_each_action_as_text(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    run(tmp_path, sl.sinks.TensorBoard(tmp_path))
    events = next(tmp_path.glob("events*")).read_bytes()
    assert events.count(b"RatioLR set learning_rate from ") == 4
    assert b"learning_rate.action/_/text" in events


@pytest.mark.parametrize(
    ("controller", "said"),
    [
        (lambda: sl.control.ClipAt(0), "ClipAt clipped the gradient from a norm of "),
        (lambda: sl.control.FixedRatio(1e-3), "FixedRatio set gradient_scale from "),
        (lambda: sl.control.Freeze(below=1.0, patience=2), "Freeze ended updates of 0: "),
    ],
)
def test_what_acts_on_gradients_and_layers_is_marked_too(controller: Any, said: str, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with sl.observe(model, on_error="raise") as lens:
        steering = controller()
        lens.pipe(sl.uw_ratio()).subscribe(steering)
        for sink in (sl.sinks.RunStore(tmp_path / "run.db"), sl.sinks.TensorBoard(tmp_path)):
            lens.pipe(sl.topic("learning_rate")).subscribe(sink)
            lens.pipe(sl.topic(*steering.action_topics)).subscribe(sink)
        list(steps_of(model, optimizer, 4))
    assert said in write_report(tmp_path / "run.db", tmp_path / "report.html").read_text()
    assert said.encode() in next(tmp_path.glob("events*")).read_bytes()


def test_an_action_on_many_layers_is_one_mark_and_other_topics_none() -> None:
    table = pd.DataFrame(
        {"step": [3, 3, 1], "layer": ["a", "b", "a"], "text": ["x", "x", "w"], "cause": ["y", "y", "v"]}
    )
    found = actions({"step_scale.action": table, "my.action": pd.DataFrame({"step": [1], "value": [2.0]})})
    assert found.to_dict("list") == {"step": [1, 3], "text": ["w", "x"], "steered": ["step scale"] * 2}


def test_of_many_actions_a_hundred_are_drawn_over_the_whole_run() -> None:
    steps = range(1001)
    table = pd.DataFrame({"step": steps, "text": [f"did {s}" for s in steps], "cause": ["c"] * 1001})
    chart = loss(pd.DataFrame({"step": steps, "epoch": 0, "layer": "", "value": 1.0}))
    marked = with_action_marks(chart, actions({"x.action": table}), (0, 1000))
    marks = marked.layer[-1]
    assert marks.to_dict()["mark"]["shape"] == "diamond"
    drawn: Any = marks.data
    assert len(drawn) <= 100
    assert drawn.step.iloc[-1] > 980
    assert with_action_marks(chart, actions({}), None) is chart
