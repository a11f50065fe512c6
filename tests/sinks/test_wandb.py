"""W&B in offline mode: what stands in the file that `wandb sync` would send."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from streamlens.errors import SinkError
from streamlens.frame import Frame
from streamlens.operators import histogram
from streamlens.sink import RunInfo
from tests.helpers.sinks import RUN, norms, reduced, written

pytest.importorskip("wandb", reason="needs wandb")

import wandb
from wandb.proto import wandb_internal_pb2

from streamlens.sinks.wandb import WandB

BLOCK = 32 * 1024
pytestmark = pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecatedSince20")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    return tmp_path


def offline(folder: Path, **more: Any) -> WandB:
    return WandB("digits", mode="offline", dir=str(folder), **more)


def chunks(data: bytes) -> Iterator[bytes]:
    """The records of a file in LevelDB's log format, behind a head of seven bytes."""
    position, parts = 7, []
    while position + 7 <= len(data):
        left = BLOCK - position % BLOCK
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        if kind == 0:
            break
        parts.append(data[position + 7 : position + 7 + length])
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield b"".join(parts)
            parts = []


def stored(folder: Path) -> list[Any]:
    """All records of all runs; their process may still be writing when `finish()` has returned."""
    deadline = time.monotonic() + 20
    while True:
        found = []
        paths = sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns)
        for path in paths:
            for chunk in chunks(path.read_bytes()):
                record = wandb_internal_pb2.Record()  # type: ignore[attr-defined]
                record.ParseFromString(chunk)
                found.append(record)
        ended = sum(record.WhichOneof("record_type") == "exit" for record in found)
        if ended == len(paths) or time.monotonic() > deadline:
            return found
        time.sleep(0.01)


def records(folder: Path, kind: str) -> list[Any]:
    return [getattr(record, kind) for record in stored(folder) if record.WhichOneof("record_type") == kind]


def rows(folder: Path) -> list[dict[str, Any]]:
    found = []
    for record in records(folder, "history"):
        row: dict[str, Any] = {}
        for item in record.item:
            *outer, key = item.nested_key or [item.key]
            inner = row
            for name in outer:
                inner = inner.setdefault(name, {})
            if not key.startswith("_") or outer:
                inner[key] = json.loads(item.value_json)
        found.append(row)
    return found


def test_a_row_a_step_with_all_its_numbers(folder: Path) -> None:
    loss = Frame("loss", 1, ("",), torch.tensor([[0.25, 0.75]]), components=("a", "b"))
    written(offline(folder), norms(0, [1.0, 2.0]), norms(1, [3.0, 4.5]), loss)
    assert rows(folder) == [
        {"global_step": 0, "norm/layer0": 1.0, "norm/layer1": 2.0},
        {"global_step": 1, "norm/layer0": 3.0, "norm/layer1": 4.5, "loss/_/a": 0.25, "loss/_/b": 0.75},
    ]


def test_micro_steps_are_rows_of_their_own(folder: Path) -> None:
    written(offline(folder), norms(0, [1.0]), norms(0, [2.0], micro_step=1))
    assert [(row["global_step"], row["norm/layer0"]) for row in rows(folder)] == [(0, 1.0), (0, 2.0)]


def test_topics_are_drawn_over_the_frames_step(folder: Path) -> None:
    written(offline(folder), norms(0, [1.0]))
    over = {record.glob_name or record.name: record.step_metric for record in records(folder, "metric")}
    assert over["norm"] == over["norm/*"] == "global_step"


def test_counts_keep_their_bins_and_tensors_are_histograms(folder: Path) -> None:
    weights = torch.tensor([0.1, 0.2, 0.7, float("nan")])
    counted = reduced(
        Frame("weights", 0, ("fc",), (weights,)), histogram("weights", bins=4, range=(0, 1))
    ).replace(topic="counts")
    written(offline(folder), counted, Frame("whole", 0, ("fc",), (weights,)))
    (row,) = rows(folder)
    assert row["counts/fc"]["values"] == [2, 0, 1]
    assert row["counts/fc"]["bins"] == [0.0, 0.25, 0.5, 0.75]
    assert row["counts/fc/non_finite"] == row["whole/fc/non_finite"] == 1
    expected, edges = np.histogram(weights[:3].double().numpy(), bins=64)
    assert row["whole/fc"]["values"] == expected.tolist()
    assert row["whole/fc"]["bins"] == pytest.approx(edges.tolist())


def test_histograms_of_more_bins_than_wandb_takes_are_made_coarser(folder: Path) -> None:
    weights = Frame("weights", 0, ("fc",), (torch.linspace(0, 1, 5000),))
    written(offline(folder), reduced(weights, histogram("weights", bins=999, range=(0, 1))))
    (row,) = rows(folder)
    (found,) = (value for key, value in row.items() if key != "global_step")
    assert len(found["values"]) == 500
    assert sum(found["values"]) == 5000


def test_sentences_are_texts_and_bytes_are_images(folder: Path) -> None:
    alert = Frame("alerts.nan", 5, ("fc",), torch.tensor([1.0]), meta={"text": "fc is NaN ☹"})
    image = Frame("input", 5, ("",), (torch.zeros(4, 6, 3, dtype=torch.uint8),))
    written(offline(folder), alert, image)
    (row,) = rows(folder)
    assert row["alerts.nan/_/text"] == "fc is NaN ☹"
    assert row["alerts.nan/fc"] == 1.0
    assert (row["input"]["width"], row["input"]["height"]) == (6, 4)


def test_the_run_is_named_and_configured_by_ours_and_resumed_it_is_another_of_its_group(folder: Path) -> None:
    run = RunInfo(id="f00d", name="digits-7", metadata={"optimizer": "Adam"})
    written(offline(folder, tags=["a"]), norms(0, [1.0]), run=run)
    written(offline(folder), norms(4, [1.0]), run=RunInfo(id="f00d", resumed_at=3, resumption="abcd1234ef"))
    begun, resumed = (record for record in records(folder, "run") if record.run_id)
    config = {item.key: json.loads(item.value_json) for item in begun.config.update}
    assert (begun.run_id, begun.display_name, begun.run_group, list(begun.tags)) == (
        "f00d",
        "digits-7",
        "f00d",
        ["a"],
    )
    assert config["optimizer"] == "Adam"
    assert (resumed.run_id, resumed.run_group) == ("f00d-from-4-abcd1234", "f00d")


def test_two_attempts_from_one_snapshot_are_two_runs_and_one_that_goes_on_is_one(folder: Path) -> None:
    attempts = [RunInfo(id="f00d", resumed_at=3, resumption=mark * 32) for mark in "aab"]
    sink = offline(folder)
    for step, run in enumerate(attempts, start=4):
        written(sink, norms(step, [1.0]), run=run)
    begun = [record.run_id for record in records(folder, "run") if record.run_id]
    assert begun == ["f00d-from-4-aaaaaaaa", "f00d-from-4-aaaaaaaa", "f00d-from-4-bbbbbbbb"]


def test_a_run_of_the_programs_own_is_written_and_stays_open(folder: Path) -> None:
    own = wandb.init(
        project="mine", mode="offline", dir=str(folder), reinit="create_new", settings={"silent": True}
    )
    written(WandB(run=own), norms(0, [1.0]))
    own.log({"mine": 2.0})
    own.finish()
    assert rows(folder) == [{"global_step": 0, "norm/layer0": 1.0}, {"mine": 2.0}]


def test_a_given_run_and_what_is_for_a_new_one_is_an_error() -> None:
    with pytest.raises(TypeError, match="project, mode would be for a new one"):
        WandB("digits", run=object(), mode="offline")


def test_frames_to_a_closed_sink_are_an_error() -> None:
    with pytest.raises(SinkError, match="call open"):
        WandB("digits").write([norms(0, [1.0])])


def test_nothing_is_changed_by_opening_and_closing_without_frames(folder: Path) -> None:
    sink = offline(folder)
    sink.open(RUN)
    sink.close()
    assert rows(folder) == []
