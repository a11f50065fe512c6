"""What the tests of metrics that evaluate the model share: frames that say when, and outputs by hand."""

from __future__ import annotations

from typing import Any

import torch
from reactivex import Observable
from reactivex import operators as ops
from torch import Tensor, nn

from streamlens.frame import Frame

__all__ = ["chained", "moving", "outputs_of", "when"]


def when(step: int) -> Frame:
    """A frame that says when to evaluate, and nothing else."""
    return Frame("when", step, ("",), torch.zeros(1))


def outputs_of(model: nn.Sequential, x: Tensor) -> dict[str, Tensor]:
    """The outputs of each module of a chain, by calling one after the other."""
    found: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, module in model.named_children():
            x = module(x)
            found[name] = x.clone()
    return found


def moving(model: nn.Module) -> Any:
    """An operator that puts a model's parameters where they are at each frame's step, as training would."""
    start = {name: p.detach().clone() for name, p in model.named_parameters()}

    def move(frame: Frame) -> None:
        generator = torch.Generator().manual_seed(frame.step)
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(start[name] + frame.step * torch.randn(p.shape, generator=generator))

    return ops.do_action(move)


def chained(*operators: Any) -> Any:
    """Operators as one."""

    def apply(source: Observable[Frame]) -> Observable[Frame]:
        return source.pipe(*operators)

    return apply
