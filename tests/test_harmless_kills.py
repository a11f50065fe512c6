"""However a run ends, its store has what it should."""

from __future__ import annotations

import os
import random
import select
import signal
import sys
import time
from pathlib import Path

import pytest

import streamlens as sl
from tests.harmless_scripts import trained_until_killed

pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="kills as Unix knows them"),
    # Python 3.12 and later warn of a fork beside threads.
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]


def end(path: Path, how: signal.Signals, after: float) -> list[tuple[str, int, float]]:
    """Train in a process that is ended some time after its first step; what it said until then."""
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.dup2(send, 1)
            trained_until_killed(str(path))
        finally:
            os._exit(70)
    os.close(send)
    text = os.read(receive, 65536)
    deadline = time.monotonic() + after
    os.set_blocking(receive, False)
    # A full pipe would make it wait.
    while (left := deadline - time.monotonic()) > 0:
        if select.select([receive], [], [], left)[0]:
            text += os.read(receive, 65536)
    os.kill(child, how)
    os.set_blocking(receive, True)
    while more := os.read(receive, 65536):
        text += more
    os.close(receive)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == how
    # A line that was cut short by the kill was not said.
    lines = text.decode().rpartition("\n")[0].splitlines()
    return [(what, int(step), float(at)) for what, step, at in map(str.split, lines)]


def stored_steps(path: Path) -> list[int]:
    with sl.read_run(path) as run:
        return [frame.step for frame in run.frames()]


def survives_kill(path: Path, after: float, slack: float) -> None:
    """Kill a run and look into its store.

    Args:
        path: The store.
        after: Seconds after its first step.
        slack: Seconds beyond the promised one that a busy machine may take to wake a worker.
    """
    said = end(path, signal.SIGKILL, after)
    killed_at = max(at for what, _, at in said if what == "step")
    stored = stored_steps(path) if path.exists() else []
    assert stored == list(range(len(stored))), "in order, each once, none missing in between"
    safe = max((step for what, step, _ in said if what == "safe"), default=-1)
    assert len(stored) > safe, "an acknowledged flush is in the store"
    old = [step for what, step, at in said if what == "step" and at < killed_at - 1 - slack]
    assert len(stored) >= len(old), "no more than the last second is lost"


def test_a_killed_run_has_all_that_was_acknowledged_and_all_but_its_last_second(tmp_path: Path) -> None:
    survives_kill(tmp_path / "run.db", 0.4, slack=5)


def test_sigterm_loses_nothing(tmp_path: Path) -> None:
    said = end(tmp_path / "run.db", signal.SIGTERM, 0.2)
    last = max(step for what, step, _ in said if what == "step")
    # Of the step under way the frame may be there already.
    assert stored_steps(tmp_path / "run.db") in (list(range(last + 1)), list(range(last + 2)))
    assert [file.name for file in tmp_path.glob("*-wal")] == [], "the store was closed"


@pytest.mark.soak
def test_fifty_kills_at_random_moments(tmp_path: Path) -> None:
    moments = random.Random(0)
    for kill in range(50):
        survives_kill(tmp_path / f"{kill}.db", moments.uniform(0, 3), slack=1)
