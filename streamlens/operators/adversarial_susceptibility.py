"""`adversarial_susceptibility`: how much accuracy is lost to small changes of the inputs made on purpose."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import torch
from reactivex import Observable
from torch import Tensor, nn

from streamlens.errors import StreamlensError
from streamlens.frame import Frame
from streamlens.nodes import Emitted
from streamlens.operators._base import is_number, relabelled
from streamlens.operators._batches import (
    Forward,
    Loader,
    called,
    device_of,
    logits_of,
    map_tensors,
    moved,
)
from streamlens.operators._isolated import isolated_copy, twice_differentiable, widened_input
from streamlens.operators._model import (
    FindModel,
    ModelNode,
    check_every,
    due_per_epoch,
    evaluating,
    on_model,
)
from streamlens.operators._scoring import Metric, Scoring
from streamlens.stream import Operator, Stream

__all__ = ["adversarial_susceptibility"]

Loss: TypeAlias = Callable[[Any, Any], Tensor]
"""A function of the model's output and the labels."""
Answer: TypeAlias = Callable[[Any], tuple[Any, Any]]
"""What a model gives for inputs, and their labels."""


def adversarial_susceptibility(
    loader: Iterable[Any],
    eps: float,
    *,
    loss: Loss | None = None,
    clip: tuple[float, float] | None = None,
    every: int | None = None,
    class_dim: int | None = None,
    ignore_index: int = -100,
    threshold: float | None = None,
    metric: Metric | None = None,
    labels: str | None = None,
    forward: Forward | None = None,
    model: nn.Module | None = None,
) -> Operator:
    """The accuracy that the model loses to the fast gradient sign method, on fixed pairs of input and label.

    Accuracy on the pairs (x, y) of the loader, less that on (x', y) with

        x' = x + eps * sign(d L(model(x), y) / dx),

    clipped to the range of valid inputs where that is given (Goodfellow, Shlens and Szegedy, Explaining
    and Harnessing Adversarial Examples, 2015). 0 says that steps of `eps` against the gradient change
    nothing, the model's own accuracy that they take all of it. One step is a weak attack: what this says is
    that a model is susceptible, and never that it is robust. Inputs whose gradient rounds to zero, as that of
    predictions which are all too sure does, stay as they are, and so do those whose gradient is NaN.

    What is changed is the first floating-point tensor of the inputs: images, not token ids. The model is
    copied, and the copy evaluated and differentiated in evaluation mode, in at least float32, without hooks,
    autocast, compilation or data parallelism around it: parameters, gradients, buffers, modes and random
    generators, also those that the loader draws from, are as they were. When it is due, and what a batch may
    be, is as for `test_accuracy`: at the end of each epoch, or every so many steps.

    The result is topic `adversarial_susceptibility` of the layer `""`, the model, one float32 in [-1, 1];
    below 0 where the attack does more good than harm, NaN where every label is ignored. Outputs that have NaN
    among them are wrong. The cost is a copy of the model, and two forwards and a backward over the loader
    each time, on the training thread; beside what the loader does, nothing waits for a GPU.

    Args:
        loader: Anything that yields batches again each time, such as a list or a DataLoader; the same pairs
            each time if values are to be compared.
        eps: The length of the step, in the unit of the inputs, of which each element moves by as much.
        loss: A function of the model's output and the labels; the cross entropy that belongs to what is right
            unless given, which `metric` asks for.
        clip: The least and the greatest valid input, such as (0, 1).
        every: A cadence in steps.
        class_dim: As for `train_accuracy`.
        ignore_index: As for `train_accuracy`.
        threshold: As for `train_accuracy`.
        metric: As for `train_accuracy`.
        labels: The key of the labels in a batch that is a mapping.
        forward: A function of the model and a batch (on the model's device) to outputs and labels; the
            first floating-point tensor of the batch is changed.
        model: The model, on streams that come from no lens; held weakly.

    Returns:
        The operator.

    Raises:
        TypeError: The loader is none, or can be gone through only once; a function is none.
        ValueError: An option out of range, an empty loader, or a metric without a loss.
        StreamlensError: When applied: no model is known, or it is sharded. While training, reported: a batch
            that `test_accuracy` would not take, or without inputs that the loss depends on.
    """
    operator = "adversarial_susceptibility"
    scoring = Scoring(operator, class_dim, ignore_index, threshold, metric)
    batches = Loader(operator, loader, labels, forward)
    check_every(operator, every)
    if not is_number(eps) or not 0 <= eps < math.inf:
        raise ValueError(f"{operator}(eps={eps!r}): how far each element of the inputs moves, 0 or more")
    if loss is not None and not callable(loss):
        raise TypeError(f"{operator}(loss={loss!r}): a function of the model's output and the labels")
    if loss is None and metric is not None:
        raise ValueError(f"{operator}(metric=...) has no gradient to follow: pass loss= with it")
    pair = isinstance(clip, tuple) and len(clip) == 2 and all(map(is_number, clip))
    if clip is not None and not (pair and clip[0] < clip[1]):
        raise ValueError(f"{operator}(clip={clip!r}): (lower, upper), the range of valid inputs, or None")

    def entropy(outputs: Any, target: Any) -> Tensor:
        return scoring.entropy(logits_of(outputs, operator), target)

    def make(stream: Stream, find: FindModel) -> ModelNode:
        return _Susceptibility(stream, find, batches, scoring, loss or entropy, float(eps), clip)

    def apply(source: Observable[Frame]) -> Observable[Frame]:
        when = due_per_epoch(source, every)
        plan = ", ".join(part for part in (f"eps={eps:g}", scoring.plan) if part)
        return on_model(when, make, f"{operator}({plan})", operator=operator, model=model)

    return apply


class _Susceptibility(ModelNode):
    """Scores the model on the pairs as they are, and attacked.

    Args:
        stream: The stream whose frames say when.
        find: Gives the model.
        loader: The data.
        scoring: What is right.
        loss: What the attack raises.
        eps: How far.
        clip: The range of valid inputs.
    """

    def __init__(
        self,
        stream: Stream,
        find: FindModel,
        loader: Loader,
        scoring: Scoring,
        loss: Loss,
        eps: float,
        clip: tuple[float, float] | None,
    ) -> None:
        super().__init__(stream, find)
        self._loader = loader
        self._scoring = scoring
        self._loss = loss
        self._eps = eps
        self._clip = clip

    def evaluate(self, model: nn.Module, frame: Frame) -> Emitted:
        """The accuracy lost."""
        total: Tensor | None = None
        copied = isolated_copy(model).modules[0].requires_grad_(False)
        device = device_of(copied)
        with twice_differentiable(copied), evaluating(copied) as run:
            for batch in self._loader:
                inputs, answer = self._given(run, map_tensors(widened_input, moved(batch, device)))
                attacked, clean = self._attacked(inputs, answer)
                tallies = torch.stack([clean, self._tally(*answer(attacked)).to(clean.device)])
                total = tallies if total is None else total + tallies.to(total.device)
        if total is None:
            raise StreamlensError(f"{self._scoring.operator}(): the loader gave no batch")
        accuracies = total[:, 0] / total[:, 1]
        lost = (accuracies[0] - accuracies[1]).float().reshape(1)
        return relabelled(frame, "adversarial_susceptibility", lost, layers=("",))

    def _given(self, run: nn.Module, batch: Any) -> tuple[Any, Answer]:
        """What may be changed of a batch, and what the model answers to it."""
        if (forward := self._loader.forward) is not None:
            return batch, lambda changed: forward(run, changed)
        inputs, labels = self._loader.split(batch)
        return inputs, lambda changed: (called(run, changed), labels)

    def _attacked(self, inputs: Any, answer: Answer) -> tuple[Any, Tensor]:
        """The inputs after the step, and how many predictions were right before."""
        leaves: list[Tensor] = []

        def leaf(tensor: Tensor) -> Tensor:
            leaves.append(tensor.detach().clone().requires_grad_())
            return leaves[0]

        with torch.enable_grad():
            outputs, labels = answer(self._changed(inputs, leaf))
            value = self._loss(outputs, labels).sum()
            gradient = (
                torch.autograd.grad(value, leaves, allow_unused=True)[0] if value.requires_grad else None
            )
        if gradient is None:
            raise StreamlensError(
                f"{self._scoring.operator}(): the loss does not depend on the inputs in a way that can be "
                "differentiated; pass loss=, a function of the model's output and the labels"
            )
        step = self._eps * gradient.nan_to_num(nan=0.0).sign()
        start = leaves[0].detach()
        stepped = start + step if self._clip is None else (start + step).clamp(*self._clip)
        return self._changed(inputs, lambda _: stepped), self._tally(outputs, labels)

    def _tally(self, outputs: Any, labels: Any) -> Tensor:
        return self._scoring.tally(self._scoring.guess(logits_of(outputs, self._scoring.operator)), labels)

    def _changed(self, inputs: Any, change: Callable[[Tensor], Tensor]) -> Any:
        """Inputs with another first floating-point tensor."""
        found = False

        def visit(tensor: Tensor) -> Tensor:
            nonlocal found
            if found or not tensor.is_floating_point():
                return tensor
            found = True
            return change(tensor)

        result = map_tensors(visit, inputs)
        if not found:
            raise StreamlensError(
                f"{self._scoring.operator}(): the inputs have no floating-point tensor that could be changed "
                "by a small step"
            )
        return result
