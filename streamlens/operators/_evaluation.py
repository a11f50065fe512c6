"""Scoring a model on a data set."""

from __future__ import annotations

from torch import Tensor, nn

from streamlens.errors import StreamlensError
from streamlens.operators._batches import Loader, device_of, logits_of, moved
from streamlens.operators._model import evaluating
from streamlens.operators._scoring import Scoring

__all__ = ["score"]


def score(model: nn.Module, loader: Loader, scoring: Scoring) -> Tensor:
    """The sum of scores and the number of predictions over a data set, in evaluation mode.

    To be called within `undisturbed(model)`, and with every lens of the model paused.

    Args:
        model: The model.
        loader: The data.
        scoring: What is right.

    Raises:
        StreamlensError: There is no batch, or one that cannot be scored.
    """
    device = device_of(model)
    total: Tensor | None = None
    with evaluating(model) as run:
        for batch in loader:
            outputs, labels = loader.outputs(run, moved(batch, device))
            tally = scoring.tally(scoring.guess(logits_of(outputs, scoring.operator)), labels)
            total = tally if total is None else total + tally.to(total.device)
    if total is None:
        raise StreamlensError(f"{scoring.operator}(): the loader gave no batch")
    return total
