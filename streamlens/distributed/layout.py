"""`Layout`: where in one buffer each process puts what it has, such that adding the buffers up merges.

Numbers that add up over parts (sums, counts, bins) share a place. Others (extremes, powers of deviations)
have a place for each part, filled by one process and zero on all others, so that adding up gathers them;
they are merged from there. Of processes that hold the same, the lowest contributes.

Of more than a few parts that would be a message as long as there are processes. Their statistics are merged
in rounds, each of one place a layer: what adds up; then, as the mean of the whole is known, deviations from
that, which add up too; and extremes, of which the largest is taken (`rounds.py`).
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias, cast

import torch
from torch import Tensor

from streamlens.capture.sharded import Part
from streamlens.capture.table import Rows, Table
from streamlens.reductions import Statistic, Statistics, merge_statistics

__all__ = ["WEIGHT", "Item", "Layout", "Mine", "Report", "added", "build"]

GATHERED: Final = 8
"""Parts that have a place each; of more, statistics are merged in rounds."""

WEIGHT: Final = "/examples"
"""What is appended to a label for the row that says how many examples a process has."""

_ADDED: Final = frozenset({"count", "sum", "sum_of_squares", "sum_of_powers", "nonzero", "nonfinite"})
_UNSCALED: Final = frozenset({"count", "nonzero", "nonfinite"})

What: TypeAlias = "tuple[tuple[str, float], ...] | str"


def added(what: tuple[Statistic, ...] | Any) -> bool:
    """Whether parts of this add up."""
    if isinstance(what, tuple):
        return all(s.name in _ADDED for s in what)
    return bool(what.adds)


@dataclass(eq=False)
class Item:
    """Rows of one table, with what others need to know of them.

    Attributes:
        label: What they are of.
        table: Where they come from and what they are merged to goes; None if that is of no interest.
        rows: The numbers.
        names: What the layers are called on all processes.
        parts: The part that each is of.
        open: Whether a part may be missing.
        scaled: Whether values are those of a mean over this process's own examples.
    """

    label: str
    table: Table | None
    rows: Rows
    names: tuple[str, ...]
    parts: tuple[Part, ...]
    open: bool = False
    scaled: bool = False

    @property
    def on_host(self) -> bool:
        """Whether the numbers are on the host."""
        return self.rows.values.device.type == "cpu"

    @property
    def signature(self) -> Hashable:
        """Equal for items that lie in a layout alike."""
        return self.label, self.rows.what, self.names, self.parts, self.on_host, self.scaled

    def exponents(self) -> Tensor | None:
        """How each number changes with the scale of the values; None if values are not scaled."""
        if not self.scaled or not isinstance(self.rows.what, tuple):
            return None
        powers = [
            0.0 if s.name in _UNSCALED else 2.0 if s.name == "sum_of_squares" else s.order or 1.0
            for s in self.rows.what
        ]
        return torch.tensor([*powers, 0.0], dtype=torch.float64)[:, None]

    @property
    def kind(self) -> tuple[str, What, bool]:
        """What it is of, in words that all processes share."""
        what = self.rows.what
        words = tuple((s.name, s.order) for s in what) if isinstance(what, tuple) else repr(what)
        return self.label, words, self.on_host


@dataclass(frozen=True)
class Report:
    """What one process tells the others of its items, in two parts: the first differs, the second rarely.

    Attributes:
        digest: Of the second.
        parts: Which parts it holds; one entry where an item has one part only.
        lost: The layers that failed, each with its label.
        shapes: The items: kind, numbers a layer, whether they add up, whether parts may be missing, names.
    """

    digest: bytes
    parts: tuple[tuple[Part, ...], ...]
    lost: tuple[tuple[str, str], ...]
    shapes: tuple[tuple[tuple[str, What, bool], int, bool, bool, tuple[str, ...]], ...]

    @classmethod
    def of(cls, items: Sequence[Item], lost: Sequence[tuple[str, str]]) -> Report:
        """The report of some items."""
        shapes = tuple(
            (item.kind, len(item.rows.values), added(item.rows.what), item.open, item.names) for item in items
        )
        parts = tuple(item.parts[:1] if len(set(item.parts)) == 1 else item.parts for item in items)
        digest = hashlib.sha256(pickle.dumps(shapes)).digest()
        return cls(digest, parts, tuple(lost), shapes)


@dataclass(eq=False)
class _Block:
    """The place of one kind of numbers; of those merged in rounds, also that in the later messages."""

    width: int
    added: bool
    open: bool
    statistics: bool
    offset: int = 0
    later: int = 0
    rounds: bool = False
    names: dict[str, int] = field(default_factory=dict)
    slots: int = 1
    held: dict[str, dict[Part, int]] = field(default_factory=dict)
    """For each layer the parts there are, each with the lowest process that holds it."""

    @property
    def size(self) -> int:
        return self.slots * self.width * len(self.names)

    def region(self, buffer: Tensor, offset: int) -> Tensor:
        """Its place in a message, by slot, number and layer."""
        return buffer[offset : offset + self.size].view(self.slots, self.width, len(self.names))

    def settle(self, lost: frozenset[str]) -> None:
        """Leave out layers of which something is missing, and give the others their places."""
        self.held = {
            name: parts
            for name, parts in self.held.items()
            if name not in lost and (self.open or len(parts) >= next(iter(parts)).parts)
        }
        self.names = {name: place for place, name in enumerate(self.held)}
        self.slots = 1 if self.added else max((len(parts) for parts in self.held.values()), default=1)
        if self.statistics and self.slots > GATHERED:
            self.rounds, self.slots = True, 1


@dataclass(eq=False)
class Mine:
    """What of an item goes where, as indices on its device."""

    block: _Block
    kept: tuple[int, ...]
    places: Tensor
    given: tuple[Tensor, Tensor, Tensor]
    """Of what this process contributes: which of its rows, to which slot, at which place."""
    plain: bool
    """Whether it contributes all, in order, to one slot."""
    foreign: tuple[str, ...]
    """Layers that only others have, of those where that may be."""
    numbers: tuple[int, ...]
    """How many parts each layer has."""


class Layout:
    """The places of everything that some processes have, as one of them sees them.

    Attributes:
        number: Equal on all processes.
        host: Numbers on the host.
        device: Numbers on the device.
        later: Numbers in each of the later rounds, on the host and on the device.
    """

    def __init__(
        self,
        number: int,
        blocks: Mapping[Any, _Block],
        items: Sequence[Item],
        rank: int,
        device: torch.device,
    ) -> None:
        self.number = number
        self.host = self.device = 0
        self.later = {True: 0, False: 0}
        for kind, block in blocks.items():
            if kind[2]:
                block.offset, self.host = self.host, self.host + block.size
            else:
                block.offset, self.device = self.device, self.device + block.size
            if block.rounds:
                block.later = self.later[kind[2]]
                self.later[kind[2]] += block.size
        self._mine = [
            _mine(blocks[item.kind], item, rank, torch.device("cpu") if item.on_host else device)
            for item in items
        ]

    def write(self, items: Sequence[Item], buffer: Tensor, *, on_host: bool) -> None:
        """Put what this process has into a buffer of zeros."""
        for item, mine in zip(items, self._mine, strict=True):
            if item.on_host != on_host or not mine.kept:
                continue
            block, values = mine.block, item.rows.values
            if (block.added or block.rounds) and isinstance(item.rows.what, tuple):
                # A part without elements adds nothing, whatever its sums are said to be.
                values = torch.where(values[-1:] == 0, 0.0, values)
            if block.rounds:
                adds = torch.tensor(
                    [added((s,)) for s in cast("tuple[Statistic, ...]", item.rows.what)] + [True]
                )
                values = torch.where(adds.to(values.device, non_blocking=True)[:, None], values, 0.0)
            region = block.region(buffer, block.offset)
            rows, slots, places = mine.given
            if mine.plain:
                region[int(slots[0]) if on_host else 0].copy_(values)
            else:
                region[slots, :, places] = values.T.index_select(0, rows).to(region.dtype)

    def read(self, items: Sequence[Item], buffer: Tensor, *, on_host: bool) -> list[tuple[Item, Rows]]:
        """What the parts have been merged to, of the layers that all of it is there of."""
        found: list[tuple[Item, Rows]] = []
        for item, mine in zip(items, self._mine, strict=True):
            if item.on_host != on_host or not mine.numbers or mine.block.rounds:
                continue
            region = mine.block.region(buffer, mine.block.offset)
            keys = item.rows.keys
            if mine.plain:
                found += [(item, rows) for rows in _merged(item, keys, region, mine)]
                continue
            gathered = region.index_select(2, mine.places)
            keys = (*(keys[i] for i in mine.kept), *mine.foreign)
            found += [(item, rows) for rows in _merged(item, keys, gathered, mine)]
        return found

    def in_rounds(self, items: Sequence[Item], *, on_host: bool) -> list[tuple[Item, Mine]]:
        """What of these is merged in rounds."""
        return [
            (item, mine)
            for item, mine in zip(items, self._mine, strict=True)
            if item.on_host == on_host and mine.block.rounds
        ]


def _merged(item: Item, keys: tuple[Hashable, ...], gathered: Tensor, mine: Mine) -> list[Rows]:
    what = item.rows.what
    if mine.block.added:
        return [Rows(what, keys, gathered[0])]
    if isinstance(what, tuple):
        parts: list[tuple[Statistics, Tensor]] = [
            (dict(zip(what, slot[:-1], strict=True)), slot[-1]) for slot in gathered
        ]
        merged, counts = merge_statistics(parts)
        return [Rows(what, keys, torch.stack([*(merged[s] for s in what), counts]))]
    rows: list[Rows] = []
    for number in sorted(set(mine.numbers)):
        alike = [i for i, n in enumerate(mine.numbers) if n == number]
        some = gathered[:number].index_select(2, torch.tensor(alike).to(gathered.device))
        whole = what.merge([slot.T for slot in some])
        rows.append(Rows(what, tuple(keys[i] for i in alike), whole.reshape(len(alike), -1).T))
    return rows


def _mine(block: _Block, item: Item, rank: int, device: torch.device) -> Mine:
    kept = [i for i, name in enumerate(item.names) if name in block.names]
    own = set(item.names)
    foreign = tuple(name for name in block.names if name not in own) if item.open else ()
    names = [*(item.names[i] for i in kept), *foreign]
    places = [block.names[name] for name in names]
    rows: list[int] = []
    slots: list[int] = []
    where: list[int] = []
    for i, place in zip(kept, places, strict=False):
        holders = block.held[item.names[i]]
        if holders.get(item.parts[i]) == rank:
            rows.append(i)
            one = block.added or block.rounds
            slots.append(0 if one else sorted(holders).index(item.parts[i]))
            where.append(place)
    everything = list(range(len(block.names)))
    plain = len(item.names) == len(everything) and len(set(slots)) == 1
    plain = plain and rows == everything and where == everything and places == everything

    def index(numbers: list[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.long).to(device)

    return Mine(
        block,
        tuple(kept),
        index(places),
        (index(rows), index(slots), index(where)),
        plain and (item.on_host or slots[0] == 0),
        foreign,
        tuple(len(block.held[name]) for name in names),
    )


def build(
    number: int, reports: Sequence[Report], items: Sequence[Item], rank: int, device: torch.device
) -> Layout:
    """The layout of what all processes have; each builds the same.

    Args:
        number: The layout's number.
        reports: By process.
        items: What this process has, as it has reported.
        rank: This process.
        device: Where numbers are that are not on the host.
    """
    blocks: dict[Any, _Block] = {}
    # Mostly all layers of a kind are in the same hands, on all processes; they share what says so.
    shared: dict[tuple[Any, tuple[str, ...]], dict[Part, int]] = {}
    for of, report in enumerate(reports):
        for (kind, width, adds, missing, names), parts in zip(report.shapes, report.parts, strict=True):
            if kind not in blocks:
                blocks[kind] = _Block(width, adds, missing, isinstance(kind[1], tuple))
            together = (
                [(names, parts[0])]
                if len(parts) == 1
                else [((n,), p) for n, p in zip(names, parts, strict=True)]
            )
            for some, part in together:
                shared.setdefault((kind, some), {}).setdefault(part, of)
    for (kind, names), holders in shared.items():
        held = blocks[kind].held
        for name in names:
            known = held.get(name)
            if known is None:
                held[name] = holders
            else:
                both = set(known) | set(holders)
                held[name] = {p: min(h[p] for h in (known, holders) if p in h) for p in both}
    lost = {entry for report in reports for entry in report.lost}
    for (label, _, _), block in blocks.items():
        block.settle(frozenset(name for of, name in lost if of == label))
    return Layout(number, blocks, items, rank, device)
