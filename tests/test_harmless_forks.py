"""What a forked process inherits of a lens is silent there, and what it makes itself works."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import streamlens as sl
from tests._runs import small_model, steps_of

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs POSIX processes"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]


class Examples(Dataset[Tensor]):
    """Says in each example what is in the process that made it; calls the lens there, as a transform may."""

    def __init__(self, lens: sl.Lens) -> None:
        self.lens = lens

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Tensor:
        self.lens.emit("transformed", index)
        threads = [t for t in threading.enumerate() if t.name.startswith("streamlens-")]
        return torch.tensor([float(os.getpid()), float(len(threads))])


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_of_a_data_loader_have_no_threads_of_ours_and_write_nothing(
    persistent: bool, tmp_path: Path
) -> None:
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    log = tmp_path / "callback"
    path = tmp_path / "run.db"

    def note(frame: sl.Frame) -> None:
        with log.open("a") as file:
            file.write(f"{os.getpid()} {frame.topic} {frame.step}\n")

    with sl.observe(model, emits=["transformed"]) as lens:
        lens.pipe(sl.norm("weights"), sl.window(5, partial=True)).subscribe(note)
        lens.pipe(sl.topic("transformed")).subscribe(note)
        lens.pipe(sl.norm("weights")).subscribe(sl.sinks.RunStore(path))
        list(steps_of(model, optimizer, 1))
        loader = DataLoader(
            Examples(lens),
            batch_size=4,
            num_workers=1,
            multiprocessing_context="fork",
            persistent_workers=persistent,
        )
        for _ in range(2):
            for batch in loader:
                assert set(batch[:, 0].tolist()).isdisjoint({float(os.getpid())})
                assert batch[:, 1].tolist() == [0.0] * len(batch)
                list(steps_of(model, optimizer, 1))
        del loader
    assert log.read_text().splitlines() == [f"{os.getpid()} weights.norm2.mean5 4"]
    with sl.read_run(path) as run:
        assert [frame.step for frame in run.frames()] == [0, 1, 2, 3, 4]


def in_child(body: Any) -> int:
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            body()
            code = 0
        except SystemExit:
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_child_that_closes_the_lens_it_inherited_completes_nothing_twice(tmp_path: Path) -> None:
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    log = tmp_path / "callback"

    def note(frame: sl.Frame) -> None:
        with log.open("a") as file:
            file.write(f"{os.getpid()} {frame.step}\n")

    lens = sl.observe(model)
    lens.pipe(sl.norm("weights"), sl.window(5, partial=True)).subscribe(note)
    list(steps_of(model, optimizer, 3))
    assert in_child(lens.close) == 0
    assert not log.exists()
    lens.close()
    assert log.read_text().splitlines() == [f"{os.getpid()} 2"]


def test_a_child_may_train_and_observe_for_itself(tmp_path: Path) -> None:
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    lens = sl.observe(model)
    lens.pipe(sl.norm("weights")).subscribe(sl.sinks.RunStore(tmp_path / "parent.db"))
    list(steps_of(model, optimizer, 2))

    def child() -> None:
        with sl.observe(model, start=0) as mine:
            mine.pipe(sl.norm("weights")).subscribe(sl.sinks.RunStore(tmp_path / "child.db"))
            list(steps_of(model, torch.optim.SGD(model.parameters(), lr=0.1), 3))

    assert in_child(child) == 0
    lens.close()
    for name, count in (("parent", 2), ("child", 3)):
        with sl.read_run(tmp_path / f"{name}.db") as run:
            assert [frame.step for frame in run.frames()] == list(range(count)), name
