"""Initialisations by name, held to the variances that their papers give."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from streamlens.lab import INITIALISATIONS, initialise

FAN_IN, FAN_OUT = 20 * 9, 30 * 9  # of a 3x3 convolution from 20 to 30 channels


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(20, 30, 3),
        nn.BatchNorm2d(30),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(30, 40),
        nn.Embedding(5, 6),
    )


@pytest.mark.parametrize(
    ("name", "variance", "bounded"),
    [
        ("kaiming_normal", 2 / FAN_IN, False),
        ("kaiming_uniform", 2 / FAN_IN, True),
        ("lecun_normal", 1 / FAN_IN, False),
        ("xavier_normal", 2 / (FAN_IN + FAN_OUT), False),
        ("xavier_uniform", 2 / (FAN_IN + FAN_OUT), True),
    ],
)
def test_weights_have_the_published_variance(name: str, variance: float, bounded: bool) -> None:
    weight = next(initialise(network(), name).parameters()).detach()
    assert weight.mean().item() == pytest.approx(0, abs=4 * (variance / weight.numel()) ** 0.5)
    assert weight.var().item() == pytest.approx(variance, rel=0.1)
    # A uniform distribution ends at the square root of three variances; a normal one has a tail.
    assert bool(weight.abs().max() <= (3 * variance) ** 0.5 + 1e-6) is bounded


def test_orthogonal_weights_have_orthonormal_rows() -> None:
    weight = next(initialise(network(), "orthogonal").parameters()).detach().flatten(1)
    torch.testing.assert_close(weight @ weight.T, torch.eye(30), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", [name for name in INITIALISATIONS if name != "default"])
def test_all_linear_and_convolutional_layers_are_drawn_biases_are_0_and_the_rest_stays(name: str) -> None:
    before, after = network(), initialise(network(), name)
    for (key, old), new in zip(before.state_dict().items(), after.state_dict().values(), strict=True):
        if key in ("0.weight", "4.weight"):
            assert not torch.equal(old, new), key
        elif key in ("0.bias", "4.bias"):
            assert not new.any(), key
        else:
            assert torch.equal(old, new), key


def test_default_leaves_the_model_and_the_generator_as_they_are() -> None:
    before, model = network(), network()
    state = torch.get_rng_state()
    assert initialise(model, "default") is model
    assert torch.equal(torch.get_rng_state(), state)
    assert all(map(torch.equal, model.parameters(), before.parameters()))


def test_layers_without_a_bias_are_drawn_too() -> None:
    layer = nn.Linear(4, 3, bias=False)
    before = layer.weight.detach().clone()
    assert not torch.equal(initialise(layer, "Orthogonal").weight, before)


def test_an_unknown_initialisation_names_the_nearest_and_all_there_are() -> None:
    with pytest.raises(ValueError, match=r"unknown initialisation 'kaiming': did you mean 'kaiming_.*xavier"):
        initialise(network(), "kaiming")
