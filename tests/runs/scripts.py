"""Scripts that tests run in processes of their own, in order to kill them or to deny them a disk.

`python -m tests.runs.scripts NAME FOLDER` prints what it saw as one line of JSON.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

from streamlens.errors import RunStoreError
from streamlens.frame import Frame
from streamlens.runs import RunWriter, list_runs, read_run


def batch(number: int) -> list[Frame]:
    """Frames of ten steps, with values that tell their step."""
    layers = ("a", "b")
    return [
        Frame(topic, step, layers, torch.tensor([step, step + 0.5]))
        for step in range(10 * number, 10 * number + 10)
        for topic in ("loss", "norm")
    ]


def steps(path: Path, run: str) -> list[int]:
    """The steps of a run, if its frames are whole and in order."""
    with read_run(path, run) as stored:
        found = [(frame.topic, frame.step, frame.to_dict()) for frame in stored.frames()]
    expected = [
        (topic, step, {"a": step, "b": step + 0.5})
        for step in range(len(found) // 2)
        for topic in ("loss", "norm")
    ]
    if found != expected:
        raise AssertionError(f"{found} is not {expected}")
    return list(range(len(found) // 2))


def killed(folder: Path) -> dict[str, Any]:
    """Kill writers of one file at random moments, reading beside them until then."""
    path = folder / "run.db"
    rng = random.Random()
    kills: list[dict[str, Any]] = []
    for kill in range(6):
        receive, send = os.pipe()
        child = os.fork()
        if child == 0:
            with RunWriter(path, f"run{kill}") as writer:
                number = 0
                while True:
                    writer.write(batch(number))
                    os.write(send, b".")
                    number += 1
        os.close(send)
        committed = len(os.read(receive, 1))  # it has begun
        seen: list[int] = []
        until = time.monotonic() + rng.uniform(0.0, 0.15)
        # One reader stays until it has seen the run grow, however slow the machine.
        while time.monotonic() < until or (kill == 0 and len(set(seen)) < 3):
            seen.append(len(steps(path, f"run{kill}")))
        try:
            RunWriter(path, "intruder")
            refusal = ""
        except RunStoreError as error:
            refusal = str(error)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        while said := os.read(receive, 65536):
            committed += len(said)
        os.close(receive)
        kills.append(
            {
                "committed": 10 * committed,
                "found": len(steps(path, f"run{kill}")),
                "seen": seen,
                "refused": f"process {child} on" in refusal,
            }
        )
    return {"kills": kills, "runs": [run.id for run in list_runs(path)]}


def full(folder: Path) -> dict[str, Any]:
    """Write into a small disk until it is full, make room, and go on. `folder` is that disk."""
    path = folder / "run.db"
    ballast = folder / "ballast"
    errors: list[str] = []
    with RunWriter(path, "a") as writer:
        ballast.write_bytes(bytes(2**20))
        number = 0
        while len(errors) < 3:
            try:
                writer.write(batch(number))
                number += 1
            except RunStoreError as error:
                errors.append(str(error))
        while_full = len(steps(path, "a"))
        ballast.unlink()
        writer.write(batch(number))
        after = len(steps(path, "a"))
    return {"errors": errors, "written": 10 * number, "while full": while_full, "after": after}


def read_only(folder: Path) -> dict[str, Any]:
    """Read stores in `folder`, which cannot be written: closed ones and one with a log left over."""
    before = sorted(file.name for file in folder.iterdir())
    seen: dict[str, Any] = {name: len(steps(folder / name, "a")) for name in ("closed.db", "killed.db")}
    for name in ("closed.db", "new.db"):
        try:
            RunWriter(folder / name, "b").close()
        except RunStoreError as error:
            seen[f"refusal of {name}"] = str(error)
    seen["unchanged"] = before == sorted(file.name for file in folder.iterdir())
    return seen


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(
        json.dumps({"killed": killed, "full": full, "read_only": read_only}[sys.argv[1]](Path(sys.argv[2])))
    )
