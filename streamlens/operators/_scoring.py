"""`Scoring`: how many predictions of a batch are right, without waiting for a device."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from streamlens.capture.hooks import first_tensor
from streamlens.errors import StreamlensError
from streamlens.operators._base import is_number, is_whole
from streamlens.operators._tensors import wide

__all__ = ["Guess", "Metric", "Scoring", "share_of"]

Metric: TypeAlias = Callable[[Tensor, Any], Tensor | float]
"""A function of outputs and labels to a score for each prediction, or to their mean."""
Guess: TypeAlias = dict[int | None, Tensor]
"""Predictions for each dimension that may count the classes; under None the outputs themselves."""

_NOTHING: Final = torch.iinfo(torch.int64).min
"""The prediction of outputs that have NaN among them: no label is equal to it."""


def share_of(tally: Tensor) -> Tensor:
    """The mean score of a tally, (1,) of float32; NaN of nothing."""
    return (tally[0] / tally[1]).float().reshape(1)


@dataclass(frozen=True, slots=True)
class Scoring:
    """What is right.

    Attributes:
        operator: The metric's name, for messages.
        class_dim: The dimension of the outputs that counts the classes; by the labels' shape if None.
        ignore_index: Labels that do not count.
        threshold: For outputs that are a number for each label, yes above it; None for classes.
        metric: Takes the place of all that.
    """

    operator: str
    class_dim: int | None = None
    ignore_index: int = -100
    threshold: float | None = None
    metric: Metric | None = None

    def __post_init__(self) -> None:
        name = self.operator
        if self.class_dim is not None and not is_whole(self.class_dim):
            raise ValueError(f"{name}(class_dim={self.class_dim!r}): the dimension that counts the classes")
        if not is_whole(self.ignore_index):
            raise ValueError(f"{name}(ignore_index={self.ignore_index!r}): a label, such as -100")
        number = is_number(self.threshold)
        if self.threshold is not None and not (number and math.isfinite(self.threshold)):
            raise ValueError(f"{name}(threshold={self.threshold!r}): a number: 0 for logits, 0.5 for shares")
        if self.metric is not None and not callable(self.metric):
            raise TypeError(f"{name}(metric={self.metric!r}): a function of outputs and labels")
        if self.threshold is not None and self.class_dim is not None:
            raise ValueError(f"{name}() takes class_dim= for classes or threshold= for yes and no, not both")

    @property
    def plan(self) -> str:
        """What is not the default, as arguments."""
        parts = [] if self.class_dim is None else [f"class_dim={self.class_dim}"]
        parts += [] if self.ignore_index == -100 else [f"ignore_index={self.ignore_index}"]
        parts += [] if self.threshold is None else [f"threshold={self.threshold:g}"]
        if self.metric is not None:
            parts.append(f"metric={getattr(self.metric, '__name__', type(self.metric).__name__)}")
        return ", ".join(parts)

    def guess(self, outputs: Tensor) -> Guess:
        """What outputs predict, as far as that can be told before the labels are known; owns its memory."""
        outputs = outputs.detach()
        if self.metric is not None:
            return {None: outputs.clone()}
        if self.threshold is not None:
            yes = (outputs > self.threshold).long()
            return {None: torch.where(outputs.isnan(), _NOTHING, yes)}
        if self.class_dim is not None:
            dims = [self.class_dim % outputs.ndim] if -outputs.ndim <= self.class_dim < outputs.ndim else []
        else:
            dims = list(dict.fromkeys((1, outputs.ndim - 1))) if outputs.ndim > 1 else []
        dims = [dim for dim in dims if outputs.shape[dim] > 1]
        if not dims:
            raise StreamlensError(
                f"{self.operator}(): outputs of shape {tuple(outputs.shape)} have no "
                f"{'such ' if self.class_dim is not None else ''}dimension of classes: pass threshold= where "
                "they are a number a label (0 for logits, 0.5 for probabilities), class_dim=, or metric="
            )
        return {dim: _largest(outputs, dim) for dim in dims}

    def tally(self, guess: Guess, labels: Any) -> Tensor:
        """The sum of scores and the number of predictions, (2,) of float64 where there is any.

        Raises:
            StreamlensError: The labels do not fit the outputs.
        """
        if self.metric is not None:
            return self._of_metric(guess[None], labels)
        dim, target = self._matched(guess, labels)
        predicted, counted = guess[dim], target != self.ignore_index
        if self.threshold is not None:
            target = (target > 0.5).long()
        right = (predicted == target.to(predicted.device)) & counted.to(predicted.device)
        return torch.stack([wide(right.sum()), wide(counted.sum().to(predicted.device))])

    def entropy(self, outputs: Tensor, labels: Any) -> Tensor:
        """The cross entropy of outputs and labels, summed over the predictions; there is no `metric`.

        Args:
            outputs: Logits of classes, or of yes and no: what lies above the threshold.
            labels: As for `tally`. Of class probabilities the largest is the label.

        Raises:
            StreamlensError: The labels do not fit the outputs.
        """
        dim, target = self._matched(self.guess(outputs), labels)
        target = target.to(outputs.device)
        if dim is None:
            assert self.threshold is not None
            yes, counted = (target > 0.5).to(outputs), (target != self.ignore_index).to(outputs)
            return binary_cross_entropy_with_logits(outputs - self.threshold, yes, counted, reduction="sum")
        logits = outputs.movedim(dim, -1).flatten(0, -2)
        return cross_entropy(logits, target.flatten().long(), ignore_index=self.ignore_index, reduction="sum")

    def _matched(self, guess: Guess, labels: Any) -> tuple[int | None, Tensor]:
        """The dimension of classes that fits the labels, and these in the shape of the predictions."""
        target = first_tensor(labels)
        if target is None:
            raise StreamlensError(f"{self.operator}(): the labels, {type(labels).__name__}, have no tensor")
        target = target.detach()
        if None in guess:
            if target.numel() != guess[None].numel():
                raise self._misfit(guess[None].shape, target.shape)
            return None, target.reshape(guess[None].shape)
        for dim, predicted in guess.items():
            assert dim is not None
            whole = target.is_floating_point() and target.ndim == predicted.ndim + 1
            if whole and target.shape[:dim] + target.shape[dim + 1 :] == predicted.shape:
                # Class probabilities, as cross_entropy takes them too.
                return dim, _largest(target, dim)
        for dim, predicted in guess.items():
            if predicted.shape == target.shape:
                return dim, target
        for dim, predicted in reversed(guess.items()):
            # Labels of all places in a row, or with a dimension of one left over.
            if predicted.numel() == target.numel() and 1 in (target.ndim, *target.shape[1:]):
                return dim, target.reshape(predicted.shape)
        raise self._misfit(next(iter(guess.values())).shape, target.shape)

    def _misfit(self, predicted: torch.Size, target: torch.Size) -> StreamlensError:
        return StreamlensError(
            f"{self.operator}(): predictions of shape {tuple(predicted)} and labels of shape {tuple(target)} "
            "do not fit: pass class_dim=, the dimension of the outputs that counts the classes, or metric=, "
            "a function of outputs and labels"
        )

    def _of_metric(self, outputs: Tensor, labels: Any) -> Tensor:
        assert self.metric is not None
        value = self.metric(outputs, labels)
        scores = value.detach() if isinstance(value, Tensor) else torch.tensor(float(value))
        scores = scores.to(outputs.device, non_blocking=True)
        # A mean stands for as many predictions as the batch has examples.
        count = scores.numel() if scores.ndim else (len(outputs) if outputs.ndim else 1)
        total = wide(scores).sum() if scores.ndim else wide(scores) * count
        return torch.stack([total, torch.full_like(total, count)])


def _largest(values: Tensor, dim: int) -> Tensor:
    largest = values.detach().max(dim=dim)
    return torch.where(largest.values.isnan(), _NOTHING, largest.indices)
