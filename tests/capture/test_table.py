"""Many layers go through one call where a reduction allows it, and one by one where that fails."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from streamlens.capture.table import Needs, Table
from streamlens.reductions import FunctionReduction, Reduction


@dataclass(frozen=True)
class Largest(Reduction):
    """Refuses negative numbers, and remembers how many tensors each call brought."""

    calls: list[int] = field(compare=False)

    @property
    def name(self) -> str:
        return "largest"

    def reduce(self, tensors: Sequence[Tensor]) -> Tensor:
        self.calls.append(len(tensors))
        if any(bool((t < 0).any()) for t in tensors):
            raise ArithmeticError("negative")
        return torch.stack([t.max() for t in tensors])


def measured(reduction: Reduction, tensors: list[Tensor]) -> tuple[dict[Hashable, float], list[Hashable]]:
    failed: list[Hashable] = []
    table = Table()
    keys = tuple(range(len(tensors)))
    table.measure_many(keys, tensors, Needs.of([reduction]), lambda key, _: failed.append(key))
    found = table.finish(reduction, keys)
    assert found is not None
    return dict(zip(found[0], found[1].tolist(), strict=True)), failed


def test_all_layers_are_one_call() -> None:
    reduction = Largest([])
    assert measured(reduction, [torch.tensor([1.0, 2.0]), torch.tensor([3.0])]) == ({0: 2.0, 1: 3.0}, [])
    assert reduction.calls == [2]


def test_a_call_that_fails_costs_only_the_layer_at_fault() -> None:
    reduction = Largest([])
    tensors = [torch.tensor([1.0]), torch.tensor([-1.0]), torch.tensor([3.0])]
    assert measured(reduction, tensors) == ({0: 1.0, 2: 3.0}, [1])
    assert reduction.calls == [3, 1, 1, 1]


def test_a_function_is_called_once_a_layer_also_where_it_fails() -> None:
    calls: list[int] = []

    def size(tensor: Tensor) -> float:
        calls.append(tensor.numel())
        if tensor.numel() == 2:
            raise ArithmeticError("two")
        return float(tensor.numel())

    found = measured(FunctionReduction(size, "size"), [torch.ones(1), torch.ones(2), torch.ones(3)])
    assert (found, calls) == (({0: 1.0, 2: 3.0}, [1]), [1, 2, 3])
