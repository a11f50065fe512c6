"""`FiniteProbe` against NumPy, and where in a large tensor it looks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from streamlens.operators._finite import SAMPLED, FiniteProbe


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (0,), (1,), (7, 3), (SAMPLED,)])
@pytest.mark.parametrize("wrong", [None, torch.nan, torch.inf, -torch.inf])
def test_is_nan_exactly_where_something_of_a_small_tensor_is_not_finite(
    dtype: torch.dtype, shape: tuple[int, ...], wrong: float | None
) -> None:
    tensor = torch.full(shape, torch.finfo(dtype).max / 2, dtype=dtype)
    if wrong is not None and tensor.numel():
        tensor.view(-1)[tensor.numel() // 2] = wrong
    finite = bool(np.isfinite(tensor.double().numpy()).all())
    (value,) = FiniteProbe().reduce([tensor]).tolist()
    assert value == 0 if finite else np.isnan(value)


@pytest.mark.parametrize("examples", [1, 2, 7, 128, 512])
def test_looks_at_every_example_of_a_large_batch(examples: int) -> None:
    for bad in {0, examples // 2, examples - 1}:
        for width in (-(-4 * SAMPLED // examples), SAMPLED // examples + 1):
            batch = torch.zeros(examples, width)
            batch[bad] = torch.nan
            assert FiniteProbe().reduce([batch]).isnan().all()


def test_looks_at_no_more_than_it_says() -> None:
    batch = torch.zeros(128, 1000)
    batch[:, 500] = torch.nan
    assert FiniteProbe().reduce([batch, torch.ones(3)]).shape == (2,)
    tensor = torch.zeros(SAMPLED * 100)
    tensor.view(-1, 1600)[:, 16:] = torch.nan
    assert FiniteProbe().reduce([tensor]).tolist() == [0.0]


def test_integers_and_complex_numbers_and_strides_are_no_hindrance() -> None:
    assert FiniteProbe().reduce([torch.arange(5), torch.ones(3, dtype=torch.cfloat)]).tolist() == [0, 0]
    image = torch.zeros(4, 3, 8, 8).to(memory_format=torch.channels_last)
    image[2, 1] = torch.inf
    assert FiniteProbe().reduce([image]).isnan().all()


def test_a_whole_is_finite_where_its_parts_are() -> None:
    parts = [torch.tensor([0.0, 0.0]), torch.tensor([0.0, torch.nan])]
    assert str(FiniteProbe().merge(parts).tolist()) == "[0.0, nan]"
