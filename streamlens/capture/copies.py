"""Optimizers that own copies of a model's parameters: master weights, flat buffers, shards."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from streamlens.errors import StreamlensError, did_you_mean

if TYPE_CHECKING:
    from streamlens.capture.model import ModelIndex

__all__ = ["Copy", "check_stand_ins", "copies_of", "held_by", "strangers_among"]


@dataclass(frozen=True, eq=False)
class Copy:
    """What an optimizer holds in place of a parameter: a tensor of its own, or a part of one.

    Attributes:
        base: The optimizer's tensor.
        shape: The parameter's shape.
        stride: How the parameter's elements lie in the memory of `base`.
        offset: Where they begin there, counted from the first element of `base`.
    """

    base: Tensor
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int

    @property
    def tensor(self) -> Tensor:
        """The copy itself, in the parameter's shape, over the optimizer's memory."""
        whole = self.base.shape == self.shape and self.base.stride() == self.stride
        return self.base if whole else self.part_of(self.base.detach())

    @property
    def gradient(self) -> Tensor | None:
        """The part of the optimizer's gradient that is this parameter's."""
        return None if self.base.grad is None else self.part_of(self.base.grad)

    def part_of(self, tensor: Tensor) -> Tensor:
        """This parameter's part of a tensor that has one element for each of `base`; others as they are."""
        base = self.base
        if tensor.shape != base.shape or (base.shape == self.shape and base.stride() == self.stride):
            return tensor
        if tensor.stride() != base.stride():
            tensor = torch.empty_like(base, dtype=tensor.dtype, device=tensor.device).copy_(tensor)
        return tensor.as_strided(self.shape, self.stride, tensor.storage_offset() + self.offset)


def held_by(optimizer: Optimizer) -> list[Tensor]:
    """The tensors that an optimizer updates."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def copies_of(
    model: nn.Module, index: ModelIndex, optimizers: Sequence[Optimizer], owners: object
) -> dict[str, Copy]:
    """Who stands for which parameter, as told by `observe(owners=...)`.

    Args:
        model: The model.
        index: The model's names.
        optimizers: The optimizers that hold the copies.
        owners: A tensor of an optimizer, or a view into one, by the name of the parameter.

    Raises:
        TypeError: It is no mapping of names to tensors.
        StreamlensError: A name is none of the model's, a tensor does not have the parameter's elements, or
            no optimizer holds it.
    """
    if not isinstance(owners, Mapping):
        raise TypeError(
            f"observe(owners=...) needs a mapping of parameter names to tensors, got {type(owners).__name__}"
        )
    if owners and not optimizers:
        raise StreamlensError(
            "observe(owners=...) says which tensors of an optimizer stand for the model's parameters: pass "
            "that optimizer too, as optimizers=[...]"
        )
    parameters = dict(model.named_parameters(remove_duplicate=False))
    by_name = {entry.name: entry for entry in index.entries}
    held = [tensor for optimizer in optimizers for tensor in held_by(optimizer)]
    copies: dict[str, Copy] = {}
    for name, tensor in owners.items():
        # A wrapper's or a tied parameter's other name will do too.
        entry = by_name.get(name) or index.by_id.get(id(parameters.get(name)))
        if entry is None:
            hint = did_you_mean(str(name), by_name) or f"it has {', '.join(map(repr, list(by_name)[:8]))}"
            raise StreamlensError(f"observe(owners=...): the model has no parameter {name!r}: {hint}")
        if not isinstance(tensor, Tensor):
            raise TypeError(f"observe(owners=...): {name!r} needs a tensor, got {type(tensor).__name__}")
        copies[entry.name] = _copy(name, tensor, entry.parameter, held)
    return copies


def _copy(name: str, tensor: Tensor, parameter: Tensor, held: Iterable[Tensor]) -> Copy:
    """The place of one copy within the optimizer's tensor that has it."""
    shape = parameter.shape
    if tensor.shape != shape and tensor.shape != (parameter.numel(),):
        raise StreamlensError(
            f"observe(owners=...): {name!r} has shape {tuple(shape)}, and its owner {tuple(tensor.shape)}: "
            "pass the part of the optimizer's tensor that stands for this parameter, such as "
            "flat[start:stop].view(parameter.shape)"
        )
    base = next((t for t in held if t is tensor), None)
    if base is None:
        base = next((t for t in held if _covers(t, tensor)), None)
    if base is None:
        raise StreamlensError(
            f"observe(owners=...): the owner of {name!r} is in none of the optimizers, nor a view into one "
            "of their tensors: pass the tensor that the optimizer was made from"
        )
    try:
        view = tensor.detach().view(shape)
    except RuntimeError:
        raise StreamlensError(
            f"observe(owners=...): the owner of {name!r} has other strides than its parameter's shape "
            f"{tuple(shape)} can be laid over: pass a view of that shape"
        ) from None
    return Copy(base, shape, view.stride(), int(view.storage_offset() - base.storage_offset()))


def _covers(base: Tensor, part: Tensor) -> bool:
    """Whether one tensor's memory lies within that of another."""
    if base.dtype != part.dtype or base.device != part.device or base.layout is not torch.strided:
        return False
    if part.layout is not torch.strided or not part.numel():
        return False
    if base.untyped_storage().data_ptr() != part.untyped_storage().data_ptr():
        return False
    (first, last), (begin, end) = _extent(part), _extent(base)
    return begin <= first and last <= end


def _extent(tensor: Tensor) -> tuple[int, int]:
    """The first and the last element of its storage that a tensor reaches."""
    first = int(tensor.storage_offset())
    reach = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return first, first + reach


def strangers_among(
    model: nn.Module, optimizers: Iterable[Optimizer], copies: Mapping[str, Copy]
) -> list[Optimizer]:
    """The optimizers that hold none of the model's parameters, and nothing known to stand for one."""
    ours = {id(p) for p in model.parameters()} | {id(copy.base) for copy in copies.values()}
    return [o for o in optimizers if not any(id(tensor) in ours for tensor in held_by(o))]


def check_stand_ins(
    model: nn.Module, index: ModelIndex, optimizers: Sequence[Optimizer], copies: Mapping[str, Copy]
) -> None:
    """Raise for an optimizer that owns nothing of the model, nor copies of it.

    One whose tensors hold what the model's parameters hold, in whatever order and layout, stands for
    them: the model's own parameters are compared before and after its step.

    Args:
        model: The model.
        index: The model's names.
        optimizers: The optimizers given to `observe`.
        copies: What `owners=` says.

    Raises:
        StreamlensError: Such an optimizer is among them.
    """
    strangers = strangers_among(model, optimizers, copies)
    if not strangers:
        return
    owned = {id(tensor) for optimizer in optimizers for tensor in held_by(optimizer)}
    rest = [e.parameter for e in index.entries if id(e.parameter) not in owned and e.name not in copies]
    held = [tensor for optimizer in strangers for tensor in held_by(optimizer)]
    if not (resembles(held, [p for p in rest if p.requires_grad]) or resembles(held, rest)):
        raise StreamlensError(
            f"observe(optimizers=...): this {type(strangers[0]).__name__} owns none of the model's "
            "parameters, nor copies of their present values; pass the one that was made from "
            "model.parameters(), or leave the option out and let optimizers be found. If it owns copies "
            "(master weights, a flat buffer, a shard), say what stands for what: "
            "owners={'name of the parameter': tensor of the optimizer}"
        )


def resembles(copies: Sequence[Tensor], originals: Sequence[Tensor]) -> bool:
    """Whether tensors hold the values of others, to rounding, in any order and layout, padded or not."""
    if not originals or sum(t.numel() for t in copies) < sum(t.numel() for t in originals):
        return False
    if any(t.is_meta or hasattr(t, "to_local") for t in (*copies, *originals)):
        # Nothing to compare, or a collective that the other ranks may not take part in.
        return False
    total, square = _moments(originals)
    other_total, other_square = _moments(copies)
    precisions = [torch.finfo(t.dtype).eps for t in (*copies, *originals) if _is_inexact(t)]
    tolerance = 8 * max(precisions, default=0.0)
    return (
        abs(total - other_total) <= tolerance * square**0.5
        and abs(square - other_square) <= tolerance * square
    )


def _is_inexact(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _moments(tensors: Iterable[Tensor]) -> tuple[float, float]:
    """The sum and the sum of squares of all elements."""
    total = square = 0.0
    for tensor in tensors:
        value = tensor.detach()
        value = torch.view_as_real(value) if value.is_complex() else value
        total += float(value.sum(dtype=torch.float64))
        square += float(torch.linalg.vector_norm(value.float() if value.element_size() < 4 else value)) ** 2
    return total, square
