"""The frames of one named lens among those of a run store, as the lens gave them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from streamlens.runs.codec import Layout
from streamlens.runs.stepwise import Stored

__all__ = ["Named", "names_of"]


@dataclass(frozen=True)
class Named:
    """A lens's name, which stands in front of the topics and layers that it stored (`G/loss`, `G.fc`).

    Attributes:
        name: The name; `""` leaves everything as it was stored.
    """

    name: str

    def stored(self, topic: str) -> str:
        """The name in the store of a topic of the lens."""
        return f"{self.name}/{topic}" if self.name else topic

    def own(self, layouts: Mapping[str, Sequence[Layout]]) -> dict[str, tuple[Layout, ...]]:
        """What the lens stored, under its own names of topics and layers.

        Args:
            layouts: What all lenses stored, by topic.
        """
        if not self.name:
            return {topic: tuple(found) for topic, found in layouts.items()}
        return {
            topic.removeprefix(self.stored("")): tuple(
                replace(f, layers=self._layers(f.layers)) for f in found
            )
            for topic, found in layouts.items()
            if topic.startswith(self.stored(""))
        }

    def frames(self, stored: Iterator[Stored]) -> Iterator[Stored]:
        """Frames that the lens stored, as it gave them."""
        if not self.name:
            yield from stored
            return
        own: dict[tuple[str, ...], tuple[str, ...]] = {}
        for frame, wall_time in stored:
            layers = own.get(frame.layers)
            if layers is None:
                layers = own[frame.layers] = self._layers(frame.layers)
            topic = frame.topic.removeprefix(self.stored(""))
            yield frame.replace(topic=topic, layers=layers, source=self.name), wall_time

    def _layers(self, layers: Iterable[str]) -> tuple[str, ...]:
        # The model itself has the bare name.
        return tuple("" if n == self.name else n.removeprefix(f"{self.name}.") for n in layers)


def names_of(layouts: Mapping[str, Sequence[Layout]]) -> tuple[str, ...]:
    """The names of the named lenses that stored something.

    Args:
        layouts: What was stored, by topic.
    """
    names: dict[str, None] = {}
    for topic, found in layouts.items():
        name = topic.rpartition("/")[0]
        layers = {layer for layout in found for layer in layout.layers}
        if name and layers and all(n == name or n.startswith(f"{name}.") for n in layers):
            names[name] = None
    return tuple(names)
