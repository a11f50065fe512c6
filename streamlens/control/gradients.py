"""`GradientController`: acts on gradients, before an update consumes them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from reactivex.disposable import Disposable
from torch import Tensor
from torch.optim import Optimizer

from streamlens.control.controller import Controller
from streamlens.errors import StreamlensError

if TYPE_CHECKING:
    from streamlens.capture.model import ParameterEntry

__all__ = ["GradientController"]


class GradientController(Controller):
    """A controller that scales gradients as they stand when the update is called.

    It acts on the device, without lag and without waiting for it; what `weight_gradients` shows is what
    remains after it. Under a closure it acts when the first evaluation in a step has returned. An update
    that a GradScaler skips is none. The frames of the chain that it ends come after the update, as for
    any controller; `propose` and `apply` may leave them aside.

    Subclasses write `scales`. With `dry_run=True` its result is not applied.
    """

    __slots__ = ()

    @abstractmethod
    def scales(self, gradients: Mapping[str, Tensor], optimizer: Optimizer) -> Mapping[str, Tensor]:
        """By how much to multiply gradients.

        Args:
            gradients: What the update is about to consume, by full parameter name, on the device; not to
                be changed, nor kept.
            optimizer: Whose update it is.

        Returns:
            A tensor with one element for each parameter whose gradient is to be scaled.
        """

    def attached(self) -> None:
        """See `Controller.attached`.

        Raises:
            StreamlensError: The chain does not come from a lens.
        """
        engine = self.engine
        if engine is None:
            raise StreamlensError(
                f"{self.name} acts on gradients, and a stream without a model has none: end a chain of the "
                "lens that observe(model) returned in it"
            )
        interventions = engine.updates.interventions
        interventions.append(self._intervene)
        self.hold(Disposable(lambda: interventions.remove(self._intervene)))

    def _intervene(self, optimizer: Optimizer, entries: Sequence[ParameterEntry]) -> None:
        if self.standing_back:
            return
        gradients = {e.name: g.detach() for e in entries if (g := e.gradient) is not None}
        if not gradients:
            return
        with torch.no_grad():
            factors = self.scales(gradients, optimizer)
            if not self.dry_run:
                for name, factor in factors.items():
                    gradients[name].mul_(factor)
