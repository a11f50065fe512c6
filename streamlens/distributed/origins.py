"""`Origins`: from which processes values come that are not finite."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import torch
import torch.distributed as dist
from torch import Tensor

from streamlens.capture.exchange import Alone
from streamlens.capture.sharded import Part
from streamlens.capture.table import Rows
from streamlens.distributed.layout import Item
from streamlens.reductions import Reduction, Statistic, double_where_known
from streamlens.topics import Facet, Phase, TopicSpec, topic_spec

__all__ = ["OneRank", "Origins"]

_ORIGINS: Final = "/origins"
_BITS: Final = 48
"""Processes that have a bit each in a number of double precision."""
_ONE: Final = 2.0**32
_KEPT: Final = 8
"""Updates that are remembered: alerts of values on a device come a few later."""
_NONFINITE: Final = Statistic("nonfinite")


class OneRank(Alone):
    """An exchange with nobody, in a process that is not the only one."""

    def origins(self, topic: str, layers: Sequence[str], step: int) -> tuple[int, ...]:
        """This process, if there are others."""
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        return (dist.get_rank(),) if several else ()


@dataclass(frozen=True, eq=False)
class _Found:
    """Where there were some, at one update."""

    step: int
    item: Item
    rows: Rows

    def codes(self, names: set[str] | None) -> list[int]:
        """The merged numbers of some layers, of all if None; waits for a device."""
        called = dict(zip(self.item.rows.keys, self.item.names, strict=True))
        return [
            int(code)
            for key, code in zip(self.rows.keys, self.rows.values[0].tolist(), strict=True)
            if names is None or called.get(key, str(key)) in names
        ]


class Origins:
    """Who has had NaN or infinite numbers, by layer.

    One number a layer goes along with what is merged anyway, in which each of up to 48 processes has a bit;
    where there are more, it counts them and adds up their ranks, which tells which it was if it was one.
    It is read only once an alert asks, so that nothing waits for a device.

    Args:
        rank: This process.
        ranks: How many there are.
    """

    def __init__(self, rank: int, ranks: int) -> None:
        self._ranks = ranks
        self._code = float(1 << rank) if ranks <= _BITS else _ONE + rank
        self._found: deque[_Found] = deque()

    def item(self, items: Sequence[Item]) -> Item | None:
        """What is to go along.

        Args:
            items: What this process has of one table.
        """
        seen: dict[Hashable, tuple[int, str, Part]] = {}
        places: list[int] = []
        marks: list[Tensor] = []
        for item in items:
            rows = item.rows
            if not (rows.what if isinstance(rows.what, tuple) else rows.what.tells_finite):
                continue
            if double_where_known(rows.values.device) is not torch.float64:
                return None
            marks.append(self._marks(rows.what, rows.values))
            for key, name, part in zip(rows.keys, item.names, item.parts, strict=True):
                places.append(seen.setdefault(key, (len(seen), name, part))[0])
        if not seen:
            return None
        marked = marks[0]
        if len(marks) > 1:
            index = torch.tensor(places).to(marked.device, non_blocking=True)
            marked = marked.new_zeros(len(seen)).scatter_reduce_(0, index, torch.cat(marks), "amax")
        _, names, parts = zip(*seen.values(), strict=True)
        rows = Rows((), tuple(seen), marked[None])
        return Item(items[0].label + _ORIGINS, None, rows, names, parts, open=items[0].open)

    def _marks(self, what: tuple[Statistic, ...] | Reduction, values: Tensor) -> Tensor:
        if isinstance(what, Reduction):
            return (~values.isfinite().all(0)).to(torch.float64) * self._code
        bad = ~values[:-1].isfinite().all(0)
        if _NONFINITE in what:
            bad |= values[what.index(_NONFINITE)] > 0
        # A part without elements has no extremes, which is not to say that they are not finite.
        return (bad & (values[-1] > 0)).to(torch.float64) * self._code

    def note(self, step: int, found: Iterable[tuple[Item, Rows]]) -> None:
        """Remember what was merged at an update."""
        while self._found and self._found[0].step < step - _KEPT:
            self._found.popleft()
        self._found += [_Found(step, item, rows) for item, rows in found if item.label.endswith(_ORIGINS)]

    def of(self, topic: str, layers: Sequence[str], step: int) -> tuple[int, ...]:
        """The processes from which values of a step come that are not finite; empty where that is unknown.

        Args:
            topic: What was looked at, such as `activations.norm2`.
            layers: Its layers.
            step: The step.
        """
        spec = _spec_of(topic)
        if spec is None:
            return ()
        label, names = _called(spec, layers)
        ranks: set[int] = set()
        for found in self._found:
            if found.step == step and found.item.label.partition("/")[0] == label:
                ranks |= {r for code in found.codes(names) for r in self._decoded(code)}
        return tuple(sorted(ranks))

    def _decoded(self, code: int) -> list[int]:
        if self._ranks <= _BITS:
            return [rank for rank in range(self._ranks) if code >> rank & 1]
        number, total = divmod(code, int(_ONE))
        return [total] if number == 1 else []


def _spec_of(topic: str) -> TopicSpec | None:
    """The topic that a number was computed from."""
    while topic:
        spec = topic_spec(topic)
        if spec is not None and not (spec.state and "." in spec.state):
            return spec
        topic = topic.rpartition(".")[0]
    return None


def _called(spec: TopicSpec, layers: Sequence[str]) -> tuple[str, set[str] | None]:
    """What a topic and its layers are called where they are merged; None for any layer."""
    if spec.phase is Phase.LOSS:
        return spec.name, None
    if spec.facet is None or spec.facet is Facet.RAW_GRADIENT:
        return spec.name, set(layers)
    label = spec.state or spec.facet.value
    if not spec.role:
        return label, set(layers)
    return label, {f"{layer}.{spec.role}" if layer else spec.role for layer in layers}
