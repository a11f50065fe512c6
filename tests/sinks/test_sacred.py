"""Sacred: what the observers of a real experiment have received."""

from __future__ import annotations

import json
import logging
import math
import shutil
import socket
import subprocess
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import streamlens as sl
from streamlens.errors import SinkError
from streamlens.frame import Frame
from tests.helpers.sinks import RUN, norms, written

with warnings.catch_warnings():
    # Sacred 0.8.7 uses pkg_resources, whose end setuptools announces by a UserWarning.
    warnings.simplefilter("ignore")
    sacred = pytest.importorskip(
        "sacred", reason="needs sacred, and setuptools below 81", exc_type=ImportError
    )
    from sacred.observers import FileStorageObserver

from streamlens.sinks.sacred import SacredSink

MONGOD = shutil.which("mongod")


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """Sacred sets the root logger's level and handlers and leaves them so."""
    root = logging.getLogger()
    level, handlers = root.level, root.handlers[:]
    yield
    root.setLevel(level)
    root.handlers[:] = handlers


def experiment(observer: Any) -> Any:
    found = sacred.Experiment("streamlens-test", save_git_info=False, interactive=True)
    found.observers.append(observer)
    return found


def run(ex: Any, body: Any) -> Any:
    ex.main(body)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ex.run(options={"--loglevel": "ERROR"})


def test_metrics_come_to_the_observer_with_steps_and_values(tmp_path: Path) -> None:
    ex = experiment(FileStorageObserver(tmp_path))
    loss = Frame("loss", 1, ("",), torch.tensor([[0.25, 0.75]]), components=("a", "b"))

    def body() -> None:
        written(SacredSink(ex), norms(0, [1.0, 2.0]), norms(1, [3.0, math.inf]), loss)

    run(ex, body)
    metrics = json.loads((tmp_path / "1" / "metrics.json").read_text())
    found = {name: list(zip(m["steps"], m["values"], strict=True)) for name, m in metrics.items()}
    assert found == {
        "norm/layer0": [(0, 1.0), (1, 3.0)],
        "norm/layer1": [(0, 2.0), (1, math.inf)],
        "loss/_/a": [(1, 0.25)],
        "loss/_/b": [(1, 0.75)],
    }


def test_a_training_run_is_logged(tmp_path: Path) -> None:
    ex = experiment(FileStorageObserver(tmp_path))
    expected: list[float] = []

    def body() -> None:
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        with sl.observe(model) as lens:
            lens.pipe(sl.norm("weights")).subscribe(SacredSink(ex))
            for _ in range(5):
                expected.append(float(model.weight.norm()))
                optimizer.zero_grad()
                model(torch.ones(4, 3)).sum().backward()
                optimizer.step()

    run(ex, body)
    (metric,) = json.loads((tmp_path / "1" / "metrics.json").read_text()).values()
    assert metric["steps"] == list(range(5))
    # The norm that a step ends with is the one that the next begins with.
    assert metric["values"][:-1] == pytest.approx(expected[1:])


def test_outside_of_a_run_it_says_where_to_subscribe(tmp_path: Path) -> None:
    with pytest.raises(SinkError, match="subscribe in its main function"):
        SacredSink(experiment(FileStorageObserver(tmp_path))).open(RUN)


def test_what_is_no_experiment_is_an_error_at_the_call() -> None:
    with pytest.raises(TypeError, match=r"takes a sacred\.Experiment or a run of one, got str"):
        SacredSink("mongodb://localhost")


@pytest.fixture
def mongo(tmp_path: Path) -> Iterator[str]:
    assert MONGOD is not None
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [MONGOD, "--dbpath", str(tmp_path), "--port", str(port), "--bind_ip", "127.0.0.1"],
        stdout=subprocess.DEVNULL,
    )
    yield f"mongodb://127.0.0.1:{port}"
    server.terminate()
    server.wait(20)


@pytest.mark.skipif(MONGOD is None, reason="needs mongod, MongoDB's server")
def test_metrics_come_to_mongodb(mongo: str) -> None:
    pymongo = pytest.importorskip("pymongo", reason="needs pymongo")
    from sacred.observers import MongoObserver

    client = pymongo.MongoClient(mongo, serverSelectionTimeoutMS=20_000)
    deadline = time.monotonic() + 20
    while client.admin.command("ping")["ok"] != 1 and time.monotonic() < deadline:
        time.sleep(0.1)
    ex = experiment(MongoObserver(url=mongo, db_name="streamlens"))

    def body() -> None:
        written(SacredSink(ex), norms(0, [1.0]), norms(1, [3.0]))

    run(ex, body)
    (metric,) = client["streamlens"]["metrics"].find()
    assert (metric["name"], metric["steps"], metric["values"]) == ("norm/layer0", [0, 1], [1.0, 3.0])
