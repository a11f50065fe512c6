"""What layers make of fixed inputs, as matrices to compare: with an earlier model's, or each other's.

A metric of them writes a `RepresentationNode` with `keep`, what is kept of one layer's matrix, and `compare`,
and is applied with `on_layers`.
"""

from __future__ import annotations

import contextlib
import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from reactivex import Observable
from torch import Tensor, nn

from streamlens.capture.hooks import first_tensor
from streamlens.capture.model import ModelIndex
from streamlens.errors import StreamlensError
from streamlens.frame import Frame
from streamlens.layers import LayerSelector
from streamlens.lens import Lens
from streamlens.nodes import Emitted
from streamlens.operators._base import is_whole, relabelled
from streamlens.operators._batches import called, device_of, map_tensors, moved
from streamlens.operators._isolated import isolated_copy, unwrapped, widened_input
from streamlens.operators._layout import UnitDimensions
from streamlens.operators._model import FindModel, ModelNode, evaluating, on_model
from streamlens.operators._places import Places, check_places, check_unit_dim, rows_of
from streamlens.operators._tensors import copies, wide
from streamlens.stream import Operator, Stream
from streamlens.topics import topic_spec

__all__ = ["ForwardProbe", "Kept", "Probe", "Reference", "RepresentationNode", "Selectors", "on_layers"]

ForwardProbe: TypeAlias = Callable[[nn.Module, Any], Any]
"""How a model is given the probe: a function of both."""
Kept: TypeAlias = dict[str, Tensor]
"""What is kept of each layer, in model order."""
Selectors: TypeAlias = tuple[LayerSelector, ...]

_PREFIXES = ("module.", "_orig_mod.")
"""What wrappers put in front of the names in a state dict."""


@dataclass(frozen=True, slots=True, eq=False)
class Probe:
    """Fixed inputs, and how outputs of layers for them become matrices.

    Attributes:
        operator: The metric's name, for messages.
        inputs: What the model is called with; copies of its tensors are kept.
        places: What becomes of the places of an output.
        unit_dim: The dimension of the units; by the module's class, else the number of dimensions, if None.
        max_rows: The most rows of a matrix; all of them if None.
        forward: How the model is called; by convention if None.
    """

    operator: str
    inputs: Any
    places: Places
    unit_dim: int | None
    max_rows: int | None
    forward: ForwardProbe | None

    def __post_init__(self) -> None:
        operator = self.operator
        check_places(operator, self.places)
        check_unit_dim(operator, self.unit_dim)
        if self.max_rows is not None and (not is_whole(self.max_rows) or self.max_rows < 2):
            raise ValueError(
                f"{operator}(max_rows={self.max_rows!r}): a number from 2 on, or None for all rows"
            )
        if self.forward is not None and not callable(self.forward):
            raise TypeError(f"{operator}(forward={self.forward!r}): a function of the model and the probe")
        found: list[Tensor] = []
        own = map_tensors(lambda t: found.append(t) or t.detach().clone(), self.inputs)  # type: ignore[func-returns-value]
        if not found:
            raise TypeError(
                f"{operator}() takes a probe, the inputs that it looks at the layers with: a tensor, a tuple "
                f"of arguments or a mapping of named ones, got {type(self.inputs).__name__}"
            )
        object.__setattr__(self, "inputs", own)

    def check(self, model: nn.Module) -> None:
        """Raise where a model cannot be looked at with it.

        Raises:
            StreamlensError: It does not take such inputs.
        """
        if self.forward is not None:
            return
        try:
            signature = inspect.signature(unwrapped(model).forward)
        except (TypeError, ValueError):
            return
        given = self.inputs
        args, named = (given, {}) if isinstance(given, list | tuple) else ((given,), {})
        if isinstance(given, Mapping) and len(given) > 1:
            args, named = (), dict(given)
        try:
            signature.bind(*args, **named)
        except TypeError as error:
            raise StreamlensError(
                f"{self.operator}(): the probe is not what the model is called with ({error}): pass its "
                "inputs, without labels: a tensor, a tuple of arguments or a mapping of named ones, or "
                "forward=, a function of the model and the probe"
            ) from None

    def matrices(
        self, model: nn.Module, selectors: Selectors, keep: Callable[[Tensor], Tensor]
    ) -> tuple[Kept, dict[str, Exception]]:
        """What is kept of the outputs of a model's layers for the probe.

        Args:
            model: A copy of its own: hooks are left on it, and it stays in evaluation mode.
            selectors: Which layers, as for activations.
            keep: What is kept of a layer's matrix: float64, one row a data point, owning its memory.

        Returns:
            What is kept, and of which layers nothing could be, and why.
        """
        index = ModelIndex(model)
        spec = topic_spec("activations")
        assert spec is not None
        chosen = index.resolve(spec, selectors)
        order = {name: i for i, name in enumerate(index.modules)}
        found: dict[tuple[int, int], tuple[str, Tensor]] = {}
        failed: dict[str, Exception] = {}
        calls: Counter[str] = Counter()
        units = UnitDimensions(self.unit_dim, index.modules)

        def take(name: str, output: Any) -> None:
            call = calls[name]
            calls[name] += 1
            layer = f"{name}@{call}" if call else name
            tensor = first_tensor(output)
            if tensor is None:
                return
            try:
                rows = rows_of(tensor, self.places, units.of(layer, tensor), self.max_rows)
                found[order[name], call] = layer, keep(wide(rows.clone()))
            except Exception as error:
                failed[layer] = error

        for name in index.default_modules() if chosen is None else chosen:
            index.modules[name].register_forward_hook(lambda _m, _i, out, name=name: take(name, out))
        with _as_written(model), evaluating(model) as run:
            inputs = moved(map_tensors(widened_input, self.inputs), device_of(model))
            if self.forward is not None:
                self.forward(run, inputs)
            else:
                called(run, inputs)
        return dict(found[key] for key in sorted(found)), failed


@contextlib.contextmanager
def _as_written(model: nn.Module) -> Iterator[None]:
    """Without autocast: half precision would round what is compared."""
    with contextlib.ExitStack() as stack:
        for kind in {"cpu", *(p.device.type for p in model.parameters())}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


class Reference:
    """The model that is compared with, as it was when this was made.

    Args:
        operator: The metric's name, for messages.
        of: A model, a state dict of one like the observed one, None for the first that is evaluated, or
            `"previous"` for the one evaluated before.

    Raises:
        TypeError: It is none of these.

    Attributes:
        moving: Whether it is the one evaluated before.
    """

    def __init__(self, operator: str, of: nn.Module | Mapping[str, Any] | str | None) -> None:
        self._operator = operator
        self.moving = of == "previous" if isinstance(of, str) else False
        self._model: nn.Module | None = None
        self._state: dict[str, Any] | None = None
        if isinstance(of, nn.Module):
            self._model = isolated_copy(of).modules[0]
        elif isinstance(of, Mapping) and of and all(isinstance(key, str) for key in of):
            self._state = {_bare(key): map_tensors(_copied, entry) for key, entry in of.items()}
        elif of is not None and not self.moving:
            got = repr(of) if isinstance(of, str) else type(of).__name__
            raise TypeError(
                f"{operator}(reference=...) takes a model, a state dict of one (model.state_dict()), or "
                f"'previous', got {got}"
            )

    @property
    def given(self) -> bool:
        """Whether there is one, and it is not the first that is evaluated."""
        return self.moving or self._model is not None or self._state is not None

    def check(self, model: nn.Module) -> None:
        """Raise where a model cannot take the state.

        Raises:
            StreamlensError: The state lacks some of the model's entries.
        """
        if self._state is None:
            return
        missing = [key for key in unwrapped(model).state_dict() if _bare(key) not in self._state]
        if missing:
            raise StreamlensError(
                f"{self._operator}(reference=...): the state has no entry {missing[0]!r}"
                f"{f' and {len(missing) - 1} more' if missing[1:] else ''}, which the model has: pass the "
                "state dict of an earlier checkpoint of it, or the other model itself"
            )

    def model_like(self, model: nn.Module) -> nn.Module | None:
        """The reference as a copy of its own, on a model's device; None for the first evaluated."""
        if self._model is not None:
            copied = isolated_copy(self._model).modules[0]
            device = device_of(model)
            return copied if device is None else copied.to(device)
        if self._state is None:
            return None
        copied = isolated_copy(model).modules[0]
        names = {_bare(key): key for key in copied.state_dict()}
        copied.load_state_dict({names.get(key, key): entry for key, entry in self._state.items()})
        return copied


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()


def _bare(key: str) -> str:
    """A name in a state dict without what wrappers of the whole model put in front."""
    while (prefix := next((p for p in _PREFIXES if key.startswith(p)), None)) is not None:
        key = key[len(prefix) :]
    return key


class RepresentationNode(ModelNode):
    """Compares what layers make of a probe with what a reference makes of it.

    A layer that cannot be compared is left out and reported, once.

    Args:
        stream: The stream whose frames say when.
        find: Gives the model.
        probe: The inputs.
        selectors: Which layers.
        reference: What is compared with.
    """

    def __init__(
        self, stream: Stream, find: FindModel, probe: Probe, selectors: Selectors, reference: Reference
    ) -> None:
        super().__init__(stream, find)
        self._probe = probe
        self._selectors = selectors
        self._start = reference
        self._reference: Kept | None = None
        self._told: set[str] = set()

    def keep(self, rows: Tensor) -> Tensor:
        """What is kept of a layer.

        Args:
            rows: Its matrix, float64, one row a data point.
        """
        raise NotImplementedError

    def compare(self, now: Tensor, then: Tensor) -> Tensor:
        """How alike two layers are, by what was kept of them.

        Args:
            now: Of one.
            then: Of the other.
        """
        raise NotImplementedError

    def taken(self, model: nn.Module) -> Kept:
        """What is kept of the layers of a model.

        Args:
            model: A copy of its own.
        """
        kept, failed = self._probe.matrices(model, self._selectors, self.keep)
        for layer, error in failed.items():
            self._tell(layer, error)
        return kept

    def now_and_then(self, model: nn.Module) -> tuple[Kept, Kept]:
        """What is kept of the layers of the model as it is, and of the reference, of which there may be none.

        Args:
            model: The observed model.
        """
        now = self.taken(isolated_copy(model).modules[0])
        if self._start.moving:
            before, self._reference = self._reference, now
            return now, before or {}
        if self._reference is None:
            start = self._start.model_like(model)
            self._reference = now if start is None else self.taken(start)
        return now, self._reference

    def compared(self, layer: str, now: Tensor, then: Tensor) -> Tensor | None:
        """`compare`, or a report and None.

        Args:
            layer: What it is of.
            now: As for `compare`.
            then: As for `compare`.
        """
        try:
            if len(now) != len(then):
                raise StreamlensError(f"{len(now)} data points, and {len(then)} to compare them with")
            return self.compare(now, then.to(now.device))
        except Exception as error:
            self._tell(layer, error)
            return None

    def _tell(self, layer: str, error: Exception) -> None:
        message = f"{layer}: {error}"
        if message not in self._told:
            # Once: it will not be otherwise the next time.
            self._told.add(message)
            self._runtime.report(error, f"{self._probe.operator}() of layer {layer!r}")

    def evaluate(self, model: nn.Module, frame: Frame) -> Emitted:
        """The layers that the model and the reference have in common."""
        now, then = self.now_and_then(model)
        values = {n: self.compared(n, rows, then[n]) for n, rows in now.items() if n in then}
        known = {name: value for name, value in values.items() if value is not None}
        if not known:
            return None
        stacked = torch.stack(list(known.values())).float()
        return relabelled(frame, self._probe.operator, stacked, layers=tuple(known))

    def state_dict(self) -> dict[str, Any]:
        """What is kept of the reference."""
        return {"reference": None if self._reference is None else copies(self._reference)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        saved = state["reference"]
        self._reference = None if saved is None else copies(saved)


def on_layers(
    make: Callable[[Stream, FindModel, Selectors], RepresentationNode],
    plan: str,
    *,
    probe: Probe,
    reference: Reference,
    model: nn.Module | None,
) -> Operator:
    """Apply a metric of the layers of the model.

    Args:
        make: Makes the node of a new subscription.
        plan: The operator as it shows in the plan.
        probe: The inputs.
        reference: What is compared with.
        model: The model, where the stream comes from no lens; held weakly.

    Returns:
        The operator. On a lens narrowed by `layers()` with no topic selected, it is of these layers.
    """

    def check(found: nn.Module) -> None:
        probe.check(found)
        reference.check(found)

    def apply(source: Observable[Frame]) -> Observable[Frame]:
        of_run = isinstance(source, Lens) and not source.topics
        selectors: Selectors = source.view.selectors if isinstance(source, Lens) and of_run else ()

        def node(stream: Stream, find: FindModel) -> ModelNode:
            return make(stream, find, selectors)

        return on_model(source, node, plan, operator=probe.operator, model=model, check=check, of_layers=None)

    return apply
