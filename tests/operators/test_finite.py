"""`FiniteProbe` against NumPy, and where in a large tensor it looks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import streamlens as sl
from streamlens.frame import Frame
from streamlens.operators._finite import SAMPLED, FiniteProbe
from streamlens.operators.statistics import reduction_operator


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.cfloat])
@pytest.mark.parametrize("size", [5, SAMPLED + 1])
def test_one_tensor_alone_gives_what_it_gives_among_others(dtype: torch.dtype, size: int) -> None:
    tensor = torch.ones(size, dtype=dtype)
    assert FiniteProbe().reduce_one(tensor).item() == 0
    if dtype is not torch.int64:
        tensor[0] = torch.nan
        assert FiniteProbe().reduce_one(tensor).isnan()


def test_finite_outputs_are_told_of_only_at_first_and_after_others() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    seen: list[Frame] = []
    with sl.observe(model) as lens:
        lens.pipe(reduction_operator(FiniteProbe(), "activations", "finite_probe")).subscribe(seen.append)
        for step in range(12):
            batch = torch.full((2, 3), torch.inf if step == 6 else 1.0)
            model(batch).sum().backward()
            optimizer.zero_grad()
            optimizer.step()
    assert [frame.step for frame in seen] == [0, 1, 2, 6, 7, 8]
    assert [any(value.isnan() for _, value in frame.items()) for frame in seen] == [
        step == 6 for step in (0, 1, 2, 6, 7, 8)
    ]
    assert all(frame.layers == ("0", "1") for frame in seen)
