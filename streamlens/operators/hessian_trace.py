"""`hessian_trace`: the curvature of the loss, summed over all directions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from reactivex import Observable
from torch import Tensor, nn

from streamlens.frame import Frame
from streamlens.nodes import Emitted
from streamlens.operators._base import is_whole, relabelled
from streamlens.operators._hessian import OF_LAYERS, Batch, Hessian, Loss, LossSurface, Mode, loss_surface
from streamlens.operators._model import FindModel, ModelNode, on_model
from streamlens.stream import Operator, Stream

__all__ = ["hessian_trace"]

TOPIC = "hessian_trace"


def hessian_trace(
    *,
    loss: Loss,
    batch: Batch | None = None,
    batches: Sequence[Batch] | None = None,
    probes: int = 32,
    mode: Mode = "eval",
    parameters: str | Sequence[str] | None = None,
    seed: int = 0,
    model: nn.Module | None = None,
) -> Operator:
    """The trace of the loss's Hessian, estimated, with its standard error.

    tr H = E[v' H v] for vectors v of independent signs, +1 or -1 (Hutchinson, A stochastic estimator
    of the trace of the influence matrix, 1989); the estimate is the mean over `probes` of them, unbiased,
    and its standard error s / sqrt(probes), s being their standard deviation. Of all such vectors those
    of signs have the least variance, 2 sum_{i != j} H_ij^2. With no more parameters than probes it
    is exact, from the diagonal, and the standard error 0.

    The result is topic `hessian_trace`, of the layer `""`, the model: (1, 2), components `trace` and
    `standard_error`, in the unit of the loss over that of the parameters squared. `meta` has
    `products`, the Hessian-vector products taken. The probes are the same each time: the trace's changes from
    step to step are known better than its standard error says, and its error does not average out over
    steps.

    Input: the model, and fixed batches of inputs and labels.

    When it is due, which model it is taken of, and what becomes of hooks, random numbers, frozen, tied and
    half-precision parameters is as for `hessian_eigenvalues`. NaN in parameters or batch makes it NaN.

    Cost: a copy of the model, a forward, and a gradient; then 1.7 to 2.6 gradients' time over the batch
    for each probe. Nothing waits for a GPU.

    Args:
        loss: The loss, as for `hessian_eigenvalues`.
        batch: The batch, a pair (inputs, labels).
        batches: Several batches.
        probes: How many vectors, at least 2; four times as many halve the standard error.
        mode: `"eval"` (the default) or `"train"`, as for `hessian_eigenvalues`.
        parameters: A name or globs over the parameters' names: the trace over these alone.
        seed: Of the probes, and of what the model draws.
        model: The model, on streams that come from no lens; held weakly.

    Returns:
        The operator.

    Raises:
        TypeError: `loss` is not callable, a batch is no pair, or the model is none.
        ValueError: A number out of range, or an unknown option.
        StreamlensError: When applied: no model is known; it has no trainable parameter, or one that
            is complex, or any is sharded.
        LayerNotFoundError: When applied: `parameters` matches nothing.
    """
    surface = loss_surface(
        TOPIC, loss=loss, batch=batch, batches=batches, mode=mode, parameters=parameters, seed=seed
    )
    if not is_whole(probes) or probes < 2:
        raise ValueError(f"{TOPIC}(probes={probes!r}): a whole number from 2 on, for a standard error")

    def make(stream: Stream, find: FindModel) -> ModelNode:
        return _Trace(stream, find, surface, probes)

    def check(found: nn.Module) -> None:
        surface.names(found)

    def apply(source: Observable[Frame]) -> Observable[Frame]:
        return on_model(
            source,
            make,
            f"{TOPIC}(probes={probes})",
            operator=TOPIC,
            model=model,
            check=check,
            of_layers=OF_LAYERS,
        )

    return apply


class _Trace(ModelNode):
    """Takes the Hessian's trace.

    Args:
        stream: The stream whose frames say when.
        find: Gives the model.
        surface: The loss.
        probes: How many vectors.
    """

    def __init__(self, stream: Stream, find: FindModel, surface: LossSurface, probes: int) -> None:
        super().__init__(stream, find)
        self._surface = surface
        self._probes = probes

    def evaluate(self, model: nn.Module, frame: Frame) -> Emitted:
        """The trace and its standard error."""
        with self._surface.hessian(model) as hessian:
            n = hessian.like.numel()
            if n <= self._probes:
                diagonal = torch.stack([e @ (hessian @ e) for e in torch.eye(n).to(hessian.like)])
                trace, error = diagonal.sum(), diagonal.new_zeros(())
            else:
                samples = self._samples(hessian)
                trace, error = samples.mean(), samples.std() / math.sqrt(self._probes)
        result = relabelled(
            frame,
            TOPIC,
            torch.stack([trace, error])[None],
            layers=("",),
            components=("trace", "standard_error"),
        )
        return result.replace(meta={"products": min(n, self._probes)})

    def _samples(self, hessian: Hessian) -> Tensor:
        generator = torch.Generator().manual_seed(self._surface.seed)
        found = []
        for _ in range(self._probes):
            signs = torch.randint(2, (hessian.like.numel(),), generator=generator, dtype=torch.int8)
            probe = (2 * signs - 1).to(hessian.like)
            found.append(probe @ (hessian @ probe))
        return torch.stack(found)
