"""The networks that overhead is measured on, beside those of the lab."""

from __future__ import annotations

from torch import nn

__all__ = ["mlp"]


def mlp() -> nn.Sequential:
    """784-1024-1024-10: much parameter for little arithmetic, the worst case for parameter metrics."""
    return nn.Sequential(
        nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10)
    )
