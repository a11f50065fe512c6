"""The data of the lab."""

from __future__ import annotations

import pytest
import torch
from sklearn.datasets import load_digits

from streamlens.lab.data import ImageDataset, load_dataset, make_loader
from streamlens.lab.data.dataset import Recipe, Split, prepare


@pytest.fixture(scope="module")
def digits() -> ImageDataset:
    return load_dataset("digits")


def test_digits_are_float_images_with_integer_labels(digits: ImageDataset) -> None:
    for split, examples in ((digits.train, 1437), (digits.test, 360)):
        images, labels = split.tensors
        assert images.shape == (examples, 3, 32, 32)
        assert images.dtype == torch.float32
        assert labels.shape == (examples,)
        assert labels.dtype == torch.int64
    assert (digits.channels, digits.image_size, digits.classes) == (3, 32, 10)


def test_digits_hold_back_a_fifth_of_every_class(digits: ImageDataset) -> None:
    held_back = torch.bincount(digits.test.tensors[1], minlength=10)
    all_digits = torch.bincount(torch.as_tensor(load_digits().target), minlength=10)
    assert ((held_back - all_digits / 5).abs() < 1).all()


def test_every_digit_is_in_exactly_one_split_under_its_own_label(digits: ImageDataset) -> None:
    # Normalising is affine: undone up to rounding, each image lies nearest to the digit it came from.
    bunch = load_digits()
    originals = torch.as_tensor(bunch.images, dtype=torch.float32)[:, None]
    enlarged = torch.nn.functional.interpolate(
        originals, scale_factor=4, mode="bilinear", align_corners=False
    ).flatten(1)
    found: list[int] = []
    for split in (digits.train, digits.test):
        images, labels = split.tensors
        flat = images[:, 0].flatten(1)
        undone = (flat - flat.min()) / (flat.max() - flat.min()) * 16
        nearest = torch.cdist(undone, enlarged).argmin(dim=1)
        assert torch.equal(labels, torch.as_tensor(bunch.target)[nearest])
        found += nearest.tolist()
    assert sorted(found) == list(range(1797))


def test_training_images_are_normalised_and_test_images_by_the_same_numbers(digits: ImageDataset) -> None:
    images, test_images = digits.train.tensors[0], digits.test.tensors[0]
    assert images.mean().item() == pytest.approx(0, abs=1e-4)
    assert images.std().item() == pytest.approx(1, abs=1e-3)
    # The darkest pixel of both is 0 before normalising.
    assert images.min().item() == pytest.approx(test_images.min().item(), abs=1e-6)
    assert test_images.mean().abs() > 1e-6


def test_the_three_channels_are_equal(digits: ImageDataset) -> None:
    images = digits.train.tensors[0][:50]
    assert torch.equal(images[:, 0], images[:, 1])
    assert torch.equal(images[:, 0], images[:, 2])


def test_a_data_set_is_found_in_any_case_and_an_unknown_one_names_the_nearest() -> None:
    assert load_dataset("Digits").name == "digits"
    with pytest.raises(ValueError, match=r"unknown data set 'digit': did you mean 'digits'\?"):
        load_dataset("digit")


def order(digits: ImageDataset, seed: int, epochs: int = 1) -> list[int]:
    index = torch.utils.data.TensorDataset(torch.arange(len(digits.train)))
    loader = make_loader(index, batch_size=100, seed=seed)
    return [i for _ in range(epochs) for (batch,) in loader for i in batch.tolist()]


def test_the_order_of_batches_depends_on_the_seed_alone(digits: ImageDataset) -> None:
    torch.manual_seed(1)
    first = order(digits, seed=5, epochs=2)
    torch.manual_seed(2)
    assert order(digits, seed=5, epochs=2) == first
    assert order(digits, seed=6, epochs=2) != first
    examples = len(digits.train)
    assert first[:examples] != first[examples:], "each epoch has an order of its own"
    assert sorted(first[:examples]) == list(range(examples))


def test_drawing_batches_leaves_the_global_generator_as_it_was(digits: ImageDataset) -> None:
    before = torch.get_rng_state()
    order(digits, seed=0)
    assert torch.equal(torch.get_rng_state(), before)


def test_batches_have_the_size_asked_for_and_the_last_one_the_rest(digits: ImageDataset) -> None:
    sizes = [len(labels) for _, labels in make_loader(digits.train, batch_size=128)]
    assert sizes == [128] * 11 + [29]


def test_a_batch_size_below_one_is_an_error(digits: ImageDataset) -> None:
    with pytest.raises(ValueError, match="batch_size=0"):
        make_loader(digits.train, batch_size=0)


def test_digits_of_8_pixels_are_those_of_the_collection() -> None:
    data = load_dataset("digits", image_size=8)
    bunch = load_digits()
    assert data.image_size == 8
    found: list[int] = []
    originals = torch.as_tensor(bunch.images, dtype=torch.float32).flatten(1)
    for split in (data.train, data.test):
        flat = split.tensors[0][:, 0].flatten(1)
        grey = (flat - flat.min()) / (flat.max() - flat.min()) * 16
        distance, nearest = torch.cdist(grey, originals).min(dim=1)
        assert distance.max() < 0.1, "grey levels lie 1 apart"
        found += nearest.tolist()
    assert sorted(found) == list(range(1797))


def test_a_size_below_one_is_an_error() -> None:
    with pytest.raises(ValueError, match="digits: image_size must be at least 1, got 0"):
        load_dataset("digits", image_size=0)


def test_a_data_set_is_loaded_once() -> None:
    assert load_dataset("digits") is load_dataset("DIGITS")


def test_a_channel_without_contrast_stays_0_and_finite() -> None:
    grey = Split(torch.full((3, 1, 2, 2), 7, dtype=torch.uint8), torch.zeros(3))
    recipe = Recipe("grey", classes=1, channels=1, image_size=2, read=lambda *_: (grey, grey))
    assert not prepare(recipe, grey, grey, 2).train.tensors[0].any()


def test_smaller_images_are_averages_and_not_every_nth_pixel() -> None:
    stripes = torch.zeros(2, 1, 8, 8)
    stripes[:1, :, :, ::4] = 1  # between the pixels that plain interpolation would look at
    split = Split(stripes, torch.zeros(2))
    recipe = Recipe("stripes", classes=1, channels=1, image_size=8, read=lambda *_: (split, split))
    striped, empty = prepare(recipe, split, split, 2).train.tensors[0]
    assert (striped > empty).all()
