"""The largest singular value of matrices that change slowly: block Krylov iterations, started warm.

With A the matrix and V an orthonormal block left by the step before, the space spanned by V and A'A V is
searched for its best vectors (Rayleigh-Ritz); A'A times those are the next V. If v is the best and s = |A v|,
the relative residual r = |A'A v - s^2 v| / s^2 says how good it is: A'A has an eigenvalue within r s^2 of
s^2, and the error of s is of second order in r. That it is the largest one, no residual can say: the block
holds the eleven largest that were found, so that one is there before it overtakes, and its last vector is
drawn anew each time, so that directions orthogonal to all others are found, if a few steps late.

See Golub & Van Loan, Matrix Computations, 10.1 and 10.4; Musco & Musco, Randomized Block Krylov Methods for
Stronger and Faster Approximate Singular Value Decomposition (2015).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from streamlens.operators._tensors import wide

__all__ = ["LargestSingularValues"]

_BLOCK: Final = 12
_PIECE: Final = 1 << 18
"""Elements of a matrix that stay in the cache between the two products with them."""
_MOST: Final = 60
"""Rounds on the CPU, if the residual does not say enough earlier."""
_COLD_ON_DEVICE: Final = 12
_WARM_ON_DEVICE: Final = 2
"""Rounds where reading the residual would make the host wait for the device."""


class LargestSingularValues:
    """Tracks the largest singular value of each layer's matrix.

    Args:
        tolerance: The relative residual at which a round is the last one.
    """

    def __init__(self, tolerance: float) -> None:
        self._tolerance = tolerance
        self._vectors: dict[str, Tensor] = {}
        self._scales: dict[str, Tensor] = {}
        """Factors that keep products with a matrix and its transpose in float32's range."""
        # The run's own generators are not touched.
        self._generator = torch.Generator().manual_seed(0)

    def __call__(self, matrices: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The largest singular values, and their relative residuals.

        Args:
            matrices: By layer; each side longer than two blocks.
        """
        operators = {name: _Operator(_real(matrix)) for name, matrix in matrices.items()}
        on_host = all(a.device.type == "cpu" for a in operators.values())
        cold = [name for name, a in operators.items() if not self._fits(name, a)]
        for name in cold:
            self._vectors[name] = torch.linalg.qr(self._random(operators[name], _BLOCK))[0]
        for name in cold if on_host else operators:
            self._scales[name] = operators[name].scale()
        values: dict[str, Tensor] = {}
        residuals: dict[str, Tensor] = {}
        open_: Sequence[str] = tuple(operators)
        for _ in range(_MOST if on_host else _COLD_ON_DEVICE if cold else _WARM_ON_DEVICE):
            found = self._round({name: operators[name] for name in open_})
            values.update(zip(open_, found[0], strict=True))
            residuals.update(zip(open_, found[1], strict=True))
            if on_host:
                # Not `r <= tolerance`: what is NaN gets no better.
                open_ = [n for n, r in zip(open_, found[1].tolist(), strict=True) if r > self._tolerance]
            if not open_:
                break
        if on_host:
            self._forget(name for name, value in values.items() if not value > 0)
        return torch.stack([values[n] for n in operators]), torch.stack([residuals[n] for n in operators])

    def _fits(self, name: str, a: _Operator) -> bool:
        held = self._vectors.get(name)
        if held is None or held.shape[0] != a.size or held.dtype is not a.dtype or name not in self._scales:
            return False
        if held.device != a.device:
            self._vectors[name], self._scales[name] = held.to(a.device), self._scales[name].to(a.device)
        return True

    def _forget(self, names: Iterable[str]) -> None:
        """A scale found on zeros or NaN says nothing of what follows them."""
        for name in names:
            del self._scales[name]

    def _random(self, a: _Operator, columns: int) -> Tensor:
        drawn = torch.randn(a.size, columns, generator=self._generator, dtype=torch.float32)
        return drawn.to(a.device, a.dtype, non_blocking=True)

    def _round(self, operators: Mapping[str, _Operator]) -> tuple[Tensor, Tensor]:
        """One restart of every layer: its values, residuals, and the next block."""
        spaces = [_space(a, self._vectors[name], self._scales[name]) for name, a in operators.items()]
        projected = torch.stack([wide(image.mT @ image) for _, image, _ in spaces])
        squares, vectors = ritz(projected, _BLOCK)
        values: list[Tensor] = []
        residuals: list[Tensor] = []
        for (name, a), (basis, _, back), square, chosen in zip(
            operators.items(), spaces, squares, vectors.unbind(0), strict=True
        ):
            scale = wide(self._scales[name])
            values.append(square.sqrt() / scale)
            chosen = chosen.to(a.dtype)
            block = back @ chosen
            below = (square / scale).to(a.dtype)
            below = torch.where(below > 0, below, torch.ones_like(below))
            residual = torch.linalg.vector_norm(block[:, 0] / below - basis @ chosen[:, 0])
            residuals.append(torch.where(square > 0, residual, square.to(residual) * 0))
            # What is zero or not finite leaves the vectors as they were, but for the random one.
            kept = torch.where((square > 0) & square.isfinite(), block, self._vectors[name])
            fresh = torch.cat([kept[:, :-1], self._random(a, 1)], 1)
            self._vectors[name] = torch.linalg.qr(fresh)[0]
        return torch.stack(values), torch.stack(residuals)

    def state_dict(self) -> dict[str, Any]:
        """Vectors, and the generator that the next ones come from."""
        return {
            "vectors": dict(self._vectors),
            "scales": dict(self._scales),
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        self._vectors = dict(state["vectors"])
        self._scales = dict(state["scales"])
        self._generator.set_state(state["generator"])


class _Operator:
    """A matrix as a map from its shorter side to its longer one."""

    def __init__(self, matrix: Tensor) -> None:
        self._matrix = matrix
        self._wide = matrix.shape[0] < matrix.shape[1]
        self.size = min(matrix.shape)
        self.device, self.dtype = matrix.device, matrix.dtype

    def scale(self) -> Tensor:
        largest = self._matrix.abs().amax()
        return torch.where(largest > 0, 1 / largest, torch.ones_like(largest))

    def there_and_back(self, block: Tensor) -> tuple[Tensor, Tensor]:
        """A X and A'A X, each piece of the matrix read once for both."""
        pieces = max(1, self._matrix.numel() // _PIECE) if self.device.type == "cpu" else 1
        images: list[Tensor] = []
        back = torch.zeros_like(block if self._wide else block.mT, memory_format=torch.contiguous_format)
        for piece in self._matrix.tensor_split(pieces, dim=1 if self._wide else 0):
            # Rows times a matrix run along its memory: faster than its transpose times columns.
            if self._wide:
                image = (block.mT @ piece).mT
                back.addmm_(piece, image)
            else:
                image = piece @ block
                back.addmm_(image.mT, piece)
            images.append(image)
        return torch.cat(images), back if self._wide else back.mT


def _space(a: _Operator, start: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A basis of the Krylov space, A times it, and A'A times it, the latter two times the scale."""
    image, back = a.there_and_back(start * scale)
    block = torch.linalg.qr(back - start @ (start.mT @ back))[0]
    # What rounding left of the first block: where much has to go, the vectors become shorter than 1, and
    # give less than they could, but never more than there is.
    block = block - start @ (start.mT @ block)
    second, second_back = a.there_and_back(block * scale)
    return torch.cat([start, block], 1), torch.cat([image, second], 1), torch.cat([back, second_back], 1)


def _real(matrix: Tensor) -> Tensor:
    """A complex matrix as the real one with the same singular values, each twice."""
    if not matrix.is_complex():
        return matrix
    re, im = matrix.real, matrix.imag
    return torch.cat([torch.cat([re, -im], 1), torch.cat([im, re], 1)])


def ritz(matrices: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest eigenvalue of small symmetric matrices, and vectors that span the largest ones' space.

    Args:
        matrices: Shape [layers, n, n].
        count: How many vectors; the first one is that of the largest eigenvalue.

    Returns:
        Eigenvalues [layers] (NaN for a matrix that is not finite) and vectors [layers, n, count].
    """
    finite = matrices.sum((1, 2)).isfinite()
    on_host = matrices.device.type == "cpu"
    if not on_host or not finite.all():
        eye = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
        matrices = torch.where(finite[:, None, None], matrices, eye)
    if on_host:
        values, vectors = torch.linalg.eigh(matrices)
        largest, vectors = values[:, -1], vectors.flip(-1)[:, :, :count]
    else:
        largest, vectors = ritz_by_squaring(matrices, count)
    return torch.where(finite, largest.clamp(min=0), math.nan), vectors


def ritz_by_squaring(matrices: Tensor, count: int, squarings: int = 20) -> tuple[Tensor, Tensor]:
    """As `ritz`, without an eigensolver, which would make the host wait for the device.

    T^(2^20) is, scaled, the projection on the eigenspace of the largest eigenvalue: of others, only those
    within 1e-6 of it are left.
    """

    def scaled(power: Tensor) -> Tensor:
        trace = power.diagonal(dim1=1, dim2=2).sum(1)
        return power / torch.where(trace > 0, trace, torch.ones_like(trace))[:, None, None]

    power = few = scaled(matrices)
    for i in range(squarings):
        power = scaled(power @ power)
        few = power if i == 2 else few
    place = power.diagonal(dim1=1, dim2=2).argmax(1)
    top = power.gather(2, place[:, None, None].expand(-1, power.shape[1], 1))
    # The others need only span what is large: columns of a lower power do.
    vectors = torch.linalg.qr(torch.cat([top, few[:, :, : count - 1]], 2))[0]
    first = vectors[:, :, :1]
    largest = (first.mT @ matrices @ first).flatten()
    return largest, vectors
