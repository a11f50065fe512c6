"""Making a run repeatable."""

from __future__ import annotations

import random

import numpy as np
import torch

__all__ = ["seed_everything"]


def seed_everything(seed: int) -> None:
    """Seed the global generators of Python, NumPy and PyTorch (every device).

    Args:
        seed: A number in [0, 2**32), the range that all three accept.

    Raises:
        ValueError: The seed is outside that range.
    """
    if not 0 <= seed < 2**32:
        raise ValueError(f"a seed must lie in [0, 2**32) to suit NumPy as well, got {seed}")
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - the global generator is what other people's code draws from
    torch.manual_seed(seed)
