"""A long run, and a sink that hangs through all of it, take no more memory than a short one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.harmless_scripts import everything, stalled

ROOT = Path(__file__).parents[1]
MEBIBYTE = 2**20

pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads memory from /proc")


def in_a_process(name: str, steps: int) -> dict[str, Any]:
    """Run a script where no other test has left anything."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.harmless_scripts", name, str(steps)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=3600,
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def check_stalled(seen: dict[str, Any], steps: int) -> None:
    assert seen["queued"] == seen["capacity"], "what the hanging write holds is part of it"
    assert seen["balanced"]
    assert seen["flushed"]
    assert seen["emitted"] == steps == seen["written"] + seen["dropped"]
    assert seen["left"] == 0
    assert seen["dropped"] > 0
    assert len(seen["received"]) == seen["written"]
    assert seen["received"] == sorted(set(seen["received"]))
    assert seen["received"][-1] == steps - 1, "the oldest are dropped, not the newest"


def check_everything(seen: dict[str, Any], left: int) -> None:
    # The optimizer has no such state, and says so.
    assert [failure for failure in seen["failures"] if "momentum_buffer" not in failure] == []
    assert seen["alive"] == []
    assert seen["threads"] == []
    # Windows and caches are full after three tenths; garbage that waits for its collection is no leak.
    assert seen["objects"][-1] - seen["objects"][2] < left


def test_a_sink_that_stalls_holds_no_more_than_its_queue() -> None:
    check_stalled(stalled(700), 700)


def test_nothing_gathers_while_every_operator_is_subscribed() -> None:
    check_everything(everything(40), left=2000)


@pytest.mark.soak
def test_a_sink_that_stalls_for_ten_thousand_steps_keeps_memory_flat() -> None:
    seen = in_a_process("stalled", 10_000)
    check_stalled(seen, 10_000)
    # The queue is full after a few hundred steps: ten hundredths of the run.
    assert seen["resident"][-1] - seen["resident"][10] < 4 * MEBIBYTE


@pytest.mark.soak
def test_ten_thousand_steps_of_everything_leak_nothing() -> None:
    seen = in_a_process("everything", 10_000)
    check_everything(seen, left=2000)
    print({"MiB": [size / MEBIBYTE for size in seen["resident"]], "objects": seen["objects"]})
    assert seen["resident"][-1] - seen["resident"][2] < 8 * MEBIBYTE
