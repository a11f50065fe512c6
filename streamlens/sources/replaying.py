"""`replay`: recorded runs as a lens."""

from __future__ import annotations

import heapq
import math
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace as with_fields
from pathlib import Path
from typing import Any, TypeAlias

from streamlens.capture.clock import Clock
from streamlens.capture.view import View
from streamlens.errors import LayerNotFoundError, StreamlensError, UnknownTopicError, did_you_mean
from streamlens.frame import Frame, Kind
from streamlens.layers import LayerSelector
from streamlens.lens import Lens
from streamlens.reductions import Reduction
from streamlens.runs import Run, read_run
from streamlens.runs.codec import Layout
from streamlens.runs.stepwise import Stored, first_step, layouts_of, stepwise
from streamlens.session import Session
from streamlens.sources._named import Named, names_of
from streamlens.sources._told import ToldSource, matches
from streamlens.topics import Phase, TopicSpec, topic_spec

__all__ = ["Replay", "replay"]

Recorded: TypeAlias = str | os.PathLike[str] | Run
"""A run store's file, or a run of one."""

_OF_THE_CLOCK = ("epoch_finished", "update_finished")


class Replay(Lens):
    """Recorded runs as a lens; `replay()` makes one."""

    def __init__(self, source: _ReplaySource) -> None:
        session = Session(source, None)
        source.sessions.add(session)
        super().__init__(source, session)
        self._replay = source

    def play(self) -> bool:
        """Give everything that is subscribed the whole of the runs, then complete it.

        It returns when that is done; what is subscribed later can be played later.

        Returns:
            Whether every sink has written what it was given.

        Raises:
            ClosedLensError: The replay is closed.
            RunStoreError: The file is damaged.
        """
        self._check_open()
        return self._replay.play()


def replay(
    path: Recorded | Sequence[Recorded],
    run: str | int | None = None,
    *,
    name: str = "",
    speed: float | None = None,
    on_error: str = "report",
) -> Replay:
    """A recorded run as a lens: operators, sinks and rules run over it as they would have run live.

    It has the topics that the run stored, under their names; a reduction of a topic, such as
    `norm("weights")` in `uw_ratio()`, is taken from what was stored of it (`weights.norm2`), or computed
    if the topic was stored raw. Steps, updates and epochs are announced as in the run. Nothing is read
    before `play()`, and only topics that somebody has subscribed.

    Controllers say over it what they would have done: they need `dry_run=True`, and those that set a
    learning rate an optimizer that stands for the run's, such as
    `RatioLR(torch.optim.SGD([torch.zeros(1)], lr=0.1), dry_run=True)`.

    Several runs are played side by side, step by step, each labelled in `frame.source` (by its name,
    else by its file); operators keep them apart.

    What a named lens stored (`observe(G, name="G")`) has its name in front, as in other sinks: `G/loss`.
    `replay(path, name="G")` is that lens again, whose topics and layers are as its model has them.

    What modules tell of a layer is not stored: where raw outputs of convolutions over sequences were, name
    their dimension to metrics that count units, such as `dead_fraction(window=10, unit_dim=1)`.

    Args:
        path: The file that a `RunStore` wrote, a folder with one in it, what `read_run` gave, or several of
            these.
        run: Which run of the file or folder, as for `read_run`.
        name: The name of the lens whose frames are wanted; everything as it was stored by default.
        speed: As many times as fast as the run was recorded; as fast as it goes if None.
        on_error: `"report"` contains what fails in chains; `"raise"` lets it through, for tests.

    Returns:
        The lens; its `play()` plays it.

    Raises:
        RunStoreError: There is no run store at the path, or it has no such run.
        ValueError: No run is given, a name that no lens of theirs had, a speed that is not above 0, or
            another `on_error`.

    Example:
        >>> old = replay("runs/first/run.db")
        >>> old.pipe(topic("uw_ratio"), ema(0.9)).subscribe(Table())
        >>> old.play()
    """
    if speed is not None and not (isinstance(speed, int | float) and speed > 0 and math.isfinite(speed)):
        raise ValueError(f"replay(speed={speed!r}): a number above 0, such as 10 for ten times as fast")
    if on_error not in ("report", "raise"):
        raise ValueError(f"replay(on_error={on_error!r}): allowed are 'report' and 'raise'")
    single = isinstance(path, str | os.PathLike | Run)
    entries: list[Recorded] = [path] if single else list(path)  # type: ignore[list-item, arg-type]
    if not entries:
        raise ValueError("replay() needs a run store's file, or several")
    runs = [entry if isinstance(entry, Run) else read_run(entry, run) for entry in entries]
    return Replay(_ReplaySource(runs, Named(name), speed, on_error))


class _ReplaySource(ToldSource):
    recorded = True
    taken_by = "read from the run store"
    remedy = "the run did not store it; subscribe what gives it to the run store while training"
    closed_message = "this replay is closed: call streamlens.replay(path) again for a new one"

    def __init__(self, runs: Sequence[Run], lens: Named, speed: float | None, on_error: str) -> None:
        super().__init__(lens.name, on_error)
        self._runs = runs
        self._lens = lens
        self._labels = _labels(runs) if len(runs) > 1 else ("",)
        self._speed = speed
        self._layouts: dict[str, tuple[Layout, ...]] = {}
        self._lens_names: tuple[str, ...] = ()
        for run in runs:
            stored = layouts_of(run)
            self._lens_names += tuple(n for n in names_of(stored) if n not in self._lens_names)
            for topic, layouts in lens.own(stored).items():
                self._layouts[topic] = self._layouts.get(topic, ()) + layouts
        if lens.name and not self._layouts:
            there = ", ".join(map(repr, self._lens_names)) or "none that has a name"
            raise ValueError(
                f"replay(name={lens.name!r}): no lens of that name stored anything; lenses: {there}"
            )
        if self._lens_names and not lens.name:
            self.remedy = (
                f"named lenses stored what the run has; pass {self._by_name(self._lens_names)} to replay()"
            )
        self._rewind()

    @property
    def title(self) -> str:
        """`replay()`, with what is replayed."""
        return f"replay({', '.join(repr(run.path.name) for run in self._runs)})"

    def metadata(self) -> dict[str, Any]:
        """What was stored along with the run, or with each."""
        found = [dict(run.metadata) for run in self._runs]
        return found[0] if len(found) == 1 else dict(zip(self._labels, found, strict=True))

    # -- what it can give --------------------------------------------------------------------

    @property
    def known_topics(self) -> tuple[str, ...]:
        """The topics that were stored, and those that the clock tells."""
        own = (*_OF_THE_CLOCK, *self.user_topics, *self.derived_topics)
        return tuple(dict.fromkeys((*self._layouts, *own)))

    def check_topic(self, topic: str) -> TopicSpec | None:
        """What is known of a topic.

        Raises:
            UnknownTopicError: It was not stored, nor any reduction of it.
        """
        if topic in self.known_topics or self._has(topic):
            return self.spec(topic)
        hint = self._of_a_name(topic) or did_you_mean(str(topic), self.known_topics)
        raise UnknownTopicError(
            f"unknown topic {topic!r}: {self.title} did not store it. {hint}{' ' if hint else ''}"
            f"Topics: {', '.join(self.known_topics)}"
        )

    def _of_a_name(self, topic: object) -> str:
        """How to get at a topic that a named lens stored, or `""`."""
        lenses = [n for n in self._lens_names if not self.name and self._has(f"{n}/{topic}")]
        return f"Pass {self._by_name(lenses)} to replay()." if lenses else ""

    @staticmethod
    def _by_name(names: Sequence[str]) -> str:
        return " or ".join(f"name={name!r}" for name in names)

    def spec(self, topic: str) -> TopicSpec | None:
        """What is known of a topic from how it was stored."""
        if topic in _OF_THE_CLOCK:
            return topic_spec(topic)
        forms = (topic,) if topic in self._layouts else self._forms(topic)
        layouts = [layout for form in forms for layout in self._layouts[form]]
        if not layouts:
            return None
        raw = topic not in self._layouts or not any(layout.stacked for layout in layouts)
        kind = layouts[0].kind if len({layout.kind for layout in layouts}) == 1 else Kind.EVENT
        return TopicSpec(topic, Phase.USER, kind, raw=raw)

    def _has(self, topic: str) -> bool:
        return topic in self._layouts or bool(self._forms(topic))

    def _forms(self, topic: str) -> tuple[str, ...]:
        """The reductions of a topic that was not stored itself."""
        return tuple(t for t in self._layouts if isinstance(topic, str) and t.rpartition(".")[0] == topic)

    def reduced(self, view: View, reduction: Reduction) -> View:
        """The stored topic that a reduction gave, or the reduction of what was stored raw.

        Raises:
            UnknownTopicError: The run stored neither.
        """
        names = {topic: f"{topic}.{reduction.name}" for topic in view.topics}
        if all(self._stored_as(name, reduction) for name in names.values()):
            return with_fields(view, topics=tuple(names.values()))
        for topic in view.topics:
            if topic not in self._layouts:
                raise UnknownTopicError(
                    f"{names[topic]!r} cannot be replayed: {self.title} stored of {topic!r} only "
                    f"{', '.join(self._forms(topic))}. Subscribe {reduction.name} of {topic!r} to the run "
                    f"store while training"
                )
        return with_fields(view, reduction=reduction)

    def _stored_as(self, name: str, reduction: Reduction) -> bool:
        layouts = self._layouts.get(name, ())
        return bool(layouts) and all(layout.components == reduction.components for layout in layouts)

    def check_view(self, view: View) -> None:
        """Raise for a topic of which only reductions were stored.

        Raises:
            StreamlensError: There is one.
        """
        for topic in view.topics:
            if topic not in self.known_topics:
                raise StreamlensError(
                    f"{self.title} did not store {topic!r} itself, only {', '.join(self._forms(topic))}: "
                    "select one of these, or subscribe what needs whole tensors while training"
                )

    def resolve(self, view: View) -> dict[str, frozenset[str] | None]:
        """The stored layers that a view selects.

        Raises:
            LayerNotFoundError: It selects none, or by class or depth.
        """
        for topic in view.topics:
            self.check_topic(topic)
            forms = (topic,) if topic in self._layouts else self._forms(topic)
            names = {name for form in forms for layout in self._layouts[form] for name in layout.layers}
            for selector in view.selectors:
                self.check_selector(selector)
            if names - {""} and not any(all(matches(s, n) for s in view.selectors) for n in names):
                wanted = "; ".join(f"layers({s.describe()})" for s in view.selectors)
                raise LayerNotFoundError(
                    f"{wanted} selects no layer of {topic!r}: it has "
                    f"{', '.join(map(repr, sorted(names)[:8]))}"
                )
        return dict.fromkeys(view.topics)

    def check_selector(self, selector: LayerSelector) -> None:
        """Raise for classes and depths, and for a glob that matches no layer of the run."""
        if selector.asks_modules:
            _ = self.modules  # raises: there is no model
        names = {n: None for ls in self._layouts.values() for layout in ls for n in layout.layers}
        selector.check_globs([*names, *(name.partition("@")[0] for name in names)])

    # -- playing -----------------------------------------------------------------------------

    def play(self) -> bool:
        """Deliver the runs to every demand, and complete the chains."""
        self._rewind()
        began, first = time.monotonic(), math.inf
        ended = -1
        for frames, when in _bursts(self._merged()):
            if self._speed is not None:
                first = min(first, when)
                wait = (when - first) / self._speed - (time.monotonic() - began)
                time.sleep(max(wait, 0.0))
            start = frames[0]
            if start.kind is Kind.EVENT:
                ended = max([ended, *(f.epoch for f in frames if f.topic == "epoch_finished")])
                frames = [frame for frame in frames if frame.topic != "epoch_finished"]
                if not frames:
                    continue
            self._advance(start)
            self.give(frames)
        self.finish_update()
        if ended >= self.clock.epoch:
            self.end_epoch()
        self.complete_chains()
        self._rewind()
        return self.flush()

    def _rewind(self) -> None:
        own = [self._lens.stored(topic) for topic in self._layouts]
        found = [start for run in self._runs if (start := first_step(run, own)) is not None]
        self.clock = Clock()
        self._begun = False
        self._updated.clear()
        self._epochs: dict[str, int] = {}
        self._due_step = -1
        if found:
            self.clock.step, self.clock.epoch = min(found)

    def _advance(self, frame: Frame) -> None:
        """Go on to where a frame was emitted."""
        clock, epoch = self.clock, frame.epoch
        if len(self._runs) > 1:
            # Epochs of several runs may differ in length: one is over when it is in all of them.
            self._epochs[frame.source] = epoch
            epoch = min(self._epochs.values())
        if not self._begun or frame.step > clock.step:
            while clock.epoch < epoch:
                self.end_epoch()
        self.open_step(frame.step)
        clock.micro_step = frame.micro_step

    def _merged(self) -> Iterator[Stored]:
        wanted = self.topics | {"epoch_finished"}
        if "update_finished" in wanted - self._layouts.keys():
            # Whatever comes once an update tells of it.
            wanted |= {t for t, layouts in self._layouts.items() if layouts[0].kind is Kind.STEP}
        parts = [
            _labelled(self._lens.frames(stepwise(run, map(self._lens.stored, wanted))), label)
            for run, label in zip(self._runs, self._labels, strict=True)
        ]
        # Stable: within a step the runs come one after the other.
        return parts[0] if len(parts) == 1 else heapq.merge(*parts, key=lambda stored: stored[0].step)

    def shut_down(self, timeout: float | None = None) -> bool:
        """Complete every stream, and free the files."""
        done = super().shut_down(timeout)
        for run in self._runs:
            run.close()
        return done


def _bursts(stored: Iterable[Stored]) -> Iterator[tuple[list[Frame], float]]:
    """Frames that were emitted together, each time with when the first of them was."""
    burst: list[Frame] = []
    step, micro_step, source, kind, when = -1, -1, "", Kind.STEP, 0.0
    for frame, wall_time in stored:
        if (
            frame.step != step
            or frame.micro_step != micro_step
            or frame.source != source
            or frame.kind is not kind
        ):
            if burst:
                yield burst, when
            burst, when = [], wall_time
            step, micro_step, source, kind = frame.step, frame.micro_step, frame.source, frame.kind
        burst.append(frame)
    if burst:
        yield burst, when


def _labelled(frames: Iterator[Stored], label: str) -> Iterator[Stored]:
    if not label:
        yield from frames
        return
    for frame, wall_time in frames:
        source = f"{label}.{frame.source}" if frame.source else label
        yield frame.replace(source=source), wall_time


def _labels(runs: Sequence[Run]) -> tuple[str, ...]:
    """A name for each run: its own, else its file's or its folder's; numbered where two are equal."""
    labels: list[str] = []
    for run in runs:
        base = run.name or _place(run.path)
        label, number = base, 2
        while label in labels:
            label, number = f"{base}-{number}", number + 1
        labels.append(label)
    return tuple(labels)


def _place(path: Path) -> str:
    return path.parent.name if path.stem == "run" and path.parent.name else path.stem
