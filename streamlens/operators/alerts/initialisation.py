"""`poor_initialisation`: whether signals and gradients keep their size through the layers at step 0."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from streamlens.operators.alerts._inputs import FIRST_ACTIVATION_STDS, FIRST_BACKWARD_NORMS, Input
from streamlens.operators.alerts._rule import Judge, Look, Rule, Verdict, number

__all__ = ["poor_initialisation"]


class _Initialisation(Judge):
    def __init__(self, forward: tuple[float, float], backward: tuple[float, float]) -> None:
        self._forward, self._backward = forward, backward

    def look(self, look: Look) -> Iterable[Verdict]:
        if look.step != 0:
            return
        forward = look.topic == FIRST_ACTIVATION_STDS.name
        band = self._forward if forward else self._backward
        positive = np.flatnonzero(np.isfinite(look.values) & (look.values > 0))
        if 2 * len(positive) < len(look.layers):
            # Most are zero: nothing is left to compare with.
            shares = np.where(look.values == 0, 0.0, math.nan)
        else:
            # Single zeros are meant: branches and heads that begin at zero.
            reference = look.values[positive[0 if forward else -1]]
            shares = np.where(look.values > 0, look.values / reference, math.nan)
        bad = (shares < band[0]) | (shares > band[1])
        yield Verdict(
            look.layers,
            shares,
            bad,
            band,
            group="forward" if forward else "backward",
            meta={"phase": "forward" if forward else "backward"},
        )


@dataclass(frozen=True)
class _PoorInitialisation(Rule):
    forward: tuple[float, float] = (1e-2, 1e2)
    backward: tuple[float, float] = (1e-5, 1e5)
    every: int = 1
    start: tuple[int, int] = (1, 1)
    end: int = 1

    name: ClassVar[str] = "poor_initialisation"
    any_input: ClassVar[bool] = True

    def check(self) -> None:
        self.check_band(forward=self.forward, backward=self.backward)

    def inputs(self) -> tuple[Input, ...]:
        return (FIRST_ACTIVATION_STDS, FIRST_BACKWARD_NORMS)

    def judge(self) -> Judge:
        return _Initialisation(self.forward, self.backward)

    def meaning(self, verdict: Verdict, index: Sequence[int]) -> str:
        lower, upper = (number(bound) for bound in np.ravel(verdict.threshold).tolist())
        what = (
            "Outputs fade or blow up through the layers: relative to the first, the standard deviation of"
            if verdict.group == "forward"
            else "Gradients fade or blow up on their way back: relative to the last, the norm at"
        )
        return f"{what} {self.named(verdict, index)} is outside {lower} to {upper} before anything was learnt"

    @property
    def advice(self) -> str:
        return (
            "Initialise for the activation (torch.nn.init.kaiming_normal_ for ReLU, xavier_normal_ for "
            "tanh), or normalise between layers"
        )


def poor_initialisation(
    *, forward: tuple[float, float] = (1e-2, 1e2), backward: tuple[float, float] = (1e-5, 1e5)
) -> Rule:
    """Alert at step 0 where the initial weights let signals or gradients fade or blow up.

    Forward, the value is the standard deviation of a layer's outputs over that of the first layer's
    (`activations.std`); backward, the norm of the loss's gradient with respect to them over that of the
    last layer's (`layer_gradients.norm2`; a norm, since pooling spreads one gradient over many
    outputs). Bad outside the band. PyTorch's default initialisation shrinks both by about 0.4 a linear layer
    with ReLU, and biases keep the outputs' from falling further: ten layers stay inside. A single layer
    whose outputs are exactly zero is meant to be so and is silent; where most are, all of them are told.

    The topic is `alerts.poor_initialisation`, and `meta["phase"]` says which way. It looks once: its
    alert does not end. Cost: two passes over the outputs and one over their gradients, at step 0 alone.
    NaN is left out. Source: Glorot and Bengio 2010; He et al. 2015.

    Args:
        forward: The band of the outputs' standard deviations relative to the first layer's.
        backward: The band of the gradients' norms relative to the last layer's.

    Returns:
        The rule, an operator for a Lens or for a stream with either topic.

    Raises:
        ValueError: A band that is none.
    """
    return _PoorInitialisation(forward=forward, backward=backward)
