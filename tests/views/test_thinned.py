"""Long runs thinned: the extremes, the gaps and the ends against a loop over all values."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streamlens.frame import Frame
from streamlens.runs import Run, RunWriter, read_run
from streamlens.views.thinned import Thinned, matching, points_of
from tests.helpers.written_runs import action

STEPS = 4_000
MANY = [f"l{i}" for i in range(60)]


def values(steps: int = STEPS) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    made = np.exp(-np.arange(steps) / 900) + 0.2 * np.random.default_rng(3).random(steps)
    made[1234], made[2345] = 9.0, -7.0
    return made


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("long") / "run.db"
    numbers = values()
    numbers[3000] = math.nan
    with RunWriter(found, "long", metadata={}) as writer:
        frames = []
        for step in range(STEPS):
            frames.append(Frame("loss", step, ("",), torch.tensor([numbers[step]], dtype=torch.float64)))
            frames.append(Frame("many", step, tuple(MANY), torch.arange(60.0) + step))
            frames += [action(step, f"at {step}")] if step % 3 == 0 else []
        writer.write(frames, [0.0] * len(frames))
    return found


@pytest.fixture
def run(path: Path) -> Iterator[Run]:
    with read_run(path) as found:
        yield found


def test_a_long_lines_spikes_ends_and_gaps_survive(run: Run) -> None:
    thinned = Thinned(run)
    rows = thinned.dataframe("loss")
    assert thinned.thinned
    assert len(rows) <= 1_600
    finite = rows["value"].dropna()
    known = values()
    known[3000] = math.nan
    assert finite.max() == np.nanmax(known) == 9.0
    assert finite.min() == np.nanmin(known) == -7.0
    assert set(np.round(finite, 9)) <= set(np.round(known, 9))
    assert rows["value"].isna().sum() == 1
    assert abs(int(rows["step"][rows["value"].isna()].iloc[0]) - 3000) < 20
    assert (rows["step"].min(), rows["step"].max()) == (0, STEPS - 1)
    assert rows["step"].is_monotonic_increasing


def test_a_line_that_falls_has_its_maximum_first_and_one_that_rises_its_minimum() -> None:
    table = pd.DataFrame(
        {
            "step": [0, 10, 20] * 2,
            "epoch": 0,
            "layer": ["up"] * 3 + ["down"] * 3,
            "min": [0.0, 10, 20, 20, 10, 0],
            "mean": [4.5, 14.5, 24.5, 24.5, 14.5, 4.5],
            "max": [9.0, 19, 29, 29, 19, 9],
            "count": 10,
            "missing": 0,
            "wall_time": 0.0,
        }
    )
    rows = points_of(table, extremes=True, last=29)
    assert rows[rows["layer"] == "up"]["value"].tolist() == [0, 9, 10, 19, 20, 29]
    assert rows[rows["layer"] == "down"]["value"].tolist() == [29, 20, 19, 10, 9, 0]
    assert rows[rows["layer"] == "up"]["step"].tolist() == [0, 5, 10, 15, 20, 29]


def test_many_layers_are_read_as_means_of_few_stretches(run: Run) -> None:
    rows = Thinned(run).dataframe("many")
    assert len(rows) <= 60 * 500
    first = rows[rows["layer"] == "l0"]
    width = int(first["step"].iloc[1] - first["step"].iloc[0])
    assert width > 1
    # The layer's value is the step itself: the mean of a full stretch is its middle.
    for step, value in zip(first["step"][:-1], first["value"][:-1], strict=True):
        assert value == pytest.approx(step + (width - 1) / 2)


def test_a_window_is_read_step_by_step_and_the_rest_stays_around_it(run: Run) -> None:
    rows = Thinned(run, window=(1200, 1300)).dataframe("loss")
    inside = rows[(rows["step"] >= 1200) & (rows["step"] <= 1300)]
    assert inside["step"].tolist() == list(range(1200, 1301))
    assert inside["value"].tolist() == values()[1200:1301].tolist()
    assert (rows["step"].min(), rows["step"].max()) == (0, STEPS - 1)
    assert len(rows) < 1_200


def test_of_many_actions_some_are_read_from_the_first_to_the_last(run: Run) -> None:
    rows = Thinned(run).dataframe("learning_rate.action")
    assert 90 <= len(rows) <= 100
    assert (rows["step"].min(), rows["step"].max()) == (0, 3999)
    assert all(text == f"at {step}" for step, text in zip(rows["step"], rows["text"], strict=True))


def test_a_topic_without_a_chosen_layer_is_none_and_the_models_stays(run: Run) -> None:
    assert Thinned(run, pattern="nothing").topics == ["loss", "learning_rate.action"]
    assert Thinned(run, layer="l7").layers("many") == ["l7"]
    assert Thinned(run, pattern="l5?").layers("many") == [f"l5{i}" for i in range(10)]
    assert Thinned(run).every_layer == MANY


def test_a_name_with_brackets_matches_itself_and_a_filter_that_is_blank_everything() -> None:
    names = ["a[0]", "a0", "b"]
    assert matching(names, "a[0]") == ["a[0]", "a0"]
    assert matching(names, " , ") == names
    assert matching(names, "", "b") == ["b"]
    assert matching(names, "b", "") == []


@given(
    st.lists(
        st.floats(-1e6, 1e6, width=32) | st.just(math.nan) | st.just(math.inf), min_size=1, max_size=120
    ),
    st.integers(1, 17),
)
@settings(max_examples=60, deadline=None)
def test_whatever_is_thinned_keeps_extremes_and_says_where_nan_is(numbers: list[float], width: int) -> None:
    stretches = [numbers[i : i + width] for i in range(0, len(numbers), width)]
    finite = [[x for x in part if not math.isnan(x)] for part in stretches]
    table = pd.DataFrame(
        {
            "step": [i * width for i in range(len(stretches))],
            "epoch": 0,
            "layer": "a",
            "min": [min(part, default=math.nan) for part in finite],
            "mean": [sum(part) / len(part) if part else math.nan for part in finite],
            "max": [max(part, default=math.nan) for part in finite],
            "count": [len(part) for part in finite],
            "missing": [len(part) - len(f) for part, f in zip(stretches, finite, strict=True)],
            "wall_time": 0.0,
        }
    )
    rows = points_of(table, extremes=True, last=len(numbers) - 1)
    drawn = set(rows["value"].dropna())
    assert {x for part in finite if part for x in (min(part), max(part))} == drawn
    assert rows["value"].isna().any() == any(math.isnan(x) for x in numbers)
    assert rows["step"].max() <= len(numbers) - 1
