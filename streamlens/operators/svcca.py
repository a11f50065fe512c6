"""`svcca`: how alike what a layer represents is to what it represented in an earlier checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from streamlens.operators._base import is_number
from streamlens.operators._model import FindModel
from streamlens.operators._places import Places
from streamlens.operators._representations import (
    ForwardProbe,
    Probe,
    Reference,
    RepresentationNode,
    Selectors,
    on_layers,
)
from streamlens.operators._spectrum import directions_needed
from streamlens.stream import Operator, Stream

__all__ = ["svcca"]


def svcca(
    probe: Any,
    *,
    reference: nn.Module | Mapping[str, Any] | Literal["previous"] | None = None,
    share: float = 0.99,
    places: Places = "each",
    unit_dim: int | None = None,
    max_rows: int | None = 4096,
    forward: ForwardProbe | None = None,
    model: nn.Module | None = None,
) -> Operator:
    """The similarity of each layer with an earlier checkpoint of itself: singular vector CCA.

    The outputs of a layer for the fixed `probe` are a matrix X, (n, d), of n data points and d units, Y that
    of the checkpoint; columns are centred. Of both the singular directions are kept that hold `share` of the
    variance, with left singular vectors U_X, (n, k), and U_Y, (n, l). The canonical correlations of what
    remains are the singular values of U_X^T U_Y, and SVCCA is the mean of these min(k, l) numbers (Raghu,
    Gilmer, Yosinski and Sohl-Dickstein, SVCCA, 2017). It is 1 where the layer spans what it spanned, whatever
    the basis, and it is reached from the first layers on as training converges (the same, section 4.2).

    The checkpoint is `reference`: a model, or the state dict of an earlier state of this one, both copied
    when this is called; unless given, the model as it is at the first evaluation, whose own value is 1. With
    `"previous"` it is the model at the evaluation before: the number tells whether a layer has come to rest,
    and the first evaluation gives none. What it comes to is part of the saved state, and survives a resume.

    Used as `lens.pipe(every(500), svcca(inputs))`: due at each update of the lens's cadence, or at each frame
    of another stream, once a step. Layers are those of `activations`; `layers()` in front chooses. The model
    is copied, and the copy evaluated in evaluation mode, without hooks, in at least float32: the run, its
    modes, buffers and random numbers are as they were.

    The result is topic `svcca`, float32 in [0, 1] a layer. NaN where nothing varies, where an output has NaN
    or inf in it, and of fewer than two data points. A layer without an output of several examples, or
    whose data points became more or fewer, is left out and reported once.

    Choose a probe of several times as many data points as layers have units: n points have n - 1 directions,
    and where k + l exceeds that, correlations of 1 are forced. Pixels and tokens are data points of their own
    by default, of which `max_rows` are taken, the same ones each time, spread over all places alike.

    Cost, each time: a copy of the model, a forward of the probe, and for each layer in float64 n d min(n, d)
    multiplications and an eigendecomposition of size min(n, d), which waits for a GPU; kept of the
    checkpoint are n k numbers a layer.

    Args:
        probe: The inputs: a tensor, a tuple of arguments or a mapping of named ones, without labels.
        reference: The checkpoint: a model, a state dict, or `"previous"`.
        share: Of the variance, above 0 and at most 1; with 1 this is CCA of all that is above rounding.
        places: What becomes of pixels and tokens: `"each"` is a data point; `"mean"` over those of an
            example; `"flatten"`, each is a unit of its own.
        unit_dim: The dimension that counts the units: unless given, by the module's class, as for
            `saturation`.
        max_rows: The most data points; None for all.
        forward: A function of the model and the probe, in place of calling the one with the other.
        model: The model, on streams that come from no lens; held weakly.

    Returns:
        The operator.

    Raises:
        TypeError: The probe has no tensors, or the reference is none of those.
        ValueError: An option out of range.
        StreamlensError: When applied: no model is known, it does not take the probe or is sharded, or the
            reference lacks parameters of it.
    """
    operator = "svcca"
    given = Probe(operator, probe, places, unit_dim, max_rows, forward)
    if not is_number(share) or not 0 < share <= 1:
        raise ValueError(f"{operator}(share={share!r}): a share of the variance above 0 and at most 1")
    start = Reference(operator, reference)

    def make(stream: Stream, find: FindModel, selectors: Selectors) -> RepresentationNode:
        return _Svcca(stream, find, given, selectors, start, float(share))

    plan = f"{operator}({'' if share == 0.99 else f'share={share:g}, '}{places})"
    return on_layers(make, plan, probe=given, reference=start, model=model)


class _Svcca(RepresentationNode):
    """Keeps an orthonormal basis of the singular directions of each layer.

    Args:
        stream: As for `RepresentationNode`.
        find: As for `RepresentationNode`.
        probe: As for `RepresentationNode`.
        selectors: As for `RepresentationNode`.
        reference: As for `RepresentationNode`.
        share: Of the variance.
    """

    def __init__(
        self,
        stream: Stream,
        find: FindModel,
        probe: Probe,
        selectors: Selectors,
        reference: Reference,
        share: float,
    ) -> None:
        super().__init__(stream, find, probe, selectors, reference)
        self._share = share

    def keep(self, rows: Tensor) -> Tensor:
        """The left singular vectors, (n, k)."""
        rows = rows - rows.mean(0)
        n, units = rows.shape
        gram = rows @ rows.mT if n <= units else rows.mT @ rows
        if not gram.isfinite().all():
            # A decomposition raises, or never ends, on what is not finite.
            return rows.new_full((n, 1), math.nan)
        values, vectors = torch.linalg.eigh(gram)
        kept: Tensor = vectors.flip(1)[:, : int(directions_needed(values.flip(0), self._share))]
        if n > units:
            # Rounding of the squares has left those of little variance not quite orthogonal.
            kept = torch.linalg.qr(rows @ kept).Q
        return kept

    def compare(self, now: Tensor, then: Tensor) -> Tensor:
        """The mean canonical correlation."""
        products = now.mT @ then
        if not products.numel() or not products.isfinite().all():
            return products.new_full((), math.nan)
        correlations: Tensor = torch.linalg.svdvals(products)
        return correlations.clamp(max=1).mean()
