"""`ToldSource`: a source that is given its frames, and answers its subscribers from them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final, TypeAlias

import torch
from torch import Tensor

from streamlens.capture.source import Source
from streamlens.capture.table import Needs, Table
from streamlens.capture.view import Demand
from streamlens.chain import Mark, MarkKind
from streamlens.frame import Frame, Kind, Lease
from streamlens.layers import LayerSelector
from streamlens.reductions import Reduction

__all__ = ["ToldSource"]

Selectors: TypeAlias = tuple[LayerSelector, ...]
Wish: TypeAlias = tuple[Selectors, Reduction | None, list[Demand]]
"""What of a topic is wanted, and by whom."""

_MODEL: Final = ("",)
_MOST_KEPT: Final = 1024
"""Selections of layers that are remembered."""


class ToldSource(Source):
    """Delivers frames that it is given, in order of their steps, with the marks that belong to them.

    An update is announced with the first frame of a step that comes once a step, or when the step
    closes without one; a step closes when a later one begins.
    """

    def __init__(self, name: str = "", on_error: str = "report") -> None:
        super().__init__(name, on_error)
        self._begun = False
        self._updated: set[str] = set()
        self._plans: dict[str, list[Wish]] = {}
        self._planned: tuple[Demand, ...] = ()
        self._kept: dict[tuple[Selectors, tuple[str, ...]], tuple[str, ...]] = {}

    @property
    def silent(self) -> bool:
        """Whether nothing is to be emitted now."""
        return self.closed or self.inert or self.paused > 0

    # -- the clock ---------------------------------------------------------------------------

    def open_step(self, step: int) -> None:
        """Go on to a step; what was open is over."""
        clock = self.clock
        if self._begun and step == clock.step:
            return
        self.close_step()
        if step > clock.step > 0:
            self.post_mark(Mark(MarkKind.CLOSED, step - 1, clock.epoch))
        clock.step = step
        self._begun = True

    def close_step(self) -> None:
        """Nothing more of the open step will come."""
        if not self._begun:
            return
        self.finish_update()
        self._begun = False
        self._updated.clear()
        closed = self.clock.close_step()
        self.post_mark(Mark(MarkKind.CLOSED, closed, self.clock.epoch))

    def finish_update(self) -> None:
        """The open step has had its update, if nothing has said so yet."""
        if self._begun and not self._updated:
            self._deliver([], None, self._update(""))

    def end_epoch(self) -> None:
        """The epoch is over, and with it the open step."""
        self.close_step()
        self.announce_epoch()

    def _update(self, source: str) -> Mark:
        self._updated.add(source)
        clock = self.clock
        clock.updated = True
        return Mark(MarkKind.UPDATE, clock.step, clock.epoch, clock.micro_step)

    # -- delivery ----------------------------------------------------------------------------

    def give(self, frames: Sequence[Frame], lease: Lease | None = None) -> None:
        """Deliver frames of the open step.

        Args:
            frames: Of one source, in the order in which they are to come.
            lease: Under which their values are lent.
        """
        mark = None
        for frame in frames:
            if frame.kind is Kind.STEP and frame.source not in self._updated:
                mark = self._update(frame.source)
        self._deliver(frames, lease, mark)

    def _deliver(self, frames: Sequence[Frame], lease: Lease | None, mark: Mark | None) -> None:
        if self.silent:
            if lease is not None:
                lease.end()
            return
        out: list[tuple[Sequence[Demand], Frame]] = []
        for frame in frames:
            for selectors, reduction, demands in self._wishes(frame.topic):
                if reduction is None:
                    selected = self._selected(selectors, frame)
                    if selected is not None:
                        out.append((demands, selected))
            out += self._reduced(frame)
        if mark is not None and "update_finished" in self.topics:
            due = [d for d in self.due_now if "update_finished" in d.view.topics]
            if due:
                out.append((due, self.frame("update_finished", _MODEL, _number(mark.step))))
        self.post_frames(out, lease, mark)

    def _wishes(self, topic: str) -> list[Wish]:
        due = self.due_now
        if due is not self._planned:
            self._planned = due
            self._plans = {}
        wishes = self._plans.get(topic)
        if wishes is None:
            grouped: dict[tuple[Selectors, Reduction | None], list[Demand]] = {}
            for demand in due:
                if topic in demand.view.topics:
                    key = (demand.view.selectors, demand.view.reduction)
                    grouped.setdefault(key, []).append(demand)
            wishes = self._plans[topic] = [(*key, demands) for key, demands in grouped.items()]
        return wishes

    def _selected(self, selectors: Selectors, frame: Frame) -> Frame | None:
        names = self._names(selectors, frame.layers)
        if not names:
            return None
        return frame if names is frame.layers else frame.select(names)

    def _names(self, selectors: Selectors, layers: tuple[str, ...]) -> tuple[str, ...]:
        """The layers that all selectors agree on; what is of the model itself is not selected by layer."""
        if not selectors or layers == _MODEL:
            return layers
        kept = self._kept.get((selectors, layers))
        if kept is None:
            kept = tuple(n for n in layers if all(matches(s, n) for s in selectors))
            if len(self._kept) >= _MOST_KEPT:
                self._kept.clear()
            self._kept[selectors, layers] = kept
        return layers if len(kept) == len(layers) else kept

    def _reduced(self, frame: Frame) -> Iterable[tuple[Sequence[Demand], Frame]]:
        """Every reduction wanted of a frame, each computed once, statistics shared between them."""
        wishes = [(s, r, demands) for s, r, demands in self._wishes(frame.topic) if r is not None]
        if not wishes:
            return
        values = dict(frame.items())
        wanted = {s: self._names(s, frame.layers) for s, _, _ in wishes}
        together = frozenset(name for names in wanted.values() for name in names)
        union = tuple(name for name in frame.layers if name in together)
        needs = Needs.of(r for _, r, _ in wishes)

        def failed(layer: object, error: Exception) -> None:
            self.report(error, f"a reduction of {frame.topic!r} of layer {layer!r}")

        table = Table()
        table.measure_many(union, [values[name] for name in union], needs, failed)
        for selectors, reduction, demands in wishes:
            topic = f"{frame.topic}.{reduction.name}"
            found = self.attempt(topic, table.finish, reduction, wanted[selectors])
            if found is not None:
                names, result = found
                yield (
                    demands,
                    frame.replace(
                        topic=topic,
                        layers=tuple(map(str, names)),
                        values=result,
                        components=reduction.components,
                    ),
                )


def matches(selector: LayerSelector, name: str) -> bool:
    """Whether a selector without classes matches a layer, or the module that it belongs to."""
    module = name.partition("@")[0]
    return selector.matches_name(name) or selector.matches_name(module)


def _number(value: float) -> Tensor:
    return torch.tensor([float(value)])
