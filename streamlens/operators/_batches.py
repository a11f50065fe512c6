"""Batches as loaders give them: nested tensors, pairs of inputs and labels, how a model takes them."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from streamlens.capture.hooks import first_tensor, tensors_in
from streamlens.errors import StreamlensError

__all__ = [
    "Forward",
    "Loader",
    "called",
    "check_loader",
    "device_of",
    "examples_in",
    "logits_of",
    "map_tensors",
    "moved",
]

Forward: TypeAlias = Callable[[nn.Module, Any], tuple[Any, Any]]
"""How a model is given a batch: a function of both to its outputs and the labels."""

_LABELS: Final = ("labels", "label", "targets", "target", "y")
"""Under which keys a batch that is a mapping may have its labels."""


def map_tensors(fn: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Nested containers with a function applied to each of their tensors; mappings become dicts."""
    if isinstance(value, Tensor):
        return fn(value)
    if isinstance(value, Mapping):
        return {key: map_tensors(fn, entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        entries = [map_tensors(fn, entry) for entry in value]
        if isinstance(value, list):
            return entries
        return type(value)(*entries) if hasattr(value, "_fields") else tuple(entries)
    return value


def moved(value: Any, device: torch.device | None) -> Any:
    """Nested tensors on a device; None leaves them where they are."""
    return value if device is None else map_tensors(lambda t: t.to(device, non_blocking=True), value)


def device_of(model: nn.Module) -> torch.device | None:
    """Where a model takes its inputs: the device of its first parameter or buffer, if it has any."""
    for tensors in (model.parameters(), model.buffers()):
        for tensor in tensors:
            return tensor.device
    return None


def examples_in(value: Any) -> int:
    """How many examples a batch has: the length of its first tensor."""
    for tensor in tensors_in(value):
        return len(tensor) if tensor.ndim else 1
    return 1


def called(model: nn.Module, inputs: Any) -> Any:
    """What a model gives for inputs: one argument, several (a list or tuple), or named ones (a mapping).

    A mapping of one entry that is not the name of an argument is passed by its place.
    """
    if isinstance(inputs, Mapping):
        if len(inputs) == 1 and not _takes(model, next(iter(inputs))):
            return model(*inputs.values())
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, list | tuple) else model(inputs)


def _takes(model: nn.Module, name: str) -> bool:
    try:
        known = inspect.signature(model.forward).parameters
    except (TypeError, ValueError):
        return True
    return name in known or any(p.kind is p.VAR_KEYWORD for p in known.values())


def logits_of(outputs: Any, operator: str) -> Tensor:
    """The tensor of a model's output that has its predictions: `logits` where it has that, else the first.

    Raises:
        StreamlensError: There is no tensor in it.
    """
    named = outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", None)
    found = named if isinstance(named, Tensor) else first_tensor(outputs)
    if found is None:
        raise StreamlensError(f"{operator}(): the model's output, {type(outputs).__name__}, has no tensor")
    return found


def check_loader(operator: str, loader: object) -> None:
    """Raise unless it can be gone through again and again.

    Raises:
        TypeError: It is not iterable, or an iterator.
        ValueError: It is empty.
    """
    if not isinstance(loader, Iterable):
        raise TypeError(
            f"{operator}() takes a loader, anything that yields batches such as a DataLoader or a list of "
            f"pairs (inputs, labels), got {type(loader).__name__}"
        )
    if isinstance(loader, Iterator):
        raise TypeError(
            f"{operator}() goes through its loader once each time, and {type(loader).__name__} can be gone "
            "through only once: pass a DataLoader, or a list: list(loader)"
        )
    if isinstance(loader, list | tuple) and not loader:
        raise ValueError(f"{operator}(): the loader has no batches")


@dataclass(frozen=True, slots=True, eq=False)
class Loader:
    """Labelled batches that can be gone through without a trace.

    Attributes:
        operator: The metric's name, for messages.
        batches: Yields batches: sequences whose last entry is the labels, or mappings.
        labels: The key of the labels in a mapping; one of the usual ones unless given.
        forward: Takes the place of what is done by convention.
    """

    operator: str
    batches: Iterable[Any]
    labels: str | None = None
    forward: Forward | None = None

    def __post_init__(self) -> None:
        check_loader(self.operator, self.batches)
        if self.labels is not None and not isinstance(self.labels, str):
            raise TypeError(f"{self.operator}(labels={self.labels!r}): the key of the labels in a batch")
        if self.forward is not None and not callable(self.forward):
            raise TypeError(
                f"{self.operator}(forward={self.forward!r}): a function of the model and a batch that gives "
                "the outputs and the labels"
            )

    def __iter__(self) -> Iterator[Any]:
        """The batches; afterwards the loader's own generators are where they were."""
        batches = self.batches
        if isinstance(batches, DataLoader) and batches.persistent_workers:
            # Its one iterator may be in use: by training itself, where this is the training loader.
            own: Any = copy.copy(batches)
            own._iterator = None
            batches = own
        with _generators_kept(batches):
            yield from batches

    def split(self, batch: Any) -> tuple[Any, Any]:
        """The inputs and the labels of a batch.

        Raises:
            StreamlensError: It is neither a sequence of two or more nor a mapping with labels.
        """
        if isinstance(batch, Mapping):
            keys = _LABELS if self.labels is None else (self.labels,)
            found = next((key for key in keys if key in batch), None)
            if found is None:
                raise StreamlensError(
                    f"{self.operator}(): a batch has the entries {', '.join(map(repr, batch))}, and none "
                    f"of them is {' or '.join(map(repr, keys))}: pass labels=, the key of the labels"
                )
            return {key: entry for key, entry in batch.items() if key != found}, batch[found]
        if not isinstance(batch, list | tuple) or len(batch) < 2:
            length = f" of {len(batch)}" if isinstance(batch, list | tuple) else ""
            raise StreamlensError(
                f"{self.operator}() takes batches (inputs, labels) or mappings with labels, and the loader "
                f"gave a {type(batch).__name__}{length}: pass forward=, a function of the model and a batch "
                "that gives the outputs and the labels"
            )
        inputs = batch[:-1]
        return (inputs[0] if len(inputs) == 1 else tuple(inputs)), batch[-1]

    def outputs(self, model: nn.Module, batch: Any) -> tuple[Any, Any]:
        """What a model gives for a batch, and the batch's labels.

        Args:
            model: The model, in whatever mode it is to be.
            batch: A batch on the model's device.
        """
        if self.forward is not None:
            return self.forward(model, batch)
        inputs, labels = self.split(batch)
        return called(model, inputs), labels


@contextmanager
def _generators_kept(batches: object) -> Iterator[None]:
    """Put the generators that a loader draws from back to where they were."""
    sampler = getattr(batches, "sampler", None)
    batch_sampler = getattr(batches, "batch_sampler", None)
    owners = (batches, sampler, batch_sampler, getattr(batch_sampler, "sampler", None))
    found = (getattr(owner, "generator", None) for owner in owners)
    states = [(g, g.get_state()) for g in found if isinstance(g, torch.Generator)]
    try:
        yield
    finally:
        for generator, state in states:
            generator.set_state(state)
