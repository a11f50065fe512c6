"""`train_accuracy`: the share of right predictions in the training batches."""

from __future__ import annotations

from reactivex import Observable

from streamlens.frame import Frame
from streamlens.operators._scoring import Metric, Scoring
from streamlens.operators._tallies import training_tallies
from streamlens.stream import Operator

__all__ = ["train_accuracy"]


def train_accuracy(
    *,
    class_dim: int | None = None,
    ignore_index: int = -100,
    threshold: float | None = None,
    metric: Metric | None = None,
) -> Operator:
    """The share of a step's training examples whose label has the largest output, before the update.

    It costs no forward: the outputs and labels are those of training itself, in its mode (with dropout,
    batch statistics and augmentation). A step's micro-batches count by their predictions: the number of
    right ones over the number of all. `test_accuracy` measures in evaluation mode, on any data.

    Input: raw `network_output`, of any floating dtype, and `input_labels`, which come with a watched loss
    (`observe(model, loss=criterion)`, `lens.watch_loss(function)`) or a model that is given `labels=` and
    returns a loss. Outputs are (N, C, ...) with labels (N, ...), as for `nn.CrossEntropyLoss`; where only
    that fits, (N, ..., C), also with the labels of all places in a row. Labels may be class probabilities.
    Other conventions, such as that of language models which shift the labels themselves, take `metric`.

    The result is topic `train_accuracy` of the layer `""`, the model, one float32 in [0, 1] a step; NaN
    where every label is ignored. Outputs that have NaN among them are wrong. Under data parallelism a Lens
    gives that of the global batch, on every rank, with two numbers a micro-step in the message of the update;
    any other stream gives that of this rank's part. The cost is one pass over the outputs (two if they have
    three dimensions or more and `class_dim` is not given; a copy of them with `metric`); nothing waits for a
    GPU. Streams that come from no lens give a step when a later one comes.

    Args:
        class_dim: The dimension of the outputs that counts the classes.
        ignore_index: The label that does not count, as for `nn.CrossEntropyLoss`.
        threshold: For outputs that are one number for each label (binary, multi-label): yes above it. 0
            for logits, 0.5 for probabilities.
        metric: A function of outputs and labels in place of all that, to a score for each
            prediction, or to their mean, which then counts by the batch's examples. Under data
            parallelism one at the top level of a module, since the ranks tell each other of it.

    Returns:
        The operator.

    Raises:
        TypeError: `metric` is no function.
        ValueError: An option that is none.
        StreamlensError: When applied: the stream carries numbers and not tensors; on several ranks, a
            `metric` that does not pickle. While training, reported: no labels came, or they do not fit the
            outputs.
    """
    scoring = Scoring("train_accuracy", class_dim, ignore_index, threshold, metric)

    def apply(source: Observable[Frame]) -> Observable[Frame]:
        return training_tallies(source, scoring, shares="train_accuracy")

    return apply
