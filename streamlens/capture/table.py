"""`Table`: what was computed of one artifact at one step, layer by layer, before it becomes frames."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from streamlens.reductions import (
    Reduction,
    Statistic,
    accumulate,
    columns,
    needed_statistics,
    pieces_of,
    real_size,
    summarise,
)

__all__ = ["Needs", "Sizes", "Table"]

OnError = Callable[[Hashable, Exception], None]


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
    def of(cls, reductions: Iterable[Reduction]) -> Needs:
        """The union of some reductions' needs."""
        wanted = tuple(dict.fromkeys(reductions))
        return cls(
            needed_statistics(r for r in wanted if r.needs()), tuple(r for r in wanted if not r.needs())
        )

    def __bool__(self) -> bool:
        return bool(self.statistics or self.others)


class Sizes:
    """Elements of each layer's tensor; parameters share one, since their sizes stay."""

    __slots__ = ("_tensors", "by_key")

    def __init__(self) -> None:
        self.by_key: dict[Hashable, int] = {}
        self._tensors: dict[tuple[Hashable, ...], Tensor] = {}

    def tensor(self, keys: tuple[Hashable, ...]) -> Tensor:
        """The sizes of some layers as a vector."""
        found = self._tensors.get(keys)
        if found is None:
            found = torch.tensor([self.by_key[k] for k in keys], dtype=torch.float64)
            self._tensors[keys] = found
        return found


class Table:
    """Statistics by layer; finishing a reduction reads them, so that what is shared is computed once."""

    __slots__ = ("_needs", "_results", "_rows", "_sizes", "_uniform", "_whole")

    def __init__(self, sizes: Sizes | None = None) -> None:
        self._rows: dict[Hashable, Sequence[float] | Sequence[Tensor]] = {}
        self._needs: dict[Hashable, tuple[Statistic, ...]] = {}
        self._uniform: tuple[Statistic, ...] | None = None
        self._sizes = Sizes() if sizes is None else sizes
        self._results: dict[tuple[Hashable, Reduction], Tensor] = {}
        self._whole: dict[tuple[tuple[Hashable, ...], tuple[Statistic, ...]], Tensor] = {}

    @property
    def rows(self) -> Collection[Hashable]:
        """The layers that have statistics."""
        return self._rows.keys()

    def put(
        self,
        key: Hashable,
        statistics: tuple[Statistic, ...],
        row: Sequence[float] | Sequence[Tensor],
        size: int,
    ) -> None:
        """Enter the statistics of one layer."""
        if not self._rows:
            self._uniform = statistics
        elif self._uniform is not statistics and self._uniform != statistics:
            self._uniform = None
        self._rows[key] = row
        self._needs[key] = statistics
        self._sizes.by_key[key] = size

    def measure(self, key: Hashable, tensor: Tensor, needs: Needs, on_error: OnError) -> None:
        """Compute what is needed of one layer's tensor; a failure leaves that layer out."""
        try:
            if needs.statistics:
                row: Sequence[float] | Sequence[Tensor]
                if tensor.device.type == "cpu":
                    row = accumulate(pieces_of(tensor, needs.statistics), needs.statistics)
                else:
                    table, _ = summarise([tensor], needs.statistics)
                    row = [table[s][0] for s in needs.statistics]
                self.put(key, needs.statistics, row, real_size(tensor))
            self.apply(key, tensor, needs.others, on_error)
        except Exception as error:
            on_error(key, error)

    def measure_many(
        self, keys: Sequence[Hashable], tensors: Sequence[Tensor], needs: Needs, on_error: OnError
    ) -> None:
        """The same for many layers: on a device in one multi-tensor call, else one after the other."""
        if len(tensors) > 1 and needs.statistics and all(t.device.type != "cpu" for t in tensors):
            try:
                table, _ = summarise(tensors, needs.statistics)
            except Exception:  # one bad layer must not cost the others their values
                pass
            else:
                split = [table[s].unbind() for s in needs.statistics]
                for i, (key, tensor) in enumerate(zip(keys, tensors, strict=True)):
                    self.put(key, needs.statistics, [column[i] for column in split], real_size(tensor))
                    self.apply(key, tensor, needs.others, on_error)
                return
        for key, tensor in zip(keys, tensors, strict=True):
            self.measure(key, tensor, needs, on_error)

    def apply(
        self, key: Hashable, tensor: Tensor, reductions: Iterable[Reduction], on_error: OnError
    ) -> None:
        """Compute reductions that take the tensor as a whole."""
        for reduction in reductions:
            try:
                with torch.no_grad():
                    self._results[key, reduction] = reduction.reduce([tensor])[0].clone()
            except Exception as error:
                on_error(key, error)

    def present(self, reduction: Reduction, keys: tuple[Hashable, ...]) -> tuple[Hashable, ...]:
        """Those of the keys that have what a reduction needs."""
        if reduction.needs():
            rows = self._rows
            return keys if all(k in rows for k in keys) else tuple(k for k in keys if k in rows)
        results = self._results
        if all((k, reduction) in results for k in keys):
            return keys
        return tuple(k for k in keys if (k, reduction) in results)

    def finish(self, reduction: Reduction, keys: tuple[Hashable, ...]) -> Tensor:
        """The values of a reduction for layers that are present, stacked."""
        if not reduction.needs():
            return torch.stack([self._results[k, reduction] for k in keys])
        needs = self._needs[keys[0]]
        counts = self._sizes.tensor(keys)
        if isinstance(self._rows[keys[0]][0], Tensor):
            table = {
                s: torch.stack([self._rows[k][self._needs[k].index(s)] for k in keys])  # type: ignore[misc]
                for s in reduction.needs()
            }
            home = next(iter(table.values()))
            counts = counts.to(home.dtype)
            if home.is_cuda:
                counts = counts.pin_memory().to(home.device, non_blocking=True)
            return reduction.finish(table, counts)
        if self._uniform is not None:
            # Several reductions of the same layers read one matrix.
            whole = self._whole.get((keys, needs))
            if whole is None:
                whole = torch.tensor([self._rows[k] for k in keys], dtype=torch.float64)
                self._whole[keys, needs] = whole
            return reduction.finish({s: whole[:, needs.index(s)] for s in reduction.needs()}, counts)
        wanted = reduction.needs()
        rows = [[float(self._rows[k][self._needs[k].index(s)]) for s in wanted] for k in keys]
        return reduction.finish(columns(rows, wanted), counts)
