"""What happens around an optimizer's update: whose it is, what is taken, and when it is emitted."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from streamlens.capture.interventions import Interventions
from streamlens.capture.optimizers import OptimizerInfo
from streamlens.capture.ownership import Ownership
from streamlens.capture.pace import Pace
from streamlens.capture.parameters import ParameterCapture
from streamlens.capture.partners import Partners
from streamlens.capture.plan import CallPlan, Output
from streamlens.capture.table import Table
from streamlens.capture.unowned import Unowned
from streamlens.capture.update_frames import TakenFrom, UpdateFrames, known_on_host, masked, masked_frames
from streamlens.chain import Mark, MarkKind
from streamlens.frame import Kind, Lease
from streamlens.topics import Facet

if TYPE_CHECKING:
    from streamlens.capture.engine import Engine
    from streamlens.capture.view import Demand

__all__ = ["UpdateCapture"]


@dataclass(eq=False)
class _Call:
    """One update call under way."""

    info: OptimizerInfo
    plan: CallPlan | None = None
    gradients: tuple[Table, dict[int, Tensor]] | None = None
    rates: list[tuple[Output, Tensor]] = field(default_factory=list)
    lease: Lease | None = None
    versions: list[tuple[Tensor, int]] = field(default_factory=list)
    before: list[tuple[Tensor, int]] = field(default_factory=list)
    """The model's own parameters with their versions, where the optimizer owns copies."""
    overflow: Tensor | None = None
    skipped: bool = False
    first: bool = False
    """Whether it was the first of its step."""
    elapsed: float | None = None
    ended: int | None = None


class UpdateCapture:
    """Listens to optimizers on behalf of an engine."""

    def __init__(self, engine: Engine, expected: Sequence[Optimizer] | None) -> None:
        self._engine = engine
        self._parameters = ParameterCapture(self._failed)
        self.owners = Ownership(engine)
        if expected is not None:
            self.owners.expect(expected)
        self._call: _Call | None = None
        self._waiting: _Call | None = None
        self._wanting: list[Demand] = []
        self.partners = Partners(engine)
        self._frames = UpdateFrames(engine, self.partners)
        self._unowned = Unowned()
        self._manual: OptimizerInfo | None = None
        self.pace = Pace(engine)
        self.interventions = Interventions(engine)

    def _failed(self, where: Hashable, error: Exception) -> None:
        """Report what failed; a parameter given by its place in the model is named."""
        entries = self._engine.index.entries
        if isinstance(where, int) and where < len(entries):
            where = f"parameter {entries[where].name!r}"
        self._engine.report(error, str(where))

    # -- whose -------------------------------------------------------------------------------

    def wants(self, optimizer: Optimizer) -> bool:
        """Whether the optimizer updates the model; called when it steps."""
        return not self._engine.closed and bool(self._engine.guard(self._owns, optimizer))

    def _owns(self, optimizer: Optimizer) -> bool:
        if self.owners.look(optimizer):
            self._parameters.reset()
        owns = self.owners.owns(optimizer)
        if not owns and not self._engine.idle and not self._engine.silent:
            self.owners.stranger_steps(optimizer)
        return owns

    @property
    def bytes_held(self) -> int:
        """Bytes of kept copies."""
        return self._parameters.bytes_held

    # -- demands -----------------------------------------------------------------------------

    def reset(self) -> None:
        """Forget every plan; let go of copies that nobody needs any more."""
        self._parameters.reset()
        self._wanting = [demand for demand in self._engine.demands if demand.wants_updates]
        if all(demand.view.over(self._engine.clock.step) for demand in self._wanting):
            self._parameters.drop_copies()

    def model_changed(self) -> None:
        """Parameters were replaced: plans, copies and ownership are out of date."""
        self._parameters.reset()
        self._parameters.drop_copies()
        self._unowned.forget()
        self._manual = None
        self._waiting = None
        self.owners.model_changed()

    def drop(self) -> None:
        """Let go of everything."""
        self._parameters.reset()
        self._parameters.drop_copies()
        self.partners.drop()
        self.owners.drop()
        self.interventions.drop()
        if self._call is not None and self._call.lease is not None:
            self._call.lease.end()
        self._call = self._waiting = self._manual = None
        self._wanting = []

    def _updates_due(self, step: int) -> bool:
        return any(demand.view.due(step) for demand in self._wanting)

    def look_again(self) -> None:
        """A forward is about to begin: an optimizer may have been given the parameters of new modules."""
        if self.owners.look_again():
            self._parameters.reset()

    def pass_begins(self) -> None:
        """A counted forward begins. Where no optimizer is known, the next update may be by hand."""
        self.pace.pass_begins()
        self.owners.warn_of_strangers()
        if self._updates_due(self._engine.clock.step) and not self.owners.known:
            self._manual = self._manual or OptimizerInfo.by_hand(self._engine.index)
            self._parameters.keep(self._plan(self._manual).entries.get(Facet.UPDATE, ()))

    # -- before ------------------------------------------------------------------------------

    def before_step(
        self, optimizer: Optimizer, closure: Callable[[], Any] | None
    ) -> Callable[[], Any] | None:
        """An optimizer that owns parameters is about to update them."""
        engine = self._engine
        info = self.owners.get(optimizer)
        assert info is not None
        engine.guard(engine.threads.update_begins)
        engine.guard(engine.passes.settle)
        if engine.idle and getattr(optimizer, "found_inf", None) is None and not self.interventions:
            self._call = None
            engine.guard(self.partners.update_begins, info, closure is not None)
            return None
        if self._call is not None and self._call.lease is not None:
            # The step before raised; what it lent ends here.
            self._call.lease.end()
        self._call = call = _Call(info)
        wrapped: list[Callable[[], Any]] = []

        def prepare() -> None:
            self.partners.update_begins(info, closure is not None)
            found = getattr(optimizer, "found_inf", None)
            if isinstance(found, Tensor):
                if known_on_host(found):
                    call.skipped = bool(found.item() > 0)
                else:
                    call.overflow = found
                    engine.delivery.doubt(engine.clock.step, found)
            if call.skipped:
                return
            if self._due() and not engine.silent:
                self._prepare(call)
            if closure is None:
                self._consume(call, optimizer)
            else:
                wrapped.append(self._first_evaluation(call, optimizer, closure))

        engine.guard(prepare)
        if closure is not None and not wrapped and not engine.closed:
            wrapped.append(self._first_evaluation(call, optimizer, closure))
        return wrapped[0] if wrapped else None

    def _prepare(self, call: _Call) -> None:
        """Plan what the call has to take, and keep copies of what it will change."""
        if self._engine.index.stale():
            self._engine.rebuild_index()
        call.plan = plan = self._plan(call.info)
        self._parameters.keep(plan.entries.get(Facet.UPDATE, ()))
        if call.info.stands_in:
            call.before = [(e.parameter, e.parameter._version) for e in call.info.entries]

    def _consume(self, call: _Call, optimizer: Optimizer) -> None:
        """The gradients are those of this update: controllers act on them, then they are taken."""
        self.interventions.before(optimizer, call.info.entries)
        self._take_gradients(call, optimizer)

    def _due(self) -> bool:
        return any(demand.at_update for demand in self._engine.due_now)

    def _plan(self, info: OptimizerInfo) -> CallPlan:
        engine = self._engine
        unowned = given = frozenset[int]()
        if self.partners.stepped:
            given = self._unowned.given
        elif len(info.entries) < len(engine.index.entries):
            owned = {e.order for e in info.entries} | self.owners.owned()
            unowned = self._unowned.with_first(engine.index.entries, owned)
        plan, merging = self._parameters.plan, engine.exchange.active
        return plan(engine.due_now, engine.index, info, unowned=unowned, given=given, merging=merging)

    def _first_evaluation(
        self, call: _Call, optimizer: Optimizer, closure: Callable[[], Any]
    ) -> Callable[[], Any]:
        """The closure, with its first evaluation counting as this step's forward and backward."""
        engine = self._engine
        evaluations = 0

        def evaluate() -> Any:
            nonlocal evaluations
            evaluations += 1
            if evaluations > 1:
                with engine.suppressed():
                    return closure()
            result = closure()
            if call is self._call:
                engine.guard(self._closure_returned, call, optimizer, result)
            return result

        return evaluate

    def _closure_returned(self, call: _Call, optimizer: Optimizer, result: Any) -> None:
        engine = self._engine
        if isinstance(result, Tensor) and not engine.losses.watched and engine.clock.counted:
            engine.losses.take_if_none("loss", result)
        engine.passes.flush()
        if call.gradients is None:
            self._consume(call, optimizer)

    def _take_gradients(self, call: _Call, optimizer: Optimizer | None) -> None:
        plan, info = call.plan, call.info
        if plan is None:
            return
        call.gradients = _, tensors = self._parameters.gradients(plan, optimizer)
        if optimizer is not None:
            call.rates = [
                (output, self._parameters.rates(output, info, optimizer))
                for output in plan.outputs.get(Facet.RATE, ())
            ]
        raw = [o for o in plan.outputs.get(Facet.GRADIENT, ()) if o.reduction is None]
        if raw:
            call.lease = Lease()
            call.versions = [(t, t._version) for t in tensors.values()]
            frames = [f for o in raw if (f := self._frames.raw(o, tensors, call.lease)) is not None]
            found = call.overflow
            self._engine.post_frames(frames if found is None else masked_frames(frames, found))

    # -- after -------------------------------------------------------------------------------

    def after_step(self, optimizer: Optimizer) -> None:
        """An optimizer that owns parameters has updated them."""
        self._engine.threads.update_ends()
        self.interventions.after()
        call, self._call = self._call, None
        info = self.owners.get(optimizer)
        if info is not None:
            mine = call if call is not None and call.info is info else _Call(info)
            self._engine.guard(self._updated, mine, optimizer)

    def by_hand(self) -> None:
        """The user says that parameters have been updated without a `torch.optim` optimizer."""
        engine = self._engine
        self.owners.updated()
        if self._waiting is not None:
            # The optimizer owns copies, and they are in the model now.
            self._emit_waiting()
            if self.owners.complete(self.partners.stepped):
                engine.close_step()
            return
        info = self._manual = self._manual or OptimizerInfo.by_hand(engine.index)
        self.partners.update_begins(info)
        call = _Call(info)
        if not engine.silent and self._due():
            if engine.index.stale():
                engine.rebuild_index()
                info = call.info = self._manual = OptimizerInfo.by_hand(engine.index)
            call.plan = self._plan(info)
            self._take_gradients(call, None)
        self._updated(call, None)

    def _updated(self, call: _Call, optimizer: Optimizer | None) -> None:
        engine, info = self._engine, call.info
        if call.skipped:
            return
        clock = engine.clock
        if not engine.silent and not engine.idle:
            engine.passes.flush()
        ended = clock.batch if clock.in_pass else None
        clock.end_pass()
        if optimizer is not None and not (clock.counted or self.partners.again or engine.silent):
            engine.passes.update_without_forward()
        clock.updated = True
        self.owners.updated()
        self.partners.stepped.append(info)
        call.first, call.ended = len(self.partners.stepped) == 1, ended
        call.elapsed = self.pace.step_time() if call.first else None
        if call.plan is None or engine.silent:
            self._parameters.renew(info.entries, keep_next=False)
            engine.settling.now()
            if not (engine.silent or engine.idle):
                # Averages over the micro-steps are due, whether or not anything of the parameters is.
                engine.post_mark(Mark(MarkKind.UPDATE, clock.step, clock.epoch, clock.micro_step))
        elif info.stands_in and not self._copied_back(call):
            self._waiting = self._waiting or call
        else:
            self._emit(call, optimizer)
        if self._waiting is None and self.owners.complete(self.partners.stepped):
            engine.close_step()

    def _copied_back(self, call: _Call) -> bool:
        """Whether what an optimizer made of its copies is in the model already, as its step returns."""
        return self.owners.alone(call.info) and any(p._version != version for p, version in call.before)

    def _emit_waiting(self) -> None:
        """Emit what has waited for an optimizer's copies to get into the model."""
        call, self._waiting = self._waiting, None
        if call is None:
            return
        if self._engine.silent:
            self._parameters.renew(call.info.entries, keep_next=False)
        else:
            self._emit(call, call.info.optimizer)

    def _emit(self, call: _Call, optimizer: Optimizer | None) -> None:
        engine, plan = self._engine, call.plan
        assert plan is not None
        lease = call.lease or Lease()
        if any(t._version != version for t, version in call.versions):
            # The optimizer worked on the gradients in place: what was lent is no longer true.
            lease.end()
            lease = Lease()
        keep_next = not engine.idle and self._updates_due(engine.clock.step + 1)
        values, updates, whole = self._parameters.values(plan, keep_next=keep_next)
        current: dict[int, Tensor] = {}
        if any(o.reduction is None for o in plan.outputs.get(Facet.VALUE, ())):
            current = {e.order: e.tensor.detach() for e in plan.entries[Facet.VALUE]}
        if engine.delivering and whole:
            whole = {order: tensor.clone() for order, tensor in whole.items()}
        gradients = call.gradients or (Table(), {})
        sources: list[TakenFrom] = []
        sources += [(o, *gradients) for o in plan.outputs.get(Facet.GRADIENT, ()) if o.reduction is not None]
        sources += [(o, values, current) for o in plan.outputs.get(Facet.VALUE, ())]
        sources += [(o, updates, whole) for o in plan.outputs.get(Facet.UPDATE, ())]
        if optimizer is not None and Facet.STATE in plan.outputs:
            states = self._parameters.states(plan, optimizer)
            sources += [(o, *states[o.spec.state]) for o in plan.outputs.get(Facet.STATE, ())]
        engine.settling.now(self._frames.partials(sources))
        frames, reduced = self._frames.of(sources, lease)
        reduced += [(output, output.orders, rates) for output, rates in call.rates]
        if call.overflow is not None:
            frames = masked_frames(frames, call.overflow)
            reduced = [(o, k, masked(values, call.overflow)) for o, k, values in reduced]
        frames += self.partners.gather(reduced, lambda: self.owners.known)
        clock = engine.clock
        engine.post_frames(frames, lease, Mark(MarkKind.UPDATE, clock.step, clock.epoch, clock.micro_step))
        self.pace.emit(call.elapsed)
        if call.first and engine.wanted(("update_finished",)):
            engine.emit("update_finished", ("",), torch.tensor([float(clock.step)]), Kind.STEP)
        if call.ended is not None:
            engine.emit_index("batch_finished", call.ended)
        if whole:
            self._parameters.renew(plan.entries.get(Facet.UPDATE, ()), keep_next=keep_next)

    # -- the end of a step -------------------------------------------------------------------

    def release(self) -> None:
        """The step closes: emit what still waited for other optimizers, or for copies to come back."""
        self._emit_waiting()
        self.owners.warn_of_strangers()
        frames = self.partners.close_step()
        engine, lease = self._engine, Lease()
        late = self._unowned.at_end(self.owners.owned())
        if late and not engine.silent and self._due():
            nobody = OptimizerInfo(None, -1)
            plan = self._parameters.plan(engine.due_now, engine.index, nobody, unowned=late)
            table = self._parameters.values(plan, keep_next=False)[0]
            tensors = {e.order: e.tensor.detach() for e in plan.entries.get(Facet.VALUE, ())}
            sources = [(output, table, tensors) for output in plan.outputs.get(Facet.VALUE, ())]
            table.take(table.parts)
            raw, reduced = self._frames.of(sources, lease)
            frames += raw + self.partners.gather(reduced, lambda: ())
        if frames:
            engine.post_frames(frames, lease)
