"""What tests of controllers share: steps with a place before the update, and numbers given by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

import streamlens as sl

__all__ = ["ALL", "deep", "emitting", "one_step", "trainable"]

ALL = ["0.weight", "0.bias", "2.weight", "2.bias"]
"""The parameters of the small model."""


def emitting(model: nn.Module, **options: Any) -> sl.Lens:
    """A lens whose topic `similarity` is given by hand."""
    return sl.observe(model, emits=["similarity"], **{"on_error": "raise", **options})


def one_step(
    model: nn.Module, optimizer: Optimizer, seed: int, before: Callable[[], object] = lambda: None
) -> None:
    """A training step, with something to be done before its update."""
    data = torch.Generator().manual_seed(seed)
    optimizer.zero_grad()
    x, y = torch.randn(6, 4, generator=data), torch.randint(0, 3, (6,), generator=data)
    nn.functional.cross_entropy(model(x), y).backward()
    before()
    optimizer.step()


def trainable(model: nn.Module) -> list[str]:
    """The parameters that a gradient is computed for."""
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def deep() -> nn.Sequential:
    """Four blocks and a head."""
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(4)]
    return nn.Sequential(*layers, nn.Linear(4, 3))
