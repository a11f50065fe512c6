"""`Feed`: a source that any framework pushes its arrays to."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from streamlens.capture.view import View
from streamlens.errors import StreamlensError
from streamlens.frame import Frame, Kind, Lease
from streamlens.layers import LayerSelector
from streamlens.lens import Lens
from streamlens.session import Session
from streamlens.sources._arrays import as_tensor
from streamlens.sources._told import ToldSource
from streamlens.topics import Facet, Phase, check_own_topic, topic_spec

__all__ = ["Feed"]

_OWN_MARKS: Final = frozenset({"epoch_started", "epoch_finished", "update_finished"})
"""Topics that a feed gives by itself."""
_OF_ONE_SHAPE: Final = (Facet.VALUE, Facet.GRADIENT, Facet.UPDATE)
_MODEL: Final = ("",)


@dataclass(frozen=True)
class _Part:
    """One topic of a push."""

    topic: str
    layers: tuple[str, ...]
    tensors: tuple[Tensor, ...]
    components: tuple[str, ...] = ()


class Feed(Lens):
    """A lens on a training loop of any framework, which pushes its arrays to it.

    Everything that a lens of `observe()` does works on it: narrowing, reductions pushed down and shared,
    joins, windows, derived topics, snapshots, sinks. Metrics that evaluate a PyTorch model need
    `model=`. Steps are counted by the caller; those between may be left out.

    Arrays are read where they lie if DLPack allows that, and only during the call; what a chain keeps
    it copies. What belongs together (weights and their updates) is best pushed in one call: raw
    frames of one call are joined without copies.

    With `allowed_lateness`, pushes may come out of order by that many steps: they are copied and held
    until they are in order, so that operators see steps rise as ever. What comes later still is
    dropped and counted as `late` in `stats()`.

    Args:
        name: A label that prefixes layers and topics in sinks.
        allowed_lateness: How many steps late a push may come.
        emits: Topics of your own, so that they can be selected before they are first pushed.
        on_error: `"report"` contains what fails in chains; `"raise"` lets it through, for tests.

    Raises:
        TypeError: The name is no string, or a topic is none.
        ValueError: A lateness below 0, or another `on_error`.

    Example:
        >>> feed = Feed()
        >>> feed.pipe(uw_ratio(), ema(0.9)).subscribe(sink)
        >>> feed.push(0, weights={"dense": w}, weight_updates={"dense": dw}, loss=0.7)
    """

    def __init__(
        self,
        name: str = "",
        *,
        allowed_lateness: int = 0,
        emits: Iterable[str] = (),
        on_error: str = "report",
    ) -> None:
        if not isinstance(name, str):
            raise TypeError(f"Feed(name={name!r}): a name is a string")
        whole = isinstance(allowed_lateness, int) and not isinstance(allowed_lateness, bool)
        if not whole or allowed_lateness < 0:
            raise ValueError(f"Feed(allowed_lateness={allowed_lateness!r}): a number of steps from 0 on")
        if on_error not in ("report", "raise"):
            raise ValueError(f"Feed(on_error={on_error!r}): allowed are 'report' and 'raise'")
        feed = _FeedSource(name, on_error, allowed_lateness)
        for topic in emits:
            feed.check_own_topic(topic)
        session = Session(feed, None)
        feed.sessions.add(session)
        super().__init__(feed, session)
        self._feed = feed

    def push(self, step: int, *, micro_step: int = 0, **topics: Any) -> None:
        """Push arrays of a step.

        Topics keyed by layer (`weights`, `weight_gradients`, `weight_updates`, `activations`, ...) take
        `{layer: array}`; those of the model itself (`network_output`, ...) an array; `loss` a number, or
        `{name: number}` for several; topics of your own any of these.

        Args:
            step: The optimizer update that they belong to, from 0.
            micro_step: The forward/backward pass within the step.
            **topics: What is pushed, by topic.

        Raises:
            ClosedLensError: The feed is closed.
            TypeError: Something that is neither an array nor a number, or a mapping where none belongs.
            ValueError: A step below 0; a layer whose shape is not that of its weights, or of before.
            StreamlensError: A topic that the feed gives by itself.
        """
        self._check_open()
        for what, value in (("step", step), ("micro_step", micro_step)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"push({what}={value!r}): a whole number from 0 on")
        if not topics:
            raise TypeError(f"push({step}) was given nothing: pass topics, such as weights={{'dense': w}}")
        self._feed.take(step, micro_step, topics)


class _FeedSource(ToldSource):
    taken_by = "pushed"
    remedy = "push it, or name it to Feed(emits=[...])"
    closed_message = "this feed is closed: make another Feed()"

    def __init__(self, name: str, on_error: str, lateness: int) -> None:
        super().__init__(name, on_error)
        self._lateness = lateness
        self._high = -1
        self._held: dict[int, list[tuple[int, list[_Part]]]] = {}
        self._shapes: dict[tuple[str, str], tuple[str, torch.Size]] = {}
        self._layers: dict[str, dict[str, None]] = {}

    @property
    def title(self) -> str:
        """`Feed()`, with its name."""
        return f"Feed({self.name!r})" if self.name else "Feed()"

    # -- layers ------------------------------------------------------------------------------

    def resolve(self, view: View) -> dict[str, frozenset[str] | None]:
        """All layers of each topic: which there are shows only when they are pushed."""
        for topic in view.topics:
            self.check_topic(topic)
        for selector in view.selectors:
            self.check_selector(selector)
        return dict.fromkeys(view.topics)

    def check_selector(self, selector: LayerSelector) -> None:
        """Raise for classes and depths, and for a glob that no layer pushed so far matches."""
        if selector.asks_modules:
            _ = self.modules  # raises: there is no model
        known = [name for names in self._layers.values() for name in names]
        if known:
            selector.check_globs(known)

    # -- pushes ------------------------------------------------------------------------------

    def take(self, step: int, micro_step: int, topics: Mapping[str, Any]) -> None:
        """Check a push, then deliver it or hold it until it is in order."""
        parts = [self._part(step, topic, value) for topic, value in topics.items()]
        shapes = self._checked_shapes(step, parts)
        for part in parts:
            if topic_spec(part.topic) is None:
                self.user_topics[part.topic] = None
        self._shapes.update(shapes)
        if step < max(self._high - self._lateness, self.clock.step):
            self.counts["late"] += 1
            return
        for part in parts:
            self._layers.setdefault(part.topic, {}).update(dict.fromkeys(part.layers))
        self._high = max(self._high, step)
        if not self._lateness:
            self._now(step, micro_step, parts)
            return
        owned = [_owned(part) for part in parts]
        self._held.setdefault(step, []).append((micro_step, owned))
        self._release(self._high - self._lateness)

    def _release(self, before: float) -> None:
        """Deliver, in order, the steps held that are complete."""
        for step in sorted(s for s in self._held if s < before):
            # Stable: pushes of one micro-step stay in the order in which they came.
            for micro_step, parts in sorted(self._held.pop(step), key=lambda push: push[0]):
                self._now(step, micro_step, parts)

    def _now(self, step: int, micro_step: int, parts: Collection[_Part]) -> None:
        self.open_step(step)
        self.clock.micro_step = max(self.clock.micro_step, micro_step)
        lease = Lease()
        self.give([self._frame(part, micro_step, lease) for part in parts if part.layers], lease)

    def _frame(self, part: _Part, micro_step: int, lease: Lease) -> Frame:
        spec = topic_spec(part.topic)
        kind = Kind.STEP if spec is None else spec.kind
        values: Tensor | tuple[Tensor, ...] = part.tensors
        raw = spec is not None and spec.raw
        if not raw:
            alike = len({(t.shape, t.dtype) for t in part.tensors}) == 1
            values = torch.stack(part.tensors) if alike else tuple(t.clone() for t in part.tensors)
        frame = self.frame(
            part.topic,
            part.layers,
            values,
            kind=kind,
            components=part.components,
            lease=lease if raw else None,
        )
        return frame if kind is not Kind.MICRO_STEP else frame.replace(micro_step=micro_step)

    def _part(self, step: int, topic: str, value: Any) -> _Part:
        where = f"push({step}): {topic}"
        if topic in _OWN_MARKS:
            raise StreamlensError(f"{where} cannot be pushed: the feed gives it by itself")
        spec = topic_spec(topic)
        if spec is None:
            check_own_topic(topic, self.derived_topics)
        by_layer = spec is not None and spec.phase in (Phase.PARAMETER, Phase.MODULE) and spec.raw
        if by_layer and not isinstance(value, Mapping):
            raise TypeError(f"{where} is keyed by layer: pass {{layer: array}}, got {type(value).__name__}")
        if not isinstance(value, Mapping):
            return _Part(topic, _MODEL, (self._scalar(topic, as_tensor(value, where), where),))
        if spec is not None and not by_layer and topic not in ("loss", "learning_rate"):
            raise TypeError(f"{where} is of the model itself: pass one array and no mapping")
        tensors: list[Tensor] = []
        for layer, entry in value.items():
            if not isinstance(layer, str):
                raise TypeError(f"{where}: layers are named by strings, got {layer!r}")
            at = f"{where}[{layer!r}]"
            tensors.append(self._scalar(topic, as_tensor(entry, at), at))
        if topic == "loss" and tensors:
            return _Part(topic, _MODEL, (torch.stack(tensors),), tuple(value))
        return _Part(topic, tuple(value), tuple(tensors))

    @staticmethod
    def _scalar(topic: str, tensor: Tensor, where: str) -> Tensor:
        """The tensor, a number in floating point where the topic consists of numbers."""
        spec = topic_spec(topic)
        if spec is None or spec.raw:
            return tensor
        if tensor.numel() != 1:
            raise ValueError(f"{where} is a number, got an array of shape {tuple(tensor.shape)}")
        tensor = tensor.reshape(())
        return tensor if tensor.is_floating_point() else tensor.float()

    def _checked_shapes(
        self, step: int, parts: Iterable[_Part]
    ) -> dict[tuple[str, str], tuple[str, torch.Size]]:
        """The shapes of layers: those of weights, their gradients and updates are one."""
        found: dict[tuple[str, str], tuple[str, torch.Size]] = {}
        for part in parts:
            spec = topic_spec(part.topic)
            if spec is None or spec.facet not in _OF_ONE_SHAPE:
                continue
            for layer, tensor in zip(part.layers, part.tensors, strict=True):
                key = (spec.role, layer)
                topic, shape = self._shapes.get(key) or found.setdefault(key, (part.topic, tensor.shape))
                if shape != tensor.shape:
                    raise ValueError(
                        f"push({step}): {part.topic}[{layer!r}] has shape {tuple(tensor.shape)}, but "
                        f"{topic}[{layer!r}] had {tuple(shape)}: a layer's values, gradients and updates "
                        "have one shape"
                    )
        return found

    # -- the end -----------------------------------------------------------------------------

    def end_epoch(self) -> None:
        """The epoch is over: what is held belongs to it."""
        self._release(float("inf"))
        super().end_epoch()

    def shut_down(self, timeout: float | None = None) -> bool:
        """Deliver what is held, then complete every stream."""
        if not self.closed:
            self._release(float("inf"))
            self.finish_update()
        return super().shut_down(timeout)


def _owned(part: _Part) -> _Part:
    return _Part(part.topic, part.layers, tuple(t.clone() for t in part.tensors), part.components)
