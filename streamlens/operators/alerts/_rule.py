"""`Rule`: what is looked at, what is bad about it, and what to say; a rule is an operator."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal, TypeAlias

import numpy as np
from reactivex import Observable

from streamlens.frame import Frame
from streamlens.operators._base import is_number, is_whole
from streamlens.operators.alerts._layers import Array, Flags

if TYPE_CHECKING:
    from streamlens.operators.alerts._inputs import Input
    from streamlens.stream import Stream

__all__ = ["Judge", "Look", "Pace", "Rule", "Severity", "Verdict", "cadence_at", "called", "number"]

Severity: TypeAlias = Literal["info", "warning", "critical"]

Pace: TypeAlias = tuple[tuple[int, int], ...]
"""Cadences, each with the step from which it holds; the first holds from 0 on."""

_FEW: Final = 8
"""Values of a look up to which they are gone through one by one."""

_MOST_NAMED: Final = 4
"""Layers that a sentence names."""


@dataclass(frozen=True)
class Look:
    """One frame on the host, as a judge sees it.

    Attributes:
        topic: The input it is of.
        step: The step it belongs to.
        layers: Its layers.
        values: A number a layer (and component), in double precision.
        components: Names of the second dimension, if there is one.
        on_device: Whether they had to be fetched from a device.
    """

    topic: str
    step: int
    layers: tuple[str, ...]
    values: Array
    components: tuple[str, ...] = ()
    on_device: bool = False

    @cached_property
    def numbers(self) -> list[float]:
        """All values, as a list: of one or two, Python is done before NumPy has begun."""
        numbers: list[float] = self.values.ravel().tolist()
        return numbers

    @property
    def finite(self) -> bool:
        """Whether all values are finite."""
        if self.values.size <= _FEW:
            return all(map(math.isfinite, self.numbers))
        return bool(np.isfinite(self.values).all())


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a judge says about the layers of one look.

    Attributes:
        layers: The layers judged.
        values: What was compared with the threshold, one a layer.
        bad: Which are beyond it.
        threshold: It: a number, or a lower and an upper one.
        group: What the verdict is on, where a rule looks at several things that begin and end apart.
        meta: What else goes into the alert.
        known: Of which layers anything is known; by default those whose value is no NaN.
    """

    layers: tuple[str, ...]
    values: Array
    bad: Flags
    threshold: float | tuple[float, float]
    group: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict)
    known: Flags | None = None


class Judge:
    """A rule's memory within one subscription, and what it makes of each look."""

    calm: Callable[[str], bool] = staticmethod(lambda group: False)
    """Whether a good look at a group would change nothing, so that no verdict need be made of it."""

    def look(self, look: Look) -> Iterable[Verdict]:
        """What one frame says; nothing if it only adds to what is remembered."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """Plain containers and tensors."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what `state_dict` gave."""


@dataclass(frozen=True)
class Rule:
    """An alert rule, which is an operator: frames in, alerts out.

    Equal rules are equal values. `health` takes rules to replace its own of the same name.

    Attributes:
        every: Looks at steps divisible by this.
        start: `(n, m)`: an alert starts once n of the last m looks were bad.
        end: It ends after as many good looks in a row.
        later: `(step, every)`: from a step on it looks as seldom as that, as `health` has it where looks
            are dear; trouble mostly begins at the beginning.
    """

    every: int
    start: tuple[int, int]
    end: int
    later: tuple[int, int] | None = field(default=None, kw_only=True)

    name: ClassVar[str] = ""
    severity: ClassVar[Severity] = "warning"
    cheap: ClassVar[bool] = True
    """Whether `health` may compute what the rule needs; else it takes that only where it is a topic."""

    any_input: ClassVar[bool] = False
    """Whether one of its inputs is enough."""

    def __post_init__(self) -> None:
        name = self.name
        for what, value in (("every", self.every), ("end", self.end)):
            if not _is_count(value):
                raise ValueError(f"{name}({what}={value!r}): a whole number from 1 on")
        start = self.start
        pair = isinstance(start, tuple) and len(start) == 2 and all(map(_is_count, start))
        if not pair or not start[0] <= start[1] <= 64:
            raise ValueError(
                f"{name}(start={start!r}): (n, m), for n bad looks among the last m, with 1 <= n <= m <= 64"
            )
        self.check()

    def check(self) -> None:
        """Raise for parameters that make no sense.

        Raises:
            ValueError: One does not.
        """

    def inputs(self) -> tuple[Input, ...]:
        """What the rule looks at."""
        raise NotImplementedError

    def cadence(self, entry: Input, every: int) -> int:
        """At which steps one of them is looked at, by a rule that looks at every so many: the divisor."""
        return every

    def pace(self, entry: Input) -> Pace:
        """From which step on which cadence holds for one of them."""
        paces = [(0, self.every)] + ([] if self.later is None else [self.later])
        return tuple((start, self.cadence(entry, every)) for start, every in paces)

    def judge(self) -> Judge:
        """The memory of a new subscription."""
        raise NotImplementedError

    def meaning(self, verdict: Verdict, index: Sequence[int]) -> str:
        """What is the matter, in one sentence without its full stop.

        Args:
            verdict: What was found.
            index: The layers of it that the alert is about, by their places.
        """
        raise NotImplementedError

    @property
    def advice(self) -> str:
        """What to try, as one sentence."""
        raise NotImplementedError

    def describe(self) -> str:
        """The rule as it shows in a plan: with what is not the default."""
        given = [
            f"{f.name}={getattr(self, f.name)!r}"
            for f in dataclasses.fields(self)
            if getattr(self, f.name) != f.default
        ]
        return f"{self.name}({', '.join(given)})"

    def __call__(self, source: Observable[Frame]) -> Stream:
        """Apply the rule to a Lens or a stream.

        Raises:
            StreamlensError: A Lens that cannot give what the rule looks at; the message says what to do.
            TypeError: `source` is no Observable.
        """
        from streamlens.operators.alerts._apply import alerts_of

        return alerts_of(source, (self,), self.describe())

    # -- what the rules' checks and sentences share ------------------------------------------

    def check_positive(self, **values: float) -> None:
        """Raise unless each is a finite number above 0."""
        for what, value in values.items():
            if not is_number(value) or not 0 < value < math.inf:
                raise ValueError(f"{self.name}({what}={value!r}): a number above 0")

    def check_share(self, **values: float) -> None:
        """Raise unless each lies in (0, 1]."""
        for what, value in values.items():
            if not is_number(value) or not 0 < value <= 1:
                raise ValueError(f"{self.name}({what}={value!r}): a share above 0, at most 1")

    def check_count(self, **values: int) -> None:
        """Raise unless each is a whole number from 1 on."""
        for what, value in values.items():
            if not _is_count(value):
                raise ValueError(f"{self.name}({what}={value!r}): a whole number from 1 on")

    def check_band(self, **bands: tuple[float, float]) -> None:
        """Raise unless each is a lower and a greater upper bound, both above 0."""
        for what, band in bands.items():
            pair = isinstance(band, tuple) and len(band) == 2 and all(map(is_number, band))
            if not pair or not 0 < band[0] < band[1] < math.inf:
                raise ValueError(f"{self.name}({what}={band!r}): (lower, upper), with 0 < lower < upper")

    @staticmethod
    def named(verdict: Verdict, index: Sequence[int]) -> str:
        """The layers with their values, the first few: `features.0 (0.93), ...`."""
        parts = [f"{called(verdict.layers[i])} ({number(verdict.values[i])})" for i in index]
        more = len(parts) - _MOST_NAMED
        return ", ".join(parts[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")


def cadence_at(pace: Pace, step: int) -> int:
    """The cadence that holds at a step."""
    if len(pace) == 1:
        return pace[0][1]
    return next(every for start, every in reversed(pace) if start <= step)


def called(layer: str) -> str:
    """A layer as sentences call it: those of a Sequential are mere numbers."""
    if not layer:
        return "the model"
    return f"layer {layer}" if layer.isdigit() else layer


def number(value: float) -> str:
    """A number as sentences write it: three digits."""
    return f"{value:.3g}"


def _is_count(value: object) -> bool:
    return is_whole(value) and value >= 1
