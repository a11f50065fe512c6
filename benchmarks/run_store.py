"""How fast `RunStore` writes, how fast it is read, how large its file gets, and how long a chart takes.

A chart is one topic of 600 layers over the whole run, at most 1,000 points a series, as
`Run.envelope` gives it: 600,000 rows with minimum, mean and maximum. The roll-ups that it reads are
1,000 rows at 100,000 steps as they are at 1,000,000, where the file takes 3.7 GB.

Run it with `python -m benchmarks.run_store`; `--steps 1000000` measures the chart of the long run.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from streamlens.frame import Frame
from streamlens.runs import read_run
from streamlens.sink import RunInfo
from streamlens.sinks.run_store import RunStore

__all__ = ["chart", "run"]

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


def chart(steps: int = 100_000) -> dict[str, float]:
    """Draw charts of a run of 600 series.

    Args:
        steps: How long the run is.

    Returns:
        CPU milliseconds for a chart of the whole run, of its middle tenth, of the range for which most is
        read, and of one layer; each with a reader of its own, as a page that is opened. Medians of nine.
    """
    layers = tuple(f"blocks.{i}.weight" for i in range(_LAYERS))
    values = torch.randn(_BATCH, _LAYERS)
    middle = (steps * 45 // 100, steps * 55 // 100)
    # Of all stretches this is where most roll-ups have to be read for 1,000 points: just under 3,000.
    worst = (0, steps * 2995 // 10_000 - 1)
    taken: dict[str, list[float]] = {"whole run": [], "middle tenth": [], "worst range": [], "one layer": []}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.db"
        store = RunStore(path)
        store.open(RunInfo(id="benchmark"))
        for start in range(0, steps, _BATCH):
            store.write([Frame("weights.norm2", start + i, layers, values[i]) for i in range(_BATCH)])
        store.close()
        for _ in range(9):
            for name, wanted in (
                ("whole run", {}),
                ("middle tenth", {"steps": middle}),
                ("worst range", {"steps": worst}),
                ("one layer", {"layers": layers[300]}),
            ):
                begin = time.process_time()
                with read_run(path) as stored:
                    stored.envelope("weights.norm2", max_points=1000, **wanted)
                taken[name].append(time.process_time() - begin)
    return {f"chart of the {name}, ms": statistics.median(times) * 1e3 for name, times in taken.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=100_000, help="length of the run that is drawn")
    for name, value in (run() | chart(parser.parse_args().steps)).items():
        print(f"{name:28} {value:>14,.2f}" if value < 100 else f"{name:28} {value:>14,.0f}")
