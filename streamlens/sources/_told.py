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
Whole: TypeAlias = tuple[Selectors, list[Demand]]
"""Layers wanted of a topic as it is, and by whom."""
Reduced: TypeAlias = tuple[Selectors, Reduction, list[Demand]]
"""Layers of which a reduction is wanted, and by whom."""
Wishes: TypeAlias = tuple[list[Whole], list[Reduced]]
"""What is wanted of a topic."""

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
        self._plans: dict[str, Wishes] = {}
        self._planned: tuple[Demand, ...] = ()
        self._kept: dict[tuple[Selectors, tuple[str, ...]], tuple[str, ...]] = {}

    @property
    def silent(self) -> bool:
        """Whether nothing is to be emitted now."""
        return self.paused > 0 or self.closed or self.inert

    @property
    def next_step(self) -> int:
        """The first step of which nothing has been given yet."""
        return self.clock.step + int(self._begun)

    # -- the clock ---------------------------------------------------------------------------

    def open_step(self, step: int) -> None:
        """Go on to a step; what was open is over."""
        clock = self.clock
        if self._begun and step == clock.step:
            return
        self.close_step()
        if step > clock.step > 0 and self._marks:
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
        if self._marks:
            self.post_mark(Mark(MarkKind.CLOSED, closed, self.clock.epoch))

    def finish_update(self) -> None:
        """The open step has had its update, if nothing has said so yet."""
        if self._begun and not self._updated:
            self._updated.add("")
            self._deliver([], None, True)

    def end_epoch(self) -> None:
        """The epoch is over, and with it the open step."""
        self.close_step()
        self.announce_epoch()

    # -- delivery ----------------------------------------------------------------------------

    def give(self, frames: Sequence[Frame], lease: Lease | None = None) -> None:
        """Deliver frames of the open step.

        Args:
            frames: Of one source, in the order in which they are to come.
            lease: Under which their values are lent.
        """
        updated = False
        for frame in frames:
            if frame.kind is Kind.STEP and frame.source not in self._updated:
                self._updated.add(frame.source)
                updated = True
        self._deliver(frames, lease, updated)

    def _deliver(self, frames: Sequence[Frame], lease: Lease | None, updated: bool) -> None:
        """Deliver frames and, before them, that the open step has had an update."""
        clock = self.clock
        clock.updated = clock.updated or updated
        if self.silent:
            if lease is not None:
                lease.end()
            return
        out: list[tuple[Sequence[Demand], Frame]] = []
        due = self.due_now
        if due is not self._planned:
            self._planned, self._plans = due, {}
        for frame in frames:
            whole, reduced = self._plans.get(frame.topic) or self._plan(frame.topic)
            for selectors, demands in whole:
                selected = self._selected(selectors, frame) if selectors else frame
                if selected is not None and selected.layers:
                    out.append((demands, selected))
            if reduced:
                out += self._reduced(frame, reduced)
        mark = None
        if updated:
            # Made only where somebody listens: most replays go through many steps without.
            if self._marks:
                mark = Mark(MarkKind.UPDATE, clock.step, clock.epoch, clock.micro_step)
            if "update_finished" in self.topics:
                told = [d for d in due if "update_finished" in d.view.topics]
                if told:
                    out.append((told, self.frame("update_finished", _MODEL, _number(clock.step))))
        self.post_frames(out, lease, mark)

    def _plan(self, topic: str) -> Wishes:
        """What is wanted of a topic by the demands that are due."""
        grouped: dict[tuple[Selectors, Reduction | None], list[Demand]] = {}
        for demand in self._planned:
            # The clock tells of updates itself, also where what it told was stored.
            if topic in demand.view.topics and topic != "update_finished":
                key = (demand.view.selectors, demand.view.reduction)
                grouped.setdefault(key, []).append(demand)
        wishes = self._plans[topic] = (
            [(selectors, demands) for (selectors, r), demands in grouped.items() if r is None],
            [(selectors, r, demands) for (selectors, r), demands in grouped.items() if r is not None],
        )
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

    def _reduced(self, frame: Frame, wishes: Sequence[Reduced]) -> Iterable[tuple[Sequence[Demand], Frame]]:
        """Every reduction wanted of a frame, each computed once, statistics shared between them."""
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
