"""What the metrics of curvature share: a loss as a function of the parameters, and its Hessian's products."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from streamlens.errors import StreamlensError
from streamlens.layers import LayerSelector
from streamlens.operators._base import is_whole
from streamlens.operators._batches import called, examples_in, map_tensors, moved
from streamlens.operators._isolated import (
    isolated_copy,
    repeatable,
    twice_differentiable,
    widened_input,
)

__all__ = ["OF_LAYERS", "Batch", "Hessian", "Loss", "LossSurface", "Mode", "loss_surface"]

Loss: TypeAlias = Callable[[Any, Any], Tensor]
"""A function of the model's output and the labels."""
Batch: TypeAlias = tuple[Any, Any]
Mode: TypeAlias = Literal["eval", "train"]
_MODES: Final = ("eval", "train")

OF_LAYERS: Final = "for some parameters pass parameters=, such as parameters='head.*'"
"""What to do instead of narrowing a lens to layers."""


@dataclass(frozen=True, slots=True, eq=False)
class LossSurface:
    """The mean loss over fixed batches as a function of a model's trainable parameters.

    Attributes:
        operator: The metric's name, for messages.
        loss: The loss, a mean over the examples of a batch.
        batches: The batches, pairs of input and labels.
        mode: The mode that the model is evaluated in.
        selector: Which parameters, by globs over their names; all without globs.
        seed: Of what the model draws, such as dropout's masks.
    """

    operator: str
    loss: Loss
    batches: tuple[Batch, ...]
    mode: Mode
    selector: LayerSelector
    seed: int

    def names(self, model: nn.Module) -> list[str]:
        """The parameters it is a function of, in model order.

        Raises:
            LayerNotFoundError: A glob matches no trainable parameter.
            StreamlensError: There is none, or one that a Hessian cannot be taken of.
        """
        trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not trainable:
            raise StreamlensError(f"{self.operator}(): the model has no trainable parameters")
        self.selector.check_globs(trainable)
        names = [n for n in trainable if not self.selector.globs or self.selector.matches_name(n)]
        for name in names:
            parameter = trainable[name]
            if parameter.is_complex():
                raise StreamlensError(
                    f"{self.operator}(): parameter {name!r} is complex, and the Hessian is defined for real "
                    "parameters; leave it out with parameters=, or hold it as torch.view_as_real"
                )
        return names

    def dimension(self, model: nn.Module) -> int | None:
        """How many numbers it is a function of; None while a lazy parameter has no shape."""
        parameters = dict(model.named_parameters())
        chosen = [parameters[name] for name in self.names(model)]
        return None if any(is_lazy(p) for p in chosen) else sum(p.numel() for p in chosen)

    @contextlib.contextmanager
    def hessian(self, model: nn.Module) -> Iterator[Hessian]:
        """The Hessian at a model as it is, taken on a copy of it.

        Args:
            model: The model.
        """
        names = self.names(model)
        with twice_differentiable(model):
            others = (self.loss,) if isinstance(self.loss, nn.Module) else ()
            isolated = isolated_copy(model, *others)
            copied = isolated.modules[0].train(self.mode == "train")
            loss = isolated.modules[1] if others else self.loss
            for name, parameter in isolated.parameters.items():
                # The others are constants: their second derivatives would cost and be thrown away.
                parameter.requires_grad_(name in names)
            device = isolated.parameters[names[0]].device
            batches = [cast("Batch", moved(_widened(batch), device)) for batch in self.batches]

            def gradients(batch: Batch) -> list[Tensor]:
                with repeatable(copied, self.seed):
                    value = loss(called(copied, batch[0]), batch[1])
                self._check(value)
                found = torch.autograd.grad(value, chosen, create_graph=True, allow_unused=True)
                if all(gradient is None for gradient in found):
                    raise self._independent()
                pairs = zip(found, chosen, strict=True)
                return [torch.zeros_like(p) if g is None else g for g, p in pairs]

            chosen = [isolated.parameters[name] for name in names]
            weights = [examples_in(batch) for batch in batches]
            total = sum(weights)
            yield Hessian(
                dict(zip(names, chosen, strict=True)), gradients, batches, [w / total for w in weights]
            )

    def _check(self, value: object) -> None:
        if not isinstance(value, Tensor) or value.numel() != 1:
            what = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise StreamlensError(
                f"{self.operator}(): the loss must be one number, the mean over the batch's examples; "
                f"it gave {what}"
            )
        if not value.requires_grad:
            raise self._independent()

    def _independent(self) -> StreamlensError:
        return StreamlensError(
            f"{self.operator}(): the loss does not depend on the parameters: the model or the loss detaches "
            "its result, computes it without PyTorch, or refers to a model by other means than its own "
            "attributes, so that a copy of it does not reach its parameters"
        )


class Hessian:
    """The matrix of second derivatives, by its products with vectors.

    With one batch the graph of the gradient is kept between products; with several it is built for
    each product anew, so that memory does not grow with their number.

    Args:
        parameters: What the loss is differentiated by, by name.
        gradients: The gradient of a batch's loss, with its graph.
        batches: The batches.
        weights: The weight of each batch, in all 1.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        gradients: Callable[[Batch], list[Tensor]],
        batches: Sequence[Batch],
        weights: Sequence[float],
    ) -> None:
        self._parameters = dict(parameters)
        self._gradients = gradients
        self._batches = list(zip(batches, weights, strict=True))
        self._kept = gradients(batches[0]) if len(batches) == 1 else None
        dtypes = {p.dtype for p in parameters.values()}
        first = next(iter(parameters.values()))
        self.like = torch.zeros(
            sum(p.numel() for p in parameters.values()),
            dtype=torch.float64 if torch.float64 in dtypes else torch.float32,
            device=first.device,
        )
        """A vector of the kind that it takes."""

    def split(self, vectors: Tensor) -> dict[str, Tensor]:
        """Vectors (..., n) as the parameters' shapes (..., *shape), by name."""
        parts = vectors.split([p.numel() for p in self._parameters.values()], dim=-1)
        return {
            name: part.reshape(*vectors.shape[:-1], *p.shape).to(p)
            for part, (name, p) in zip(parts, self._parameters.items(), strict=True)
        }

    def __matmul__(self, vector: Tensor) -> Tensor:
        """The product with a vector."""
        direction = list(self.split(vector).values())
        result = torch.zeros_like(self.like)
        for batch, weight in self._batches:
            kept = self._kept is not None
            gradients = self._kept if self._kept is not None else self._gradients(batch)
            # A gradient that is constant has no second derivative, and no graph either.
            pairs = [(g, v) for g, v in zip(gradients, direction, strict=True) if g.requires_grad]
            if not pairs:
                continue
            outputs, directions = zip(*pairs, strict=True)
            products = torch.autograd.grad(
                outputs,
                list(self._parameters.values()),
                grad_outputs=directions,
                retain_graph=kept,
                allow_unused=True,
                materialize_grads=True,
            )
            result += weight * torch.cat([p.detach().reshape(-1).to(self.like) for p in products])
        return result


def loss_surface(
    operator: str,
    *,
    loss: Loss,
    batch: Batch | None,
    batches: Sequence[Batch] | None,
    mode: Mode,
    parameters: str | Sequence[str] | None,
    seed: int,
) -> LossSurface:
    """Check what a metric of curvature was given.

    Raises:
        TypeError: The loss is not callable, or a batch is no pair.
        ValueError: Both or neither of batch and batches, none of them, an unknown mode.
    """
    if not callable(loss):
        raise TypeError(
            f"{operator}(loss={loss!r}): loss is a function of the model's output and the labels, "
            "such as nn.CrossEntropyLoss()"
        )
    if (batch is None) == (batches is None):
        raise ValueError(
            f"{operator}() takes either batch=(inputs, labels) or batches=[(inputs, labels), ...]"
        )
    if batches is not None and (not isinstance(batches, list | tuple) or not batches):
        raise TypeError(
            f"{operator}(batches=...) takes a list of pairs (inputs, labels), got {_shown(batches)}; the "
            "batches are fixed, so take a few from a loader: list(itertools.islice(loader, 4))"
        )
    given = (batch,) if batches is None else tuple(batches)
    if batches is None and _is_several(batch):
        raise TypeError(
            f"{operator}(batch=...) takes one pair (inputs, labels), and was given what looks like several: "
            "pass them as batches=[(inputs, labels), ...] (and one whose inputs and labels are alike, two "
            "tensors each, as batches=[batch])"
        )
    for entry in given:
        if not isinstance(entry, list | tuple) or len(entry) != 2:
            raise TypeError(f"{operator}() takes a batch as a pair (inputs, labels), got {_shown(entry)}")
    if mode not in _MODES:
        raise ValueError(f"{operator}(mode={mode!r}): it is 'eval' or 'train'")
    globs = [parameters] if isinstance(parameters, str) else [] if parameters is None else parameters
    if not isinstance(globs, list | tuple) or not all(isinstance(glob, str) for glob in globs):
        raise TypeError(f"{operator}(parameters={parameters!r}): names or globs such as 'head.*'")
    if not is_whole(seed) or seed < 0:
        raise ValueError(f"{operator}(seed={seed!r}): a whole number from 0 on")
    pairs = tuple(cast("Batch", tuple(entry)) for entry in given if entry is not None)
    return LossSurface(operator, loss, pairs, mode, LayerSelector(globs=tuple(globs)), seed)


def _is_several(batch: object) -> bool:
    """Whether it is a list of pairs (inputs, labels), and not a pair, as far as anything tells them apart."""
    if not isinstance(batch, list | tuple) or not batch:
        return False
    if not all(isinstance(entry, list | tuple) and len(entry) == 2 for entry in batch):
        return False
    # Inputs and labels that are two tensors each may be a pair; alike in every respect they are not.
    return len(batch) != 2 or _form(batch[0]) == _form(batch[1])


def _form(value: Any) -> Any:
    """Types and shapes in nested containers, but for the number of examples."""
    if isinstance(value, Tensor):
        return value.dtype, value.shape[1:]
    if isinstance(value, Mapping):
        return {key: _form(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_form(entry) for entry in value]
    return type(value)


def _shown(value: object) -> str:
    if isinstance(value, list | tuple):
        return f"a {type(value).__name__} of {len(value)}"
    return f"{type(value).__name__}"


def _widened(batch: Any) -> Any:
    """A batch without graph and half precision."""
    return map_tensors(lambda tensor: widened_input(tensor.detach()), batch)
