"""How many frames a second a replay gives.

Run it with `python -m benchmarks.replay`.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import torch

import streamlens as sl
from streamlens.frame import Frame
from streamlens.sink import RunInfo
from streamlens.sinks.run_store import RunStore

__all__ = ["run"]

_FRAMES = 50_000


def run(layers: int = 8, rounds: int = 10) -> float:
    """Frames of a reduced topic that a replay delivers to a callable in a second; best of some rounds."""
    names = tuple(f"blocks.{i}" for i in range(layers))
    values = torch.randn(_FRAMES, layers)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.db"
        store = RunStore(path)
        store.open(RunInfo(id="benchmark"))
        store.write([Frame("weights.norm2", step, names, values[step]) for step in range(_FRAMES)])
        store.close()
        best = 0.0
        with sl.replay(path) as replay:
            for _ in range(rounds):
                replay.pipe(sl.norm("weights")).subscribe(lambda _: None)
                begin = time.process_time()
                replay.play()
                best = max(best, _FRAMES / (time.process_time() - begin))
    return best


if __name__ == "__main__":
    print(f"replayed frames/s: {run():,.0f}  (at least 100,000)")
