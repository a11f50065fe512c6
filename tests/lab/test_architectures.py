"""The published networks, held to their parameter counts and to twins written with functions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from streamlens.lab.models import VGG, ConvNet, DenseNet, ResNet18, TransformerLM, make_model


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def settled(model: nn.Module, images: Tensor) -> nn.Module:
    """The model in evaluation mode, its running statistics and affine weights not the trivial ones."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1 and name.endswith("weight"):
            nn.init.uniform_(parameter, 0.5, 1.5)
    model(images)
    return model.eval()


def normalised(module: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """Batch norm by its formula."""
    assert module.running_mean is not None
    assert module.running_var is not None
    shape = (1, -1, 1, 1)
    centred = (x - module.running_mean.view(shape)) / (module.running_var.view(shape) + 1e-5).sqrt()
    return centred * module.weight.view(shape) + module.bias.view(shape)


@pytest.mark.parametrize(
    ("model", "parameters"),
    [
        (VGG(), 9_231_114),
        (VGG(batch_norm=False), 9_225_610),
        (ResNet18(), 11_173_962),
        (ResNet18(classes=100), 11_220_132),
        (DenseNet(depth=100, growth=12), 769_162),
        (DenseNet(), 176_122),
        (
            ConvNet(),
            64 * (3 * 25 + 1) + 64 * (64 * 25 + 1) + 128 * (64 * 25 + 1) + 1000 * (128 * 16 + 1) + 10 * 1001,
        ),
    ],
    ids=[
        "VGG",
        "VGG-plain",
        "ResNet18",
        "ResNet18-100",
        "DenseNet-BC-100-12",
        "DenseNet-BC-40-12",
        "ConvNet",
    ],
)
def test_a_published_network_has_as_many_parameters_as_published(model: nn.Module, parameters: int) -> None:
    assert count(model) == parameters


def test_vgg_has_eight_convolutions_of_configuration_a_and_batch_norm_is_optional() -> None:
    for batch_norm in (True, False):
        modules = list(VGG(batch_norm=batch_norm).modules())
        widths = [m.out_channels for m in modules if isinstance(m, nn.Conv2d)]
        assert widths == [64, 128, 256, 256, 512, 512, 512, 512]
        assert sum(isinstance(m, nn.BatchNorm2d) for m in modules) == 8 * batch_norm
        assert sum(isinstance(m, nn.MaxPool2d) for m in modules) == 5


@pytest.mark.parametrize("batch_norm", [True, False])
@pytest.mark.parametrize("image_size", [8, 32])
def test_vgg_computes_what_its_description_says(batch_norm: bool, image_size: int) -> None:
    torch.manual_seed(0)
    images = torch.randn(3, 2, image_size, image_size)
    model = settled(VGG(channels=2, image_size=image_size, width=2, batch_norm=batch_norm), images)
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    norms = iter([m for m in model.modules() if isinstance(m, nn.BatchNorm2d)])
    x = images
    for place, convolution in enumerate(convolutions):
        x = functional.conv2d(x, convolution.weight, convolution.bias, padding=1)
        x = (normalised(next(norms), x) if batch_norm else x).clamp(min=0)
        if place in (0, 1, 3, 5, 7) and x.shape[-1] > 1:
            x = functional.max_pool2d(x, 2)
    assert x.shape == (3, 16, 1, 1)
    last = list(model.parameters())[-2:]
    torch.testing.assert_close(model(images), x.flatten(1) @ last[0].T + last[1])


def test_convnet_computes_what_its_description_says() -> None:
    torch.manual_seed(0)
    model = ConvNet(channels=2, image_size=7, classes=3, width=2, hidden=5).eval()
    images = torch.randn(3, 2, 7, 7)
    parameters = list(model.parameters())
    x = images
    for weight, bias in zip(parameters[0:6:2], parameters[1:6:2], strict=True):
        x = functional.conv2d(x, weight, bias, padding=2).clamp(min=0)
        x = functional.max_pool2d(x, 3, stride=2, padding=1)
    x = (x.flatten(1) @ parameters[6].T + parameters[7]).clamp(min=0)
    torch.testing.assert_close(model(images), x @ parameters[8].T + parameters[9])


def test_convnet_drops_pixels_and_hidden_units_each_by_its_own_rate() -> None:
    torch.manual_seed(0)
    model = ConvNet(image_size=8, width=2, hidden=2000, dropout=0.5, input_dropout=0.2)
    seen: dict[str, float] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout):
            module.register_forward_hook(
                lambda _, args, out, name=name: seen.update(
                    {name: ((out == 0) & (args[0] != 0)).sum().item() / (args[0] != 0).sum().item()}
                )
            )
    model(torch.randn(64, 3, 8, 8))
    assert seen == {"features.0": pytest.approx(0.2, abs=0.02), "classifier.3": pytest.approx(0.5, abs=0.02)}


def resnet_by_hand(model: ResNet18, x: Tensor) -> Tensor:
    modules = dict(model.named_modules())

    def conv(name: str, x: Tensor, stride: int = 1) -> Tensor:
        weight = modules[name].weight
        assert isinstance(weight, Tensor)
        return functional.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)

    def norm(name: str, x: Tensor) -> Tensor:
        module = modules[name]
        assert isinstance(module, nn.BatchNorm2d)
        return normalised(module, x)

    x = norm("stem.1", conv("stem.0", x)).clamp(min=0)
    for place in range(8):
        at, stride = f"blocks.{place}", 2 if place in (2, 4, 6) else 1
        inner = norm(f"{at}.bn1", conv(f"{at}.conv1", x, stride)).clamp(min=0)
        inner = norm(f"{at}.bn2", conv(f"{at}.conv2", inner))
        shortcut = norm(f"{at}.shortcut.1", conv(f"{at}.shortcut.0", x, stride)) if stride == 2 else x
        x = (inner + shortcut).clamp(min=0)
    linear = modules["classifier.2"]
    assert isinstance(linear, nn.Linear)
    return x.mean(dim=(2, 3)) @ linear.weight.T + linear.bias


@pytest.mark.parametrize("image_size", [8, 9])
def test_resnet18_computes_what_its_description_says(image_size: int) -> None:
    torch.manual_seed(0)
    images = torch.randn(4, 2, image_size, image_size)
    model = ResNet18(channels=2, image_size=image_size, classes=3, width=3)
    settled(model, images)
    torch.testing.assert_close(model(images), resnet_by_hand(model, images))


def test_resnet18_has_17_convolutions_in_the_main_path_and_one_linear_layer() -> None:
    modules = dict(ResNet18(width=2).named_modules())
    main = [n for n, m in modules.items() if isinstance(m, nn.Conv2d) and "shortcut" not in n]
    assert len(main) == 17
    assert sum(isinstance(m, nn.Linear) for m in modules.values()) == 1


def test_densenet_computes_what_its_description_says() -> None:
    torch.manual_seed(0)
    images = torch.randn(4, 2, 8, 8)
    model = settled(DenseNet(channels=2, image_size=8, classes=3, depth=16, growth=3), images)
    convolutions = iter([m for m in model.modules() if isinstance(m, nn.Conv2d)])
    norms = iter([m for m in model.modules() if isinstance(m, nn.BatchNorm2d)])

    def activated(x: Tensor) -> Tensor:
        return normalised(next(norms), x).clamp(min=0)

    def conv(x: Tensor) -> Tensor:
        weight = next(convolutions).weight
        return functional.conv2d(x, weight, padding=weight.shape[-1] // 2)

    x = conv(images)
    for block in range(3):
        for _ in range(2):
            x = torch.cat([x, conv(activated(conv(activated(x))))], dim=1)
        if block < 2:
            x = functional.avg_pool2d(conv(activated(x)), 2)
    x = activated(x).mean(dim=(2, 3))
    last = list(model.parameters())[-2:]
    torch.testing.assert_close(model(images), x @ last[0].T + last[1])


def test_a_densenet_has_as_many_weighted_layers_as_its_depth() -> None:
    for depth in (10, 40):
        layers = [m for m in DenseNet(depth=depth).modules() if isinstance(m, nn.Conv2d | nn.Linear)]
        assert len(layers) == depth


def language_model(**options: Any) -> TransformerLM:
    torch.manual_seed(0)
    settings = {"channels": 1, "image_size": 12, "classes": 11, "text": True, "width": 8, **options}
    model = TransformerLM(**settings)
    for p in model.parameters():
        nn.init.normal_(p, std=0.5)
    return model.eval()


def test_a_language_model_is_pytorchs_own_transformer_with_a_causal_mask() -> None:
    model = language_model(depth=2, heads=2)
    tokens = torch.randint(0, 11, (3, 12))
    state = model.state_dict()
    x = state["words.weight"][tokens] + state["positions.weight"]
    mask = torch.full((12, 12), float("-inf")).triu(1)
    for place in range(2):
        twin = nn.TransformerEncoderLayer(
            8, 2, 32, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        names = {
            "self_attn.in_proj_": "attention_in.",
            "self_attn.out_proj.": "attention_out.",
            "linear1.": "perceptron.1.",
            "linear2.": "perceptron.3.",
            "norm1.": "attention_norm.",
            "norm2.": "perceptron.0.",
        }
        twin.load_state_dict(
            {
                f"{theirs}{kind}": state[f"blocks.{place}.{ours}{kind}"]
                for theirs, ours in names.items()
                for kind in ("weight", "bias")
            }
        )
        x = twin(x, src_mask=mask)
    x = functional.layer_norm(x, (8,), state["norm.weight"], state["norm.bias"])
    expected = x @ state["classifier.weight"].T + state["classifier.bias"]
    torch.testing.assert_close(model(tokens), expected.transpose(1, 2))


def test_no_position_of_a_text_sees_a_later_one_and_every_position_sees_the_earlier_ones() -> None:
    model = language_model()
    tokens = torch.randint(0, 11, (1, 12))
    changed = tokens.clone()
    changed[0, 5] = (changed[0, 5] + 1) % 11
    same = (model(tokens) == model(changed)).all(dim=1)[0]
    assert same.tolist() == [True] * 5 + [False] * 7


def test_a_text_may_be_shorter_than_the_longest_and_a_longer_one_is_an_error() -> None:
    model = language_model()
    tokens = torch.randint(0, 11, (2, 12))
    torch.testing.assert_close(model(tokens[:, :4]), model(tokens)[:, :, :4])
    with pytest.raises(ValueError, match=r"the longest text has 12 tokens \(image_size=\), got 13"):
        model(torch.zeros(1, 13, dtype=torch.long))


def test_a_language_model_learns_which_token_follows_which() -> None:
    torch.manual_seed(0)
    model = TransformerLM(channels=1, image_size=16, classes=5, text=True, width=16)
    follows = torch.tensor([2, 0, 4, 1, 3])
    tokens = torch.randint(0, 5, (32, 1))
    for _ in range(15):
        tokens = torch.cat([tokens, follows[tokens[:, -1:]]], dim=1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(30):
        loss = nn.CrossEntropyLoss()(model(tokens[:, :-1]), tokens[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1


def test_an_image_is_read_row_by_row_to_the_last_one() -> None:
    torch.manual_seed(0)
    model = TransformerLM(channels=2, image_size=6, classes=3, width=8).eval()
    images = torch.randn(2, 2, 6, 6)
    for row in range(6):
        changed = images.clone()
        changed[:, :, row] += 1
        assert not torch.equal(model(images), model(changed)), row
    words = model.words(torch.cat([images[:, 0], images[:, 1]], dim=2))
    x = model.norm(model.blocks(words + model.positions.weight))
    torch.testing.assert_close(model(images), model.classifier(x[:, -1]))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("VGG", {"image_size": 1}, "VGG: image_size must be at least 2, got 1"),
        ("VGG", {"dropout": 1}, r"VGG: dropout is a probability in \[0, 1\), got 1"),
        ("ConvNet", {"input_dropout": -0.1}, "ConvNet: input_dropout is a probability"),
        ("ConvNet", {"hidden": 0}, "ConvNet: hidden must be at least 1, got 0"),
        ("ResNet18", {"width": 0}, "ResNet18: width must be at least 1, got 0"),
        ("DenseNet", {"depth": 41}, r"depth must be 6n \+ 4 .* got 41"),
        ("DenseNet", {"depth": 4}, r"depth must be 6n \+ 4 .* got 4"),
        ("DenseNet", {"image_size": 3}, "DenseNet: image_size must be at least 4, got 3"),
        ("TransformerLM", {"width": 10, "heads": 4}, "width must be a multiple of heads, got 10 and 4"),
        ("TransformerLM", {"text": True}, "a text has 1 channel, got channels=3"),
        ("TransformerLM", {"dropout": 2}, "TransformerLM: dropout is a probability"),
    ],
)
def test_a_wrong_option_is_an_error_that_names_it(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_model(name, **options)
