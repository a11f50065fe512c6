"""Small training runs for the alert rules: ordinary ones, and ones that are broken on purpose."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler

import streamlens as sl

__all__ = [
    "BROKEN",
    "HEALTHY",
    "MODELS",
    "OPTIMIZERS",
    "Broken",
    "Scenario",
    "adam",
    "alerts_of",
    "mlp",
    "sgd",
]

Make = Callable[[], nn.Module]
MakeOptimizer = Callable[[nn.Module], Optimizer]

BATCH: Final = 64


@functools.cache
def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Handwritten digits of 8x8 pixels from scikit-learn: 1,437 to train on, 360 to validate with."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).div(16).sub(0.3).div(0.37)
    y = torch.tensor(labels)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    return x[:1437], y[:1437], x[1437:], y[1437:]


# -- models ------------------------------------------------------------------------------------


def mlp(depth: int = 3, width: int = 64, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """A multilayer perceptron by default initialisation."""
    layers: list[nn.Module] = []
    for i in range(depth - 1):
        layers += [nn.Linear(64 if i == 0 else width, width), activation()]
    return nn.Sequential(*layers, nn.Linear(width if depth > 1 else 64, 10))


def convnet(*, norm: bool = False) -> nn.Sequential:
    """Two convolutions, with batch normalisation or without, and a linear layer."""
    layers: list[nn.Module] = [nn.Unflatten(1, (1, 8, 8))]
    for inputs, outputs in ((1, 8), (8, 16)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1)]
        layers += [nn.BatchNorm2d(outputs)] if norm else []
        layers += [nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64, 10))


class Transformer(nn.Module):
    """The eight rows of a digit as tokens, through encoder layers of PyTorch."""

    def __init__(self, *, norm_first: bool = True) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 32)
        self.position = nn.Parameter(torch.randn(8, 32) * 0.02)
        layer = nn.TransformerEncoderLayer(32, 4, 64, 0.1, batch_first=True, norm_first=norm_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of a batch of digits."""
        tokens = self.embed(x.view(-1, 8, 8)) + self.position
        out: Tensor = self.head(self.encoder(tokens).mean(1))
        return out


class Recurrent(nn.Module):
    """The rows of a digit one after the other, through an LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 32, batch_first=True)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of a batch of digits."""
        out: Tensor = self.head(self.lstm(x.view(-1, 8, 8))[0][:, -1])
        return out


MODELS: Final[Mapping[str, Make]] = {
    "MLP": mlp,
    "deep MLP": lambda: mlp(6),
    "tanh MLP": lambda: mlp(activation=nn.Tanh),
    "convnet": convnet,
    "convnet, batch norm": lambda: convnet(norm=True),
    "transformer": Transformer,
    "LSTM": Recurrent,
}


def sgd(rate: float, momentum: float = 0.9, decay: float = 0.0) -> MakeOptimizer:
    """SGD with momentum."""
    return lambda model: torch.optim.SGD(model.parameters(), rate, momentum=momentum, weight_decay=decay)


def adam(rate: float) -> MakeOptimizer:
    """Adam with its default betas."""
    return lambda model: torch.optim.Adam(model.parameters(), rate)


OPTIMIZERS: Final[Mapping[str, MakeOptimizer]] = {
    "SGD 0.01": sgd(0.01),
    "SGD 0.05, weight decay": sgd(0.05, decay=5e-4),
    "Adam 0.001": adam(1e-3),
    "Adam 0.003": adam(3e-3),
}


# -- runs --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scenario:
    """A training run.

    Attributes:
        model: Makes the model.
        optimizer: Makes its optimizer.
        steps: How many updates.
        cosine: Whether the rate falls to zero along a cosine.
        examples: How many of the training examples are used.
        validate: Steps between two evaluations; 0 for none.
        labels: What becomes of the labels.
        before: Called with the model before training.
        each: Called with the step, the model, the optimizer and the batch before each step.
    """

    model: Make = mlp
    optimizer: MakeOptimizer = field(default_factory=lambda: sgd(0.01))
    steps: int = 600
    cosine: bool = False
    examples: int = 1437
    validate: int = 25
    labels: Callable[[Tensor], Tensor] = lambda y: y
    before: Callable[[nn.Module], object] = lambda _: None
    each: Callable[[int, nn.Module, Optimizer, Tensor], object] = lambda *_: None


def alerts_of(scenario: Scenario, seed: int, rules: Callable[[], sl.Operator] = sl.health) -> list[sl.Frame]:
    """The alerts of a run.

    Args:
        scenario: The run.
        seed: Of the model and of the order of examples.
        rules: Makes what is applied to the lens.
    """
    torch.manual_seed(seed)
    x, y, x_validation, y_validation = digits()
    x, y = x[: scenario.examples], scenario.labels(y[: scenario.examples])
    model = scenario.model()
    scenario.before(model)
    optimizer = scenario.optimizer(model)
    schedule: LRScheduler | None = CosineAnnealingLR(optimizer, scenario.steps) if scenario.cosine else None
    criterion = nn.CrossEntropyLoss()
    alerts: list[sl.Frame] = []
    with sl.observe(model, loss=criterion, emits=["validation_loss"], on_error="raise") as lens:
        lens.pipe(rules()).subscribe(alerts.append)
        for step in range(scenario.steps):
            chosen = torch.randint(0, len(x), (BATCH,))
            batch = x[chosen]
            scenario.each(step, model, optimizer, batch)
            optimizer.zero_grad()
            criterion(model(batch), y[chosen]).backward()
            optimizer.step()
            if schedule is not None:
                schedule.step()
            if scenario.validate and step % scenario.validate == 0:
                model.eval()
                with torch.no_grad():
                    loss = functional.cross_entropy(model(x_validation), y_validation)
                model.train()
                lens.emit("validation_loss", loss)
    return alerts


HEALTHY: Final[Mapping[str, Scenario]] = {
    **{
        f"{model}, {optimizer}": Scenario(make, make_optimizer)
        for model, make in MODELS.items()
        for optimizer, make_optimizer in OPTIMIZERS.items()
    },
    "MLP, Adam 0.001, cosine": Scenario(mlp, adam(1e-3), steps=1500, cosine=True),
    "convnet, SGD 0.05, cosine": Scenario(convnet, sgd(0.05), steps=1500, cosine=True),
    "MLP, Adam 0.003, long": Scenario(mlp, adam(3e-3), steps=4000),
}
"""Ordinary runs: default initialisation, usual optimizers and rates."""


# -- broken on purpose -------------------------------------------------------------------------


@dataclass(frozen=True)
class Broken:
    """A run that is broken in the way that a rule is for.

    Attributes:
        how: How, in words.
        scenario: The run.
        since: The step at which it breaks.
        within: Steps within which the rule has to say so.
        misses: In how many of ten seeds it may fail to, for a reason that is known.
    """

    how: str
    scenario: Scenario
    since: int = 0
    within: int = 50
    misses: int = 0

    @property
    def until(self) -> int:
        """The last step at which the alert is in time."""
        return self.since + self.within


def scaled_weights(factor: float) -> Callable[[nn.Module], None]:
    """Multiplies the initial weights (not the biases)."""

    def before(model: nn.Module) -> None:
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.mul_(factor)

    return before


def _biases_at(value: float) -> Callable[[nn.Module], None]:
    def before(model: nn.Module) -> None:
        for module in list(model.modules())[:-1]:
            if isinstance(module, nn.Linear):
                nn.init.constant_(module.bias, value)

    return before


def _inputs_times(
    factor: float, first: int, last: int
) -> Callable[[int, nn.Module, Optimizer, Tensor], None]:
    def each(step: int, _: nn.Module, __: Optimizer, batch: Tensor) -> None:
        if first <= step < last:
            batch.mul_(factor)

    return each


def _rate_times(factor: float, at: int) -> Callable[[int, nn.Module, Optimizer, Tensor], None]:
    def each(step: int, _: nn.Module, optimizer: Optimizer, __: Tensor) -> None:
        if step == at:
            for group in optimizer.param_groups:
                group["lr"] *= factor

    return each


def _gradient_cut(step: int, model: nn.Module, *_: object) -> None:
    weight = next(model.parameters())
    if step == 300:
        weight.register_hook(lambda gradient: gradient * 1e-5)


def _first_rate_times(factor: float) -> MakeOptimizer:
    def make(model: nn.Module) -> Optimizer:
        first, *others = model.parameters()
        groups: list[dict[str, Any]] = [{"params": [first], "lr": 0.01 * factor}, {"params": others}]
        return torch.optim.SGD(groups, lr=0.01, momentum=0.9)

    return make


def _without_first(model: nn.Module) -> Optimizer:
    return torch.optim.SGD(list(model.parameters())[2:], lr=0.01, momentum=0.9)


def _random_labels(y: Tensor) -> Tensor:
    return y[torch.randperm(len(y))]


def _nan_at(at: int) -> Callable[[int, nn.Module, Optimizer, Tensor], None]:
    def each(step: int, _: nn.Module, __: Optimizer, batch: Tensor) -> None:
        if step == at:
            batch[0, 0] = torch.nan

    return each


class _Logarithm(nn.Module):
    """The logarithm of what may be zero."""

    def forward(self, x: Tensor) -> Tensor:
        """Minus infinity at zero."""
        return x.log()


def _with_logarithm() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), _Logarithm(), nn.Linear(64, 10))


def _noisy(y: Tensor) -> Tensor:
    wrong = torch.rand(len(y)) < 0.3
    return torch.where(wrong, torch.randint(0, 10, y.shape), y)


def _reversed(model: nn.Module) -> Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, maximize=True)


def _deep(activation: type[nn.Module] = nn.ReLU, depth: int = 10) -> Make:
    return functools.partial(mlp, depth, 64, activation)


_SHORT: Final = functools.partial(Scenario, steps=150, validate=0)
_LONGER: Final = functools.partial(Scenario, steps=450, validate=0)

BROKEN: Final[Mapping[str, Sequence[Broken]]] = {
    "nonfinite_values": (
        Broken("a NaN in an input at step 100", _SHORT(each=_nan_at(100)), 100, 1),
        Broken("a layer that takes the logarithm of zeros", _SHORT(_with_logarithm), 0, 1),
        Broken("SGD at a rate of 1,000", _SHORT(optimizer=sgd(1000.0)), 0, 50),
    ),
    "poor_initialisation": (
        Broken("10 layers, weights 10 times as large", _SHORT(_deep(), before=scaled_weights(10.0)), 0, 1),
        Broken("10 layers, weights a tenth as large", _SHORT(_deep(), before=scaled_weights(0.1)), 0, 1),
    ),
    "exploding_gradients": (
        Broken(
            "8 layers, weights 10 times as large", _SHORT(_deep(depth=8), before=scaled_weights(10.0)), 0, 20
        ),
        Broken("inputs times 1,000 from step 200 on", _LONGER(each=_inputs_times(1e3, 200, 999)), 200, 20),
    ),
    "vanishing_gradients": (
        Broken("10 layers of sigmoids", _SHORT(_deep(nn.Sigmoid), adam(1e-3)), 0, 50),
        Broken("10 layers, weights a tenth as large", _SHORT(_deep(), before=scaled_weights(0.1)), 0, 50),
    ),
    "diverging": (
        Broken("gradient ascent", _LONGER(optimizer=_reversed), 0, 200),
        Broken("the rate times 1,000 at step 200", _LONGER(each=_rate_times(1e3, 200)), 200, 50),
    ),
    "loss_spike": (
        # A network may have learned so well that this costs it less than 0.4 of the loss at the start.
        Broken("inputs times 30 at step 200", _LONGER(each=_inputs_times(30.0, 200, 201)), 200, 2, misses=2),
        Broken("the rate times 300 at step 200", _LONGER(each=_rate_times(300.0, 200)), 200, 10),
    ),
    "loss_not_decreasing": (
        Broken("labels shuffled", _LONGER(optimizer=sgd(1e-3), labels=_random_labels), 0, 320),
        Broken("SGD at a rate of 1e-7", _LONGER(optimizer=sgd(1e-7)), 0, 320),
    ),
    "overfitting": (
        Broken(
            "100 examples, 30% of the labels wrong",
            Scenario(mlp, adam(3e-3), 1000, examples=100, labels=_noisy),
            0,
            1000,
        ),
    ),
    "dead_units": (
        Broken("biases at -10", _SHORT(before=_biases_at(-10.0)), 0, 50),
        Broken("SGD at a rate of 2", _SHORT(optimizer=sgd(2.0)), 0, 100),
    ),
    "saturated_units": (
        Broken(
            "tanh, weights 50 times as large",
            _SHORT(lambda: mlp(activation=nn.Tanh), before=scaled_weights(50.0)),
        ),
        Broken(
            "tanh, inputs times 1,000",
            _SHORT(lambda: mlp(activation=nn.Tanh), each=_inputs_times(1e3, 0, 999)),
        ),
    ),
    "ratio_out_of_band": (
        Broken(
            "the first layer's gradient cut to 1e-5 from step 300 on", _LONGER(each=_gradient_cut), 300, 120
        ),
        Broken("the first layer at 1e-7 of the rate", _SHORT(optimizer=_first_rate_times(1e-7)), 0, 50),
    ),
    "unchanged_weights": (
        Broken("the first layer not given to the optimizer", _SHORT(optimizer=_without_first), 0, 50),
        Broken("a rate of 0", _SHORT(optimizer=sgd(0.0)), 0, 50),
    ),
    "learning_rate_too_high": (
        Broken("Adam at a rate of 1", _SHORT(optimizer=adam(1.0)), 0, 50),
        Broken("SGD at a rate of 2", _SHORT(optimizer=sgd(2.0)), 0, 50),
    ),
    "learning_rate_too_low": (
        Broken("SGD at a rate of 1e-7", _SHORT(optimizer=sgd(1e-7)), 0, 100),
        Broken("Adam at a rate of 1e-9", _SHORT(optimizer=adam(1e-9)), 0, 100),
    ),
}
"""For each rule, runs broken the way it is for."""
