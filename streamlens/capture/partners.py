"""`Partners`: optimizers that step together, whose parts of one topic make one frame."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from streamlens.capture.interned import Interned
from streamlens.capture.optimizers import OptimizerInfo
from streamlens.capture.plan import Output
from streamlens.frame import Frame

if TYPE_CHECKING:
    from streamlens.capture.engine import Engine
    from streamlens.capture.view import Demand

__all__ = ["Partners", "Reduced"]

_PATIENCE: Final = 16
"""Steps after a resume in which partners from before may still turn up."""

Reduced = tuple[Output, tuple[Any, ...], Tensor]
"""A reduction's values: what was asked for, the parameters that have it, and the values."""


@dataclass(eq=False)
class _Part:
    """What one optimizer contributed to a reduced frame that waits for its partners."""

    output: Output
    keys: tuple[Any, ...]
    layers: tuple[str, ...]
    values: Tensor


class Partners:
    """Who has stepped in the open step, and what waits for those that usually step with them.

    Optimizers that have stepped together in one step are partners from then on: a reduced frame waits
    for them, until the step closes. Others add a second frame with layers of their own.

    Attributes:
        stepped: The optimizers that have stepped in the open step, in order.
        interned: Makes equal layers one object.
        again: Whether the update under way follows another one of the same forward and parameters.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.stepped: list[OptimizerInfo] = []
        self._known: dict[int, set[int]] = {}
        self._infos: dict[int, OptimizerInfo] = {}
        self._restored: dict[frozenset[str], set[frozenset[str]]] = {}
        self._patience = 0
        self._held: dict[Any, list[_Part]] = {}
        self.interned = Interned()
        self.again = False

    def update_begins(self, info: OptimizerInfo, closure: bool = False) -> None:
        """Close the open step if an update that begins now belongs to one of its own.

        Args:
            info: The optimizer.
            closure: Whether the update brings its forward and backward along.
        """
        # A clock that was taken over knows that the step had its update, but not whose.
        another = self._engine.clock.updated and (closure or not self.stepped)
        self.again = info in self.stepped or any(map(info.shares, self.stepped))
        if another or self.again:
            self.again &= self._engine.clock.counted
            self._engine.close_step()

    def gather(
        self, reduced: Iterable[Reduced], alive: Callable[[], Iterable[OptimizerInfo]]
    ) -> list[tuple[Sequence[Demand], Frame]]:
        """The frames that can be emitted now.

        Args:
            reduced: What the optimizer that has just stepped contributes.
            alive: Gives the optimizers that still exist.
        """
        waits = self._missing(alive)
        if not self._held and not waits:
            return [
                (output.demands, self._frame(output, self._layers(output, keys), values))
                for output, keys, values in reduced
            ]
        for output, keys, values in reduced:
            part = _Part(output, keys, self._layers(output, keys), values)
            self._held.setdefault(output.group, []).append(part)
        # The last partner may have no part in a frame that has waited for it.
        return [] if waits else self._release()

    def _release(self) -> list[tuple[Sequence[Demand], Frame]]:
        held, self._held = self._held, {}
        return [(parts[0].output.demands, self._merge(parts)) for parts in held.values()]

    def close_step(self) -> list[tuple[Sequence[Demand], Frame]]:
        """The step closes: what still waited comes without the layers that nobody updated."""
        frames = self._release()
        if len(self.stepped) > 1:
            self._join(self.stepped)
        if self._restored and self.stepped:
            self._patience -= 1
            if not self._patience:
                self._restored.clear()
        self.stepped = []
        return frames

    def _join(self, infos: Iterable[OptimizerInfo]) -> None:
        self._infos.update({info.serial: info for info in infos})
        serials = {info.serial for info in infos}
        for serial in serials:
            self._known.setdefault(serial, set()).update(serials - {serial})

    def drop(self) -> None:
        """Let go of what waits, and of every optimizer."""
        self._held.clear()
        self._known.clear()
        self._infos.clear()
        self.stepped = []

    def _missing(self, alive: Callable[[], Iterable[OptimizerInfo]]) -> bool:
        """Whether a partner of those that have stepped is still to come."""
        if self._restored and self._recognise(alive):
            return True
        if not self._known:
            return False
        stepped = {info.serial for info in self.stepped}
        partners: set[int] = set().union(*(self._known.get(s, set()) for s in stepped))
        return bool((partners - stepped) & {info.serial for info in alive()})

    def _recognise(self, alive: Callable[[], Iterable[OptimizerInfo]]) -> bool:
        """Find those that were partners before a resume; whether one of them was not seen yet."""
        by_names = {_names(info): info for info in alive()}
        unseen = False
        for info in self.stepped:
            for names in self._restored.get(_names(info), ()):
                if names in by_names:
                    self._join((info, by_names[names]))
                else:
                    unseen = True
        return unseen

    def state_dict(self) -> dict[str, Any]:
        """Who are partners, told by the names of the parameters that they own."""
        together = {names: set(others) for names, others in self._restored.items()}
        for serial, others in self._known.items():
            known = together.setdefault(_names(self._infos[serial]), set())
            known.update(_names(self._infos[other]) for other in others)
        now = {_names(info) for info in self.stepped}
        for names in now if len(now) > 1 else ():
            together.setdefault(names, set()).update(now - {names})
        place = {names: i for i, names in enumerate(together)}
        return {
            "parameters": [sorted(names) for names in together],
            "partners": [sorted(place[n] for n in others if n in place) for others in together.values()],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Wait for these partners too, until they were seen or a few steps have passed."""
        # What has stepped and what waits belong to a step that is no longer the open one.
        self.stepped = []
        self._held.clear()
        optimizers = [frozenset(names) for names in state["parameters"]]
        self._restored = {
            names: {optimizers[i] for i in others}
            for names, others in zip(optimizers, state["partners"], strict=True)
        }
        self._patience = _PATIENCE

    def _merge(self, parts: Sequence[_Part]) -> Frame:
        first = parts[0]
        if len(parts) == 1:
            return self._frame(first.output, first.layers, first.values)
        # Parts come in the order of the optimizers' steps; layers go in model order.
        entries = [(k, layer) for p in parts for k, layer in zip(p.keys, p.layers, strict=True)]
        order = sorted(range(len(entries)), key=lambda i: entries[i][0])
        values = torch.cat([p.values for p in parts])
        if order != list(range(len(order))):
            values = torch.stack([values[i] for i in order])
        return self._frame(first.output, self.interned(entries[i][1] for i in order), values)

    def _layers(self, output: Output, keys: tuple[Any, ...]) -> tuple[str, ...]:
        if keys == output.orders:
            return output.keys
        place = dict(zip(output.orders, output.keys, strict=True))
        return self.interned(place[k] for k in keys)

    def _frame(self, output: Output, layers: tuple[str, ...], values: Tensor) -> Frame:
        name = output.spec.name + (f".{output.reduction.name}" if output.reduction is not None else "")
        components = output.reduction.components if output.reduction is not None else ()
        return self._engine.frame(name, layers, values, components=components)


def _names(info: OptimizerInfo) -> frozenset[str]:
    """What tells an optimizer across processes: the parameters that it owns."""
    return frozenset(entry.name for entry in info.entries)
