"""Training through `torch.compile`, and the same by plain PyTorch hooks for comparison."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch._dynamo
from torch import Tensor, nn
from torch._dynamo.utils import counters

from tests._runs import CLASSES

__all__ = ["WAYS", "ByHand", "Graphs", "batches", "by_hand", "fresh_compiler", "logits", "train_compiled"]

WAYS = (
    "torch.compile(model)",
    "model.compile()",
    "compiled, then observed",
    "the loss too",
    "the whole step",
)
"""Ways to compile a model that is trained."""

Observe = Callable[[nn.Module, nn.Module], None]


@contextmanager
def fresh_compiler() -> Iterator[None]:
    """A compiler that has compiled nothing yet, before and after."""
    torch._dynamo.reset()
    counters.clear()
    try:
        yield
    finally:
        torch._dynamo.reset()
        counters.clear()


def batches(count: int, *, size: int = 3, inputs: int = 16, seed: int = 7) -> list[tuple[Tensor, Tensor]]:
    """Inputs and labels."""
    data = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(size, inputs, generator=data),
            torch.randint(0, CLASSES, (size,), generator=data),
        )
        for _ in range(count)
    ]


def logits(output: Any) -> Tensor:
    """What the loss is computed of."""
    return cast("Tensor", output["logits"] if isinstance(output, dict) else output)


@dataclass
class ByHand:
    """What a run computed, a mapping of layers a step."""

    outputs: list[dict[str, Tensor]] = field(default_factory=list)
    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)


def by_hand(model: nn.Module, data: Sequence[tuple[Tensor, Tensor]], rate: float = 0.1) -> ByHand:
    """Train with SGD, and keep what each layer computes and its gradient."""
    run, optimizer = ByHand(), torch.optim.SGD(model.parameters(), lr=rate)
    kept: dict[str, Tensor] = {}
    copies: dict[str, Tensor] = {}
    gradients: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if torch._C._current_graph_task_id() != -1:
                return  # computed a second time, for a checkpoint
            calls = sum(key.partition("@")[0] == name for key in kept)
            key = f"{name}@{calls}" if calls else name
            value = output[0] if isinstance(output, tuple) else output
            kept[key], copies[key] = value, value.detach().clone()
            if value.requires_grad:
                value.register_hook(lambda gradient: gradients.__setitem__(key, gradient.clone()))

        return hook

    def in_order(values: dict[str, Tensor]) -> dict[str, Tensor]:
        names = [name for name, _ in model.named_modules()]
        keys = sorted(values, key=lambda key: (names.index(key.partition("@")[0]), key))
        return {key: values[key] for key in keys}

    handles = [
        module.register_forward_hook(keep(name))
        for name, module in model.named_modules()
        if name and (not list(module.children()) or list(module.parameters(recurse=False)))
    ]
    for x, y in data:
        for store in (kept, copies, gradients):
            store.clear()
        loss = nn.functional.cross_entropy(logits(model(x)), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        run.outputs.append(in_order(copies))
        run.gradients.append(in_order(gradients))
        run.losses.append(loss.item())
    for handle in handles:
        handle.remove()
    return run


def train_compiled(
    model: nn.Module,
    data: Sequence[tuple[Tensor, Tensor]],
    way: str = WAYS[0],
    *,
    observe: Observe | None = None,
    backend: Any = "aot_eager",
    fullgraph: bool = True,
    after_first: Callable[[], None] | None = None,
) -> list[float]:
    """Train with SGD, compiled in one of the `WAYS`; gives the losses.

    Args:
        model: The model.
        data: Its batches.
        way: What is compiled.
        observe: Called with what is to be observed and the loss module, before anything is compiled.
        backend: Of `torch.compile`.
        fullgraph: Whether graph breaks are errors, where a way has none by itself.
        after_first: Called after the first step.
    """
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def compiled(fn: Any) -> Any:
        return torch.compile(fn, backend=backend, fullgraph=fullgraph)

    call: Any = compiled(model) if way == "compiled, then observed" else model
    if observe is not None:
        observe(call, criterion)
    if way == "torch.compile(model)":
        call = compiled(model)
    elif way == "model.compile()":
        model.compile(backend=backend, fullgraph=fullgraph)

    def loss_of(x: Tensor, y: Tensor) -> Tensor:
        return cast("Tensor", criterion(logits(call(x)), y))

    if way == "the loss too":
        loss_of = compiled(loss_of)

    def step(x: Tensor, y: Tensor) -> Tensor:
        loss = loss_of(x, y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    if way == "the whole step":
        step = torch.compile(step, backend=backend)
    losses = []
    for number, (x, y) in enumerate(data):
        losses.append(step(x, y).item())
        if number == 0 and after_first is not None:
            after_first()
    return losses


class Graphs:
    """A backend that runs graphs as they are, and keeps them."""

    def __init__(self) -> None:
        self.kept: list[torch.fx.GraphModule] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        """Compile a graph."""
        self.kept.append(graph)
        return graph.forward

    @property
    def taps(self) -> list[str]:
        """The kinds of event that the last graph tells."""
        sites = [
            str(node.args[1]) for node in self.kept[-1].graph.nodes if node.target is torch.ops.streamlens.tap
        ]
        return [site.split("|")[1] for site in sites]
