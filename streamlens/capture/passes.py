"""`PassWatch`: which forwards and backwards are training, where they begin and where they end."""

from __future__ import annotations

import itertools
import sys
import threading
from collections.abc import Mapping
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from streamlens.capture.hooks import first_tensor, tensors_in
from streamlens.capture.losses import loss_of_output
from streamlens.capture.pass_hooks import BackwardHook, after_backward
from streamlens.frame import Kind
from streamlens.runtime import log
from streamlens.topics import TOPICS

if TYPE_CHECKING:
    from streamlens.capture.engine import Engine

__all__ = ["PassWatch"]

_PASS_TOPICS = frozenset(spec.name for spec in TOPICS.values() if spec.kind is Kind.MICRO_STEP)
"""What is taken in forward and backward."""

_CALL = nn.Module._call_impl.__code__

_MOST_OUTPUTS = 16
"""Tensors of a model's output that are watched for a backward."""


class PassWatch:
    """Told by hooks where a forward or backward begins and ends; decides what counts.

    Attributes:
        in_forward: Whether a counted forward is running.
        outside: The module whose uncounted forward is running, if any.
        nested: Calls of the model by itself that are running.
        watches_passes: Whether anything of forward or backward is wanted.
        parts_needed: Whether updates come without the model itself being called.
        thread: The thread of the last counted forward; 0 before it.
        examples: How many examples the last batch had, where somebody needs to know.
        open_ended: Whether a backward has begun whose end nobody will tell.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.in_forward = False
        self.outside: str | None = None
        self.nested = 0
        self.watches_passes = False
        self.parts_needed = False
        self._suspected = False
        self._watches_input = False
        self._last_counted = False
        self._late_output: Tensor | None = None
        self._grad_forward_seen = False
        self.open_ended = False
        self.thread = 0
        self.examples = 1

    def reset(self) -> None:
        """The demands have changed."""
        self.watches_passes = self._engine.wanted(_PASS_TOPICS)
        self._watches_input = self._engine.wanted(("input_data", "examples_per_second"))

    def remove(self) -> None:
        """Forget the pass under way."""
        self.in_forward = False
        self.outside = None
        self._late_output = None

    # -- the forward -------------------------------------------------------------------------

    def elsewhere(self) -> bool:
        """Whether the forward that is running runs on another thread than this."""
        return self.in_forward and threading.get_ident() != self.thread

    def abandoned(self, module: nn.Module, *, compiled: bool = False) -> bool:
        """Whether the forward that seems to be running was interrupted, now that `module` is called.

        An exception such as `KeyboardInterrupt` leaves without the hooks that tell of the end.

        Args:
            module: The module.
            compiled: Whether compiled code says so, in which a call leaves no frame.
        """
        opener = self._engine.forward.opener
        running = self._engine.index.modules.get(opener) if opener else self._engine.model
        calls = 0
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            calls += frame.f_code is _CALL and frame.f_locals.get("self") is running
            frame = frame.f_back
        if calls > (running is module and not compiled):
            return False
        self.in_forward = False
        if self.watches_passes:
            self._engine.forward.begin_pass(self._engine.due_now)
        return True

    def counts_forward(self, module: nn.Module) -> bool:
        """Whether a forward that begins now is training."""
        if self._engine.silent or torch._C._current_graph_task_id() != -1:
            return False
        if _is_recorded() or not torch.is_grad_enabled():
            return False
        if not module.training:
            self._grad_forward_seen = True
        return module.training or self._engine.count == "grad"

    def forward_begins(self, module: nn.Module, name: str, args: Any, kwargs: Any) -> None:
        """The model (or, where it is never called, a part) is called."""
        if not self.counts_forward(module):
            # Its parts do not count either, though some may be in training mode.
            self.outside = name
            if not self._engine.silent:
                self._last_counted = False
            return
        self.settle()
        if self._suspected and not name:
            # The model itself is called: whether it ever would be is no question any more.
            self._suspected = self.parts_needed = False
            self._engine.install()
        self.outside = None
        self.nested = 0
        self.thread = threading.get_ident()
        clock = self._engine.clock
        if clock.updated:
            self._engine.close_step()
        if self._engine.idle:
            clock.begin_pass()
            self._last_counted = True
            self.in_forward = True
            self._engine.forward.opener = name
            return
        index = self._engine.index
        # Parameters that were replaced have no hooks; all else of theirs is noticed at their update.
        often = clock.passes & 63 == 0 or "raw_gradients" in self._engine.topics
        if index.ripe or (often and index.stale()):
            self._engine.rebuild_index()
        self._engine.updates.look_again()
        if self._engine.forward.in_backward:
            # Within a backward no forward counts: that one raised, and its pass is over.
            self._engine.forward.in_backward = False
            clock.end_pass()
        fresh = clock.begin_pass()
        self._last_counted = True
        self.in_forward = True
        self._engine.forward.opener = name
        if fresh:
            if clock.micro_step == 0:
                self._engine.absent.step_begins()
            if self.watches_passes:
                self._engine.forward.begin_pass(self._engine.due_now)
                self._engine.losses.begin_pass()
            self._engine.updates.pass_begins()
            self._engine.emit_index("batch_started", clock.batch)
        # Of parts called one after the other, the first has the batch.
        watches = self._watches_input or (self.watches_passes and self._engine.exchange.active)
        if watches and self._engine.due_now and (fresh or not name):
            data = next(tensors_in((args, kwargs)), None)
            if data is not None:
                self.examples = data.shape[0] if data.ndim else 1
                self._engine.updates.pace.count_examples(data)
                self._engine.batches.measure("input_data", data, self._engine.due_now)

    def forward_ends(self, output: Any, kwargs: Mapping[str, Any] | None = None) -> None:
        """The module that began the forward returns; None if it raised."""
        self.in_forward = False
        opener = self._engine.forward.opener
        rooted = not opener
        is_loss = self._engine.losses.is_loss(self._engine.index.modules.get(opener)) if opener else False
        self._engine.forward.opener = None
        if output is None or self._engine.idle or self._engine.silent:
            if self.watches_passes and sys.exc_info()[0] is not None:
                # It raised: what was gathered on the way belongs to nothing.
                self._engine.forward.begin_pass(self._engine.due_now)
            return
        if isinstance(output, Tensor):
            self.watch_backward(output)
        else:
            for tensor in itertools.islice(tensors_in(output), _MOST_OUTPUTS):
                self.watch_backward(tensor)
        if self._engine.index.ripe:
            # Lazy modules have taken shape in this forward; its backward will have their gradients.
            self._engine.rebuild_index()
            self._engine.forward.plan_again(self._engine.due_now)
        due = self._engine.due_now
        if not due or not self.watches_passes:
            return
        # Of an output that carries its loss in front, the prediction is what follows.
        result = first_tensor(output, but=loss_of_output(output))
        if result is not None and rooted:
            self._engine.batches.measure("network_output", result, due)
        elif result is not None and "network_output" in self._engine.topics and not is_loss:
            # Of parts called one after the other, the last has the output.
            self._late_output = result.detach()
        if rooted:
            self._loss_in_output(output, kwargs or {})
            self._engine.forward.send("activations")

    def _loss_in_output(self, output: Any, kwargs: Mapping[str, Any]) -> None:
        loss = loss_of_output(output)
        if loss is not None and loss.requires_grad:
            self._engine.losses.take_own(loss, first_tensor(kwargs.get("labels")))

    def loss_counts(self) -> bool:
        """Whether a watched loss that is computed now belongs to the open micro-step."""
        return (
            self._engine.clock.in_pass
            and self._last_counted
            and not self._engine.silent
            and not self.elsewhere()
        )

    # -- the backward ------------------------------------------------------------------------

    def watch_backward(self, tensor: Tensor) -> None:
        """Notice when a backward through this tensor begins."""
        if self._engine.demands and tensor.requires_grad:
            self._engine.forward.hook_tensor(tensor, BackwardHook(self._engine, self._engine.clock.passes))

    def backward_begins(self, passes: int | None = None) -> None:
        """The first hook of a backward through the open pass has fired, perhaps on another thread."""
        if self._engine.forward.in_backward or (passes is not None and passes != self._engine.clock.passes):
            return
        self._engine.forward.drop_provisional()
        told = after_backward(partial(self._engine.guard, self.backward_ends))
        self._engine.forward.in_backward = told
        self.open_ended = not told

    def backward_ends(self) -> None:
        """A backward through the open pass has run."""
        self._engine.forward.in_backward = False
        self.open_ended = False
        if self._engine.silent:
            return
        self.flush()
        if "layer_gradients" in self._engine.topics:
            self._engine.forward.send("layer_gradients")
        if "raw_gradients" in self._engine.topics:
            self._engine.forward.raw_gradients()
        if self._engine.clock.in_pass:
            batch = self._engine.clock.batch
            self._engine.clock.end_pass()
            self._engine.emit_index("batch_finished", batch)

    def settle(self) -> None:
        """End a backward that nobody tells the end of, because it ran within compiled code."""
        if self.open_ended:
            self.backward_ends()

    def flush(self) -> None:
        """Emit what the forward phase of the open pass has left: late activations and the loss."""
        if not self.watches_passes:
            return
        late, self._late_output = self._late_output, None
        if self._engine.due_now:
            if late is not None:
                self._engine.batches.measure("network_output", late, self._engine.due_now)
            if "activations" in self._engine.topics:
                self._engine.forward.send("activations")
            self._engine.losses.send()
            if self._engine.forward.provisional and not self._engine.forward.in_backward:
                self._engine.forward.send("layer_gradients")

    # -- updates without a forward -----------------------------------------------------------

    def suspect_parts(self) -> None:
        """Until the model itself is called, any part may be the outermost module that is."""
        if not self.parts_needed:
            self._suspected = True
            self._watch_parts()

    def _watch_parts(self) -> None:
        self.parts_needed = True
        self._engine.install()

    def update_without_forward(self) -> None:
        """An update came without a counted forward: watch the parts, and warn if that does not help."""
        # What was a suspicion is so.
        self._suspected = False
        if not self.parts_needed:
            self._watch_parts()
        elif not self._engine.counts["updates_without_forward"]:
            self._engine.counts["updates_without_forward"] += 1
            hint = (
                " A forward with gradients ran in eval mode: pass observe(model, count='grad') to count it."
                if self._grad_forward_seen and self._engine.count == "training"
                else " Call the model itself (model(x), not model.forward(x)) to see activations and losses."
            )
            log.warning(
                "an optimizer updates %s, but no forward pass in training mode was seen: parameter topics "
                "work, forward and backward topics stay empty.%s",
                self._engine.metadata()["model"] or "the model",
                hint,
            )


def _is_recorded() -> bool:
    """Whether what runs is recorded or transformed by a tool, so that its tensors are no values.

    These are `torch.jit.trace`, `torch.func`, `torch.fx`, `torch.export`, `make_fx` and fake tensors.
    """
    if torch._C._get_tracing_state() is not None or torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    if torch.compiler.is_compiling() or torch.fx._symbolic_trace._is_fx_tracing_flag:
        return True
    keys = torch._C._TorchDispatchModeKey
    return torch._C._len_torch_dispatch_stack() > 0 and any(
        torch._C._get_dispatch_mode(key) is not None for key in (keys.PROXY, keys.FAKE, keys.FUNCTIONAL)
    )
