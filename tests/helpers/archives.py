"""Small data sets in exactly the formats of MNIST and CIFAR, written without the reader."""

from __future__ import annotations

import dataclasses
import functools
import gzip
import hashlib
import io
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from streamlens.lab import data as data_module
from streamlens.lab.data import DATASETS
from streamlens.lab.data.dataset import Recipe

IDX = (
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
)
Bytes = npt.NDArray[np.uint8]


def drawn(seed: int, *shape: int, below: int = 256) -> Bytes:
    return np.random.default_rng(seed).integers(0, below, shape, dtype=np.uint8)


def idx(array: Bytes, *, kind: int = 8) -> bytes:
    """An array as IDX: magic number, dimensions, bytes."""
    header = bytes([0, 0, kind, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    return header + array.tobytes()


def write_idx(path: Path, array: Bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(idx(array), mtime=0))
    return path


def records(labels: Sequence[Bytes], images: Bytes) -> bytes:
    """Records of CIFAR: the labels of an image and then its pixels."""
    rows = zip(*labels, images.reshape(len(images), -1), strict=True)
    return b"".join(bytes([*(int(label) for label in row[:-1])]) + row[-1].tobytes() for row in rows)


def write_tar(path: Path, members: Mapping[str, bytes], *, links: Mapping[str, str] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        for name, target in (links or {}).items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, target
            archive.addfile(info)
    return path


def md5(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


def publish(monkeypatch: pytest.MonkeyPatch, name: str, *paths: Path) -> None:
    """Make the files given the published ones of a data set."""
    recipe = DATASETS[name]
    sums = {path.name: md5(path.read_bytes()) for path in paths}
    read = recipe.read
    assert isinstance(read, functools.partial)
    first, *others = read.args
    renewed: Any = (
        [dataclasses.replace(file, md5=sums[file.name]) for file in first]
        if isinstance(first, list)
        else dataclasses.replace(first, md5=sums[first.name])
    )
    read = functools.partial(read.func, renewed, *others)
    changed: dict[str, Recipe] = {**DATASETS, name: dataclasses.replace(recipe, read=read)}
    monkeypatch.setattr(data_module, "DATASETS", changed)


def write_mnist(monkeypatch: pytest.MonkeyPatch, name: str, folder: Path, arrays: Sequence[Bytes]) -> None:
    """Write training images and labels, test images and labels, as the published files of a data set."""
    files = zip(IDX, arrays, strict=True)
    publish(monkeypatch, name, *(write_idx(folder / file, array) for file, array in files))
