"""Labelled images, split once and for all into a training and a test set."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from streamlens.lab._registry import lookup

__all__ = ["DATASETS", "ImageDataset", "load_dataset", "make_loader"]


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


@functools.cache
def _digits() -> ImageDataset:
    """1,797 handwritten digits of 43 writers, 8x8 pixels (UCI Optical Recognition of Handwritten Digits).

    They come with scikit-learn. One fifth of each class is held back. Each image is enlarged to
    32x32 bilinearly and repeated over three channels, and pixels are normalised by the training
    set's mean and standard deviation.
    """
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the digits data set comes with scikit-learn: pip install 'streamlens[lab]'", name=error.name
        ) from error

    bunch = load_digits()
    labels = torch.as_tensor(bunch.target, dtype=torch.int64)
    pixels = torch.as_tensor(bunch.images, dtype=torch.float32) / 16  # 17 grey levels
    train, test = (
        torch.as_tensor(rows)
        for rows in train_test_split(range(len(labels)), test_size=0.2, stratify=labels, random_state=0)
    )
    images = functional.interpolate(pixels[:, None], scale_factor=4, mode="bilinear", align_corners=False)
    images = (images - images[train].mean()) / images[train].std()
    images = images.expand(-1, 3, -1, -1)
    return ImageDataset(
        name="digits",
        train=TensorDataset(images[train].contiguous(), labels[train]),
        test=TensorDataset(images[test].contiguous(), labels[test]),
        classes=10,
        channels=3,
        image_size=32,
    )


DATASETS: Final[Mapping[str, Callable[[], ImageDataset]]] = {"digits": _digits}
"""The data sets that `load_dataset` knows by name. None of them needs a download."""


def load_dataset(name: str) -> ImageDataset:
    """Load a data set by its name.

    Args:
        name: One of `DATASETS`, in any case.

    Returns:
        The data set. It is loaded once a process: treat its tensors as read-only.

    Raises:
        ValueError: There is no such data set.
        ModuleNotFoundError: The package that brings it is not installed.
    """
    _, load = lookup("data set", name, DATASETS)
    return load()


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
