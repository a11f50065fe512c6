"""Lanczos: against the dense decomposition, where eigenvalues repeat too."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from streamlens.operators._lanczos import RitzPairs, Which, lanczos, random_vector


def with_spectrum(spectrum: list[float], seed: int = 0) -> Tensor:
    """A symmetric matrix in float64 with these eigenvalues."""
    n = len(spectrum)
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator))
    matrix: Tensor = basis * torch.tensor(spectrum, dtype=torch.float64) @ basis.T
    return matrix


def found(matrix: Tensor, k: int, which: Which = "largest", **options: Any) -> RitzPairs:
    generator = torch.Generator().manual_seed(1)
    settings: dict[str, Any] = {"most": 40, "tolerance": 1e-3, **options}
    start = random_vector(matrix[0], generator)
    return lanczos(lambda v: matrix @ v, start, k, which=which, generator=generator, **settings)


def bulk(n: int, seed: int = 0) -> list[float]:
    values: list[float] = torch.rand(n, generator=torch.Generator().manual_seed(seed)).tolist()
    return values


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "outliers",
    [[10, 7, 5, 3, 2], [10, 10, 5, 3, 2], [10, 7, 5, 5, 5, 3], [10, 10, 10, 2, 2], [4, 3.99, 3.98, 3, 2]],
)
def test_outliers_above_a_bulk_come_as_often_as_they_are_there(
    outliers: list[float], dtype: torch.dtype
) -> None:
    pairs = found(with_spectrum([*outliers, *bulk(300)]).to(dtype), 5)
    assert pairs.values.tolist() == pytest.approx(outliers[:5], rel=1e-3)
    assert pairs.converged == 5
    assert pairs.confirmed
    assert pairs.products <= 40


def test_what_is_easy_takes_fewer_products_than_it_may() -> None:
    assert found(with_spectrum([100, 90, *bulk(300)]), 2).products < 20


@pytest.mark.parametrize(("matrix", "value"), [(torch.zeros(80, 80), 0.0), (torch.eye(80) * 3, 3.0)])
def test_a_matrix_that_only_scales_is_known_after_k_and_one_more(matrix: Tensor, value: float) -> None:
    pairs = found(matrix, 5)
    assert pairs.values.tolist() == pytest.approx([value] * 5)
    assert (pairs.products, pairs.converged) == (6, 5)
    torch.testing.assert_close(pairs.vectors @ pairs.vectors.T, torch.eye(5), atol=1e-5, rtol=0)


@given(
    st.lists(st.sampled_from([-4.0, -1.0, 0.0, 0.5, 2.0, 2.0 + 1e-6, 8.0]), min_size=1, max_size=12),
    st.integers(0, 3),
    st.sampled_from(["largest", "smallest", "magnitude"]),
    st.data(),
)
def test_with_as_many_products_as_dimensions_it_is_the_whole_decomposition(
    spectrum: list[float], seed: int, which: Which, data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, len(spectrum)))

    def key(value: float) -> float:
        return {"largest": -value, "smallest": value, "magnitude": -abs(value)}[which]

    pairs = found(with_spectrum(spectrum, seed), k, which, most=len(spectrum))
    wanted = [key(v) for v in sorted(spectrum, key=key)[:k]]
    assert [key(v) for v in pairs.values.tolist()] == pytest.approx(wanted, abs=2e-6)


@given(st.floats(1e-6, 1e6), st.integers(0, 5))
def test_eigenvalues_scale_with_the_matrix_and_products_do_not(factor: float, seed: int) -> None:
    matrix = with_spectrum([9, 6, 4, *bulk(60, seed)], seed)
    plain, scaled = found(matrix, 3), found(factor * matrix, 3)
    assert scaled.values.tolist() == pytest.approx((factor * plain.values).tolist(), rel=1e-6)
    assert scaled.products == plain.products


def test_residuals_are_those_of_the_vectors_given() -> None:
    matrix = with_spectrum([9, 6, 4, *bulk(100)])
    pairs = found(matrix, 3, most=8)
    residuals = pairs.vectors @ matrix - pairs.values[:, None] * pairs.vectors
    assert pairs.residuals == pytest.approx(residuals.norm(dim=1).tolist(), rel=1e-6, abs=1e-12)
    assert pairs.converged == sum(r <= 1e-3 * v for r, v in zip(pairs.residuals, (9, 6, 4), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("repeated", [5, 10])
def test_an_eigenvalue_that_often_needs_more_products_and_fewer_say_so(
    repeated: int, dtype: torch.dtype
) -> None:
    matrix = with_spectrum([10.0] * repeated + bulk(200)).to(dtype)
    for most in (5, 12, 20, 30, 40, 100):
        pairs = found(matrix, 5, most=most)
        if pairs.confirmed:
            assert pairs.values.tolist() == pytest.approx([10] * 5, rel=1e-3)
        if most < 12:
            assert not pairs.confirmed
    assert pairs.confirmed
    assert pairs.values.tolist() == pytest.approx([10] * 5, rel=1e-3)
    assert pairs.converged == 5


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_product_that_is_not_finite_ends_it_in_nan(bad: float) -> None:
    matrix = torch.eye(50)
    matrix[3, 3] = bad
    pairs = found(matrix, 2)
    assert all(map(math.isnan, [*pairs.values.tolist(), *pairs.residuals]))
    assert pairs.vectors.isnan().all()
    assert (pairs.converged, pairs.confirmed, pairs.products) == (0, False, 1)
