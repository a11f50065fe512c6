"""Lanczos with full reorthogonalisation: the extreme eigenpairs of a symmetric matrix known by products."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

import torch
from torch import Tensor

from streamlens.errors import StreamlensError

__all__ = ["WHICH", "RitzPairs", "Which", "lanczos", "random_vector"]

Which: TypeAlias = Literal["largest", "smallest", "magnitude"]
WHICH: Final[tuple[Which, ...]] = ("largest", "smallest", "magnitude")

_LOOK_AGAIN: Final = 6
"""Products from another start after which what the earlier ones could not see would have shown."""

_ASYMMETRY: Final = 0.02
"""Differences between mirror images above this share of the largest element are no rounding."""


@dataclass(frozen=True, slots=True, eq=False)
class RitzPairs:
    """Approximate eigenpairs, and how good they are.

    Attributes:
        values: k eigenvalues in the order asked for, float64, on the host.
        vectors: Their unit vectors, (k, n), each with its element of largest size positive.
        residuals: |H v - theta v| of each, which bounds its distance from an eigenvalue.
        converged: How many of them are within the tolerance of an eigenvalue.
        confirmed: Whether all are, and another start has shown no further one among the k.
        products: Matrix-vector products taken.
    """

    values: Tensor
    vectors: Tensor
    residuals: tuple[float, ...]
    converged: int
    confirmed: bool
    products: int


class _Space:
    """An orthonormal basis Q, the projection Q' H Q, and what of H Q lies outside.

    Args:
        like: A vector of the kind that the matrix takes.
        most: The most vectors.
    """

    def __init__(self, like: Tensor, most: int) -> None:
        self._basis = like.new_empty(most, like.numel())
        self._projected = torch.zeros(most, most, dtype=torch.float64)
        self._outside: list[tuple[int, Tensor]] = []
        self.size = 0
        self.scale = 0.0
        """The largest element of the projection: the size of the matrix, as far as known."""
        self.asymmetry = 0.0
        """The largest difference between an element and its mirror image."""

    def outside(self, vector: Tensor) -> tuple[Tensor, Tensor]:
        """A vector's coefficients in the basis, and its part outside."""
        basis = self._basis[: self.size]
        # Twice is enough (Parlett, The Symmetric Eigenvalue Problem, 6.9): once leaves rounding behind.
        first = basis @ vector
        rest = vector - first @ basis
        second = basis @ rest
        return first + second, rest - second @ basis

    def grow(self, direction: Tensor, product: Callable[[Tensor], Tensor], *, follows: bool) -> Tensor:
        """Add a direction outside the basis; gives the part of its product that is outside then.

        Args:
            direction: The vector, of any length.
            product: The matrix.
            follows: Whether it is what this method gave last, and so nothing of that is left outside.
        """
        direction = direction / torch.linalg.vector_norm(direction)
        self._basis[self.size] = direction
        self.size += 1
        # The new row of the projection, from what the earlier products left outside.
        row = torch.zeros(self.size, dtype=torch.float64)
        for i, left in self._outside:
            row[i] = left @ direction
        if follows and self._outside:
            self._outside.pop()
        coefficients, rest = self.outside(product(direction))
        column = coefficients.to("cpu", torch.float64)
        if self.size > 1:
            self.asymmetry = max(self.asymmetry, float((column - row)[:-1].abs().max()))
        self._projected[self.size - 1, : self.size] = column
        self._projected[: self.size, self.size - 1] = column
        largest = float(column.abs().max())
        self.scale = max(self.scale, largest) if math.isfinite(largest) else math.nan
        # What earlier products left outside may lie along the new direction.
        self._outside = [(i, left - (left @ direction) * direction) for i, left in self._outside]
        self._outside.append((self.size - 1, rest))
        return rest

    def eigen(self) -> tuple[Tensor, Tensor]:
        """The Ritz values, ascending, and the coordinates of their vectors as columns."""
        values, coordinates = torch.linalg.eigh(self._projected[: self.size, : self.size])
        return values, coordinates

    def residuals(self, coordinates: Tensor) -> list[float]:
        """The residual norm of each Ritz vector."""
        left = torch.stack([rest for _, rest in self._outside])
        weights = coordinates[[i for i, _ in self._outside]].to(left)
        norms: list[float] = torch.linalg.vector_norm(weights.T @ left, dim=1).tolist()
        return norms

    def vectors(self, coordinates: Tensor) -> Tensor:
        """Ritz vectors as rows, each with its element of largest size positive."""
        basis = self._basis[: self.size]
        vectors = coordinates.T.to(basis) @ basis
        largest = vectors.gather(1, vectors.abs().argmax(dim=1, keepdim=True))
        return vectors * largest.sign()


def random_vector(like: Tensor, generator: torch.Generator) -> Tensor:
    """Independent normal numbers, drawn on the host so that every device has the same."""
    return torch.randn(like.numel(), generator=generator).to(like)


def _extreme(values: Tensor, k: int, which: Which) -> Tensor:
    """The places of the k values at an end of the spectrum, the outermost first."""
    key = {"largest": values, "smallest": -values, "magnitude": values.abs()}[which]
    return key.argsort(descending=True, stable=True)[:k]


def lanczos(
    product: Callable[[Tensor], Tensor],
    start: Tensor,
    k: int,
    *,
    which: Which,
    most: int,
    tolerance: float,
    generator: torch.Generator,
) -> RitzPairs:
    """The k extreme eigenpairs of a symmetric matrix, by Lanczos with full reorthogonalisation.

    A pair (theta, v) has converged once |H v - theta v| <= tolerance |theta|: it is then within that of
    an eigenvalue. From one start an eigenvalue of several dimensions shows only once, so that k converged
    pairs need not be the k extreme ones: the search then goes on from a random vector orthogonal to all
    that is known, and ends when that has shown nothing new, or after `most` products.

    Args:
        product: The matrix: a vector to its product.
        start: The first vector, of any length but 0.
        k: How many pairs, at most the dimension.
        which: Which end of the spectrum.
        most: The most products, at least k.
        tolerance: The residual, relative to the eigenvalue.
        generator: Draws further starts.

    Returns:
        The pairs; all NaN where a product is not finite.

    Raises:
        StreamlensError: The matrix is not symmetric.
    """
    most = min(most, start.numel())
    space = _Space(start, most)
    eps = 32 * torch.finfo(start.dtype).eps
    values = torch.full((k,), math.nan, dtype=torch.float64)
    coordinates, residuals, converged = values, [math.nan] * k, 0
    rest, since, found = start, 0, None
    follows, confirmed = True, False
    while space.size < most:
        if not follows:
            rest, since = space.outside(random_vector(start, generator))[1], 0
        rest = space.grow(rest, product, follows=follows)
        since += 1
        if not math.isfinite(space.scale):
            nothing = start.new_full((k, start.numel()), math.nan)
            return RitzPairs(values.fill_(math.nan), nothing, (math.nan,) * k, 0, False, space.size)
        if space.asymmetry > _ASYMMETRY * space.scale:
            raise StreamlensError(
                "the products belong to no symmetric matrix: elements and their mirror images differ by up "
                f"to {space.asymmetry / space.scale:.0%} of the largest; an operation in the model or the "
                "loss has a wrong second derivative"
            )
        # Nothing outside: the start has shown all that it can.
        follows = float(torch.linalg.vector_norm(rest)) > eps * space.scale
        if space.size < k:
            continue
        every, columns = space.eigen()
        places = _extreme(every, k, which)
        values, coordinates = every[places], columns[:, places]
        residuals = space.residuals(coordinates)
        # Below eps of the largest nothing is known of an eigenvalue but that it is small.
        limits = (tolerance * values.abs()).clamp(min=eps * space.scale)
        converged = sum(r <= limit for r, limit in zip(residuals, limits.tolist(), strict=True))
        if converged < k or (found is not None and since < _LOOK_AGAIN and follows):
            continue
        if found is not None and bool(((values - found).abs() <= limits).all()):
            confirmed = True
            break
        found, follows = values, False
    # A basis of everything has left nothing unseen.
    confirmed = confirmed or space.size == start.numel()
    return RitzPairs(values, space.vectors(coordinates), tuple(residuals), converged, confirmed, space.size)
