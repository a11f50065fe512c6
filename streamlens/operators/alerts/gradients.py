"""`vanishing_gradients` and `exploding_gradients`: the size of gradients, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import numpy as np

from streamlens.operators.alerts._inputs import GRADIENT_NORMS, WEIGHT_NORMS, Input
from streamlens.operators.alerts._layers import LayerTable
from streamlens.operators.alerts._rule import Judge, Look, Rule, Severity, Verdict, number

__all__ = ["exploding_gradients", "vanishing_gradients"]

_HALF_LIFE: Final = 50
"""Looks after which the weight of a gradient in a layer's history has halved."""
_BEGINNING: Final = 20
"""Looks that make up a layer's beginning."""
_LEAST: Final = 10
"""Looks that a layer's history must have where the norm of the weights has its say as well."""


class _Vanishing(Judge):
    def __init__(self, below: float) -> None:
        self._below = below

    def look(self, look: Look) -> Iterable[Verdict]:
        finite = np.isfinite(look.values)
        largest = look.values[finite].max(initial=0.0)
        if largest == 0.0:
            return []
        shares = np.where(finite, look.values / largest, math.nan)
        return [Verdict(look.layers, shares, shares < self._below, self._below)]


@dataclass(frozen=True)
class _VanishingGradients(Rule):
    below: float = 1e-4
    every: int = 10
    start: tuple[int, int] = (3, 3)
    end: int = 3

    name: ClassVar[str] = "vanishing_gradients"

    def check(self) -> None:
        self.check_share(below=self.below)

    def inputs(self) -> tuple[Input, ...]:
        return (GRADIENT_NORMS,)

    def judge(self) -> Judge:
        return _Vanishing(self.below)

    def meaning(self, verdict: Verdict, index: Sequence[int]) -> str:
        return (
            f"The gradient hardly reaches {self.named(verdict, index)}: shares of the largest layer's norm, "
            f"below {number(self.below)}, so that these weights hardly learn"
        )

    @property
    def advice(self) -> str:
        return (
            "Try activations that do not saturate (ReLU, GELU), normalisation, residual connections, or an "
            "initialisation made for the activation"
        )


def vanishing_gradients(
    *, below: float = 1e-4, every: int = 10, start: tuple[int, int] = (3, 3), end: int = 3
) -> Rule:
    """Alert where the gradient of a layer's weights is a vanishing share of the largest layer's.

    Value: |g_l|_2 / max over layers of |g|_2, in [0, 1], of `weight_gradients.norm2`; bad below
    `below`. Relative to the largest layer, so that the end of training, where all gradients shrink
    together, is silent. The default follows from a sigmoid network: by default initialisation each
    layer multiplies the gradient by about 0.14, so that four of them are still fine and six are not; in
    ordinary networks the smallest share lies near 1e-2 (`docs/alerts.md`). A layer whose gradient is
    exactly zero has vanished too.

    The topic is `alerts.vanishing_gradients`. Cost: the norm of each gradient, shared with whoever
    asks for it too. NaN is left out. Source: Hochreiter 1991; Glorot and Bengio 2010.

    Args:
        below: The share of the largest layer's norm.
        every: Looks at steps divisible by this.
        start: `(n, m)`: an alert starts once n of the last m looks were bad.
        end: It ends after as many good looks in a row.

    Returns:
        The rule, an operator for a Lens or for a stream with `weight_gradients.norm2`.

    Raises:
        ValueError: A parameter out of range.
    """
    return _VanishingGradients(below=below, every=every, start=start, end=end)


class _Exploding(Judge):
    """The history of each layer's gradient: its geometric mean, recent and of the beginning."""

    def __init__(self, factor: float, floor: float, above: float) -> None:
        self._factor = factor
        self._floor = floor
        self._above = above
        self._table = LayerTable({"looks": 0.0, "recent": 0.0, "beginning": 0.0})
        self._weights = math.nan

    def look(self, look: Look) -> Iterable[Verdict]:
        if look.topic == WEIGHT_NORMS.name:
            self._weights = math.sqrt(float(np.square(look.values).sum()))
            return
        yield self._against_history(look)
        if self._weights > 0:
            sizes = look.values / self._weights
            yield Verdict(look.layers, sizes, sizes > self._above, self._above, group="size")

    def _against_history(self, look: Look) -> Verdict:
        rows = self._table.rows(look.layers)
        looks, recent, beginning = (self._table[c] for c in ("looks", "recent", "beginning"))
        usable = np.isfinite(look.values) & (look.values > 0)
        logs = np.log(np.where(usable, look.values, 1.0))
        usual = np.maximum(recent[rows], beginning[rows])
        # What is above the norm of all weights is no plateau that ends: half the history will do. `health`,
        # which looks seldom, would else see nothing for the first hundred steps.
        ready = looks[rows] >= (_LEAST if self._weights > 0 else _BEGINNING)
        excess = np.exp(np.minimum(logs - usual, 700.0))
        values = np.where(np.isnan(look.values), math.nan, np.where(ready & usable, excess, 0.0))
        values = np.where(np.isposinf(look.values), math.inf, values)
        # An outlier moves the history as far as one at the threshold would.
        capped = np.where(ready, np.minimum(logs, usual + math.log(self._factor)), logs)
        seen = rows[usable]
        n = looks[seen] + 1
        rate = np.maximum(1 / n, 1 - 0.5 ** (1 / _HALF_LIFE))
        recent[seen] += rate * (capped[usable] - recent[seen])
        early = n <= _BEGINNING
        beginning[seen[early]] = recent[seen[early]]
        looks[seen] = n
        bad = values > self._factor
        if self._weights > 0:
            bad &= look.values > self._floor * self._weights
        return Verdict(look.layers, values, bad, self._factor, group="history")

    def state_dict(self) -> dict[str, Any]:
        return {"table": self._table.state_dict(), "weights": self._weights}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._table.load_state_dict(state["table"])
        self._weights = state["weights"]


@dataclass(frozen=True)
class _ExplodingGradients(Rule):
    factor: float = 30.0
    floor: float = 1.0
    above: float = 100.0
    every: int = 1
    start: tuple[int, int] = (1, 1)
    end: int = 10

    name: ClassVar[str] = "exploding_gradients"
    severity: ClassVar[Severity] = "critical"

    def check(self) -> None:
        self.check_positive(factor=self.factor, floor=self.floor, above=self.above)

    def inputs(self) -> tuple[Input, ...]:
        return (_WEIGHTS, GRADIENT_NORMS)

    def cadence(self, entry: Input, every: int) -> int:
        # Weights change slowly: their norm of some steps ago will do.
        return 10 * every if entry is _WEIGHTS else every

    def judge(self) -> Judge:
        return _Exploding(self.factor, self.floor, self.above)

    def meaning(self, verdict: Verdict, index: Sequence[int]) -> str:
        against = "the norm of all weights" if verdict.group == "size" else "their usual size"
        return (
            f"Gradients are more than {number(float(np.max(verdict.threshold)))} times {against}: "
            f"{self.named(verdict, index)}; updates may throw the weights far off"
        )

    @property
    def advice(self) -> str:
        return (
            "Try clipping gradients (torch.nn.utils.clip_grad_norm_), a lower learning rate or a warm-up, "
            "and look at the batch of this step"
        )


_WEIGHTS: Final = Input("weights.norm2", WEIGHT_NORMS.build, needed=False)


def exploding_gradients(
    *,
    factor: float = 30.0,
    floor: float = 1.0,
    above: float = 100.0,
    every: int = 1,
    start: tuple[int, int] = (1, 1),
    end: int = 10,
) -> Rule:
    """Alert where the gradient of a layer's weights is far above its usual size, or huge from the start.

    Two values are judged, both of `weight_gradients.norm2`. Against its history: |g_l|_2 over the
    geometric mean of the layer's own (half-life 50 looks), or of its first 20 looks where that is
    larger, so that a hard example late in training, when gradients have become small, is silent; bad above
    `factor` if it is also above `floor` times the norm of all weights (`weights.norm2`, where there is
    one): leaving a plateau multiplies gradients too. For that there must have been 10 looks, and 20 where
    there is no such norm. And in size: |g_l|_2 over the norm of all weights; bad above `above`. Ordinary
    gradients stay below that norm, most below a tenth of it (`docs/alerts.md`).

    The topic is `alerts.exploding_gradients`. Cost: the norm of each gradient at each look, and those of
    the weights every tenth. NaN is left out (see `nonfinite_values`); inf is bad. Source: Pascanu,
    Mikolov and Bengio 2013.

    Args:
        factor: How many times its usual size a gradient may be.
        floor: Up to how many times the norm of all weights it may be whatever its usual size.
        above: How many times the norm of all weights it may be.
        every: Looks at steps divisible by this.
        start: `(n, m)`: an alert starts once n of the last m looks were bad.
        end: It ends after as many good looks in a row.

    Returns:
        The rule, an operator for a Lens or for a stream with `weight_gradients.norm2`.

    Raises:
        ValueError: A parameter out of range.
    """
    return _ExplodingGradients(factor=factor, floor=floor, above=above, every=every, start=start, end=end)
