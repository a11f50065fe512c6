"""The command line, run as people run it."""

from __future__ import annotations

import errno
import html
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pandas as pd
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from typer.testing import CliRunner, Result

from streamlens.lab.commands import app
from streamlens.lab.data import DATASETS, load_dataset, make_loader, whiten
from streamlens.lab.initialisation import INITIALISATIONS
from streamlens.lab.models import MODELS
from streamlens.lab.optimizers import OPTIMIZERS, SCHEDULES
from streamlens.lab.session import Session
from streamlens.runs import read_run
from streamlens.sinks.run_store import RunStore
from tests.helpers.archives import drawn, write_mnist

EVERYTHING = ("--ratio", "--norm", "--variance", "--train-accuracy", "--test-accuracy")
# The fully connected net on three large batches an epoch: as little work as a run can be.
SHORT = ("-m", "FullyConnected", "-e", "2", "-b", "600")
STEPS = 6


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """`--threads` sets the whole process's number."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def streamlens(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def train(*arguments: str | Path) -> Result:
    result = streamlens("train", *arguments)
    assert result.exit_code == 0, result.output
    return result


def words(text: str) -> str:
    """The text with its line breaks undone."""
    return " ".join(text.split())


@pytest.fixture(scope="module")
def full_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    folder = tmp_path_factory.mktemp("cli") / "a" / "run"
    return folder, train(*SHORT, *EVERYTHING, "--out", folder)


def test_a_run_leaves_store_events_and_report_and_says_where(full_run: tuple[Path, Result]) -> None:
    folder, result = full_run
    assert {path.name for path in folder.iterdir()} >= {"run.db", "tensorboard", "report.html"}
    for name in ("run.db", "report.html"):
        assert f"{folder}/{name}" in result.stdout
    assert f"tensorboard --logdir {folder}" in result.stdout
    assert "warning" not in result.output


def test_the_store_holds_what_was_asked_for_at_every_step(full_run: tuple[Path, Result]) -> None:
    with read_run(full_run[0] / "run.db") as run:
        assert set(run.topics) >= {
            "loss",
            "loss.ema",
            "learning_rate",
            "uw_ratio",
            "weights.norm2",
            "weight_gradients.norm2",
            "weights.var",
            "weight_gradients.var",
            "train_accuracy",
            "test_accuracy",
        }
        assert run.layers("uw_ratio") == ["layers.1", "layers.3", "layers.5"]
        for topic in ("loss", "uw_ratio", "weights.var"):
            assert sorted(set(run.dataframe(topic)["step"])) == list(range(STEPS))
        assert list(run.dataframe("test_accuracy")["epoch"]) == [0, 1]
        assert run.dataframe("learning_rate")["value"].tolist() == pytest.approx([3e-3] * 3 * STEPS)


def test_the_store_knows_how_the_run_was_made(full_run: tuple[Path, Result]) -> None:
    with read_run(full_run[0] / "run.db") as run:
        known = {
            "model": "FullyConnected",
            "dataset": "digits",
            "optimizer": "Adam",
            "learning_rate": 3e-3,
            "schedule": "constant",
            "epochs": 2,
            "batch_size": 600,
            "seed": 0,
        }
        assert {key: run.metadata.get(key) for key in known} == known


def test_the_average_recorded_is_that_of_the_losses_recorded(full_run: tuple[Path, Result]) -> None:
    with read_run(full_run[0] / "run.db") as run:
        losses = run.dataframe("loss")["value"].tolist()
        averages = run.dataframe("loss.ema")["value"].tolist()
    expected = [losses[0]]
    for loss in losses[1:]:
        expected.append(0.9 * expected[-1] + 0.1 * loss)
    assert averages == pytest.approx(expected)


def test_the_events_hold_the_same_numbers_as_the_store(full_run: tuple[Path, Result]) -> None:
    folder, _ = full_run
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    seen = [(event.step, event.value) for event in events.Scalars("uw_ratio/layers.3")]
    with read_run(folder / "run.db") as run:
        stored = run.dataframe("uw_ratio", layers=["layers.3"])
    assert [step for step, _ in seen] == stored["step"].tolist()
    assert [value for _, value in seen] == pytest.approx(stored["value"].tolist(), rel=1e-6)


def test_the_printed_accuracies_are_those_recorded(full_run: tuple[Path, Result]) -> None:
    folder, result = full_run
    with read_run(folder / "run.db") as run:
        last = {
            topic: run.dataframe(topic)["value"].iloc[-1] for topic in ("train_accuracy", "test_accuracy")
        }
    assert f"training accuracy {last['train_accuracy']:.1%}" in result.stdout
    assert f"test accuracy {last['test_accuracy']:.1%}" in result.stdout


def test_progress_without_a_terminal_is_a_line_an_epoch(full_run: tuple[Path, Result]) -> None:
    lines = [line for line in full_run[1].stderr.splitlines() if line.startswith("epoch")]
    assert [line.split("  ")[0] for line in lines] == ["epoch 1/2", "epoch 2/2"]


def test_the_report_is_one_page_that_names_the_run(full_run: tuple[Path, Result]) -> None:
    page = (full_run[0] / "report.html").read_text()
    assert "FullyConnected" in page
    assert "digits" in page
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=.?https?:", page)


def test_the_same_seed_gives_the_same_run_and_another_one_another(tmp_path: Path) -> None:
    losses = {}
    for name, seed in (("first", 1), ("again", 1), ("other", 2)):
        train(*SHORT, "-v", "none", "--seed", str(seed), "--out", tmp_path / name)
        with read_run(tmp_path / name / "run.db") as run:
            losses[name] = run.dataframe("loss")["value"].tolist()
    assert losses["first"] == losses["again"]
    assert losses["first"] != losses["other"]


def test_optimizer_rate_and_schedule_reach_the_run(tmp_path: Path) -> None:
    options = ("-o", "sgd", "-l", "0.02", "--schedule", "exponential")
    train(*SHORT, *options, "-v", "none", "--out", tmp_path)
    with read_run(tmp_path / "run.db") as run:
        rates = run.dataframe("learning_rate", layers=["layers.1"])["value"].tolist()
        assert run.metadata["optimizer"] == "SGD"
    assert rates == pytest.approx([0.02] * 3 + [0.02 * 0.95] * 3)


def test_the_initialisation_reaches_the_model_and_the_store(tmp_path: Path) -> None:
    first = []
    for name in ("default", "Orthogonal"):
        train(*SHORT, "--metric", "norm(weights)", "--init", name, "-v", "none", "--out", tmp_path / name)
        with read_run(tmp_path / name / "run.db") as run:
            assert run.metadata["init"] == name.lower()
            norms = run.dataframe("weights.norm2")
            first.append(norms[(norms["step"] == 0) & (norms["layer"] == "layers.3")]["value"].item())
    # 64 orthonormal rows; PyTorch's own has a variance of 1 / (3 fan_in).
    assert first == pytest.approx([(64 / 3) ** 0.5, 8.0], rel=0.05)


def test_a_data_set_is_read_from_the_folder_told_and_images_are_resized(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrays = [drawn(0, 8, 28, 28), drawn(1, 8, below=10), drawn(2, 4, 28, 28), drawn(3, 4, below=10)]
    write_mnist(monkeypatch, "MNIST", tmp_path / "data", arrays)
    arguments = ("-m", "VGG", "-d", "mnist", "--image-size", "8", "-e", "1", "-b", "4", "-v", "none")
    train(*arguments, "--data-dir", tmp_path / "data", "--out", tmp_path / "run")
    with read_run(tmp_path / "run" / "run.db") as run:
        assert {key: run.metadata[key] for key in ("model", "dataset", "image_size")} == {
            "model": "VGG",
            "dataset": "MNIST",
            "image_size": 8,
        }
        assert sorted(set(run.dataframe("loss")["step"])) == [0, 1]


def test_a_data_set_that_is_not_there_is_an_error_before_training(tmp_path: Path) -> None:
    result = streamlens("train", "-d", "cifar10", "--data-dir", tmp_path / "data", "--out", tmp_path / "run")
    assert result.exit_code == 2
    assert "Invalid value for '--dataset': CIFAR10: there is no cifar-10-binary.tar.gz" in words(
        result.stderr
    )
    assert "--download" in words(result.stderr)
    assert not list(tmp_path.iterdir())


def test_images_too_small_for_the_model_are_an_error_before_training(tmp_path: Path) -> None:
    result = streamlens("train", "-m", "DenseNet", "--image-size", "3", "--out", tmp_path / "run")
    assert result.exit_code == 2
    assert "'--image-size': DenseNet: image_size must be at least 4, got 3" in words(result.stderr)
    assert not (tmp_path / "run").exists()


def test_whitened_images_are_what_is_trained_on(tmp_path: Path) -> None:
    losses = []
    for options in ((), ("--whiten",)):
        out = tmp_path / str(len(options))
        assert train(*SHORT, "--image-size", "8", *options, "-v", "none", "--out", out).exit_code == 0
        with read_run(out / "run.db") as run:
            assert run.metadata["whitened"] == bool(options)
            losses.append(run.dataframe("loss")["value"].iloc[0])
    torch.manual_seed(0)
    data = whiten(load_dataset("digits", image_size=8))
    model = MODELS["FullyConnected"](channels=3, image_size=8, classes=10)
    images, labels = next(iter(make_loader(data.train, batch_size=600, seed=0)))
    assert losses[1] == pytest.approx(torch.nn.functional.cross_entropy(model(images), labels).item())
    assert losses[0] != losses[1]


def test_the_ratio_schedule_is_told_its_target_and_its_actions_are_recorded(tmp_path: Path) -> None:
    options = ("-o", "sgd", "--schedule", "ratio", "--target", "0.004", "--ratio-mode", "current")
    assert train(*options, "--out", tmp_path).exit_code == 0
    with read_run(tmp_path / "run.db") as run:
        assert run.metadata["schedule"] == "ratio"
        assert run.metadata["target"] == 0.004
        assert run.metadata["ratio_mode"] == "current"
        actions = run.dataframe("learning_rate.action")
        rates = run.dataframe("learning_rate")
    first_layer = rates[rates.layer == rates.layer.iloc[0]].set_index("step").value
    assert len(actions) > 3
    for step, value in zip(actions.step[:-1], actions.value[:-1], strict=True):
        assert first_layer[step + 1] == pytest.approx(value)


def test_subsample_records_every_nth_step(tmp_path: Path) -> None:
    train(*SHORT, "--ratio", "-s", "4", "-v", "none", "--out", tmp_path)
    with read_run(tmp_path / "run.db") as run:
        for topic in ("loss", "uw_ratio"):
            assert sorted(set(run.dataframe(topic)["step"])) == [0, 4]


@pytest.mark.parametrize("show", ["console", "none"])
def test_only_the_default_writes_events(show: str, tmp_path: Path) -> None:
    result = train(*SHORT, "-v", show, "--out", tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"run.db", "report.html"}
    assert not (tmp_path / "tensorboard").exists()
    assert "tensorboard" not in result.stdout.lower()


def test_a_run_is_shown_in_as_many_ways_as_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MPLBACKEND", "agg")  # no window, wherever the test runs
    ways = [argument for way in ("mpl", "csv", "jsonl", "parquet", "tb") for argument in ("-v", way)]
    result = train(*SHORT, "--ratio", "--histogram", *ways, "--out", tmp_path)
    assert result.exit_code == 0
    assert (tmp_path / "charts.png").read_bytes().startswith(b"\x89PNG")
    with read_run(tmp_path / "run.db") as run:
        stored = run.dataframe("uw_ratio").sort_values(["step", "layer"])["value"].tolist()
        topics = set(run.topics)
    tables = {
        "csv": pd.read_csv(tmp_path / "run.csv", na_filter=False, dtype={"layer": str}),
        "parquet": pd.read_parquet(tmp_path / "run.parquet"),
    }
    for table in tables.values():
        rows = table[table["topic"] == "uw_ratio"].sort_values(["step", "layer"])
        assert rows["value"].tolist() == stored
        assert set(table["topic"]) == topics
    lines = (tmp_path / "run.jsonl").read_text().splitlines()
    assert {json.loads(line)["topic"] for line in lines} == topics
    for told in (f"Charts: {tmp_path / 'charts.png'}", f"CSV: {tmp_path / 'run.csv'}", "TensorBoard: tens"):
        assert told in result.stdout


def test_the_console_shows_the_topics_watched(tmp_path: Path) -> None:
    quiet = train(*SHORT, "--ratio", "-v", "none", "--out", tmp_path / "none")
    shown = train(*SHORT, "--ratio", "-v", "console", "--out", tmp_path / "console")
    assert "uw_ratio" not in quiet.output
    assert "uw_ratio" in shown.output


def test_verbose_prints_the_plan_as_it_ran(tmp_path: Path) -> None:
    result = train(*SHORT, "--ratio", "-V", "-v", "none", "--out", tmp_path)
    assert "weight_updates" in result.stdout
    assert f"RunStore: {STEPS} frames" in result.stdout


def test_threads_sets_the_number_of_pytorch_and_is_one_unless_asked_for(tmp_path: Path) -> None:
    torch.set_num_threads(2)
    for options, threads in (((), 1), (("--threads", "2"), 2)):
        train(*SHORT, *options, "-v", "none", "--out", tmp_path)
        assert torch.get_num_threads() == threads


def test_a_second_run_in_a_folder_adds_to_the_store_and_leaves_the_first_be(tmp_path: Path) -> None:
    train(*SHORT, "--out", tmp_path)
    with read_run(tmp_path / "run.db") as run:
        first = run.id
    train(*SHORT, "--seed", "1", "--out", tmp_path)
    with read_run(tmp_path / "run.db") as newest, read_run(tmp_path / "run.db", run=first) as old:
        assert newest.metadata["seed"] == 1
        assert old.metadata["seed"] == 0
        assert len(old.dataframe("loss")) == STEPS
    assert (tmp_path / "tensorboard").is_dir()
    assert (tmp_path / "tensorboard-2").is_dir()


def test_the_default_folder_is_below_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    train(*SHORT, "-v", "none")
    [folder] = (tmp_path / "runs").iterdir()
    assert folder.name.endswith("-FullyConnected-digits")
    assert (folder / "report.html").exists()


def test_every_option_has_help_and_a_default() -> None:
    text = streamlens("train", "--help").output
    for flag in (
        "-m, --model", "-d, --dataset", "-b, --batch-size", "-e, --epochs", "-o, --optimizer",
        "-l, --learning-rate", "-s, --subsample", "--depth", "-v, --visualisation", "-V, --verbose",
        "--ratio", "--norm", "--variance", "--train-accuracy", "--test-accuracy", "--schedule", "--target",
        "--ratio-mode", "--seed", "--threads", "--out", "--init",
        "--data-dir", "--download", "--image-size", "--whiten",
    ):  # fmt: skip
        entry = re.search(rf"^  {flag}\b(.+?)(?=^  -|\Z)", text, flags=re.MULTILINE | re.DOTALL)
        assert entry, flag
        assert re.search(r"\[default: .+\]", words(entry[1])), flag
        assert re.search(r"[A-Za-z]{4,}.*\[default", words(entry[1])), flag


def test_the_help_names_every_model_data_set_initialisation_and_schedule() -> None:
    text = words(streamlens("train", "--help").output)
    for name in (*MODELS, *DATASETS, *INITIALISATIONS, *SCHEDULES):
        assert name in text
    assert sum(name in text for name in OPTIMIZERS) > 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("-m", "AlexNet"), "unknown model 'AlexNet': did you mean 'AlexNetMini'?"),
        (("-d", "digit"), "unknown data set 'digit': did you mean 'digits'?"),
        (("-o", "SDG"), "unknown optimizer 'SDG': did you mean 'SGD'"),
        (("--init", "xavier_norm"), "unknown initialisation 'xavier_norm': did you mean 'xavier_normal'"),
        (("--schedule", "exp"), "unknown schedule 'exp': did you mean 'exponential'?"),
        (
            ("-v", "tensorboard"),
            "'tensorboard' is not one of 'tb', 'console', 'mpl', 'altair', 'csv', 'jsonl', 'parquet'",
        ),
        (("-v", "none", "-v", "csv"), "'none' leaves nothing for csv to show: leave one of them out"),
        (("-l", "0"), "0.0 is not a finite number above 0"),
        (("-e", "0"), "Invalid value for '--epochs' / '-e'"),
        (("-b", "0"), "Invalid value for '--batch-size' / '-b'"),
        (("-s", "0"), "Invalid value for '--subsample' / '-s'"),
        (("--depth", "0", "--norm"), "--depth"),
    ],
)
def test_bad_input_is_an_error_that_says_the_remedy_and_writes_nothing(
    arguments: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    result = streamlens("train", *arguments, "--out", tmp_path / "run")
    assert result.exit_code == 2
    assert message in words(result.stderr)
    assert "Traceback" not in result.output
    assert not (tmp_path / "run").exists()


def test_names_are_taken_in_any_case(tmp_path: Path) -> None:
    train("-m", "fullyCONNECTED", "-d", "Digits", "-o", "adamw", *SHORT[2:], "-v", "none", "--out", tmp_path)
    with read_run(tmp_path / "run.db") as run:
        assert run.metadata["model"] == "FullyConnected"
        assert run.metadata["optimizer"] == "AdamW"


def test_a_folder_that_cannot_be_made_is_one_line_and_training_goes_on(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    result = streamlens("train", *SHORT, "--test-accuracy", "--out", tmp_path / "file" / "run")
    assert result.exit_code == 1
    warnings = [line for line in result.stderr.splitlines() if "warning" in line]
    assert len(warnings) == 1
    assert "Not a directory" in warnings[0]
    assert re.search(r"test accuracy \d", result.stdout)


def test_a_file_in_the_way_of_the_store_is_said_and_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "run.db").write_text("my own notes, which are long enough to be mistaken for a header")
    before = (tmp_path / "run.db").read_bytes()
    result = streamlens("train", *SHORT, "--out", tmp_path)
    assert result.exit_code == 1
    assert "run.db" in result.stderr
    assert "Traceback" not in result.output
    assert (tmp_path / "run.db").read_bytes() == before
    assert f"Trained after {STEPS} steps" in words(result.stdout)
    assert (tmp_path / "tensorboard").is_dir()


def test_a_full_disk_is_said_once_and_what_it_cost_at_the_end_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(self: RunStore, frames: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(RunStore, "write", write)
    result = streamlens("train", *SHORT, "--out", tmp_path)
    assert result.exit_code == 1
    said, lost = (line for line in result.stderr.splitlines() if "No space left" in line)
    assert said.startswith("warning: sink RunStore failed at step ")
    assert lost.startswith("warning: sink RunStore lost ")
    assert "Traceback" not in result.output
    assert f"Trained after {STEPS} steps" in words(result.stdout)


def test_where_streamlens_is_switched_off_the_run_says_that_nothing_was_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STREAMLENS_DISABLED", "1")
    result = train("--epochs", "1", "--ratio", "--out", tmp_path / "run")
    assert result.exit_code == 0
    assert "STREAMLENS_DISABLED is set: nothing was recorded" in words(result.output)
    assert "warning" not in result.output
    assert "Trained after" in result.output
    assert list((tmp_path / "run").iterdir()) == []


def test_a_loss_that_diverges_is_data_and_not_an_error(tmp_path: Path) -> None:
    options = ("-o", "SGD", "-l", "1e30", "--ratio", "--norm")
    result = streamlens("train", *SHORT, *options, "-v", "none", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    with read_run(tmp_path / "run.db") as run:
        assert len(run.dataframe("loss")) == STEPS
        assert not math.isfinite(run.dataframe("loss")["value"].iloc[-1])
    assert (tmp_path / "report.html").exists()


def test_an_interrupted_run_keeps_and_reports_what_it_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(self: Session, result: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(Session, "_line", interrupt)
    result = streamlens("train", *SHORT, "--out", tmp_path)
    assert result.exit_code == 130
    assert "Interrupted after 1 of 2 epochs" in words(result.stdout)
    assert (tmp_path / "report.html").exists()
    with read_run(tmp_path / "run.db") as run:
        assert len(run.dataframe("loss")) == STEPS // 2


def test_the_version_is_that_of_the_package() -> None:
    assert streamlens("--version").output == f"streamlens {version('streamlens')}\n"


def test_without_a_command_the_help_is_shown() -> None:
    assert "train" in streamlens().output


@pytest.fixture(scope="module")
def metrics_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    folder = tmp_path_factory.mktemp("metrics")
    metrics = ("norm(biases, order=1) | ema(0.5)", "cosine(weight_gradients)", "norm(weights)", "sharpness")
    options = [option for text in metrics for option in ("--metric", text)]
    flags = ("--histogram", "--spectral-norm", "--hessian", "--health", "--norm")
    return folder, train(*SHORT, *flags, *options, "--out", folder)


def test_each_metric_asked_for_is_recorded(metrics_run: tuple[Path, Result]) -> None:
    assert "warning" not in metrics_run[1].output
    with read_run(metrics_run[0] / "run.db") as run:
        counts = {topic: len(set(run.dataframe(topic)["step"])) for topic in run.topics}
        assert counts["weights.histogram"] == counts["weight_gradients.histogram"] == STEPS
        assert counts["weights.spectral_norm"] == STEPS
        assert counts["biases.norm1.ema"] == STEPS
        assert counts["weight_gradients.cosine"] == STEPS - 1
        assert counts["hessian_eigenvalues"] == counts["sharpness"] == 2  # once an epoch
        bins = run.dataframe("weights.histogram", layers="layers.5", steps=0)
        assert bins["value"].sum() == 10 * 64
        assert len(run.dataframe("weights.norm2")) == 3 * STEPS  # asked for twice, recorded once


def test_a_metric_that_gives_nothing_says_why(tmp_path: Path) -> None:
    asked = ("saturation", "loss | window(100)", "saturation(window=3)", "topic(loss) | per_epoch")
    options = [option for text in asked for option in ("--metric", text)]
    result = train("-m", "FullyConnected", "-e", "1", "-b", "600", "--health", *options, "--out", tmp_path)
    warnings = [line for line in result.stderr.splitlines() if "warning" in line]
    # Alerts that do not come are no silence to be explained, nor is a metric that came.
    assert len(warnings) == 2
    for line in warnings:
        assert "gave nothing: its first window is over after 100 steps, and the run had 3 steps" in line
    assert warnings[0].startswith("warning: topic('activations') | layers(depth=-1) | saturation(window=100")
    assert "window(100, mean) gave nothing" in warnings[1]


def test_the_report_shows_each_metric_asked_for(metrics_run: tuple[Path, Result]) -> None:
    page = (metrics_run[0] / "report.html").read_text()
    for title in (
        "Weights: layers.1",
        "Weight gradients: layers.5",
        "Spectral norms of weights",
        "Curvature",
        "Sharpness",
        "Biases: norm1, moving average",
        "Cosine of weight gradients",
    ):
        assert f"<h3>{title}</h3>" in page


def test_alerts_of_a_run_that_breaks_are_in_its_store_and_its_report(tmp_path: Path) -> None:
    options = ("-o", "SGD", "-l", "1e6", "--health", "-v", "none")
    train(*SHORT, *options, "--out", tmp_path)
    with read_run(tmp_path / "run.db") as run:
        raised = [topic for topic in run.topics if topic.startswith("alerts.")]
        assert raised
        assert "start" in set(run.dataframe(raised[0])["state"])
        told = run.dataframe(raised[0])["text"].iloc[0]
    assert html.escape(told) in (tmp_path / "report.html").read_text()


def test_observing_with_every_metric_leaves_the_losses_as_they_are(
    metrics_run: tuple[Path, Result], tmp_path: Path
) -> None:
    train(*SHORT, "-v", "none", "--out", tmp_path)
    losses = []
    for folder in (tmp_path, metrics_run[0]):
        with read_run(folder / "run.db") as run:
            losses.append(run.dataframe("loss")["value"].tolist())
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ("nrom(weights)", "no operator 'nrom' is installed: did you mean 'norm'?"),
        ("norm(weigths)", "unknown topic 'weigths': did you mean 'weights'?"),
        ("norm", "this lens has no topic selected"),
        ("norm(weights, ordr=1)", "norm() got an unexpected keyword argument 'ordr'"),
        ("norm(weights, order=-1)", "norm(order=-1)"),
        ("norm(weights", "is no metric: write it like norm, norm(weights)"),
        ("norm(__import__('os').getpid())", "is no metric"),
        ("(lambda: 1)()", "is no metric"),
        ("norm(*[1])", "is no metric"),
        ("", "is no metric"),
        ("AlignedFrame", "no operator 'AlignedFrame'"),
    ],
)
def test_a_metric_that_cannot_be_had_is_said_before_training(
    tmp_path: Path, metric: str, message: str
) -> None:
    result = streamlens("train", *SHORT, "--metric", metric, "--out", tmp_path / "run")
    assert result.exit_code == 2
    assert "--metric" in result.stderr
    assert message in words(re.sub(r"\s*│\s*", " ", result.stderr))
    assert not (tmp_path / "run").exists()


def run_process(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)


def test_the_installed_command_trains_alexnet_mini_on_digits(tmp_path: Path) -> None:
    command = shutil.which("streamlens", path=str(Path(sys.executable).parent))
    assert command is not None, "the package is not installed: pip install -e ."
    options = ("-e", "1", "--ratio", "--test-accuracy", "--out", tmp_path / "run")
    run = run_process(command, "train", *options)
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "run" / "report.html").exists()
    with read_run(tmp_path / "run" / "run.db") as stored:
        assert stored.layers("uw_ratio") == ["features.0", "features.3", "classifier.2"]


def test_without_the_lab_extra_one_line_says_what_to_install() -> None:
    code = "import sys; sys.modules['typer'] = None; from streamlens.cli import main; main()"
    run = run_process(sys.executable, "-c", code)
    assert run.returncode == 1
    assert run.stdout == ""
    [line] = run.stderr.splitlines()
    assert line.endswith("pip install 'streamlens[lab]'")


def test_the_module_can_be_run_too() -> None:
    run = run_process(sys.executable, "-m", "streamlens.cli", "train", "--model", "nonsense")
    assert run.returncode == 2
    assert "unknown model 'nonsense'" in run.stderr
