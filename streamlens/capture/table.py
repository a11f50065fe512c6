"""`Table`: what was computed of one artifact at one step, layer by layer, before it becomes frames."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from streamlens.capture.interned import MOST_SETS
from streamlens.capture.sharded import Part
from streamlens.reductions import (
    FunctionReduction,
    Reduction,
    Statistic,
    columns,
    needed_statistics,
    real_size,
    statistics_of,
    statistics_to_merge,
    summarise,
)

__all__ = ["Needs", "Rows", "Sizes", "Table"]

OnError = Callable[[Hashable, Exception], None]
Keys = tuple[Hashable, ...]


@dataclass(frozen=True)
class Needs:
    """What all chains together want to know of one tensor.

    Attributes:
        statistics: Computed in as few passes as possible.
        others: Reductions that take the tensor as a whole.
    """

    statistics: tuple[Statistic, ...] = ()
    others: tuple[Reduction, ...] = ()

    @classmethod
    def of(cls, reductions: Iterable[Reduction], *, merging: bool = False) -> Needs:
        """The union of some reductions' needs, with what merging parts needs where tensors may be parts."""
        wanted = tuple(dict.fromkeys(reductions))
        statistics = needed_statistics(r for r in wanted if r.needs())
        if merging:
            statistics = statistics_to_merge(statistics)
        return cls(statistics, tuple(r for r in wanted if not r.needs()))

    def __bool__(self) -> bool:
        return bool(self.statistics or self.others)


class Sizes:
    """Elements of each layer's tensor, and where layers lie; parameters share one, since theirs stay."""

    __slots__ = ("_counts", "_places", "by_key")

    def __init__(self) -> None:
        self.by_key: dict[Hashable, int] = {}
        self._counts: dict[Keys, Tensor] = {}
        self._places: dict[tuple[Keys, Keys], Tensor] = {}

    def counts(self, keys: Keys, like: Tensor) -> Tensor:
        """The sizes of some layers as a vector, where `like` is."""
        found = self._counts.get(keys)
        if found is None or found.device != like.device:
            if len(self._counts) >= MOST_SETS:
                self._counts.clear()
            sizes = torch.tensor([float(self.by_key[k]) for k in keys], dtype=like.dtype)
            found = self._counts[keys] = _beside(sizes, like)
        return found

    def places(self, held: Keys, wanted: Keys, like: Tensor) -> Tensor:
        """Where the wanted layers are among those held, as an index."""
        found = self._places.get((held, wanted))
        if found is None or found.device != like.device:
            if len(self._places) >= MOST_SETS:
                self._places.clear()
            order = {key: i for i, key in enumerate(held)}
            found = _beside(torch.tensor([order[k] for k in wanted], dtype=torch.long), like)
            self._places[held, wanted] = found
        return found


def _beside(tensor: Tensor, like: Tensor) -> Tensor:
    """The tensor on the device of another one, without waiting for it."""
    if like.is_cpu:
        return tensor
    return (tensor.pin_memory() if like.is_cuda else tensor).to(like.device, non_blocking=True)


@dataclass(slots=True)
class _Block:
    """Statistics of some layers that were computed together: a vector each.

    Of tensors that lie in parts on several processes, the sizes of the whole come with them.
    """

    keys: Keys
    columns: Mapping[Statistic, Tensor]
    counts: Tensor | None = None


@dataclass(slots=True)
class Rows:
    """What a table has of some layers, to be merged with what other processes have of them.

    Attributes:
        what: The statistics, or the reduction that was computed.
        keys: The layers.
        values: A vector a statistic and then the numbers of elements, or one a component; an entry a layer.
    """

    what: tuple[Statistic, ...] | Reduction
    keys: Keys
    values: Tensor

    def select(self, keys: Keys) -> Rows:
        """Those of some of the layers."""
        order = {key: i for i, key in enumerate(self.keys)}
        index = _beside(torch.tensor([order[key] for key in keys], dtype=torch.long), self.values)
        return Rows(self.what, keys, self.values.index_select(1, index))


class Table:
    """Statistics by layer; finishing a reduction reads them, so that what is shared is computed once.

    Attributes:
        parts: The layers of whose tensor this process holds a part; None where that is unknown.
        wholes: The layers whose parts have been merged.
    """

    __slots__ = ("_blocks", "_double", "_results", "_rows", "_sizes", "parts", "wholes")

    def __init__(self, sizes: Sizes | None = None) -> None:
        self.parts: dict[Hashable, Part | None] = {}
        self.wholes: set[Hashable] = set()
        self._blocks: list[_Block] = []
        self._rows: dict[tuple[Statistic, ...], dict[Hashable, Sequence[float] | Sequence[Tensor]]] = {}
        self._results: dict[Reduction, dict[Hashable, Tensor]] = {}
        self._double = False
        self._sizes = Sizes() if sizes is None else sizes

    # -- entering ----------------------------------------------------------------------------

    def put(
        self,
        key: Hashable,
        statistics: tuple[Statistic, ...],
        row: Sequence[float] | Sequence[Tensor],
        tensor: Tensor,
    ) -> None:
        """Enter the statistics of one layer's tensor."""
        if tensor.dtype in (torch.float64, torch.complex128):
            self._double = True
        self._rows.setdefault(statistics, {})[key] = row
        self._sizes.by_key[key] = real_size(tensor)

    def put_rows(
        self,
        statistics: tuple[Statistic, ...],
        keys: Keys,
        rows: Sequence[Sequence[float]],
        sizes: Mapping[Hashable, int],
    ) -> None:
        """Enter the statistics of float32 layers that were computed together."""
        self._rows.setdefault(statistics, {}).update(zip(keys, rows, strict=True))
        self._sizes.by_key.update(sizes)

    def put_block(
        self, keys: Keys, values: Mapping[Statistic, Tensor], sizes: Mapping[Hashable, int]
    ) -> None:
        """Enter the statistics of layers that were computed together."""
        self._blocks.append(_Block(keys, values))
        self._sizes.by_key.update(sizes)

    def measure(self, key: Hashable, tensor: Tensor, needs: Needs, on_error: OnError) -> None:
        """Compute what is needed of one layer's tensor; a failure leaves that layer out."""
        try:
            if needs.statistics:
                row: Sequence[float] | Sequence[Tensor]
                if tensor.device.type == "cpu":
                    row = statistics_of(tensor, needs.statistics)
                else:
                    table, _ = summarise([tensor], needs.statistics)
                    row = [table[s][0] for s in needs.statistics]
                self.put(key, needs.statistics, row, tensor)
        except Exception as error:
            on_error(key, error)
        if needs.others:
            self.apply(key, tensor, needs.others, on_error)

    def measure_many(self, keys: Keys, tensors: Sequence[Tensor], needs: Needs, on_error: OnError) -> None:
        """The same for many layers: on a device in multi-tensor calls, else one after the other."""
        if len(tensors) > 1 and needs.statistics and all(t.device.type != "cpu" for t in tensors):
            try:
                table, _ = summarise(tensors, needs.statistics)
                self.put_block(keys, table, {k: real_size(t) for k, t in zip(keys, tensors, strict=True)})
                needs = Needs((), needs.others)
            except Exception:
                # One bad layer must not cost the others their values: they are taken one by one below.
                self._blocks = [block for block in self._blocks if block.keys is not keys]
        if len(tensors) > 1 and needs.others:
            needs = Needs(needs.statistics, self._apply_to_all(keys, tensors, needs.others))
        for key, tensor in zip(keys, tensors, strict=True):
            self.measure(key, tensor, needs, on_error)

    def apply(
        self, key: Hashable, tensor: Tensor, reductions: Iterable[Reduction], on_error: OnError
    ) -> None:
        """Compute reductions that take the tensor as a whole."""
        for reduction in reductions:
            try:
                by_layer = reduction.by_layer
                value = reduction.reduce_layer(str(key), tensor) if by_layer else reduction.reduce_one(tensor)
                self._results.setdefault(reduction, {})[key] = value
            except Exception as error:
                on_error(key, error)

    def _apply_to_all(
        self, keys: Keys, tensors: Sequence[Tensor], reductions: Sequence[Reduction]
    ) -> tuple[Reduction, ...]:
        """Compute reductions for many layers at once; gives those that have to go layer by layer."""
        left: list[Reduction] = []
        for reduction in reductions:
            if isinstance(reduction, FunctionReduction) or reduction.by_layer:
                # It takes one tensor at a time, and must not be called twice should one of them fail.
                left.append(reduction)
                continue
            try:
                with torch.no_grad():
                    rows = reduction.reduce(tensors)
                self._results.setdefault(reduction, {}).update(zip(keys, rows, strict=True))
            except Exception:
                left.append(reduction)
        return tuple(left)

    # -- reading -----------------------------------------------------------------------------

    def unremarkable(self, reduction: Reduction, keys: Iterable[Hashable]) -> bool:
        """Whether nobody has to be told what a reduction has come to for these layers."""
        results = self._results.get(reduction, {})
        return all(results.get(key) is reduction.unremarkable for key in keys)

    @property
    def measured(self) -> set[Hashable]:
        """The layers that have statistics."""
        return {k for rows in self._rows.values() for k in rows} | {k for b in self._blocks for k in b.keys}

    def finish(self, reduction: Reduction, keys: Keys) -> tuple[Keys, Tensor] | None:
        """The values of a reduction, stacked, and the layers that have it.

        Args:
            reduction: What is asked for.
            keys: The layers wanted.

        Returns:
            The wanted layers that were measured and their values; None if there is none.
        """
        wanted = reduction.needs()
        if not wanted:
            results = self._results.get(reduction, {})
            present = tuple(k for k in keys if k in results)
            return (present, torch.stack([results[k] for k in present])) if present else None
        self._seal()
        blocks = [b for b in self._blocks if all(s in b.columns for s in wanted)]
        if not blocks:
            return None
        found: Mapping[Statistic, Tensor]
        if len(blocks) == 1:
            held, found = blocks[0].keys, blocks[0].columns
        else:
            held = tuple(k for block in blocks for k in block.keys)
            found = {s: torch.cat([block.columns[s] for block in blocks]) for s in wanted}
        first = found[wanted[0]]
        sizes = self._sizes_of_wholes(blocks)
        if held != keys:
            known = set(held)
            if not known.issuperset(keys):
                keys = tuple(k for k in keys if k in known)
                if not keys:
                    return None
            if held != keys:
                places = self._sizes.places(held, keys, first)
                found = {s: found[s].index_select(0, places) for s in wanted}
                sizes = sizes if sizes is None else sizes.index_select(0, places)
        values = reduction.finish(found, self._sizes.counts(keys, first) if sizes is None else sizes)
        if values.dtype == torch.float64 and not self._double:
            values = values.float()
        return keys, values

    def _sizes_of_wholes(self, blocks: Sequence[_Block]) -> Tensor | None:
        """The sizes of some blocks' layers, where those of wholes are among them."""
        if all(block.counts is None for block in blocks):
            return None
        return torch.cat([self._counts_of(block) for block in blocks])

    def _counts_of(self, block: _Block) -> Tensor:
        if block.counts is not None:
            return block.counts
        return self._sizes.counts(block.keys, next(iter(block.columns.values())))

    # -- parts and wholes --------------------------------------------------------------------

    def take(self, keys: Collection[Hashable]) -> list[Rows]:
        """Take out what there is of some layers, because it is of parts of them."""
        self._seal()
        taken: list[Rows] = []
        blocks, self._blocks = self._blocks, []
        for block in blocks:
            mine = [i for i, key in enumerate(block.keys) if key in keys]
            if not mine:
                self._blocks.append(block)
                continue
            values = torch.stack([*block.columns.values(), self._counts_of(block)])
            statistics = tuple(block.columns)
            if len(mine) == len(block.keys):
                taken.append(Rows(statistics, block.keys, values))
                continue
            rest = [i for i, key in enumerate(block.keys) if key not in keys]
            for index, of_part in ((mine, True), (rest, False)):
                names = tuple(block.keys[i] for i in index)
                some = values.index_select(1, _beside(torch.tensor(index), values))
                if of_part:
                    taken.append(Rows(statistics, names, some))
                else:
                    columns_left = dict(zip(statistics, some, strict=False))
                    self._blocks.append(
                        _Block(names, columns_left, None if block.counts is None else some[-1])
                    )
        for reduction, results in self._results.items():
            names = tuple(key for key in results if key in keys)
            if names:
                stacked = torch.stack([results.pop(key).reshape(-1) for key in names], dim=1)
                taken.append(Rows(reduction, names, stacked))
        return taken

    def put_wholes(self, rows: Rows) -> None:
        """Enter what the parts of some layers have been merged to."""
        self.wholes.update(rows.keys)
        if isinstance(rows.what, tuple):
            *values, counts = rows.values
            self._blocks.append(_Block(rows.keys, dict(zip(rows.what, values, strict=True)), counts))
            return
        scalar = not rows.what.components
        results = self._results.setdefault(rows.what, {})
        for key, value in zip(rows.keys, rows.values.unbind(1), strict=True):
            results[key] = value[0] if scalar and len(value) == 1 else value

    def column(self, statistic: Statistic) -> dict[Hashable, tuple[Tensor, Tensor]]:
        """One statistic of each layer that has it, with the number of elements."""
        self._seal()
        return {
            key: (value, count)
            for block in self._blocks
            if statistic in block.columns
            for key, value, count in zip(
                block.keys, block.columns[statistic], self._counts_of(block), strict=True
            )
        }

    def _seal(self) -> None:
        """Turn rows that were entered one by one into blocks."""
        if not self._rows:
            return
        rows, self._rows = self._rows, {}
        for statistics, by_key in rows.items():
            keys = tuple(by_key)
            if isinstance(keys[0], int):
                # Parameters are known by their place in the model, which is the order asked for.
                keys = tuple(sorted(cast("tuple[int, ...]", keys)))
            values = [by_key[k] for k in keys]
            if isinstance(values[0][0], Tensor):
                tensors = cast("list[Sequence[Tensor]]", values)
                found: Mapping[Statistic, Tensor] = {
                    s: torch.stack([row[i] for row in tensors]) for i, s in enumerate(statistics)
                }
            else:
                found = columns(cast("list[Sequence[float]]", values), statistics)
            self._blocks.append(_Block(keys, found))
