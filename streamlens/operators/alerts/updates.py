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
    WEIGHT_NORMS,
    WITH_GRADIENT,
    Input,
)
from streamlens.operators.alerts._layers import Array, LayerTable
from streamlens.operators.alerts._rule import Judge, Look, Rule, Verdict, number

__all__ = ["ratio_out_of_band", "unchanged_weights"]

_HALF_LIFE: Final = 20
"""Looks after which the weight of a ratio in a layer's history has halved."""
_WARM_UP: Final = 10
"""Looks before a layer's history counts."""
_WEIGHT_NORMS: Final = Input("weights.norm2", WEIGHT_NORMS.build, needed=False)
_ANNEALED: Final = 0.01
"""The share of its highest rate below which a layer's schedule is near its end."""


class _Ratio(Judge):
    """The history of each layer's ratio per learning rate: mean and spread of its decimal logarithm."""

    def __init__(self, band: tuple[float, float], decades: float) -> None:
        self._band, self._decades = band, decades
        self._table = LayerTable({"looks": -1.0, "mean": 0.0, "variance": 0.0})
        self._rates = LayerTable({"rate": math.nan, "highest": 0.0})

    def look(self, look: Look) -> Iterable[Verdict]:
        if look.topic == LEARNING_RATE.name:
            rows = self._rates.rows(look.layers)
            self._rates["rate"][rows] = look.values
            highest = self._rates["highest"]
            highest[rows] = np.fmax(highest[rows], look.values)
            return
        lower, upper = self._band
        ratios = look.values
        rows = self._rates.rows(look.layers)
        # A schedule near its end makes every ratio small.
        annealed = self._rates["rate"][rows] < _ANNEALED * self._rates["highest"][rows]
        bad = ((ratios < lower) & ~annealed) | (ratios > upper)
        yield Verdict(look.layers, ratios, bad, self._band, group="band")
        yield self._against_history(look.layers, ratios)

    def _against_history(self, layers: tuple[str, ...], ratios: Array) -> Verdict:
        rows = self._rates.rows(layers)
        rates = self._rates["rate"][rows]
        scaled = ratios / np.where(rates > 0, rates, 1.0)
        usable = np.isfinite(scaled) & (scaled > 0) & (rates != 0)
        logs = np.log10(np.where(usable, scaled, 1.0))
        rows = self._table.rows(layers)
        looks, mean, variance = (self._table[c] for c in ("looks", "mean", "variance"))
        width = np.maximum(self._decades, 4 * np.sqrt(variance[rows]))
        off = np.where(usable & (looks[rows] >= _WARM_UP), logs - mean[rows], 0.0)
        bad = np.abs(off) > width
        # Rates come after ratios: at a layer's first look its rate is not known yet.
        enters = usable & (looks[rows] >= 0)
        seen = rows[enters]
        n = looks[seen] + 1
        rate = np.maximum(1 / n, 1 - 0.5 ** (1 / _HALF_LIFE))
        step = logs[enters] - mean[seen]
        # An outlier moves the mean as far as one at the edge of the band would, and widens no band.
        most = np.where(n > _WARM_UP, width[enters], np.inf)
        mean[seen] += rate * np.clip(step, -most, most)
        widened = (1 - rate) * (variance[seen] + rate * step**2)
        variance[seen] = np.where(bad[enters], variance[seen], widened)
        looks[rows[usable]] += 1
        values = np.where(usable, 10.0**off, math.nan)
        band = (10.0**-self._decades, 10.0**self._decades)
        return Verdict(layers, values, bad, band, group="history")

    def state_dict(self) -> dict[str, Any]:
        return {"table": self._table.state_dict(), "rates": self._rates.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._table.load_state_dict(state["table"])
        self._rates.load_state_dict(state["rates"])


@dataclass(frozen=True)
class _RatioOutOfBand(Rule):
    band: tuple[float, float] = (1e-8, 0.3)
    decades: float = 2.0
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
    decades: float = 2.0,
    every: int = 10,
    start: tuple[int, int] = (3, 3),
    end: int = 3,
) -> Rule:
    """Alert where a layer's update-to-weight ratio leaves its own recent band, or an absolute one.

    Values: `uw_ratio` itself, bad outside `band`; and `uw_ratio` over the geometric mean of the layer's
    last looks (half-life 20), both divided by the layer's learning rate where that is known, so that
    schedules are silent; bad beyond a factor of 10^decades, or of four standard deviations of its
    logarithm where that is more. Ten looks come first. A ratio of 0.3 replaces a layer within a few steps;
    below 1e-8, the rounding of float32, nothing moves (which is meant where a schedule has come below a
    hundredth of its highest rate). Leaving a plateau raises ratios up to thirtyfold (`docs/alerts.md`).

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
    """Which layers have a gradient, and what the norm of each layer's weights was."""

    def __init__(self) -> None:
        self._gradients: dict[str, int] = {}
        self._norms: dict[str, tuple[int, float, float]] = {}
        self._last = -1

    def look(self, look: Look) -> Iterable[Verdict]:
        if look.topic == UPDATE_NORMS.name:
            return self._judge(look)
        if look.topic == WEIGHT_NORMS.name:
            for layer, norm in zip(look.layers, look.values.tolist(), strict=True):
                step, now, before = self._norms.get(layer, (-1, math.nan, math.nan))
                self._norms[layer] = (look.step, norm, before if step == look.step else now)
            return []
        self._gradients.update(dict.fromkeys(look.layers, look.step))
        return []

    def _judge(self, look: Look) -> Iterable[Verdict]:
        updates = dict(zip(look.layers, look.values.tolist(), strict=True))
        layers = tuple(layer for layer, step in self._gradients.items() if step == look.step)
        # A layer with a gradient and no update belongs to no optimizer, or to one that did not step.
        values = np.array([updates.get(layer, 0.0) for layer in layers])
        stayed = np.array([self._stayed(layer, look.step) for layer in layers], dtype=np.bool_)
        self._last = look.step
        return [Verdict(layers, values, (values == 0.0) & stayed, 0.0)] if layers else []

    def _stayed(self, layer: str, step: int) -> bool:
        """Whether nobody has changed the weights since the last look, as far as norms tell.

        Weights that an optimizer has and does not update come when their step ends: those of the last look
        are the newest there are.
        """
        if not self._norms:
            return True
        when, now, before = self._norms.get(layer, (-1, math.nan, math.nan))
        return now == before and when in (step, self._last)

    def state_dict(self) -> dict[str, Any]:
        norms = {layer: list(entry) for layer, entry in self._norms.items()}
        return {"gradients": dict(self._gradients), "norms": norms, "last": self._last}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._gradients = dict(state["gradients"])
        self._norms = {layer: (entry[0], entry[1], entry[2]) for layer, entry in state["norms"].items()}
        self._last = state.get("last", -1)


@dataclass(frozen=True)
class _UnchangedWeights(Rule):
    every: int = 10
    start: tuple[int, int] = (3, 3)
    end: int = 1

    name: ClassVar[str] = "unchanged_weights"

    def inputs(self) -> tuple[Input, ...]:
        return (WITH_GRADIENT, GRADIENT_NORMS, _WEIGHT_NORMS, UPDATE_NORMS)

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

    Value: the norm of the update, `weight_updates.norm2`, of layers that have a gradient. Bad where it
    is exactly 0, or where there is no update since no optimizer has the layer, and the norm of the weights
    (`weights.norm2`, where there is one) is what it was at the last look, so that optimizers that take
    turns are silent. Frozen layers have no gradient and are silent. One step without a change is
    ordinary (a schedule that begins or ends at 0); three looks are not.

    The topic is `alerts.unchanged_weights`. Cost: the norms of weights, gradients and updates at each
    look. That a layer without an optimizer has a gradient is known on a Lens only. NaN is left out.

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
