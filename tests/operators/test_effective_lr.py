from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from streamlens import observe
from streamlens.errors import StreamlensError
from streamlens.frame import Frame
from streamlens.operators import effective_lr, every, norm
from streamlens.operators._summaries import STATISTICS, masked_summary, summary_without_zeros
from tests.helpers.by_hand import regression, snapshot, squared_error
from tests.operators.support import ragged, run


def by_numpy(update: Tensor, gradient: Tensor) -> dict[str, float]:
    u, g = update.double().numpy().ravel(), gradient.double().numpy().ravel()
    rates = -u[g != 0] / g[g != 0]
    return {
        "mean": float(rates.mean()),
        "median": float(np.median(rates)),
        "var": float(rates.var(ddof=1)),
        "norm": float(np.sqrt((rates**2).sum())),
        "zero_gradients": float((g == 0).sum()),
    }


def given(update: Tensor, gradient: Tensor, *statistics: str) -> dict[str, float]:
    frames = [ragged(0, {"a": update}, "weight_updates"), ragged(0, {"a": gradient}, "weight_gradients")]
    return {
        f.topic.removeprefix("effective_lr_"): float(f["a"]) for f in run(effective_lr(*statistics), frames)
    }


def test_equals_numpy_and_leaves_zero_gradients_out_and_counts_them() -> None:
    g = torch.Generator().manual_seed(0)
    update, gradient = torch.randn(4, 6, generator=g), torch.randn(4, 6, generator=g)
    gradient[1, :3] = 0
    assert given(update, gradient, *STATISTICS) == pytest.approx(by_numpy(update, gradient), rel=1e-5)
    assert set(given(update, gradient)) == {"median", "zero_gradients"}


def test_elements_are_paired_by_place_and_not_by_memory() -> None:
    update = torch.arange(1.0, 7.0).reshape(2, 3)
    gradient = update.T.contiguous().T
    assert given(update, -gradient, "mean", "var") == {"mean": 1.0, "var": 0.0, "zero_gradients": 0.0}


def test_scale_law_and_edge_cases() -> None:
    g = torch.Generator().manual_seed(0)
    update, gradient = torch.randn(9, generator=g), torch.randn(9, generator=g)
    once, scaled = given(update, gradient), given(6 * update, 2 * gradient)
    assert scaled["median"] == pytest.approx(3 * once["median"], rel=1e-6)
    nothing = given(torch.zeros(3), torch.zeros(3), *STATISTICS)
    assert nothing["zero_gradients"] == 3
    assert math.isnan(nothing["mean"])
    assert math.isnan(nothing["median"])
    assert nothing["norm"] == 0
    bad = given(torch.tensor([math.nan, 1.0]), torch.ones(2), *STATISTICS)
    assert all(math.isnan(bad[name]) for name in STATISTICS)
    empty = given(torch.empty(0), torch.empty(0), "median")
    assert math.isnan(empty["median"])


@pytest.mark.parametrize("count", [0, 1, 2, 7, 8])
def test_the_way_that_never_waits_for_a_device_gives_the_same(count: int) -> None:
    g = torch.Generator().manual_seed(count)
    values, mask = torch.randn(12, generator=g), torch.ones(12, dtype=torch.bool)
    mask[torch.randperm(12, generator=g)[:count]] = False
    direct, (zeros,) = summary_without_zeros([values], [(~mask).float()], STATISTICS)
    assert int(zeros) == 12 - count
    masked = masked_summary(values, mask, STATISTICS)
    for name in STATISTICS:
        assert float(masked[name]) == pytest.approx(float(direct[name][0]), rel=1e-5, nan_ok=True), name
    values[~mask] = math.nan
    if count:
        assert all(math.isnan(v) for v in masked_summary(values, mask, STATISTICS).values())


@pytest.mark.parametrize("of", ["weights", "biases", "parameters"])
def test_on_a_lens_plain_gradient_descent_gives_its_learning_rate(of: str) -> None:
    torch.manual_seed(0)
    model, out = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), list[Frame]()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.25)
    with observe(model, on_error="raise") as lens:
        lens.pipe(every(2), effective_lr("median", of=of)).subscribe(out.append)
        for batch in regression(0, 3, (5, 3), 2):
            optimizer.zero_grad()
            squared_error(model, batch).backward()
            optimizer.step()
    rates = [f for f in out if "median" in f.topic]
    assert [f.step for f in rates] == [0, 2]
    assert rates[0].topic == "effective_lr_median" + ("" if of == "weights" else f".{of}")
    for frame in rates:
        assert frame.to_dict() == pytest.approx(dict.fromkeys(frame.layers, 0.25), rel=1e-3)


def test_with_adam_it_is_what_its_state_says() -> None:
    torch.manual_seed(0)
    model, out = nn.Linear(3, 4), list[Frame]()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, eps=1e-8)
    with observe(model, on_error="raise") as lens:
        lens.pipe(effective_lr("median", "mean")).subscribe(out.append)
        for t, batch in enumerate(regression(0, 4, (5, 3), 4), start=1):
            optimizer.zero_grad()
            squared_error(model, batch).backward()
            before, gradient = snapshot(model)["weight"], model.weight.grad
            assert gradient is not None
            optimizer.step()
            state = optimizer.state[model.weight]
            m, v = state["exp_avg"] / (1 - 0.9**t), state["exp_avg_sq"] / (1 - 0.999**t)
            wanted = (0.01 * m / (v.sqrt() + 1e-8) / gradient).double()
            # The weights' own rounding is the limit.
            blur = float(((before.abs().max() * 1.2e-7) / gradient.abs()).max())
            got = {f.topic: float(f[""]) for f in out[-3:]}
            assert got["effective_lr_median"] == pytest.approx(float(np.median(wanted)), abs=blur)
            assert got["effective_lr_mean"] == pytest.approx(float(wanted.mean()), abs=blur)


def test_bad_arguments_and_numbers_are_named() -> None:
    with pytest.raises(ValueError, match="unknown statistic 'medain': did you mean 'median'"):
        effective_lr("medain")
    with pytest.raises(ValueError, match=r"effective_lr\(of='weight'\): did you mean 'weights'"):
        effective_lr(of="weight")
    model = nn.Linear(2, 2)
    with observe(model) as lens, pytest.raises(StreamlensError, match="was not selected before"):
        lens.pipe(norm("weights"), effective_lr())
    numbers = [Frame(t, 0, ("a",), torch.ones(1)) for t in ("weight_updates", "weight_gradients")]
    with pytest.raises(StreamlensError, match=r"effective_lr\(\) needs whole tensors"):
        run(effective_lr(), numbers)
