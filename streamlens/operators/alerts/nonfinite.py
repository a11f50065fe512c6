"""`nonfinite_values`: where NaN and infinities first appear."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import numpy as np

from streamlens.errors import did_you_mean
from streamlens.operators.alerts._inputs import (
    ACTIVATION_NORMS,
    ACTIVATION_PROBES,
    EACH_LOSS,
    GRADIENT_NORMS,
    WEIGHT_NORMS,
    Input,
)
from streamlens.operators.alerts._rule import Judge, Look, Rule, Severity, Verdict, called

__all__ = ["nonfinite_values"]

_PHASES: Final[Mapping[str, Input]] = {
    "forward": ACTIVATION_NORMS,
    "loss": EACH_LOSS,
    "backward": GRADIENT_NORMS,
    "update": WEIGHT_NORMS,
}
"""The phases of a step in their order, and what tells of them."""

_SELDOM: Final = 10
"""Looks after which gradients and weights are looked at where thoroughness is not asked for."""

_WHERE: Final = {
    "forward": "the output of {}",
    "loss": "the loss",
    "backward": "the gradient of {}",
    "update": "the weights of {}",
}


class _Nonfinite(Judge):
    """Where they first appeared since everything was last finite."""

    def __init__(self, phases: Sequence[str]) -> None:
        self._phases = {_PHASES[phase].name: phase for phase in phases}
        self._step = -1
        self._found: tuple[str, str] | None = None
        self._in_step = False
        self._doubtful: tuple[str, str] | None = None

    def look(self, look: Look) -> Iterable[Verdict]:
        phase = self._phases.get(look.topic)
        if phase is None or look.step < self._step:
            return
        if look.step != self._step:
            if self._found is not None and not self._in_step and self._step >= 0:
                yield self._verdict(bad=False)
                self._found = None
            self._step, self._in_step = look.step, False
        if look.finite:
            if phase == "forward":
                self._doubtful = None
            return
        values = look.values.reshape(len(look.layers), -1)
        wrong = ~np.isfinite(values).all(axis=1)
        # Backwards a layer comes the sooner the later it stands in the model.
        places = np.flatnonzero(wrong)
        first = int(places[-1] if phase == "backward" else places[0])
        if look.on_device and phase in ("backward", "update") and np.isnan(values).all():
            # An overflow that a fused optimizer leaves out on the device looks like this, too: whether
            # it was one shows in the next forward.
            self._doubtful = self._doubtful or (phase, look.layers[first])
            return
        self._in_step = True
        if self._found is None:
            self._found = self._doubtful or (phase, look.layers[first])
            yield self._verdict(bad=True, value=float(values[first][~np.isfinite(values[first])][0]))

    def _verdict(self, *, bad: bool, value: float = 0.0) -> Verdict:
        assert self._found is not None
        phase, layer = self._found
        known = np.array([True])
        meta = {"phase": phase}
        return Verdict((layer,), np.array([value]), np.array([bad]), 0.0, phase, meta, known)

    def state_dict(self) -> dict[str, Any]:
        found = None if self._found is None else list(self._found)
        doubtful = None if self._doubtful is None else list(self._doubtful)
        return {"step": self._step, "found": found, "in_step": self._in_step, "doubtful": doubtful}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._step, self._in_step = state["step"], state["in_step"]
        self._found = None if state["found"] is None else (state["found"][0], state["found"][1])
        doubtful = state["doubtful"]
        self._doubtful = None if doubtful is None else (doubtful[0], doubtful[1])


@dataclass(frozen=True)
class _NonfiniteValues(Rule):
    phases: tuple[str, ...] = ("forward", "loss", "backward")
    thorough: bool = True
    every: int = 1
    start: tuple[int, int] = (1, 1)
    end: int = 1

    name: ClassVar[str] = "nonfinite_values"
    severity: ClassVar[Severity] = "critical"
    any_input: ClassVar[bool] = True

    def check(self) -> None:
        if not isinstance(self.phases, tuple) or not self.phases:
            raise ValueError(f"nonfinite_values(phases={self.phases!r}): a tuple of {', '.join(_PHASES)}")
        for phase in self.phases:
            if phase not in _PHASES:
                hint = did_you_mean(str(phase), _PHASES)
                raise ValueError(
                    f"nonfinite_values(phases=): no phase {phase!r}; {hint or 'known are'} "
                    f"{', '.join(_PHASES)}"
                )

        if not isinstance(self.thorough, bool):
            raise ValueError(f"nonfinite_values(thorough={self.thorough!r}): True or False")

    def inputs(self) -> tuple[Input, ...]:
        phases = _PHASES if self.thorough else {**_PHASES, "forward": ACTIVATION_PROBES}
        return tuple(entry for phase, entry in phases.items() if phase in self.phases)

    def cadence(self, entry: Input, every: int) -> int:
        # What an update has spoilt shows in the next forward.
        seldom = not self.thorough and entry in (GRADIENT_NORMS, WEIGHT_NORMS)
        return _SELDOM * every if seldom else every

    def judge(self) -> Judge:
        return _Nonfinite(self.phases)

    def meaning(self, verdict: Verdict, index: Sequence[int]) -> str:
        where = _WHERE[verdict.group].format(called(verdict.layers[index[0]]))
        return f"Values that are NaN or infinite appeared, first in {where} (phase: {verdict.group})"

    @property
    def advice(self) -> str:
        return (
            "Look at this step's batch, at the weights there (an update before may have spoilt them) and at "
            "divisions, logarithms, roots and exponentials; torch.autograd.detect_anomaly() names the "
            "operation; a lower learning rate, clipped gradients or a wider number format prevent overflows"
        )


def nonfinite_values(
    *,
    phases: tuple[str, ...] = ("forward", "loss", "backward"),
    thorough: bool = True,
    every: int = 1,
    start: tuple[int, int] = (1, 1),
    end: int = 1,
) -> Rule:
    """Alert where NaN or infinite values appear: at once, with the first layer and phase.

    A step is followed through its phases in their order: `"forward"` (`activations.norm2`),
    `"loss"`, `"backward"` (`weight_gradients.norm2`) and, where asked for, `"update"` (`weights.norm2`).
    A norm is finite exactly if all elements are. The first layer is, in the model's order, the first
    whose output (or weights) is not finite, and backwards the last whose gradient is not; what
    follows from it is not told again. The alert ends with the first step in which everything is finite.

    Without `thorough`, as in `health`, it costs some microseconds a layer. Outputs are looked at in a sample:
    whole up to 16,384 elements, of larger ones 1,024 runs of 16 neighbours, so that each of up to 512
    examples is among them; those of modules that pass on what is finite as such (ReLU, dropout, pooling) are
    left out; gradients are looked at every tenth time. What escapes there is told later in the same step,
    by the loss or a layer that has mixed it with the rest, or, where a backward has spoilt the weights, in
    the next step's forward.

    The topic is `alerts.nonfinite_values`; its value is the norm that was found, `meta["phase"]` the
    phase. Where several ranks train, `meta["rank"]` is the one in whose part of the batch, or shard, it was
    found: a list if there are several, absent where all hold the same and where it is several of more than
    48. Cost: the norms of all outputs and of the gradients at each look; without `"update"`, weights that an
    update spoilt show in the next forward. Overflows that GradScaler catches are no steps, and are not told.

    Args:
        phases: The phases to look at.
        thorough: Whether to look at all elements of every output, and of gradients, at every look.
        every: Looks at steps divisible by this; the first layer is known only where that is 1.
        start: `(n, m)`: an alert starts once n of the last m looks were bad.
        end: It ends after as many good looks in a row.

    Returns:
        The rule, an operator for a Lens or for a stream with any of these topics.

    Raises:
        ValueError: A parameter out of range.
    """
    return _NonfiniteValues(phases=tuple(phases), thorough=thorough, every=every, start=start, end=end)
