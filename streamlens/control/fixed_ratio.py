"""`FixedRatio`: every layer's update has the same size in proportion to its weights."""

from __future__ import annotations

import gc
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Literal

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from streamlens.capture.copies import held_by
from streamlens.control.bounds import Bounds
from streamlens.control.decision import Decision
from streamlens.control.gradients import GradientController
from streamlens.control.schedules import Constant, Schedule
from streamlens.errors import StreamlensError, did_you_mean
from streamlens.operators._base import is_number

if TYPE_CHECKING:
    from streamlens.capture.model import ModelIndex, ParameterEntry
    from streamlens.frame import Frame

__all__ = ["FixedRatio"]

TOPIC: Final = "gradient_scale.action"

_OF: Final = ("weights", "parameters")


class FixedRatio(GradientController):
    """Scales gradients so that each layer's update meets a target ratio, whatever the learning rate is.

    With plain SGD, W_k = W_{k-1} - lr s g: before the update each layer's gradient is multiplied by the s
    for which |W_k - W_{k-1}| / |W_k| = target, which is what `uw_ratio()` shows. With u = lr |g| / |W_{k-1}|
    and c the cosine between g and W_{k-1} it is the positive root of a quadratic equation,

        s u = target (sqrt(1 - target^2 (1 - c^2)) - target c) / (1 - target^2),

    about target / u. A layer's bias is scaled like its weight; with `of="parameters"` every parameter meets
    the target by itself, attention and LSTM included. What is zero, the weights or the gradient, is left as
    it is, for no scale makes it meet anything.

    It needs an update that is linear in its gradient: momentum, weight decay, Nesterov and other optimizers
    are errors at `subscribe` (at the first update of one that is made later), for which
    `RatioLR(per_layer=True)` scales steps after the update. A target that never falls limits how far
    training converges; a schedule makes it fall.

    It ends any chain of a lens, `lens.pipe(uw_ratio()).subscribe(FixedRatio(1e-3))`: the gradients are its
    input, at every update, of the layers that the chain selects (`layers("features.*")` in it). Where one of
    them is not finite, or a layer lacks the gradient that it had before, all scales stay as they were at the
    step before.

    It costs three passes over what is steered (two norms and a product) and one where gradients are scaled,
    and nothing waits for a device. Actions are frames of `gradient_scale.action`, the scale of each layer; on
    CUDA they are announced at the next update, under their own step.

    Args:
        target: The ratio to be met, between 0 and 1, or a schedule such as `ExponentialDecay(1e-2, 0.999)`.
        of: `"weights"`, a scale for each layer with a weight, or `"parameters"`.
        optimizer: Whose gradients; those of all optimizers of the observed model if None.
        min_scale: The least scale.
        max_scale: The greatest scale; a gradient that has all but vanished is mostly rounding errors.
        slew_limit: The greatest factor by which a scale may rise or fall in one step, from 1 at first.
        dry_run: Only say what would be done.

    Raises:
        TypeError: `optimizer` is none.
        ValueError: A number is out of its range, or the optimizer is no plain SGD.

    Reference:
        The update rule is that behind the fixed-ratio curve of ikkuna's experiments; the target of 1e-3 is
        Karpathy's.
    """

    __slots__ = ("_bounds", "_of", "_target")

    def __init__(
        self,
        target: float | Schedule = 1e-3,
        *,
        of: Literal["weights", "parameters"] = "weights",
        optimizer: Optimizer | None = None,
        min_scale: float = 0.0,
        max_scale: float = math.inf,
        slew_limit: float | None = None,
        dry_run: bool = False,
    ) -> None:
        super().__init__(optimizer, dry_run=dry_run)
        if of not in _OF:
            hint = did_you_mean(str(of), _OF) or f"it is {' or '.join(map(repr, _OF))}"
            raise ValueError(f"FixedRatio(of={of!r}): {hint}")
        if not callable(target) and (not is_number(target) or not 0 < target < 1):
            raise ValueError(f"FixedRatio(target={target!r}): a ratio lies between 0 and 1, such as 1e-3")
        if optimizer is not None and (objection := _objection(optimizer)):
            raise ValueError(objection)
        self._target: Schedule = target if callable(target) else Constant(float(target))
        self._of = of
        self._bounds = Bounds(min_scale, max_scale, slew_limit)
        self.scales_now: dict[str, Tensor] = {}

    @property
    def action_topics(self) -> tuple[str, ...]:
        """The topic of its actions."""
        return (TOPIC,)

    def attached(self) -> None:
        """See `Controller.attached`.

        Raises:
            StreamlensError: Without a model, with an optimizer that is no plain SGD, or beside another
                controller of the same.
        """
        super().attached()
        self.claim("layers' steps", self._optimizer)
        # It undoes what the rate would do: a loop that looks at ratios and steers the rate would run away.
        self.claim("learning rate", self._optimizer, "under FixedRatio the rate makes no difference")
        assert self.engine is not None
        if self._optimizer is not None:
            return  # looked at when it was given
        known = [o for info in self.engine.updates.owners.known if (o := info.optimizer) is not None]
        for optimizer in known:
            if objection := _objection(optimizer):
                raise StreamlensError(objection)
        objections = [] if known else [_objection(o) for o in _made_for(self.engine.index)]
        if objections and all(objections):
            # If one of several would do, it may be the one that will be used.
            raise StreamlensError(
                f"{objections[0]}. If another optimizer will train the model, name it: "
                "FixedRatio(optimizer=...)"
            )

    def target_at(self, step: int) -> float:
        """The target at a step.

        Raises:
            StreamlensError: The schedule gives no number between 0 and 1.
        """
        target = self._target(step)
        if not 0 < target < 1:
            raise StreamlensError(f"FixedRatio: the target at step {step} is {target!r}, not between 0 and 1")
        return float(target)

    def scales(self, gradients: Mapping[str, Tensor], optimizer: Optimizer) -> Mapping[str, Tensor]:
        """See `GradientController.scales`."""
        if objection := _objection(optimizer):
            self.stand_back(objection)
            return {}
        engine = self.engine
        assert engine is not None
        info = engine.updates.owners.get(optimizer)
        assert info is not None
        present = [entry for entry in info.entries if entry.name in gradients]
        steered = [entry for entry in present if self._of == "parameters" or entry.role == "weight"]
        if not steered:
            return {}
        rates = [_rate(optimizer.param_groups[info.group_of[entry.order]]) for entry in steered]
        wanted, ratios = self._wanted(steered, gradients, rates, optimizer)
        keys = [entry.name if self._of == "parameters" else entry.layer for entry in steered]
        one = torch.ones((), dtype=wanted.dtype, device=wanted.device)
        old = torch.stack([self.scales_now.get(key, one).to(one) for key in keys])
        if self.lacks(keys):
            self.held += 1
            new = old
        else:
            self.remember(keys)
            new = torch.where(ratios.isfinite().all(), self._bounds.limit_each(old, wanted), old)
        by_layer = dict(zip(keys, new.unbind(), strict=True))
        self.scales_now.update(by_layer)
        self.record(keys, torch.stack([old, new, ratios], dim=1))
        if self._of == "parameters":
            return by_layer
        return {entry.name: by_layer[entry.layer] for entry in present if entry.layer in by_layer}

    def _wanted(
        self,
        steered: Sequence[ParameterEntry],
        gradients: Mapping[str, Tensor],
        rates: Sequence[Tensor | float],
        optimizer: Optimizer,
    ) -> tuple[Tensor, Tensor]:
        """The scales that meet the target, and the ratios that there would be without them."""
        assert self.engine is not None
        target = self.target_at(self.engine.clock.step)
        chosen = [gradients[entry.name] for entry in steered]
        weights = [entry.tensor.detach() for entry in steered]
        raw, sizes = self.norms(chosen), self.norms(weights)
        products = torch.stack([_product(w, g) for w, g in zip(weights, chosen, strict=True)]).to(sizes)
        cosines = (products / (raw * sizes)).clamp(-1, 1).nan_to_num(0.0)
        rate = _on_device(rates, sizes)
        # lr is below 0 where the loss is maximised: the update goes the other way.
        ratios = rate.abs() * self.gradient_norms(chosen, optimizer) / sizes
        towards = cosines * rate.sign()
        reach = (1 - target**2 * (1 - cosines.square())).sqrt() - target * towards
        wanted = target * reach / ((1 - target**2) * ratios)
        # What is zero cannot be scaled to anything; NaN goes on, and holds.
        nothing = (ratios == 0) | (sizes == 0) & raw.isfinite()
        return torch.where(nothing, 1.0, wanted), torch.where(nothing, 0.0, ratios)

    def propose(self, frame: Frame, noted: Any) -> Decision | None:
        """See `Controller.propose`."""
        assert isinstance(frame.values, Tensor)
        old, new, ratios = map(tuple, frame.values.t().tolist())
        if not all(map(math.isfinite, ratios)):
            self.held += 1
            return None
        mean = math.fsum(ratios) / len(ratios)
        cause = (
            f"the mean update-to-weight ratio would have been {mean:.3g}, and "
            f"{self.target_at(frame.step):.3g} is the target"
        )
        return Decision(TOPIC, old, new, cause, layers=frame.layers)


def _made_for(index: ModelIndex) -> list[Optimizer]:
    """The optimizers in memory that hold parameters of a model; PyTorch keeps no list of them.

    It takes some tenths of a second where there are millions of objects.
    """
    # By `type`, since some objects compute what they give out as their class.
    found = [thing for thing in gc.get_objects() if issubclass(type(thing), Optimizer)]
    return [optimizer for optimizer in found if any(map(index.owned_through, held_by(optimizer)))]


def _objection(optimizer: object) -> str | None:
    """Why an optimizer's update is not linear in its gradient."""
    what = None
    if not isinstance(optimizer, SGD) or type(optimizer).step is not SGD.step:
        what = f"{type(optimizer).__name__} is none"
    else:
        found = {key: group[key] for group in optimizer.param_groups for key in _NONLINEAR if group.get(key)}
        if found:
            what = f"this one has {', '.join(f'{key}={value!r}' for key, value in found.items())}"
    if what is None:
        return None
    return (
        "FixedRatio meets its target by scaling gradients, for which an update has to be linear in its "
        f"gradient, as plain SGD's is, and {what}: RatioLR(per_layer=True) scales the steps of any optimizer"
    )


_NONLINEAR: Final = ("momentum", "weight_decay", "nesterov")


def _rate(group: Mapping[str, Any]) -> Tensor | float:
    rate: Tensor | float = group["lr"]
    return -rate if group.get("maximize") else rate


def _on_device(numbers: Sequence[Tensor | float], like: Tensor) -> Tensor:
    """Numbers where another tensor is; copied from pinned memory, so that nothing waits."""
    if all(isinstance(number, float | int) for number in numbers):
        host = torch.tensor(numbers, dtype=like.dtype, pin_memory=like.is_cuda)
        return host.to(like.device, non_blocking=True)
    return torch.stack(
        [n.to(like).reshape(()) if isinstance(n, Tensor) else like.new_full((), n) for n in numbers]
    )


def _product(weight: Tensor, gradient: Tensor) -> Tensor:
    """The inner product of a weight and its gradient, as vectors of real numbers."""
    if gradient.layout is torch.sparse_coo:
        gradient = gradient.coalesce()
        weight, gradient = weight[gradient.indices().unbind()], gradient.values()
    if weight.is_complex():
        weight, gradient = torch.view_as_real(weight), torch.view_as_real(gradient)
    if weight.dtype in (torch.float16, torch.bfloat16):
        weight, gradient = weight.float(), gradient.float()
    # The cosine is a correction of the order of the target: no precision is lost by single precision.
    return torch.dot(weight.flatten(), gradient.flatten().to(weight.dtype)).float()
