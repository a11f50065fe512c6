"""`overfitting`: the validation loss rises while the training loss falls."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Final

import numpy as np

from streamlens.operators.alerts._inputs import LOSS, Input
from streamlens.operators.alerts._losses import LossTrack
from streamlens.operators.alerts._rule import Judge, Look, Rule, Verdict, number

__all__ = ["overfitting"]

_REMEDY: Final = (
    'pass observe(model, emits=["validation_loss"]) and write lens.emit("validation_loss", value) after each '
    "evaluation"
)
_VALIDATION: Final = Input("validation_loss", remedy=_REMEDY)
_ACCURACY: Final = Input("test_accuracy")
_LOSS: Final = replace(LOSS, needed=False, remedy="")


class _Overfitting(Judge):
    """The best evaluation so far, and what the training loss was then."""

    def __init__(self, rise: float, share: float, drop: float) -> None:
        self._rise, self._share, self._drop = rise, share, drop
        self._first: dict[str, float] = {}
        self._training = LossTrack(half_life=20)
        self._best: dict[str, list[float]] = {}

    def look(self, look: Look) -> Iterable[Verdict]:
        if look.topic == _LOSS.name:
            loss = sum(look.numbers)
            if math.isfinite(loss):
                self._training.take(loss)
            return
        value = float(np.mean(look.values))
        falls = look.topic == _VALIDATION.name
        if not math.isfinite(value):
            yield self._verdict(look.topic, math.nan, bad=False, limit=math.nan)
            return
        training = self._training.average
        best, then = self._best.get(look.topic, [value, training])
        if (value <= best) if falls else (value >= best):
            best, then = value, training
            self._best[look.topic] = [best, then]
        first = self._first.setdefault(look.topic, value)
        room = max(self._rise * abs(best), self._share * (first - best)) if falls else self._drop
        limit = best + room if falls else best - room
        worse = value > limit if falls else value < limit
        # Where the training loss rises too, training itself is what goes wrong.
        learning = not training > then
        yield self._verdict(look.topic, value, bad=worse and learning, limit=limit)

    @staticmethod
    def _verdict(topic: str, value: float, *, bad: bool, limit: float) -> Verdict:
        return Verdict(("",), np.array([value]), np.array([bad]), limit, group=topic)

    def state_dict(self) -> dict[str, Any]:
        best = {topic: list(pair) for topic, pair in self._best.items()}
        return {"training": self._training.state_dict(), "best": best, "first": dict(self._first)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._training.load_state_dict(state["training"])
        self._best = {topic: list(pair) for topic, pair in state["best"].items()}
        self._first = dict(state["first"])


@dataclass(frozen=True)
class _OverfittingRule(Rule):
    rise: float = 0.2
    share: float = 0.1
    drop: float = 0.03
    every: int = 1
    start: tuple[int, int] = (3, 3)
    end: int = 2

    name: ClassVar[str] = "overfitting"
    any_input: ClassVar[bool] = True

    def check(self) -> None:
        self.check_positive(rise=self.rise)
        self.check_share(share=self.share, drop=self.drop)

    def inputs(self) -> tuple[Input, ...]:
        return (_LOSS, _VALIDATION, _ACCURACY)

    def judge(self) -> Judge:
        return _Overfitting(self.rise, self.share, self.drop)

    def meaning(self, verdict: Verdict, index: Sequence[int]) -> str:
        limit = number(float(np.max(verdict.threshold)))
        value = number(verdict.values[0])
        if verdict.group == _VALIDATION.name:
            what = f"The validation loss has risen to {value}, above {limit}"
        else:
            what = f"The test accuracy has fallen to {value}, below {limit}"
        return f"{what}, while the training loss goes on falling: the model learns its examples by heart"

    @property
    def advice(self) -> str:
        return (
            "Keep the weights of the best evaluation, and try more data or augmentation, weight decay, "
            "dropout or a smaller model"
        )


def overfitting(
    *,
    rise: float = 0.2,
    share: float = 0.1,
    drop: float = 0.03,
    every: int = 1,
    start: tuple[int, int] = (3, 3),
    end: int = 2,
) -> Rule:
    """Alert where evaluations get worse while the training loss falls.

    Values: `validation_loss`, as given to `lens.emit("validation_loss", value)`, bad where it is above the
    least so far both by `rise` of that and by `share` of what it has fallen since the first evaluation
    (small losses of few examples differ by more than a fifth from one evaluation to the next); and
    `test_accuracy`, bad more than `drop` below the greatest so far. Both only while the moving average
    of `loss` (half-life 20 looks), where it is known, is at most what it was at that best evaluation.
    Looks are evaluations: three in a row start an alert.

    The topic is `alerts.overfitting`, of the model itself; `meta["of"]` says what of. Cost: nothing but
    the loss. NaN is left out.

    Args:
        rise: By what share of its least the validation loss may rise.
        share: By what share of its fall so far it may rise.
        drop: By how much the test accuracy may fall, as a share of all examples.
        every: Looks at losses of steps divisible by this.
        start: `(n, m)`: an alert starts once n of the last m evaluations were bad.
        end: It ends after as many good evaluations in a row.

    Returns:
        The rule, an operator for a Lens or for a stream with either topic.

    Raises:
        ValueError: A parameter out of range.
    """
    return _OverfittingRule(rise=rise, share=share, drop=drop, every=every, start=start, end=end)
