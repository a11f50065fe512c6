"""Several processes of `torch.distributed` on this machine, each of which leaves what it found in a file."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["launch", "run_scenario"]

_ROOT = Path(__file__).parents[2]


def launch(module: str, scenario: str, folder: Path, ranks: int = 2, **env: str) -> list[dict[str, Any]]:
    """Run `module` with torchrun on gloo, and return what each rank saved, by rank.

    The module is run with the arguments `scenario` and `folder`, and saves `<folder>/<rank>.pt`.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    done = subprocess.run(
        [*command, "-m", module, scenario, str(folder)],
        cwd=_ROOT,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(_ROOT),
            "TORCH_CPP_LOG_LEVEL": "ERROR",
            **env,
        },
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(ranks)]


def run_scenario(scenarios: Mapping[str, Sequence[Callable[[], object]]]) -> None:
    """What a launched module does: the functions of the scenario named on its command line."""
    scenario, folder = sys.argv[1:]
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    found = {work.__name__: work() for work in scenarios[scenario]}
    torch.save(found, Path(folder) / f"{dist.get_rank()}.pt")
    dist.destroy_process_group()
