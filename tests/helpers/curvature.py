"""The exact Hessian of small nets, element by element, and nets to take it of."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Batch = tuple[Any, Any]


def exact_hessian(
    model: nn.Module,
    loss: Callable[[Any, Any], Tensor],
    *batches: Batch,
    names: Sequence[str] | None = None,
    train: bool = False,
) -> Tensor:
    """The matrix in float64 by reverse over reverse, of the mean loss over all batches' examples."""
    model = copy.deepcopy(model).double().train(train)
    if isinstance(model, Attention):
        model.fused = False
    chosen = {n: p for n, p in model.named_parameters() if p.requires_grad and (names is None or n in names)}
    examples = sum(len(x) for x, _ in batches)

    def of(flat: Tensor) -> Tensor:
        parts = flat.split([p.numel() for p in chosen.values()])
        given = {name: part.view_as(p) for part, (name, p) in zip(parts, chosen.items(), strict=True)}
        total = torch.zeros((), dtype=torch.float64)
        for x, y in batches:
            inputs = x.double() if x.is_floating_point() else x
            labels = y.double() if y.is_floating_point() else y
            total = total + loss(torch.func.functional_call(model, given, (inputs,)), labels) * len(x)
        return total / examples

    flat = torch.cat([p.detach().reshape(-1) for p in chosen.values()])
    found = torch.autograd.functional.hessian(of, flat)
    assert isinstance(found, Tensor)
    return found


def eigenvalues(matrix: Tensor) -> Tensor:
    """All eigenvalues, the largest first."""
    found: Tensor = torch.linalg.eigvalsh(matrix)
    return found.flip(0)


def classification(
    shape: tuple[int, ...], classes: int = 3, examples: int = 20, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Inputs and class labels."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(examples, *shape, generator=generator)
    return x, torch.randint(classes, (examples,), generator=generator)


class Attention(nn.Module):
    """Attention by the fused kernel, which on every device has one without second derivatives."""

    def __init__(self, width: int = 8, heads: int = 2) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, 3)
        self.heads = heads
        self.fused = True

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        parts = self.qkv(x).view(n, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        if self.fused:
            mixed = nn.functional.scaled_dot_product_attention(*parts)
        else:
            query, key, value = parts
            mixed = (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).softmax(dim=-1) @ value
        out: Tensor = self.out(mixed.transpose(1, 2).reshape(n, length, width).mean(dim=1))
        return out


class Tied(nn.Module):
    """One matrix used twice, as embeddings that are also the output layer's weight are."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 5)
        self.second = nn.Linear(5, 5)
        self.second.weight = self.first.weight
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))
        return out


class Recurrent(nn.Module):
    """A small LSTM with a head."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 4, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.lstm(x)[0][:, -1])
        return out


def nets() -> dict[str, tuple[nn.Module, Batch]]:
    """Small nets of different kinds, each with a batch of class labels."""
    torch.manual_seed(0)
    return {
        "tanh": (
            nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3)),
            classification((6,)),
        ),
        "relu": (
            nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 3)),
            classification((6,)),
        ),
        "convolution": (
            nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.GELU(), nn.Flatten(), nn.Linear(48, 3)),
            classification((1, 6, 6)),
        ),
        "attention": (Attention(), classification((4, 8))),
        "lstm": (Recurrent(), classification((5, 3))),
        "tied": (Tied(), classification((5,))),
        "linear": (nn.Linear(4, 3), classification((4,))),
    }
