"""`Ownership`: the optimizers there are, what each owns of the model, and which make up a step."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Final

from torch.optim import Optimizer

from streamlens.capture.copies import held_by, strangers_among
from streamlens.capture.optimizers import OptimizerInfo
from streamlens.runtime import log
from streamlens.topics import Facet

if TYPE_CHECKING:
    from streamlens.capture.engine import Engine

__all__ = ["Ownership"]

_STRANGE: Final = 3
"""Steps of optimizers that own nothing of the model before that looks like an oversight."""


class Ownership:
    """Knows optimizers once they were given or have stepped; holds them weakly.

    Args:
        engine: The engine.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._infos: weakref.WeakKeyDictionary[Optimizer, OptimizerInfo] = weakref.WeakKeyDictionary()
        self._expected: weakref.WeakSet[Optimizer] | None = None
        self._stand_ins: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._serials = 0
        self._stranger: str | None = None
        self._strange = 0
        self._warned = False

    def expect(self, optimizers: Sequence[Optimizer]) -> None:
        """A step is complete once all of these have stepped."""
        self._expected = weakref.WeakSet(optimizers)
        model = self._engine.model
        strangers = strangers_among(model, optimizers, self._engine.copies) if model is not None else ()
        self._stand_ins = weakref.WeakSet(strangers)
        for optimizer in optimizers:
            self._info(optimizer).refresh(self._engine.index, force=True)
        self._share()

    def _info(self, optimizer: Optimizer) -> OptimizerInfo:
        info = self._infos.get(optimizer)
        if info is None:
            self._serials += 1
            info = self._infos[optimizer] = OptimizerInfo(optimizer, self._serials)
        return info

    def get(self, optimizer: Optimizer) -> OptimizerInfo | None:
        """What is known of an optimizer."""
        return self._infos.get(optimizer)

    def look(self, optimizer: Optimizer) -> bool:
        """Look at what an optimizer owns; whether that, or the model, has changed."""
        if self._engine.index.ripe:
            self._engine.rebuild_index()
        info = self._info(optimizer)
        if not info.refresh(self._engine.index):
            return False
        if info.unknown(self._engine.index) and self._engine.outdated:
            self._engine.rebuild_index()
            info.refresh(self._engine.index)
        self._share()
        return True

    def look_again(self) -> bool:
        """Look at every optimizer that owns something; whether one has been given more, or less."""
        changed = False
        for info in self.known:
            optimizer = info.optimizer
            changed |= optimizer is not None and self.look(optimizer)
        return changed

    def owns(self, optimizer: Optimizer) -> bool:
        """Whether an optimizer that was looked at updates the model."""
        info = self._infos[optimizer]
        return info.stands_in or bool(info.entries)

    def _share(self) -> None:
        """Those that were given and own nothing stand for what is nobody's; the first for all of it."""
        strangers = [
            info
            for optimizer in self._stand_ins
            if (info := self._info(optimizer)).stands_in or not info.entries
        ]
        if not strangers:
            return
        taken = {e.order for info in self._infos.values() if not info.stands_in for e in info.entries}
        rest = [entry for entry in self._engine.index.entries if entry.order not in taken]
        for info in sorted(strangers, key=lambda info: info.serial):
            info.stand_in_for(rest)
            rest = []

    @property
    def known(self) -> list[OptimizerInfo]:
        """The optimizers seen that own parameters of the model."""
        return [info for info in self._infos.values() if info.entries]

    def tells(self, facet: Facet | None) -> bool:
        """Whether some optimizer can tell this of parameters, or none is known yet."""
        known = self.known
        return not known or any(info.tells(facet) for info in known)

    def owned(self) -> set[int]:
        """The places of the parameters that belong to some optimizer."""
        return {e.order for info in self._infos.values() for e in info.entries}

    def alone(self, info: OptimizerInfo) -> bool:
        """Whether no other optimizer stands in for a part of the model."""
        return not any(other.stands_in for other in self._infos.values() if other is not info)

    def complete(self, stepped: Iterable[OptimizerInfo]) -> bool:
        """Whether all optimizers that make up a step have stepped."""
        if self._expected is None:
            return False
        ids = {id(info.optimizer) for info in stepped}
        return all(id(optimizer) in ids for optimizer in self._expected)

    def model_changed(self) -> None:
        """Parameters were replaced."""
        for info in self._infos.values():
            info.refresh(self._engine.index, force=True)
        self._share()

    def drop(self) -> None:
        """Forget every optimizer."""
        self._infos.clear()

    # -- strangers ---------------------------------------------------------------------------

    def stranger_steps(self, optimizer: Optimizer) -> None:
        """An optimizer that owns nothing of the model steps: for another one, or after a backward of ours."""
        if self._warned or self.known:
            return
        clock = self._engine.clock
        learning = [e.parameter for e in self._engine.index.entries if e.parameter.requires_grad]
        # As many elements as the model has are most likely copies of its own.
        alike = sum(t.numel() for t in held_by(optimizer)) == sum(p.numel() for p in learning)
        if clock.counted and not clock.in_pass:
            self._stranger = type(optimizer).__name__
            self._strange += _STRANGE if alike else 1
        elif alike and not clock.counted:
            # The model itself may never be called.
            self._engine.passes.suspect_parts()

    def updated(self) -> None:
        """The model's update has been seen after all."""
        self._stranger = None

    def warn_of_strangers(self) -> None:
        """The step is over: say once that its update was not seen."""
        if self._stranger is None or self._warned or self._strange < _STRANGE:
            return
        self._warned = True
        self._engine.counts["updates_unseen"] += 1
        log.warning(
            "%s trains, and %s steps, but that owns none of its parameters: no update is seen, and the clock "
            "stands still. If the optimizer owns copies (master weights, a flat buffer, a shard), pass "
            "observe(model, optimizers=[...]), with owners={name: tensor} to see gradients too; if not, call "
            "lens.step() after each update of the model.",
            self._engine.metadata()["model"] or "the model",
            self._stranger,
        )
