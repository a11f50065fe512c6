"""`loss` and `loss_decrease`, against a loop by hand, SciPy and NumPy's polynomial fit."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reactivex.subject import Subject
from scipy.ndimage import gaussian_filter1d
from torch import nn

import streamlens as sl
from streamlens.frame import Frame, Kind
from tests.helpers.recording import observed, record
from tests.operators.support import frame, resumed, run, same


def numbers(frames: list[Frame]) -> dict[int, float]:
    return {f.step: float(f[""]) for f in frames}


def losses_of(values: list[float], *, start: int = 0, gap: int = 1) -> list[Frame]:
    return [frame(start + gap * i, {"": v}, "loss") for i, v in enumerate(values)]


def test_a_steps_loss_is_the_mean_of_its_micro_batches_before_they_are_divided() -> None:
    torch.manual_seed(0)
    model, criterion = nn.Linear(4, 3), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    wanted: list[float] = []
    with observed(model, loss=criterion) as lens:
        got, decrease = record(lens, sl.loss()), record(lens, sl.loss_decrease(2))
        for _ in range(3):
            parts = []
            for size in (5, 5, 2):
                value = criterion(model(torch.randn(size, 4)), torch.randint(0, 3, (size,)))
                parts.append(value.item())
                (value / 3).backward()
            optimizer.step()
            optimizer.zero_grad()
            wanted.append(float(np.mean(parts)))
    assert numbers(got) == pytest.approx(dict(enumerate(wanted)))
    assert {(f.topic, f.kind, f.layers) for f in got} == {("loss", Kind.STEP, ("",))}
    assert numbers(decrease) == pytest.approx(by_polyfit(wanted, 2), rel=1e-5)


def test_two_watched_losses_stay_apart() -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with observed(model) as lens:
        mse, l1 = lens.watch_loss(nn.functional.mse_loss), lens.watch_loss(nn.functional.l1_loss)
        got, decrease = record(lens, sl.loss()), record(lens, sl.loss_decrease(1))
        for _ in range(2):
            out = model(torch.ones(3, 2))
            (mse(out, torch.zeros(3, 2)) + l1(out, torch.zeros(3, 2))).backward()
            optimizer.step()
    assert [f.components for f in got] == [("mse_loss", "l1_loss")] * 2
    assert [f[""].shape for f in decrease] == [(2,)]


def test_a_plain_stream_averages_too_and_leaves_other_topics_out() -> None:
    frames = [
        frame(0, {"": 1.0}, "loss", kind=Kind.MICRO_STEP),
        frame(0, {"": 9.0}, "weights"),
        frame(0, {"": 2.0}, "loss", kind=Kind.MICRO_STEP, micro_step=1),
        frame(1, {"": 5.0}, "loss", kind=Kind.MICRO_STEP),
    ]
    assert numbers(run(sl.loss(), frames)) == {0: 1.5, 1: 5.0}


def test_a_loss_that_never_comes_is_reported_with_the_remedy() -> None:
    model = nn.Linear(2, 2)
    reports: list[Any] = []
    with sl.observe(model) as lens:
        lens.errors.subscribe(reports.append)
        lens.pipe(sl.loss_decrease()).subscribe(lambda _: None)
        for _ in range(2):
            model(torch.ones(1, 2)).sum().backward()
            torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert any("observe(model, loss=criterion)" in str(r.error) for r in reports)


def test_a_lens_of_another_topic_is_told_so() -> None:
    model = nn.Linear(2, 2)
    with sl.observe(model) as lens, pytest.raises(sl.UnknownTopicError, match="'loss' was not selected"):
        lens.pipe(sl.topic("weights"), sl.loss_decrease())


# -- the decrease ----------------------------------------------------------------------------


def by_polyfit(
    values: list[float], sigma: float, lag: int = 0, steps: list[int] | None = None
) -> dict[int, float]:
    """Minus the slope of NumPy's weighted fit of a line, at each step from the losses known `lag` later."""
    known = list(range(len(values))) if steps is None else steps
    reach = max(1, int(4 * sigma + 0.5))
    out: dict[int, float] = {}
    for at in known:
        near = [(r, v) for r, v in zip(known, values, strict=True) if -reach <= r - at <= min(lag, reach)]
        pairs = [(r, v) for r, v in near if math.isfinite(v)]
        if len(near) < 2:
            continue
        if len(pairs) < 2:
            out[at] = math.nan
            continue
        x, y = np.array(pairs).T
        # polyfit's weights multiply the residuals, which it squares.
        out[at] = -float(np.polyfit(x - at, y, 1, w=np.exp(-0.25 * ((x - at) / sigma) ** 2))[0])
    return out


@given(
    st.lists(st.floats(-10, 10), min_size=2, max_size=25),
    st.sampled_from([0.8, 2.0, 5.0]),
    st.integers(0, 3),
)
def test_equals_the_weighted_fit_of_a_line(values: list[float], sigma: float, lag: int) -> None:
    got = numbers(run(sl.loss_decrease(sigma, lag=lag), losses_of(values)))
    wanted = by_polyfit(values, sigma, lag)
    assert got.keys() == wanted.keys()
    assert all(math.isclose(got[s], wanted[s], rel_tol=1e-4, abs_tol=1e-5) for s in wanted)


def test_with_a_full_lag_it_is_minus_the_derivative_of_the_gaussian_smoothed_loss() -> None:
    rng = np.random.default_rng(0)
    curve = np.exp(-np.arange(120) / 40) + 0.1 * rng.standard_normal(120)
    got = numbers(run(sl.loss_decrease(3, lag=12), losses_of(curve.tolist())))
    wanted = -gaussian_filter1d(curve, 3, order=1)
    inner = range(12, 108)
    assert [got[s] for s in inner] == pytest.approx([float(wanted[s]) for s in inner], rel=3e-3, abs=1e-5)


@pytest.mark.parametrize("lag", [0, 5, 12])
def test_a_line_is_measured_exactly_at_either_end_and_across_gaps(lag: int) -> None:
    steps = [0, 1, 2, 3, 7, 8, 12, 13, 14, 20]
    frames = [frame(s, {"": 7.0 - 0.25 * s}, "loss") for s in steps]
    got = numbers(run(sl.loss_decrease(3, lag=lag), frames))
    assert got == pytest.approx(dict.fromkeys(steps if lag else steps[1:], 0.25), rel=1e-6)


def test_a_lag_gives_each_step_that_much_later_and_the_last_ones_at_the_end() -> None:
    source: Subject[Frame] = Subject()
    came: list[tuple[int, int]] = []
    now = [0]
    source.pipe(sl.loss_decrease(2, lag=3)).subscribe(lambda f: came.append((f.step, now[0])))
    for item in losses_of([5.0, 4.0, 3.5, 3.0, 2.8, 2.6]):
        now[0] = item.step
        source.on_next(item)
    now[0] = 99
    source.on_completed()
    # One step more: a plain stream tells by the next step's frame that a step is complete.
    assert came == [(0, 4), (1, 5), (2, 99), (3, 99), (4, 99), (5, 99)]


@given(st.lists(st.floats(-5, 5), min_size=3, max_size=12), st.sampled_from([0.25, -3.0]))
def test_scales_with_the_loss_and_ignores_its_offset(values: list[float], c: float) -> None:
    once = numbers(run(sl.loss_decrease(2), losses_of(values)))
    moved = numbers(run(sl.loss_decrease(2), losses_of([c * v + 8 for v in values])))
    assert moved == pytest.approx({s: c * v for s, v in once.items()}, rel=1e-4, abs=1e-5)


def test_nan_is_left_out_and_counted() -> None:
    values = [3.0, math.nan, 2.0, math.inf, 1.0, 0.5]
    got = numbers(run(sl.loss_decrease(2), losses_of(values)))
    wanted = by_polyfit(values, 2)
    assert all(same(got[s], wanted[s], rel=1e-5) for s in wanted)
    assert math.isnan(got[1])


@pytest.mark.parametrize("lag", [0, 4])
def test_a_resumed_run_goes_on_as_if_it_had_not_been_interrupted(lag: int) -> None:
    frames = losses_of([float(v) for v in np.random.default_rng(1).standard_normal(20)])
    whole = numbers(run(sl.loss_decrease(2, lag=lag), frames))
    assert numbers(resumed(lambda: sl.loss_decrease(2, lag=lag), frames, 9)) == whole


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0,), r"loss_decrease\(0\): sigma is a positive number"),
        ((math.inf,), "positive number"),
        ((True,), "positive number"),
    ],
)
def test_a_bad_sigma_is_named(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sl.loss_decrease(*arguments)


@pytest.mark.parametrize("lag", [-1, 9, 1.5, True])
def test_a_lag_beyond_the_kernel_is_named(lag: Any) -> None:
    with pytest.raises(ValueError, match=r"lag=.*from 0 to 4 sigma, here 8"):
        sl.loss_decrease(2, lag=lag)
