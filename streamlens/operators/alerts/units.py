"""`dead_units` and `saturated_units`: units that no longer respond to their input."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from streamlens.operators.alerts._inputs import DEAD_SHARES, SATURATED_SHARES, Input
from streamlens.operators.alerts._rule import Judge, Look, Rule, Verdict, number

__all__ = ["dead_units", "saturated_units"]


class _Above(Judge):
    """Bad above a threshold; nothing is remembered."""

    def __init__(self, threshold: float) -> None:
        self._threshold = threshold

    def look(self, look: Look) -> Iterable[Verdict]:
        bad = look.values > self._threshold
        return [Verdict(look.layers, look.values, bad, self._threshold)]


@dataclass(frozen=True)
class _DeadUnits(Rule):
    share: float = 0.8
    every: int = 10
    start: tuple[int, int] = (3, 3)
    end: int = 3

    name: ClassVar[str] = "dead_units"

    def check(self) -> None:
        self.check_share(share=self.share)

    def inputs(self) -> tuple[Input, ...]:
        return (DEAD_SHARES,)

    def judge(self) -> Judge:
        return _Above(self.share)

    def meaning(self, verdict: Verdict, index: Sequence[int]) -> str:
        return (
            f"Units of {self.named(verdict, index)} are zero for every example: a share above "
            f"{number(self.share)} of them, and no gradient brings them back"
        )

    @property
    def advice(self) -> str:
        return (
            "Try a lower learning rate or a warm-up, smaller or positive biases, normalisation in front, or "
            "an activation with a slope below zero (LeakyReLU, GELU)"
        )


def dead_units(*, share: float = 0.8, every: int = 10, start: tuple[int, int] = (3, 3), end: int = 3) -> Rule:
    """Alert where many units of a ReLU are zero for every example of the batch.

    Value: the share of a layer's units that are zero throughout the batch, in [0, 1],
    `activations.dead_fraction`; bad above `share`. A unit is a channel of a convolution, else an entry
    of the last dimension. On a Lens the layers are the modules that cut at zero (`nn.ReLU`, `nn.ReLU6`,
    `nn.Threshold`); `F.relu` called inside a module is not seen. In the
    last layers of a deep network, whose units hardly differ between examples at first, half of them are
    zero (`docs/alerts.md`), which is why the default is well above that, in three looks.

    The topic is `alerts.dead_units`. Cost: one pass over these outputs. NaN counts as alive. Source: Lu
    et al. 2019, Dying ReLU and Initialization.

    Args:
        share: Which share of a layer's units may be zero.
        every: Looks at steps divisible by this.
        start: `(n, m)`: an alert starts once n of the last m looks were bad.
        end: It ends after as many good looks in a row.

    Returns:
        The rule, an operator for a Lens or for a stream with `activations.dead_fraction`.

    Raises:
        ValueError: A parameter out of range.
    """
    return _DeadUnits(share=share, every=every, start=start, end=end)


@dataclass(frozen=True)
class _SaturatedUnits(Rule):
    share: float = 0.7
    every: int = 10
    start: tuple[int, int] = (3, 3)
    end: int = 3

    name: ClassVar[str] = "saturated_units"

    def check(self) -> None:
        self.check_share(share=self.share)

    def inputs(self) -> tuple[Input, ...]:
        return (SATURATED_SHARES,)

    def judge(self) -> Judge:
        return _Above(self.share)

    def meaning(self, verdict: Verdict, index: Sequence[int]) -> str:
        return (
            f"Outputs of {self.named(verdict, index)} lie at the ends of their range: a share above "
            f"{number(self.share)} of them, through which hardly any gradient passes"
        )

    @property
    def advice(self) -> str:
        return (
            "Try smaller initial weights, normalised inputs, normalisation in front, or a lower learning rate"
        )


def saturated_units(
    *, share: float = 0.7, every: int = 10, start: tuple[int, int] = (3, 3), end: int = 3
) -> Rule:
    """Alert where most outputs of a bounded activation lie at its bounds.

    Value: the share of a layer's outputs within 1% of the range from one of its ends, in [0, 1],
    `activations.unit_saturation`; bad above `share`. On a Lens the layers are the modules with
    bounded outputs (`nn.Sigmoid`, `nn.Tanh`, `nn.Hardsigmoid`, `nn.Hardtanh`), but for the model's last
    layer, whose outputs are meant to be near their bounds. By default initialisation the share is
    near 0, and in ordinary runs below a half (`docs/alerts.md`).

    The topic is `alerts.saturated_units`. Cost: one pass over these outputs. NaN counts as not
    saturated. Source: Glorot and Bengio 2010.

    Args:
        share: Which share of a layer's outputs may lie at the bounds.
        every: Looks at steps divisible by this.
        start: `(n, m)`: an alert starts once n of the last m looks were bad.
        end: It ends after as many good looks in a row.

    Returns:
        The rule, an operator for a Lens or for a stream with `activations.unit_saturation`.

    Raises:
        ValueError: A parameter out of range.
    """
    return _SaturatedUnits(share=share, every=every, start=start, end=end)
