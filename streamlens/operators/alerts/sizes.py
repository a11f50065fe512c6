"""`layer_oversized` and `layer_undersized`: layers with far more directions than they use, or too few."""

from __future__ import annotations

import glob
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import numpy as np
from reactivex import Observable
from torch import nn

from streamlens.errors import LayerNotFoundError, UnknownTopicError
from streamlens.frame import Frame
from streamlens.lens import Lens
from streamlens.operators.alerts._inputs import Input, chained
from streamlens.operators.alerts._layers import Array, LayerTable
from streamlens.operators.alerts._rule import Judge, Look, Rule, Severity, Verdict, number
from streamlens.operators.saturation import saturation
from streamlens.operators.selection import layers, topic
from streamlens.operators.singular_values import effective_rank
from streamlens.stream import Operator

__all__ = ["check_windows", "layer_oversized", "layer_undersized"]

_SATURATION: Final = "activations.saturation"
_RANK: Final = Input("weights.effective_rank", lambda: effective_rank("weights"), needed=False)


def _saturation_over(window: int) -> Input:
    return Input(
        _SATURATION,
        lambda: _saturation(window),
        remedy="the model has no layer with a matrix of weights among those selected, beside its last one",
    )


def _saturation(window: int) -> Operator:
    """The saturation of layers whose size is a choice; where a lens has it as a topic already, that."""

    def apply(source: Observable[Frame]) -> Observable[Frame]:
        if not isinstance(source, Lens):
            return saturation(window=window)(source)
        try:
            return topic(_SATURATION)(source)
        except UnknownTopicError:
            names = _sized(source.module_classes())
        if not names:
            raise LayerNotFoundError("no layer with a matrix of weights, beside the last one")
        return chained(layers(*map(glob.escape, names)), saturation(window=window))(source)

    return apply


def _sized(modules: Mapping[str, nn.Module]) -> list[str]:
    """The layers with units to add or take away.

    The last one has as many outputs as the task asks for.
    """
    owners = [
        name for name, module in modules.items() if any(p.ndim > 1 for p in module.parameters(recurse=False))
    ]
    return owners[:-1]


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
    window: int = 100

    severity: ClassVar[Severity] = "info"
    cheap: ClassVar[bool] = False

    def inputs(self) -> tuple[Input, ...]:
        return (_RANK, _saturation_over(self.window))

    def cadence(self, entry: Input, every: int) -> int:
        # Windows end at steps of their own; a decomposition of the weights is dear, and one for each will do.
        return self.window if entry is _RANK else every

    def check(self) -> None:
        self.check_count(window=self.window)


@dataclass(frozen=True)
class _Oversized(_Sized):
    below: float = 0.05
    rank: float = 1.05
    every: int = 1
    start: tuple[int, int] = (3, 3)
    end: int = 3

    name: ClassVar[str] = "layer_oversized"

    def check(self) -> None:
        super().check()
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
        super().check()
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


def check_windows(rules: Sequence[Rule]) -> None:
    """Refuse rules that look at one saturation over windows that differ.

    Raises:
        ValueError: They do.
    """
    sized = [rule for rule in rules if isinstance(rule, _Sized)]
    if len({rule.window for rule in sized}) > 1:
        both = " and ".join(f"{rule.name}(window={rule.window})" for rule in sized)
        raise ValueError(f"health() was given {both}: they look at one saturation, so give both one window")


def layer_oversized(
    *,
    below: float = 0.05,
    rank: float = 1.05,
    window: int = 100,
    start: tuple[int, int] = (3, 3),
    end: int = 3,
) -> Rule:
    """Tell which layers use only a few of their directions, and could be smaller.

    Value: `activations.saturation`, the share of a layer's covariance eigendirections that 99% of its
    output variance needs, in (0, 1]; bad below `below`, unless the effective rank of its weights
    (`weights.effective_rank`, where it is known) has grown beyond `rank` times what it was at the
    first look: then the layer is still unfolding. The default asks for twenty times as many directions as
    are used. A judgment of size and no error, severity `"info"`, and not in `health()` by itself:
    `health(layer_oversized())` has it, and so has a lens on which `activations.saturation` is a topic
    already, as after `lens.derive("activations.saturation", lens.pipe(saturation()))`.

    By itself the rule asks a Lens for the `saturation()` of each layer with a matrix of weights but the
    last, whose outputs the task counts; `layers()` in front chooses among them. A window has to bring several
    times as many rows as a layer has units, else any layer looks too large. On a stream of frames it judges
    what comes.

    The topic is `alerts.layer_oversized`. Cost: that of `saturation()`, and a decomposition of the weights
    each window. NaN is left out. Source: Shenk et al. 2019; Raghu et al. 2017; Roy and Vetterli 2007.

    Args:
        below: The saturation below which a layer is too large.
        rank: The growth of its effective rank above which it is not judged.
        window: Steps of outputs that make one look; those of a topic derived beforehand are as they are.
        start: `(n, m)`: an alert starts once n of the last m looks were bad.
        end: It ends after as many good looks in a row.

    Returns:
        The rule, an operator for a Lens or for a stream with `activations.saturation`.

    Raises:
        ValueError: A parameter out of range.
    """
    return _Oversized(below=below, rank=rank, window=window, start=start, end=end)


def layer_undersized(
    *,
    above: float = 0.95,
    rank: float = 0.9,
    window: int = 100,
    start: tuple[int, int] = (3, 3),
    end: int = 3,
) -> Rule:
    """Tell which layers use nearly all of their directions, and may be a bottleneck.

    Value: `activations.saturation`, as for `layer_oversized`; bad above `above`, unless the effective
    rank of the layer's weights has shrunk below `rank` times what it was at the first look: weights that
    give up directions are not short of them. Severity `"info"`, and not in `health()` by itself.

    What it looks at, and what that costs, is as for `layer_oversized`. The topic is
    `alerts.layer_undersized`. NaN is left out. Source: Shenk et al. 2019; Raghu et al. 2017; Roy and Vetterli
    2007.

    Args:
        above: The saturation above which a layer is too small.
        rank: The effective rank, relative to that at the first look, below which it is not judged.
        window: Steps of outputs that make one look; those of a topic derived beforehand are as they are.
        start: `(n, m)`: an alert starts once n of the last m looks were bad.
        end: It ends after as many good looks in a row.

    Returns:
        The rule, an operator for a Lens or for a stream with `activations.saturation`.

    Raises:
        ValueError: A parameter out of range.
    """
    return _Undersized(above=above, rank=rank, window=window, start=start, end=end)
