"""`ratio_out_of_band`, `unchanged_weights` and the learning rate's rules: what updates do to weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import numpy as np

from streamlens.operators.alerts._inputs import (
    GRADIENT_NORMS,
    LEARNING_RATE,
    UPDATE_NORMS,
    UPDATE_RATIO,
    Input,
)
from streamlens.operators.alerts._layers import Array, LayerTable
from streamlens.operators.alerts._rule import Judge, Look, Rule, Verdict, number

__all__ = ["ratio_out_of_band", "unchanged_weights"]

_HALF_LIFE: Final = 20
"""Looks after which the weight of a ratio in a layer's history has halved."""
_WARM_UP: Final = 10
"""Looks before a layer's history counts."""


class _Ratio(Judge):
    """The history of each layer's ratio per learning rate: mean and spread of its decimal logarithm."""

    def __init__(self, band: tuple[float, float], decades: float) -> None:
        self._band, self._decades = band, decades
        self._table = LayerTable({"looks": 0.0, "mean": 0.0, "variance": 0.0})
        self._rates = LayerTable({"rate": math.nan})

    def look(self, look: Look) -> Iterable[Verdict]:
        if look.topic == LEARNING_RATE.name:
            self._rates["rate"][self._rates.rows(look.layers)] = look.values
            return
        lower, upper = self._band
        ratios = look.values
        yield Verdict(look.layers, ratios, (ratios < lower) | (ratios > upper), self._band, group="band")
        yield self._against_history(look.layers, ratios)

    def _against_history(self, layers: tuple[str, ...], ratios: Array) -> Verdict:
        # Rows first: asking for them may put a longer column in place.
        rate_rows = self._rates.rows(layers)
        rates = self._rates["rate"][rate_rows]
        scaled = ratios / np.where(rates > 0, rates, 1.0)
        usable = np.isfinite(scaled) & (scaled > 0) & ~(rates == 0)
        logs = np.log10(np.where(usable, scaled, 1.0))
        rows = self._table.rows(layers)
        looks, mean, variance = (self._table[c] for c in ("looks", "mean", "variance"))
        width = np.maximum(self._decades, 6 * np.sqrt(variance[rows]))
        off = np.where(usable & (looks[rows] >= _WARM_UP), logs - mean[rows], 0.0)
        seen, value = rows[usable], logs[usable]
        n = looks[seen] + 1
        rate = np.maximum(1 / n, 1 - 0.5 ** (1 / _HALF_LIFE))
        step = value - mean[seen]
        mean[seen] += rate * step
        variance[seen] = (1 - rate) * (variance[seen] + rate * step**2)
        looks[seen] = n
        values = np.where(usable, 10.0**off, math.nan)
        band = (10.0**-self._decades, 10.0**self._decades)
        return Verdict(layers, values, np.abs(off) > width, band, group="history")

    def state_dict(self) -> dict[str, Any]:
        return {"table": self._table.state_dict(), "rates": self._rates.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._table.load_state_dict(state["table"])
        self._rates.load_state_dict(state["rates"])


@dataclass(frozen=True)
class _RatioOutOfBand(Rule):
    band: tuple[float, float] = (1e-8, 0.3)
    decades: float = 1.5
    every: int = 10
    start: tuple[int, int] = (3, 3)
    end: int = 3

    name: ClassVar[str] = "ratio_out_of_band"

    def check(self) -> None:
        self.check_band(band=self.band)
        self.check_positive(decades=self.decades)

    def inputs(self) -> tuple[Input, ...]:
        return (UPDATE_RATIO, LEARNING_RATE)

    def judge(self) -> Judge:
        return _Ratio(self.band, self.decades)

    def meaning(self, verdict: Verdict, index: Sequence[int]) -> str:
        lower, upper = (number(bound) for bound in np.ravel(verdict.threshold).tolist())
        if verdict.group == "band":
            return (
                f"The update-to-weight ratio of {self.named(verdict, index)} is outside {lower} to {upper}; "
                "about 0.001 is usual"
            )
        return (
            f"The update-to-weight ratio of {self.named(verdict, index)} times what it has been lately is "
            f"outside {lower} to {upper}, learning rates taken into account"
        )

    @property
    def advice(self) -> str:
        return (
            "Give these layers a learning rate of their own (a parameter group), or look for what changed: "
            "gradients, weight decay, or a part that no longer takes part"
        )


def ratio_out_of_band(
    *,
    band: tuple[float, float] = (1e-8, 0.3),
    decades: float = 1.5,
    every: int = 10,
    start: tuple[int, int] = (3, 3),
    end: int = 3,
) -> Rule:
    """Alert where a layer's update-to-weight ratio leaves its own recent band, or an absolute one.

    Values: `uw_ratio` itself, bad outside `band`; and `uw_ratio` over the geometric mean of the layer's
    last looks (half-life 20), both divided by the layer's learning rate where that is known, so that
    schedules are silent; bad beyond a factor of 10^decades, or of six standard deviations of its
    logarithm where that is more. Ten looks come first. A ratio of 0.3 replaces a layer within a few steps;
    below 1e-8, the rounding of float32, nothing moves.

    The topic is `alerts.ratio_out_of_band`. Cost: that of `uw_ratio()` at each look. NaN (zero weights) is
    left out.

    Args:
        band: The least and the greatest ratio.
        decades: How far from its history a ratio may be, in powers of ten.
        every: Looks at steps divisible by this.
        start: `(n, m)`: an alert starts once n of the last m looks were bad.
        end: It ends after as many good looks in a row.

    Returns:
        The rule, an operator for a Lens or for a stream with `uw_ratio`, or with the norms it consists of.

    Raises:
        ValueError: A parameter out of range.
    """
    return _RatioOutOfBand(band=band, decades=decades, every=every, start=start, end=end)


class _Unchanged(Judge):
    """Layers that had a gradient in the step whose updates come."""

    def __init__(self) -> None:
        self._step = -1
        self._layers: tuple[str, ...] = ()

    def look(self, look: Look) -> Iterable[Verdict]:
        if look.topic == GRADIENT_NORMS.name:
            same = look.step == self._step
            self._layers = (*self._layers, *look.layers) if same else look.layers
            self._step = look.step
            return []
        if look.step != self._step:
            return []
        updates = dict(zip(look.layers, look.values.tolist(), strict=True))
        # A layer with a gradient and no update belongs to no optimizer.
        values = np.array([updates.get(layer, 0.0) for layer in self._layers])
        return [Verdict(self._layers, values, values == 0.0, 0.0)]

    def state_dict(self) -> dict[str, Any]:
        return {"step": self._step, "layers": list(self._layers)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._step, self._layers = state["step"], tuple(state["layers"])


@dataclass(frozen=True)
class _UnchangedWeights(Rule):
    every: int = 10
    start: tuple[int, int] = (3, 3)
    end: int = 1

    name: ClassVar[str] = "unchanged_weights"

    def inputs(self) -> tuple[Input, ...]:
        return (GRADIENT_NORMS, UPDATE_NORMS)

    def judge(self) -> Judge:
        return _Unchanged()

    def meaning(self, verdict: Verdict, index: Sequence[int]) -> str:
        names = self.named(verdict, index)
        return f"The weights of {names} have a gradient, but updates leave them exactly as they are"

    @property
    def advice(self) -> str:
        return (
            "Check that the optimizer was given them and that their learning rate is not 0; in half "
            "precision updates may be too small to change a weight, which a float32 copy of the weights mends"
        )


def unchanged_weights(*, every: int = 10, start: tuple[int, int] = (3, 3), end: int = 1) -> Rule:
    """Alert where weights have a gradient and yet do not change at all.

    Value: the norm of the update, `weight_updates.norm2`, of layers that are in
    `weight_gradients.norm2`; bad where it is exactly 0, or where there is no update since no optimizer
    has the layer. Frozen layers have no gradient and are silent. One step without a change is
    ordinary (a schedule that begins or ends at 0); three looks are not.

    The topic is `alerts.unchanged_weights`. Cost: the norms of gradients and updates at each look. NaN is
    left out.

    Args:
        every: Looks at steps divisible by this.
        start: `(n, m)`: an alert starts once n of the last m looks were bad.
        end: It ends after as many good looks in a row.

    Returns:
        The rule, an operator for a Lens or for a stream with both topics.

    Raises:
        ValueError: A parameter out of range.
    """
    return _UnchangedWeights(every=every, start=start, end=end)
