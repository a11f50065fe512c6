"""Optimizers and learning-rate schedules by name."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Final

import torch
from torch import nn
from torch.optim.lr_scheduler import ConstantLR, ExponentialLR, LRScheduler

from streamlens.lab._registry import lookup

__all__ = ["OPTIMIZERS", "SCHEDULES", "make_optimizer", "make_schedule"]

_UNSUITABLE: Final[Mapping[str, str]] = {
    "LBFGS": "it evaluates the loss several times an update and needs a closure",
    "Muon": "it updates matrices only, and every model here has biases",
    "SparseAdam": "it takes sparse gradients only",
}


def _all_optimizers() -> dict[str, type[torch.optim.Optimizer]]:
    return {
        name: entry
        for name, entry in sorted(vars(torch.optim).items())
        if inspect.isclass(entry)
        and issubclass(entry, torch.optim.Optimizer)
        and entry is not torch.optim.Optimizer
        and name not in _UNSUITABLE
    }


OPTIMIZERS: Final[Mapping[str, type[torch.optim.Optimizer]]] = _all_optimizers()
"""The optimizers of `torch.optim` that suit a plain loop over dense parameters."""

SCHEDULES: Final[tuple[str, ...]] = ("constant", "exponential", "ratio")
"""The learning-rate schedules that `make_schedule` knows by name."""


def make_optimizer(
    name: str, parameters: Iterable[nn.Parameter], learning_rate: float
) -> torch.optim.Optimizer:
    """Build one of `torch.optim`'s optimizers by its name.

    Args:
        name: One of `OPTIMIZERS`, in any case.
        parameters: What to optimise.
        learning_rate: The learning rate, above 0. Everything else is left at PyTorch's default.

    Returns:
        The optimizer.

    Raises:
        ValueError: There is no such optimizer, it does not suit a plain loop, or the rate is not a
            finite number above 0.
    """
    for unsuitable, why in _UNSUITABLE.items():
        if name.lower() == unsuitable.lower():
            raise ValueError(f"{unsuitable} does not suit this trainer: {why}")
    registered, build = lookup("optimizer", name, OPTIMIZERS)
    if not 0 < learning_rate < float("inf"):
        raise ValueError(f"{registered}: the learning rate must be finite and above 0, got {learning_rate}")
    return build(parameters, lr=learning_rate)  # type: ignore[call-arg]


def make_schedule(name: str, optimizer: torch.optim.Optimizer, *, decay: float = 0.95) -> LRScheduler:
    """Build a schedule, to be stepped once an epoch.

    Args:
        name: `"constant"`; `"exponential"`: the rate of epoch e is `decay**e` times the first; or
            `"ratio"`: the schedule leaves the rate to a controller (`streamlens.control.RatioLR`).
        optimizer: Whose rate it sets.
        decay: The factor an epoch, in (0, 1].

    Returns:
        The schedule.

    Raises:
        ValueError: There is no such schedule, or the decay is out of its range.
    """
    registered, _ = lookup("schedule", name, dict.fromkeys(SCHEDULES))
    if not 0 < decay <= 1:
        raise ValueError(f"a schedule's decay must lie in (0, 1], got {decay}")
    if registered == "exponential":
        return ExponentialLR(optimizer, gamma=decay)
    return ConstantLR(optimizer, factor=1.0)
