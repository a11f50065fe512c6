"""However a run ends, its store has what it should."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import streamlens as sl

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="kills as Unix knows them")


def start(path: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.harmless_scripts", "trained_until_killed", str(path)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
    )


def end(process: subprocess.Popen[bytes], how: signal.Signals, after: float) -> list[tuple[str, int, float]]:
    """End a process some time after it began to train; what it said until then."""
    assert process.stdout is not None
    first = process.stdout.readline()
    # It fills the pipe else, and waits.
    os.set_blocking(process.stdout.fileno(), False)
    text = first
    deadline = time.monotonic() + after
    while time.monotonic() < deadline:
        text += process.stdout.read() or b""
        time.sleep(0.001)
    process.send_signal(how)
    while process.poll() is None:
        text += process.stdout.read() or b""
        time.sleep(0.001)
    text += process.stdout.read() or b""
    process.stdout.close()
    assert process.returncode == -how
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
    said = end(start(path), signal.SIGKILL, after)
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
    said = end(start(tmp_path / "run.db"), signal.SIGTERM, 0.2)
    last = max(step for what, step, _ in said if what == "step")
    # Of the step under way the frame may be there already.
    assert stored_steps(tmp_path / "run.db") in (list(range(last + 1)), list(range(last + 2)))
    assert [file.name for file in tmp_path.glob("*-wal")] == [], "the store was closed"


@pytest.mark.soak
def test_fifty_kills_at_random_moments(tmp_path: Path) -> None:
    moments = random.Random(0)
    for kill in range(50):
        survives_kill(tmp_path / f"{kill}.db", moments.uniform(0, 3), slack=1)
