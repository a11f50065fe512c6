"""`CallPlan`: what one update call has to take, compiled once for the demands that are due."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from streamlens.capture.sharded import WHOLE, Part
from streamlens.capture.small import Small, is_small
from streamlens.capture.table import Needs
from streamlens.reductions import Reduction
from streamlens.topics import Facet, Phase, TopicSpec, topic_spec

if TYPE_CHECKING:
    from streamlens.capture.model import ModelIndex, ParameterEntry
    from streamlens.capture.optimizers import OptimizerInfo
    from streamlens.capture.view import Demand

__all__ = ["CallPlan", "Output", "compile_call"]


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
    merging: bool
    """Whether what is taken may be a part of what several processes have."""
    whole_updates: bool
    """Whether somebody wants the updates themselves and not only statistics of them."""
    small: dict[Facet, Small] = field(default_factory=dict)
    """Small float32 CPU parameters of which only 2-norms are wanted."""
    parts: dict[Hashable, Part | None] = field(default_factory=dict)
    """The parameters of which this process holds a part."""

    def __bool__(self) -> bool:
        return bool(self.outputs)


def compile_call(
    due: Sequence[Demand],
    index: ModelIndex,
    info: OptimizerInfo,
    unowned: frozenset[int],
    given: frozenset[int] = frozenset(),
    *,
    merging: bool = False,
) -> CallPlan:
    """What a call of an optimizer takes for some demands.

    Args:
        due: The demands that are due at this step.
        index: The model's names.
        info: The optimizer that steps.
        unowned: Parameters that no optimizer owns and that come with this call.
        given: Parameters whose values came with an earlier call of the step.
        merging: Whether what is taken may be a part of what several processes have.
    """
    owned = {entry.order for entry in info.entries}
    found: dict[tuple[Any, ...], Output] = {}
    for demand in due:
        for topic in demand.view.topics:
            spec = topic_spec(topic)
            if spec is None or spec.phase is not Phase.PARAMETER or spec.facet is Facet.RAW_GRADIENT:
                continue
            if not info.tells(spec.facet):
                continue
            wanted = demand.layers.get(topic)
            reach = (owned | unowned) - given if spec.facet is Facet.VALUE else owned
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
    return _call_plan(found.values(), merging=merging)


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


def _call_plan(found: Iterable[Output], *, merging: bool) -> CallPlan:
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
            need = Needs.of(wants, merging=merging)
            needs[facet][order] = shared.setdefault(need, need)
        involved[facet] = tuple(by_order[order] for order in sorted(by_order))
    whole = any(o.reduction is None or not o.reduction.needs() for o in outputs.get(Facet.UPDATE, ()))
    plan = CallPlan(outputs, needs, involved, merging, whole)
    plan.parts = {e.order: e.part for entries in involved.values() for e in entries if e.part is not WHOLE}
    for facet in (Facet.GRADIENT, Facet.VALUE, Facet.UPDATE):
        small = Small.of(e for e in involved.get(facet, ()) if is_small(e, needs[facet][e.order]))
        if small.entries and not (whole and facet is Facet.UPDATE):
            plan.small[facet] = small
    return plan
