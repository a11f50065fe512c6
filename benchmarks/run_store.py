"""How fast `RunStore` writes, how fast it is read, and how large its file gets.

Run it with `python -m benchmarks.run_store`.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import torch

from streamlens.frame import Frame
from streamlens.runs import read_run
from streamlens.sink import RunInfo
from streamlens.sinks.run_store import RunStore

__all__ = ["run"]

_LAYERS = 600
_FRAMES = 10_000
_BATCH = 500
"""Frames a transaction, as from a worker that wakes once a second."""


def run() -> dict[str, float]:
    """Write and read frames of 600 float32 values.

    Returns:
        Values written a second, values read into a table a second, values read into a table of
        at most 1,000 points a layer a second, and megabytes a million values.
    """
    layers = tuple(f"blocks.{i}.weight" for i in range(_LAYERS))
    values = torch.randn(_FRAMES, _LAYERS)
    frames = [Frame("weights.norm2", step, layers, values[step]) for step in range(_FRAMES)]
    count = _FRAMES * _LAYERS
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.db"
        store = RunStore(path)
        store.open(RunInfo(id="benchmark"))
        begin = time.perf_counter()
        for start in range(0, _FRAMES, _BATCH):
            store.write(frames[start : start + _BATCH])
        store.close()
        written = time.perf_counter() - begin
        size = path.stat().st_size
        with read_run(path) as stored:
            stored.dataframe("weights.norm2", steps=(0, 10))  # pandas is imported once
            begin = time.perf_counter()
            stored.dataframe("weights.norm2")
            table = time.perf_counter() - begin
            begin = time.perf_counter()
            stored.dataframe("weights.norm2", max_points=1000)
            thinned = time.perf_counter() - begin
    return {
        "written values/s": count / written,
        "read values/s": count / table,
        "read and thinned values/s": count / thinned,
        "MB a million values": size / count,
    }


if __name__ == "__main__":
    for name, value in run().items():
        print(f"{name:28} {value:>14,.2f}" if value < 100 else f"{name:28} {value:>14,.0f}")
