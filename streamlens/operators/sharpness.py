"""`sharpness`: the largest curvature of the loss against what the learning rate can bear."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from reactivex import Observable
from torch import Tensor, nn

from streamlens.errors import StreamlensError
from streamlens.frame import Frame
from streamlens.lens import Lens
from streamlens.nodes import frame_operator
from streamlens.operators._base import checked_source, is_number, relabelled
from streamlens.operators._hessian import Batch, Loss, Mode, loss_surface
from streamlens.operators.align import AlignedFrame, align
from streamlens.operators.hessian_eigenvalues import eigenvalues, search_of
from streamlens.stream import Operator

__all__ = ["sharpness"]

RATE = "learning_rate"


def sharpness(
    *,
    loss: Loss,
    batch: Batch | None = None,
    batches: Sequence[Batch] | None = None,
    lr: float | None = None,
    momentum: float = 0.0,
    nesterov: bool = False,
    mode: Mode = "eval",
    parameters: str | Sequence[str] | None = None,
    products: int = 40,
    tolerance: float = 1e-3,
    seed: int = 0,
    model: nn.Module | None = None,
) -> Operator:
    """The largest eigenvalue of the loss's Hessian over the bound up to which gradient descent is stable.

    lambda_1 / (2 / lr) = lambda_1 lr / 2. Along an eigenvector of a quadratic loss gradient descent
    multiplies the error by 1 - lr lambda: above 2 / lr it grows. Full-batch training raises lambda_1 until
    it is there and then stays around it, at the edge of stability (Cohen et al., Gradient Descent on Neural
    Networks Typically Occurs at the Edge of Stability, ICLR 2021). Well below 1 there is room for a larger
    rate; 1 is the edge; steadily above it, the loss should rise or jump.

    The bound is plain gradient descent's unless `momentum` says otherwise: with heavy-ball momentum b
    it is (2 + 2 b) / lr, with Nesterov's (2 + 2 b) / (lr (1 + 2 b)) (the same paper, in its appendix), of
    PyTorch's SGD without dampening. Small batches settle below it. Adam and others that scale each
    parameter have another bound, of the scaled Hessian, to which this number says nothing. Weight decay
    is left out.

    Input: the model, fixed batches of inputs and labels, and the rate.

    The rate is that of the update, the largest where parameter groups differ, so that the result is then an
    upper bound. It is taken from the topic `learning_rate`: of the Lens, or of the stream in front, which
    must carry it; or it is given as `lr=`.

    The result is topic `sharpness`, of the layer `""`, the model: one number of float64, without unit. `meta`
    has `eigenvalue`, `bound` and `learning_rate`, and of the eigenvalue `converged` (1 or 0),
    `confirmed`, `residuals` and `products`. NaN passes through. Cost, and what becomes of the model: as for
    `hessian_eigenvalues` with k = 1.

    Args:
        loss: The loss, as for `hessian_eigenvalues`.
        batch: The batch, a pair (inputs, labels); the larger, the nearer to the whole loss.
        batches: Several batches.
        lr: The learning rate, where no `learning_rate` is at hand.
        momentum: The optimizer's momentum, from 0 to below 1.
        nesterov: Whether that is Nesterov's.
        mode: `"eval"` (the default) or `"train"`, as for `hessian_eigenvalues`.
        parameters: A name or globs over the parameters' names.
        products: The most Hessian-vector products.
        tolerance: Of the eigenvalue.
        seed: Of the start vector, and of what the model draws.
        model: The model, on streams that come from no lens; held weakly.

    Returns:
        The operator.

    Raises:
        TypeError: As for `hessian_eigenvalues`.
        ValueError: As for `hessian_eigenvalues`; a rate or momentum out of range.
        StreamlensError: As for `hessian_eigenvalues`; the lens has other topics selected than the rate.
    """
    share = _share_of_bound(lr, momentum, nesterov)
    surface = loss_surface(
        "sharpness", loss=loss, batch=batch, batches=batches, mode=mode, parameters=parameters, seed=seed
    )
    search = search_of("sharpness", 1, "largest", products, tolerance)
    largest = eigenvalues("sharpness", surface, search, vectors=False, model=model)

    def of(frame: Frame, rate: float) -> Frame:
        assert isinstance(frame.values, Tensor)
        meta = {
            **frame.meta,
            "eigenvalue": float(frame.values[0, 0]),
            "bound": share / rate if rate else math.inf,
            RATE: rate,
        }
        value = frame.values[:, 0] * (rate / share)
        return relabelled(frame, "sharpness", value).replace(meta=meta)

    def of_aligned(aligned: Any) -> Frame:
        assert isinstance(aligned, AlignedFrame)
        rates = aligned[1].values
        assert isinstance(rates, Tensor)
        return of(aligned[0], float(rates.max()))

    def apply(source: Observable[Frame]) -> Observable[Frame]:
        if lr is not None:
            return frame_operator(largest(source), lambda frame: of(frame, lr), f"sharpness(lr={lr:g})")
        if not isinstance(source, Lens):
            checked_source(source)
        elif source.topics and RATE not in source.topics:
            raise StreamlensError(
                f"sharpness() takes the rate from the topic {RATE!r}, and this lens has selected "
                f"{', '.join(source.topics)}; apply it to a lens without topic, or pass lr="
            )
        return frame_operator(align(largest, RATE)(source), of_aligned, "sharpness()")

    return apply


def _share_of_bound(lr: object, momentum: object, nesterov: bool) -> float:
    """The bound times the learning rate: 2 for plain gradient descent."""
    if lr is not None and (not is_number(lr) or not 0 <= lr < math.inf):
        raise ValueError(f"sharpness(lr={lr!r}): a learning rate is a number from 0 on")
    if not is_number(momentum) or not 0 <= momentum < 1:
        raise ValueError(f"sharpness(momentum={momentum!r}): from 0 to below 1")
    return 2 * (1 + momentum) / (1 + 2 * momentum if nesterov else 1)
