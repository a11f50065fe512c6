"""The folder a run leaves, and what is recorded in it."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

import streamlens as sl
from streamlens.errors import LayerNotFoundError
from streamlens.frame import Frame
from streamlens.lab.models import AlexNetMini
from streamlens.lab.recording import Recording, chains, default_folder


def record(steps: int = 4, **options: object) -> dict[str, list[Frame]]:
    """What the chains yield for some steps of AlexNetMini, by topic."""
    torch.manual_seed(0)
    model, criterion = AlexNetMini(), torch.nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    frames: dict[str, list[Frame]] = {}
    with sl.observe(model, loss=criterion, emits=("test_accuracy",)) as lens:
        for stream in chains(lens, **options):  # type: ignore[arg-type]
            stream.subscribe(lambda frame: frames.setdefault(frame.topic, []).append(frame))
        for _ in range(steps):
            optimizer.zero_grad()
            criterion(model(torch.randn(4, 3, 32, 32)), torch.arange(4)).backward()
            optimizer.step()
        lens.emit("test_accuracy", 0.5)
        lens.epoch_finished()
    return frames


def test_a_run_always_records_loss_its_average_the_rates_and_the_epochs() -> None:
    assert set(record()) == {"loss", "loss.ema", "learning_rate", "epoch_finished"}


@pytest.mark.parametrize(
    ("option", "topics"),
    [
        ("ratio", {"uw_ratio"}),
        ("norm", {"weights.norm2", "weight_gradients.norm2"}),
        ("variance", {"weights.var", "weight_gradients.var"}),
    ],
)
def test_each_option_adds_its_topics_for_every_layer(option: str, topics: set[str]) -> None:
    frames = record(**{option: True})
    assert set(frames) - set(record()) == topics
    for topic in topics:
        assert [frame.step for frame in frames[topic]] == [0, 1, 2, 3]
        assert frames[topic][0].layers == ("features.0", "features.3", "classifier.2")


def test_subsampling_keeps_the_steps_it_divides_and_every_emitted_number() -> None:
    frames = record(steps=5, ratio=True, subsample=2, emitted=["test_accuracy"])
    for topic in ("loss", "loss.ema", "uw_ratio", "learning_rate"):
        assert [frame.step for frame in frames[topic]] == [0, 2, 4], topic
    assert len(frames["test_accuracy"]) == 1


def test_a_depth_without_layers_is_an_error() -> None:
    model = AlexNetMini()
    with sl.observe(model, loss=torch.nn.CrossEntropyLoss()) as lens, pytest.raises(LayerNotFoundError):
        chains(lens, norm=True, depth=0)


def test_the_default_folder_says_when_what_and_on_which_data(tmp_path: Path) -> None:
    folder = default_folder("AlexNetMini", "digits", root=tmp_path)
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d-AlexNetMini-digits", folder.name)
    assert not folder.exists()


def test_two_runs_within_a_second_get_folders_of_their_own(tmp_path: Path) -> None:
    # Enough of them to have two within one second, whenever the clock ticks.
    folders = []
    for _ in range(3):
        folders.append(default_folder("M", "d", root=tmp_path))
        folders[-1].mkdir()
    assert len(set(folders)) == 3
    assert any(folder.name.endswith(("-2", "-3")) for folder in folders)


def test_a_second_run_in_a_folder_gets_events_of_its_own(tmp_path: Path) -> None:
    warnings: list[str] = []
    first = Recording(tmp_path / "run", show=["tb"], warn=warnings.append)
    assert first.shown == {"TensorBoard": tmp_path / "run" / "tensorboard"}
    first.shown["TensorBoard"].mkdir(exist_ok=True)
    second = Recording(tmp_path / "run", show=["tb"], warn=warnings.append)
    assert second.shown == {"TensorBoard": tmp_path / "run" / "tensorboard-2"}
    assert warnings == []


def test_without_tensorboard_only_the_store_is_written(tmp_path: Path) -> None:
    recording = Recording(tmp_path, show=["none"], warn=pytest.fail)
    assert [type(sink).__name__ for sink in recording.sinks] == ["RunStore"]
    assert recording.shown == {}


def test_files_of_a_second_run_are_numbered_before_their_suffix(tmp_path: Path) -> None:
    (tmp_path / "run.csv").touch()
    (tmp_path / "charts.png").touch()
    recording = Recording(tmp_path, show=["csv", "mpl", "jsonl", "parquet"], warn=pytest.fail)
    assert recording.shown == {
        "CSV": tmp_path / "run-2.csv",
        "Charts": tmp_path / "charts-2.png",
        "JSON lines": tmp_path / "run.jsonl",
        "Parquet": tmp_path / "run.parquet",
    }
    assert [type(sink).__name__ for sink in recording.sinks] == [
        "RunStore",
        "CSV",
        "Matplotlib",
        "JSONLines",
        "Parquet",
    ]


def test_what_lacks_its_package_is_left_out_with_the_extra_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    warnings: list[str] = []
    recording = Recording(tmp_path, show=["parquet", "csv"], warn=warnings.append)
    assert warnings == [
        "Parquet needs the pyarrow package: pip install 'streamlens[parquet]'; training goes on without it"
    ]
    assert list(recording.shown) == ["CSV"]


def test_a_folder_that_cannot_be_made_is_said_in_one_line_and_nothing_is_recorded(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    warnings: list[str] = []
    recording = Recording(tmp_path / "file" / "run", show=["tb"], warn=warnings.append)
    [warning] = warnings
    assert warning == f"cannot write to {tmp_path}/file/run: Not a directory; training goes on unrecorded"
    assert recording.sinks == []
    assert recording.write_report() is None


def test_a_missing_store_is_said_when_the_report_is_asked_for(tmp_path: Path) -> None:
    warnings: list[str] = []
    recording = Recording(tmp_path, show=["none"], warn=warnings.append)
    assert recording.write_report() is None
    [warning] = warnings
    assert warning.startswith("no report was written: ")
