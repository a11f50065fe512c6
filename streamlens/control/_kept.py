"""A model and its optimizers' state, kept and put back in place."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from streamlens.capture.sharded import as_owned, fsdp_parameters, like_owned, local
from streamlens.errors import StreamlensError

__all__ = ["Shelf", "keep", "keep_optimizer", "put_back"]


def keep(model: nn.Module, optimizers: Mapping[int, Optimizer]) -> dict[str, Any]:
    """Copies of a model's parameters and buffers, and of its optimizers' state, where they lie.

    Of what is spread over processes, the part that this one holds.

    Args:
        model: The model.
        optimizers: Its optimizers, each under a number of its own.

    Returns:
        Plain containers and tensors.
    """
    own = {id(parameter) for _, parameter in _owned(model)}
    return {
        "tensors": {name: local(tensor).clone() for name, tensor in _tensors(model)},
        "optimizers": {number: keep_optimizer(optimizer, own) for number, optimizer in optimizers.items()},
    }


def keep_optimizer(optimizer: Optimizer, others: set[int]) -> dict[str, Any]:
    """Copies of an optimizer's state, and of those of its parameters that are kept nowhere else.

    Args:
        optimizer: The optimizer.
        others: The identities of the parameters that are.
    """
    places = _places(optimizer)
    return {
        "state": {places.get(id(key), key): _copied(state) for key, state in optimizer.state.items()},
        "own": {
            place: local(parameter).clone()
            for place, parameter in enumerate(_parameters(optimizer))
            if id(parameter) not in others
        },
    }


@torch.no_grad()
def put_back(kept: Mapping[str, Any], model: nn.Module, optimizers: Mapping[int, Optimizer]) -> None:
    """Put back what `keep` gave, into the tensors that are there.

    Parameter groups, and with them the rates, stay as they are; an optimizer that was not kept too.

    Args:
        kept: What `keep` gave.
        model: The model.
        optimizers: Its optimizers, under the same numbers.

    Raises:
        StreamlensError: The model has other tensors now; nothing is put back.
    """
    now = {name: local(tensor) for name, tensor in _tensors(model)}
    changed = [n for n, t in kept["tensors"].items() if n not in now or now[n].shape != t.shape]
    if changed:
        raise StreamlensError(
            f"the model was changed since it was kept, and has no such {changed[0]!r} any more"
        )
    for name, tensor in kept["tensors"].items():
        now[name].copy_(tensor)
    for number, saved in kept["optimizers"].items():
        optimizer = optimizers.get(number)
        if optimizer is None:
            continue
        parameters = _parameters(optimizer)
        for place, tensor in saved["own"].items():
            local(parameters[place]).copy_(tensor)
        state = {parameters[k] if isinstance(k, int) else k: v for k, v in saved["state"].items()}
        for key in [key for key in optimizer.state if key not in state]:
            del optimizer.state[key]
        for key, value in state.items():
            optimizer.state[key] = _restored(optimizer.state.get(key), value, key)


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    named = [*_owned(model), *model.named_buffers()]
    return [(name, t) for name, t in named if not nn.parameter.is_lazy(t) and _writable(t)]


def _owned(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters as the optimizer owns them, each under its first name."""
    gathered = fsdp_parameters(model)
    seen: set[int] = set()
    for path, module in model.named_modules():
        for role, held in module.named_parameters(recurse=False):
            parameter = as_owned(gathered, module, role, held)
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield (f"{path}.{role}" if path else role), parameter


def _writable(tensor: Tensor) -> bool:
    """Whether each element has a place of its own; what was expanded from one number is a constant."""
    if tensor.layout is not torch.strided:
        return True
    return all(size < 2 or stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _places(optimizer: Optimizer) -> dict[int, int]:
    return {id(parameter): place for place, parameter in enumerate(_parameters(optimizer))}


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return local(value).clone()
    if isinstance(value, dict):
        return {key: _copied(entry) for key, entry in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(_copied, value))
    return copy.deepcopy(value)


def _restored(now: Any, value: Any, parameter: Any) -> Any:
    """A value that was kept, in the tensors that are there where they fit."""
    if isinstance(value, Tensor):
        held = local(now) if isinstance(now, Tensor) else None
        if held is not None and held.shape == value.shape and held.dtype == value.dtype:
            held.copy_(value)
            return now
        if not isinstance(parameter, Tensor) or local(parameter).shape != value.shape:
            return value.clone()
        # A snapshot may have been read to another device than the parameter's.
        return like_owned(value.clone().to(parameter.device), parameter)
    if isinstance(value, dict):
        there = now if isinstance(now, dict) else {}
        return {key: _restored(there.get(key), entry, parameter) for key, entry in value.items()}
    return _copied(value)


class Shelf:
    """Where what is kept lies: in memory, as part of the controller's state, or in files.

    Args:
        folder: The folder of the files; in memory if None.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.label = ""

    def _path(self, place: str) -> Path:
        assert self.folder is not None
        return self.folder / f"rollback{self.label}.{place}.pt"

    def lay(self, place: str, kept: dict[str, Any]) -> dict[str, Any] | None:
        """Lay something down; what is to be remembered of it."""
        if self.folder is None:
            return kept
        path = self._path(place)
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(".tmp")
        torch.save(kept, draft)
        # Whoever looks finds the whole file or the one before.
        os.replace(draft, path)
        return None

    def take(self, place: str, remembered: dict[str, Any] | None) -> dict[str, Any]:
        """What lies there."""
        if remembered is not None:
            return remembered
        # Our own file; and an optimizer's state may hold objects of any class.
        kept: dict[str, Any] = torch.load(self._path(place), weights_only=False)
        return kept

    def move(self, place: str, to: str) -> None:
        """Lay what lies in one place down in another."""
        if self.folder is not None:
            os.replace(self._path(place), self._path(to))
