"""Taking parameters, their gradients, updates and optimizer state around an update.

What must be read before the update (gradients, the learning rate) is reduced before it; weights
and updates are read after it, in one pass over each tensor where nobody wants the update itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from streamlens.capture.table import Needs, Sizes, Table
from streamlens.reductions import Reduction, Statistic, accumulate, chunks_of, flat_real, real_size
from streamlens.topics import Facet, Phase, TopicSpec, topic_spec

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from streamlens.capture.model import ModelIndex, ParameterEntry
    from streamlens.capture.optimizers import OptimizerInfo
    from streamlens.capture.view import Demand

__all__ = ["CallPlan", "Kept", "Output", "ParameterCapture"]

OnError = Callable[[str, Exception], None]

_SQUARES = (Statistic("sum_of_squares"),)

_SMALL: Final = 1 << 14
"""Parameters up to this size are handled together: the calls cost more than the arithmetic."""


@dataclass(eq=False)
class Output:
    """One (topic, reduction) over one set of layers, and who asked for it."""

    group: tuple[str, Reduction | None, frozenset[str] | None]
    """Topic, reduction and the layers asked for: equal for the parts of several optimizers."""
    spec: TopicSpec
    reduction: Reduction | None
    entries: tuple[ParameterEntry, ...]
    keys: tuple[str, ...]
    orders: tuple[int, ...]
    demands: list[Demand] = field(default_factory=list)


@dataclass(eq=False)
class CallPlan:
    """What one update call has to take: compiled once for a set of due demands and an optimizer."""

    outputs: dict[Facet, list[Output]]
    needs: dict[Facet, dict[int, Needs]]
    entries: dict[Facet, tuple[ParameterEntry, ...]]
    whole_updates: bool
    """Whether somebody wants the updates themselves and not only statistics of them."""
    _small: dict[Facet, tuple[ParameterEntry, ...]] = field(default_factory=dict)
    """Small float32 CPU parameters of which only norms are wanted."""

    def small(self, facet: Facet) -> tuple[ParameterEntry, ...]:
        """The parameters of a facet that are handled by multi-tensor calls."""
        found = self._small.get(facet)
        if found is None:
            needs = self.needs.get(facet, {})
            found = self._small[facet] = tuple(
                e
                for e in self.entries.get(facet, ())
                if _plain_need(needs[e.order]) and e.parameter.numel() <= _SMALL and _dense(e.parameter)
            )
        return found

    def __bool__(self) -> bool:
        return bool(self.outputs)


class Kept:
    """A copy of one parameter as it was before the update."""

    __slots__ = ("_pieces", "address", "buffer", "valid", "version")

    def __init__(self, parameter: Tensor) -> None:
        self.buffer = torch.empty_like(parameter, requires_grad=False).detach()
        self.valid = False
        self.version = -1
        self.address = 0
        self._pieces: tuple[tuple[Tensor, Tensor], ...] | None = None

    def is_current(self, parameter: Tensor) -> bool:
        """Whether the copy is still what the parameter holds."""
        return self.valid and parameter._version == self.version and parameter.data_ptr() == self.address

    def fits(self, parameter: Tensor) -> bool:
        """Whether the buffer has the parameter's shape, type and place."""
        b = self.buffer
        return b.shape == parameter.shape and b.dtype == parameter.dtype and b.device == parameter.device

    def copy(self, parameter: Tensor) -> None:
        """Take a copy now."""
        self.buffer.copy_(parameter.detach())
        self.accept(parameter)

    def accept(self, parameter: Tensor) -> None:
        """Note that the buffer holds the parameter's value."""
        self.valid = True
        self.version = parameter._version
        if parameter.data_ptr() != self.address:
            self.address = parameter.data_ptr()
            self._pieces = None

    def pieces(self, parameter: Tensor) -> tuple[tuple[Tensor, Tensor], ...] | None:
        """Cache-sized pieces of (parameter, buffer), both in memory order; None if they differ in layout."""
        if self._pieces is None or parameter.data_ptr() != self.address:
            value = parameter.detach()
            if value.stride() != self.buffer.stride():
                return None
            flat, kept = flat_real(value), flat_real(self.buffer)
            if flat.data_ptr() != value.data_ptr() or kept.data_ptr() != self.buffer.data_ptr():
                return None
            self.address = parameter.data_ptr()
            self._pieces = tuple(zip(chunks_of(flat), chunks_of(kept), strict=True))
        return self._pieces


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
        self, due: Sequence[Demand], index: ModelIndex, info: OptimizerInfo, *, unowned: frozenset[int]
    ) -> CallPlan:
        """What a call of this optimizer takes for these demands.

        Args:
            due: The demands that are due at this step.
            index: The model's names.
            info: The optimizer that steps.
            unowned: Parameters that no optimizer owns and that come with this call.
        """
        key = (tuple(map(id, due)), info.serial, id(info.entries), unowned)
        plan = self._plans.get(key)
        if plan is None:
            if len(self._plans) > 256:
                self._plans.clear()
            plan = self._plans[key] = self._compile(due, index, info, unowned)
        return plan

    def _compile(
        self, due: Sequence[Demand], index: ModelIndex, info: OptimizerInfo, unowned: frozenset[int]
    ) -> CallPlan:
        owned = {entry.order for entry in info.entries}
        found: dict[tuple[Any, ...], Output] = {}
        for demand in due:
            for topic in demand.view.topics:
                spec = topic_spec(topic)
                if spec is None or spec.phase is not Phase.PARAMETER or spec.facet is Facet.RAW_GRADIENT:
                    continue
                wanted = demand.layers.get(topic)
                reach = owned | unowned if spec.facet is Facet.VALUE else owned
                entries = tuple(_entries(spec, index, reach, wanted))
                if not entries:
                    continue
                group = (topic, demand.view.reduction, wanted)
                output = found.get(group)
                if output is None:
                    keys = tuple(e.layer if spec.facet is Facet.RATE else index.key(spec, e) for e in entries)
                    orders = tuple(e.order for e in entries)
                    output = found[group] = Output(group, spec, demand.view.reduction, entries, keys, orders)
                output.demands.append(demand)
        return _call_plan(found.values())

    # -- before the update -------------------------------------------------------------------

    def keep(self, entries: Iterable[ParameterEntry]) -> None:
        """Have a copy of each parameter as it stands, copying those whose copy is out of date."""
        for entry in entries:
            kept = self._kept.get(entry.order)
            parameter = entry.parameter
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
            gradient = entry.parameter.grad
            if gradient is None:
                continue
            gradient = gradient.detach()
            if isinstance(scale, Tensor):
                # A fused optimizer unscales within its own kernel.
                gradient = gradient / scale.to(gradient.device, non_blocking=True)
            tensors[entry.order] = gradient
        rest = dict(tensors)
        small = [e for e in plan.small(Facet.GRADIENT) if (g := rest.get(e.order)) is not None and _dense(g)]
        if len(small) > 1:
            norms = torch._foreach_norm([rest.pop(e.order) for e in small])
            self._enter(table, small, needs[small[0].order], torch.stack(norms).tolist(), tensors)
        self._measure(table, rest, needs)
        return table, tensors

    def _enter(
        self,
        table: Table,
        entries: Sequence[ParameterEntry],
        needs: Needs,
        norms: Sequence[float],
        tensors: Mapping[int, Tensor],
    ) -> None:
        """Note squared norms; a norm at the edge of float32's range is computed again, in double."""
        for entry, norm in zip(entries, norms, strict=True):
            if norm < 1e-15 or norm == math.inf:
                row = accumulate((flat_real(tensors[entry.order]),), _SQUARES)
            else:
                row = [norm * norm]
            table.put(entry.order, needs.statistics, row, entry.parameter.numel())

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
        value_needs = plan.needs.get(Facet.VALUE, {})
        update_needs = plan.needs.get(Facet.UPDATE, {})
        whole: dict[int, Tensor] = {}
        alone: dict[int, Tensor] = {}
        small = self._small_pass(plan, values, updates, keep_next=keep_next)
        for entry in plan.entries.get(Facet.UPDATE, ()):
            if entry.order in small:
                continue
            kept = self._kept.get(entry.order)
            if kept is None or not kept.valid:
                continue
            pieces = (
                None
                if plan.whole_updates or kept.buffer.device.type != "cpu"
                else kept.pieces(entry.parameter)
            )
            if pieces is None:
                kept.valid = False
                whole[entry.order] = torch.sub(entry.parameter.detach(), kept.buffer, out=kept.buffer)
                continue
            needs = value_needs.get(entry.order, Needs())
            self._pass(entry, kept, pieces, (needs, values), (update_needs[entry.order], updates), keep_next)
        done = values.rows
        for entry in plan.entries.get(Facet.VALUE, ()):
            if entry.order not in done:
                alone[entry.order] = entry.parameter.detach()
        self._measure(values, alone, value_needs)
        self._measure(updates, whole, update_needs)
        return values, updates, whole

    def _small_pass(
        self, plan: CallPlan, values: Table, updates: Table, *, keep_next: bool
    ) -> frozenset[int]:
        """The same for all small parameters at once, where calls cost more than the arithmetic."""
        if plan.whole_updates:
            return frozenset()
        entries = [
            e
            for e in plan.small(Facet.UPDATE)
            if (kept := self._kept.get(e.order)) is not None and kept.valid
        ]
        if len(entries) < 2:
            return frozenset()
        copies = [self._kept[e.order] for e in entries]
        buffers, weights = [k.buffer for k in copies], [e.parameter.detach() for e in entries]
        wanted = plan.needs.get(Facet.VALUE, {})
        read = [i for i, e in enumerate(entries) if _plain_need(wanted.get(e.order))]
        try:
            torch._foreach_sub_(buffers, weights)
            norms = torch._foreach_norm([*buffers, *(weights[i] for i in read)])
            numbers = torch.stack(norms).tolist()
            by_order = {e.order: b for e, b in zip(entries, buffers, strict=True)}
            needs = plan.needs[Facet.UPDATE]
            self._enter(updates, entries, needs[entries[0].order], numbers[: len(entries)], by_order)
            if read:
                chosen = [entries[i] for i in read]
                by_order = {e.order: weights[i] for e, i in zip(chosen, read, strict=True)}
                self._enter(values, chosen, wanted[chosen[0].order], numbers[len(entries) :], by_order)
            if keep_next:
                torch._foreach_copy_(buffers, weights)
        except Exception as error:
            for k in copies:
                k.valid = False
            self._on_error("a pass over the small parameters", error)
            return frozenset()
        for k, entry in zip(copies, entries, strict=True):
            k.valid = False
            if keep_next:
                k.accept(entry.parameter)
        return frozenset(e.order for e in entries)

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
            if _plain(statistics) and _plain(of_update) and pieces and pieces[0][0].dtype == torch.float32:
                row, row_update = _squares_pass(pieces, bool(statistics), keep_next)
            else:
                for weight, buffer in pieces:
                    torch.sub(weight, buffer, out=buffer)
                row_update = accumulate([b for _, b in pieces], of_update)
                row = accumulate([w for w, _ in pieces], statistics) if statistics else []
                if keep_next:
                    for weight, buffer in pieces:
                        buffer.copy_(weight)
            size = real_size(entry.parameter)
            update[1].put(entry.order, of_update, row_update, size)
            if statistics:
                value[1].put(entry.order, statistics, row, size)
                value[1].apply(entry.order, entry.parameter.detach(), value[0].others, self._layer_error)
            kept.valid = False
            if keep_next:
                kept.accept(entry.parameter)
        except Exception as error:
            kept.valid = False
            self._on_error(entry.name, error)

    def renew(self, entries: Iterable[ParameterEntry], *, keep_next: bool) -> None:
        """After delivery: copy the weights for the next step, or note that copies are out of date."""
        for entry in entries:
            kept = self._kept.get(entry.order)
            if kept is None:
                continue
            if not keep_next:
                kept.valid = False
            elif not kept.is_current(entry.parameter):
                kept.copy(entry.parameter)

    def invalidate(self, entries: Iterable[ParameterEntry]) -> None:
        """Note that an update was not watched, so that copies are out of date."""
        if self._kept:
            for entry in entries:
                kept = self._kept.get(entry.order)
                if kept is not None:
                    kept.valid = False

    def states(self, plan: CallPlan, optimizer: Optimizer) -> dict[str, tuple[Table, dict[int, Tensor]]]:
        """The optimizer's own state tensors, by state key."""
        found: dict[str, tuple[Table, dict[int, Tensor]]] = {}
        for output in plan.outputs.get(Facet.STATE, ()):
            key = output.spec.state
            table, tensors = found.setdefault(key, (Table(), {}))
            needs = Needs.of([output.reduction] if output.reduction is not None else [])
            fresh: dict[int, Tensor] = {}
            for entry in output.entries:
                value = optimizer.state.get(entry.parameter, {}).get(key)
                if isinstance(value, Tensor):
                    fresh[entry.order] = tensors[entry.order] = value.detach()
            self._measure(table, fresh, dict.fromkeys(fresh, needs))
        return found

    def _measure(self, table: Table, tensors: dict[int, Tensor], needs: dict[int, Needs]) -> None:
        groups: dict[Needs, list[int]] = {}
        for order in tensors:
            need = needs.get(order)
            if need:
                groups.setdefault(need, []).append(order)
        for need, orders in groups.items():
            table.measure_many(orders, [tensors[o] for o in orders], need, self._layer_error)

    def _layer_error(self, key: Hashable, error: Exception) -> None:
        self._on_error(f"parameter {key}", error)


def _entries(
    spec: TopicSpec, index: ModelIndex, orders: Iterable[int], wanted: frozenset[str] | None
) -> Iterable[ParameterEntry]:
    allowed = set(orders)
    if spec.facet is Facet.RATE:
        # A layer's rate is that of its weight, or of its first parameter if it has no weight.
        first: dict[str, ParameterEntry] = {}
        for entry in index.entries:
            if entry.order in allowed and (entry.layer not in first or entry.role == "weight"):
                first[entry.layer] = entry
        return [e for e in first.values() if wanted is None or e.layer in wanted]
    return [
        e
        for e in index.parameters(spec)
        if e.order in allowed and (wanted is None or index.key(spec, e) in wanted)
    ]


def _call_plan(found: Iterable[Output]) -> CallPlan:
    """Unite what several outputs need of each parameter."""
    outputs: dict[Facet, list[Output]] = {}
    for output in found:
        assert output.spec.facet is not None
        outputs.setdefault(output.spec.facet, []).append(output)
    needs: dict[Facet, dict[int, Needs]] = {}
    involved: dict[Facet, tuple[ParameterEntry, ...]] = {}
    shared: dict[Needs, Needs] = {}
    for facet, group in outputs.items():
        reductions: dict[int, list[Reduction]] = {}
        by_order = {e.order: e for o in group for e in o.entries}
        for output in group:
            for order in output.orders:
                mine = reductions.setdefault(order, [])
                if output.reduction is not None:
                    mine.append(output.reduction)
        # Equal needs become one object, so that layers with the same needs share one matrix.
        needs[facet] = {}
        for order, wants in reductions.items():
            need = Needs.of(wants)
            needs[facet][order] = shared.setdefault(need, need)
        involved[facet] = tuple(by_order[order] for order in sorted(by_order))
    whole = any(o.reduction is None or not o.reduction.needs() for o in outputs.get(Facet.UPDATE, ()))
    return CallPlan(outputs, needs, involved, whole)


def _plain_need(needs: Needs | None) -> bool:
    return needs is not None and not needs.others and needs.statistics == _SQUARES


def _dense(tensor: Tensor) -> bool:
    """Whether a tensor may be part of a multi-tensor call on the CPU."""
    return (
        tensor.dtype == torch.float32
        and tensor.device.type == "cpu"
        and tensor.layout is torch.strided
        and not hasattr(tensor, "to_local")
        and tensor.numel() > 0
    )


def _plain(statistics: Sequence[Any]) -> bool:
    return not statistics or (len(statistics) == 1 and statistics[0].name == "sum_of_squares")


def _squares_pass(
    pieces: tuple[tuple[Tensor, Tensor], ...], weights: bool, keep_next: bool
) -> tuple[list[float], list[float]]:
    """The hot path: squares of update and weight and the next copy, 4 operations on a cached piece."""
    of_weight = of_update = 0.0
    for weight, buffer in pieces:
        torch.sub(weight, buffer, out=buffer)
        part = torch.dot(buffer, buffer).item()
        if part < 1e-30 or part == math.inf:
            part = accumulate([buffer], _SQUARES)[0]
        of_update += part
        if weights:
            part = torch.dot(weight, weight).item()
            if part < 1e-30 or part == math.inf:
                part = accumulate([weight], _SQUARES)[0]
            of_weight += part
        if keep_next:
            buffer.copy_(weight)
    return ([of_weight] if weights else []), [of_update]
