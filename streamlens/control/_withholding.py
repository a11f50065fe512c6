"""Parameters that no update reaches: how freezing is done, whatever it is decided by."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch import nn
from torch.optim import LBFGS

from streamlens.capture.sharded import is_dtensor

if TYPE_CHECKING:
    from streamlens.capture.engine import Engine
    from streamlens.capture.model import ModelIndex, ParameterEntry

__all__ = ["Withholding"]


class Withholding:
    """Keeps updates, and where that is safe gradients, from parameters of a model.

    Parameters stay in their groups, so that schedulers and `optimizer.load_state_dict` see no difference;
    an optimizer leaves those without a gradient alone, with all that it keeps of them.

    Args:
        engine: The engine of the model.
        keep_gradients: Go on computing all gradients.
    """

    def __init__(self, engine: Engine, *, keep_gradients: bool) -> None:
        self._engine = engine
        self._keep = keep_gradients
        self._off: dict[str, nn.Parameter] = {}
        self._index: ModelIndex | None = None
        self._entries: dict[str, list[ParameterEntry]] = {}

    def obstacle(self) -> str | None:
        """Why updates cannot be kept from parameters, if so."""
        known = self._engine.updates.owners.known
        if self._engine.copies or any(info.stands_in for info in known):
            return "an optimizer owns copies of the parameters, and updates these whatever gradient they have"
        if any(isinstance(info.optimizer, LBFGS) for info in known):
            return "LBFGS moves all its parameters together, those without a gradient too"
        return None

    def entries_of(self, layer: str) -> list[ParameterEntry]:
        """The parameters of a layer and of the modules in it; one parameter, by its full name."""
        index = self._engine.index
        if self._index is not index:
            self._index, self._entries = index, {}
        if layer not in self._entries:
            name = layer.partition("@")[0]
            self._entries[layer] = [
                entry
                for entry in index.entries
                if name in (entry.name, entry.layer) or (name and entry.layer.startswith(f"{name}."))
            ]
        return self._entries[layer]

    def trained(self, layer: str) -> bool:
        """Whether a layer has a parameter that is trained, or would be but for this."""
        return any(e.parameter.requires_grad or e.name in self._off for e in self.entries_of(layer))

    def without_gradient(self, layers: Iterable[str]) -> list[str]:
        """The parameters of layers that need no gradient while they are frozen, by their full names.

        None where processes exchange gradients: `DistributedDataParallel` waits for that of every parameter,
        and a sharded one decides at the start what it gathers. Nor all of one optimizer, whose loss would
        have nothing to be differentiated by and whose GradScaler nothing to look at.
        """
        if self._keep or (dist.is_available() and dist.is_initialized()):
            return []
        entries = {entry.name: entry for layer in layers for entry in self.entries_of(layer)}
        free = {
            name
            for name, entry in entries.items()
            if (entry.parameter.requires_grad or name in self._off) and not is_dtensor(entry.parameter)
        }
        for info in self._engine.updates.owners.known:
            trained = {e.name for e in info.entries if e.parameter.requires_grad or e.name in self._off}
            if trained <= free:
                free -= trained
        return sorted(free)

    def disturbed(self) -> set[str]:
        """The names of parameters that somebody else has made trainable again."""
        return {name for name, parameter in self._off.items() if parameter.requires_grad}

    def freeze(self, layers: Iterable[str], without_gradient: Iterable[str]) -> None:
        """Keep updates from these layers, and from no others.

        Args:
            layers: The layers.
            without_gradient: Which of their parameters get no gradient either, by their full names.
        """
        off = set(without_gradient)
        entries = {entry.name: entry for layer in layers for entry in self.entries_of(layer)}
        for name in [name for name in self._off if name not in off or name not in entries]:
            self._off.pop(name).requires_grad_(True)
        for name in off & entries.keys():
            parameter = entries[name].parameter
            if parameter.requires_grad:
                parameter.requires_grad_(False)
                self._off[name] = parameter
                # What was computed already is of the batch before.
                parameter.grad = None
        withheld = self._engine.updates.interventions.withheld
        withheld.clear()
        withheld.update(entries)

    def release(self) -> None:
        """Everything is trained again that was."""
        self.freeze((), ())
