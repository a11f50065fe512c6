"""`Engine`: one observed PyTorch model: its clock, its hooks, and what becomes frames.

A frame's way through here: a hook of the model or of an optimizer tells `PassWatch` that a forward
or backward begins or ends, or `UpdateCapture` that an optimizer steps; what the subscriptions demand
is measured there (`forward.py`, `parameters.py`, `losses.py`) and posted as a burst, which the
`Runtime` delivers in order.
"""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from streamlens.capture import losses, pass_hooks, root
from streamlens.capture.absent import Absent
from streamlens.capture.compiled import CompiledPasses, hook_guards, prepare_compiler
from streamlens.capture.copies import Copy
from streamlens.capture.forward import ForwardCapture
from streamlens.capture.losses import LossCapture
from streamlens.capture.model import ModelIndex
from streamlens.capture.optimizers import step_watch
from streamlens.capture.orphans import bury, close_orphans
from streamlens.capture.passes import PassWatch
from streamlens.capture.root import RootHooks
from streamlens.capture.source import Source
from streamlens.capture.threads import Threads
from streamlens.capture.updates import UpdateCapture
from streamlens.capture.view import View
from streamlens.chain import Mark, MarkKind
from streamlens.errors import StreamlensError
from streamlens.frame import Kind
from streamlens.topics import Phase, topic_spec

__all__ = ["Engine", "disabled"]

_MODEL = ("",)

_STATS = ("emitted", "late", "incomplete", "duplicate", "dropped", "written", "skipped_nan", "errors")
"""What `stats()` always has."""

_VERSION = 1
_SNAPSHOT = frozenset({"version", "run_id", "clock", "optimizers", "chains"})
"""What a snapshot has."""


def disabled() -> bool:
    """Whether `STREAMLENS_DISABLED` makes everything inert."""
    return os.environ.get("STREAMLENS_DISABLED", "").lower() not in ("", "0", "false", "no")


class Engine(Source):
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
        copies: What these hold in place of a parameter, by the parameter's name.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        count: str = "training",
        name: str = "",
        on_error: str = "report",
        optimizers: Sequence[Optimizer] | None = None,
        copies: Mapping[str, Copy] | None = None,
    ) -> None:
        super().__init__(name, on_error)
        self._model = weakref.ref(model)
        self._finalizer = weakref.finalize(model, _close_if_alive, weakref.ref(self))
        self._finalizer.atexit = False
        self.inert = disabled()
        self.count = count
        self.copies = dict(copies or {})
        self.index = ModelIndex(model, self.copies)
        self.extra_metadata: dict[str, Any] = {}
        self.sessions: set[Any] = set()
        self.in_epochs = 0
        self.paused = 0
        self._suppressed = 0
        self.threads = Threads(self)
        self.compiled = CompiledPasses(self)
        self.passes = PassWatch(self)
        self.forward = ForwardCapture(self)
        self.losses = LossCapture(self)
        self.absent = Absent(self)
        self.updates = UpdateCapture(self, optimizers)
        self._root = RootHooks(self)
        if not self.inert:
            prepare_compiler((*root.HOOKS, *pass_hooks.HOOKS, *losses.HOOKS, Engine.guard.__code__))
            hook_guards.watch(self.compiled, tuple(model.modules()))
            self._root.install(model)
            step_watch().add(self.updates)

    # -- facts -------------------------------------------------------------------------------

    @property
    def model(self) -> nn.Module | None:
        """The observed model, while it exists."""
        return self._model()

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
        return self.closed or self.inert or self.paused > 0 or self._suppressed > 0 or self.threads.contended

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

    def check_subscribing(self) -> None:
        """Raise if the engine is closed, or this is not the thread that frames come on."""
        self.check_open()
        self.threads.check_subscribing()

    def demands_changed(self) -> None:
        """A subscription has come or gone: plans, hooks and copies follow."""
        super().demands_changed()
        self.passes.reset()
        self.forward.reset()
        self.updates.reset()
        if not self.closed and not self.inert:
            self.install()

    def install(self) -> None:
        """Bring the hooks on parts of the model in line with the demands."""
        phases = {spec.phase for topic in self.topics if (spec := topic_spec(topic)) is not None}
        parts = bool(phases & {Phase.MODULE, Phase.BATCH, Phase.LOSS})
        self.forward.install(self.live, parts=parts or self.passes.parts_needed)

    # -- the step ----------------------------------------------------------------------------

    def close_step(self) -> None:
        """Nothing more of the open step will come."""
        close_orphans()
        if self.idle:
            self.forward.drop()
            self.updates.release()
            self.clock.close_step()
            return
        self.passes.flush()
        self.forward.drop()
        self.updates.release()
        counted = self.clock.counted
        closed = self.clock.close_step()
        self.post_mark(Mark(MarkKind.CLOSED, closed, self.clock.epoch))
        if any(d.view.stop == self.clock.step for d in self.demands):
            # What has come to its end needs no hooks any more, nor copies.
            self.demands_changed()
        if counted:
            self.absent.check(closed)

    def end_epoch(self) -> None:
        """The epoch is over: closes the open step if it had its update."""
        if self.closed:
            # A loop over `epochs()` goes on without us, and must come to its end.
            self.clock.end_epoch()
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

    @property
    def outdated(self) -> bool:
        """Whether the model has parameters that the index does not know."""
        model = self.model
        return model is not None and any(
            id(p) not in self.index.by_id and not nn.parameter.is_lazy(p) for p in model.parameters()
        )

    def expect(self, optimizers: Sequence[Optimizer], copies: Mapping[str, Copy]) -> None:
        """These optimizers make up a step, and hold copies in place of some parameters."""
        if copies:
            self.copies.update(copies)
            self.rebuild_index()
        self.updates.owners.expect(optimizers)

    def rebuild_index(self) -> None:
        """Look at the model again: parameters or modules have changed."""
        model = self.model
        if model is None:
            return
        self.index = ModelIndex(model, self.copies)
        for demand in self.demands:
            try:
                demand.layers = self.resolve(demand.view)
            except StreamlensError as error:
                self.report(error, demand.chain.key if demand.chain else "a chain")
        self.updates.model_changed()
        self.demands_changed()

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
        return {**{name: total[name] for name in _STATS}, **total}

    def state_dict(self) -> dict[str, Any]:
        """The clock and the state of every operator, as plain containers and tensors."""
        return {
            "version": _VERSION,
            "run_id": self.run_id,
            "clock": self.clock.state_dict(),
            "optimizers": self.updates.partners.state_dict(),
            "chains": self.chain_states(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a snapshot was taken.

        Raises:
            ValueError: It is none.
        """
        if not isinstance(state, Mapping) or not state.keys() >= _SNAPSHOT:
            keys = f"the keys {', '.join(map(repr, state))}" if isinstance(state, Mapping) else repr(state)
            raise ValueError(f"load_state_dict() takes what lens.state_dict() gave, got {keys}")
        if state["version"] != _VERSION:
            raise ValueError(
                f"load_state_dict(): the snapshot has version {state['version']!r}, and this streamlens "
                f"reads what its own lens.state_dict() gives, version {_VERSION}: use the one that wrote it"
            )
        self.run_id = str(state["run_id"])
        self.clock.load_state_dict(state["clock"])
        self.updates.partners.load_state_dict(state["optimizers"])
        self.resumed_at = self.clock.step if self.clock.updated else self.clock.step - 1
        self.demands_changed()
        self.load_chain_states(state["chains"])

    def shut_down(self, timeout: float | None = None) -> bool:
        """Complete every stream, remove every hook, flush and close every sink."""
        if self.closed:
            return True
        if not self.inert:
            self.guard(self.passes.flush)
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
        self._due = ()
        self._derived.clear()
        self.passes.remove()
        self.forward.remove()
        self.losses.remove()
        self.updates.drop()
        # Closed within an optimizer's step, its hooks must stay until that is over: then those of
        # the model stay too, so that its next forward comes back here.
        if step_watch().discard(self.updates):
            self._root.remove()
        hook_guards.unwatch(self.compiled)
        # A lens that is kept keeps no parameters.
        self.copies.clear()
        self.index = ModelIndex(nn.Module())
        self._finalizer.detach()


def _close_if_alive(reference: weakref.ref[Engine]) -> None:
    engine = reference()
    if engine is not None:
        bury(engine)
