"""MNIST, FashionMNIST, CIFAR10 and CIFAR100 from the files that their authors published."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from streamlens.errors import DatasetError
from streamlens.lab.data.archives import Published, obtain
from streamlens.lab.data.cifar import read_cifar
from streamlens.lab.data.dataset import Recipe, Split
from streamlens.lab.data.idx import read_idx

__all__ = ["CIFAR10", "CIFAR100", "MNIST", "FashionMNIST", "cifar", "idx"]


def idx(files: Sequence[Published], classes: int, folder: Path, download: bool) -> tuple[Split, Split]:
    """Training images and labels, test images and labels, out of four IDX files."""
    paths = [obtain(file, folder, download=download) for file in files]
    splits = []
    for images, labels in (paths[:2], paths[2:]):
        pixels, marks = read_idx(images, dimensions=3), read_idx(labels, dimensions=1)
        if len(pixels) != len(marks):
            raise DatasetError(f"{images} has {len(pixels)} images, but {labels} has {len(marks)} labels")
        splits.append(_checked(Split(pixels[:, None], marks), classes, labels))
    return splits[0], splits[1]


def cifar(
    file: Published, training: Sequence[str], test: str, classes: int, folder: Path, download: bool
) -> tuple[Split, Split]:
    """Training and test set out of the members of one archive."""
    path = obtain(file, folder, download=download)
    label_bytes = 1 if classes == 10 else 2
    train, held_back = (read_cifar(path, members, label_bytes) for members in (training, [test]))
    return _checked(train, classes, path), _checked(held_back, classes, path)


def _checked(split: Split, classes: int, path: Path) -> Split:
    if not len(split.labels):
        raise DatasetError(f"{path} is damaged: there is nothing in it")
    if (largest := int(split.labels.max())) >= classes:
        raise DatasetError(f"{path} is damaged: label {largest} of {classes} classes")
    return split


def _idx_recipe(name: str, checksums: Sequence[str], folders: Sequence[str]) -> Recipe:
    names = (
        "train-images-idx3-ubyte.gz",
        "train-labels-idx1-ubyte.gz",
        "t10k-images-idx3-ubyte.gz",
        "t10k-labels-idx1-ubyte.gz",
    )
    files = [Published(name, file, md5, folders) for file, md5 in zip(names, checksums, strict=True)]
    return Recipe(name, classes=10, channels=1, image_size=28, read=functools.partial(idx, files, 10))


def _cifar_recipe(name: str, file: Published, training: Sequence[str], test: str, classes: int) -> Recipe:
    read = functools.partial(cifar, file, training, test, classes)
    return Recipe(name, classes=classes, channels=3, image_size=32, read=read)


_TORONTO: Final = ("https://www.cs.toronto.edu/~kriz/",)

MNIST: Final = _idx_recipe(
    "MNIST",
    (
        "f68b3c2dcbeaaa9fbdd348bbdeb94873",
        "d53e105ee54ea40749a09fcbcd1e9432",
        "9fb629c4189551a2d022fa330f9573f3",
        "ec29112dd5afa0611ce80d1b7f02629c",
    ),
    # The authors' own site asks for a password nowadays; these are its mirrors.
    (
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        "https://storage.googleapis.com/cvdf-datasets/mnist/",
    ),
)
"""70,000 handwritten digits, 28x28 grey pixels (LeCun, Bottou, Bengio and Haffner, 1998)."""

FashionMNIST: Final = _idx_recipe(
    "FashionMNIST",
    (
        "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "25c81989df183df01b3e8a0aad5dffbe",
        "bef4ecab320f06d8554ea6380940ec79",
        "bb300cfdad3c16e7a12a480ee83cd310",
    ),
    (
        "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    ),
)
"""70,000 articles of clothing in the format of MNIST (Xiao, Rasul and Vollgraf, 2017)."""

CIFAR10: Final = _cifar_recipe(
    "CIFAR10",
    Published("CIFAR10", "cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530", _TORONTO),
    [f"cifar-10-batches-bin/data_batch_{number}.bin" for number in range(1, 6)],
    "cifar-10-batches-bin/test_batch.bin",
    classes=10,
)
"""60,000 photographs of 10 classes, 32x32 pixels in colour (Krizhevsky, 2009)."""

CIFAR100: Final = _cifar_recipe(
    "CIFAR100",
    Published("CIFAR100", "cifar-100-binary.tar.gz", "03b5dce01913d631647c71ecec9e9cb8", _TORONTO),
    ["cifar-100-binary/train.bin"],
    "cifar-100-binary/test.bin",
    classes=100,
)
"""60,000 photographs of 100 classes, 32x32 pixels in colour, with their fine labels (Krizhevsky, 2009)."""
