"""What live charts cost the training process, beyond the same metrics in a `Table`.

`python -m benchmarks.live` runs in a real kernel, so that sending rows to a front end counts.
"""

from __future__ import annotations

import importlib
import json
import sys
from typing import Any

import torch
from torch import nn

import streamlens as sl
from benchmarks.models import mlp
from benchmarks.timing import Timing, interleave

__all__ = ["main", "measure"]

_STEPS = 80
"""Steps a turn, about a second: rows are sent five times in it."""


class _Run:
    """A network that trains on one batch, its loss and ratios written to a table or shown live."""

    def __init__(self, kind: str) -> None:
        torch.manual_seed(0)
        self.model = mlp()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9)
        self.loss = nn.CrossEntropyLoss()
        self.batch = torch.randn(128, 784), torch.randint(0, 10, (128,))
        self.sink: sl.sinks.Table | sl.sinks.LiveChart | None = None
        if kind == "bare":
            return
        self.lens = sl.observe(self.model, loss=self.loss)
        if kind == "live":
            self.sink = sl.live(self.lens, views=["loss", "uw_ratio"], hz=5).chart
            return
        self.sink = sl.sinks.Table(limit=1000)
        self.lens.pipe(sl.topic("loss"), sl.per_step()).subscribe(self.sink)
        self.lens.pipe(sl.uw_ratio()).subscribe(self.sink)

    def turn(self) -> None:
        """Some steps, and all that follows from them."""
        x, y = self.batch
        for _ in range(_STEPS):
            self.optimizer.zero_grad()
            self.loss(self.model(x), y).backward()
            self.optimizer.step()
        if self.sink is not None:
            self.sink.drain()


def measure(rounds: int = 15) -> dict[str, Timing]:
    """Bare, into a table and live, within a notebook's kernel.

    Args:
        rounds: How often each takes its turn.
    """
    torch.set_num_threads(1)
    runs = {kind: _Run(kind) for kind in ("bare", "table", "live")}
    return interleave(
        {kind: run.turn for kind, run in runs.items()}, baseline="bare", rounds=rounds, warm_up=2
    )


def main() -> None:
    """Run the measurement in a kernel of its own, and say what came of it."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 15
    cell = (
        f"import json\nfrom benchmarks.live import measure\n"
        f"print(json.dumps({{name: [t.seconds, t.over] for name, t in measure({rounds}).items()}}))"
    )
    nbformat: Any = importlib.import_module("nbformat")
    nbclient: Any = importlib.import_module("nbclient")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell)])
    nbclient.NotebookClient(notebook, timeout=600).execute()
    said = "".join(out["text"] for out in notebook.cells[0].outputs if out.get("name") == "stdout")
    found = json.loads(said.splitlines()[-1])
    print(f"MLP 784-1024-1024-10, batch 128, SGD: step {found['bare'][0] / _STEPS * 1e3:.1f} ms")
    for kind in ("table", "live"):
        print(f"  loss and uw_ratio, {kind}: +{found[kind][1]:.1%}")
    print(f"  live over table: {(found['live'][1] - found['table'][1]) * 100:+.1f} points  (at most 2)")


if __name__ == "__main__":
    main()
