"""The networks of the lab."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from streamlens.lab.data import load_dataset
from streamlens.lab.models import MODELS, AlexNetMini, FullyConnected, make_model

# Sizes that train in a blink, for each model there is.
NARROW: dict[str, dict[str, int]] = {
    "AlexNetMini": {},
    "ConvNet": {"width": 8, "hidden": 32},
    "DenseNet": {"depth": 10, "growth": 4},
    "FullyConnected": {},
    "ResNet18": {"width": 4},
    "TransformerLM": {"width": 16},
    "VGG": {"width": 4},
}


def alexnet_by_hand(parameters: dict[str, Tensor], images: Tensor) -> Tensor:
    """The same network, written with functions only."""
    for block in ("features.0", "features.3"):
        images = functional.conv2d(
            images, parameters[f"{block}.weight"], parameters[f"{block}.bias"], padding=1
        )
        images = functional.max_pool2d(images.clamp(min=0), 2)
    flat = images.reshape(len(images), -1)
    return flat @ parameters["classifier.2.weight"].T + parameters["classifier.2.bias"]


def test_alexnet_mini_classifies_8_by_8_by_8_features_through_one_linear_layer() -> None:
    shapes = {name: tuple(p.shape) for name, p in AlexNetMini().named_parameters()}
    assert shapes == {
        "features.0.weight": (4, 3, 3, 3),
        "features.0.bias": (4,),
        "features.3.weight": (8, 4, 3, 3),
        "features.3.bias": (8,),
        "classifier.2.weight": (10, 8 * 8 * 8),
        "classifier.2.bias": (10,),
    }


def test_alexnet_mini_has_5538_parameters() -> None:
    assert sum(p.numel() for p in AlexNetMini().parameters()) == 5538


def test_alexnet_mini_computes_what_its_description_says() -> None:
    torch.manual_seed(0)
    model = AlexNetMini().eval()
    images = torch.randn(5, 3, 32, 32)
    expected = alexnet_by_hand(dict(model.named_parameters()), images)
    torch.testing.assert_close(model(images), expected)


def test_alexnet_mini_drops_features_while_training_only() -> None:
    torch.manual_seed(0)
    model = AlexNetMini(dropout=0.5)
    images = torch.randn(4, 3, 32, 32)
    assert not torch.equal(model(images), model(images))
    model.eval()
    assert torch.equal(model(images), model(images))


@pytest.mark.parametrize("image_size", [4, 7, 8, 28, 32])
@pytest.mark.parametrize("name", MODELS)
def test_models_take_any_image_size_channels_and_classes(name: str, image_size: int) -> None:
    images = torch.randn(2, 1, image_size, image_size)
    model = make_model(name, channels=1, image_size=image_size, classes=7)
    assert model(images).shape == (2, 7)


@pytest.mark.parametrize(("name", "narrow"), NARROW.items())
def test_every_model_learns_the_digits(name: str, narrow: dict[str, int]) -> None:
    torch.manual_seed(0)
    images, labels = (tensor[:256] for tensor in load_dataset("digits", image_size=8).train.tensors)
    model = make_model(name, image_size=8, **narrow)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(10):
        for batch in range(0, 256, 64):
            chosen = slice(batch, batch + 64)
            loss = functional.cross_entropy(model(images[chosen]), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])
    untrained = [key for key, p in model.named_parameters() if not optimizer.state[p]]
    assert not untrained, "every parameter takes part"


def test_fully_connected_has_a_linear_layer_for_each_size() -> None:
    model = FullyConnected(channels=1, image_size=4, classes=3, hidden=(5, 6))
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    assert [(m.in_features, m.out_features) for m in linear] == [(16, 5), (5, 6), (6, 3)]
    flat = torch.randn(2, 1, 4, 4)
    value = flat.reshape(2, 16)
    for place, layer in enumerate(linear):
        value = value @ layer.weight.T + layer.bias
        if place < len(linear) - 1:
            value = value.clamp(min=0)
    torch.testing.assert_close(model(flat), value)


def test_fully_connected_without_hidden_layers_is_linear() -> None:
    model = FullyConnected(hidden=())
    assert sum(p.numel() for p in model.parameters()) == 10 * (3 * 32 * 32 + 1)


def test_a_model_is_found_by_name_in_any_case() -> None:
    assert isinstance(make_model("alexnetMINI", width=2), AlexNetMini)
    assert isinstance(make_model("fullyconnected"), FullyConnected)


def test_an_unknown_model_names_the_nearest_and_all_there_are() -> None:
    with pytest.raises(ValueError, match=r"unknown model 'AlexNet': did you mean 'AlexNetMini'\?.*FullyConn"):
        make_model("AlexNet")


def test_every_model_is_held_to_what_models_promise() -> None:
    assert set(NARROW) == set(MODELS)


def test_an_unknown_option_names_the_nearest() -> None:
    with pytest.raises(TypeError, match=r"AlexNetMini has no option 'witdh': did you mean 'width'\?"):
        make_model("AlexNetMini", witdh=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 0}, "width must be at least 1, got 0"),
        ({"classes": -1}, "classes must be at least 1, got -1"),
        ({"channels": 0}, "channels must be at least 1"),
        ({"image_size": 3}, "image_size must be at least 4, got 3"),
        ({"dropout": 1.0}, r"dropout is a probability in \[0, 1\), got 1.0"),
        ({"dropout": float("nan")}, "dropout is a probability"),
    ],
)
def test_an_option_out_of_range_is_an_error_that_names_it(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"AlexNetMini.*{message}"):
        make_model("AlexNetMini", **options)


def test_a_hidden_layer_without_units_is_an_error() -> None:
    with pytest.raises(ValueError, match="FullyConnected: hidden must be at least 1, got 0"):
        FullyConnected(hidden=(8, 0))
