"""`Join`: frames of several inputs, brought together by step and layer; without any Rx in it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor

from streamlens.chain import Mark, MarkKind
from streamlens.frame import Frame
from streamlens.operators._base import OperatorNode, frame_from_state, frame_state, layers_of, own
from streamlens.runtime import Runtime

__all__ = ["Join", "JoinInput"]

Key: TypeAlias = tuple[int, int, str]
"""(step, micro-step, source); 0 where inputs are joined by step alone, empty where sources are joined."""

_MODEL: Final = ("",)
_MOST_PENDING: Final = 1024
"""Steps that may wait for a partner."""
_MOST_COPIES: Final = 32
"""Steps that may wait where raw tensors had to be copied."""


class JoinInput:
    """What the join knows of one input.

    Attributes:
        runtime: Where its marks come from; None on a plain stream, which has none.
        closes: The mark after which nothing of a step comes.
    """

    __slots__ = ("closes", "runtime")

    def __init__(self, runtime: Runtime | None, closes: MarkKind = MarkKind.CLOSED) -> None:
        self.runtime = runtime
        self.closes = closes


class _Slot:
    """What has come of one step."""

    __slots__ = ("emitted", "held", "seen")

    def __init__(self, inputs: int) -> None:
        self.held: list[list[Frame]] = [[] for _ in range(inputs)]
        self.seen: list[tuple[str, ...]] = [()] * inputs
        self.emitted: tuple[str, ...] = ()

    def missing(self) -> int:
        """Layers that came on some input and were never complete."""
        names = {name for frames in self.held for frame in frames for name in frame.layers}
        left = names.difference(self.emitted)
        # The model's own frame stays for layers that may follow: it has served if anything was given.
        return len(left - {""} if self.emitted else left)


class Join(OperatorNode):
    """Holds frames until every input has given theirs of the same step.

    Args:
        runtime: Whose counters are kept.
        inputs: One entry an input.
        by_micro_step: Pair by (step, micro-step), not by step alone.
        lateness: How many steps back a frame may still come.
        one_burst: Raw frames of all inputs come in one delivery, so that they need not be copied.
    """

    def __init__(
        self,
        runtime: Runtime,
        inputs: Sequence[JoinInput],
        *,
        by_micro_step: bool,
        lateness: int = 0,
        one_burst: bool = False,
    ) -> None:
        super().__init__(runtime)
        self._inputs = inputs
        # What one source tells of several runs is joined run by run; different sources, with each other.
        first = inputs[0].runtime
        self._by_source = first is not None and all(entry.runtime is first for entry in inputs)
        self._by_micro_step = by_micro_step
        self._lateness = lateness
        self._one_burst = one_burst
        self._pending: dict[Key, _Slot] = {}
        self._passed: list[float] = [0] * len(inputs)
        """For each input, the step before which every step is complete."""
        self._high: float = 0
        self._low: float = 0
        self._lacking: list[set[Key]] = [set() for _ in inputs]
        """For each input, what waits without a part of it: all that its passing on can end."""

    def on_input(self, i: int, frame: Frame) -> tuple[Frame, ...] | None:
        """Take in a frame; gives one frame an input, of equal layers, where some became complete."""
        step = frame.step
        if step < self._passed[i]:
            self.count("late")
            return None
        out = self._enter(i, frame) if frame.layers else None
        self._pass(i, step - self._lateness)
        return out

    def _enter(self, i: int, frame: Frame) -> tuple[Frame, ...] | None:
        source = frame.source if self._by_source else ""
        key = (frame.step, frame.micro_step if self._by_micro_step else 0, source)
        slot = self._pending.get(key)
        if slot is None:
            if frame.step < self._high:
                # Another input has passed this step without giving its part.
                self.count("incomplete", len(frame))
                return None
            slot = self._pending[key] = _Slot(len(self._inputs))
            for lacking in self._lacking:
                lacking.add(key)
        self._lacking[i].discard(key)
        seen = slot.seen[i]
        if seen:
            known = frozenset(seen)
            new = tuple(name for name in frame.layers if name not in known)
            self.count("duplicate", len(frame) - len(new))
            if not new:
                return None
            frame = frame.select(new)
        slot.seen[i] = (*seen, *frame.layers) if seen else frame.layers
        held = slot.held[i]
        held.append(frame)
        out = self._match(slot) if all(slot.seen) else None
        if frame.borrowed and not self._one_burst and held and held[-1] is frame:
            held[-1] = own(frame)
            self._bound(_MOST_COPIES)
        else:
            self._bound(_MOST_PENDING)
        return out

    def _match(self, slot: _Slot) -> tuple[Frame, ...] | None:
        if self._one_burst and any(frame.expired for frames in slot.held for frame in frames):
            self._forget_expired(slot)
        base: tuple[str, ...] | None = None
        for frames in slot.held:
            if len(frames) != 1 or slot.emitted:
                return self._match_by_layer(slot)
            layers = frames[0].layers
            if layers == _MODEL:
                continue
            if base is None:
                base = layers
            elif layers is not base and layers != base:
                return self._match_by_layer(slot)
        out = tuple(frames[0] for frames in slot.held)
        self._emitted(slot, base or _MODEL)
        return out

    def _match_by_layer(self, slot: _Slot) -> tuple[Frame, ...] | None:
        if not all(slot.held):
            return None
        keyed = [i for i, seen in enumerate(slot.seen) if seen != _MODEL]
        found = [{n for frame in slot.held[i] for n in frame.layers}.difference(slot.emitted) for i in keyed]
        if keyed:
            order = layers_of(slot.held[keyed[0]])
            ready = tuple(name for name in order if all(name in names for names in found))
        else:
            ready = () if slot.emitted else _MODEL
        if not ready:
            return None
        out = tuple(
            _gathered(frames, ready) if i in keyed else frames[0] for i, frames in enumerate(slot.held)
        )
        self._emitted(slot, ready)
        return out

    def _emitted(self, slot: _Slot, layers: tuple[str, ...]) -> None:
        slot.emitted = slot.emitted + layers if slot.emitted else layers
        for i, frames in enumerate(slot.held):
            if slot.seen[i] == _MODEL and layers != _MODEL:
                continue  # it joins the layers that follow, too
            if len(frames) == 1 and frames[0].layers == layers:
                frames.clear()
            elif frames:
                given = frozenset(slot.emitted)
                frames[:] = [frame for frame in frames if not given.issuperset(frame.layers)]

    def _forget_expired(self, slot: _Slot) -> None:
        """Let go of gradients that their optimizer has overwritten; from now on they are copied."""
        self._one_burst = False
        for frames in slot.held:
            self.count("incomplete", sum(len(frame) for frame in frames if frame.expired))
            frames[:] = [frame for frame in frames if not frame.expired]

    def _pass(self, i: int, step: float) -> None:
        """Every earlier step is complete on an input; let go of what can give nothing more."""
        passed = self._passed
        if step <= passed[i]:
            return
        passed[i] = step
        self._high = high = max(self._high, step)
        low = min(passed)
        at_risk = self._pending if low > self._low else self._lacking[i]
        self._low = low
        over = [k for k in at_risk if k[0] < high and self._over(k[0], self._pending[k], low)]
        for key in over:
            self.count("incomplete", self._forget(key).missing())

    def _forget(self, key: Key) -> _Slot:
        for lacking in self._lacking:
            lacking.discard(key)
        return self._pending.pop(key)

    def _over(self, step: int, slot: _Slot, low: float) -> bool:
        if step < low:
            return True
        return any(not seen and step < passed for seen, passed in zip(slot.seen, self._passed, strict=True))

    def _bound(self, most: int) -> None:
        while len(self._pending) > most:
            oldest = min(self._pending)
            self.count("incomplete", self._forget(oldest).missing())
            self._passed = [max(passed, oldest[0] + 1) for passed in self._passed]
            self._high = max(self._high, oldest[0] + 1)
            # What is left is of later steps: there is nothing to look for below the new mark.
            self._low = min(self._passed)

    def on_mark_of(self, runtime: Runtime, mark: Mark) -> None:
        """A step or an epoch is over on every input that comes from a runtime."""
        for i, entry in enumerate(self._inputs):
            if entry.runtime is runtime and entry.closes is mark.kind:
                self._pass(i, mark.step + 1 - self._lateness)

    def on_input_completed(self, i: int) -> None:
        """An input has ended."""
        self._pass(i, math.inf)

    @property
    def ended(self) -> bool:
        """Whether nothing can follow: an input has ended, and nothing of it waits."""
        if self._high < math.inf:
            return False
        over = [i for i, passed in enumerate(self._passed) if passed == math.inf]
        return any(not any(slot.held[i] for slot in self._pending.values()) for i in over)

    def state_dict(self) -> dict[str, Any]:
        """Watermarks and what is waiting."""
        return {
            "passed": list(self._passed),
            "pending": [
                {
                    "key": list(key),
                    "seen": [list(seen) for seen in slot.seen],
                    "emitted": list(slot.emitted),
                    "held": [[frame_state(f) for f in frames if not f.expired] for frames in slot.held],
                }
                for key, slot in self._pending.items()
            ],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        self._passed = list(state["passed"])
        self._high = max(state["passed"])
        self._pending = {}
        for saved in state["pending"]:
            step, micro_step, source = saved["key"]
            slot = self._pending[step, micro_step, source] = _Slot(len(self._inputs))
            slot.seen = [tuple(seen) for seen in saved["seen"]]
            slot.emitted = tuple(saved["emitted"])
            slot.held = [[frame_from_state(f) for f in frames] for frames in saved["held"]]
        self._low = min(self._passed)
        self._lacking = [
            {key for key, slot in self._pending.items() if not slot.seen[i]} for i in range(len(self._inputs))
        ]


def _gathered(frames: Sequence[Frame], layers: tuple[str, ...]) -> Frame:
    """One frame with the layers wanted, from one or several that have them."""
    for frame in frames:
        if all(name in frame for name in layers):
            return frame.select(layers)
    parts = [own(frame) for frame in frames]
    values = {name: value for frame in parts for name, value in frame.items()}
    picked = [values[name] for name in layers]
    stacked: Tensor | tuple[Tensor, ...] = torch.stack(picked) if parts[0].stacked else tuple(picked)
    return parts[0].replace(layers=layers, values=stacked)
