"""When a number has stopped getting better."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

from streamlens.errors import StreamlensError, did_you_mean
from streamlens.frame import Frame
from streamlens.operators._base import is_number, is_whole

__all__ = ["Plateau", "the_number"]

_MODES: Final = ("min", "max")
_THRESHOLDS: Final = ("rel", "abs")


def the_number(who: str, frame: Frame) -> float:
    """The one number of a frame.

    Raises:
        StreamlensError: It holds more.
    """
    values = [value for _, value in frame.items()]
    if len(values) != 1 or values[0].numel() != 1:
        raise StreamlensError(
            f"{who} takes one number a frame, and {frame.topic!r} has more: reduce it first, for "
            "example with across_layers()"
        )
    return float(values[0])


@dataclass(frozen=True)
class Plateau:
    """The rule of `torch.optim.lr_scheduler.ReduceLROnPlateau`; what it remembers is a plain dictionary.

    Below zero a share of the best is one of its size here; PyTorch's rule takes a slightly worse number for
    a better one there.

    Args:
        who: Whose rule it is, for messages.
        mode: Whether lower is better (`"min"`) or higher (`"max"`).
        patience: How many frames in a row may bring nothing better.
        threshold: By how much better counts as better.
        threshold_mode: Whether that is a share of the best so far (`"rel"`) or a difference (`"abs"`).
        cooldown: Frames after a plateau that are not counted.

    Raises:
        ValueError: One of them is out of its range.
    """

    who: str
    mode: str = "min"
    patience: int = 10
    threshold: float = 1e-4
    threshold_mode: str = "rel"
    cooldown: int = 0

    def __post_init__(self) -> None:
        for name, value, known in (
            ("mode", self.mode, _MODES),
            ("threshold_mode", self.threshold_mode, _THRESHOLDS),
        ):
            if value not in known:
                hint = did_you_mean(str(value), known) or f"it is {' or '.join(map(repr, known))}"
                raise ValueError(f"{self.who}({name}={value!r}): {hint}")
        for name, count in (("patience", self.patience), ("cooldown", self.cooldown)):
            if not is_whole(count) or count < 0:
                raise ValueError(f"{self.who}({name}={count!r}): a whole number of frames from 0 on")
        if not is_number(self.threshold) or not 0 <= self.threshold < math.inf:
            raise ValueError(f"{self.who}(threshold={self.threshold!r}): a finite number from 0 on")

    @staticmethod
    def start() -> dict[str, Any]:
        """What is remembered before the first number."""
        return {"best": None, "bad": 0, "cooldown": 0}

    def take(self, memory: dict[str, Any], number: float) -> int:
        """Look at a number; how many frames brought nothing better if that makes a plateau, else 0.

        Args:
            memory: What `start` gave; changed.
            number: A finite number.
        """
        if self._better(number, memory["best"]):
            memory["best"], memory["bad"] = number, 0
        else:
            memory["bad"] += 1
        if memory["cooldown"]:
            memory["cooldown"] -= 1
            memory["bad"] = 0
        bad: int = memory["bad"]
        if bad <= self.patience:
            return 0
        memory["bad"], memory["cooldown"] = 0, self.cooldown
        return bad

    def _better(self, number: float, best: float | None) -> bool:
        if best is None:
            return True
        sign = 1.0 if self.mode == "max" else -1.0
        if self.threshold_mode == "abs":
            limit = best + sign * self.threshold
        else:
            # Of a negative best the share has to lie on the same side of it.
            limit = best * (1 + math.copysign(self.threshold, best) * sign)
        return number > limit if self.mode == "max" else number < limit
