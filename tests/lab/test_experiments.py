"""The harness of the experiments: what is run, what is not run again, and how runs are read back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

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
)
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


def test_the_last_values_come_in_the_order_of_the_runs_however_long_these_are(tmp_path: Path) -> None:
    lengths = Experiment(
        "lengths",
        lambda _: [{"rate": 0.1, "epochs": 2}, {"rate": 1.0, "epochs": 1}],
        train,
        lambda _: Findings(),
    )
    last = lengths.run(scale(tmp_path)).last("weights.norm2")
    assert list(zip(last.rate, last.seed, last.step, strict=True)) == [
        (0.1, 0, 9),
        (1.0, 0, 3),
        (0.1, 1, 9),
        (1.0, 1, 3),
    ]


# -- the command line ----------------------------------------------------------------------------


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
