"""`Scale`: on which data an experiment runs, and how much of it; and the command line that says so."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

import torch

from streamlens.lab._registry import lookup
from streamlens.lab.data import DATASETS

__all__ = ["Scale", "parse"]

T = TypeVar("T")

SMOKE_SEEDS: Final = 2
"""Intervals take two runs at least."""


@dataclass(frozen=True)
class Scale:
    """On which data, how much, and where.

    Attributes:
        dataset: One of `DATASETS`, by its registered name.
        data_dir: Where its files are; see `load_dataset`.
        smoke: Whether this is only to see that it works.
        seeds: Runs of each condition, with the seeds from 0 on.
        jobs: Runs at a time.
        device: Where to train.
        out: The folder of all experiments.
        fresh: Whether runs that are there are run again.
    """

    dataset: str = "digits"
    data_dir: Path | None = None
    smoke: bool = False
    seeds: int = 5
    jobs: int = 1
    device: str = "cpu"
    out: Path = Path("runs/experiments")
    fresh: bool = False

    def pick(self, *, smoke: T, digits: T, full: T) -> T:
        """What suits the scale: a smoke test, the 8x8 digits, or a data set of full size."""
        if self.smoke:
            return smoke
        return digits if self.dataset == "digits" else full


def parse(name: str, description: str, argv: Sequence[str] | None = None) -> Scale:
    """Read the command line of an experiment.

    Args:
        name: Of the experiment.
        description: What its help says.
        argv: The arguments; those of the process unless given.

    Raises:
        SystemExit: It cannot be read; what is wrong has been printed.
    """
    parser = argparse.ArgumentParser(prog=name, description=description)
    parser.add_argument(
        "--dataset", default="digits", help=f"one of {', '.join(DATASETS)}; digits comes along"
    )
    parser.add_argument("--data-dir", type=Path, help="folder with the published files of the data set")
    parser.add_argument("--smoke", action="store_true", help="tiny runs, to see that everything works")
    parser.add_argument("--seeds", type=int, help="runs of each condition (default: 5)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (default: 2)")
    parser.add_argument("--device", default="cpu", help="where to train, such as cuda (default: cpu)")
    parser.add_argument("--out", type=Path, default=Path("runs/experiments"), help="default: %(default)s")
    parser.add_argument("--fresh", action="store_true", help="run again what is there already")
    given = parser.parse_args(argv)
    seeds = given.seeds if given.seeds is not None else (SMOKE_SEEDS if given.smoke else Scale.seeds)
    try:
        dataset, _ = lookup("data set", given.dataset, DATASETS)
        torch.device(given.device)
    except (ValueError, RuntimeError) as error:
        parser.error(str(error))
    if seeds < SMOKE_SEEDS or given.jobs < 1:
        parser.error(f"intervals take at least {SMOKE_SEEDS} seeds, and a run at least 1 job")
    # The smoke test has a place of its own: its findings shall not be taken for the real ones.
    out = given.out / "smoke" if given.smoke else given.out
    return Scale(dataset, given.data_dir, given.smoke, seeds, given.jobs, given.device, out, given.fresh)
