"""The digits that come with scikit-learn."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import torch

from streamlens.lab.data.dataset import Recipe, Split

__all__ = ["DIGITS"]


def _read(_folder: Path, _download: bool) -> tuple[Split, Split]:
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the digits data set comes with scikit-learn: pip install 'streamlens[lab]'", name=error.name
        ) from error

    bunch = load_digits()
    labels = torch.as_tensor(bunch.target, dtype=torch.int64)
    pixels = torch.as_tensor(bunch.images, dtype=torch.float32)[:, None] / 16  # 17 grey levels
    train, test = (
        torch.as_tensor(rows)
        for rows in train_test_split(range(len(labels)), test_size=0.2, stratify=labels, random_state=0)
    )
    return Split(pixels[train], labels[train]), Split(pixels[test], labels[test])


DIGITS: Final = Recipe("digits", classes=10, channels=3, image_size=32, read=_read)
"""1,797 handwritten digits of 43 writers, 8x8 pixels (UCI Optical Recognition of Handwritten Digits).

One fifth of each class is held back. Unless another size is asked for, images are enlarged to 32x32, so
that they suit networks made for CIFAR, and for the same reason they are repeated over three channels.
"""
