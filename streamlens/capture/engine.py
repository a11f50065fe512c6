"""`Engine`: one observed PyTorch model: its clock, its hooks, and what becomes frames.

A frame's way through here: a hook of the model or of an optimizer calls `forward_begins`,
`forward_ends`, `backward_begins`, `before_step` or `after_step`; what the subscriptions demand is
measured there (`forward.py`, `updates.py`, `losses.py`) and posted as a burst, which the
`Runtime` delivers in order.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from reactivex.abc import DisposableBase
from reactivex.disposable import Disposable
from torch import Tensor, nn
from torch.optim import Optimizer

from streamlens.capture.clock import Clock
from streamlens.capture.forward import ForwardCapture, after_backward
from streamlens.capture.hooks import first_tensor, tensors_in
from streamlens.capture.losses import LossCapture, loss_of_output
from streamlens.capture.model import ModelIndex
from streamlens.capture.optimizers import step_watch
from streamlens.capture.orphans import bury, close_orphans
from streamlens.capture.root import RootHooks
from streamlens.capture.updates import UpdateCapture
from streamlens.capture.view import Demand, View
from streamlens.errors import StreamlensError
from streamlens.frame import Frame, Kind, Lease
from streamlens.runtime import Mark, MarkKind, Runtime, current_chain, log
from streamlens.topics import TOPICS, Phase, TopicSpec, topic_spec, unknown_topic

__all__ = ["Engine", "disabled"]

_MODEL = ("",)

_PASS_TOPICS = frozenset(spec.name for spec in TOPICS.values() if spec.kind is Kind.MICRO_STEP)
"""What is taken in forward and backward."""

_MOST_OUTPUTS = 16
"""Tensors of a model's output that are watched for a backward."""


def disabled() -> bool:
    """Whether `STREAMLENS_DISABLED` makes everything inert."""
    return os.environ.get("STREAMLENS_DISABLED", "").lower() not in ("", "0", "false", "no")


class Engine(Runtime):
    """Takes artifacts from one model for as long as it is observed.

    Hooks on the model hold the engine; the engine holds the model weakly, and is closed when the
    model is collected.

    Args:
        model: The observed module.
        count: `"training"` counts forwards in training mode only, `"grad"` also those in eval
            mode, as long as gradients are enabled.
        name: The label in sinks.
        on_error: `"report"` or `"raise"`.
        optimizers: The optimizers that make up one step; found by themselves if None.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        count: str = "training",
        name: str = "",
        on_error: str = "report",
        optimizers: Sequence[Optimizer] | None = None,
    ) -> None:
        super().__init__(name, on_error)
        self._model = weakref.ref(model)
        self._finalizer = weakref.finalize(model, _close_if_alive, weakref.ref(self))
        self._finalizer.atexit = False
        self.inert = disabled()
        self.count = count
        self.clock = Clock()
        self.index = ModelIndex(model)
        self.demands: list[Demand] = []
        self.user_topics: dict[str, None] = {}
        self.extra_metadata: dict[str, Any] = {}
        self.sessions: set[Any] = set()
        self.idle = True
        self.in_epochs = 0
        self.in_forward = False
        self.outside: str | None = None
        self.paused = 0
        self._suppressed = 0
        self._last_counted = False
        self._late_output: Tensor | None = None
        self._grad_forward_seen = False
        self._passes_at_update = 0
        self._parts_needed = False
        self._due: tuple[Demand, ...] = ()
        self._due_step = -1
        self._wanted: frozenset[str] = frozenset()
        self._watches_passes = False
        self._watches_input = False
        self._pid = os.getpid()
        self.forward = ForwardCapture(self)
        self.losses = LossCapture(self)
        self.updates = UpdateCapture(self, optimizers)
        self._root = RootHooks(self)
        if not self.inert:
            self._root.install(model)
            step_watch().add(self.updates)

    # -- facts -------------------------------------------------------------------------------

    @property
    def model(self) -> nn.Module | None:
        """The observed model, while it exists."""
        return self._model()

    @property
    def step(self) -> int:
        """The optimizer update that is open."""
        return self.clock.step

    def metadata(self) -> dict[str, Any]:
        """Class and size of the model."""
        model = self.model
        return {
            "model": type(model).__name__ if model is not None else "",
            "parameters": sum(entry.parameter.numel() for entry in self.index.entries),
            "torch": torch.__version__,
            **self.extra_metadata,
        }

    @property
    def silent(self) -> bool:
        """Whether nothing is to be taken now."""
        return self.closed or self.inert or self.paused > 0 or self._suppressed > 0

    @contextlib.contextmanager
    def suppressed(self) -> Iterator[None]:
        """A region that counts as nothing, such as a closure's second evaluation."""
        self._suppressed += 1
        try:
            yield
        finally:
            self._suppressed -= 1

    def guard(self, fn: Callable[..., Any], *args: Any) -> Any:
        """Call a part of the engine from a hook: what fails in it must not reach training."""
        if self.closed:
            self._tidy()
            return None
        try:
            return fn(*args)
        except Exception as error:
            self.report(error, getattr(fn, "__qualname__", "hook"))
            return None

    # -- demands -----------------------------------------------------------------------------

    @property
    def known_topics(self) -> tuple[str, ...]:
        """Every topic that can be selected."""
        return (*TOPICS, *self.user_topics, *self.derived_topics)

    def check_topic(self, topic: str) -> TopicSpec | None:
        """What is known of a topic; None for one of the user's own.

        Raises:
            UnknownTopicError: Nothing provides it.
        """
        spec = topic_spec(topic) if isinstance(topic, str) else None
        if spec is None and topic not in self.user_topics and topic not in self.derived_topics:
            raise unknown_topic(topic, self.known_topics)
        return spec

    def resolve(self, view: View) -> dict[str, frozenset[str] | None]:
        """The layers that a view selects in each of its topics.

        Raises:
            LayerNotFoundError: It selects none.
        """
        resolved: dict[str, frozenset[str] | None] = {}
        for topic in view.topics:
            spec = self.check_topic(topic)
            if spec is None:
                continue
            resolved[topic] = self.index.resolve(spec, view.selectors)
        return resolved

    def subscribe_view(self, view: View, deliver: Callable[[Frame], None]) -> DisposableBase:
        """Deliver what a view asks for, from the next frame on."""
        demand = Demand(view, deliver, current_chain.get(), self.resolve(view))
        derived = [
            self.subscribe_derived(t, self._of_view(demand)) for t in view.topics if t in self._derived
        ]
        self.demands.append(demand)
        self._demands_changed()

        def remove() -> None:
            demand.active = False
            for connection in derived:
                connection.dispose()
            if demand in self.demands:
                self.demands.remove(demand)
                self._demands_changed()

        return Disposable(remove)

    def _of_view(self, demand: Demand) -> Callable[[Frame], None]:
        def deliver(frame: Frame) -> None:
            if demand.view.due(frame.step):
                self._hand(demand, frame)

        return deliver

    def _demands_changed(self) -> None:
        self.idle = not self.demands
        self._wanted = frozenset(t for d in self.demands for t in d.view.topics)
        self._watches_passes = self.wanted(_PASS_TOPICS)
        self._watches_input = self.wanted(("input_data", "examples_per_second"))
        self._due_step = -1
        self.forward.reset()
        self.updates.reset()
        if not self.closed and not self.inert:
            self._install()

    def _install(self) -> None:
        phases = {spec.phase for topic in self._wanted if (spec := topic_spec(topic)) is not None}
        passes = bool(phases & {Phase.MODULE, Phase.BATCH, Phase.LOSS})
        self.forward.install(self.demands, parts=passes or self._parts_needed)

    @property
    def due_now(self) -> tuple[Demand, ...]:
        """The demands that want frames of the open step."""
        if self._due_step != self.clock.step:
            self._due_step = self.clock.step
            due = tuple(d for d in self.demands if d.view.due(self._due_step))
            # The same demands give the same tuple, which is what plans are kept under.
            self._due = due if due != self._due else self._due
        return self._due

    # -- emitting ----------------------------------------------------------------------------

    def frame(
        self,
        topic: str,
        layers: Sequence[str],
        values: Tensor | tuple[Tensor, ...],
        *,
        kind: Kind = Kind.STEP,
        components: tuple[str, ...] = (),
        meta: Mapping[str, Any] | None = None,
        lease: Lease | None = None,
    ) -> Frame:
        """A frame of the open step."""
        clock = self.clock
        return Frame(
            topic,
            clock.step,
            layers,
            values,
            epoch=clock.epoch,
            micro_step=clock.micro_step,
            components=components,
            meta=meta,
            kind=kind,
            source=self.name,
            lease=lease,
        )

    def post_frames(
        self,
        frames: Sequence[tuple[Sequence[Demand], Frame]],
        lease: Lease | None = None,
        mark: Mark | None = None,
    ) -> None:
        """Deliver a burst of frames; raw ones are valid until it is over.

        Args:
            frames: Each with the demands that it answers.
            lease: Under which the raw ones are lent.
            mark: What is announced before them.
        """
        if not frames:
            if lease is not None:
                lease.end()
            if mark is not None:
                self.post_mark(mark)
            return

        def burst() -> None:
            if mark is not None:
                self.mark(mark)
            if lease is not None:
                self.lend(lease)
            for demands, frame in frames:
                self.counts["emitted"] += 1
                for demand in demands:
                    self._hand(demand, frame)

        self.post(burst)

    def _hand(self, demand: Demand, frame: Frame) -> None:
        if not demand.active:
            return
        start = time.perf_counter()
        try:
            demand.deliver(frame)
        except Exception as error:
            self.report(error, f"delivery of {frame.topic!r}")
        finally:
            if demand.chain is not None:
                demand.chain.seconds += time.perf_counter() - start

    def wanted(self, topics: Iterable[str]) -> bool:
        """Whether anybody has selected one of these topics."""
        return not self._wanted.isdisjoint(topics)

    def emit(self, topic: str, layers: tuple[str, ...], values: Tensor, kind: Kind) -> None:
        """Deliver a frame of a topic that needs no capture to whoever selected it."""
        demands = [d for d in self.due_now if topic in d.view.topics]
        if demands and not self.silent:
            self.post_frames([(demands, self.frame(topic, layers, values, kind=kind))])

    def emit_index(self, topic: str, index: int) -> None:
        """Deliver an event that carries an index."""
        if topic in self._wanted:
            self.emit(topic, _MODEL, torch.tensor([float(index)]), Kind.EVENT)

    # -- the forward -------------------------------------------------------------------------

    def counts_forward(self, module: nn.Module) -> bool:
        """Whether a forward that begins now is training."""
        if self.silent or os.getpid() != self._pid or torch._C._current_graph_task_id() != -1:
            return False
        if torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None:
            return False
        if not torch.is_grad_enabled():
            return False
        if not module.training:
            self._grad_forward_seen = True
        return module.training or self.count == "grad"

    def forward_begins(self, module: nn.Module, name: str, args: Any, kwargs: Any) -> None:
        """The model (or, where it is never called, a part) is called."""
        if not self.counts_forward(module):
            # Its parts do not count either, though some may be in training mode.
            self.outside = name
            if not self.silent:
                self._last_counted = False
            return
        clock = self.clock
        if clock.updated:
            self.close_step()
        if self.idle:
            clock.begin_pass()
            self._last_counted = True
            self.in_forward = True
            self.forward.opener = name
            return
        if self.index.uninitialized or (clock.passes & 63 == 0 and self.index.stale()):
            self.rebuild_index()
        if self.forward.in_backward:
            # Within a backward no forward counts: that one raised, and its pass is over.
            self.forward.in_backward = False
            clock.end_pass()
        fresh = clock.begin_pass()
        self._last_counted = True
        self.in_forward = True
        self.forward.opener = name
        if fresh:
            if self._watches_passes:
                self.forward.begin_pass(self.due_now)
                self.losses.begin_pass()
            self.updates.pass_begins()
            self.emit_index("batch_started", clock.batch)
        # Of parts called one after the other, the first has the batch.
        if self._watches_input and self.due_now and (fresh or not name):
            data = first_tensor(args) if args else None
            data = data if data is not None else first_tensor(kwargs)
            if data is not None:
                self.updates.count_examples(data)
                self.forward.measure_batch("input_data", data, self.due_now)

    def forward_ends(self, output: Any, kwargs: Mapping[str, Any] | None = None) -> None:
        """The module that began the forward returns; None if it raised."""
        self.in_forward = False
        rooted = not self.forward.opener
        self.forward.opener = None
        if output is None or self.idle or self.silent:
            return
        if isinstance(output, Tensor):
            self.watch_backward(output)
        else:
            for tensor in itertools.islice(tensors_in(output), _MOST_OUTPUTS):
                self.watch_backward(tensor)
        due = self.due_now
        if not due or not self._watches_passes:
            return
        result = first_tensor(output)
        if result is not None and rooted:
            self.forward.measure_batch("network_output", result, due)
        elif result is not None and "network_output" in self._wanted:
            # Of parts called one after the other, the last has the output.
            self._late_output = result.detach()
        if rooted:
            self._loss_in_output(output, kwargs or {})
            self.forward.send("activations")

    def _loss_in_output(self, output: Any, kwargs: Mapping[str, Any]) -> None:
        loss = None if self.losses.watched else loss_of_output(output)
        if loss is None or not loss.requires_grad:
            return
        self.losses.take("loss", loss)
        labels = first_tensor(kwargs.get("labels"))
        if labels is not None:
            self.forward.measure_batch("input_labels", labels, self.due_now)

    def loss_counts(self) -> bool:
        """Whether a watched loss that is computed now belongs to the open micro-step."""
        return self.clock.in_pass and self._last_counted and not self.silent

    # -- the backward ------------------------------------------------------------------------

    def watch_backward(self, tensor: Tensor) -> None:
        """Notice when a backward through this tensor begins."""
        if self.demands and tensor.requires_grad:
            self.forward.hook_tensor(tensor, _BackwardHook(self, self.clock.passes))

    def backward_begins(self, passes: int | None = None) -> None:
        """The first hook of a backward through the open pass has fired, perhaps on another thread."""
        if self.forward.in_backward or (passes is not None and passes != self.clock.passes):
            return
        self.forward.drop_provisional()
        self.forward.in_backward = after_backward(lambda: self.guard(self.backward_ends))

    def backward_ends(self) -> None:
        """A backward through the open pass has run."""
        self.forward.in_backward = False
        if self.silent:
            return
        self.flush_pass()
        if "layer_gradients" in self._wanted:
            self.forward.send("layer_gradients")
        if "raw_gradients" in self._wanted:
            self.forward.raw_gradients()
        if self.clock.in_pass:
            batch = self.clock.batch
            self.clock.end_pass()
            self.emit_index("batch_finished", batch)

    def flush_pass(self) -> None:
        """Emit what the forward phase of the open pass has left: late activations and the loss."""
        if not self._watches_passes:
            return
        late, self._late_output = self._late_output, None
        if self.due_now:
            if late is not None:
                self.forward.measure_batch("network_output", late, self.due_now)
            if "activations" in self._wanted:
                self.forward.send("activations")
            self.losses.send()
            if self.forward.provisional and not self.forward.in_backward:
                self.forward.send("layer_gradients")

    # -- the step ----------------------------------------------------------------------------

    def close_step(self) -> None:
        """Nothing more of the open step will come."""
        close_orphans()
        if self.idle:
            self.updates.release()
            self.clock.close_step()
            return
        self.flush_pass()
        self.forward.drop()
        self.updates.release()
        closed = self.clock.close_step()
        self.post_mark(Mark(MarkKind.CLOSED, closed, self.clock.epoch))
        if any(d.view.over(self.clock.step) for d in self.demands):
            self.updates.reset()

    def end_epoch(self) -> None:
        """The epoch is over: closes the open step if it had its update."""
        if self.closed:
            return
        if self.clock.updated:
            self.close_step()
        step = max(self.clock.step - 1, 0)
        ended = self.clock.end_epoch()
        demands = [d for d in self.demands if "epoch_finished" in d.view.topics and d.view.due(step)]
        frame = self.frame("epoch_finished", _MODEL, torch.tensor([float(ended)]), kind=Kind.EVENT).replace(
            step=step, epoch=ended
        )
        if not self.silent:
            self.post_frames([(demands, frame)] if demands else [])
        self.post_mark(Mark(MarkKind.EPOCH, step, ended))

    def update_without_forward(self) -> None:
        """An update came without a counted forward: watch the parts, and warn if that does not help."""
        if not self._parts_needed:
            self._parts_needed = True
            self._install()
        elif self._parts_needed and not self.counts["updates_without_forward"]:
            self.counts["updates_without_forward"] += 1
            hint = (
                " A forward with gradients ran in eval mode: pass observe(model, count='grad') to count it."
                if self._grad_forward_seen and self.count == "training"
                else " Call the model itself (model(x), not model.forward(x)) to see activations and losses."
            )
            log.warning(
                "an optimizer updates %s, but no forward pass in training mode was seen: parameter topics "
                "work, forward and backward topics stay empty.%s",
                self.metadata()["model"] or "the model",
                hint,
            )

    def rebuild_index(self) -> None:
        """Look at the model again: parameters or modules have changed."""
        model = self.model
        if model is None:
            return
        self.index = ModelIndex(model)
        for demand in self.demands:
            try:
                demand.layers = self.resolve(demand.view)
            except StreamlensError as error:
                self.report(error, demand.chain.key if demand.chain else "a chain")
        self.updates.model_changed()
        self._demands_changed()

    def hook_counts(self) -> str:
        """The hooks in place, for people."""
        if self.inert:
            return "none"
        return f"2 on the model, {self.forward.hooks} on its parts and parameters, 2 on optimizers (shared)"

    # -- state and the end -------------------------------------------------------------------

    def stats(self) -> dict[str, int]:
        """Counts of what was emitted and lost."""
        total = self.counts.copy()
        for chain in self.chains:
            total["skipped_nan"] += sum(cell.skipped for cell in chain.cells)
        for sink in self.sink_stats().values():
            total["dropped"] += sink.dropped
            total["written"] += sink.written
        names = ("emitted", "late", "incomplete", "dropped", "written", "skipped_nan", "errors")
        return {**{name: total[name] for name in names}, **total}

    def state_dict(self) -> dict[str, Any]:
        """The clock and the state of every operator, as plain containers and tensors."""
        return {
            "version": 1,
            "run_id": self.run_id,
            "clock": self.clock.state_dict(),
            "chains": self.chain_states(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a snapshot was taken."""
        self.run_id = str(state["run_id"])
        self.clock.load_state_dict(state["clock"])
        self.resumed_at = self.clock.step if self.clock.updated else self.clock.step - 1
        self._due_step = -1
        self.load_chain_states(state["chains"])

    def shut_down(self, timeout: float | None = None) -> bool:
        """Complete every stream, remove every hook, flush and close every sink."""
        if self.closed:
            return True
        if not self.inert:
            self.guard(self.flush_pass)
            self.guard(self.updates.release)
        self.complete_chains()
        self.closed = True
        done = self.close_delivery(timeout)
        self._tidy()
        self.errors.on_completed()
        return done

    def __del__(self) -> None:
        # The model went together with its hooks, and they with us: nothing must stay unwritten.
        if not getattr(self, "closed", True):
            bury(self)

    def _tidy(self) -> None:
        self.demands.clear()
        self.in_forward = False
        self.forward.remove()
        self.losses.remove()
        self.updates.drop()
        # Closed within an optimizer's step, its hooks must stay until that is over: then those of
        # the model stay too, so that its next forward comes back here.
        if step_watch().discard(self.updates):
            self._root.remove()
        # A lens that is kept keeps no parameters.
        self.index = ModelIndex(nn.Module())
        self._finalizer.detach()


class _BackwardHook:
    """Hook of an output or a loss: a backward through this pass begins."""

    __slots__ = ("engine", "passes")

    def __init__(self, engine: Engine, passes: int) -> None:
        self.engine = engine
        self.passes = passes

    def __call__(self, gradients: tuple[Tensor | None, ...]) -> None:
        # A gradient with a graph of its own (`create_graph=True`: a gradient penalty, a differential
        # equation) is on the way to the loss, and ends nothing.
        if not self.engine.closed and not torch.is_grad_enabled():
            self.engine.guard(self.engine.backward_begins, self.passes)


def _close_if_alive(reference: weakref.ref[Engine]) -> None:
    engine = reference()
    if engine is not None:
        bury(engine)
