"""`Trainer`: a plain training loop that is watched through a lens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import TensorDataset

import streamlens as sl
from streamlens.lab._registry import lookup
from streamlens.lab.data import ImageDataset, make_loader
from streamlens.lab.optimizers import make_optimizer, make_schedule
from streamlens.operators._model import evaluating, undisturbed

__all__ = ["EpochResult", "Trainer"]

_EVALUATION_BATCH = 512
_FIXED_BATCH = 256


@dataclass(frozen=True)
class EpochResult:
    """What one epoch came to.

    Attributes:
        epoch: Counted from 0.
        loss: The mean loss of the epoch's batches, each taken before its update.
        train_accuracy: Share of the training images classified rightly at the epoch's end, in
            evaluation mode; None if it was not asked for.
        test_accuracy: The same of the test images.
    """

    epoch: int
    loss: float
    train_accuracy: float | None = None
    test_accuracy: float | None = None


class Trainer:
    """Trains a classifier on a data set with cross-entropy; its lens shows the run as streams.

    Subscribe to `trainer.lens` what you want to see, then call `fit()`. The accuracies measured go
    to the lens as the topics `train_accuracy` and `test_accuracy`, once an epoch; `trainer.measured` names
    those that do.

    Args:
        model: The network; images are moved to where its parameters are.
        data: What to learn.
        optimizer: One of `OPTIMIZERS` by name, or an optimizer over the model's parameters.
        learning_rate: For an optimizer given by name.
        schedule: One of `SCHEDULES`, or a scheduler of the optimizer; stepped once an epoch. With
            `"ratio"` a `RatioLR` sets the rate after every update.
        target: The update-to-weight ratio that `"ratio"` aims at.
        ratio_mode: Its law, `"base"` or `"current"`.
        epochs: How many times to go through the training set.
        batch_size: Examples an update.
        seed: Of the order of the batches.
        measure: Which of `"train_accuracy"` and `"test_accuracy"` to measure after each epoch.
        metadata: What sinks shall know of the run beside what the trainer tells them.

    Raises:
        ValueError: A name is unknown or a number out of its range.
    """

    def __init__(
        self,
        model: nn.Module,
        data: ImageDataset,
        *,
        optimizer: str | torch.optim.Optimizer = "Adam",
        learning_rate: float = 3e-3,
        schedule: str | LRScheduler = "constant",
        target: float = 1e-3,
        ratio_mode: Literal["base", "current"] = "base",
        epochs: int = 10,
        batch_size: int = 128,
        seed: int = 0,
        measure: Iterable[str] = ("test_accuracy",),
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        splits = {"train_accuracy": data.train, "test_accuracy": data.test}
        self._measured = dict(lookup("measure", topic, splits) for topic in measure)
        self.measured = tuple(self._measured)
        if epochs < 1:
            raise ValueError(f"training takes at least 1 epoch, got {epochs}")
        self.model = model
        self.data = data
        self.epochs = epochs
        self.criterion = nn.CrossEntropyLoss()
        self.loader = make_loader(data.train, batch_size=batch_size, seed=seed)
        if isinstance(optimizer, str):
            optimizer = make_optimizer(optimizer, model.parameters(), learning_rate)
        self.optimizer = optimizer
        self.schedule = make_schedule(schedule, optimizer) if isinstance(schedule, str) else schedule
        scheduled = schedule.lower() if isinstance(schedule, str) else type(schedule).__name__
        ratio = scheduled == "ratio"
        controller = sl.control.RatioLR(optimizer, target=target, mode=ratio_mode) if ratio else None
        known = {
            "model": type(model).__name__,
            "dataset": data.name,
            "optimizer": type(optimizer).__name__,
            "learning_rate": optimizer.param_groups[0]["lr"],
            "schedule": scheduled,
            "epochs": epochs,
            "batch_size": batch_size,
            "seed": seed,
            **({"target": target, "ratio_mode": ratio_mode} if ratio else {}),
        }
        self.lens = sl.observe(
            model, loss=self.criterion, emits=tuple(self._measured), metadata={**known, **(metadata or {})}
        )
        if controller is not None:
            self.lens.pipe(sl.uw_ratio()).subscribe(controller)

    @property
    def steps(self) -> int:
        """Updates in the whole run."""
        return self.epochs * len(self.loader)

    @property
    def fixed(self) -> dict[str, object]:
        """What metrics that evaluate the model by themselves ask for.

        The criterion as `loss`, the first 256 training examples as `batch`, and the test set as `loader`.
        """
        batch = next(iter(make_loader(self.data.train, batch_size=_FIXED_BATCH, shuffle=False)))
        images, labels = map(self._placed, batch)
        loader = make_loader(self.data.test, batch_size=_EVALUATION_BATCH, shuffle=False)
        return {"loss": self.criterion, "batch": (images, labels), "loader": loader}

    def fit(
        self,
        *,
        on_step: Callable[[int], None] | None = None,
        on_epoch: Callable[[EpochResult], None] | None = None,
    ) -> list[EpochResult]:
        """Train.

        Args:
            on_step: Called after every update with the number of updates made.
            on_epoch: Called after every epoch with what it came to.

        Returns:
            What each epoch came to.
        """
        results: list[EpochResult] = []
        done = 0
        for epoch in self.lens.epochs(self.epochs):
            self.model.train()
            losses: list[Tensor] = []
            for images, labels in self.lens.batches(self.loader):
                losses.append(self._update(images, labels))
                done += 1
                if on_step is not None:
                    on_step(done)
            self.schedule.step()
            accuracies = {topic: self.accuracy(split) for topic, split in self._measured.items()}
            for topic, accuracy in accuracies.items():
                self.lens.emit(topic, accuracy)
            results.append(EpochResult(epoch, torch.stack(losses).mean().item(), **accuracies))
            if on_epoch is not None:
                on_epoch(results[-1])
        return results

    def accuracy(self, split: TensorDataset) -> float:
        """The share of images classified rightly, in evaluation mode and unseen by the lens."""
        with self.lens.paused(), undisturbed(self.model), evaluating(self.model) as model:
            right = torch.zeros((), dtype=torch.long)
            of = 0
            for images, labels in make_loader(split, batch_size=_EVALUATION_BATCH, shuffle=False):
                predicted = model(self._placed(images)).argmax(dim=1)
                right += (predicted.cpu() == labels).sum()
                of += labels.numel()  # of a text, every token counts
        return right.item() / of

    def _update(self, images: Tensor, labels: Tensor) -> Tensor:
        self.optimizer.zero_grad()
        loss: Tensor = self.criterion(self.model(self._placed(images)), self._placed(labels))
        loss.backward()
        self.optimizer.step()
        return loss.detach()  # not .item(): that would wait for the device at every step

    def _placed(self, tensor: Tensor) -> Tensor:
        return tensor.to(next(self.model.parameters()).device)
