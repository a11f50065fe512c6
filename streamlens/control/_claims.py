"""Who steers what: two controllers that pull at one thing are an error."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

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

    def meets(self, what: str, runtime: Runtime, optimizer: Optimizer | None) -> bool:
        """Whether another claim would be of the same thing."""
        if self.what != what:
            return False
        if self.optimizer is None or optimizer is None:
            # Without a name it is all the optimizers of that run.
            return self.runtime() is runtime
        return self.optimizer() is optimizer


_claims: Final[list[_Claim]] = []


def claim(controller: Controller, what: str, runtime: Runtime, optimizer: Optimizer | None) -> None:
    """Note that a controller steers something.

    Args:
        controller: Who.
        what: What, such as `"learning rate"`.
        runtime: Of which run.
        optimizer: Of which optimizer; of all of the run's if None.

    Raises:
        StreamlensError: Another controller steers it.
    """
    _claims[:] = [c for c in _claims if c.controller() is not None and c.runtime() is not None]
    for other in _claims:
        holder = other.controller()
        if holder is not None and holder is not controller and other.meets(what, runtime, optimizer):
            raise StreamlensError(
                f"{controller.name} would steer the {what} that {holder.name} steers already: dispose that "
                "one's subscription, give each an optimizer of its own (optimizer=), or pass dry_run=True"
            )
    reference = None if optimizer is None else weakref.ref(optimizer)
    _claims.append(_Claim(what, weakref.ref(controller), weakref.ref(runtime), reference))


def release(controller: Controller) -> None:
    """Forget what a controller steers."""
    _claims[:] = [c for c in _claims if c.controller() not in (None, controller)]
