"""Taking activations, their gradients, the batch and raw gradients in forward and backward.

Module hooks reduce an output where it appears, so that no activation is kept alive; hooks on the
outputs do the same with their gradients. Frames are put together where a pass ends: raw and
reduced activations at the end of the model's forward, all that belongs to the backward once the
whole backward has run, on the thread that called it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from streamlens.capture.batch import note_part, reduced_frame
from streamlens.capture.exchange import Partial
from streamlens.capture.hooks import first_tensor
from streamlens.capture.interned import InModelOrder, Interned
from streamlens.capture.module_hooks import ModuleHooks
from streamlens.capture.pass_hooks import AccumulateHook, GradientHook
from streamlens.capture.pass_plan import PASS_TOPICS, PassOutput, PassPlan, compile_pass, layers_by_topic
from streamlens.capture.sharded import WHOLE, Part, known_part_of, local
from streamlens.capture.table import Table
from streamlens.errors import OverwrittenActivationError
from streamlens.frame import Frame, Kind, Lease
from streamlens.reductions import Reduction

if TYPE_CHECKING:
    from streamlens.capture.engine import Engine
    from streamlens.capture.view import Demand

__all__ = ["ForwardCapture"]

_ALSO_TOLD: Final = 2
"""Steps after which it is no news any more that values are unremarkable: an alert ends with the second."""


class _Side:
    """What one pass has gathered of activations, or of gradients."""

    __slots__ = ("_report", "calls", "raw", "sends", "sent", "table")

    def __init__(self, report: Callable[[Hashable, Exception], None]) -> None:
        self._report = report
        self.sends = 0
        self.table = Table()
        self.raw: dict[str, tuple[Tensor, int]] = {}
        self.calls: dict[str, str] = {}
        self.sent: set[str] = set()

    def failed(self, key: Hashable, error: Exception) -> None:
        """A layer could not be measured: what other processes have of it is not the whole."""
        self.table.parts[key] = None
        self._report(key, error)


class ForwardCapture:
    """Hooks on modules and outputs, and what the open pass has gathered."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.modules = ModuleHooks(engine)
        self._parameter_handles: list[RemovableHandle] = []
        self._leaf_handles: list[RemovableHandle] = []
        self._plans: dict[tuple[int, ...], PassPlan] = {}
        self._sides: dict[str, _Side] = {}
        self._overwritten: set[str] = set()
        self._interned = Interned()
        self._ordered = InModelOrder()
        self._repeated: dict[str, int] = {}
        self._remarkable: dict[tuple[str, Reduction, frozenset[str] | None], int] = {}
        self.plan: PassPlan | None = None
        self.provisional: set[str] = set()
        """Layers whose gradient has a graph of its own: the loss's own, or on the way to the loss."""
        self.opener: str | None = None
        self.in_backward = False

    # -- planning ----------------------------------------------------------------------------

    def reset(self) -> None:
        """Forget every plan, because demands or the model changed; the open pass keeps its own."""
        self._plans.clear()
        self._ordered.clear()
        self._remarkable.clear()

    def begin_pass(self, due: Sequence[Demand]) -> None:
        """A new micro-step begins, for which these demands are due."""
        self._sides = {side: _Side(self._layer_error) for side in PASS_TOPICS}
        self._engine.compiled.begin_pass()
        self._repeated = {}
        self._engine.batches.begin_pass()
        self.provisional.clear()
        self.in_backward = False
        self._unhook_leaves()
        self.plan_again(due)

    def plan_again(self, due: Sequence[Demand]) -> None:
        """What the open pass takes, for these demands and the model as it is now."""
        merging = self._engine.exchange.active
        key = (merging, *map(id, due))
        plan = self._plans.get(key)
        if plan is None:
            if len(self._plans) > 256:
                self._plans.clear()
            plan = self._plans[key] = compile_pass(due, self._engine.index, merging=merging)
        self.plan = plan

    # -- hooks -------------------------------------------------------------------------------

    def install(self, demands: Iterable[Demand], *, parts: bool) -> None:
        """Bring the hooks on modules and parameters in line with the demands.

        Args:
            demands: All demands of the run.
            parts: Whether any part may be the outermost module called.
        """
        wanted: dict[str, set[str]] = {side: set() for side in PASS_TOPICS}
        for demand in demands:
            for topic in demand.view.topics:
                if topic in wanted:
                    layers = demand.layers.get(topic)
                    wanted[topic] |= layers_by_topic(self._engine.index)[topic] if layers is None else layers
        self.modules.install(wanted["activations"], wanted["layer_gradients"], parts=parts)
        for handle in self._parameter_handles:
            handle.remove()
        self._parameter_handles = [
            entry.parameter.register_post_accumulate_grad_hook(AccumulateHook(self._engine))
            for entry in self._engine.index.entries
            if entry.name in wanted["raw_gradients"] and entry.parameter.requires_grad
        ]

    def remove(self) -> None:
        """Remove every hook and let go of what was gathered."""
        self.modules.remove()
        for handle in self._parameter_handles:
            handle.remove()
        self._parameter_handles = []
        self._unhook_leaves()
        self._plans.clear()
        self._sides = {}
        self.plan = None

    @property
    def hooks(self) -> int:
        """Hooks in place on parts of the model."""
        return len(self.modules.handles) + len(self._parameter_handles)

    # -- while a pass runs -------------------------------------------------------------------

    def output_of(self, name: str, output: Any) -> None:
        """A module has returned."""
        plan = self.plan
        taken = None if plan is None else plan.taken.get(name)
        if taken is None:
            return
        tensor = first_tensor(output)
        if tensor is None:
            return
        key = self.take_output(name, tensor)
        if key is not None and taken.gradient and tensor.requires_grad:
            place = tensor.output_nr if tensor.grad_fn is not None else 0
            hook = GradientHook(self._engine, name, key, self._engine.clock.passes, place)
            self.hook_tensor(tensor, hook)

    def take_output(self, name: str, tensor: Tensor, *, lent: bool = False) -> str | None:
        """Take what is wanted of a module's output.

        Args:
            name: The module.
            tensor: Its output.
            lent: Whether its memory will be used for something else after this call.

        Returns:
            The key of this call of the module; None if nothing is wanted of it.
        """
        plan = self.plan
        taken = None if plan is None else plan.taken.get(name)
        if plan is None or taken is None:
            return None
        call = self._repeated.get(name, 0)
        self._repeated[name] = call + 1
        key = f"{name}@{call}" if call else name
        need, raw = taken.need, taken.raw
        if need or raw:
            side = self._sides["activations"]
            side.calls[key] = name
            if need:
                if plan.merging:
                    note_part(self._engine, side.table, key, tensor)
                side.table.measure(key, local(tensor), need, side.failed)
            if raw:
                value = tensor.detach()
                fixed = lent or name in self._overwritten or tensor.is_inference()
                side.raw[key] = (value.clone(), -1) if fixed else (value, tensor._version)
        return key

    def hook_tensor(self, tensor: Tensor, hook: Callable[[tuple[Tensor | None, ...]], None]) -> None:
        """Have `hook` called with the gradients of an output's node, this output's among them.

        The node of the graph is hooked and not the tensor, which costs a seventh. It goes with its
        graph and takes the hook along. A leaf (a module may return its own parameter) has none and
        stays: its hook is removed when the next pass begins.
        """
        node = tensor.grad_fn
        if node is not None:
            node.register_prehook(hook)
        else:
            self._leaf_handles.append(tensor.register_hook(lambda gradient: hook((gradient,))))

    def _unhook_leaves(self) -> None:
        for handle in self._leaf_handles:
            handle.remove()
        self._leaf_handles.clear()

    def gradient_of(self, name: str, key: str, passes: int, gradient: Tensor, *, lent: bool = False) -> None:
        """The gradient of a module's output has been computed, perhaps on another thread.

        Args:
            name: The module.
            key: Of the call of it.
            passes: The pass that this call was in.
            gradient: The gradient.
            lent: Whether its memory will be used for something else after this call.
        """
        plan = self.plan
        if plan is None or passes != self._engine.clock.passes:
            return
        side = self._sides["layer_gradients"]
        if torch.is_grad_enabled():
            self.provisional.add(key)
        else:
            self._engine.passes.backward_begins()
            if key in side.calls:
                self._engine.counts["repeated_backward"] += 1
                return
        side.calls[key] = name
        need = plan.needs["layer_gradients"].get(name)
        value = gradient.detach()
        if need:
            note_part(self._engine, side.table, key, value)
            side.table.measure(key, local(value), need, side.failed)
        if name in plan.raw["layer_gradients"]:
            side.raw[key] = (value.clone() if lent else value, -1)

    def drop_provisional(self) -> None:
        """Forget gradients of `create_graph=True`: the backward of the loss has begun."""
        side = self._sides.get("layer_gradients")
        for key in self.provisional:
            if side is not None and key not in side.sent:
                side.calls.pop(key, None)
                side.raw.pop(key, None)
        self.provisional.clear()

    def send(self, topic: str) -> None:
        """Emit what a pass has gathered of a topic and not yet sent."""
        side, plan = self._sides.get(topic), self.plan
        if side is None or plan is None:
            return
        fresh = self._in_order(key for key in side.calls if key not in side.sent)
        if not fresh:
            return
        side.sent.update(fresh)
        lease = Lease()
        frames: list[tuple[Sequence[Demand], Frame]] = []
        reduced: list[tuple[PassOutput, tuple[str, ...]]] = []
        for output in plan.outputs[topic]:
            keys = fresh
            if output.wanted is not None:
                keys = tuple(k for k in fresh if side.calls[k] in output.wanted)
            if output.reduction is not None:
                reduced.append((output, keys))
            elif (frame := self._raw_frame(topic, keys, side, lease)) is not None:
                frames.append((output.demands, frame))
        side.raw.clear()
        side.sends += 1
        parts: dict[Hashable, Part | None] = {
            key: side.table.parts[key] for key in fresh if key in side.table.parts
        }
        if not (parts and reduced):
            self._engine.post_frames(frames + self._reduced(side.table, reduced), lease)
            return
        self._engine.post_frames(frames, lease)
        micro_step = self._engine.clock.micro_step
        partial = Partial(f"{topic}/{micro_step}/{side.sends}", side.table, parts)
        if topic != "raw_gradients":
            partial.open = True
        if topic == "layer_gradients":
            partial.weight = self._engine.losses.weight

        def emit() -> None:
            # What other processes alone have called comes with the first of them.
            foreign = {str(key) for key in side.table.wholes.difference(side.calls)}
            side.table.wholes.clear()
            self._engine.post_frames(self._reduced(side.table, reduced, micro_step, foreign))

        self._engine.settling.later(partial, emit)

    def _reduced(
        self,
        table: Table,
        outputs: Sequence[tuple[PassOutput, tuple[str, ...]]],
        micro_step: int | None = None,
        foreign: Collection[str] = (),
    ) -> list[tuple[Sequence[Demand], Frame]]:
        """The frames of what was reduced."""
        frames: list[tuple[Sequence[Demand], Frame]] = []
        for output, keys in outputs:
            reduction = output.reduction
            assert reduction is not None
            if self._needless(output, reduction, table, keys):
                continue
            if foreign:
                wanted = output.wanted
                called = (key for key in foreign if wanted is None or key.partition("@")[0] in wanted)
                keys = self._in_order((*keys, *called))
            frame = reduced_frame(
                self._engine, output.topic, table, reduction, keys, micro_step, self._interned
            )
            if frame is not None:
                frames.append((output.demands, frame))
        return frames

    def _needless(
        self, output: PassOutput, reduction: Reduction, table: Table, keys: tuple[str, ...]
    ) -> bool:
        """Whether nobody has to be told of some values, nor that they are as they were before."""
        if reduction.unremarkable is None:
            return False
        what, step = (output.topic, reduction, output.wanted), self._engine.clock.step
        if what not in self._remarkable or not table.unremarkable(reduction, keys):
            self._remarkable[what] = step
        return step > self._remarkable[what] + _ALSO_TOLD

    def _raw_frame(self, topic: str, keys: tuple[str, ...], side: _Side, lease: Lease) -> Frame | None:
        engine = self._engine
        held = [(key, *side.raw[key]) for key in keys if key in side.raw]
        good = [(key, value) for key, value, version in held if self._intact(side.calls[key], value, version)]
        if not good:
            return None
        names = self._interned(key for key, _ in good)
        return engine.frame(topic, names, tuple(v for _, v in good), kind=Kind.MICRO_STEP, lease=lease)

    def _intact(self, name: str, value: Tensor, version: int) -> bool:
        if version < 0 or value._version == version:
            return True
        self._overwritten.add(name)
        self._engine.report(
            OverwrittenActivationError(
                f"the activation of layer {name!r} was overwritten in place (as nn.ReLU(inplace=True) does) "
                "before the forward ended; it is left out of this frame and copied from the next one on. "
                "A reduction such as norm('activations') needs no copy"
            ),
            f"activations of {name!r}",
        )
        return False

    def raw_gradients(self) -> None:
        """A backward has run: take the gradients as they stand."""
        plan = self.plan
        if plan is None or not plan.outputs["raw_gradients"]:
            return
        side = self._sides["raw_gradients"]
        for entry in self._engine.index.entries:
            gradient = entry.parameter.grad
            need = plan.needs["raw_gradients"].get(entry.name)
            raw = entry.name in plan.raw["raw_gradients"]
            if gradient is None or not (need or raw) or entry.name in side.calls:
                continue
            side.calls[entry.name] = entry.name
            if need:
                part = known_part_of(gradient)
                if part is not WHOLE:
                    side.table.parts[entry.name] = part
                side.table.measure(entry.name, local(gradient), need, side.failed)
            if raw:
                side.raw[entry.name] = (local(gradient), -1)
        self.send("raw_gradients")

    def drop(self) -> None:
        """Let go of a pass that is over: of its tensors, and of the demands that it was taken for."""
        for side in self._sides.values():
            side.raw.clear()
        self.plan = None

    # -- helpers -----------------------------------------------------------------------------

    def _in_order(self, keys: Iterable[str]) -> tuple[str, ...]:
        return self._ordered(keys, self._engine.index.order)

    def _layer_error(self, key: Hashable, error: Exception) -> None:
        self._engine.report(error, f"layer {key!r}")
