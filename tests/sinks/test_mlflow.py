"""MLflow: what its own client reads back from its file store."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from streamlens.errors import SinkError
from streamlens.frame import Frame
from streamlens.sink import RunInfo
from tests.helpers.sinks import RUN, norms, written

pytest.importorskip("mlflow", reason="needs mlflow")

from mlflow.tracking import MlflowClient

from streamlens.sinks.mlflow import MLflow


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    # Newer versions serve a folder only where that is asked for.
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    return (tmp_path / "mlruns").as_uri()


def runs(store: str) -> list[Any]:
    client = MlflowClient(tracking_uri=store)
    experiment = client.get_experiment_by_name("streamlens")
    assert experiment is not None
    return list(client.search_runs([experiment.experiment_id], order_by=["attributes.start_time ASC"]))


def history(store: str, run_id: str, key: str) -> list[tuple[int, float, int]]:
    found = MlflowClient(tracking_uri=store).get_metric_history(run_id, key)
    return sorted((metric.step, metric.value, metric.timestamp) for metric in found)


def test_numbers_come_back_with_names_steps_and_times(store: str) -> None:
    sink = MLflow(store)
    loss = Frame("loss", 1, ("",), torch.tensor([[0.25, 0.75]]), components=("a", "b"))
    written(sink, norms(0, [1.0, 2.0]), norms(1, [3.0, math.inf]), loss)
    assert sink.run_id is not None
    assert history(store, sink.run_id, "norm/layer0") == [(0, 1.0, 100_000), (1, 3.0, 101_000)]
    assert history(store, sink.run_id, "norm/layer1") == [(0, 2.0, 100_000), (1, math.inf, 101_000)]
    assert history(store, sink.run_id, "loss/_/b") == [(1, 0.75, 102_000)]
    (run,) = runs(store)
    assert run.info.status == "FINISHED"
    assert run.data.tags["streamlens.run_id"] == "f00d"


def test_names_that_mlflow_forbids_are_written_by_their_codes(store: str) -> None:
    sink = MLflow(store)
    quantiles = Frame("G/q", 0, ("../fc",), torch.tensor([[2.5]]), components=("5%",))
    written(sink, quantiles)
    assert sink.run_id is not None
    (name,) = runs(store)[0].data.metrics
    assert name == "G:q/_x2e_.:fc/5_x25_"


def test_metadata_are_parameters_and_sentences_a_tag(store: str) -> None:
    run = RunInfo(id="f00d", name="digits", metadata={"optimizer": "Adam", "layers": (3, 4)})
    alert = Frame("alerts.nan", 5, ("fc",), torch.tensor([1.0]), meta={"text": "fc is NaN ☹"})
    written(MLflow(store), alert, run=run)
    (found,) = runs(store)
    assert found.info.run_name == "digits"
    assert found.data.params == {"optimizer": "Adam", "layers": "(3, 4)"}
    assert found.data.tags["alerts.nan.text"] == "fc is NaN ☹"
    assert found.data.metrics == {"alerts.nan/fc": 1.0}


def test_opened_again_it_goes_on_and_resumed_it_is_a_run_of_its_own(store: str) -> None:
    sink = MLflow(store)
    written(sink, norms(0, [1.0]))
    first = sink.run_id
    written(sink, norms(1, [2.0]))
    assert sink.run_id == first
    written(MLflow(store), norms(1, [9.0]), run=RunInfo(id="f00d", resumed_at=0))
    begun, resumed = runs(store)
    assert begun.info.run_id == first
    assert resumed.data.tags["mlflow.parentRunId"] == first
    assert resumed.data.tags["streamlens.resumed_at"] == "0"
    assert [step for step, _, _ in history(store, begun.info.run_id, "norm/layer0")] == [0, 1]
    assert history(store, resumed.info.run_id, "norm/layer0") == [(1, 9.0, 100_000)]


def test_a_sink_that_goes_back_twice_to_one_snapshot_begins_two_runs(store: str) -> None:
    sink = MLflow(store)
    for value, resumption in enumerate("aab"):
        run = RunInfo(id="f00d", resumed_at=0, resumption=resumption)
        written(sink, norms(1 + value % 2, [float(value)]), run=run)
    first, second = runs(store)
    assert [(step, value) for step, value, _ in history(store, first.info.run_id, "norm/layer0")] == [
        (1, 0.0),
        (2, 1.0),
    ]
    assert history(store, second.info.run_id, "norm/layer0") == [(1, 2.0, 100_000)]


def test_a_given_run_is_written_and_stays_open(store: str) -> None:
    client = MlflowClient(tracking_uri=store)
    own = client.create_run(client.create_experiment("mine")).info.run_id
    written(MLflow(store, run_id=own), norms(0, [1.0]))
    assert client.get_run(own).info.status == "RUNNING"
    assert history(store, own, "norm/layer0") == [(0, 1.0, 100_000)]


def test_a_write_that_failed_halfway_is_not_written_twice(store: str) -> None:
    sink = MLflow(store)
    sink.open(RUN)
    frame = norms(0, [float(i) for i in range(2500)])
    log_batch, calls = sink._client.log_batch, []

    def fail_once(*arguments: Any, **named: Any) -> None:
        calls.append(named)
        if len(calls) == 2:
            raise OSError("gone")
        log_batch(*arguments, **named)

    sink._client.log_batch = fail_once
    with pytest.raises(OSError, match="gone"):
        sink.write([frame])
    sink.write([frame])
    sink.close()
    metrics = [metric for i, named in enumerate(calls) if i != 1 for metric in named["metrics"]]
    assert [metric.value for metric in metrics] == [float(i) for i in range(2500)]


def test_a_name_too_long_for_mlflow_is_left_out_and_said_once(
    store: str, caplog: pytest.LogCaptureFixture
) -> None:
    sink = MLflow(store)
    frames = [Frame("norm", step, ("x" * 300, "fc"), torch.ones(2)) for step in range(2)]
    written(sink, *frames)
    (run,) = runs(store)
    assert set(run.data.metrics) == {"norm/fc"}
    assert sum("allows no name above 250" in record.message for record in caplog.records) == 1


def test_frames_to_a_closed_sink_are_an_error(store: str) -> None:
    with pytest.raises(SinkError, match="call open"):
        MLflow(store).write([norms(0, [1.0])])
