"""Each experiment runs in its smoke version, from the first run to the last figure."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd
import pytest

from examples import (
    adam_moments,
    curvature,
    layer_freezing,
    open_questions,
    ratio_schedule,
    ratio_vs_loss,
)
from streamlens.lab.experiments import Experiment
from streamlens.lab.experiments.results import file_name

EXAMPLES = Path(__file__).parents[1] / "examples"

EXPERIMENTS: list[Experiment] = [
    adam_moments.experiment,
    curvature.experiment,
    layer_freezing.experiment,
    open_questions.experiment,
    ratio_schedule.experiment,
    ratio_vs_loss.experiment,
]


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda experiment: experiment.name)
def test_the_smoke_version_leaves_answers_tables_and_figures(
    experiment: Experiment, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    findings = experiment.main(["--smoke", "--jobs", "1", "--out", str(tmp_path)])
    out = tmp_path / "smoke" / experiment.name
    assert findings.answers
    assert capsys.readouterr().out.splitlines() == [f"- {answer}" for answer in findings.answers]
    assert findings.figures
    for name in map(file_name, findings.figures):
        assert (out / f"{name}.svg").read_text().startswith("<svg")
        assert "vega" in (out / f"{name}.html").read_text()
    for name, table in findings.tables.items():
        assert len(pd.read_csv(out / f"table-{file_name(name)}.csv")) == len(table)
    assert any(map(len, findings.tables.values()))
    assert len(pd.read_csv(out / "test_accuracy.csv")) > 0


def test_the_page_shows_each_figure_there_is_and_names_each_script() -> None:
    text = (EXAMPLES.parent / "docs" / "experiments.md").read_text()
    shown = set(re.findall(r"\]\(experiments/([^)]+)\)", text))
    assert shown == {path.name for path in (EXAMPLES.parent / "docs" / "experiments").iterdir()}
    for experiment in EXPERIMENTS:
        assert f"`python examples/{experiment.name}.py`" in text


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda experiment: experiment.name)
def test_a_script_is_called_as_its_experiment_and_fits_on_a_page(experiment: Experiment) -> None:
    assert len((EXAMPLES / f"{experiment.name}.py").read_text().splitlines()) < 150
