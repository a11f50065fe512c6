"""What one process computes of the global batch, by hand: the oracle of everything here."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Batches", "Model", "batches", "numbers", "train"]

Batches = Sequence[Sequence[tuple[Tensor, Tensor]]]
"""By step, then by rank."""


class Model(nn.Module):
    """Odd sizes, so that no shard is as large as another; biases with one element a rank or less."""

    def __init__(self, hidden: int = 7) -> None:
        super().__init__()
        self.first = nn.Linear(5, hidden)
        self.act = nn.Tanh()
        self.second = nn.Linear(hidden, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(self.act(self.first(x)))
        return out


def batches(steps: int, sizes: Sequence[int], seed: int = 0) -> Batches:
    """Inputs and labels by step and rank."""
    draw = torch.Generator().manual_seed(seed)
    return [
        [
            (torch.randn(size, 5, generator=draw) + 1.0, torch.randint(3, (size,), generator=draw))
            for size in sizes
        ]
        for _ in range(steps)
    ]


def numbers(tensor: Tensor) -> dict[str, float]:
    """Statistics by NumPy, in double precision."""
    a = tensor.detach().double().flatten().numpy()
    off = a - a.mean()
    variance = (off**2).mean()
    return {
        "norm2": float((a**2).sum() ** 0.5),
        "norm1": float(abs(a).sum()),
        "mean": float(a.mean()),
        "std": float(a.std(ddof=1)) if a.size > 1 else float("nan"),
        "minimum": float(a.min()),
        "maximum": float(a.max()),
        "absmax": float(abs(a).max()),
        "kurtosis": float((off**4).mean() / variance**2 - 3) if variance else float("nan"),
    }


def train(
    model: nn.Module,
    data: Batches,
    optimizer_of: Callable[[Sequence[nn.Parameter]], torch.optim.Optimizer],
    *,
    loss_of: Callable[[Tensor, Tensor], Tensor] = nn.functional.cross_entropy,
) -> list[dict[str, Any]]:
    """Train on what DDP and FSDP train on, the mean of the ranks' mean gradients, and record each step."""
    model = copy.deepcopy(model)
    optimizer = optimizer_of(list(model.parameters()))
    steps: list[dict[str, Any]] = []
    for ranks in data:
        outputs: dict[str, Tensor] = {}
        gradients: dict[str, Tensor] = {}
        handles = [
            module.register_forward_hook(functools.partial(_keep, name, outputs, gradients))
            for name, module in model.named_modules()
            if name
        ]
        x = torch.cat([x for x, _ in ranks])
        y = torch.cat([y for _, y in ranks])
        loss = loss_of(model(x), y)
        loss.backward()
        for handle in handles:
            handle.remove()
        optimizer.zero_grad()
        for x_of_rank, y_of_rank in ranks:
            (loss_of(model(x_of_rank), y_of_rank) / len(ranks)).backward()
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        record = {
            "loss": loss.item(),
            "activations": outputs,
            "layer_gradients": gradients,
            "input_data": {"": x},
            "parameter_gradients": {
                n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
            },
        }
        optimizer.step()
        record["parameters"] = {n: p.detach().clone() for n, p in model.named_parameters()}
        record["parameter_updates"] = {n: p.detach() - before[n] for n, p in model.named_parameters()}
        record["optimizer_state.exp_avg"] = {
            n: optimizer.state[p]["exp_avg"].clone()
            for n, p in model.named_parameters()
            if "exp_avg" in optimizer.state[p]
        }
        steps.append(record)
    return steps


def _keep(
    name: str,
    outputs: dict[str, Tensor],
    gradients: dict[str, Tensor],
    module: nn.Module,
    inputs: Any,
    output: Tensor,
) -> None:
    """Forward hook: the module's output, and its gradient once that is there."""
    outputs[name] = output.detach().clone()
    output.register_hook(lambda gradient: gradients.update({name: gradient.clone()}))
