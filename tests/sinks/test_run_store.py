"""`RunStore`: the run store as the end of a chain."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

import streamlens as sl
from streamlens.delivery import Delivery
from streamlens.errors import RunStoreError
from streamlens.frame import Frame
from streamlens.runs import list_runs, read_run
from streamlens.sink import RunInfo
from streamlens.sinks.run_store import RunStore
from tests._runs import small_model


def loss(*steps: int) -> list[Frame]:
    return [Frame("loss", step, ("",), torch.tensor([float(step)])) for step in steps]


def stored(path: Path, run: str) -> list[int]:
    with read_run(path, run) as reader:
        return [frame.step for frame in reader.frames()]


def test_what_is_written_can_be_read_at_once_and_after_closing(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "run.db"
    store = RunStore(str(path))
    assert not path.parent.exists()
    store.open(RunInfo(id="a", name="digits", metadata={"epochs": 3}))
    for step in range(3):
        store.write(loss(step))
        assert stored(path, "a") == list(range(step + 1))
    store.close()
    assert stored(path, "a") == [0, 1, 2]
    with read_run(path) as run:
        assert (run.id, run.name, run.metadata) == ("a", "digits", {"epochs": 3})


def test_wall_times_are_those_at_which_frames_were_emitted(tmp_path: Path) -> None:
    store = RunStore(tmp_path / "run.db")
    store.open(RunInfo(id="a"))
    store.received = [1000.5, 1001.5]
    store.write(loss(0, 1))
    store.close()
    with read_run(tmp_path / "run.db") as run:
        assert run.dataframe("loss")["wall_time"].tolist() == [1000.5, 1001.5]


def test_a_store_that_is_subscribed_again_goes_on_with_its_run_and_a_new_lens_begins_one(
    tmp_path: Path,
) -> None:
    store = RunStore(tmp_path / "run.db")
    for run, step in (("a", 0), ("a", 1), ("b", 0)):
        store.open(RunInfo(id=run))
        store.write(loss(step))
        store.close()
    assert [run.id for run in list_runs(store.path)] == ["a", "b"]
    assert stored(store.path, "a") == [0, 1]
    assert stored(store.path, "b") == [0]


def test_a_resumed_run_replaces_what_it_had_beyond_its_snapshot(tmp_path: Path) -> None:
    first = RunStore(tmp_path / "run.db")
    first.open(RunInfo(id="a"))
    first.write(loss(0, 1, 2, 3))
    first.close()
    resumed = RunStore(tmp_path / "run.db")
    resumed.open(RunInfo(id="a", resumed_at=1))
    resumed.write(loss(2))
    resumed.close()
    assert stored(tmp_path / "run.db", "a") == [0, 1, 2]


class Chain:
    """A chain that ends in a store, as a lens would connect it."""

    def __init__(self, store: RunStore, run: RunInfo) -> None:
        self.errors: list[str] = []
        self.delivery = Delivery(lambda: run, lambda error, where: self.errors.append(f"{where}: {error}"))
        self.store = store
        self.proxy = self.delivery.connect(store, "chain")

    def send(self, frames: Sequence[Frame]) -> bool:
        """Whether all frames were written."""
        for frame in frames:
            self.proxy.on_next(frame)
        self.delivery.end_burst()
        return self.store.drain(10)


def test_frames_of_named_models_arrive_under_their_labels(tmp_path: Path) -> None:
    chain = Chain(RunStore(tmp_path / "run.db"), RunInfo(id="a"))
    frames = [Frame("norm", step, ("", "conv"), torch.tensor([step, 2.0]), source="G") for step in range(3)]
    assert chain.send(frames)
    chain.proxy.on_completed()
    assert chain.delivery.close(10)
    with read_run(tmp_path / "run.db") as run:
        assert run.topics == ["G/norm"]
        assert run.layers("G/norm") == ["G", "G.conv"]
        assert run.dataframe("G/norm")["value"].tolist() == [0.0, 2.0, 1.0, 2.0, 2.0, 2.0]
    assert chain.errors == []


def test_what_is_in_the_way_is_reported_and_writing_begins_when_it_is_gone(tmp_path: Path) -> None:
    path = tmp_path / "run.db"
    path.write_text("in the way\n")
    store = RunStore(path)
    store.retries = 0
    chain = Chain(store, RunInfo(id="a"))
    assert not chain.send(loss(0))
    assert len(chain.errors) == 1
    assert f"{path} is not a run store" in chain.errors[0]
    assert path.read_text() == "in the way\n"
    path.unlink()
    assert chain.send(loss(1, 2))
    assert not chain.delivery.close(10)
    assert stored(path, "a") == [1, 2]
    assert len(chain.errors) == 1
    (stats,) = chain.delivery.stats().values()
    assert (stats.written, stats.failed) == (2, 1)


def test_two_stores_on_one_file_are_an_error_and_not_a_mixture(tmp_path: Path) -> None:
    first, second = RunStore(tmp_path / "run.db"), RunStore(tmp_path / "run.db")
    first.open(RunInfo(id="a"))
    with pytest.raises(RunStoreError, match=r"another sink of this process.*one another path"):
        second.open(RunInfo(id="b"))
    first.write(loss(0))
    first.close()
    second.open(RunInfo(id="b"))
    second.write(loss(5))
    second.close()
    assert stored(tmp_path / "run.db", "a") == [0]
    assert stored(tmp_path / "run.db", "b") == [5]


def test_the_file_lies_where_the_program_stood_when_it_named_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    store = RunStore("run.db")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    store.open(RunInfo(id="a"))
    store.close()
    assert (tmp_path / "run.db").exists()
    assert repr(store) == f"RunStore('{tmp_path / 'run.db'}')"


def test_closing_twice_is_fine_and_writing_while_closed_is_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = RunStore(tmp_path / "run.db")
    store.close()
    store.open(RunInfo(id="a"))
    store.close()
    store.close()
    with pytest.raises(RunStoreError, match=r"call open\(run\) first"):
        store.write(loss(0))
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_every_return_to_one_snapshot_in_one_process_drops_what_lies_beyond_it(tmp_path: Path) -> None:
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    lens = sl.observe(model)
    store = RunStore(tmp_path / "run.db")
    lens.pipe(sl.norm("weights")).subscribe(store)

    def train(steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            model(torch.ones(4, 4)).sum().backward()
            optimizer.step()

    train(3)
    snapshot = lens.state_dict()
    for steps in (4, 3, 1):
        train(steps)
        assert lens.flush(10)
        assert stored(store.path, lens.engine.run_id) == list(range(3 + steps))
        lens.load_state_dict(snapshot)
    train(2)
    run_id = lens.engine.run_id
    assert lens.close(10)
    assert stored(store.path, run_id) == list(range(5))
    assert [run.id for run in list_runs(store.path)] == [run_id]
