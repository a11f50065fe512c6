"""`hessian_trace`: against the exact trace, its error against the exact variance."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from reactivex.subject import Subject
from torch import Tensor, nn

import streamlens as sl
from streamlens.frame import Frame
from streamlens.operators import hessian_trace
from tests.helpers.curvature import classification, exact_hessian, nets
from tests.helpers.recording import observed, record

LOSS = nn.CrossEntropyLoss()
NETS = nets()
BATCH = classification((6,))


def taken(model: nn.Module, **options: Any) -> Frame:
    source: Subject[Frame] = Subject()
    got: list[Frame] = []
    source.pipe(hessian_trace(model=model, **{"loss": LOSS, "batch": BATCH, **options})).subscribe(got.append)
    source.on_next(Frame("when", 3, ("",), torch.zeros(1), epoch=1))
    (frame,) = got
    assert (frame.topic, frame.step, frame.epoch) == ("hessian_trace", 3, 1)
    assert frame.components == ("trace", "standard_error")
    return frame


def numbers(frame: Frame) -> tuple[float, float]:
    assert isinstance(frame.values, Tensor)
    assert frame.values.shape == (1, 2)
    trace, error = frame.values[0].tolist()
    return trace, error


@pytest.mark.parametrize("net", NETS)
def test_the_exact_trace_lies_within_a_few_standard_errors(net: str) -> None:
    model, batch = NETS[net]
    trace, error = numbers(taken(model, batch=batch, probes=20))
    exact = float(exact_hessian(model, LOSS, batch).trace())
    # With 19 degrees of freedom, five standard errors are missed once in ten thousand times.
    assert abs(trace - exact) <= 5 * error + 1e-5
    if net == "linear":
        assert error == 0


def test_with_no_more_parameters_than_probes_it_is_exact() -> None:
    model, batch = NETS["linear"]
    frame = taken(model, batch=batch, probes=15)
    matrix = exact_hessian(model, LOSS, batch)
    trace, error = numbers(frame)
    assert trace == pytest.approx(float(matrix.trace()), rel=1e-5)
    assert error == 0
    assert frame.meta["products"] == len(matrix) == 15


def test_the_standard_error_is_that_of_the_off_diagonal_elements() -> None:
    model, batch = NETS["tanh"]
    matrix = exact_hessian(model, LOSS, batch)
    off = matrix - matrix.diag().diag()
    for probes in (20, 100):
        expected = math.sqrt(2 * float(off.square().sum()) / probes)
        assert numbers(taken(model, batch=batch, probes=probes))[1] == pytest.approx(expected, rel=0.3)


def test_it_is_unbiased_over_seeds() -> None:
    model, batch = NETS["tanh"]
    matrix = exact_hessian(model, LOSS, batch)
    off = matrix - matrix.diag().diag()
    traces = [numbers(taken(model, batch=batch, probes=5, seed=seed))[0] for seed in range(30)]
    error = math.sqrt(2 * float(off.square().sum()) / 150)
    assert abs(sum(traces) / 30 - float(matrix.trace())) < 4 * error
    assert len(set(traces)) == 30


def test_a_diagonal_hessian_is_known_exactly_from_any_probe() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(50))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.w

    x = torch.arange(50.0)
    square = {"batch": (x, None), "loss": lambda out, _: out.square().sum() / 2}
    trace, error = numbers(taken(Scaled(), probes=2, **square))
    assert trace == pytest.approx(float(x.square().sum()))
    assert error == 0


def test_on_a_lens_with_chosen_parameters_and_several_batches() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    batches = [BATCH, classification((6,), examples=4, seed=2)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    exact = []
    with observed(model) as lens:
        chain = hessian_trace(loss=LOSS, batches=batches, parameters="2.*", probes=20)
        frames = record(lens, sl.every(2), chain)
        for step in range(3):
            optimizer.zero_grad()
            LOSS(model(BATCH[0]), BATCH[1]).backward()
            optimizer.step()
            if step % 2 == 0:
                block = exact_hessian(model, LOSS, *batches, names=["2.weight", "2.bias"])
                exact.append(float(block.trace()))
    assert [f.step for f in frames] == [0, 2]
    assert [numbers(f)[0] for f in frames] == pytest.approx(exact, rel=1e-5)


def test_the_probes_are_the_same_each_time_and_no_generator_moves() -> None:
    model, batch = NETS["relu"]
    state = torch.get_rng_state()
    assert numbers(taken(model, batch=batch)) == numbers(taken(model, batch=batch))
    assert torch.equal(torch.get_rng_state(), state)


def test_nan_weights_give_nan() -> None:
    model = nn.Linear(6, 30)
    with torch.no_grad():
        model.bias[0] = torch.nan
    assert all(map(math.isnan, numbers(taken(model))))


@pytest.mark.parametrize("probes", [1, 2.0, True])
def test_too_few_probes_for_an_error_are_refused(probes: Any) -> None:
    with pytest.raises(ValueError, match=r"hessian_trace\(probes=.*from 2 on, for a standard error"):
        hessian_trace(loss=LOSS, batch=BATCH, probes=probes)


def test_wrong_arguments_and_models_name_the_operator() -> None:
    with pytest.raises(TypeError, match=r"hessian_trace\(loss='mse'\)"):
        hessian_trace(loss="mse", batch=BATCH)  # type: ignore[arg-type]
    with pytest.raises(sl.StreamlensError, match=r"hessian_trace\(\): the model has no trainable parameters"):
        Subject().pipe(hessian_trace(loss=LOSS, batch=BATCH, model=nn.ReLU()))
    with pytest.raises(sl.StreamlensError, match=r"hessian_trace\(\) needs the model"):
        Subject().pipe(hessian_trace(loss=LOSS, batch=BATCH))
