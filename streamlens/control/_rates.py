"""The learning rates of a run's parameter groups, read and set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from streamlens.control.controller import Controller
from streamlens.control.decision import Decision
from streamlens.errors import StreamlensError

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from streamlens.capture.engine import Engine

__all__ = ["TOPIC", "RateController", "check_optimizer", "rated_groups", "set_rates"]

TOPIC = "learning_rate.action"


def check_optimizer(who: str, optimizer: object) -> None:
    """Raise for what has no parameter groups.

    Raises:
        TypeError: It is no optimizer.
    """
    if optimizer is not None and not hasattr(optimizer, "param_groups"):
        raise TypeError(f"{who}(optimizer=) takes an optimizer of torch.optim, got {optimizer!r}")


def rated_groups(engine: Engine | None, optimizer: Optimizer | None = None) -> list[dict[str, Any]]:
    """The parameter groups that have a learning rate, of one optimizer or of all of a model's."""
    if optimizer is None and engine is not None:
        known = sorted(engine.updates.owners.known, key=lambda info: info.serial)
        optimizers = [o for info in known if (o := info.optimizer) is not None]
    else:
        optimizers = [] if optimizer is None else [optimizer]
    return [group for optimizer in optimizers for group in optimizer.param_groups if "lr" in group]


def set_rates(groups: Sequence[dict[str, Any]], rates: Sequence[float]) -> None:
    """Set the rate of each group."""
    for group, rate in zip(groups, rates, strict=False):
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


class RateController(Controller):
    """A controller that sets learning rates, a factor for all groups or a rate for each.

    What it has set it finds again, or somebody else sets rates too: then it stands back.

    Args:
        optimizer: Whose rates; those of all optimizers of the observed model if None.
        dry_run: Only say what would be done.
    """

    __slots__ = ("_optimizer",)

    def __init__(self, optimizer: Optimizer | None, *, dry_run: bool) -> None:
        super().__init__(dry_run=dry_run)
        check_optimizer(self.name, optimizer)
        self._optimizer = optimizer
        self._written: list[float] | None = None
        self._base_rates: list[float] = []

    @property
    def action_topics(self) -> tuple[str, ...]:
        """The topic of its actions."""
        return (TOPIC,)

    def attached(self) -> None:
        """See `Controller.attached`.

        Raises:
            StreamlensError: Nothing tells the optimizer, or its rate is steered already.
        """
        if self._optimizer is None and self.engine is None:
            raise StreamlensError(
                f"{self.name} does not know whose learning rate to set, since its stream comes from no "
                f"observed model: pass {self.name}(optimizer=...)"
            )
        self.claim("learning rate", self._optimizer)

    def _groups(self) -> list[dict[str, Any]]:
        return rated_groups(self.engine, self._optimizer)

    def rates(self) -> list[float]:
        """The rate of each parameter group as it is.

        Raises:
            StreamlensError: No optimizer is known.
        """
        rates = [float(group["lr"]) for group in self._groups()]
        if not rates:
            raise StreamlensError(
                f"{self.name}: no optimizer of the model is known that has a learning rate; pass "
                f"{self.name}(optimizer=...)"
            )
        return rates

    def base_rates(self, rates: Sequence[float]) -> list[float]:
        """The rate that each group had when it was seen first, as `initial_lr` of schedulers is."""
        self._base_rates += rates[len(self._base_rates) :]
        return self._base_rates[: len(rates)]

    def undisturbed(self, rates: Sequence[float]) -> bool:
        """Whether the rates are those that were set here; if not, it stands back."""
        written = self._written
        if written is None or list(rates[: len(written)]) == written:
            return True
        was, now = next((a, b) for a, b in zip(written, rates, strict=False) if a != b)
        self.stand_back(
            f"it had set the learning rate to {was:.6g} and found {now:.6g}: a scheduler, or the training "
            "loop, sets it too; use one of them, or steer another optimizer with it"
        )
        return False

    def decision(self, old: Sequence[float], new: Sequence[float], cause: str) -> Decision:
        """A decision on the rates of all groups."""
        names = () if len(new) == 1 else tuple(f"group {place}" for place in range(len(new)))
        return Decision(TOPIC, tuple(old), tuple(new), cause, components=names)

    def apply(self, decision: Decision) -> None:
        """Set the rate of each group."""
        set_rates(self._groups(), decision.new)
        self._written = self.rates()
