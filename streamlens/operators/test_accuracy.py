"""`test_accuracy`: the share of right predictions on data held back."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from reactivex import Observable
from torch import nn

from streamlens.frame import Frame
from streamlens.nodes import Emitted
from streamlens.operators._base import relabelled
from streamlens.operators._batches import Forward, Loader
from streamlens.operators._evaluation import score
from streamlens.operators._model import FindModel, ModelNode, check_every, due_per_epoch, on_model
from streamlens.operators._scoring import Metric, Scoring, share_of
from streamlens.stream import Operator, Stream

__all__ = ["test_accuracy"]


def test_accuracy(
    loader: Iterable[Any],
    *,
    every: int | None = None,
    class_dim: int | None = None,
    ignore_index: int = -100,
    threshold: float | None = None,
    metric: Metric | None = None,
    labels: str | None = None,
    forward: Forward | None = None,
    model: nn.Module | None = None,
) -> Operator:
    """The share of a data set's examples whose label has the largest output of the model as it is then.

    Right predictions over all predictions, so that a last batch with fewer examples counts for what it has.
    The model runs in evaluation mode, without gradients and unseen by every lens, uncompiled and without data
    parallelism around it: each rank may evaluate or not. Afterwards modes and random generators (of PyTorch,
    NumPy and Python, and those that the loader draws its order from) are as they were.

    When: on a Lens at the end of each epoch (`lens.epochs()`, `lens.batches()` or `lens.epoch_finished()`
    tell of it), or after the updates of steps divisible by `every`, or of the cadence that the lens was
    given: `lens.pipe(test_accuracy(loader, every=500))`. On other streams at each frame, once a step.

    A batch is a pair (inputs, labels), a longer sequence whose last entry is the labels, or a mapping with
    `labels`, `label`, `targets`, `target` or `y` in it; the rest are the model's arguments, moved to its
    device. Outputs are as for `train_accuracy`; of nested ones it is `logits` if they have that, else the
    first tensor. Everything else goes through `forward`, which may also compute under autocast.

    The result is topic `test_accuracy` of the layer `""`, the model, one float32 in [0, 1]; NaN where every
    label is ignored. Outputs that have NaN among them are wrong. The cost is a forward pass over the
    loader each time, on the training thread; beside what the loader does, nothing waits for a GPU.
    `lens.derive("test_accuracy", lens.pipe(test_accuracy(loader)))` is for whoever looks for that topic, such
    as the rule `overfitting`.

    Args:
        loader: Anything that yields batches again each time, such as a DataLoader or a list. Of one with
            persistent workers a copy is gone through, since the training loop may be in the midst of it.
        every: A cadence in steps.
        class_dim: As for `train_accuracy`.
        ignore_index: As for `train_accuracy`.
        threshold: As for `train_accuracy`.
        metric: As for `train_accuracy`.
        labels: The key of the labels in a batch that is a mapping.
        forward: A function of the model and a batch (on the model's device) to outputs and labels.
        model: The model, on streams that come from no lens; held weakly.

    Returns:
        The operator.

    Raises:
        TypeError: The loader is none, or can be gone through only once; a function is none.
        ValueError: An option that is none, or an empty loader.
        StreamlensError: When applied: no model is known, or it is sharded. While training, reported: a batch
            that is neither of these, or labels that do not fit the outputs.
    """
    operator = "test_accuracy"
    scoring = Scoring(operator, class_dim, ignore_index, threshold, metric)
    batches = Loader(operator, loader, labels, forward)
    check_every(operator, every)

    def make(stream: Stream, find: FindModel) -> ModelNode:
        return _TestAccuracy(stream, find, batches, scoring)

    def apply(source: Observable[Frame]) -> Observable[Frame]:
        when = due_per_epoch(source, every)
        return on_model(when, make, f"{operator}({scoring.plan})", operator=operator, model=model)

    return apply


test_accuracy.__test__ = False  # type: ignore[attr-defined] # by its name pytest would take it for a test


class _TestAccuracy(ModelNode):
    """Scores the model.

    Args:
        stream: The stream whose frames say when.
        find: Gives the model.
        loader: The data.
        scoring: What is right.
    """

    def __init__(self, stream: Stream, find: FindModel, loader: Loader, scoring: Scoring) -> None:
        super().__init__(stream, find)
        self._loader = loader
        self._scoring = scoring

    def evaluate(self, model: nn.Module, frame: Frame) -> Emitted:
        """The share of right predictions."""
        tally = score(model, self._loader, self._scoring)
        return relabelled(frame, "test_accuracy", share_of(tally), layers=("",))
