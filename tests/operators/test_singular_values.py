from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from streamlens import observe
from streamlens.errors import StreamlensError
from streamlens.frame import Frame
from streamlens.operators import condition_number, effective_rank, norm, singular_values
from streamlens.stream import Operator
from tests.operators.support import ragged, run

SHAPES = st.tuples(st.integers(1, 7), st.integers(1, 7))


def spectrum(tensor: Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """The singular values as roots of the eigenvalues of the smaller product with the transpose."""
    matrix = tensor.double().numpy().reshape(tensor.shape[0], -1)
    return np.linalg.svd(matrix, compute_uv=False)


def value(operator: Operator, tensor: Tensor) -> float:
    (only,) = run(operator, [ragged(0, {"a": tensor}, "weights")])
    return float(only["a"])


@given(SHAPES, st.integers(0, 1000))
def test_equal_numpys_decomposition(shape: tuple[int, int], seed: int) -> None:
    tensor = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    s = spectrum(tensor)
    (frame,) = run(singular_values(3), [ragged(0, {"a": tensor}, "weights")])
    wanted = [*s[:3], *[math.nan] * (3 - min(3, len(s)))]
    assert frame["a"].tolist() == pytest.approx(wanted, rel=1e-5, nan_ok=True)
    assert value(condition_number(), tensor) == pytest.approx(float(s[0] / s[-1]), rel=1e-4)
    p = s / s.sum()
    assert value(effective_rank(), tensor) == pytest.approx(float(np.exp(-(p * np.log(p)).sum())), rel=1e-5)


@given(SHAPES, st.sampled_from([1e-20, 0.5, -8.0, 1e12]))
def test_scaling_scales_the_values_and_leaves_the_numbers_without_unit(
    shape: tuple[int, int], c: float
) -> None:
    tensor = torch.randn(*shape, generator=torch.Generator().manual_seed(3))
    assert value(singular_values(1), c * tensor) == pytest.approx(
        abs(c) * value(singular_values(1), tensor), rel=1e-5
    )
    for operator in (condition_number(), effective_rank()):
        assert value(operator, c * tensor) == pytest.approx(value(operator, tensor), rel=1e-3)


def test_known_spectra() -> None:
    assert value(effective_rank(), 5 * torch.eye(6)) == pytest.approx(6.0)
    assert value(effective_rank(), torch.diag(torch.tensor([2.0, 0.0, 0.0]))) == pytest.approx(1.0)
    assert value(condition_number(), torch.diag(torch.tensor([8.0, 4.0, 2.0]))) == pytest.approx(4.0)
    assert value(condition_number(), torch.ones(3, 3)) == math.inf
    kernel = torch.randn(4, 2, 3, 3)
    assert value(singular_values(1), kernel) == pytest.approx(float(spectrum(kernel)[0]), rel=1e-5)


@pytest.mark.parametrize("operator", [condition_number(), effective_rank()])
def test_a_vector_has_one_and_zeros_nothing_and_nan_have_none(operator: Operator) -> None:
    assert value(operator, torch.tensor([3.0, 4.0])) == pytest.approx(1.0)
    for tensor in (torch.zeros(3, 2), torch.empty(0, 3), torch.tensor([[math.nan, 1.0], [0.0, 1.0]])):
        assert math.isnan(value(operator, tensor))


def test_names_and_components() -> None:
    (frame,) = run(singular_values(2), [ragged(0, {"a": torch.eye(3)}, "weights")])
    assert (frame.topic, frame.components) == ("weights.singular_values", ("sigma_1", "sigma_2"))
    for operator, name in ((condition_number(), "condition_number"), (effective_rank(), "effective_rank")):
        assert run(operator, [ragged(0, {"a": torch.eye(3)}, "weights")])[0].topic == f"weights.{name}"


def test_on_a_lens_they_are_pushed_down_and_computed_once() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    first, second = list[Frame](), list[Frame]()
    with observe(model, on_error="raise") as lens:
        lens.pipe(effective_rank("weights")).subscribe(first.append)
        lens.pipe(effective_rank("weights")).subscribe(second.append)
        model(torch.randn(2, 4)).sum().backward()
        optimizer.step()
        assert first[0].values is second[0].values
    for i in (0, 1):
        s = spectrum(model.get_parameter(f"{i}.weight").detach())
        p = s / s.sum()
        assert float(first[0][str(i)]) == pytest.approx(float(np.exp(-(p * np.log(p)).sum())), rel=1e-5)


def test_bad_arguments_and_numbers_are_named() -> None:
    with pytest.raises(ValueError, match=r"singular_values\(0\): how many"):
        singular_values(0)
    with pytest.raises(ValueError, match=r"the topic comes second, as in singular_values\(10, 'weights'\)"):
        singular_values("weights")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"effective_rank\(\) takes topic names"):
        run(effective_rank(3), [])  # type: ignore[arg-type]
    model = nn.Linear(2, 2)
    with observe(model) as lens:
        for operator in (condition_number(), effective_rank(), singular_values(1)):
            with pytest.raises(StreamlensError, match="needs whole tensors"):
                lens.pipe(norm("weights"), operator)
    with pytest.raises(StreamlensError, match=r"'weights\.norm2' has numbers"):
        run(condition_number(), [Frame("weights.norm2", 0, ("a",), torch.ones(1))])
