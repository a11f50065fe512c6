"""`generalisation_gap`: how much better a model does on what it is trained on than on what it is not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from reactivex import Observable
from torch import Tensor, nn

from streamlens.frame import Frame
from streamlens.lens import Lens
from streamlens.nodes import Emitted, frame_operator
from streamlens.operators._base import relabelled
from streamlens.operators._batches import Forward, Loader
from streamlens.operators._evaluation import score
from streamlens.operators._merge import merged
from streamlens.operators._model import FindModel, ModelNode, check_every, due_per_epoch, on_model
from streamlens.operators._scoring import Metric, Scoring, share_of
from streamlens.operators._tallies import LABELS, OUTPUT, TALLY, training_tallies
from streamlens.stream import Operator, Stream, as_stream

__all__ = ["generalisation_gap"]


def generalisation_gap(
    loader: Iterable[Any],
    *,
    train: Iterable[Any] | None = None,
    every: int | None = None,
    class_dim: int | None = None,
    ignore_index: int = -100,
    threshold: float | None = None,
    metric: Metric | None = None,
    labels: str | None = None,
    forward: Forward | None = None,
    model: nn.Module | None = None,
) -> Operator:
    """Training accuracy minus test accuracy.

    The test accuracy is that of `test_accuracy(loader)`. The training accuracy is

    - of all training batches since the last evaluation, as training itself computed them (see
      `train_accuracy`): it costs no forward, but it is of weights half an interval old and of training
      mode, so that dropout and augmentation make the gap smaller, and early on negative;
    - or, with `train=`, of that loader, measured as the test accuracy is, on the same weights: the gap
      itself, for a second evaluation.

    Input: the data held back, and topics `network_output` and `input_labels` of training unless `train` is
    given, of the shapes and dtypes that `train_accuracy` takes.

    With a `metric` it is the difference of its means, training minus test; of a loss (where less is better)
    pass its negative. The result is topic `generalisation_gap` of the layer `""`, the model, one float32 in
    [-1, 1] for an accuracy. NaN where either is; without training batches since the last evaluation there is
    no frame. The cost is that of `test_accuracy`, plus that of `train_accuracy` or of a second evaluation.

    Args:
        loader: The data held back, as for `test_accuracy`.
        train: Data of the training set.
        every: A cadence in steps; as for `test_accuracy`, each epoch unless given. Training batches
            count at every step.
        class_dim: As for `train_accuracy`.
        ignore_index: As for `train_accuracy`.
        threshold: As for `train_accuracy`.
        metric: As for `train_accuracy`.
        labels: As for `test_accuracy`.
        forward: As for `test_accuracy`.
        model: The model, on streams that come from no lens; held weakly. There, frames of topics other
            than `network_output` and `input_labels` say when.

    Returns:
        The operator.

    Raises:
        TypeError: As for `test_accuracy`.
        ValueError: As for `test_accuracy`.
        StreamlensError: As for `test_accuracy` and `train_accuracy`.
    """
    operator = "generalisation_gap"
    scoring = Scoring(operator, class_dim, ignore_index, threshold, metric)
    held_back = Loader(operator, loader, labels, forward)
    trained_on = None if train is None else Loader(operator, train, labels, forward)
    check_every(operator, every)

    def make(stream: Stream, find: FindModel) -> ModelNode:
        return _Gap(stream, find, held_back, trained_on, scoring)

    def apply(source: Observable[Frame]) -> Observable[Frame]:
        when = (
            due_per_epoch(source, every) if trained_on is not None else _with_tallies(source, scoring, every)
        )
        return on_model(when, make, f"{operator}({scoring.plan})", operator=operator, model=model)

    return apply


def _with_tallies(source: Observable[Frame], scoring: Scoring, every: int | None) -> Observable[Frame]:
    """When an evaluation is due, and before it what the training batches came to."""
    lens = as_stream(source).lens
    if lens is None:

        def others(plain: Observable[Frame]) -> Observable[Frame]:
            of_batches = (OUTPUT, LABELS)
            kept = frame_operator(plain, lambda f: None if f.topic in of_batches else f, "other topics")
            return due_per_epoch(kept, every)

        tallied = [lambda plain: training_tallies(plain, scoring), others]
        return merged(source, tallied, (*as_stream(source).plan, "training batches"))
    when = as_stream(due_per_epoch(source, every))
    whole = replace(lens.view, topics=(), selectors=(), reduction=None, every=1)
    tallies = training_tallies(Lens(lens.source, lens.session, whole), scoring)
    return merged(tallies, [tallies, when], when.plan)


class _Gap(ModelNode):
    """Adds up the training batches between evaluations.

    Args:
        stream: Tallies of training batches, and frames that say when to evaluate.
        find: Gives the model.
        held_back: The test data.
        trained_on: Training data to evaluate in place of the tallies.
        scoring: What is right.
    """

    def __init__(
        self, stream: Stream, find: FindModel, held_back: Loader, trained_on: Loader | None, scoring: Scoring
    ) -> None:
        super().__init__(stream, find)
        self._held_back = held_back
        self._trained_on = trained_on
        self._scoring = scoring
        self._total: Tensor | None = None

    def on_frame(self, frame: Frame) -> Emitted:
        """Take in a tally, or evaluate."""
        if self._trained_on is None and frame.topic == TALLY:
            tally = frame.values[0]
            self._total = tally if self._total is None else self._total.to(tally.device) + tally
            return None
        return super().on_frame(frame)

    def evaluate(self, model: nn.Module, frame: Frame) -> Emitted:
        """The difference, unless nothing was trained on since the last one."""
        if self._trained_on is not None:
            train = score(model, self._trained_on, self._scoring)
        elif self._total is None:
            return None
        else:
            train, self._total = self._total, None
        test = score(model, self._held_back, self._scoring)
        gap = share_of(train) - share_of(test).to(train.device)
        return relabelled(frame, "generalisation_gap", gap, layers=("",))

    def state_dict(self) -> dict[str, Any]:
        """The training batches since the last evaluation."""
        return {"total": self._total}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        self._total = state["total"]
