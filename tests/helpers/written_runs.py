"""Runs for the live page, whose numbers tell their steps; and a process that writes one while others look.

Imports nothing of the views, so that the process is there in a moment.
"""

from __future__ import annotations

import math
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from streamlens.frame import Frame
from streamlens.runs import RunWriter

__all__ = ["LAYERS", "WritingProcess", "action", "alert", "frames_of", "write_run", "writing"]

_ROOT = Path(__file__).parents[2]

LAYERS = ("features.0", "features.3", "classifier.2")


def frames_of(step: int, layers: Sequence[str] = LAYERS) -> list[Frame]:
    """What a small run records at a step; its numbers tell the step, and nothing is random."""
    count = len(layers)
    place = torch.arange(1, count + 1, dtype=torch.float32)
    return [
        Frame("loss", step, ("",), torch.tensor([2.3 * math.exp(-step / 80) + 0.1 + 0.02 * (step % 3)])),
        Frame("learning_rate", step, tuple(layers), torch.full((count,), 3e-3)),
        Frame("uw_ratio", step, tuple(layers), 1e-3 * place),
        Frame("weight_gradients.norm2", step, tuple(layers), place / (1 + step / 50)),
    ]


def alert(step: int, text: str, rule: str = "loss_spike") -> Frame:
    """An alert's frame, as `health()` makes it."""
    meta = {"rule": rule, "state": "start", "severity": "critical", "text": text}
    return Frame(f"alerts.{rule}", step, ("",), torch.ones(1), meta=meta)


def action(step: int, text: str) -> Frame:
    """A controller's action."""
    return Frame("learning_rate.action", step, ("",), torch.ones(1), meta={"text": text, "cause": "plateau"})


def write_run(
    path: Path,
    steps: int = 60,
    *,
    run: str = "r1",
    name: str = "",
    layers: Sequence[str] = LAYERS,
    extra: Sequence[Frame] = (),
    metadata: Mapping[str, Any] | None = None,
) -> Path:
    """Write a run into a store; returns the store."""
    path.parent.mkdir(parents=True, exist_ok=True)
    told = {"model": "AlexNetMini", "dataset": "digits", **(metadata or {})}
    with RunWriter(path, run, name=name, metadata=told) as writer:
        frames = [frame for step in range(steps) for frame in frames_of(step, layers)] + list(extra)
        if frames:
            writer.write(frames, [time.time()] * len(frames))
    return path


class WritingProcess:
    """Another process that writes a run, as many steps at a time as it is told to."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def ask(self, steps: int) -> None:
        """Have it write so many steps more, fifty a second; does not wait for them."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{steps}\n")
        self._process.stdin.flush()

    def wait(self) -> int:
        """Wait until it has written what it was last asked for; returns how many steps there are now."""
        assert self._process.stdout is not None
        return int(self._process.stdout.readline())

    def is_running(self) -> bool:
        return self._process.poll() is None

    def close(self) -> None:
        """Have it close the run, and end."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        assert self._process.wait(timeout=60) == 0


@contextmanager
def writing(path: Path) -> Iterator[WritingProcess]:
    """Start a process that writes a run into a store."""
    command = [sys.executable, "-m", __name__, str(path)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=_ROOT
    ) as process:
        try:
            yield WritingProcess(process)
        finally:
            process.kill()


def _serve_steps(path: str) -> None:
    step = 0
    with RunWriter(path, "live", metadata={}) as writer:
        for line in sys.stdin:
            for _ in range(int(line)):
                writer.write(frames_of(step), [time.time()] * 4)
                step += 1
                time.sleep(0.02)
            print(step, flush=True)


if __name__ == "__main__":
    _serve_steps(sys.argv[1])
