"""The examples of several processes run by the README's command, as one process, and without torchrun."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch.distributed as dist

import streamlens as sl
from examples import ddp, fsdp2
from streamlens.runs import list_runs

ROOT = Path(__file__).parents[2]
COMMANDS = re.findall(r"^\$ torchrun (.*examples/\S+\.py)", (ROOT / "README.md").read_text(), re.MULTILINE)
MAINS = {"ddp": ddp.main, "fsdp2": fsdp2.main}


def rows(file: Path, topic: str) -> pd.DataFrame:
    """A topic's rows over the first epoch; training amplifies rounding later."""
    found = sl.read_run(file).dataframe(topic)
    return found[found.step < 22]


@pytest.fixture(scope="module", params=sorted(MAINS))
def spread(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """An example run by its command in the README; its name, and the folder that it was run in."""
    (command,) = [command for command in COMMANDS if f"/{request.param}.py" in command]
    *options, script = command.split()
    folder = tmp_path_factory.mktemp(request.param)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", *options, str(ROOT / script)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 process(es): the loss went from 2." in done.stdout
    return request.param, folder


def alone(name: str, folder: Path) -> Path:
    """Run an example in this process; the run's file."""
    run = folder / f"{name}.db"
    MAINS[name](str(run), str(folder / f"{name}.html"), epochs=1)
    assert not dist.is_initialized()
    return run


def test_two_processes_leave_one_file_and_one_figure_with_the_numbers_of_one(
    spread: tuple[str, Path], tmp_path: Path
) -> None:
    name, folder = spread
    assert sorted(path.name for path in folder.iterdir()) == [f"{name}.db", f"{name}.html"]
    assert "vega" in (folder / f"{name}.html").read_text()
    assert len(list_runs(folder / f"{name}.db")) == 1
    run = alone(name, tmp_path)
    topics = [topic for topic in sl.read_run(folder / f"{name}.db").topics if not topic.startswith("alerts")]
    assert len(topics) >= 4
    for topic in topics:
        both, one = rows(folder / f"{name}.db", topic), rows(run, topic)
        assert len(one) >= 3
        assert both[["step", "epoch", "layer"]].equals(one[["step", "epoch", "layer"]])
        np.testing.assert_allclose(both.value, one.value, rtol=2e-4, err_msg=topic)


@pytest.mark.parametrize("name", sorted(MAINS))
def test_torchrun_with_one_process_and_no_torchrun_are_the_same(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "launched").mkdir()
    plain = alone(name, tmp_path)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    launcher = {"TORCHELASTIC_RUN_ID": "none", "RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost"}
    for variable, value in {**launcher, "MASTER_PORT": str(port)}.items():
        monkeypatch.setenv(variable, value)
    launched = alone(name, tmp_path / "launched")
    assert len(rows(plain, "loss")) == 22
    for topic in sl.read_run(plain).topics:
        pd.testing.assert_frame_equal(
            rows(plain, topic)[["step", "layer", "value"]], rows(launched, topic)[["step", "layer", "value"]]
        )


def test_the_examples_are_short_enough_to_read() -> None:
    for name in MAINS:
        assert len((ROOT / "examples" / f"{name}.py").read_text().splitlines()) < 150
