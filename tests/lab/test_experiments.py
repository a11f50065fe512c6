"""The harness of the experiments: what is run, what is not run again, and the arithmetic of the findings."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import altair as alt
import numpy as np
import pandas as pd
import pytest
from joblib.externals.loky import get_reusable_executor

import streamlens as sl
from streamlens.errors import UnknownTopicError
from streamlens.lab.experiments import (
    Experiment,
    ExperimentError,
    Findings,
    Results,
    Scale,
    Settings,
    Trial,
    curves,
    interval,
    paired,
    points,
    sentences,
)
from streamlens.lab.experiments.findings import markdown
from streamlens.lab.experiments.scale import parse
from streamlens.lab.experiments.trial import is_complete, store_of
from streamlens.runs import list_runs

CONDITIONS: list[Settings] = [{"rate": 0.1, "epochs": 1}, {"rate": 1.0, "epochs": 1}]


def train(trial: Trial) -> None:
    """The shortest run there is: a linear classifier, one epoch of six batches."""
    if (log := Path(str(trial.settings.get("log", "")))).suffix:
        with log.open("a") as file:
            file.write(f"{trial['rate']} {trial['seed']}\n")
    if trial.settings.get("breaks") == trial["rate"]:
        raise ArithmeticError("it broke")
    model = trial.model("FullyConnected", hidden=())
    trainer = trial.trainer(
        model, optimizer="SGD", learning_rate=trial["rate"], epochs=trial["epochs"], batch_size=256
    )
    trial.record(trainer, trainer.lens.pipe(sl.norm("weights"), sl.every(3)))


def experiment(run: Callable[[Trial], None] = train, **settings: str | float) -> Experiment:
    return Experiment(
        "rates",
        lambda _: [{**condition, **settings} for condition in CONDITIONS],
        run,
        lambda results: Findings(answers=[f"{len(results.runs)} runs"]),
    )


def scale(folder: Path, *, fresh: bool = False) -> Scale:
    return Scale(seeds=2, out=folder, fresh=fresh)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return experiment().run(scale(tmp_path_factory.mktemp("runs")))


# -- runs ----------------------------------------------------------------------------------------


def test_each_condition_runs_with_each_seed_into_a_store_that_tells_its_settings(results: Results) -> None:
    wanted = [{**c, "dataset": "digits", "seed": seed} for seed in (0, 1) for c in CONDITIONS]
    assert [dict(settings) for settings, _ in results.runs] == wanted
    for settings, store in results.runs:
        [record] = list_runs(store)
        assert record.metadata["settings"] == settings
        assert record.metadata["learning_rate"] == settings["rate"]
        assert record.metadata["seed"] == settings["seed"]


def test_what_is_done_is_not_run_again_and_what_was_cut_short_is(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    study, size = experiment(log=str(log)), scale(tmp_path)
    first = study.run(size)
    assert len(log.read_text().split("\n")[:-1]) == 4
    log.unlink()
    study.run(size)
    assert not log.exists()

    store = first.runs[1][1]
    store.rename(store.with_suffix(".part"))  # as a killed run leaves it
    study.run(size)
    assert log.read_text() == "1.0 0\n"
    assert is_complete(store, first.runs[1][0])
    assert not list(store.parent.glob("*.part*"))
    log.unlink()
    study.run(scale(tmp_path, fresh=True))
    assert len(log.read_text().split("\n")[:-1]) == 4


def test_a_store_of_other_settings_or_a_damaged_one_is_no_complete_run(
    results: Results, tmp_path: Path
) -> None:
    settings, store = results.runs[0]
    assert is_complete(store, settings)
    assert not is_complete(store, {**settings, "rate": 0.2})
    assert not is_complete(tmp_path / "none.db", settings)
    torn = tmp_path / "torn.db"
    torn.write_bytes(store.read_bytes()[:2000])
    assert not is_complete(torn, settings)


def test_a_run_that_fails_leaves_the_others_alone_and_is_run_the_next_time(tmp_path: Path) -> None:
    with pytest.raises(
        ExperimentError, match=r"(?s)rates: 2 of 4 runs failed, the first with: .*it broke"
    ) as info:
        experiment(breaks=1.0).run(scale(tmp_path))
    assert "'rate': 1.0" in str(info.value)
    trials = list(experiment(breaks=1.0).trials(scale(tmp_path)))
    assert [is_complete(t.store, t.settings) for t in trials] == [True, False, True, False]


def failing_metric(trial: Trial) -> None:
    def fail(_: object) -> float:
        raise ValueError("no metric")

    trainer = trial.trainer(trial.model("FullyConnected", hidden=()), epochs=1)
    trial.record(trainer, trainer.lens.pipe(sl.topic("weights"), sl.reduce(fail, name="broken")))


def test_a_run_whose_record_has_gaps_is_a_failed_one(tmp_path: Path) -> None:
    with pytest.raises(ExperimentError, match=r"has gaps: .*no metric"):
        experiment(failing_metric).run(scale(tmp_path))


def test_a_run_that_records_nothing_says_what_to_call(tmp_path: Path) -> None:
    with pytest.raises(ExperimentError, match=r"nothing was recorded: end it with trial\.record"):
        experiment(lambda trial: None).run(scale(tmp_path))


def test_two_equal_conditions_are_refused(tmp_path: Path) -> None:
    study = Experiment("twice", lambda _: [CONDITIONS[0]] * 2, train, lambda _: Findings())
    with pytest.raises(ValueError, match="twice: two conditions are alike"):
        study.run(scale(tmp_path))


def test_runs_in_other_processes_are_the_same_to_the_bit(results: Results, tmp_path: Path) -> None:
    parallel = experiment().run(Scale(seeds=2, out=tmp_path, jobs=2))
    get_reusable_executor().shutdown(wait=True)
    for topic in ("weights.norm2", "test_accuracy"):
        pd.testing.assert_frame_equal(parallel.rows(topic), results.rows(topic), check_exact=True)


def test_seeds_have_weights_of_their_own(results: Results) -> None:
    first = results.rows("weights.norm2").query("step == 0").set_index(["rate", "seed"]).value
    assert first[0.1, 0] != first[0.1, 1]


@pytest.mark.parametrize("value", ["a/b c", "ü*?", "x" * 300, 1e-9, True, None])
def test_any_settings_make_a_file_name_of_their_own(value: str | float | None) -> None:
    store = store_of(Path("runs"), {"value": value, "seed": 0})
    assert store.parent == Path("runs")
    assert len(store.name) < 120
    assert store == store_of(Path("runs"), {"value": value, "seed": 0})
    assert store != store_of(Path("runs"), {"value": value, "seed": 1})


# -- results -------------------------------------------------------------------------------------


def test_rows_carry_the_settings_of_their_run(results: Results) -> None:
    rows = results.rows("weights.norm2")
    assert list(rows.columns) == ["rate", "epochs", "dataset", "seed", "step", "epoch", "layer", "value"]
    assert all(list(run.step) == [0, 3] for _, run in rows.groupby(["rate", "seed"]))
    assert len(results.last("weights.norm2")) == 4
    assert set(results.last("weights.norm2").step) == {3}


def test_an_unknown_topic_is_named_with_what_there_is(results: Results) -> None:
    with pytest.raises(
        UnknownTopicError, match=r"no run has the topic 'weights.norm': did you mean .*Topics"
    ):
        results.rows("weights.norm")


def test_csv_files_hold_every_topic_of_every_run(results: Results, tmp_path: Path) -> None:
    paths = results.write_csv(tmp_path / "csv")
    assert sorted(path.name for path in paths) == ["test_accuracy.csv", "weights.norm2.csv"]
    read = pd.read_csv(tmp_path / "csv" / "weights.norm2.csv")
    assert np.allclose(read.value, results.rows("weights.norm2").value, rtol=1e-6)


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


# -- findings, figures, the command line -----------------------------------------------------------


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


def test_the_command_line_runs_everything_and_prints_the_answers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    experiment().main(["--smoke", "--jobs", "1", "--out", str(tmp_path)])
    assert capsys.readouterr().out == "- 4 runs\n"
    assert (tmp_path / "smoke" / "rates" / "findings.md").exists()
    assert (tmp_path / "smoke" / "rates" / "test_accuracy.csv").exists()


def test_options_say_on_what_and_how_much() -> None:
    smoke, usual = parse("x", "", ["--smoke"]), parse("x", "", ["--dataset", "cifar10", "--seeds", "7"])
    assert (smoke.dataset, smoke.seeds, smoke.out) == ("digits", 2, Path("runs/experiments/smoke"))
    assert (usual.dataset, usual.seeds, usual.out) == ("CIFAR10", 7, Path("runs/experiments"))
    picked = [size.pick(smoke=1, digits=2, full=3) for size in (smoke, parse("x", "", []), usual)]
    assert picked == [1, 2, 3]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--dataset", "cifar"], "did you mean"),
        (["--seeds", "1"], "at least 2 seeds"),
        (["--jobs", "0"], "at least 1 job"),
        (["--device", "abacus"], "abacus"),
    ],
)
def test_a_wrong_option_is_told(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("x", "", arguments)
    assert words in capsys.readouterr().err
