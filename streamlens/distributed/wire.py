"""`Wire`: the message by which processes merge what they have, one collective an update."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Final

import torch
import torch.distributed as dist
from torch import Tensor

from streamlens.capture.table import Rows
from streamlens.distributed.group import Group
from streamlens.distributed.layout import WEIGHT, Item, Layout, Report, build
from streamlens.distributed.rounds import later_rounds
from streamlens.errors import StreamlensError
from streamlens.reductions import double_where_known

__all__ = ["Wire"]

_HEADER: Final = 6
"""Numbers in front of every message, each added up over the processes."""

_MOST: Final = 64
"""Layouts that are remembered."""

_STEPS: Final = 1 << 16
_CALLS: Final = 16


class Wire:
    """Sends what this process has, and gets what that of all processes merges to.

    Every message has the same length on all processes whatever they want to send, since a collective
    of buffers that differ in length brings a process down. It begins with a header that says which
    update call it is and which layout the rest follows. Where these agree, as they do at all updates but the
    first of their kind, the message was all. Where layouts do not, processes tell each other what they
    have and send it again. Where update calls do not, everybody sees that, and stops.

    Attributes:
        group: The processes.
        sent: Bytes of the messages of the last update.
    """

    def __init__(self, group: Group) -> None:
        self.group = group
        self._layouts: dict[Hashable, Layout] = {}
        self._made = 0
        self._room = 0
        self.sent = 0

    def merge(
        self, items: Sequence[Item], lost: Sequence[tuple[str, str]], moment: tuple[int, int], *, news: bool
    ) -> tuple[list[tuple[Item, Rows]], bool]:
        """Merge what all processes have.

        Args:
            items: What this one has.
            lost: The layers that failed on this one, each with its label.
            moment: The step, and which update call within it.
            news: Whether this process has something to tell beside.

        Returns:
            What was merged, and whether some process has something to tell.

        Raises:
            StreamlensError: The processes are not at the same update.
        """
        scaled = _scaled(items)
        key = (tuple(item.signature for item in items), tuple(lost))
        layout = self._layouts.get(key)
        host, tells, same = self._message(layout, scaled, moment, news=news)
        if not same or layout is None:
            layout = self._negotiate(key, items, lost)
            host = torch.zeros(layout.host, dtype=torch.float64)
            layout.write(scaled, host, on_host=True)
            if layout.host:
                self._add(host)
        self._room = layout.host
        found = layout.read(scaled, host, on_host=True)
        if layout.later[True]:
            found += later_rounds(layout, scaled, host, self._add, on_host=True)
        if layout.device:
            found += self._on_device(layout, scaled)
        return _unscaled(found), tells

    def _message(
        self, layout: Layout | None, items: Sequence[Item], moment: tuple[int, int], *, news: bool
    ) -> tuple[Tensor, bool, bool]:
        """Header and numbers; whether some process has news, and whether all follow one layout."""
        ranks = self.group.ranks
        size = 0 if layout is None else layout.host
        buffer = torch.zeros(_HEADER + max(self._room, size), dtype=torch.float64)
        number = -1 if layout is None else layout.number
        when = moment[0] % _STEPS * _CALLS + moment[1] % _CALLS
        header = (number < 0, number, number**2, when, when**2, news)
        buffer[:_HEADER] = torch.tensor([float(entry) for entry in header], dtype=torch.float64)
        if layout is not None:
            layout.write(items, buffer[_HEADER:], on_host=True)
        first = buffer[: _HEADER + self._room]
        self.sent = 0
        self._add(first)
        new, numbers, squares, whens, when_squares, tells = (int(x) for x in buffer[:_HEADER].tolist())
        if (whens, when_squares) != (ranks * when, ranks * when**2):
            raise StreamlensError(
                f"the ranks are not at the same update: this one is at step {moment[0]}"
                + (f", call {moment[1]}" if moment[1] else "")
                + ", another one is not. All ranks have to resume at one step and make the same updates. "
                "What takes all ranks is left out from now on, and training goes on"
            )
        same = not new and (numbers, squares) == (ranks * number, ranks * number**2)
        if same and size > self._room:
            # The message before was shorter; the rest follows.
            self._add(buffer[_HEADER + self._room : _HEADER + size])
        return buffer[_HEADER:], bool(tells), same

    def _negotiate(self, key: Hashable, items: Sequence[Item], lost: Sequence[tuple[str, str]]) -> Layout:
        """Tell each other what there is, and lay it out."""
        mine = Report.of(items, lost)
        brief: list[Report] = self.group.gather(Report(mine.digest, mine.parts, mine.lost, ()))
        if any(report.digest != mine.digest for report in brief):
            reports: list[Report] = self.group.gather(mine)
        else:
            reports = [Report(r.digest, r.parts, r.lost, mine.shapes) for r in brief]
        devices = [item.rows.values.device for item in items if not item.on_host]
        device = devices[0] if devices else torch.device("cpu")
        if len(self._layouts) >= _MOST:
            self._layouts.clear()
        layout = self._layouts[key] = build(self._made, reports, items, self.group.rank, device)
        self._made += 1
        return layout

    def _on_device(self, layout: Layout, items: Sequence[Item]) -> list[tuple[Item, Rows]]:
        """The same for numbers on an accelerator, without waiting for it.

        All processes have just met on the host, so that none waits for one that does not come, and
        nothing else is under way; the group that training uses serves as well as one more of our own,
        and takes no memory.
        """
        home = next((i.rows.values.device for i in items if not i.on_host), None)
        if home is None:
            home = torch.device(torch.accelerator.current_accelerator() or "cpu")
        buffer = torch.zeros(layout.device, dtype=double_where_known(home), device=home)
        layout.write(items, buffer, on_host=False)
        self._add_there(buffer)
        found = layout.read(items, buffer, on_host=False)
        if layout.later[False]:
            found += later_rounds(layout, items, buffer, self._add_there, on_host=False)
        return found

    def _add(self, buffer: Tensor, *, largest: bool = False) -> None:
        self.group.add(buffer, largest=largest)
        self.sent += buffer.element_size() * len(buffer)

    def _add_there(self, buffer: Tensor, *, largest: bool = False) -> None:
        dist.all_reduce(buffer, dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM)
        self.sent += buffer.element_size() * len(buffer)


def _scaled(items: Sequence[Item]) -> list[Item]:
    """The items, with values that are of a mean over this process's examples turned into those of a sum."""
    weights = {i.label.removesuffix(WEIGHT): i.rows.values[0, 0] for i in items if i.label.endswith(WEIGHT)}
    return [_times(item, weights[item.label]) if item.scaled else item for item in items]


def _times(item: Item, factor: Tensor) -> Item:
    exponents = item.exponents()
    if exponents is None:
        return item
    values = item.rows.values
    powers = factor.to(values.dtype) ** exponents.to(values.device, values.dtype, non_blocking=True)
    return Item(
        item.label,
        item.table,
        Rows(item.rows.what, item.rows.keys, values * powers),
        item.names,
        item.parts,
        item.open,
        item.scaled,
    )


def _unscaled(found: Sequence[tuple[Item, Rows]]) -> list[tuple[Item, Rows]]:
    """What was merged, with values of a sum turned into those of the mean over all examples."""
    totals = {
        item.label.removesuffix(WEIGHT): rows.values[0, 0]
        for item, rows in found
        if item.label.endswith(WEIGHT)
    }
    results: list[tuple[Item, Rows]] = []
    for item, rows in found:
        exponents = item.exponents()
        if exponents is not None:
            total = totals[item.label].to(rows.values.dtype)
            powers = total ** -exponents.to(rows.values.device, rows.values.dtype, non_blocking=True)
            rows = Rows(rows.what, rows.keys, rows.values * powers)
        results.append((item, rows))
    return results
