from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from reactivex.subject import Subject
from torch import Tensor, nn

from streamlens import observe
from streamlens.errors import StreamlensError
from streamlens.frame import Frame
from streamlens.operators import every, gradient_snr
from streamlens.operators._gradients import GradientState
from tests.helpers.by_hand import regression, squared_error
from tests.operators.support import chain_of, ragged, resumed, run


def by_numpy(gradients: list[Tensor], decay: float) -> float:
    """Mean over elements of |weighted mean| / unbiased weighted standard deviation."""
    x = torch.stack(gradients).double().numpy().reshape(len(gradients), -1)
    w = decay ** np.arange(len(x))[::-1]
    w = w / w.sum()
    mean = (w[:, None] * x).sum(0)
    variance = (w[:, None] * (x - mean) ** 2).sum(0) / (1 - (w**2).sum())
    moving = variance > 0
    return float((np.abs(mean[moving]) / np.sqrt(variance[moving])).mean())


def gradients(steps: int, offset: float = 0.5) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(4, 5, generator=g) + offset for _ in range(steps)]


def stream_of(values: list[Tensor]) -> list[Frame]:
    return [ragged(step, {"a": g}, "weight_gradients") for step, g in enumerate(values)]


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("offset", [0.0, 1.0, 1000.0])
def test_equals_the_weighted_moments_written_out(decay: float, offset: float) -> None:
    values = gradients(8, offset)
    out = run(gradient_snr(decay), stream_of(values))
    assert [f.step for f in out] == list(range(1, 8))
    for frame in out:
        wanted = by_numpy(values[: frame.step + 1], decay)
        assert float(frame["a"]) == pytest.approx(wanted, rel=1e-4 if offset < 100 else 1e-2)


def test_scaling_changes_nothing_and_elements_that_do_not_vary_are_left_out() -> None:
    values = gradients(5)
    for value in values:
        value[0] = 0
    once = [float(f["a"]) for f in run(gradient_snr(), stream_of(values))]
    assert once[-1] == pytest.approx(by_numpy(values, 0.9), rel=1e-4)
    scaled = run(gradient_snr(), stream_of([v * 1e-6 for v in values]))
    assert [float(f["a"]) for f in scaled] == pytest.approx(once, rel=1e-3)
    still = run(gradient_snr(), stream_of([torch.zeros(3)] * 3))
    assert all(math.isnan(f["a"]) for f in still)


def test_noise_alone_stays_at_what_the_documentation_says() -> None:
    g = torch.Generator().manual_seed(0)
    values = [torch.randn(2000, generator=g) for _ in range(60)]
    assert float(run(gradient_snr(), stream_of(values))[-1]["a"]) == pytest.approx(0.2, abs=0.05)


def test_a_gradient_that_is_not_finite_is_left_out_whole_and_counted() -> None:
    values = gradients(5)
    bad = values[2].clone()
    bad[1, 1] = math.nan
    source: Subject[Frame] = Subject()
    out: list[Frame] = []
    chain = chain_of(source.pipe(gradient_snr()), out.append)
    for frame in stream_of([*values[:2], bad, *values[2:]]):
        source.on_next(frame)
    assert float(out[-1]["a"]) == pytest.approx(by_numpy(values, 0.9), rel=1e-4)
    assert sum(cell.skipped for cell in chain.cells) == 1


def test_the_way_that_never_waits_for_a_device_gives_the_same() -> None:
    source: Subject[Frame] = Subject()
    first = chain_of(source.pipe(gradient_snr()), lambda _: None).cells[0]
    assert isinstance(first, GradientState)
    values = gradients(5)
    values[2] = values[2] * math.nan
    for value in values:
        source.on_next(ragged(0, {"a": value}, "weight_gradients"))
    by_branch = first.state_dict()
    again: Subject[Frame] = Subject()
    other = chain_of(again.pipe(gradient_snr()), lambda _: None).cells[0]
    assert isinstance(other, GradientState)
    other.fit({"a": values[0]})
    for value in values:
        other.take_where({"a": value}, {"a": value.isfinite().all()})
    for key, held in other.state_dict().items():
        assert torch.equal(held["a"], by_branch[key]["a"]), key


def test_on_a_lens_every_gradient_counts_whatever_the_cadence() -> None:
    torch.manual_seed(0)
    model, out, taken = nn.Linear(3, 4), list[Frame](), list[Tensor]()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with observe(model, on_error="raise") as lens:
        lens.pipe(every(3), gradient_snr(of="biases")).subscribe(out.append)
        for batch in regression(0, 7, (5, 3), 4):
            optimizer.zero_grad()
            squared_error(model, batch).backward()
            assert model.bias.grad is not None
            taken.append(model.bias.grad.clone())
            optimizer.step()
    assert [(f.step, f.topic) for f in out] == [(3, "gradient_snr.biases"), (6, "gradient_snr.biases")]
    for frame in out:
        assert float(frame[""]) == pytest.approx(by_numpy(taken[: frame.step + 1], 0.9), rel=1e-4)


def test_resumed_equals_uninterrupted_to_the_bit() -> None:
    frames = stream_of(gradients(6))
    whole = [f.to_dict() for f in run(gradient_snr(), frames)]
    assert [f.to_dict() for f in resumed(gradient_snr, frames, 3)] == whole


def test_bad_arguments_and_numbers_are_named() -> None:
    with pytest.raises(ValueError, match=r"gradient_snr\(1\): the decay"):
        gradient_snr(1)
    with pytest.raises(ValueError, match=r"gradient_snr\(of='bias'\): did you mean 'biases'"):
        gradient_snr(of="bias")
    with pytest.raises(StreamlensError, match=r"gradient_snr\(\) needs whole tensors"):
        run(gradient_snr(), [Frame("weight_gradients", 0, ("a",), torch.ones(1))])
