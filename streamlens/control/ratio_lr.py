"""`RatioLR`: a learning rate that brings the update-to-weight ratio to a target."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

from streamlens.control._rates import RateController
from streamlens.control._steps import TOPIC as STEP_TOPIC
from streamlens.control._steps import StepScaler, sizes_of
from streamlens.control.bounds import Bounds
from streamlens.control.decision import Decision
from streamlens.control.schedules import Constant, Schedule
from streamlens.errors import StreamlensError, did_you_mean

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from streamlens.frame import Frame

__all__ = ["RatioLR"]

_MODES: Final = ("base", "current")
_WEIGHTS: Final = ("equal", "parameters")
_TINY: Final = 1e-9
"""The mean ratio up to which nothing can be concluded from it."""


@dataclass(frozen=True)
class _Law:
    """How a mean ratio makes a factor."""

    mode: str
    smoothing: float
    gain: float
    max_factor: float

    def smoothed(self, ratio: float, before: float | None) -> float:
        """R <- gamma R_k + (1 - gamma) R_{k-1}."""
        if before is None:
            # The thesis's listing starts at 0; a loop that corrects itself need not.
            before = 0.0 if self.mode == "base" else ratio
        return self.smoothing * ratio + (1.0 - self.smoothing) * before

    def factor(self, target: float, mean: float | None) -> float:
        """What to multiply the base rate with, or the current one."""
        if mean is None or mean <= _TINY:
            return 1.0
        return float(min((target / mean) ** self.gain, self.max_factor))


class RatioLR(RateController):
    """Sets the learning rate so that the update-to-weight ratio comes to a target.

    It ends a chain that gives the ratio of each layer, `lens.pipe(uw_ratio()).subscribe(RatioLR())`,
    and keeps the mean over layers, smoothed: R <- gamma R_k + (1 - gamma) R_{k-1}, gamma being
    `smoothing`, the weight of the newest ratio. After the update of step k it sets the rate of step k + 1.

    - `mode="base"`: lr = base * target / R, where base is the rate that each group had at first. The
      factor is 1 where R <= 1e-9 and at most `max_factor`; R starts at 0. Where the ratio is
      proportional to the rate, r = target * lr / ideal, the rate settles where
      lr = base * target / r = base * ideal / lr, at **lr = sqrt(base * ideal)**: base rates ten apart
      end about three apart, and the target is not reached, unless base = ideal. The deviation of R is
      multiplied by 1 - 2 gamma a step, so that it settles for 0 < gamma < 1, and never for gamma = 1.
    - `mode="current"`: lr <- lr * (target / R)^gain, each factor at most `max_factor`; R starts at the
      first ratio. It comes to rest only where R = target: the target is reached. With x the logarithm
      of lr / ideal and d the relative deviation of R, near the target x <- x - gain d and
      d <- (1 - gamma) d + gamma x, whose eigenvalues lie inside the unit circle exactly for
      **0 < gain < 2 (2 - gamma) / gamma**: 2.44 for gamma = 0.9. On CUDA, where a ratio arrives a step
      late, it is first multiplied by the rate of now over the rate at which it was measured, so that the
      same holds.

    With `per_layer=True` no rate is touched. Each layer's own step is scaled instead, after the update:
    W_{k-1} + s (W_k - W_{k-1}), the biases of a layer by the factor of its weight, where s follows the
    same law a layer, s for lr and 1 for base. Groups, schedulers and the optimizer's state stay as they
    are, with any optimizer; LBFGS alone is told, since its next curvature pair has to be of the step as it
    was scaled. `uw_ratio()` goes on to show the steps as the optimizer proposed them. A step as large as the
    weights has a ratio near 1 however large it is, so that the target then takes several steps to be met. It
    costs an operation on each parameter, and the copies that updates are computed from.

    As a callable it is what `torch.optim.lr_scheduler.LambdaLR` takes:
    `LambdaLR(optimizer, controller)`. Called, it gives the factor from all ratios seen so far and sets
    nothing itself; base rates are then those of the scheduler, which saves its state.

    A frame with a NaN among its layers, or without one that was there before, changes nothing. Every
    action is a frame of `learning_rate.action` (`step_scale.action` with `per_layer=True`).

    Args:
        optimizer: Whose rate; that of all optimizers of the observed model if None.
        target: The ratio to be met, above 0, or a schedule such as `ExponentialDecay(1e-2, 0.999)`.
        smoothing: The weight of the newest ratio, in (0, 1].
        mode: `"base"` or `"current"`.
        gain: The exponent of `mode="current"`, above 0.
        max_factor: The greatest factor by which the base rate, or in one action the current one, is
            multiplied.
        min_lr: The least rate set.
        max_lr: The greatest rate set.
        per_layer: Scale each layer's own step, and no rate.
        layer_weights: `"equal"`, or `"parameters"`: layers count by their number of weights, since an
            equal mean favours small layers.
        schedule: By what to multiply the target, over steps.
        slew_limit: The greatest factor by which one action may raise or lower a rate, or a scale.
        dry_run: Only say what would be done.

    Raises:
        TypeError: `optimizer` is none, or a schedule cannot be called.
        ValueError: A number is out of its range, or options contradict each other.

    Reference:
        The controller of `mode="base"` is that of ikkuna's learning-rate experiment; `mode="current"`
        is the law that its text states (eq. 3.8).
    """

    __slots__ = ("_bounds", "_law", "_scaler", "_schedule", "_target", "_weights")

    def __init__(
        self,
        optimizer: Optimizer | None = None,
        target: float | Schedule = 1e-3,
        smoothing: float = 0.9,
        mode: Literal["base", "current"] = "base",
        gain: float = 1.0,
        max_factor: float = 500.0,
        min_lr: float = 0.0,
        max_lr: float = math.inf,
        per_layer: bool = False,
        layer_weights: Literal["equal", "parameters"] = "equal",
        schedule: Schedule | None = None,
        *,
        slew_limit: float | None = None,
        dry_run: bool = False,
    ) -> None:
        super().__init__(optimizer, dry_run=dry_run)
        for option, value, known in (("mode", mode, _MODES), ("layer_weights", layer_weights, _WEIGHTS)):
            if value not in known:
                hint = did_you_mean(str(value), known) or f"it is {' or '.join(map(repr, known))}"
                raise ValueError(f"RatioLR({option}={value!r}): {hint}")
        _check_numbers(smoothing=smoothing, gain=gain, max_factor=max_factor)
        if mode == "base" and gain != 1:
            raise ValueError(f'RatioLR(gain={gain!r}): mode="base" has no gain; pass mode="current"')
        if per_layer and (optimizer is not None or min_lr > 0 or max_lr < math.inf):
            raise ValueError(
                "RatioLR(per_layer=True) scales steps and no rate: optimizer, min_lr and max_lr are for "
                "rates; slew_limit and max_factor bound the scales"
            )
        self._target: Schedule = target if callable(target) else Constant(_positive("target", target))
        if schedule is not None and not callable(schedule):
            raise TypeError(f"RatioLR(schedule=) takes a function of the step, got {schedule!r}")
        self._schedule = schedule
        self._law = _Law(mode, float(smoothing), float(gain), float(max_factor))
        least, greatest = (1 / max_factor, max_factor) if per_layer else (min_lr, max_lr)
        self._bounds = Bounds(least, greatest, slew_limit)
        self._weights = layer_weights
        self._scaler = StepScaler(self) if per_layer else None
        self.mean_ratio: float | None = None
        self.steps_seen = 0
        self.called = False
        self._last_step = 0
        self._ratios: dict[str, float] = {}
        self._scales: dict[str, float] = {}

    @property
    def action_topics(self) -> tuple[str, ...]:
        """The topic of its actions."""
        return super().action_topics if self._scaler is None else (STEP_TOPIC,)

    def attached(self) -> None:
        """See `Controller.attached`.

        Raises:
            StreamlensError: It lacks the model, or an optimizer, or another controller does the same.
        """
        if self.engine is None and (self._scaler is not None or self._weights == "parameters"):
            option = "per_layer=True" if self._scaler is not None else 'layer_weights="parameters"'
            raise StreamlensError(
                f"RatioLR({option}) needs the model, and this stream comes from none: end a chain of the "
                "lens that observe(model) returned in it"
            )
        if self._scaler is not None:
            self._scaler.attached()
        elif self.engine is not None or self._optimizer is not None:
            # On a plain stream without an optimizer it is LambdaLR's.
            super().attached()

    def target_at(self, step: int) -> float:
        """The target at a step.

        Raises:
            StreamlensError: The schedule gives no finite number above 0.
        """
        target = self._target(step) * (1.0 if self._schedule is None else self._schedule(step))
        if not 0 < target < math.inf:
            raise StreamlensError(f"RatioLR: the target at step {step} is {target!r}, not a number above 0")
        return float(target)

    def __call__(self, epoch: int) -> float:
        """The factor of the base rate, from all ratios seen so far, for `LambdaLR`.

        Args:
            epoch: What the scheduler counts; not used.

        Raises:
            ValueError: It has an optimizer of its own, or another law than that of `mode="base"`.
        """
        if self._optimizer is not None or self._scaler is not None or self._law.mode != "base":
            raise ValueError(
                'RatioLR serves LambdaLR with mode="base", no optimizer and no per_layer: it sets the rates'
            )
        self.called = True
        return self._law.factor(self.target_at(self._last_step), self.mean_ratio)

    def note(self) -> float | None:
        """The rate of the update that a frame is of."""
        if self._scaler is not None or self._law.mode == "base" or not self._groups():
            return None
        return self.rates()[0]

    def propose(self, frame: Frame, noted: Any) -> Decision | None:
        """See `Controller.propose`.

        Raises:
            StreamlensError: The frame holds more than one number a layer.
        """
        ratios = {layer: float(value) for layer, value in frame.items() if value.numel() == 1}
        if len(ratios) != len(frame):
            raise StreamlensError(
                f"RatioLR takes one number a layer, such as uw_ratio() gives, and {frame.topic!r} has more"
            )
        ratios = {layer: ratio for layer, ratio in ratios.items() if not self.frozen_by_others(layer)}
        if not ratios:
            return None
        self._last_step = frame.step
        self.steps_seen += 1
        target = self.target_at(frame.step)
        if self._scaler is not None:
            return self._scales_for(ratios, target)
        mean = self._mean(ratios)
        if self.called or not (self._optimizer is not None or self.engine is not None):
            self.mean_ratio = self._law.smoothed(mean, self.mean_ratio)
            return None
        old = self.rates()
        if noted and noted != old[0] and self._law.mode == "current":
            mean *= old[0] / noted
        self.mean_ratio = self._law.smoothed(mean, self.mean_ratio)
        if not self.undisturbed(old):
            return None
        factor = self._law.factor(target, self.mean_ratio)
        start = self.base_rates(old)
        origin = start if self._law.mode == "base" else old
        limited = zip(old, origin, strict=True)
        new = [self._bounds.limit(rate, first * factor) for rate, first in limited]
        return self.decision(old, new, _cause(self.mean_ratio, target))

    def apply(self, decision: Decision) -> None:
        """Set the rate of each group, or scale the step of each layer."""
        if self._scaler is None:
            super().apply(decision)
        else:
            self._scales.update(zip(decision.layers, decision.new, strict=True))
            self._scaler.apply(dict(zip(decision.layers, decision.new, strict=True)))

    def _mean(self, ratios: Mapping[str, float]) -> float:
        if self._weights == "equal":
            return math.fsum(ratios.values()) / len(ratios)
        assert self.engine is not None
        sizes = sizes_of(self.engine.index.entries, ratios)
        return math.fsum(ratios[layer] * sizes[layer] for layer in ratios) / sum(sizes.values())

    def _scales_for(self, ratios: Mapping[str, float], target: float) -> Decision:
        old = {layer: self._scales.get(layer, 1.0) for layer in ratios}
        new = {}
        for layer, ratio in ratios.items():
            # The ratio is that of the step as proposed; the loop of "current" is closed over s * ratio.
            shown = ratio * old[layer] if self._law.mode == "current" else ratio
            self._ratios[layer] = mean = self._law.smoothed(shown, self._ratios.get(layer))
            factor = self._law.factor(target, mean)
            wanted = old[layer] * factor if self._law.mode == "current" else factor
            new[layer] = self._bounds.limit(old[layer], wanted)
        mean = math.fsum(self._ratios[layer] for layer in ratios) / len(ratios)
        cause = _cause(mean, target)
        return Decision(STEP_TOPIC, tuple(old.values()), tuple(new.values()), cause, layers=tuple(ratios))


def _cause(mean: float, target: float) -> str:
    return f"the mean update-to-weight ratio is {mean:.3g}, and {target:.3g} is the target"


def _positive(option: str, number: object) -> float:
    if not isinstance(number, int | float) or isinstance(number, bool) or not 0 < number < math.inf:
        raise ValueError(f"RatioLR({option}={number!r}): it is a finite number above 0")
    return float(number)


def _check_numbers(*, smoothing: float, gain: float, max_factor: float) -> None:
    if _positive("smoothing", smoothing) > 1:
        raise ValueError(f"RatioLR(smoothing={smoothing!r}): the weight of the newest ratio lies in (0, 1]")
    _positive("gain", gain)
    if _positive("max_factor", max_factor) <= 1:
        raise ValueError(f"RatioLR(max_factor={max_factor!r}): the greatest factor is above 1")
