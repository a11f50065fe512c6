"""Small training runs whose every outcome can be compared bit by bit."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint

__all__ = ["ARCHITECTURES", "OPTIMIZERS", "Outcome", "Recipe", "make_model", "same", "small_model", "train"]

CLASSES = 3


def small_model(seed: int = 0) -> nn.Sequential:
    """Two linear layers: enough for everything that is not about the model."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, CLASSES))


class _Convolutions(nn.Module):
    """Convolution, batch norm, in-place ReLU and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(inplace=True), nn.Dropout2d(0.3)
        )
        self.head = nn.Linear(3 * 16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.features(x.view(-1, 1, 4, 4)).flatten(1))
        return out


class _Embedded(nn.Module):
    """An embedding, with sparse gradients or dense ones, and layer norm."""

    def __init__(self, *, sparse: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4, sparse=sparse)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        tokens = (x.abs() * 5).long() % 7
        out: Tensor = self.head(self.norm(self.embed(tokens).mean(1)))
        return out


class _Attention(nn.Module):
    """A transformer layer: attention whose output projection is never called, dropout, residuals."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, dim_feedforward=6, dropout=0.2, batch_first=True)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.layer(x.view(-1, 4, 4)).mean(1))
        return out


class _Recurrent(nn.Module):
    """An LSTM, whose output is nested, and a dictionary as the model's output."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 3, batch_first=True)
        self.head = nn.Linear(3, CLASSES)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        _, (hidden, _) = self.lstm(x.view(-1, 4, 4))
        return {"logits": self.head(hidden[-1])}


class _Checkpointed(nn.Module):
    """Blocks with dropout that are computed a second time in the backward pass."""

    def __init__(self, *, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.first = nn.Linear(16, 6)
        self.block = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.4), nn.ReLU(inplace=True))
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        hidden = checkpoint(self.block, self.first(x), use_reentrant=self.reentrant)
        out: Tensor = self.head(hidden)
        return out


class _Reused(nn.Module):
    """One module used three times, tied weights, a part that is never used and one that is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.inp = nn.Linear(16, 5)
        self.act = nn.ReLU(inplace=True)
        self.mix = nn.Linear(5, 5)
        self.tied = nn.Linear(5, 5)
        self.tied.weight = self.mix.weight
        self.unused = nn.Linear(2, 2)
        self.frozen = nn.Linear(5, 5).requires_grad_(False)
        self.head = nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.act(self.inp(x))
        hidden = self.act(self.mix(hidden))
        hidden = self.act(self.frozen(self.tied(hidden)))
        out: Tensor = self.head(hidden)
        return out


ARCHITECTURES: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Sequential(nn.Linear(16, 5), nn.Tanh(), nn.Linear(5, CLASSES)),
    "convolutions": _Convolutions,
    "embedding": lambda: _Embedded(sparse=False),
    "sparse embedding": lambda: _Embedded(sparse=True),
    "attention": _Attention,
    "recurrent": _Recurrent,
    "checkpointed": lambda: _Checkpointed(reentrant=False),
    "checkpointed, reentrant": lambda: _Checkpointed(reentrant=True),
    "reused": _Reused,
}

OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], Optimizer]] = {
    "sgd": lambda ps: torch.optim.SGD(ps, lr=0.1),
    "momentum": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, weight_decay=0.01),
    "nesterov": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, nesterov=True),
    "adam": lambda ps: torch.optim.Adam(ps, lr=0.01),
    "adam, fused": lambda ps: torch.optim.Adam(ps, lr=0.01, fused=True),
    "adamw": lambda ps: torch.optim.AdamW(ps, lr=0.01, amsgrad=True),
    "lbfgs": lambda ps: torch.optim.LBFGS(ps, lr=0.1, max_iter=3, history_size=2),
}


@dataclass(frozen=True)
class Recipe:
    """What is trained, and how."""

    architecture: str = "linear"
    optimizer: str = "sgd"
    steps: int = 3
    accumulation: int = 1
    clip: float | None = None
    autocast: bool = False
    scaler: bool = False
    closure: bool = False
    evaluate: bool = False
    seed: int = 0

    @property
    def by_closure(self) -> bool:
        """Whether the optimizer is given a closure; LBFGS needs one."""
        return self.closure or self.optimizer == "lbfgs"


@dataclass
class Outcome:
    """Everything that a run leaves behind."""

    parameters: dict[str, Tensor]
    buffers: dict[str, Tensor]
    gradients: dict[str, Tensor | None]
    optimizer: dict[str, Any]
    losses: list[Tensor]
    outputs: list[Tensor]
    random: tuple[Any, ...]
    modes: dict[str, bool]
    requires_grad: dict[str, bool]
    grad_enabled: bool
    scale: dict[str, Any] = field(default_factory=dict)


def make_model(recipe: Recipe) -> nn.Module:
    """The model of a recipe, with all generators seeded."""
    random.seed(recipe.seed)
    np.random.seed(recipe.seed)  # noqa: NPY002 - the global generator is what must not be drawn from
    torch.manual_seed(recipe.seed)
    return ARCHITECTURES[recipe.architecture]()


def _logits(output: Tensor | dict[str, Tensor]) -> Tensor:
    return output["logits"] if isinstance(output, dict) else output


def train(
    recipe: Recipe,
    observing: Callable[[nn.Module, nn.Module], contextlib.AbstractContextManager[Any]] | None = None,
) -> Outcome:
    """Train as a user would.

    Args:
        recipe: What and how.
        observing: Given the model and the loss module, what is open while training.
    """
    model = make_model(recipe)
    criterion = nn.CrossEntropyLoss()
    optimizer = OPTIMIZERS[recipe.optimizer](list(model.parameters()))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=2, enabled=recipe.scaler)
    losses: list[Tensor] = []
    outputs: list[Tensor] = []
    data = torch.Generator().manual_seed(recipe.seed + 1)

    def backward() -> Tensor:
        x = torch.randn(5, 16, generator=data)
        y = torch.randint(0, CLASSES, (5,), generator=data)
        with torch.autocast("cpu", torch.bfloat16, enabled=recipe.autocast):
            logits = _logits(model(x))
            loss: Tensor = criterion(logits, y) / recipe.accumulation
        outputs.append(logits.detach().clone())
        losses.append(loss.detach().clone())
        scaler.scale(loss).backward()
        return loss

    def closure() -> Tensor:
        optimizer.zero_grad()
        return backward()

    def step() -> None:
        if recipe.by_closure:
            optimizer.step(closure)  # type: ignore[arg-type] # a loss is a tensor in practice
            return
        optimizer.zero_grad()
        for _ in range(recipe.accumulation):
            backward()
        if recipe.clip is not None:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        scaler.step(optimizer)
        scaler.update()

    with observing(model, criterion) if observing is not None else contextlib.nullcontext():
        for _ in range(recipe.steps):
            step()
            if recipe.evaluate:
                model.eval()
                with torch.no_grad():
                    outputs.append(_logits(model(torch.randn(2, 16, generator=data))))
                model.train()
        grad_enabled = torch.is_grad_enabled()
    return Outcome(
        parameters={n: p.detach().clone() for n, p in model.named_parameters()},
        buffers={n: b.detach().clone() for n, b in model.named_buffers()},
        gradients={n: p.grad for n, p in model.named_parameters()},
        optimizer=optimizer.state_dict(),
        losses=losses,
        outputs=outputs,
        random=(torch.get_rng_state(), np.random.get_state(), random.getstate()),  # noqa: NPY002
        modes={n: m.training for n, m in model.named_modules()},
        requires_grad={n: p.requires_grad for n, p in model.named_parameters()},
        grad_enabled=grad_enabled,
        scale=scaler.state_dict(),
    )


def same(a: Any, b: Any) -> bool:
    """Whether two outcomes, or any nested parts of them, are equal bit by bit, NaN included."""
    if isinstance(a, Outcome):
        return same(vars(a), vars(b))
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and a.layout == b.layout and _bits(a) == _bits(b)
    if isinstance(a, np.ndarray):
        return bool(np.array_equal(a, b))
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(v, b[k]) for k, v in a.items())
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def _bits(tensor: Tensor) -> tuple[object, ...]:
    tensor = tensor.detach()
    if tensor.layout is torch.sparse_coo:
        return (tensor.is_coalesced(), _bits(tensor._indices()), _bits(tensor._values()))
    return (tuple(tensor.shape), tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())


def steps_of(
    model: nn.Module, optimizer: Optimizer, count: int, *, seed: int = 0, inputs: int = 4
) -> Iterator[Tensor]:
    """Plain training steps, one a value taken; gives the losses."""
    data = torch.Generator().manual_seed(seed)
    for _ in range(count):
        optimizer.zero_grad()
        x = torch.randn(6, inputs, generator=data)
        loss = nn.functional.cross_entropy(model(x), torch.randint(0, CLASSES, (6,), generator=data))
        loss.backward()
        optimizer.step()
        yield loss.detach()
