"""Hooks look and touch nothing: they return None, and leave gradients, flags and modes where they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import optimizer as torch_optimizer

import streamlens as sl
from streamlens.frame import Frame
from tests._runs import small_model
from tests.helpers.shipped import REDUCIBLE, STATES

TAKEN = [topic for topic in REDUCIBLE if topic not in STATES]
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
GLOBAL = ("_global_optimizer_pre_hooks", "_global_optimizer_post_hooks")


def tables(model: nn.Module) -> Iterator[tuple[str, MutableMapping[int, Any]]]:
    """Where hooks are kept: on modules, on parameters, and those of all optimizers."""
    for module in model.modules():
        for name in HOOKS:
            yield name, getattr(module, name)
    for parameter in model.parameters():
        yield "_post_accumulate_grad_hooks", parameter._post_accumulate_grad_hooks or {}
    for name in GLOBAL:
        yield name, getattr(torch_optimizer, name)


def everything(lens: sl.Lens, seen: set[str]) -> None:
    for topic in TAKEN:
        lens.pipe(sl.topic(topic)).subscribe(lambda frame: seen.add(frame.topic))
        lens.pipe(sl.norm(topic), sl.ema(0.5)).subscribe(lambda frame: None)


@pytest.mark.parametrize("closure", [False, True], ids=["plain", "closure"])
def test_hooks_return_nothing_but_for_a_wrapped_closure(
    closure: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a hook returns would take the place of an output, a gradient or an argument."""
    model, criterion = small_model(), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    returned: dict[str, list[Any]] = {}
    seen: set[str] = set()

    def noting(name: str, hook: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            result = hook(*args, **kwargs)
            returned.setdefault(name, []).append(result)
            return result

        return call

    with sl.observe(model, loss=criterion, on_error="raise") as lens:
        everything(lens, seen)
        for name, table in tables(model):
            for key, hook in table.items():
                monkeypatch.setitem(table, key, noting(name, hook))
        register = optimizer.register_step_pre_hook
        # Ours goes there for a step, where hooks of others would run after it.
        monkeypatch.setattr(
            optimizer, "register_step_pre_hook", lambda hook: register(noting(GLOBAL[0], hook))
        )

        def evaluate() -> float:
            optimizer.zero_grad()
            loss = criterion(model(torch.ones(2, 4)), torch.tensor([0, 1]))
            loss.backward()
            return float(loss.item())

        for _ in range(2):
            if closure:
                optimizer.step(evaluate)
            else:
                evaluate()
                optimizer.step()
        monkeypatch.undo()
    assert {"_forward_hooks", "_forward_pre_hooks", *GLOBAL} <= returned.keys()
    assert {"activations", "layer_gradients", "weights"} <= seen
    wrapped = [r for r in returned.pop(GLOBAL[0]) if r is not None]
    assert [r for results in returned.values() for r in results if r is not None] == []
    assert len(wrapped) == (2 if closure else 0)
    for args, kwargs in wrapped:
        assert args[0] is optimizer
        assert callable(args[1])
        assert kwargs == {}


def test_gradients_stay_the_same_objects_and_flags_and_modes_what_they_are() -> None:
    """At each event, as a subscriber finds them, and after every step."""
    model, criterion = small_model(), nn.CrossEntropyLoss()
    model.append(nn.Linear(3, 3).requires_grad_(False)).append(nn.Dropout(0.5).eval())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    learning = {name: p.requires_grad for name, p in model.named_parameters()}
    modes = {name: module.training for name, module in model.named_modules()}
    events: set[str] = set()

    def check(frame: Frame) -> None:
        events.add(frame.topic)
        assert {name: p.requires_grad for name, p in model.named_parameters()} == learning
        assert {name: module.training for name, module in model.named_modules()} == modes
        assert all(not value.requires_grad for _, value in frame.items())

    def gradients() -> list[int]:
        return [id(p.grad) for p in model.parameters() if p.grad is not None]

    with sl.observe(model, loss=criterion, on_error="raise") as lens:
        for topic in TAKEN:
            lens.pipe(sl.topic(topic)).subscribe(check)
            lens.pipe(sl.norm(topic)).subscribe(check)
        first: list[int] = []
        for _ in range(3):
            criterion(model(torch.ones(2, 4)), torch.tensor([0, 1])).backward()
            before = gradients()
            first = first or before
            optimizer.step()
            assert gradients() == before == first
            optimizer.zero_grad(set_to_none=False)
        assert model[3].weight.grad is None
    assert {"activations", "layer_gradients", "weight_gradients", "weight_updates"} <= events
