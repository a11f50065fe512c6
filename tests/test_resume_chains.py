"""Which chain gets which state back: ordinals, names, derived topics; and what is no snapshot."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from reactivex import operators as ops
from torch import nn

import streamlens as sl
from streamlens.chain import ErrorReport
from tests._runs import small_model

Chain = tuple[Any, ...]


def smoothed(lens: sl.Lens, into: list[float], **options: Any) -> None:
    lens.pipe(sl.norm("weights"), sl.ema(0.5)).subscribe(
        lambda frame: into.append(frame["0"].item()), **options
    )


def step(model: nn.Sequential, optimizer: torch.optim.Optimizer, count: int = 1) -> None:
    for _ in range(count):
        optimizer.zero_grad()
        model(torch.ones(2, 4)).square().sum().backward()
        optimizer.step()


def test_equal_plans_are_told_apart_by_an_ordinal() -> None:
    """The second chain began later, so that its state differs from the first one's."""
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    first: list[float] = []
    second: list[float] = []
    with sl.observe(model) as lens:
        smoothed(lens, first)
        step(model, optimizer, 2)
        smoothed(lens, second)
        step(model, optimizer, 2)
        assert first[-1] != second[-1]
        state = lens.state_dict()
        assert len(state["chains"]) == 2
    twin = copy.deepcopy(model)
    resumed: list[list[float]] = [[], []]
    with sl.observe(twin) as lens:
        for into in resumed:
            smoothed(lens, into)
        lens.load_state_dict(state)
        step(twin, torch.optim.SGD(twin.parameters(), lr=0.01))
    weight = twin.get_parameter("0.weight").detach().norm().item()
    assert resumed[0] == pytest.approx([0.5 * first[-1] + 0.5 * weight])
    assert resumed[1] == pytest.approx([0.5 * second[-1] + 0.5 * weight])


def test_a_name_keys_a_chain_whatever_the_order_of_subscription() -> None:
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    values: dict[str, list[float]] = {"a": [], "b": []}
    with sl.observe(model) as lens:
        smoothed(lens, values["a"], name="a")
        step(model, optimizer, 2)
        smoothed(lens, values["b"], name="b")
        step(model, optimizer, 2)
        state = lens.state_dict()
        assert set(state["chains"]) == {"a", "b"}
    twin = copy.deepcopy(model)
    resumed: dict[str, list[float]] = {"a": [], "b": []}
    with sl.observe(twin) as lens:
        lens.load_state_dict(state)
        for name in ("b", "a"):
            smoothed(lens, resumed[name], name=name)
        step(twin, torch.optim.SGD(twin.parameters(), lr=0.01))
    weight = twin.get_parameter("0.weight").detach().norm().item()
    for name in ("a", "b"):
        assert resumed[name] == pytest.approx([0.5 * values[name][-1] + 0.5 * weight])


def test_a_derived_topic_resumes_with_the_chain_that_makes_it() -> None:
    def run(interrupted: bool) -> list[float]:
        model = small_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        values: list[float] = []
        state = None
        for count in (3, 3) if interrupted else (6,):
            with sl.observe(model, start=0) as lens:
                lens.derive("smooth", lens.pipe(sl.norm("weights"), sl.ema(0.5)))
                lens.pipe(sl.topic("smooth"), sl.window(2)).subscribe(lambda f: values.append(f["0"].item()))
                if state is not None:
                    lens.load_state_dict(state)
                step(model, optimizer, count)
                state = lens.state_dict()
        return values

    assert run(interrupted=True) == run(interrupted=False)


def test_two_optimizers_resume_with_one_frame_a_step() -> None:
    """Which optimizers step together is part of what a run knows."""

    def run(interrupted: bool) -> list[tuple[int, tuple[str, ...]]]:
        model = small_model()
        optimizers = [torch.optim.SGD(part.parameters(), lr=0.01) for part in (model[0], model[2])]
        frames: list[tuple[int, tuple[str, ...]]] = []
        state = None
        for count in (3, 2) if interrupted else (5,):
            with sl.observe(model, start=0) as lens:
                lens.pipe(sl.norm("weight_updates")).subscribe(lambda f: frames.append((f.step, f.layers)))
                if state is not None:
                    lens.load_state_dict(state)
                for _ in range(count):
                    model.zero_grad()
                    model(torch.ones(2, 4)).square().sum().backward()
                    for optimizer in optimizers:
                        optimizer.step()
                state = lens.state_dict()
        return frames

    expected = run(interrupted=False)
    assert expected[-1] == (4, ("0", "2"))
    assert run(interrupted=True) == expected


def test_equal_plans_with_foreign_operators_warn_and_a_name_silences_it() -> None:
    model = small_model()
    with sl.observe(model) as lens:
        chain = lens.pipe(sl.norm("weights"), ops.map(lambda frame: frame), sl.ema(0.5))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            chain.subscribe(print)
            chain.subscribe(print, name="second")
        with pytest.warns(UserWarning, match=r"name=") as caught:
            chain.subscribe(print)
        assert caught[0].filename == __file__, "the warning points at the caller"


def test_a_name_that_another_chain_has_is_refused_until_that_one_is_disposed() -> None:
    model = small_model()
    with sl.observe(model) as lens:
        first = lens.pipe(sl.norm("weights"), sl.ema(0.5)).subscribe(print, name="mine")
        with pytest.raises(sl.StreamlensError, match=r"'mine'.*another name"):
            lens.pipe(sl.uw_ratio(), sl.ema(0.5)).subscribe(print, name="mine")
        first.dispose()
        lens.pipe(sl.uw_ratio(), sl.ema(0.5)).subscribe(print, name="mine")
        assert list(lens.state_dict()["chains"]) == ["mine"]


def test_a_snapshot_that_does_not_fit_a_chain_is_reported_and_the_chain_begins_afresh() -> None:
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with sl.observe(model) as lens:
        lens.pipe(sl.norm("weights"), sl.ema(0.5)).subscribe(print, name="mine")
        step(model, optimizer)
        state = lens.state_dict()
    values: list[float] = []
    reports: list[ErrorReport] = []
    with sl.observe(model) as lens:
        lens.errors.subscribe(reports.append)
        lens.load_state_dict(state)
        lens.pipe(sl.norm("weights"), sl.window(2)).subscribe(
            lambda frame: values.append(frame["0"].item()), name="mine"
        )
        assert len(reports) == 1
        assert "'mine'" in str(reports[0])
        step(model, optimizer, 3)
    assert values


def test_epochs_go_on_to_the_same_end_after_a_resume() -> None:
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    epochs: list[int] = []
    with sl.observe(model) as lens:
        for epoch in lens.epochs(5):
            epochs.append(epoch)
            step(model, optimizer, 2)
            if epoch == 2:
                break
        state = lens.state_dict()
    assert state["clock"]["epoch"] == 2
    fresh = small_model()
    with sl.observe(fresh) as lens:
        lens.load_state_dict(state)
        lens.epoch_finished()
        epochs += lens.epochs(5)
    assert epochs == [0, 1, 2, 3, 4]


def test_a_resumed_run_keeps_its_id_and_says_where_it_went_on() -> None:
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with sl.observe(model) as lens:
        step(model, optimizer, 3)
        first, state = lens.engine.run_info(), lens.state_dict()
    other = small_model()
    with sl.observe(other) as lens:
        fresh = lens.engine.run_info()
        lens.load_state_dict(state)
        resumed = lens.engine.run_info()
    assert first.resumed_at is None
    assert fresh.id != first.id
    assert (resumed.id, resumed.resumed_at) == (first.id, 2)


@pytest.mark.parametrize("state", [{}, {"model": 1}, None, [1]])
def test_what_is_no_snapshot_is_refused_by_name(state: Any) -> None:
    model = small_model()
    with (
        sl.observe(model) as lens,
        pytest.raises(ValueError, match=r"load_state_dict\(\).*lens\.state_dict\(\)"),
    ):
        lens.load_state_dict(state)


def test_a_snapshot_of_another_version_is_refused_with_the_remedy() -> None:
    model = small_model()
    with sl.observe(model) as lens:
        state = {**lens.state_dict(), "version": 99}
        with pytest.raises(ValueError, match=r"version 99.*use the one"):
            lens.load_state_dict(state)
