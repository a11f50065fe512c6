"""`ClipAt`: gradients are clipped where recent ones seldom go."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from streamlens.control.bounds import Bounds
from streamlens.control.decision import Decision
from streamlens.control.gradients import GradientController
from streamlens.operators._base import is_number, is_whole

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from streamlens.frame import Frame

__all__ = ["ClipAt"]

TOPIC: Final = "gradient_norm.action"


class ClipAt(GradientController):
    """Clips the gradient at a percentile of its own recent norms (AutoClip).

    Before the update of step k, with n_k the 2-norm of all gradients of an optimizer together, the limit is
    l_k = percentile(n_{k-w+1}, ..., n_k), linear between the two nearest, w being `window`; where n_k > l_k,
    all gradients are multiplied by l_k / n_k. The norms that count are those before clipping, so that
    clipping does not lower the limit. The first norm is its own percentile.

    It ends any chain of a lens, `lens.pipe(norm("weight_gradients")).subscribe(ClipAt(10))`: the gradients
    are its input, at every update, and `weight_gradients` shows what remains of them. After `layers(...)` the
    norm is that of the gradients of these layers, and they alone are clipped. Each optimizer has
    norms and a limit of its own. A step with a NaN or infinite gradient neither counts nor is clipped, and
    one in which a parameter lacks the gradient that it had before is clipped at the limit as it was.

    It costs a pass over the gradients, and another one where they are scaled; the norms stay on the device,
    `window` numbers, sorted once a step. Three numbers a step go to the host, without being waited for on
    CUDA, where an action is announced at the next update, under its own step. Actions are frames of
    `gradient_norm.action`, of the norm after clipping.

    Args:
        percentile: Which percentile of the norms is the limit, from 0 to 100; the paper found 10 to serve
            well in general.
        window: How many norms count; the paper takes all since the beginning.
        optimizer: Whose gradients; those of all optimizers of the observed model, each by itself, if None.
        min_norm: The least limit.
        max_norm: The greatest limit.
        slew_limit: The greatest factor between the limit of one step and that of the next.
        dry_run: Only say what would be done.

    Raises:
        TypeError: `optimizer` is none.
        ValueError: A number is out of its range.

    Reference:
        Seetharaman, Wichern, Pardo, Le Roux: AutoClip: Adaptive Gradient Clipping for Source Separation
        Networks, MLSP 2020.
    """

    __slots__ = ("_bounds", "_percentile", "_window")

    def __init__(
        self,
        percentile: float = 10.0,
        *,
        window: int = 1000,
        optimizer: Optimizer | None = None,
        min_norm: float = 0.0,
        max_norm: float = math.inf,
        slew_limit: float | None = None,
        dry_run: bool = False,
    ) -> None:
        super().__init__(optimizer, dry_run=dry_run)
        if not is_number(percentile) or not 0 <= percentile <= 100:
            raise ValueError(f"ClipAt(percentile={percentile!r}): it lies between 0 and 100, such as 10")
        if not is_whole(window) or window < 2:
            raise ValueError(f"ClipAt(window={window!r}): a percentile needs at least 2 norms")
        self._percentile, self._window = float(percentile), window
        self._bounds = Bounds(min_norm, max_norm, slew_limit)
        self.histories: dict[str, dict[str, Tensor]] = {}

    @property
    def action_topics(self) -> tuple[str, ...]:
        """The topic of its actions."""
        return (TOPIC,)

    def scales(self, gradients: Mapping[str, Tensor], optimizer: Optimizer) -> Mapping[str, Tensor]:
        """See `GradientController.scales`."""
        norm = self.gradient_norms(list(gradients.values()), optimizer).square().sum().sqrt()
        history = self._history(optimizer, norm)
        usable = norm.isfinite()
        if self.lacks(gradients):
            self.held += 1
        else:
            self.remember(list(gradients))
            self._learn(history, norm, usable)
        limit = history["limit"]
        factor = torch.where(usable & (norm > limit), limit / norm, torch.ones_like(norm))
        self.record(("",), torch.stack([norm, norm * factor, limit, history["count"].to(norm)])[None])
        return dict.fromkeys(gradients, factor)

    def _history(self, optimizer: Optimizer, norm: Tensor) -> dict[str, Tensor]:
        """The norms and the limit of an optimizer, which its first parameter's name tells from others."""
        assert self.engine is not None
        info = self.engine.updates.owners.get(optimizer)
        assert info is not None
        name = info.entries[0].name
        if name not in self.histories:
            self.histories[name] = {
                "norms": norm.new_full((self._window,), math.inf),
                "count": torch.zeros((), dtype=torch.int64, device=norm.device),
                "limit": norm.new_full((), math.inf),
            }
        history = self.histories[name]
        for key, value in history.items():
            # Loaded from a file it lies on the host.
            history[key] = value.to(norm.device)
        return history

    def _learn(self, history: dict[str, Tensor], norm: Tensor, usable: Tensor) -> None:
        """Take a norm in, and set the limit."""
        norms, count = history["norms"], history["count"]
        slot = (count % self._window).view(1)
        norms.index_copy_(0, slot, torch.where(usable, norm, norms.index_select(0, slot)[0]).view(1))
        count.add_(usable)
        # What is not filled is infinite, and so comes last.
        ordered = norms.sort().values
        place = (count.clamp(1, self._window) - 1) * (self._percentile / 100)
        low, high = (ordered.index_select(0, p.long().view(1))[0] for p in (place.floor(), place.ceil()))
        wanted = torch.where(high.isfinite(), low + (high - low) * (place - place.floor()), high)
        before = history["limit"]
        limit = self._bounds.limit_each(torch.where(before.isfinite(), before, wanted), wanted)
        history["limit"] = torch.where(usable, limit, before)

    def propose(self, frame: Frame, noted: Any) -> Decision | None:
        """See `Controller.propose`."""
        norm, remains, limit, count = (float(number) for number in frame[""])
        if not math.isfinite(norm):
            self.held += 1
            return None
        cause = (
            f"{limit:.3g} is the limit, by the {self._percentile:g}th percentile of the last "
            f"{min(int(count), self._window)} norms"
        )
        deed = f"clipped the gradient from a norm of {norm:.4g} to {remains:.4g}"
        return Decision(TOPIC, (norm,), (remains,), cause, deed=deed)
