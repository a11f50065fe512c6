"""Messages of many processes, added up in one process: what comes out is that of the whole."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from streamlens.capture.sharded import Part
from streamlens.capture.table import Rows
from streamlens.distributed.layout import GATHERED, Item, Layout, Report, build
from streamlens.distributed.rounds import later_rounds
from streamlens.reductions import Statistic, statistics_of

CENTRED = tuple(Statistic("centred", float(k)) for k in (2, 3, 4))
WHAT = (*map(Statistic, ("sum", "sum_of_squares", "minimum", "maximum", "absmax")), *CENTRED)


def item_of(tensors: Sequence[Tensor], rank: int, ranks: int) -> Item:
    columns = [[*statistics_of(tensor.double(), WHAT), float(tensor.numel())] for tensor in tensors]
    keys = tuple(f"layer{i}" for i in range(len(tensors)))
    values = torch.tensor(columns, dtype=torch.float64).T
    return Item("value", None, Rows(WHAT, keys, values), keys, (Part((rank,), ranks),) * len(keys))


def exchanged(items: Sequence[Item]) -> tuple[Tensor, int]:
    """What rank 0 gets of all items, one a rank, and how many numbers it sends."""
    cpu = torch.device("cpu")
    reports = [Report.of([item], ()) for item in items]
    layouts = [build(0, reports, [item], rank, cpu) for rank, item in enumerate(items)]
    first = torch.zeros(layouts[0].host, dtype=torch.float64)
    for layout, item in zip(layouts, items, strict=True):
        mine = torch.zeros_like(first)
        layout.write([item], mine, on_host=True)
        first += mine
    if not layouts[0].later[True]:
        ((_, rows),) = layouts[0].read([items[0]], first, on_host=True)
        return rows.values, len(first)
    return in_rounds(layouts, items, first), len(first) + 2 * layouts[0].later[True]


def in_rounds(layouts: Sequence[Layout], items: Sequence[Item], first: Tensor) -> Tensor:
    """The later messages; each rank is asked in turn for what it sends, and rank 0 again for what it gets."""
    merged: dict[bool, Tensor] = {}
    for layout, item in zip(layouts, items, strict=True):

        def send(buffer: Tensor, *, largest: bool = False) -> None:
            so_far = merged.get(largest)
            both = torch.maximum if largest else torch.add
            merged[largest] = buffer.clone() if so_far is None else both(so_far, buffer)

        later_rounds(layout, [item], first, send, on_host=True)

    def receive(buffer: Tensor, *, largest: bool = False) -> None:
        buffer.copy_(merged[largest])

    assert layouts[0].read([items[0]], first, on_host=True) == []
    ((_, rows),) = later_rounds(layouts[0], [items[0]], first, receive, on_host=True)
    return rows.values


def by_hand(whole: np.ndarray) -> list[float]:
    if not whole.size:
        return [0.0, 0.0, *[math.nan] * 6, 0.0]
    off = whole - whole.mean()
    sums = [whole.sum(), (whole**2).sum(), whole.min(), whole.max(), abs(whole).max()]
    return [*sums, *[(off**k).sum() for k in (2, 3, 4)], whole.size]


def compare(parts: Sequence[Sequence[Tensor]]) -> None:
    """Parts by rank and layer, some of them empty."""
    values, _ = exchanged([item_of(tensors, rank, len(parts)) for rank, tensors in enumerate(parts)])
    for layer in range(len(parts[0])):
        whole = torch.cat([tensors[layer] for tensors in parts]).double().numpy()
        np.testing.assert_allclose(values[:, layer], by_hand(whole), rtol=1e-9, atol=1e-7)


@pytest.mark.parametrize("ranks", [GATHERED, GATHERED + 1, 40])
def test_statistics_of_many_parts_are_those_of_the_whole(ranks: int) -> None:
    draw = torch.Generator().manual_seed(0)
    compare(
        [
            [torch.randn((rank * 7 + layer) % 5, generator=draw) * 3 + 2 * layer for layer in range(4)]
            for rank in range(ranks)
        ]
    )


@settings(deadline=None, max_examples=50)
@given(st.lists(st.lists(st.integers(-50, 50), max_size=4), min_size=GATHERED + 1, max_size=GATHERED + 3))
def test_any_parts_of_one_layer_are_merged_in_rounds(parts: list[list[int]]) -> None:
    compare([[torch.tensor(part, dtype=torch.float32)] for part in parts])


def test_a_nan_in_one_of_many_parts_is_one_of_the_whole_and_of_no_other_layer() -> None:
    parts = [[torch.ones(2), torch.ones(2) * rank] for rank in range(12)]
    parts[7][0][1] = torch.nan
    values, _ = exchanged([item_of(tensors, rank, 12) for rank, tensors in enumerate(parts)])
    assert values[:-1, 0].isnan().all()
    assert values[-1].tolist() == [24.0, 24.0]
    np.testing.assert_allclose(values[:, 1], by_hand(np.repeat(np.arange(12.0), 2)))


def test_a_message_is_no_longer_for_more_ranks() -> None:
    lengths = {}
    for ranks in (2, GATHERED, GATHERED + 1, 40):
        items = [item_of([torch.ones(3)] * 5, rank, ranks) for rank in range(ranks)]
        lengths[ranks] = exchanged(items)[1]
    each = 5 * (len(WHAT) + 1)
    assert lengths == {2: 2 * each, GATHERED: GATHERED * each, GATHERED + 1: 3 * each, 40: 3 * each}


def test_layers_that_only_some_ranks_have_lie_in_the_same_place_on_all() -> None:
    items = [item_of([torch.full((2,), float(rank))] * 3, rank, 12) for rank in range(12)]
    for rank in range(4, 12):
        names = ("layer0", "layer2")
        rows = items[rank].rows.select(names)
        items[rank] = Item("value", None, rows, names, items[rank].parts[:2])
    for item in items:
        item.open = True
    values, _ = exchanged(items)
    assert values[0].tolist() == [132.0, 12.0, 132.0]
    assert values[-1].tolist() == [24.0, 8.0, 24.0]
