"""`UpdateFrames`: what was taken around an update, as frames."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from streamlens.capture.exchange import Partial
from streamlens.capture.partners import Partners, Reduced
from streamlens.capture.plan import Output
from streamlens.capture.table import Table
from streamlens.frame import Frame, Lease

if TYPE_CHECKING:
    from streamlens.capture.engine import Engine
    from streamlens.capture.view import Demand

__all__ = ["TakenFrom", "UpdateFrames", "known_on_host", "masked", "masked_frames"]

TakenFrom: TypeAlias = tuple[Output, Table, dict[int, Tensor]]
"""What was asked for, its statistics, and the tensors themselves."""


class UpdateFrames:
    """Makes frames of tensors and of their statistics.

    Args:
        engine: The engine.
        partners: The optimizers of the open step.
    """

    def __init__(self, engine: Engine, partners: Partners) -> None:
        self._engine = engine
        self._partners = partners

    def partials(self, sources: Iterable[TakenFrom]) -> list[Partial]:
        """The tables with rows of parameters of which this process holds a part."""
        tables = {id(table): (output, table) for output, table, _ in sources if table.parts}
        entries = self._engine.index.entries if tables else ()
        names: dict[Hashable, str] = {entry.order: entry.name for entry in entries}
        return [
            Partial(output.spec.state or output.spec.facet.value, table, table.parts, names)
            for output, table in tables.values()
            if output.spec.facet is not None
        ]

    def of(
        self, sources: Iterable[TakenFrom], lease: Lease
    ) -> tuple[list[tuple[Sequence[Demand], Frame]], list[Reduced]]:
        """Frames of what is wanted raw, and what may have to wait for other optimizers."""
        frames: list[tuple[Sequence[Demand], Frame]] = []
        reduced: list[Reduced] = []
        for output, table, tensors in sources:
            if output.reduction is None:
                frame = self.raw(output, tensors, lease)
                frames += [] if frame is None else [frame]
                continue
            where = f"{output.spec.name}.{output.reduction.name}"
            found = self._engine.attempt(where, table.finish, output.reduction, output.orders)
            if found is not None:
                reduced.append((output, *found))
        return frames, reduced

    def raw(
        self, output: Output, tensors: dict[int, Tensor], lease: Lease
    ) -> tuple[Sequence[Demand], Frame] | None:
        """The frame of the tensors themselves, and who gets it; None if there are none."""
        held = [(key, tensors[o]) for key, o in zip(output.keys, output.orders, strict=True) if o in tensors]
        if not held:
            return None
        layers = self._partners.interned(key for key, _ in held)
        frame = self._engine.frame(output.spec.name, layers, tuple(v for _, v in held), lease=lease)
        return output.demands, frame


def known_on_host(found_inf: Tensor) -> bool:
    """Whether it can be told without waiting whether a gradient has overflowed."""
    return found_inf.is_cpu


def masked(values: Tensor, overflow: Tensor) -> Tensor:
    """NaN where the step was none, which only the device knows; what holds no NaN stays as it is."""
    if not (values.is_floating_point() or values.is_complex()):
        return values
    if values.layout is torch.sparse_coo:
        parts = masked(values._values(), overflow)
        return torch.sparse_coo_tensor(
            values._indices(),
            parts,
            values.shape,
            is_coalesced=values.is_coalesced(),
            check_invariants=False,
        )
    # Towards the device, where there is a choice: the other way waits.
    to = values.device if overflow.is_cpu or not values.is_cpu else overflow.device
    values, overflow = values.to(to, non_blocking=True), overflow.to(to, non_blocking=True)
    return torch.where(overflow > 0, torch.nan, values)


def masked_frames(
    frames: Iterable[tuple[Sequence[Demand], Frame]], overflow: Tensor
) -> list[tuple[Sequence[Demand], Frame]]:
    """Frames with copies of raw values that are NaN where the step was none."""
    return [(d, f.replace(values=tuple(masked(v, overflow) for v in f.values))) for d, f in frames]
