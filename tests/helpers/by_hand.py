"""Training loops written by hand, which take down what an observed run must have emitted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

Batch = Any
LossOf = Callable[[nn.Module, Batch], Tensor]
"""The loss of a model on a batch."""


@dataclass
class HandStep:
    """What one step of a loop did, by full parameter name.

    Attributes:
        before: Parameters before the update.
        after: Parameters after it.
        gradients: Gradients as the optimizer found them, where there were any.
        rates: Learning rates when the optimizer was called.
        state: The optimizer's own state after the update.
        losses: The loss of each forward pass.
    """

    before: dict[str, Tensor] = field(default_factory=dict)
    after: dict[str, Tensor] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    rates: dict[str, float] = field(default_factory=dict)
    state: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)

    def updates(self, *, owned: bool = True) -> dict[str, Tensor]:
        """After minus before, for the parameters that the optimizer owns."""
        names = self.rates if owned else self.after
        return {name: self.after[name] - self.before[name] for name in names}


def of_role(values: Mapping[str, Tensor], role: str) -> dict[str, Tensor]:
    """The entries of modules' own `weight` (or `bias`), keyed by module."""
    pairs = ((name.rpartition("."), value) for name, value in values.items())
    return {module: value for (module, _, last), value in pairs if last == role}


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the parameters by name."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the gradients by name, where there are any."""
    return {name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None}


def update_by_hand(model: nn.Module, optimizer: Optimizer, losses: Sequence[float] = ()) -> HandStep:
    """Call the optimizer, and take down what it found and left."""
    step = HandStep(before=snapshot(model), gradients=gradients(model), losses=list(losses))
    rate_of = {id(p): float(group["lr"]) for group in optimizer.param_groups for p in group["params"]}
    step.rates = {n: rate_of[id(p)] for n, p in model.named_parameters() if id(p) in rate_of}
    optimizer.step()
    step.after = snapshot(model)
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                step.state.setdefault(key, {})[name] = value.detach().clone()
    return step


def train_by_hand(
    model: nn.Module,
    optimizer: Optimizer,
    batches: Sequence[Batch],
    loss_of: LossOf,
    *,
    accumulate: int = 1,
    clip: float | None = None,
) -> list[HandStep]:
    """The plain loop: an update every `accumulate` batches, clipped if asked."""
    steps: list[HandStep] = []
    losses: list[float] = []
    for i, batch in enumerate(batches):
        loss = loss_of(model, batch)
        (loss / accumulate).backward()
        losses.append(loss.item())
        if (i + 1) % accumulate == 0:
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            steps.append(update_by_hand(model, optimizer, losses))
            optimizer.zero_grad()
            losses = []
    return steps


def norms(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The Euclidean norm of each value, in double precision."""
    return {name: value.to_dense().double().square().sum().sqrt() for name, value in values.items()}


def regression(
    seed: int, count: int, shape: tuple[int, ...], classes: int = 3
) -> list[tuple[Tensor, Tensor]]:
    """Random batches of (input, target)."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(*shape, generator=generator), torch.randn(shape[0], classes, generator=generator))
        for _ in range(count)
    ]


def squared_error(model: nn.Module, batch: Batch) -> Tensor:
    """Mean squared error of the model's output."""
    inputs, targets = batch
    return nn.functional.mse_loss(model(inputs), targets)
