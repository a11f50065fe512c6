"""Taking parameters, their gradients, updates and optimizer state around an update.

What must be read before the update (gradients, the learning rate) is reduced before it; weights
and updates are read after it, in one pass over each tensor where nobody wants the update itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from streamlens.capture.kept import Kept
from streamlens.capture.plan import CallPlan, Output, compile_call
from streamlens.capture.sharded import WHOLE, Part, local, part_of
from streamlens.capture.small import SQUARES, Small, Squares, changes_of, squares_of, squares_of_flat
from streamlens.capture.table import Needs, Sizes, Table
from streamlens.errors import StreamlensError
from streamlens.reductions import Reduction, accumulate, square_of
from streamlens.topics import Facet

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from streamlens.capture.model import ModelIndex, ParameterEntry
    from streamlens.capture.optimizers import OptimizerInfo
    from streamlens.capture.view import Demand

__all__ = ["ParameterCapture"]

OnError = Callable[[Hashable, Exception], None]


class ParameterCapture:
    """Plans and carries out what is taken around an update."""

    def __init__(self, on_error: OnError) -> None:
        self._on_error = on_error
        self._kept: dict[int, Kept] = {}
        self._sizes = Sizes()
        self._plans: dict[tuple[Any, ...], CallPlan] = {}

    # -- planning ----------------------------------------------------------------------------

    def reset(self) -> None:
        """Forget every plan, because demands or the model changed."""
        self._plans.clear()

    def drop_copies(self) -> None:
        """Let go of every kept copy."""
        self._kept.clear()
        self._sizes = Sizes()

    @property
    def bytes_held(self) -> int:
        """Bytes of kept copies."""
        return sum(k.buffer.numel() * k.buffer.element_size() for k in self._kept.values())

    def plan(
        self,
        due: Sequence[Demand],
        index: ModelIndex,
        info: OptimizerInfo,
        *,
        unowned: frozenset[int],
        given: frozenset[int] = frozenset(),
        merging: bool = False,
    ) -> CallPlan:
        """What a call of this optimizer takes for these demands.

        Args:
            due: The demands that are due at this step.
            index: The model's names.
            info: The optimizer that steps.
            unowned: Parameters that no optimizer owns and that come with this call.
            given: Parameters whose values came with an earlier call of the step.
            merging: Whether what is taken may be a part of what several processes have.
        """
        key = (tuple(map(id, due)), info.serial, id(info.entries), unowned, given, merging)
        plan = self._plans.get(key)
        if plan is None:
            if len(self._plans) > 256:
                self._plans.clear()
            plan = self._plans[key] = compile_call(due, index, info, unowned, given, merging=merging)
        return plan

    # -- before the update -------------------------------------------------------------------

    def keep(self, entries: Iterable[ParameterEntry]) -> None:
        """Have a copy of each parameter as it stands, copying those whose copy is out of date."""
        for entry in entries:
            kept = self._kept.get(entry.order)
            parameter = entry.tensor
            if kept is None or not kept.fits(parameter):
                kept = self._kept[entry.order] = Kept(parameter)
            if not kept.is_current(parameter):
                kept.copy(parameter)

    def gradients(self, plan: CallPlan, optimizer: Optimizer | None) -> tuple[Table, dict[int, Tensor]]:
        """The gradients as the optimizer consumes them, and their statistics."""
        table = Table(self._sizes)
        needs = plan.needs.get(Facet.GRADIENT, {})
        scale = getattr(optimizer, "grad_scale", None)
        tensors: dict[int, Tensor] = {}
        for entry in plan.entries.get(Facet.GRADIENT, ()):
            gradient = entry.parameter.grad if entry.copy is None else entry.copy.gradient
            if gradient is None:
                continue
            if type(gradient) is not Tensor:
                self._note_part(table, entry.order, gradient)
            gradient = local(gradient)
            if isinstance(scale, Tensor):
                # A fused optimizer unscales within its own kernel.
                gradient = gradient / scale.to(gradient.device, non_blocking=True)
            tensors[entry.order] = gradient
        rest = dict(tensors)
        small = plan.small.get(Facet.GRADIENT)
        if small is not None:
            if len(rest) != len(plan.entries[Facet.GRADIENT]):
                small = Small.of(e for e in small.entries if e.order in rest)
            gradients = [rest[order] for order in small.orders]
            # A model may have been moved to another precision or device since this was planned.
            if gradients and all(
                g.layout is torch.strided and g.dtype == torch.float32 and g.is_cpu for g in gradients
            ):
                self._enter(table, small, squares_of([g.numpy() for g in gradients]), whole=len(rest))
                for order in small.orders:
                    del rest[order]
        self._measure(table, rest, needs)
        return table, tensors

    def _note_part(self, table: Table, order: int, tensor: Tensor) -> None:
        """Note of which part of a DTensor the statistics in a table are."""
        try:
            part: Part | None = part_of(tensor)
        except StreamlensError as error:
            part = None
            self._on_error(order, error)
        if part is not WHOLE:
            table.parts[order] = part

    @staticmethod
    def _enter(table: Table, small: Small, squares: Squares, *, whole: int) -> None:
        """Enter what was computed of small parameters: as it is if there are no others."""
        if len(small.orders) == whole:
            table.put_block(small.orders, {SQUARES[0]: torch.from_numpy(squares)}, small.sizes)
        else:
            table.put_rows(SQUARES, small.orders, [[s] for s in squares.tolist()], small.sizes)

    def rates(self, output: Output, info: OptimizerInfo, optimizer: Optimizer) -> Tensor:
        """The learning rate of the group that holds each layer's weight."""
        groups = [group.get("lr", math.nan) for group in optimizer.param_groups]
        rates = [groups[info.group_of[order]] for order in output.orders]
        if any(isinstance(rate, Tensor) and rate.is_cuda for rate in rates):
            return torch.stack([torch.as_tensor(r, dtype=torch.float32).reshape(()) for r in rates])
        return torch.tensor([float(rate) for rate in rates])

    # -- after the update --------------------------------------------------------------------

    def values(self, plan: CallPlan, *, keep_next: bool) -> tuple[Table, Table, dict[int, Tensor]]:
        """Statistics of weights and updates, and the updates themselves where somebody wants them.

        Args:
            plan: What this call takes.
            keep_next: Whether the next step needs a copy of what the weights are now.

        Returns:
            The tables of weights and of updates, and the update tensors by parameter.
        """
        values, updates = Table(self._sizes), Table(self._sizes)
        values.parts = updates.parts = plan.parts
        value_needs = plan.needs.get(Facet.VALUE, {})
        update_needs = plan.needs.get(Facet.UPDATE, {})
        whole: dict[int, Tensor] = {}
        done = self._small_pass(plan, values, updates, keep_next=keep_next)
        for entry in plan.entries.get(Facet.UPDATE, ()):
            if entry.order in done[Facet.UPDATE]:
                continue
            kept = self._kept.get(entry.order)
            if kept is None or not kept.valid:
                continue
            on_cpu = kept.buffer.device.type == "cpu"
            pieces = kept.pieces(entry.tensor) if on_cpu and not plan.whole_updates else None
            if pieces is None:
                try:
                    whole[entry.order] = kept.change(entry.tensor)
                except Exception as error:
                    self._on_error(entry.order, error)
                continue
            wanted = value_needs.get(entry.order, Needs())
            if entry.order in done[Facet.VALUE]:
                wanted = Needs()
            self._pass(entry, kept, pieces, (wanted, values), (update_needs[entry.order], updates), keep_next)
        read = plan.entries.get(Facet.VALUE, ())
        if len(done[Facet.VALUE]) < len(read):
            measured = values.measured
            alone = {e.order: e.tensor.detach() for e in read if e.order not in measured}
            self._measure(values, alone, value_needs)
        self._measure(updates, whole, update_needs)
        return values, updates, whole

    def _small_pass(
        self, plan: CallPlan, values: Table, updates: Table, *, keep_next: bool
    ) -> dict[Facet, Collection[int]]:
        """All small parameters at once; which of them are done, of updates and of weights."""
        done: dict[Facet, Collection[int]] = {Facet.UPDATE: (), Facet.VALUE: ()}
        changed, read = plan.small.get(Facet.UPDATE), plan.small.get(Facet.VALUE)
        copies = [self._kept.get(order) for order in changed.orders] if changed is not None else []
        try:
            if read is not None and (weights := read.weights()) is not None:
                self._enter(values, read, squares_of_flat(weights), whole=len(plan.entries[Facet.VALUE]))
                done[Facet.VALUE] = read.places
            if (
                changed is not None
                and all(k is not None and k.valid for k in copies)
                and (weights := changed.weights()) is not None
            ):
                kept = cast("list[Kept]", copies)
                buffers = changed.buffers([k.buffer for k in kept])
                squares = changes_of(weights, buffers, keep_next=keep_next)
                self._enter(updates, changed, squares, whole=len(plan.entries[Facet.UPDATE]))
                for k, entry in zip(kept, changed.entries, strict=True):
                    k.valid = False
                    if keep_next:
                        k.accept(entry.tensor)
                done[Facet.UPDATE] = changed.places
        except Exception as error:
            for copy in copies:
                if copy is not None:
                    copy.valid = False
            self._on_error("a pass over the small parameters", error)
        return done

    def _pass(
        self,
        entry: ParameterEntry,
        kept: Kept,
        pieces: tuple[tuple[Tensor, Tensor], ...],
        value: tuple[Needs, Table],
        update: tuple[Needs, Table],
        keep_next: bool,
    ) -> None:
        """Update, statistics and the next copy, piece by piece while a piece is in the cache."""
        try:
            statistics = value[0].statistics
            of_update = update[0].statistics
            if of_update == SQUARES and statistics in ((), SQUARES):
                row, row_update = _squares_pass(pieces, bool(statistics), keep_next)
            else:
                for weight, buffer in pieces:
                    torch.sub(weight, buffer, out=buffer)
                row_update = accumulate([b for _, b in pieces], of_update)
                row = accumulate([w for w, _ in pieces], statistics) if statistics else []
                if keep_next:
                    for weight, buffer in pieces:
                        buffer.copy_(weight)
            update[1].put(entry.order, of_update, row_update, entry.tensor)
            if statistics:
                value[1].put(entry.order, statistics, row, entry.tensor)
                value[1].apply(entry.order, entry.tensor.detach(), value[0].others, self._layer_error)
            kept.valid = False
            if keep_next:
                kept.accept(entry.tensor)
        except Exception as error:
            kept.valid = False
            self._on_error(entry.order, error)

    def renew(self, entries: Iterable[ParameterEntry], *, keep_next: bool) -> None:
        """After an update: copy the weights for the next step, or note that copies are out of date."""
        if not self._kept:
            return
        for entry in entries:
            kept = self._kept.get(entry.order)
            if kept is None:
                continue
            if not keep_next:
                kept.valid = False
            elif not kept.is_current(entry.tensor):
                kept.copy(entry.tensor)

    def states(self, plan: CallPlan, optimizer: Optimizer) -> dict[str, tuple[Table, dict[int, Tensor]]]:
        """The optimizer's own state tensors, by state key."""
        found: dict[str, tuple[Table, dict[int, Tensor]]] = {}
        wanted: dict[str, dict[int, list[Reduction]]] = {}
        for output in plan.outputs.get(Facet.STATE, ()):
            key = output.spec.state
            tensors = found.setdefault(key, (Table(), {}))[1]
            reductions = wanted.setdefault(key, {})
            for entry in output.entries:
                copy = entry.copy
                value = optimizer.state.get(entry.parameter if copy is None else copy.base, {}).get(key)
                if isinstance(value, Tensor):
                    self._note_part(found[key][0], entry.order, value)
                    value = local(value)
                    tensors[entry.order] = value if copy is None else copy.part_of(value)
                    asked = reductions.setdefault(entry.order, [])
                    if output.reduction is not None:
                        asked.append(output.reduction)
        for key, (table, tensors) in found.items():
            needs = {order: Needs.of(rs, merging=plan.merging) for order, rs in wanted[key].items()}
            self._measure(table, tensors, needs)
        return found

    def _measure(self, table: Table, tensors: dict[int, Tensor], needs: dict[int, Needs]) -> None:
        groups: dict[Needs, list[int]] = {}
        for order in tensors:
            need = needs.get(order)
            if need:
                groups.setdefault(need, []).append(order)
        for need, orders in groups.items():
            table.measure_many(tuple(orders), [tensors[o] for o in orders], need, self._layer_error)

    def _layer_error(self, key: Hashable, error: Exception) -> None:
        self._on_error(key, error)


def _squares_pass(
    pieces: tuple[tuple[Tensor, Tensor], ...], weights: bool, keep_next: bool
) -> tuple[list[float], list[float]]:
    """The hot path: squares of update and weight and the next copy, 4 operations on a cached piece."""
    of_weight = of_update = 0.0
    for weight, buffer in pieces:
        torch.sub(weight, buffer, out=buffer)
        of_update += square_of(buffer)
        if weights:
            of_weight += square_of(weight)
        if keep_next:
            buffer.copy_(weight)
    return ([of_weight] if weights else []), [of_update]
