"""Labelled images, split once and for all into a training and a test set."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from streamlens.lab._registry import lookup
from streamlens.lab.data.dataset import ImageDataset, Recipe, make_loader, prepare
from streamlens.lab.data.digits import DIGITS
from streamlens.lab.data.official import CIFAR10, CIFAR100, MNIST, FashionMNIST
from streamlens.lab.data.whitening import ZCA, whiten

__all__ = ["DATASETS", "ZCA", "ImageDataset", "load_dataset", "make_loader", "whiten"]

DATASETS: Final[Mapping[str, Recipe]] = {
    recipe.name: recipe for recipe in (DIGITS, MNIST, FashionMNIST, CIFAR10, CIFAR100)
}
"""The data sets that `load_dataset` knows by name. `digits` comes along; the others are files."""


def load_dataset(
    name: str,
    *,
    data_dir: str | os.PathLike[str] | None = None,
    download: bool = False,
    image_size: int | None = None,
) -> ImageDataset:
    """Load a data set by its name.

    Pixels are normalised: each channel's mean and standard deviation over the training set are taken
    out of both splits.

    Args:
        name: One of `DATASETS`, in any case.
        data_dir: The folder that holds the published files, as they are or in a folder named after the
            data set; `~/.cache/streamlens` unless told. `digits` needs none.
        download: Whether files that are missing or damaged are downloaded to there.
        image_size: Height and width to bring images to, bilinearly; the data set's own unless told
            (for `digits`: 32).

    Returns:
        The data set. The last two are kept in memory and returned again: treat their tensors as
        read-only.

    Raises:
        ValueError: There is no such data set, or the size is below 1.
        DatasetError: A file is missing, damaged, or could not be downloaded; the message says which and
            what to do.
        ModuleNotFoundError: The package that brings it is not installed.
    """
    registered, recipe = lookup("data set", name, DATASETS)
    size = recipe.image_size if image_size is None else image_size
    if size < 1:
        raise ValueError(f"{registered}: image_size must be at least 1, got {size}")
    folder = _default_folder() if data_dir is None else Path(data_dir).expanduser()
    return _load(recipe, folder.absolute(), download, size)


@functools.lru_cache(maxsize=2)  # CIFAR takes 740 MB
def _load(recipe: Recipe, folder: Path, download: bool, image_size: int) -> ImageDataset:
    return prepare(recipe, *recipe.read(folder, download), image_size)


def _default_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "streamlens"
