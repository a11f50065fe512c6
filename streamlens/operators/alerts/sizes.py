"""`layer_oversized` and `layer_undersized`: layers with far more directions than they use, or too few."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import numpy as np

from streamlens.operators.alerts._inputs import Input
from streamlens.operators.alerts._layers import Array, LayerTable
from streamlens.operators.alerts._rule import Judge, Look, Rule, Severity, Verdict, number
from streamlens.operators.singular_values import effective_rank

__all__ = ["layer_oversized", "layer_undersized"]

_SATURATION: Final = Input(
    "activations.saturation",
    remedy='derive it first: lens.derive("activations.saturation", chain)',
)
_RANK: Final = Input("weights.effective_rank", lambda: effective_rank("weights"), needed=False)


class _Sizes(Judge):
    """How each layer's effective rank has developed since its first look."""

    def __init__(self, threshold: float, rank: float, *, over: bool) -> None:
        self._threshold, self._rank, self._over = threshold, rank, over
        self._table = LayerTable({"first": math.nan, "now": math.nan})

    def look(self, look: Look) -> Iterable[Verdict]:
        rows = self._table.rows(look.layers)
        first, now = self._table["first"], self._table["now"]
        if look.topic == _RANK.name:
            now[rows] = look.values
            first[rows] = np.where(np.isnan(first[rows]), look.values, first[rows])
            return []
        bad = self._beyond(look.values, now[rows] / first[rows])
        return [Verdict(look.layers, look.values, bad, self._threshold)]

    def _beyond(self, saturation: Array, rank: Array) -> Any:
        if self._over:
            return (saturation < self._threshold) & ~(rank > self._rank)
        return (saturation > self._threshold) & ~(rank < self._rank)

    def state_dict(self) -> dict[str, Any]:
        return {"table": self._table.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._table.load_state_dict(state["table"])


@dataclass(frozen=True)
class _Sized(Rule):
    severity: ClassVar[Severity] = "info"
    cheap: ClassVar[bool] = False

    def inputs(self) -> tuple[Input, ...]:
        return (_RANK, _SATURATION)


@dataclass(frozen=True)
class _Oversized(_Sized):
    below: float = 0.05
    rank: float = 1.05
    every: int = 1
    start: tuple[int, int] = (3, 3)
    end: int = 3

    name: ClassVar[str] = "layer_oversized"

    def check(self) -> None:
        self.check_share(below=self.below)
        self.check_positive(rank=self.rank)

    def judge(self) -> Judge:
        return _Sizes(self.below, self.rank, over=True)

    def meaning(self, verdict: Verdict, index: Sequence[int]) -> str:
        return (
            f"Outputs of {self.named(verdict, index)} need a share of their directions below "
            f"{number(self.below)} for 99% of their variance: these layers are larger than what they do"
        )

    @property
    def advice(self) -> str:
        return "Try fewer units there: the accuracy should stay, at less memory and time"


@dataclass(frozen=True)
class _Undersized(_Sized):
    above: float = 0.95
    rank: float = 0.9
    every: int = 1
    start: tuple[int, int] = (3, 3)
    end: int = 3

    name: ClassVar[str] = "layer_undersized"

    def check(self) -> None:
        self.check_share(above=self.above)
        self.check_positive(rank=self.rank)

    def judge(self) -> Judge:
        return _Sizes(self.above, self.rank, over=False)

    def meaning(self, verdict: Verdict, index: Sequence[int]) -> str:
        return (
            f"Outputs of {self.named(verdict, index)} need a share of their directions above "
            f"{number(self.above)} for 99% of their variance: these layers may be too small for what they do"
        )

    @property
    def advice(self) -> str:
        return "Try more units there, if accuracy is what is missing"


def layer_oversized(
    *,
    below: float = 0.05,
    rank: float = 1.05,
    every: int = 1,
    start: tuple[int, int] = (3, 3),
    end: int = 3,
) -> Rule:
    """Tell which layers use only a few of their directions, and could be smaller.

    Value: `activations.saturation`, the share of a layer's covariance eigendirections that 99% of its
    output variance needs, in (0, 1]; bad below `below`, unless the effective rank of its weights
    (`weights.effective_rank`, where it is known) has grown beyond `rank` times what it was at the
    first look: then the layer is still unfolding. The default asks for twenty times as many directions as
    are used. A judgment of size and no error, severity `"info"`, and not in `health()` by itself: that
    looks at it where `activations.saturation` is a topic already.

    The topic is `alerts.layer_oversized`. Cost: that of its topics. NaN is left out. Source: Shenk et al.
    2019; Raghu et al. 2017; Roy and Vetterli 2007.

    Args:
        below: The saturation below which a layer is too large.
        rank: The growth of its effective rank above which it is not judged.
        every: Looks at steps divisible by this.
        start: `(n, m)`: an alert starts once n of the last m looks were bad.
        end: It ends after as many good looks in a row.

    Returns:
        The rule, an operator for a Lens or for a stream with `activations.saturation`.

    Raises:
        ValueError: A parameter out of range.
    """
    return _Oversized(below=below, rank=rank, every=every, start=start, end=end)


def layer_undersized(
    *,
    above: float = 0.95,
    rank: float = 0.9,
    every: int = 1,
    start: tuple[int, int] = (3, 3),
    end: int = 3,
) -> Rule:
    """Tell which layers use nearly all of their directions, and may be a bottleneck.

    Value: `activations.saturation`, as for `layer_oversized`; bad above `above`, unless the effective
    rank of the layer's weights has shrunk below `rank` times what it was at the first look: weights that
    give up directions are not short of them. Severity `"info"`, and not in `health()` by itself.

    The topic is `alerts.layer_undersized`. Cost: that of its topics. NaN is left out. Source: Shenk et
    al. 2019; Raghu et al. 2017; Roy and Vetterli 2007.

    Args:
        above: The saturation above which a layer is too small.
        rank: The effective rank, relative to that at the first look, below which it is not judged.
        every: Looks at steps divisible by this.
        start: `(n, m)`: an alert starts once n of the last m looks were bad.
        end: It ends after as many good looks in a row.

    Returns:
        The rule, an operator for a Lens or for a stream with `activations.saturation`.

    Raises:
        ValueError: A parameter out of range.
    """
    return _Undersized(above=above, rank=rank, every=every, start=start, end=end)
