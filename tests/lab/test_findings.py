"""What follows from the runs of an experiment: means with their intervals, tables, sentences, figures."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import altair as alt
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from streamlens.lab.experiments import (
    CORRELATION,
    SHARE,
    Findings,
    curves,
    interval,
    paired,
    points,
    sentences,
)
from streamlens.lab.experiments.findings import markdown

ROWS = pd.DataFrame(
    [
        {"rate": rate, "batch": batch, "seed": seed, "value": 10 * rate + batch + (seed - 2) ** 2 * rate}
        for rate in (1.0, 2.0)
        for batch in (1, 2)
        for seed in range(5)
    ]
)
T4 = 2.776445105
"""The 97.5% quantile of Student's distribution with 4 degrees of freedom, from a printed table."""


def test_an_interval_is_students() -> None:
    table = interval(ROWS, by=["rate", "batch"]).set_index(["rate", "batch"])
    values = [10.0 * 2 + 1 + d * 2 for d in (4, 1, 0, 1, 4)]
    mean = sum(values) / 5
    deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / 4)
    found = {column: table[column][2.0, 1] for column in table}
    assert found["mean"] == pytest.approx(mean)
    assert found["deviation"] == pytest.approx(deviation)
    assert found["low"] == pytest.approx(mean - T4 * deviation / math.sqrt(5))
    assert found["high"] == pytest.approx(mean + T4 * deviation / math.sqrt(5))
    assert found["runs"] == 5


def test_an_interval_of_factors_is_that_of_the_logarithms() -> None:
    table = interval(ROWS, by=["rate", "batch"], log=True).set_index(["rate", "batch"])
    logs = interval(ROWS.assign(value=np.log(ROWS.value)), by=["rate", "batch"]).set_index(["rate", "batch"])
    for column in ("mean", "low", "high"):
        assert np.allclose(np.log(table[column]), logs[column])
    with pytest.raises(ValueError, match="needs values above 0"):
        interval(ROWS.assign(value=0.0), by=["rate", "batch"], log=True)


def runs_of(values: Sequence[float]) -> pd.DataFrame:
    return pd.DataFrame({"group": "a", "seed": range(len(values)), "value": values})


def test_an_interval_of_correlations_is_students_of_fishers_z() -> None:
    values = [-0.99, -1.0, -0.93, -0.97, -0.96]
    [found] = interval(runs_of(values), by=["group"], bounds=CORRELATION).to_dict("records")
    mean, error = float(np.mean(values)), float(stats.sem(values))
    # dz/dr = 1 / (1 - r^2): the deviation of z where the mean is.
    low, high = stats.t.interval(0.95, 4, loc=np.arctanh(mean), scale=error / (1 - mean**2))
    assert found["mean"] == pytest.approx(mean)
    assert (found["low"], found["high"]) == pytest.approx((np.tanh(low), np.tanh(high)))
    assert stats.t.interval(0.95, 4, loc=-0.9, scale=stats.sem([-1, -1, -1, -0.5, -1]))[0] < -1
    [wide] = interval(runs_of([-1, -1, -1, -0.5, -1]), by=["group"], bounds=CORRELATION).to_dict("records")
    assert -1 < wide["low"] < wide["mean"] < wide["high"] < 1


def test_an_interval_of_shares_is_students_of_the_log_odds() -> None:
    values = [1.0, 1.0, 0.98, 0.58, 0.9]
    [found] = interval(runs_of(values), by=["group"], bounds=SHARE).to_dict("records")
    mean, error = float(np.mean(values)), float(stats.sem(values))
    odds = np.log(mean / (1 - mean))
    ends = stats.t.interval(0.95, 4, loc=odds, scale=error / (mean * (1 - mean)))
    assert found["mean"] == pytest.approx(mean)
    assert (found["low"], found["high"]) == pytest.approx(tuple(1 / (1 + np.exp(-np.array(ends)))))
    assert stats.t.interval(0.95, 4, loc=mean, scale=error)[1] > 1 > found["high"]


@given(
    st.lists(st.floats(0, 1), min_size=2, max_size=8),
    st.floats(-5, 5),
    st.floats(0.1, 10),
)
def test_an_interval_stays_within_its_bounds_around_the_mean_and_moves_with_them(
    shares: list[float], low: float, width: float
) -> None:
    [found] = interval(runs_of(shares), by=["group"], bounds=SHARE).to_dict("records")
    assert 0 <= found["low"] <= found["mean"] + 1e-12
    assert found["mean"] <= found["high"] + 1e-12 <= 1 + 2e-12
    moved = [min(max(low + width * share, low), low + width) for share in shares]
    [other] = interval(runs_of(moved), by=["group"], bounds=(low, low + width)).to_dict("records")
    for column in ("low", "mean", "high"):
        assert other[column] == pytest.approx(low + width * found[column], abs=1e-6 * width)


def test_a_narrow_interval_is_the_same_with_bounds() -> None:
    values = list(0.6 + 1e-4 * np.array([1.0, -2.0, 0.0, 3.0, -1.0]))
    plain, bounded = (interval(runs_of(values), by=["group"], bounds=b) for b in (None, SHARE))
    for column in ("low", "high"):
        assert bounded[column][0] == pytest.approx(plain[column][0], abs=1e-6)


def test_runs_that_are_all_at_a_bound_have_an_interval_of_one_point() -> None:
    for value in (0.0, 1.0):
        [found] = interval(runs_of([value] * 5), by=["group"], bounds=SHARE).to_dict("records")
        assert (found["low"], found["mean"], found["high"]) == (value, value, value)
    assert interval(runs_of([0.5]), by=["group"], bounds=SHARE).low.isna().all()


def test_values_beyond_the_bounds_are_told_and_factors_have_none() -> None:
    with pytest.raises(ValueError, match=r"'value' goes from 0\.2 to 96: beyond 0 or 1"):
        interval(runs_of([0.2, 96.0]), by=["group"], bounds=SHARE)
    with pytest.raises(ValueError, match=r"factors \(log\) or one between bounds, not both"):
        interval(runs_of([0.2, 0.3]), by=["group"], bounds=SHARE, log=True)


def test_differences_of_shares_are_at_most_one() -> None:
    base, other = [0.0, 0.0, 0.1, 0.3, 0.0], [1.0, 0.9, 1.0, 1.0, 0.58]
    rows = pd.concat([runs_of(base).assign(group="base"), runs_of(other).assign(group="other")])
    [plain], [bounded] = (paired(rows, "group", "base", bounds=b).to_dict("records") for b in (None, SHARE))
    assert bounded["mean"] == plain["mean"] == pytest.approx(0.816)
    assert plain["high"] > 1 > bounded["high"]
    r = float(np.mean(np.subtract(other, base)))
    error = float(stats.sem(np.subtract(other, base))) / (1 - r**2)
    ends = np.tanh(stats.t.interval(0.95, 4, loc=np.arctanh(r), scale=error))
    assert (bounded["low"], bounded["high"]) == pytest.approx(tuple(ends))
    with pytest.raises(ValueError, match="beyond 0 or 1"):
        paired(rows.assign(value=2.0), "group", "base", bounds=SHARE)


def test_bounded_intervals_hold_the_true_mean_of_skewed_shares_no_less_often() -> None:
    random = np.random.default_rng(0)
    rows = pd.DataFrame({"group": np.repeat(range(2000), 5), "value": random.beta(18, 2, 10_000)})
    held = [
        table.low.lt(0.9).mul(table.high.gt(0.9)).mean()
        for table in (interval(rows, by=["group"], bounds=bounds) for bounds in (SHARE, None))
    ]
    assert held[0] == pytest.approx(0.95, abs=0.02)
    assert held[0] > held[1] - 0.01


def test_an_interval_holds_the_true_mean_19_times_of_20() -> None:
    random = np.random.default_rng(0)
    rows = pd.DataFrame({"group": np.repeat(range(2000), 5), "value": random.normal(3, 2, 10_000)})
    table = interval(rows, by=["group"])
    assert table.low.lt(3).mul(table.high.gt(3)).mean() == pytest.approx(0.95, abs=0.015)


def test_one_run_has_no_interval_and_missing_values_are_no_runs() -> None:
    one = interval(ROWS[ROWS.seed == 0], by=["rate", "batch"])
    assert one.low.isna().all()
    assert (one.runs == 1).all()
    gone = interval(ROWS.assign(value=ROWS.value.where(ROWS.seed > 1)), by=["rate", "batch"])
    assert (gone.runs == 3).all()


def test_several_values_of_one_run_are_not_taken_for_several_runs() -> None:
    with pytest.raises(ValueError, match="groups by rate hold several values of one run"):
        interval(ROWS, by=["rate"])


@pytest.mark.parametrize("log", [False, True])
def test_pairs_are_compared_seed_by_seed(log: bool) -> None:
    table = paired(ROWS, "rate", 1.0, by=["batch"], log=log).set_index("batch")
    value = ROWS.set_index(["rate", "batch", "seed"]).value
    for batch in (1, 2):
        pairs = [(value[2.0, batch, seed], value[1.0, batch, seed]) for seed in range(5)]
        changes = [math.log(a / b) if log else a - b for a, b in pairs]
        mean = sum(changes) / 5
        assert table.loc[batch, "mean"] == pytest.approx(math.exp(mean) if log else mean)
        assert table.loc[batch, "runs"] == 5
    with pytest.raises(ValueError, match="no run has rate = 3: there are"):
        paired(ROWS, "rate", 3)


# -- findings, figures ---------------------------------------------------------------------------


def test_findings_are_written_as_svg_html_csv_and_markdown(tmp_path: Path) -> None:
    table = interval(ROWS, by=["rate", "batch"])
    rows = ROWS.assign(step=ROWS.batch)
    figures = {
        "curves": curves(rows, color="rate", column="batch", log=True),
        "points": points(table, x="batch", color="rate"),
    }
    Findings(["42 is the answer"], {"gain": table}, figures).write(tmp_path, "rates")
    for name in figures:
        assert (tmp_path / f"{name}.svg").read_text().startswith("<svg")
        page = (tmp_path / f"{name}.html").read_text()
        assert "vega" in page
        assert 'src="http' not in page
    assert len(pd.read_csv(tmp_path / "table-gain.csv")) == 4
    text = (tmp_path / "findings.md").read_text()
    assert "- 42 is the answer" in text
    assert "| rate | batch | mean (95% interval) | deviation | runs |" in text
    assert "![points](points.svg)" in text


def test_markdown_shows_a_mean_with_its_interval_and_escapes_bars() -> None:
    table = pd.DataFrame({"which": ["a|b"], "mean": [1.23456], "low": [1.0], "high": [1.5], "runs": [5]})
    assert markdown(table).splitlines()[-1] == "| a\\|b | 1.23 (1 to 1.5) | 5 |"


def test_a_template_makes_a_sentence_of_each_row() -> None:
    table = pd.DataFrame({"model": ["VGG", "ConvNet"], "mean": [0.5, 0.25]})
    assert sentences("{model}: {mean:.0%}", table) == ["VGG: 50%", "ConvNet: 25%"]


def test_curves_draw_the_mean_and_the_interval_of_each_place() -> None:
    chart = curves(ROWS.assign(step=ROWS.batch), color="rate")
    assert isinstance(chart, alt.LayerChart)
    drawn = next(iter(json.loads(chart.to_json())["datasets"].values()))
    table = interval(ROWS, by=["rate", "batch"])
    assert [row["mean"] for row in drawn] == pytest.approx(list(table["mean"]))
    assert [row["high"] for row in drawn] == pytest.approx(list(table["high"]))
