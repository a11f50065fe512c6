"""Parameters, gradients and updates against a loop written by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop

import streamlens as sl
from tests.helpers.by_hand import (
    HandStep,
    norms,
    of_role,
    regression,
    squared_error,
    train_by_hand,
)
from tests.helpers.recording import assert_steps_equal, observed, record

MakeOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]

OPTIMIZERS: dict[str, MakeOptimizer] = {
    "sgd": partial(SGD, lr=0.1),
    "sgd-for-loop": partial(SGD, lr=0.1, foreach=False),
    "momentum": partial(SGD, lr=0.1, momentum=0.9, foreach=True),
    "nesterov": partial(SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "sgd-fused": partial(SGD, lr=0.1, momentum=0.9, fused=True),
    "adam": partial(Adam, lr=0.01),
    "adam-for-loop": partial(Adam, lr=0.01, foreach=False, weight_decay=0.1),
    "adam-fused": partial(Adam, lr=0.01, fused=True),
    "adamw": partial(AdamW, lr=0.01, weight_decay=0.1),
    "adamw-foreach": partial(AdamW, lr=0.01, foreach=True, amsgrad=True),
    "adagrad-fused": partial(Adagrad, lr=0.01, fused=True),
    "rmsprop": partial(RMSprop, lr=0.01),
}


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))


def wide() -> nn.Module:
    """Layers too large to be handled in one piece."""
    return nn.Sequential(nn.Linear(300, 300), nn.Tanh(), nn.Linear(300, 3))


def convnet() -> nn.Module:
    features = nn.Sequential(nn.Conv2d(1, 3, 3, bias=False), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten())
    return nn.Sequential(features, nn.Linear(3 * 2 * 2, 3))


def embedder() -> nn.Module:
    return nn.Sequential(nn.Embedding(7, 4), nn.Flatten(), nn.LayerNorm(8), nn.Linear(8, 3))


def tokens(count: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randint(0, 7, (4, 2), generator=generator), torch.randn(4, 3, generator=generator))
        for _ in range(count)
    ]


MODELS: dict[str, tuple[Callable[[], nn.Module], list[tuple[Tensor, Tensor]]]] = {
    "perceptron": (perceptron, regression(1, 3, (6, 5))),
    "wide": (wide, regression(1, 3, (2, 300))),
    "convnet": (convnet, regression(1, 3, (6, 1, 4, 4))),
    "embedder": (embedder, tokens(3)),
}


def expected(steps: list[HandStep]) -> dict[str, list[dict[str, Tensor]]]:
    """What each topic must give, a mapping a step."""
    full = {
        "parameters": [s.after for s in steps],
        "parameter_gradients": [s.gradients for s in steps],
        "parameter_updates": [s.updates() for s in steps],
    }
    by_module = {
        "weights": "parameters",
        "weight_gradients": "parameter_gradients",
        "weight_updates": "parameter_updates",
    }
    roles = {t: [of_role(v, "weight") for v in full[whole]] for t, whole in by_module.items()}
    biases = {
        t.replace("weights", "biases").replace("weight", "bias"): [of_role(v, "bias") for v in full[whole]]
        for t, whole in by_module.items()
    }
    return {**full, **roles, **biases}


TOPICS = tuple(expected([]))


CASES = [("perceptron", optimizer) for optimizer in OPTIMIZERS] + [
    (model, optimizer) for model in MODELS for optimizer in ("nesterov", "adam", "adam-fused")
]


def problem(name: str) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    make, batches = MODELS[name]
    torch.manual_seed(0)
    return make(), batches


@pytest.mark.parametrize(("name", "optimizer"), CASES)
def test_raw_topics_are_bit_for_bit_those_of_a_loop_by_hand(name: str, optimizer: str) -> None:
    model, batches = problem(name)
    twin = copy.deepcopy(model)
    truth = expected(train_by_hand(twin, OPTIMIZERS[optimizer](twin.parameters()), batches, squared_error))
    with observed(model) as lens:
        frames = {name: record(lens, sl.topic(name)) for name in TOPICS}
        train_by_hand(model, OPTIMIZERS[optimizer](model.parameters()), batches, squared_error)
    for name in TOPICS:
        assert_steps_equal(frames[name], truth[name])


@pytest.mark.parametrize(("name", "optimizer"), CASES)
def test_norms_alone_are_those_of_a_loop_by_hand(name: str, optimizer: str) -> None:
    model, batches = problem(name)
    twin = copy.deepcopy(model)
    truth = expected(train_by_hand(twin, OPTIMIZERS[optimizer](twin.parameters()), batches, squared_error))
    with observed(model) as lens:
        frames = {name: record(lens, sl.norm(name)) for name in TOPICS}
        train_by_hand(model, OPTIMIZERS[optimizer](model.parameters()), batches, squared_error)
    for name in TOPICS:
        assert {f.topic for f in frames[name]} == {f"{name}.norm2"}
        assert_steps_equal(frames[name], [norms(v) for v in truth[name]], rtol=2e-5)


def test_every_reduction_of_updates_is_right_while_weights_are_reduced_otherwise() -> None:
    torch.manual_seed(0)
    model = perceptron()
    twin = copy.deepcopy(model)
    batches = regression(1, 4, (6, 5))
    truth = expected(train_by_hand(twin, Adam(twin.parameters(), lr=0.01), batches, squared_error))
    reductions: dict[str, Callable[[Tensor], Tensor]] = {
        "mean": torch.mean,
        "var": torch.var,
        "maximum": torch.max,
    }
    with observed(model) as lens:
        frames: dict[tuple[str, str], list[sl.Frame]] = {}
        for name in ("weight_updates", "weights", "weight_gradients"):
            frames[name, "mean"] = record(lens, sl.mean(name))
            frames[name, "var"] = record(lens, sl.var(name))
            frames[name, "maximum"] = record(lens, sl.maximum(name))
        train_by_hand(model, Adam(model.parameters(), lr=0.01), batches, squared_error)
    for (name, reduction), got in frames.items():
        wanted = [
            {layer: reductions[reduction](value.double()) for layer, value in step.items()}
            for step in truth[name]
        ]
        assert_steps_equal(got, wanted, rtol=1e-5)


def test_raw_and_reduced_subscribers_of_one_topic_agree() -> None:
    torch.manual_seed(0)
    model = perceptron()
    with observed(model) as lens:
        raw = {name: record(lens, sl.topic(name)) for name in TOPICS}
        reduced = {name: record(lens, sl.norm(name)) for name in TOPICS}
        train_by_hand(model, SGD(model.parameters(), lr=0.1), regression(1, 3, (6, 5)), squared_error)
    for name in TOPICS:
        assert len(raw[name]) == 3
        assert_steps_equal(reduced[name], [norms(dict(f.items())) for f in raw[name]], rtol=2e-5)


def test_parameter_frames_are_of_kind_step_and_carry_epoch_and_micro_step() -> None:
    model = perceptron()
    with observed(model) as lens:
        frames = [record(lens, sl.topic(name)) for name in TOPICS]
        optimizer = SGD(model.parameters(), lr=0.1)
        batches = regression(1, 4, (6, 5))
        for _ in lens.epochs(2):
            train_by_hand(model, optimizer, batches, squared_error, accumulate=2)
    for got in frames:
        assert {f.kind for f in got} == {sl.Kind.STEP}
        assert [(f.epoch, f.step, f.micro_step) for f in got] == [(0, 0, 1), (0, 1, 1), (1, 2, 1), (1, 3, 1)]


def test_updates_include_weight_decay_of_an_exact_zero_gradient() -> None:
    model = nn.Sequential(nn.Linear(2, 1, bias=False))
    before = model.get_parameter("0.weight").detach().clone()
    optimizer = SGD(model.parameters(), lr=0.5, weight_decay=0.1)
    with observed(model) as lens:
        updates = record(lens, sl.topic("weight_updates"))
        gradients = record(lens, sl.topic("weight_gradients"))
        model(torch.zeros(1, 2)).sum().backward()
        optimizer.step()
    assert gradients[0]["0"].abs().max() == 0
    torch.testing.assert_close(updates[0]["0"], -0.05 * before)


def test_all_parameter_frames_are_there_when_the_update_returns() -> None:
    model = perceptron()
    optimizer = SGD(model.parameters(), lr=0.1)
    with observed(model) as lens:
        raw = [record(lens, sl.topic(name)) for name in TOPICS]
        reduced = [record(lens, sl.norm(name)) for name in TOPICS]
        squared_error(model, regression(1, 1, (6, 5))[0]).backward()
        assert not any(raw + reduced)
        optimizer.step()
        assert [len(f) for f in raw + reduced] == [1] * len(raw + reduced)


def test_a_frozen_layer_has_weights_but_neither_gradients_nor_updates() -> None:
    torch.manual_seed(0)
    model = perceptron()
    model.get_submodule("0").requires_grad_(False)
    optimizer = Adam((p for p in model.parameters() if p.requires_grad), lr=0.1)
    with observed(model) as lens:
        weights, gradients = record(lens, sl.topic("weights")), record(lens, sl.topic("weight_gradients"))
        updates = record(lens, sl.norm("weight_updates"))
        train_by_hand(model, optimizer, regression(1, 2, (6, 5)), squared_error)
    assert [f.layers for f in weights] == [("0", "2")] * 2
    assert torch.equal(weights[1]["0"], model.get_parameter("0.weight"))
    assert [f.layers for f in gradients] == [("2",)] * 2
    assert [f.layers for f in updates] == [("2",)] * 2


def test_a_frozen_layer_in_an_optimizer_has_no_gradient_and_a_zero_update() -> None:
    model = perceptron()
    model.get_submodule("0").requires_grad_(False)
    optimizer = Adam(model.parameters(), lr=0.1, weight_decay=0.1)
    with observed(model) as lens:
        gradients, updates = (
            record(lens, sl.topic("weight_gradients")),
            record(lens, sl.norm("weight_updates")),
        )
        train_by_hand(model, optimizer, regression(1, 2, (6, 5)), squared_error)
    assert [f.layers for f in gradients] == [("2",)] * 2
    assert [f["0"].item() for f in updates if "0" in f] in ([], [0.0, 0.0])
    assert all(f["2"] > 0 for f in updates)


def test_a_module_that_is_never_called_has_weights_and_no_gradients() -> None:
    model = nn.ModuleDict({"used": nn.Linear(5, 3), "unused": nn.Linear(2, 2)})
    optimizer = SGD(model.parameters(), lr=0.1)

    def loss_of(m: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        assert isinstance(m, nn.ModuleDict)
        return squared_error(m["used"], batch)

    with observed(model) as lens:
        weights, gradients = record(lens, sl.topic("weights")), record(lens, sl.topic("weight_gradients"))
        train_by_hand(model, optimizer, regression(1, 2, (6, 5)), loss_of)
    assert [f.layers for f in weights] == [("used", "unused")] * 2
    assert [f.layers for f in gradients] == [("used",)] * 2


def test_a_layer_without_bias_is_absent_from_bias_topics() -> None:
    model = nn.Sequential(nn.Linear(5, 4, bias=False), nn.BatchNorm1d(4, affine=False), nn.Linear(4, 3))
    optimizer = SGD(model.parameters(), lr=0.1)
    with observed(model) as lens:
        frames = {
            n: record(lens, sl.topic(n)) for n in ("biases", "bias_gradients", "bias_updates", "weights")
        }
        train_by_hand(model, optimizer, regression(1, 2, (6, 5)), squared_error)
    for name in ("biases", "bias_gradients", "bias_updates"):
        assert [f.layers for f in frames[name]] == [("2",)] * 2
    assert [f.layers for f in frames["weights"]] == [("0", "2")] * 2


def test_a_model_without_any_bias_gives_no_bias_frame_and_no_error() -> None:
    model = nn.Sequential(nn.Linear(5, 3, bias=False))
    optimizer = SGD(model.parameters(), lr=0.1)
    with observed(model) as lens:
        biases, weights = record(lens, sl.topic("biases")), record(lens, sl.topic("weights"))
        train_by_hand(model, optimizer, regression(1, 2, (6, 5)), squared_error)
    assert biases == []
    assert len(weights) == 2


class Tied(nn.Module):
    """A decoder that shares the encoder's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(5, 5, bias=False)
        self.decoder = nn.Linear(5, 5)
        self.decoder.weight = self.encoder.weight
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.decoder(torch.tanh(self.encoder(x))))
        return out


@pytest.mark.parametrize("name", ["weights", "weight_gradients", "weight_updates"])
def test_tied_weights_come_once_under_their_first_name(name: str) -> None:
    torch.manual_seed(0)
    model = Tied()
    twin = copy.deepcopy(model)
    batches = regression(1, 3, (6, 5))
    truth = expected(train_by_hand(twin, SGD(twin.parameters(), lr=0.1), batches, squared_error))
    with observed(model) as lens:
        raw = record(lens, sl.topic(name))
        reduced = record(lens, sl.norm(name))
        train_by_hand(model, SGD(model.parameters(), lr=0.1), batches, squared_error)
    assert [f.layers for f in raw] == [("encoder", "head")] * 3
    assert_steps_equal(raw, truth[name])
    assert_steps_equal(reduced, [norms(v) for v in truth[name]], rtol=2e-5)


def test_raw_gradients_are_what_the_optimizer_consumes_where_nothing_changes_them() -> None:
    torch.manual_seed(0)
    model = perceptron()
    optimizer = SGD(model.parameters(), lr=0.1)
    with observed(model) as lens:
        raw, consumed = record(lens, sl.topic("raw_gradients")), record(lens, sl.topic("parameter_gradients"))
        train_by_hand(model, optimizer, regression(1, 2, (6, 5)), squared_error)
    assert {f.kind for f in raw} == {sl.Kind.MICRO_STEP}
    assert_steps_equal(raw, [dict(f.items()) for f in consumed])
