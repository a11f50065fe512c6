"""Who steers what: two controllers that pull at one thing are an error.

What is claimed belongs to whole optimizers: a controller is given an optimizer or none, and treats all
its parameter groups by one law. Two that would meet in a group meet in its optimizer, and two
optimizers have no group in common, so that a claim of an optimizer is one of each of its groups.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from streamlens.capture.engine import Engine
from streamlens.errors import StreamlensError

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from streamlens.control.controller import Controller
    from streamlens.runtime import Runtime

__all__ = ["claim", "release"]


@dataclass(frozen=True)
class _Claim:
    what: str
    controller: weakref.ref[Controller]
    runtime: weakref.ref[Runtime]
    optimizer: weakref.ref[Optimizer] | None

    def meets(self, other: _Claim) -> bool:
        """Whether another claim is of the same thing."""
        if self.what != other.what:
            return False
        if self.optimizer is not None and other.optimizer is not None:
            return self.optimizer() is other.optimizer()
        # Without a name it is all the optimizers of that run, also those that have yet to step.
        return self.runtime() is other.runtime() or not self._tensors().isdisjoint(other._tensors())

    def _tensors(self) -> set[int]:
        """The parameters that whatever is claimed updates."""
        if self.optimizer is not None:
            optimizer = self.optimizer()
            return (
                set() if optimizer is None else {id(p) for g in optimizer.param_groups for p in g["params"]}
            )
        runtime = self.runtime()
        model = runtime.model if isinstance(runtime, Engine) else None
        return set() if model is None else set(map(id, model.parameters()))


_claims: Final[list[_Claim]] = []


def claim(
    controller: Controller, what: str, runtime: Runtime, optimizer: Optimizer | None, remedy: str = ""
) -> None:
    """Note that a controller steers something.

    Args:
        controller: Who.
        what: What, such as `"learning rate"`.
        runtime: Of which run.
        optimizer: Of which optimizer; of all of the run's if None.
        remedy: How else this controller can do with another one that steers it.

    Raises:
        StreamlensError: Another controller steers it.
    """
    _claims[:] = [c for c in _claims if c.controller() is not None and c.runtime() is not None]
    reference = None if optimizer is None else weakref.ref(optimizer)
    mine = _Claim(what, weakref.ref(controller), weakref.ref(runtime), reference)
    for other in _claims:
        holder = other.controller()
        if holder is not None and holder is not controller and mine.meets(other):
            raise StreamlensError(
                f"{controller.name} would steer the {what} that {holder.name} steers already: "
                f"{remedy and remedy + ', '}dispose that one's subscription, give each an optimizer of its "
                "own (optimizer=), or pass dry_run=True"
            )
    _claims.append(mine)


def release(controller: Controller) -> None:
    """Forget what a controller steers."""
    _claims[:] = [c for c in _claims if c.controller() not in (None, controller)]
