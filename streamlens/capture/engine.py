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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from streamlens.capture import losses, pass_hooks, root
from streamlens.capture.absent import Absent
from streamlens.capture.batch import BatchCapture
from streamlens.capture.compiled import CompiledPasses, hook_guards, prepare_compiler
from streamlens.capture.copies import Copy
from streamlens.capture.exchange import Settling
from streamlens.capture.forward import ForwardCapture
from streamlens.capture.hooks import Lifted
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
from streamlens.errors import ClosedLensError, StreamlensError
from streamlens.layers import LayerSelector
from streamlens.reductions import Reduction
from streamlens.topics import Phase, topic_spec

__all__ = ["Engine", "disabled"]

P = ParamSpec("P")
R = TypeVar("R")

_MODEL = ("",)


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
        self.settling = Settling(self)
        self.index = ModelIndex(model, self.copies)
        self.extra_metadata: dict[str, Any] = {}
        self._suppressed = 0
        self.threads = Threads(self)
        self.compiled = CompiledPasses(self)
        self.passes = PassWatch(self)
        self.forward = ForwardCapture(self)
        self.batches = BatchCapture(self)
        self.losses = LossCapture(self)
        self.absent = Absent(self)
        self.updates = UpdateCapture(self, optimizers)
        self._root = RootHooks(self)
        if not self.inert:
            prepare_compiler((*root.HOOKS, *pass_hooks.HOOKS, *losses.HOOKS, Engine.guard.__code__))
            hook_guards.watch(self.compiled, tuple(model.modules()))
            self._root.install(model)
            step_watch().add(self.updates)

    of_model = True
    _snapshot = Source._snapshot | {"optimizers"}

    # -- facts -------------------------------------------------------------------------------

    @property
    def model(self) -> nn.Module | None:
        """The observed model, while it exists."""
        return self._model()

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        """The model's modules by layer name, held weakly."""
        return self.index.modules

    def summary(self) -> Iterable[str]:
        """The model and its size; hooks in place and bytes held."""
        model = self.metadata()
        yield (
            f"{model['model'] or 'model'} ({model['parameters']:,} parameters), step {self.clock.step}"
            + (", nothing runs: STREAMLENS_DISABLED is set" if self.inert else "")
        )
        yield f"hooks: {self.hook_counts()}"
        yield f"bytes held: {self.updates.bytes_held:,} (copies of parameters for updates)"

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
        asked = self.closed or self.inert or self.paused > 0 or self._suppressed > 0
        return asked or self.threads.contended or _captures_graph()

    @contextlib.contextmanager
    def suppressed(self) -> Iterator[None]:
        """A region that counts as nothing, such as a closure's second evaluation."""
        self._suppressed += 1
        try:
            yield
        finally:
            self._suppressed -= 1

    @contextlib.contextmanager
    def silenced(self) -> Iterator[None]:
        """A region in which nothing is taken, and the model is without our hooks."""
        lifted = None if self.paused else Lifted(self._module_handles())
        try:
            with super().silenced():
                yield
        finally:
            if lifted is not None:
                lifted.put_back(self._module_handles())

    def _module_handles(self) -> list[RemovableHandle]:
        return [*self._root.handles, *self.forward.modules.handles, *self.losses.handles]

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

    def check_selector(self, selector: LayerSelector) -> None:
        """Raise for a glob that no module and no parameter matches.

        Raises:
            LayerNotFoundError: There is one.
        """
        selector.check_globs([*self.index.modules, *(e.name for e in self.index.entries)])

    def refresh(self) -> None:
        """Look at the model again if it has parameters that the index does not know."""
        if self.outdated:
            self.rebuild_index()

    def end_update(self) -> None:
        """The parameters were updated, in a loop without a `torch.optim` optimizer."""
        self.guard(self.updates.by_hand)

    def watch_loss(self, loss: Callable[P, R]) -> Callable[P, R]:
        """Watch a loss: a module, or any callable, for which one to call in its place is returned."""
        if isinstance(loss, nn.Module):
            self.losses.watch_module(loss)
            return loss
        return self.losses.watch_function(loss)

    def check_open(self) -> None:
        """Raise if the model is gone, or the engine is closed.

        Raises:
            ClosedLensError: It is.
        """
        if self.model is None:
            raise ClosedLensError(
                "this lens is closed: the model it observed no longer exists; keep a reference to it"
            )
        super().check_open()

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
        self.exchange.demands_changed()
        if not self.closed and not self.inert:
            self.install()

    # -- several processes -------------------------------------------------------------------

    def reduced(self, view: View, reduction: Reduction) -> View:
        """The view of what a reduction makes of another one, which has to merge where ranks hold parts."""
        self.exchange.check(view.topics, reduction.describe(), reduction)
        return super().reduced(view, reduction)

    def check_whole(self, topics: Sequence[str], operator: str) -> None:
        """Raise where this process holds a part only of what an operator needs whole."""
        self.exchange.check(topics, operator, None)

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
        self.passes.settle()
        self.passes.flush()
        self.forward.drop()
        self.updates.release()
        counted = self.clock.counted
        closed = self.clock.close_step()
        self.post_mark(Mark(MarkKind.CLOSED, closed, self.clock.epoch))
        if self.clock.step in self._schedule.ends:
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
        self.announce_epoch()

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
        self.exchange.model_changed()
        self.demands_changed()

    def hook_counts(self) -> str:
        """The hooks in place, for people."""
        if self.inert:
            return "none"
        return f"2 on the model, {self.forward.hooks} on its parts and parameters, 2 on optimizers (shared)"

    # -- state and the end -------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The clock, the partners among the optimizers and the state of every operator."""
        return {**super().state_dict(), "optimizers": self.updates.partners.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a snapshot was taken.

        Raises:
            ValueError: It is none.
        """
        super().load_state_dict(state)
        self.updates.partners.load_state_dict(state["optimizers"])

    def shut_down(self, timeout: float | None = None) -> bool:
        """Complete every stream, remove every hook, flush and close every sink."""
        if not self.closed and not self.inert:
            self.guard(self.passes.settle)
            self.guard(self.passes.flush)
            self.guard(self.updates.release)
        return super().shut_down(timeout)

    def __del__(self) -> None:
        # The model went together with its hooks, and they with us: nothing must stay unwritten.
        if not getattr(self, "closed", True):
            bury(self)

    def _tidy(self) -> None:
        super()._tidy()
        self.settling.drop()
        self.exchange.close()
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


def _captures_graph() -> bool:
    """Whether CUDA records what is launched and computes nothing: a wait or a read would end that."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def _close_if_alive(reference: weakref.ref[Engine]) -> None:
    engine = reference()
    if engine is not None:
        bury(engine)
