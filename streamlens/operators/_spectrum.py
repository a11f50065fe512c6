"""Singular values by exact decomposition, as reductions: a tensor is the matrix (out, rest)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from streamlens.operators._base import widened
from streamlens.reductions import Reduction

__all__ = [
    "ConditionNumber",
    "EffectiveRank",
    "SingularValues",
    "SpectralNorm",
    "StableRank",
    "directions_needed",
    "largest_by_gram",
    "matrix_of",
]


def matrix_of(tensor: Tensor) -> Tensor:
    """A tensor as a matrix: (out, -1); a vector as one column, a number as one row and column."""
    if hasattr(tensor, "to_local"):
        tensor = tensor.to_local()
    if tensor.layout is not torch.strided:
        tensor = tensor.to_dense()
    tensor = widened(tensor.resolve_conj())
    return tensor.reshape(tensor.shape[0], -1) if tensor.ndim and tensor.numel() else tensor.reshape(-1, 1)


def singular_values_of(tensor: Tensor, *, double: bool = True) -> Tensor:
    """All singular values, largest first; NaN throughout if an element is not finite."""
    matrix = matrix_of(tensor)
    if double:
        matrix = matrix.to(torch.complex128 if matrix.is_complex() else torch.float64)
    # A LAPACK driver raises, or never ends, on what is not finite; whether all is, is asked of one number.
    finite = matrix.abs().sum(dtype=None if matrix.is_complex() else torch.float64).isfinite()
    values: Tensor = torch.linalg.svdvals(torch.where(finite, matrix, torch.zeros_like(matrix)))
    return torch.where(finite, values, math.nan)


def largest_by_gram(matrices: Sequence[Tensor]) -> Tensor:
    """The largest singular value of each matrix through its smaller Gram matrix, in float64.

    Squaring costs half the digits of the small values and none of the largest.
    """
    grams: dict[int, list[tuple[int, Tensor]]] = {}
    for i, matrix in enumerate(matrices):
        wide = matrix.to(torch.complex128 if matrix.is_complex() else torch.float64)
        gram = wide @ wide.mH if wide.shape[0] <= wide.shape[1] else wide.mH @ wide
        grams.setdefault(gram.shape[0], []).append((i, gram))
    out: dict[int, Tensor] = {}
    for size, group in grams.items():
        stacked = torch.stack([gram for _, gram in group])
        if not size or stacked.shape[0] == 0:
            out.update({i: torch.zeros((), dtype=torch.float64, device=stacked.device) for i, _ in group})
            continue
        if size == 1:
            largest = stacked.real.flatten() if stacked.is_complex() else stacked.flatten()
        else:
            finite = stacked.abs().sum((1, 2)).isfinite()
            safe = torch.where(finite[:, None, None], stacked, torch.zeros_like(stacked))
            largest = torch.where(finite, torch.linalg.eigvalsh(safe)[:, -1], math.nan)
        out.update(zip((i for i, _ in group), largest.clamp(min=0).sqrt(), strict=True))
    return torch.stack([out[i] for i in range(len(matrices))]) if matrices else torch.empty(0)


def directions_needed(values: Tensor, share: float) -> Tensor:
    """How many eigenvalues of a covariance matrix, largest first, add up to a share of their sum.

    Args:
        values: The eigenvalues, largest first; those of no variance come out as rounding errors of
            either sign, and count as zeros.
        share: Of their sum, above 0 and at most 1.

    Returns:
        A whole number; 0 where nothing varies.
    """
    noise = len(values) * torch.finfo(values.dtype).eps * values[:1].sum()
    values = torch.where(values > noise, values, 0)
    total = values.sum()
    needed = (values.cumsum(0) < share * total).sum() + 1
    return torch.where(total > 0, needed.clamp(max=len(values)), 0)


@dataclass(frozen=True)
class SpectralNorm(Reduction):
    """The largest singular value, by a full decomposition."""

    @property
    def name(self) -> str:
        """`spectral_norm`."""
        return "spectral_norm"

    def reduce(self, tensors: Sequence[Tensor]) -> Tensor:
        """Each tensor's largest singular value; 0 for a tensor without elements."""
        return torch.stack([_first(singular_values_of(t, double=False)) for t in tensors])

    def describe(self) -> str:
        """As it is called."""
        return "spectral_norm(exact=True)"


@dataclass(frozen=True)
class StableRank(Reduction):
    """The squared Frobenius norm over the squared spectral norm, by a full decomposition."""

    @property
    def name(self) -> str:
        """`stable_rank`."""
        return "stable_rank"

    def reduce(self, tensors: Sequence[Tensor]) -> Tensor:
        """Each tensor's stable rank; NaN for a tensor of zeros."""
        spectra = [singular_values_of(t) for t in tensors]
        return torch.stack([(s / _first(s)).square().sum() if len(s) else _nan(s) for s in spectra])

    def describe(self) -> str:
        """As it is called."""
        return "stable_rank(exact=True)"


@dataclass(frozen=True)
class ConditionNumber(Reduction):
    """The largest singular value over the smallest."""

    @property
    def name(self) -> str:
        """`condition_number`."""
        return "condition_number"

    def reduce(self, tensors: Sequence[Tensor]) -> Tensor:
        """Each tensor's condition number; inf where it is singular to working precision."""
        return torch.stack([self._of(t) for t in tensors])

    @staticmethod
    def _of(tensor: Tensor) -> Tensor:
        values = singular_values_of(tensor)
        if not len(values):
            return _nan(values)
        largest, smallest = values[0], values[-1]
        # What rounding to the tensor's own precision can make of a zero (numpy.linalg.matrix_rank's bound).
        noise = largest * (max(matrix_of(tensor).shape) * torch.finfo(widened(tensor).dtype).eps)
        quotient = torch.where(smallest <= noise, math.inf, largest / smallest)
        return torch.where(largest == 0, math.nan, torch.where(largest.isnan(), largest, quotient))


@dataclass(frozen=True)
class EffectiveRank(Reduction):
    """The exponential of the entropy of the normalised singular values."""

    @property
    def name(self) -> str:
        """`effective_rank`."""
        return "effective_rank"

    def reduce(self, tensors: Sequence[Tensor]) -> Tensor:
        """Each tensor's effective rank; NaN for a tensor of zeros."""
        spectra = [singular_values_of(t) for t in tensors]
        shares = [s / s.sum() for s in spectra]
        # special.entr is 0 at 0, NaN at NaN.
        return torch.stack([torch.special.entr(p).sum().exp() if len(p) else _nan(p) for p in shares])


@dataclass(frozen=True)
class SingularValues(Reduction):
    """The largest singular values.

    Attributes:
        k: How many.
    """

    k: int = 1

    @property
    def name(self) -> str:
        """`singular_values`."""
        return "singular_values"

    @property
    def components(self) -> tuple[str, ...]:  # type: ignore[override] # follows from k
        """`sigma_1` to `sigma_k`."""
        return tuple(f"sigma_{i + 1}" for i in range(self.k))

    def reduce(self, tensors: Sequence[Tensor]) -> Tensor:
        """Each tensor's k largest; NaN where it has fewer."""
        rows = [singular_values_of(t)[: self.k] for t in tensors]
        return torch.stack([torch.cat([r, r.new_full((self.k - len(r),), math.nan)]) for r in rows])

    def describe(self) -> str:
        """As it is called."""
        return f"singular_values({self.k})"


def _first(values: Tensor) -> Tensor:
    return values[0] if len(values) else values.new_zeros(())


def _nan(like: Tensor) -> Tensor:
    return like.new_full((), math.nan)
