"""The trainer: a plain loop, seen through its lens."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import streamlens as sl
from streamlens.frame import Frame
from streamlens.lab import EpochResult, FullyConnected, ImageDataset, Trainer, load_dataset, make_model


def small_data(examples: int = 50) -> ImageDataset:
    """Images whose class is where they are bright, and noise."""
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(0, 4, (examples,), generator=generator)
    images = torch.randn(examples, 1, 4, 4, generator=generator)
    images[torch.arange(examples), 0, labels] += 2
    half = examples // 2
    return ImageDataset(
        name="stripes",
        train=TensorDataset(images[:half], labels[:half]),
        test=TensorDataset(images[half:], labels[half:]),
        classes=4,
        channels=1,
        image_size=4,
    )


def small_model(dropout: float = 0.0) -> FullyConnected:
    torch.manual_seed(11)
    return FullyConnected(channels=1, image_size=4, classes=4, hidden=(8,), dropout=dropout)


def train_by_hand(model: nn.Module, data: ImageDataset, epochs: int) -> list[float]:
    """The same training without a trainer; the mean loss of each epoch."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    generator = torch.Generator().manual_seed(5)
    loader = DataLoader(data.train, batch_size=10, shuffle=True, generator=generator)
    means = []
    for epoch in range(epochs):
        optimizer.param_groups[0]["lr"] = 0.01 * 0.95**epoch
        losses = []
        for images, labels in loader:
            loss: Tensor = nn.functional.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        means.append(torch.stack(losses).mean().item())
    return means


def trainer(model: nn.Module, data: ImageDataset, **options: Any) -> Trainer:
    settings = {"learning_rate": 0.01, "batch_size": 10, "seed": 5, "epochs": 3, **options}
    return Trainer(model, data, **settings)


def test_training_equals_a_loop_written_by_hand_bit_by_bit() -> None:
    data, model = small_data(), small_model(dropout=0.3)
    twin = copy.deepcopy(model)
    torch.manual_seed(1)
    means = train_by_hand(twin, data, epochs=3)
    torch.manual_seed(1)
    watched = trainer(model, data, schedule="exponential", measure=("train_accuracy", "test_accuracy"))
    watched.lens.pipe(sl.uw_ratio()).subscribe(sl.sinks.Table())
    results = watched.fit()
    watched.lens.close()
    assert [result.loss for result in results] == pytest.approx(means)
    for (name, ours), (_, theirs) in zip(model.state_dict().items(), twin.state_dict().items(), strict=True):
        assert torch.equal(ours, theirs), name


def test_accuracies_are_the_share_of_right_answers_in_evaluation_mode() -> None:
    data, model = small_data(), small_model(dropout=0.9)
    watched = trainer(model, data, epochs=1, measure=("train_accuracy", "test_accuracy"))
    [result] = watched.fit()
    assert model.training, "the model is left in the mode it was in"
    watched.lens.close()
    model.eval()
    for split, measured in ((data.train, result.train_accuracy), (data.test, result.test_accuracy)):
        images, labels = split.tensors
        right = sum(int(model(x[None]).argmax() == y) for x, y in zip(images, labels, strict=True))
        assert measured == pytest.approx(right / len(labels))


def test_the_lens_sees_every_step_and_each_accuracy_once_an_epoch() -> None:
    watched = trainer(small_model(), small_data(), epochs=2)
    losses: list[Frame] = []
    accuracies: list[Frame] = []
    watched.lens.pipe(sl.topic("loss")).subscribe(losses.append)
    watched.lens.pipe(sl.topic("test_accuracy")).subscribe(accuracies.append)
    results = watched.fit()
    watched.lens.close()
    assert [frame.step for frame in losses] == list(range(6))
    assert watched.steps == 6
    seen = [(frame.epoch, frame.to_dict()[""]) for frame in accuracies]
    assert seen == [
        (0, pytest.approx(results[0].test_accuracy)),
        (1, pytest.approx(results[1].test_accuracy)),
    ]


def test_progress_is_told_after_every_step_and_every_epoch() -> None:
    watched = trainer(small_model(), small_data(), epochs=2, measure=())
    steps: list[int] = []
    epochs: list[EpochResult] = []
    results = watched.fit(on_step=steps.append, on_epoch=epochs.append)
    watched.lens.close()
    assert steps == [1, 2, 3, 4, 5, 6]
    assert epochs == results
    assert [(r.epoch, r.train_accuracy, r.test_accuracy) for r in results] == [
        (0, None, None),
        (1, None, None),
    ]


def test_an_optimizer_of_ones_own_is_used_as_it_is() -> None:
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.25, momentum=0.9)
    watched = trainer(model, small_data(), optimizer=optimizer, epochs=1)
    rates: list[Frame] = []
    watched.lens.pipe(sl.topic("learning_rate")).subscribe(rates.append)
    watched.fit()
    watched.lens.close()
    assert set(rates[0].to_dict().values()) == {0.25}
    assert "momentum_buffer" in next(iter(optimizer.state.values()))


def test_wrong_options_are_errors_that_name_the_remedy() -> None:
    model, data = small_model(), small_data()
    with pytest.raises(ValueError, match=r"unknown .*'accuracy'.*test_accuracy"):
        trainer(model, data, measure=("accuracy",))
    with pytest.raises(ValueError, match="at least 1 epoch, got 0"):
        trainer(model, data, epochs=0)
    with pytest.raises(ValueError, match="unknown optimizer 'Sdg': did you mean 'SGD'"):
        trainer(model, data, optimizer="Sdg")


def test_alexnet_mini_learns_the_digits_to_90_percent_in_two_epochs_of_small_batches() -> None:
    torch.manual_seed(0)
    watched = Trainer(
        make_model("AlexNetMini"), load_dataset("digits"), epochs=2, batch_size=32, learning_rate=5e-3
    )
    results = watched.fit()
    watched.lens.close()
    accuracy = results[-1].test_accuracy
    assert accuracy is not None
    assert accuracy > 0.9


@pytest.mark.parametrize("mode", ["base", "current"])
def test_the_ratio_schedule_is_a_ratio_lr_on_the_run(mode: Any) -> None:
    data = small_data()
    ours = trainer(small_model(), data, optimizer="SGD", schedule="Ratio", target=5e-3, ratio_mode=mode)
    ours.fit()
    ours.lens.close()

    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    loader = DataLoader(data.train, batch_size=10, shuffle=True, generator=torch.Generator().manual_seed(5))
    with sl.observe(model, on_error="raise") as lens:
        lens.pipe(sl.uw_ratio()).subscribe(sl.control.RatioLR(target=5e-3, mode=mode))
        for images, labels in list(loader) + list(loader) + list(loader):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
    assert ours.optimizer.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"] != 0.01
    assert all(map(torch.equal, ours.model.parameters(), model.parameters()))


def test_a_text_is_trained_on_as_images_are_and_every_token_counts() -> None:
    tokens = torch.randint(0, 5, (40, 9), generator=torch.Generator().manual_seed(0))
    texts = TensorDataset(tokens[:, :-1], (tokens[:, :-1] + 1) % 5)
    data = ImageDataset("successors", texts, texts, classes=5, channels=1, image_size=8)
    torch.manual_seed(0)
    model = make_model("TransformerLM", channels=1, image_size=8, classes=5, text=True, width=16)
    watched = trainer(model, data, epochs=4, measure=("train_accuracy",))
    results = watched.fit()
    watched.lens.close()
    assert results[-1].loss < results[0].loss / 2
    right = (model.eval()(tokens[:, :-1]).argmax(dim=1) == texts.tensors[1]).double().mean().item()
    assert results[-1].train_accuracy == pytest.approx(right)


def test_the_trainer_is_small_enough_to_be_read_at_once() -> None:
    assert len(inspect.getsource(Trainer).splitlines()) < 150


def test_a_scheduler_of_the_optimizer_is_stepped_once_an_epoch() -> None:
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    watched = trainer(model, small_data(), optimizer=optimizer, schedule=schedule, epochs=3)
    watched.fit()
    watched.lens.close()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 / 8)
