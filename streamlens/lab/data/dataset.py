"""`ImageDataset`: labelled images as they are trained on, and batches of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

__all__ = ["ImageDataset", "Recipe", "Split", "make_loader", "prepare"]

_FAINTEST: Final = 1e-6
"""The least standard deviation that a channel is divided by: one without any contrast stays 0."""


@dataclass(frozen=True, eq=False)
class ImageDataset:
    """Labelled images with their fixed split.

    Attributes:
        name: The data set's name.
        train: Training images, float32 `(examples, channels, height, width)`, with int64 labels.
        test: The same of the images held back.
        classes: Number of classes.
        channels: Channels of an image.
        image_size: Height and width of an image in pixels.
    """

    name: str
    train: TensorDataset
    test: TensorDataset
    classes: int
    channels: int
    image_size: int


@dataclass(frozen=True, eq=False)
class Split:
    """Images as they are stored: uint8, or float32 from 0 to 1, with a label each."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Recipe:
    """How a data set comes about.

    Attributes:
        name: The data set's name.
        classes: Number of classes.
        channels: Channels of an image; grey images are repeated where it is more than one.
        image_size: Height and width of an image unless others are asked for.
        read: Training and test set out of a folder, to which they are downloaded first if that is
            wanted and needed.
    """

    name: str
    classes: int
    channels: int
    image_size: int
    read: Callable[[Path, bool], tuple[Split, Split]]


def prepare(recipe: Recipe, train: Split, test: Split, image_size: int) -> ImageDataset:
    """Images resized to a square, with each channel's mean and deviation over the training set taken out."""
    images, held_back = (_resized(split.images, image_size) for split in (train, test))
    mean = images.mean(dim=(0, 2, 3), keepdim=True)
    deviation = images.std(dim=(0, 2, 3), keepdim=True).clamp(min=_FAINTEST)
    for pixels in (images, held_back):
        # In place: the larger data sets take a good part of a small machine's memory.
        pixels.sub_(mean).div_(deviation)
    return ImageDataset(
        name=recipe.name,
        train=_examples(images, train.labels, recipe.channels),
        test=_examples(held_back, test.labels, recipe.channels),
        classes=recipe.classes,
        channels=recipe.channels,
        image_size=image_size,
    )


def _examples(pixels: Tensor, labels: Tensor, channels: int) -> TensorDataset:
    return TensorDataset(pixels.expand(-1, channels, -1, -1).contiguous(), labels.to(torch.int64))


def _resized(images: Tensor, image_size: int) -> Tensor:
    """A float32 copy from 0 to 1 of the size asked for."""
    pixels = images.to(torch.float32, copy=True)
    if not images.is_floating_point():
        pixels.div_(255)
    size = (image_size, image_size)
    if pixels.shape[-2:] == size:
        return pixels
    shrunk = image_size < max(pixels.shape[-2:])
    return functional.interpolate(pixels, size=size, mode="bilinear", align_corners=False, antialias=shrunk)


def make_loader(
    data: TensorDataset, *, batch_size: int = 128, shuffle: bool = True, seed: int = 0
) -> DataLoader[tuple[Tensor, ...]]:
    """Batches of a data set, in an order of their own.

    The order comes from a private generator: it depends on the seed alone, and drawing it leaves
    PyTorch's global generator as it was.

    Args:
        data: Images and labels.
        batch_size: Examples in a batch; the last batch of an epoch may have fewer.
        shuffle: Whether to draw a new order each epoch.
        seed: Of the order.

    Returns:
        A loader that yields `(images, labels)`.

    Raises:
        ValueError: The batch size is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"a batch has at least 1 example, got batch_size={batch_size}")
    generator = torch.Generator().manual_seed(seed)
    return DataLoader(data, batch_size=batch_size, shuffle=shuffle, generator=generator)
