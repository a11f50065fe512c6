"""ZCA whitening of images."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from streamlens.lab.data.dataset import ImageDataset

__all__ = ["ZCA", "whiten"]

_BLOCK: Final = 4096


@dataclass(frozen=True, eq=False)
class ZCA:
    """The linear map that leaves pixels uncorrelated, each with variance 1, and changes images the least.

    With the eigenvectors U and eigenvalues L of the pixels' covariance it is
    `x -> U (L + epsilon)^(-1/2) U^T (x - mean)` (Bell and Sejnowski, The "Independent Components" of
    Natural Scenes are Edge Filters, Vision Research 1997). Eigenvalues of what it makes are
    `l / (l + epsilon)`: epsilon keeps it from blowing up the noise in directions that hardly vary.

    Attributes:
        mean: Of each pixel, `(pixels,)`.
        matrix: Symmetric, `(pixels, pixels)`.
    """

    mean: Tensor
    matrix: Tensor

    @classmethod
    def fit(cls, images: Tensor, epsilon: float = 0.1) -> ZCA:
        """Measure mean and covariance.

        The covariance is taken and decomposed in float64: 11 s for 5,000 images of 32x32 pixels in colour
        on one slow core.

        Args:
            images: `(examples, channels, height, width)`.
            epsilon: Added to the eigenvalues, at least 0. The default is that of Coates, Lee and Ng (AISTATS
                2011), for pixels of about unit variance.

        Raises:
            ValueError: epsilon is below 0 or not finite; or it is 0 and the images do not vary in every
                direction, as when there are fewer images than pixels.
        """
        if not 0 <= epsilon < float("inf"):
            raise ValueError(f"epsilon must be finite and at least 0, got {epsilon}")
        if not len(images):
            raise ValueError("whitening takes at least 1 image, got none")
        flat = images.flatten(1)
        mean = flat.mean(dim=0, dtype=torch.float64)
        covariance = torch.zeros(len(mean), len(mean), dtype=torch.float64, device=images.device)
        for block in flat.split(_BLOCK):
            centred = block.double() - mean
            covariance.addmm_(centred.T, centred)
        eigenvalues, vectors = torch.linalg.eigh(covariance / len(flat))
        shifted = eigenvalues.clamp(min=0) + epsilon
        if shifted.min() <= eigenvalues.max() * len(mean) * torch.finfo(torch.float64).eps:
            raise ValueError(
                f"{len(flat)} images do not vary in all {len(mean)} directions: give an epsilon above 0"
            )
        matrix = (vectors * shifted.rsqrt()) @ vectors.T
        return cls(mean.to(images.dtype), matrix.to(images.dtype))

    def __call__(self, images: Tensor) -> Tensor:
        """Images of the shape given, whitened."""
        return ((images.flatten(1) - self.mean) @ self.matrix).reshape(images.shape)


def whiten(data: ImageDataset, epsilon: float = 0.1) -> ImageDataset:
    """A data set whitened by what its training images are like.

    Args:
        data: What to whiten; it stays as it is.
        epsilon: See `ZCA.fit`.

    Returns:
        The same examples in the same order.

    Raises:
        ValueError: epsilon does not suit.
    """
    zca = ZCA.fit(data.train.tensors[0], epsilon)
    train, test = (
        TensorDataset(zca(split.tensors[0]), split.tensors[1]) for split in (data.train, data.test)
    )
    return dataclasses.replace(data, train=train, test=test)
