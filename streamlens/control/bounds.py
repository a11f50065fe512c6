"""`Bounds`: how far a controller may go, and how fast."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from streamlens.operators._base import is_number

__all__ = ["Bounds"]


@dataclass(frozen=True)
class Bounds:
    """Limits of a positive number that is steered.

    Args:
        low: The least value.
        high: The greatest value.
        slew: The greatest factor by which one action may raise or lower it; no limit if None.

    Raises:
        TypeError: One of them is no number.
        ValueError: `low` is not below `high`, or `slew` is not above 1.
    """

    low: float = 0.0
    high: float = math.inf
    slew: float | None = None

    def __post_init__(self) -> None:
        numbers = (self.low, self.high, 1.0 if self.slew is None else self.slew)
        if not all(map(is_number, numbers)):
            raise TypeError(
                f"bounds: the least value, the greatest and the slew limit are numbers, got {self.low!r}, "
                f"{self.high!r}, {self.slew!r}"
            )
        if not self.low < self.high:
            raise ValueError(
                f"bounds: the least value must lie below the greatest, got {self.low}, {self.high}"
            )
        if self.slew is not None and not 1 < self.slew < math.inf:
            raise ValueError(f"bounds: the slew limit is a factor above 1 an action, got {self.slew!r}")

    def limit(self, old: float, wanted: float) -> float:
        """The value nearest to the one wanted that may be set.

        The result lies in [low, high]. It lies in [old / slew, old * slew] too, unless `old` is out
        of bounds itself, which are then kept first. What is no finite number changes nothing.

        Args:
            old: The value now.
            wanted: The value wanted.
        """
        if not math.isfinite(wanted) or not math.isfinite(old):
            return old
        if self.slew is not None:
            wanted = min(max(wanted, old / self.slew), old * self.slew)
        return min(max(wanted, self.low), self.high)

    def limit_each(self, old: Tensor, wanted: Tensor) -> Tensor:
        """What `limit` gives, for each element of tensors, where they are: nothing waits for a device.

        Args:
            old: The values now.
            wanted: The values wanted.
        """
        limited = wanted
        if self.slew is not None:
            limited = torch.minimum(torch.maximum(limited, old / self.slew), old * self.slew)
        limited = limited.clamp(self.low, self.high)
        return torch.where(wanted.isfinite() & old.isfinite(), limited, old)
