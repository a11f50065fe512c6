"""The networks of the lab."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from streamlens.lab.models import MODELS, AlexNetMini, FullyConnected, make_model


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


@pytest.mark.parametrize("image_size", [4, 7, 28, 32])
def test_models_take_any_image_size_channels_and_classes(image_size: int) -> None:
    images = torch.randn(2, 1, image_size, image_size)
    for name in MODELS:
        model = make_model(name, channels=1, image_size=image_size, classes=7)
        assert model(images).shape == (2, 7)


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
