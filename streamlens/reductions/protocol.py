"""`Reduction`: a function of one tensor to a number or a fixed-size vector, as a hashable value."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from streamlens.reductions.statistic import Statistic, Statistics
from streamlens.reductions.summaries import summarise

__all__ = ["FunctionReduction", "Reduction", "needed_statistics"]


class Reduction:
    """A function of one tensor to a number or a fixed-size vector, for many tensors at once.

    Subclass it as a frozen dataclass (equal parameters must compare and hash equal) and write
    either `statistics` with `finish`, or `reduce`.
    """

    statistics: ClassVar[tuple[Statistic, ...]] = ()
    adds: ClassVar[bool] = False
    """Whether `merge` adds up, so that parts need not be kept apart on the way."""
    tells_finite: ClassVar[bool] = False
    """Whether the value of `reduce` is finite exactly where what it looks at is."""
    unremarkable: ClassVar[Tensor | None] = None
    """The value that nobody has to be told of, if there is one: this very tensor, as `reduce_one` gives it.

    Where all layers of a pass have it, no frame is made of its activations, but for the first steps after
    others had come, so that it shows that they are over.
    """
    by_layer: ClassVar[bool] = False
    """Whether what becomes of a tensor depends on the layer that it is of; see `reduce_layer`."""
    components: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """What is appended to the topic: `weights` becomes `weights.<name>`."""
        raise NotImplementedError

    def needs(self) -> tuple[Statistic, ...]:
        """The statistics that `finish` reads; none means that `reduce` does the work."""
        return self.statistics

    def finish(self, statistics: Statistics, count: Tensor) -> Tensor:
        """The values of all layers from their statistics.

        Args:
            statistics: A vector a statistic named by `needs`, one entry a layer.
            count: Elements in each layer's tensor.
        """
        raise NotImplementedError

    def reduce(self, tensors: Sequence[Tensor]) -> Tensor:
        """The values of several tensors, stacked: shape `[layers, ...]`."""
        needs = self.needs()
        table, count = summarise(tensors, needs)
        return self.finish(table, count)

    def reduce_one(self, tensor: Tensor) -> Tensor:
        """The value of one tensor, which may be kept."""
        with torch.no_grad():
            return self.reduce([tensor])[0].clone()

    def reduce_layer(self, layer: str, tensor: Tensor) -> Tensor:
        """The value of one layer's tensor, which may be kept.

        Args:
            layer: The layer, with the number of its call if it has one.
            tensor: What is taken of it.
        """
        return self.reduce_one(tensor)

    def merge(self, parts: Sequence[Tensor]) -> Tensor:
        """The value of a whole from the values of its parts, each `[layers, ...]`.

        For a reduction that `reduce` computes. One that is finished from statistics merges by them:
        see `merge_statistics`.

        Raises:
            TypeError: The values of parts do not determine that of the whole, as by default.
        """
        raise TypeError(f"{self.describe()} of a whole does not follow from that of its parts")

    @property
    def merges(self) -> bool:
        """Whether the value of a whole follows from what is computed of its parts."""
        return bool(self.needs()) or type(self).merge is not Reduction.merge

    def describe(self) -> str:
        """How the reduction shows in a plan."""
        return self.name


@dataclass(frozen=True)
class FunctionReduction(Reduction):
    """Any function of one tensor, applied layer by layer.

    Attributes:
        fn: Takes a detached tensor, returns a number or a tensor of a fixed shape.
        label: The name of the result.
        components: Names of the entries where the result is a vector.
    """

    fn: Callable[[Tensor], Tensor | float]
    label: str
    components: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The label."""
        return self.label

    def reduce(self, tensors: Sequence[Tensor]) -> Tensor:
        """Apply the function to each tensor and stack the results."""
        results: list[Tensor] = []
        for tensor in tensors:
            value = self.fn(tensor)
            result = value.detach() if isinstance(value, Tensor) else torch.tensor(float(value))
            results.append(result if result.is_floating_point() else result.float())
        return torch.stack(results) if results else torch.empty(0)


def needed_statistics(reductions: Iterable[Reduction]) -> tuple[Statistic, ...]:
    """The union of what several reductions need, in a stable order."""
    return tuple(dict.fromkeys(s for reduction in reductions for s in reduction.needs()))
