"""Observing what `torch.compile` compiles: calls from compiled code, and compiled code that is out of date.

Traced hooks (`traced.py`) leave an operation of ours in the compiled code, which hands tensors back
here. It returns nothing and is registered as an effect, so that compilers neither drop it nor change its
order; the graph does not break for it, and `fullgraph=True` holds.
"""

from __future__ import annotations

import itertools
import sys
import weakref
from collections.abc import Iterator, Sequence
from types import CodeType
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

from streamlens.capture.traced import GradientTap, tracing_works
from streamlens.errors import StreamlensError
from streamlens.runtime import log

if TYPE_CHECKING:
    from streamlens.capture.engine import Engine

__all__ = ["CompiledPasses", "hook_guards", "hooks_changed", "prepare_compiler", "undisturbed"]

_serials: Final = itertools.count()
_live: Final[weakref.WeakValueDictionary[str, CompiledPasses]] = weakref.WeakValueDictionary()
"""Who is told, by serial number."""

_kept: Final[list[object]] = []
"""The library that the operation is registered with, and what keeps it an effect."""


class CompiledPasses:
    """Told by compiled code what its hooks would have told.

    Tensors that compiled code hands out are valid during the call alone: it uses their memory again.

    Args:
        engine: Of the model that is compiled, or of one that has parts which are.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.serial = str(next(_serials))
        self._places: dict[str, list[str]] = {}
        self._said: set[str] = set()
        _live[self.serial] = self

    def key(self, kind: str, name: str) -> str:
        """How compiled code names a module's event; the same for every hook that tells of it."""
        return f"{self.serial}|{kind}|{name}"

    def begin_pass(self) -> None:
        """A new micro-step begins."""
        self._places.clear()

    def told(self, kind: str, name: str, site: str, values: Sequence[Tensor]) -> None:
        """Compiled code that runs has come to a tap.

        Args:
            kind: What is told.
            name: The module, or the loss.
            site: The place in the compiled code.
            values: The tensors handed over.
        """
        passes = self._engine.passes
        if kind == "gradient":
            self._gradient(name, site, values)
        elif kind == "backward":
            if self._engine.clock.in_pass:
                passes.backward_begins()
        elif passes.elsewhere():
            return
        elif kind == "output":
            if passes.in_forward:
                self._output(name, site, values)
        elif kind == "begin":
            self._begin(name, values)
        elif kind == "end":
            self._end(name, values)
        elif kind == "loss":
            self._engine.losses.computed_from(name, values[0], values[1] if len(values) > 1 else None)
        elif kind == "own loss" and passes.in_forward:
            self._engine.losses.take_own(values[0], values[1] if len(values) > 1 else None)

    def _begin(self, name: str, values: Sequence[Tensor]) -> None:
        engine, passes = self._engine, self._engine.passes
        module = engine.index.modules.get(name) if name else engine.model
        if module is None:
            return
        if passes.in_forward:
            own = engine.forward.opener == name
            if (name and not own) or not passes.abandoned(module, compiled=True):
                passes.nested += own and not name
                return
        elif name and passes.outside is not None:
            return
        passes.forward_begins(module, name, values, {})

    def _end(self, name: str, values: Sequence[Tensor]) -> None:
        passes = self._engine.passes
        if passes.outside == name:
            passes.outside = None
        elif passes.in_forward and self._engine.forward.opener == name:
            if passes.nested and not name:
                passes.nested -= 1
                return
            if name and "network_output" in self._engine.topics:
                # Kept until it is known that no other part comes after.
                values = [value.clone() for value in values]
            passes.forward_ends(tuple(values))

    def _output(self, name: str, site: str, values: Sequence[Tensor]) -> None:
        forward = self._engine.forward
        if not values:
            self._cannot(
                name,
                "returns something that has no tensor torch.compile can see: have it return a tensor, or a "
                "tuple, list, dict or dataclass of tensors",
            )
            return
        key = forward.take_output(name, values[0], lent=True)
        if key is not None:
            self._places.setdefault(site, []).append(key)

    def _gradient(self, name: str, site: str, values: Sequence[Tensor]) -> None:
        engine = self._engine
        if not values:
            self._cannot(
                name,
                "returns a tensor that it did not compute (its parameter, or its input), whose gradient "
                "torch.compile does not show: take parameter_gradients instead"
                if torch.is_grad_enabled()
                else "its gradient cannot be taken, since compiled autograd is on or this PyTorch too old: "
                "turn compiled autograd off, or compile what is not observed",
            )
            return
        found = self._places.get(site.replace("|gradient|", "|output|", 1))
        if found:
            # One piece of code that ran more than once in a pass: backward comes to the last call first.
            engine.forward.gradient_of(name, found.pop(), engine.clock.passes, values[0], lent=True)
        elif found is not None:
            engine.counts["repeated_backward"] += 1

    def _cannot(self, name: str, what: str) -> None:
        if name in self._said:
            return
        self._said.add(name)
        self._engine.report(StreamlensError(f"layer {name!r} is compiled and {what}"), f"layer {name!r}")


def _tap(values: Sequence[Tensor], site: str, grad: bool) -> None:
    """What `streamlens::tap` does when compiled code runs.

    Args:
        values: The tensors handed over.
        site: Who is told, of what, and the place in the code.
        grad: Whether gradients were enabled there. (Compiled code runs without.)
    """
    serial, kind, name = site.rpartition("@")[0].split("|", 2)
    told = _live.get(serial)
    if told is not None:
        with torch.set_grad_enabled(grad):
            engine = told._engine
            engine.guard(told.told, kind, name, site, [value.detach() for value in values])


# -- the compiler ----------------------------------------------------------------------------------


def prepare_compiler(hooks: Sequence[CodeType]) -> None:
    """Have the compiler know our operation and our hooks; once is enough.

    It is imported here, as `torch.optim` does too when the first optimizer is made.

    Args:
        hooks: Code that is traced where it stands in what is compiled, and is not compiled by itself.
    """
    import torch._dynamo  # noqa: F401

    if _kept:
        return
    try:
        _define_tap()
        for code in (*hooks, GradientTap.__call__.__code__):
            _run_as_it_is(code)
    except (ImportError, AttributeError, TypeError) as error:
        log.warning("this version of PyTorch does not let compiled code be observed: %s", error)


def _define_tap() -> None:
    from torch._higher_order_ops.effects import _EffectType, _register_effectful_op

    library = torch.library.Library("streamlens", "FRAGMENT")
    _kept.append(library)
    # A CUDA graph would replay the kernels, and leave out what runs on the host.
    tags = tuple(tag for name in ("cudagraph_unsafe",) if (tag := getattr(torch.Tag, name, None)) is not None)
    library.define("tap(Tensor[] values, str site, bool grad) -> ()", tags=tags)
    library.impl("tap", _tap, "CompositeExplicitAutograd")
    library.impl("tap", torch.library.fallthrough_kernel, "Autograd")
    torch.library.register_fake("streamlens::tap", lambda values, site, grad: None, lib=library)
    _kept.append(_register_effectful_op(torch.ops.streamlens.tap.default, _EffectType.ORDERED))
    tracing_works()


def _run_as_it_is(code: CodeType) -> None:
    """Have the compiler leave a function alone, and all that it calls, where it is called by itself.

    Where it is called by traced code it is traced.
    """
    from torch._C._dynamo import eval_frame

    skip = eval_frame._FrameAction.SKIP
    eval_frame.set_code_exec_strategy(code, eval_frame._FrameExecStrategy(skip, skip))


def undisturbed(fn: Any) -> Any:
    """A function that the compiler neither traces nor compiles; compiled code is left to call it."""
    return torch.compiler.disable(fn)


class HookGuards:
    """Makes compiled code notice when hooks come and go, for as long as something is observed.

    The compiler leaves guards on hooks out (`skip_nnmodule_hook_guards`) and would run what it has
    compiled for a model without hooks, also one of the same class that nobody observes.
    """

    def __init__(self) -> None:
        self._watching: set[str] = set()
        self._restore = False

    def watch(self, passes: CompiledPasses, modules: Sequence[nn.Module]) -> None:
        """A model is about to be observed: what was compiled of it without these guards is dropped.

        Raises:
            StreamlensError: The compiler has been forbidden to compile it again.
        """
        types = {f"{id(type(module))})" for module in modules}

        def is_stale(guards: str) -> bool:
            return "]._forward_hooks" not in guards and any(name in guards for name in types)

        stale = [code for code, guards in _compiled_code() if is_stale(guards)]
        if stale:
            forbidden = _recompiling_forbidden()
            if forbidden:
                raise StreamlensError(
                    f"the model has been compiled before it is observed, and {forbidden} forbids to compile "
                    "it again: observe it before its first compiled call"
                )
            log.info("what was compiled before the model was observed is compiled again at its next call")
            _drop(stale)
        if not self._watching:
            config = torch._dynamo.config
            self._restore = bool(config.skip_nnmodule_hook_guards)
            config.skip_nnmodule_hook_guards = False
        self._watching.add(passes.serial)

    def unwatch(self, passes: CompiledPasses) -> None:
        """A model is observed no longer."""
        hooks_changed(passes)
        self._watching.discard(passes.serial)
        if not self._watching and self._restore:
            torch._dynamo.config.skip_nnmodule_hook_guards = True
            self._restore = False


hook_guards: Final = HookGuards()
"""The process's compiler has one setting."""


def hooks_changed(passes: CompiledPasses) -> None:
    """Hooks of a model have come or gone: drop the code that was compiled with them.

    Its guards would not let it run again; but it would count, and the compiler gives up on a function
    that it has compiled too often (`recompile_limit`).
    """
    if "torch._dynamo.convert_frame" in sys.modules:
        mark = f"'{passes.serial}|"
        _drop([code for code, guards in _compiled_code() if mark in guards])


def _compiled_code() -> Iterator[tuple[CodeType, str]]:
    """Functions that have compiled code, with the text of its guards."""
    if "torch._dynamo.convert_frame" not in sys.modules:
        return
    from torch._dynamo import convert_frame, eval_frame

    for reference in (*convert_frame.input_codes.seen, *convert_frame.output_codes.seen):
        code = reference()
        if code is None:
            continue
        for entry in eval_frame._debug_get_cache_entry_list(code):
            yield code, str(entry.guard_manager)


def _drop(found: Sequence[CodeType]) -> None:
    from torch._C._dynamo.eval_frame import get_eval_frame_callback, reset_code

    if get_eval_frame_callback() is None:
        # Otherwise compiled code is running, perhaps this; its guards do without us.
        for code in found:
            reset_code(code)


def _recompiling_forbidden() -> str:
    """What forbids the compiler to compile a function again, if anything does."""
    stance = torch._dynamo.eval_frame._stance.stance
    if stance in ("fail_on_recompile", "eager_on_recompile", "run_eager_on_recompile"):
        return f"torch.compiler.set_stance({stance!r})"
    return "torch._dynamo.config.error_on_recompile" if torch._dynamo.config.error_on_recompile else ""
