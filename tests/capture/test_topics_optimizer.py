"""Learning rates, the optimizer's state, times, and numbers of the user's own."""

from __future__ import annotations

import copy
import time

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import ExponentialLR, OneCycleLR

import streamlens as sl
from tests.helpers.by_hand import norms, of_role, regression, squared_error, train_by_hand
from tests.helpers.recording import assert_steps_equal, numbers, observed, record

BATCHES = regression(1, 3, (6, 5))


def perceptron() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))


def grouped(model: nn.Module) -> SGD:
    """The last layer at a tenth of the first one's rate."""
    return SGD(
        [
            {"params": model.get_submodule("0").parameters(), "lr": 0.1},
            {"params": model.get_submodule("2").parameters(), "lr": 0.01},
        ]
    )


def test_the_learning_rate_is_that_of_the_group_of_each_weight_before_the_scheduler_moves_it() -> None:
    model = perceptron()
    optimizer = grouped(model)
    scheduler = ExponentialLR(optimizer, 0.5)
    with observed(model) as lens:
        frames = record(lens, sl.topic("learning_rate"))
        for batch in BATCHES:
            train_by_hand(model, optimizer, [batch], squared_error)
            scheduler.step()
    wanted = [{"0": torch.tensor(0.1 * 0.5**k), "2": torch.tensor(0.01 * 0.5**k)} for k in range(3)]
    assert_steps_equal(frames, wanted, rtol=1e-6)
    assert {f.kind for f in frames} == {sl.Kind.STEP}


def test_the_learning_rate_is_the_one_used_also_where_it_is_a_tensor() -> None:
    model = perceptron()
    optimizer = Adam(model.parameters(), lr=torch.tensor(0.02))
    with observed(model) as lens:
        frames = record(lens, sl.topic("learning_rate"))
        train_by_hand(model, optimizer, BATCHES[:1], squared_error)
        optimizer.param_groups[0]["lr"].fill_(0.01)
        train_by_hand(model, optimizer, BATCHES[1:2], squared_error)
    assert [f["0"].item() for f in frames] == pytest.approx([0.02, 0.01])


def test_the_learning_rate_of_a_cycle_is_the_one_by_hand() -> None:
    model = perceptron()
    optimizer = SGD(model.parameters(), lr=0.1)
    scheduler = OneCycleLR(optimizer, max_lr=1.0, total_steps=4)
    rates: list[float] = []
    with observed(model) as lens:
        frames = record(lens, sl.topic("learning_rate"))
        for batch in BATCHES:
            rates.append(optimizer.param_groups[0]["lr"])
            train_by_hand(model, optimizer, [batch], squared_error)
            scheduler.step()
    assert [f["2"].item() for f in frames] == pytest.approx(rates)
    assert len(set(rates)) == 3


STATES: dict[str, tuple[str, ...]] = {
    "adam": ("exp_avg", "exp_avg_sq", "step"),
    "momentum": ("momentum_buffer",),
}


def make(name: str, model: nn.Module) -> Optimizer:
    return (
        Adam(model.parameters(), lr=0.01) if name == "adam" else SGD(model.parameters(), lr=0.1, momentum=0.9)
    )


@pytest.mark.parametrize("name", STATES)
def test_optimizer_state_is_the_optimizers_own_after_the_update(name: str) -> None:
    model = perceptron()
    twin = copy.deepcopy(model)
    steps = train_by_hand(twin, make(name, twin), BATCHES, squared_error)
    with observed(model) as lens:
        raw = {key: record(lens, sl.topic(sl.optimizer_state(key))) for key in STATES[name]}
        reduced = {key: record(lens, sl.norm(sl.optimizer_state(key))) for key in STATES[name]}
        train_by_hand(model, make(name, model), BATCHES, squared_error)
    for key in STATES[name]:
        assert_steps_equal(raw[key], [s.state[key] for s in steps])
        assert_steps_equal(reduced[key], [norms(s.state[key]) for s in steps], rtol=2e-6)


def test_several_reductions_of_one_state_are_each_right() -> None:
    model = perceptron()
    twin = copy.deepcopy(model)
    steps = train_by_hand(twin, Adam(twin.parameters()), BATCHES, squared_error)
    state = sl.optimizer_state("exp_avg_sq")
    with observed(model) as lens:
        sizes, means = record(lens, sl.norm(state)), record(lens, sl.mean(state))
        largest = record(lens, sl.layers("2"), sl.maximum(state))
        train_by_hand(model, Adam(model.parameters()), BATCHES, squared_error)
    moments = [s.state["exp_avg_sq"] for s in steps]
    assert_steps_equal(sizes, [norms(m) for m in moments], rtol=2e-6)
    assert_steps_equal(means, [{k: v.double().mean() for k, v in m.items()} for m in moments], rtol=1e-5)
    second = [{k: v.max() for k, v in m.items() if k.startswith("2.")} for m in moments]
    assert_steps_equal(largest, second, rtol=1e-6)


def test_a_state_that_the_optimizer_does_not_keep_gives_no_frame() -> None:
    model = perceptron()
    with sl.observe(model) as lens:
        frames = record(lens, sl.topic(sl.optimizer_state("exp_avg")))
        weights = record(lens, sl.topic("weights"))
        train_by_hand(model, SGD(model.parameters(), lr=0.1), BATCHES, squared_error)
    assert frames == []
    assert len(weights) == 3


def test_the_effective_step_of_adam_can_be_put_together_from_its_topics() -> None:
    model = perceptron()
    with observed(model) as lens:
        names = ("exp_avg", "exp_avg_sq", "step")
        state = {n: record(lens, sl.topic(sl.optimizer_state(n))) for n in names}
        rates, updates = record(lens, sl.topic("learning_rate")), record(lens, sl.topic("weight_updates"))
        train_by_hand(model, Adam(model.parameters(), lr=0.01), BATCHES, squared_error)
    for k in range(3):
        moments = {n: of_role(dict(state[n][k].items()), "weight")["2"] for n in names}
        first = moments["exp_avg"] / (1 - 0.9 ** moments["step"])
        second = moments["exp_avg_sq"] / (1 - 0.999 ** moments["step"])
        wanted = -rates[k]["2"] * first / (second.sqrt() + 1e-8)
        torch.testing.assert_close(updates[k]["2"], wanted, rtol=1e-3, atol=1e-7)


def test_step_times_are_seconds_between_updates_and_add_up_to_the_wall_time() -> None:
    model = perceptron()
    optimizer = SGD(model.parameters(), lr=0.1)
    with observed(model) as lens:
        times = record(lens, sl.topic("step_time"))
        rates = record(lens, sl.topic("examples_per_second"))
        train_by_hand(model, optimizer, BATCHES[:1], squared_error)
        start = time.perf_counter()
        for batch in BATCHES[1:]:
            time.sleep(0.02)
            train_by_hand(model, optimizer, [batch], squared_error)
        elapsed = time.perf_counter() - start
    assert [f.step for f in times] == [f.step for f in rates] == [1, 2]
    assert min(numbers(times)) >= 0.02
    assert sum(numbers(times)) == pytest.approx(elapsed, abs=0.2)
    assert numbers(rates) == pytest.approx([6 / t for t in numbers(times)], rel=1e-4)


def test_step_times_of_several_optimizers_leave_out_no_time() -> None:
    model = perceptron()
    first = SGD(model.get_submodule("0").parameters(), lr=0.1)
    second = SGD(model.get_submodule("2").parameters(), lr=0.1)
    with observed(model) as lens:
        times = record(lens, sl.topic("step_time"))
        for batch in BATCHES:
            squared_error(model, batch).backward()
            first.step()
            time.sleep(0.02)
            second.step()
    assert [f.step for f in times] == [1, 2]
    assert min(numbers(times)) >= 0.02


def test_examples_of_all_micro_steps_count_towards_examples_per_second() -> None:
    model = perceptron()
    with observed(model) as lens:
        times, rates = record(lens, sl.topic("step_time")), record(lens, sl.topic("examples_per_second"))
        train_by_hand(model, SGD(model.parameters(), lr=0.1), BATCHES * 2, squared_error, accumulate=3)
    assert numbers(rates) == pytest.approx([18 / t for t in numbers(times)], rel=1e-4)


class Pieces(nn.Module):
    """A module whose parts are called one after the other, and never itself."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(5, 4)
        self.head = nn.Linear(4, 3)


def through_parts(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    assert isinstance(model, Pieces)
    return nn.functional.mse_loss(model.head(torch.tanh(model.encoder(batch[0]))), batch[1])


def test_a_batch_that_goes_through_several_parts_counts_its_examples_once() -> None:
    torch.manual_seed(0)
    model = Pieces()
    with observed(model) as lens:
        data, rates = record(lens, sl.topic("input_data")), record(lens, sl.topic("examples_per_second"))
        times = record(lens, sl.topic("step_time"))
        train_by_hand(model, SGD(model.parameters(), lr=0.1), BATCHES, through_parts)
    assert_steps_equal(data, [{"": x} for x, _ in BATCHES])
    assert numbers(rates) == pytest.approx([6 / t for t in numbers(times)], rel=1e-4)


def test_emitted_numbers_tensors_and_mappings_come_at_the_open_step() -> None:
    model = perceptron()
    optimizer = SGD(model.parameters(), lr=0.1)
    with observed(model, emits=("validation_loss", "confusion", "per_layer")) as lens:
        numbers_, tensors = record(lens, sl.topic("validation_loss")), record(lens, sl.topic("confusion"))
        layers = record(lens, sl.topic("per_layer"))
        for k, batch in enumerate(BATCHES):
            train_by_hand(model, optimizer, [batch], squared_error)
            lens.emit("validation_loss", 0.5 * k)
            lens.emit("confusion", torch.tensor([[k, 1], [2, 3]]))
            lens.emit("per_layer", {"0": k, "2": torch.tensor(-1.0)})
    assert [(f.step, f.layers, f[""].item()) for f in numbers_] == [(k, ("",), 0.5 * k) for k in range(3)]
    assert [f[""].tolist() for f in tensors] == [[[k, 1], [2, 3]] for k in range(3)]
    assert [f.to_dict() for f in layers] == [{"0": k, "2": -1.0} for k in range(3)]
    assert {f.kind for f in numbers_ + tensors + layers} == {sl.Kind.EVENT}


def test_an_emitted_tensor_is_kept_as_it_was() -> None:
    model = perceptron()
    value = torch.ones(2)
    with observed(model, emits=("mine",)) as lens:
        frames: list[sl.Frame] = []
        lens.pipe(sl.topic("mine")).subscribe(frames.append)
        lens.emit("mine", value)
        value.zero_()
    assert frames[0][""].tolist() == [1.0, 1.0]


def test_a_topic_of_the_run_cannot_be_emitted() -> None:
    with observed(perceptron()) as lens, pytest.raises(sl.StreamlensError, match=r"weights.*choose another"):
        lens.emit("weights", 1.0)
