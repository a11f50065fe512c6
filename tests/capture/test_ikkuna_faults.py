"""What went wrong in an earlier system of this kind, ikkuna (2019), must not happen here."""

from __future__ import annotations

import copy
import io
from typing import cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.optim import SGD, Adam

import streamlens as sl
from tests.helpers.by_hand import Batch, norms, of_role, regression, squared_error, train_by_hand
from tests.helpers.recording import (
    assert_steps_equal,
    layer_sets,
    numbers,
    observed,
    points,
    record,
)

BATCHES = regression(1, 6, (4, 5))


def perceptron() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.ReLU(inplace=True), nn.Dropout(0.2), nn.Linear(4, 3))


def validate(model: nn.Module) -> None:
    model.eval()
    model(BATCHES[0][0])
    model.train()


def test_a_forward_in_eval_mode_is_not_counted_and_publishes_nothing() -> None:
    model = perceptron()
    optimizer = SGD(model.parameters(), lr=0.1)
    with observed(model) as lens:
        frames = [record(lens, sl.norm(n)) for n in ("activations", "weights", "network_output")]
        for batch in BATCHES[:2]:
            validate(model)
            train_by_hand(model, optimizer, [batch], squared_error)
            validate(model)
    assert [points(f) for f in frames] == [[(0, 0), (1, 0)]] * 3


@pytest.mark.parametrize("topic", ["weights", "weight_gradients", "activations", "layer_gradients"])
def test_a_forward_inside_a_subscriber_does_not_zero_the_updates_of_its_step(topic: str) -> None:
    model, twin = perceptron(), perceptron()
    torch.manual_seed(1)
    truth = train_by_hand(twin, SGD(twin.parameters(), lr=0.1), BATCHES, squared_error)
    accuracies: list[float] = []

    def take_accuracy(frame: sl.Frame) -> None:
        model.eval()
        assert len(frame) > 0
        accuracies.append(float(model(BATCHES[0][0]).argmax(1).float().mean()))
        model.train()

    with observed(model) as lens:
        updates = record(lens, sl.topic("weight_updates"))
        lens.pipe(sl.norm(topic)).subscribe(take_accuracy)
        reduced = record(lens, sl.norm("weight_updates"))
        torch.manual_seed(1)
        train_by_hand(model, SGD(model.parameters(), lr=0.1), BATCHES, squared_error)
    wanted = [of_role(s.updates(), "weight") for s in truth]
    assert len(accuracies) == 6
    assert_steps_equal(updates, wanted)
    assert_steps_equal(reduced, [norms(w) for w in wanted], rtol=1e-5)


def test_a_frozen_layer_stays_as_it_is_and_is_seen_to() -> None:
    model = perceptron()
    optimizer = SGD(model.parameters(), lr=0.1)
    with observed(model) as lens:
        weights, gradients = record(lens, sl.topic("weights")), record(lens, sl.norm("weight_gradients"))
        train_by_hand(model, optimizer, BATCHES[:1], squared_error)
        model[0].requires_grad_(False)
        train_by_hand(model, optimizer, BATCHES[1:3], squared_error)
    assert torch.equal(weights[0]["0"], weights[2]["0"])
    assert not torch.equal(weights[0]["3"], weights[2]["3"])
    assert layer_sets(gradients) == [("0", "3"), ("3",), ("3",)]


def test_observing_draws_no_random_number() -> None:
    model, twin = perceptron(), perceptron()
    torch.manual_seed(1)
    train_by_hand(twin, Adam(twin.parameters()), BATCHES, squared_error)
    expected = torch.get_rng_state()
    with observed(model, on_error="report") as lens:
        for name in ("weights", "weight_updates", "activations", "layer_gradients", "raw_gradients", "loss"):
            record(lens, sl.topic(name))
        for operator in (
            sl.norm("weights"),
            sl.var("activations"),
            sl.uw_ratio(),
            sl.uw_ratio(of="parameters"),
        ):
            record(lens, operator)
        torch.manual_seed(1)
        train_by_hand(model, Adam(model.parameters()), BATCHES, squared_error)
    assert torch.equal(torch.get_rng_state(), expected)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_steps_go_on_from_epoch_to_epoch_and_the_last_batch_is_of_its_own_epoch() -> None:
    model = perceptron()
    optimizer = SGD(model.parameters(), lr=0.1)
    with observed(model) as lens:
        finished, weights = record(lens, sl.topic("batch_finished")), record(lens, sl.norm("weights"))
        for _ in lens.epochs(3):
            for batch in lens.batches(BATCHES[:2]):
                train_by_hand(model, optimizer, [batch], squared_error)
    assert [(f.epoch, f.step) for f in weights] == [(0, 0), (0, 1), (1, 2), (1, 3), (2, 4), (2, 5)]
    assert [(f.epoch, f.step) for f in finished] == [(f.epoch, f.step) for f in weights]
    assert numbers(finished) == [0, 1] * 3


def test_accumulation_makes_no_step_whose_updates_are_zero() -> None:
    model = perceptron()
    with observed(model) as lens:
        updates = record(lens, sl.norm("weight_updates"))
        train_by_hand(model, SGD(model.parameters(), lr=0.1), BATCHES, squared_error, accumulate=2)
    assert [f.step for f in updates] == [0, 1, 2]
    assert all(float(f[layer]) > 0 for f in updates for layer in f)


def test_the_loss_of_a_validation_is_not_published() -> None:
    model = perceptron()
    optimizer = SGD(model.parameters(), lr=0.1)
    criterion = nn.MSELoss()
    losses_by_hand: list[float] = []

    def loss_of(m: nn.Module, batch: Batch) -> Tensor:
        loss: Tensor = criterion(m(batch[0]), batch[1])
        losses_by_hand.append(loss.item())
        return loss

    with observed(model, loss=criterion) as lens:
        losses, labels = record(lens, sl.topic("loss")), record(lens, sl.topic("input_labels"))
        for batch in BATCHES[:2]:
            train_by_hand(model, optimizer, [batch], loss_of)
            model.eval()
            with torch.no_grad():
                criterion(model(BATCHES[5][0]), BATCHES[5][1])
            criterion(model(BATCHES[5][0]), BATCHES[5][1])
            model.train()
    assert numbers(losses) == pytest.approx(losses_by_hand)
    assert len(labels) == 2


class Shared(nn.Module):
    """One activation module used twice, and one weight in two layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.act, self.second = nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5)
        self.second.weight = self.first.weight
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.act(self.second(self.act(self.first(x)))))
        return out


def test_shared_modules_and_weights_are_published_once_a_use_and_once_a_weight() -> None:
    model = Shared()
    with observed(model) as lens:
        weights, ratios = record(lens, sl.norm("weights")), record(lens, sl.uw_ratio())
        outputs = record(lens, sl.norm("activations"))
        joined = record(lens, sl.ratio("layer_gradients", "activations"))
        train_by_hand(model, SGD(model.parameters(), lr=0.1), BATCHES[:3], squared_error)
    assert layer_sets(weights) == layer_sets(ratios) == [("first", "head")] * 3
    assert layer_sets(outputs) == [("first", "act", "act@1", "second", "head")] * 3
    assert [set(f.layers) for f in joined] == [set(outputs[0].layers)] * 3


class Awkward(nn.Module):
    """Everything that used to crash, in one model."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.BatchNorm1d(5, affine=False)
        self.frozen = nn.Linear(5, 4, bias=False).requires_grad_(False)
        self.recurrent = nn.LSTM(4, 4, batch_first=True)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.unused = nn.Linear(2, 2)
        self.head = nn.Linear(4, 3, bias=False)

    def forward(self, *, x: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
        hidden, _ = self.recurrent(self.frozen(self.norm(x))[:, None])
        hidden, _ = self.attention(hidden, hidden, hidden)
        return {"scores": self.head(hidden[:, 0]) * scale}


def test_modules_that_used_to_crash_are_observed_like_others() -> None:
    model, twin = Awkward(), Awkward()

    def loss_of(m: nn.Module, batch: Batch) -> Tensor:
        return mse_loss(m(x=batch[0], scale=0.5)["scores"], batch[1])

    truth = train_by_hand(twin, Adam(twin.parameters()), BATCHES[:3], loss_of)
    names = ("weights", "biases", "weight_updates", "bias_gradients", "activations", "layer_gradients")
    with observed(model) as lens:
        raw = {name: record(lens, sl.topic(name)) for name in names}
        outputs, inputs = record(lens, sl.topic("network_output")), record(lens, sl.topic("input_data"))
        ratios = record(lens, sl.uw_ratio(of="parameters"))
        train_by_hand(model, Adam(model.parameters()), BATCHES[:3], loss_of)
    assert all(len(frames) == 3 for frames in (*raw.values(), outputs, inputs, ratios))
    assert raw["weights"][0].layers == ("frozen", "attention.out_proj", "unused", "head")
    assert raw["bias_gradients"][0].layers == ("attention.out_proj",)
    assert {"norm", "recurrent", "attention", "head"} <= set(raw["activations"][0].layers)
    for frame, step in zip(ratios, truth, strict=True):
        ratio = float(
            step.updates()["recurrent.weight_ih_l0"].norm() / step.after["recurrent.weight_ih_l0"].norm()
        )
        assert float(frame["recurrent.weight_ih_l0"]) == pytest.approx(ratio, rel=1e-4)


def test_an_activation_overwritten_in_place_is_not_published() -> None:
    model = perceptron()
    x = BATCHES[0][0]
    expected = model[0](x).detach()
    assert expected.min() < 0
    optimizer = SGD(model.parameters(), lr=0.0)
    with observed(model, on_error="report") as lens:
        outputs, least = record(lens, sl.topic("activations")), record(lens, sl.minimum("activations"))
        for _ in range(2):
            squared_error(model, BATCHES[0]).backward()
            optimizer.step()
        assert lens.stats()["errors"] == 1
    assert [torch.equal(f["0"], expected) for f in outputs if "0" in f] == [True]
    assert [float(f["0"]) for f in least] == [float(expected.min())] * 2


def test_a_deep_copy_calls_nothing_of_the_original_and_the_model_can_be_saved() -> None:
    model = perceptron()
    optimizer = SGD(model.parameters(), lr=0.1)
    with observed(model) as lens:
        frames = [record(lens, sl.norm(n)) for n in ("weights", "activations", "layer_gradients")]
        train_by_hand(model, optimizer, BATCHES[:1], squared_error)
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        for other in (copy.deepcopy(model), cast("nn.Module", torch.load(file, weights_only=False))):
            train_by_hand(other, SGD(other.parameters(), lr=0.1), BATCHES[1:3], squared_error)
        assert [len(f) for f in frames] == [1, 1, 1]
        assert lens.current_step == 0


class Skipping(nn.Module):
    """Leaves out a layer in every other forward, as stochastic depth does."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.block, self.head = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        hidden = self.stem(x)
        if self.calls % 2:
            hidden = hidden + self.block(hidden)
        out: Tensor = self.head(hidden)
        return out


def test_a_layer_that_is_skipped_is_left_out_and_training_goes_on() -> None:
    model = Skipping()
    with observed(model) as lens:
        ratios = record(lens, sl.ratio("weight_gradients", "weights"))
        outputs = record(lens, sl.ratio("layer_gradients", "activations"))
        train_by_hand(model, SGD(model.parameters(), lr=0.1), BATCHES[:4], squared_error)
    everything, rest = ("stem", "block", "head"), ("stem", "head")
    assert layer_sets(ratios) == layer_sets(outputs) == [everything, rest] * 2


def test_subscribers_can_come_late_and_leave() -> None:
    model = perceptron()
    optimizer = SGD(model.parameters(), lr=0.1)
    with observed(model) as lens:
        train_by_hand(model, optimizer, BATCHES[:1], squared_error)
        seen: list[int] = []
        subscription = lens.pipe(sl.uw_ratio()).subscribe(lambda f: seen.append(f.step))
        train_by_hand(model, optimizer, BATCHES[1:3], squared_error)
        subscription.dispose()
        train_by_hand(model, optimizer, BATCHES[3:], squared_error)
    assert seen == [1, 2]


def test_the_ratio_is_that_of_the_update_to_the_weights_after_it_also_at_the_first_step() -> None:
    model, twin = perceptron(), perceptron()
    torch.manual_seed(1)
    truth = train_by_hand(twin, SGD(twin.parameters(), lr=0.1), BATCHES, squared_error)
    with observed(model) as lens:
        ratios = record(lens, sl.uw_ratio())
        torch.manual_seed(1)
        train_by_hand(model, SGD(model.parameters(), lr=0.1), BATCHES, squared_error)
    wanted = [
        {
            layer: change.double().norm() / s.after[f"{layer}.weight"].double().norm()
            for layer, change in of_role(s.updates(), "weight").items()
        }
        for s in truth
    ]
    assert_steps_equal(ratios, wanted, rtol=1e-5)
    assert all(float(ratios[0][layer]) > 0 for layer in ratios[0])


def test_adams_moments_looked_at_seldom_are_the_optimizers_own() -> None:
    model, twin = perceptron(), perceptron()
    torch.manual_seed(1)
    truth = train_by_hand(twin, Adam(twin.parameters()), BATCHES, squared_error)
    with observed(model) as lens:
        moments = record(lens, sl.every(3), sl.topic(sl.optimizer_state("exp_avg")))
        counts = record(lens, sl.every(3), sl.topic(sl.optimizer_state("step")))
        torch.manual_seed(1)
        train_by_hand(model, Adam(model.parameters()), BATCHES, squared_error)
    assert_steps_equal(moments, [truth[k].state["exp_avg"] for k in (0, 3)], steps=[0, 3])
    assert [float(f["0.weight"]) for f in counts] == [1, 4]


def test_weights_are_not_copied_unless_somebody_wants_their_updates() -> None:
    model = perceptron()
    optimizer = SGD(model.parameters(), lr=0.1)
    weight = model.get_parameter("0.weight")
    addresses: list[int] = []
    with observed(model) as lens:
        lens.pipe(sl.topic("weights")).subscribe(lambda f: addresses.append(f["0"].data_ptr()))
        train_by_hand(model, optimizer, BATCHES[:2], squared_error)
        assert lens.engine.updates.bytes_held == 0
        subscription = lens.pipe(sl.norm("weight_updates")).subscribe()
        train_by_hand(model, optimizer, BATCHES[:2], squared_error)
        assert lens.engine.updates.bytes_held == 4 * (4 * 5 + 3 * 4)
        subscription.dispose()
        assert lens.engine.updates.bytes_held == 0
    assert addresses == [weight.data_ptr()] * 4
