"""Who writes what to one sink: two chains must not write the same (topic, layer, step)."""

from __future__ import annotations

from typing import Final, Generic, TypeVar

__all__ = ["Claims"]

_Writer = TypeVar("_Writer")

_STEPS: Final = 1024
"""How many steps back a second writer is noticed."""


class Claims(Generic[_Writer]):
    """The last steps that each writer has written, a topic.

    A topic with a single writer costs two look-ups and an insertion a frame. With several, the
    layers of the same step are compared; writers of disjoint layers go together.
    """

    def __init__(self) -> None:
        self._topics: dict[str, dict[_Writer, dict[int, tuple[str, ...] | set[str]]]] = {}

    def claim(self, writer: _Writer, topic: str, step: int, layers: tuple[str, ...]) -> _Writer | None:
        """Note that `writer` writes these layers of a topic at a step.

        Args:
            writer: Who writes; compared by hash and equality.
            topic: The topic under the name that the sink sees.
            step: The step of the frame.
            layers: The layers of the frame.

        Returns:
            The other writer of one of these layers at this step, if there is one; the claim is
            not noted then.
        """
        writers = self._topics.get(topic)
        if writers is None:
            writers = self._topics[topic] = {}
        mine = writers.get(writer)
        if mine is None:
            mine = writers[writer] = {}
        if len(writers) > 1:
            for other, steps in writers.items():
                if other is not writer and step in steps and not set(layers).isdisjoint(steps[step]):
                    return other
        known = mine.get(step)
        if known is None:
            mine[step] = layers
            if len(mine) > _STEPS:
                del mine[next(iter(mine))]
        elif known is not layers:
            # Several frames of one topic and step: one a layer, a micro-step, or an optimizer.
            if isinstance(known, tuple):
                known = mine[step] = set(known)
            known.update(layers)
        return None

    def release(self, writer: _Writer) -> None:
        """Forget what a writer has written."""
        for topic in list(self._topics):
            self._topics[topic].pop(writer, None)
            if not self._topics[topic]:
                del self._topics[topic]
