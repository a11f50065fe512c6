"""Which ranks values that are not finite come from, for any number of ranks."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streamlens.capture.sharded import Part
from streamlens.capture.table import Rows
from streamlens.distributed.layout import Item
from streamlens.distributed.origins import OneRank, Origins
from streamlens.operators._finite import FiniteProbe
from streamlens.operators._units import DeadFraction
from streamlens.reductions import Statistic

SUM, SQUARES, BAD = Statistic("sum"), Statistic("sum_of_squares"), Statistic("nonfinite")
LAYERS = ("first", "second", "third")


def item_of(rank: int, ranks: int, values: torch.Tensor, *, label: str, what: object = (SUM,)) -> Item:
    rows = Rows(what, LAYERS, values)  # type: ignore[arg-type]
    names = tuple(f"{layer}.weight" for layer in LAYERS) if label == "gradient" else LAYERS
    return Item(label, None, rows, names, (Part((rank,), ranks),) * 3)


def merged(ranks: int, bad: dict[int, list[int]], label: str = "activations/0/1", step: int = 7) -> Origins:
    """What rank 0 knows once the numbers of all were added up; `bad` are layers by rank."""
    total, first = torch.zeros(1, 3, dtype=torch.float64), None
    for rank in range(ranks):
        values = torch.ones(2, 3, dtype=torch.float64)
        values[0, bad.get(rank, [])] = torch.nan
        item = Origins(rank, ranks).item([item_of(rank, ranks, values, label=label)])
        assert item is not None
        total += item.rows.values
        first = first or item
    assert first is not None
    origins = Origins(0, ranks)
    origins.note(step, [(first, Rows((), LAYERS, total))])
    return origins


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 48).flatmap(lambda n: st.tuples(st.just(n), st.sets(st.integers(0, n - 1)))))
def test_up_to_48_ranks_are_all_named(drawn: tuple[int, set[int]]) -> None:
    ranks, bad = drawn
    origins = merged(ranks, {rank: [1] for rank in bad})
    assert origins.of("activations.norm2", ["second"], 7) == tuple(sorted(bad))
    assert origins.of("activations.norm2", ["first", "third"], 7) == ()


def test_one_of_a_thousand_is_named_and_several_are_not_guessed() -> None:
    origins = merged(1000, {613: [0, 1], 11: [1]})
    assert origins.of("activations.std", ["first"], 7) == (613,)
    assert origins.of("activations.std", ["second"], 7) == ()


def test_other_topics_steps_and_what_is_no_topic_know_nothing() -> None:
    origins = merged(2, {1: [0]}, label="gradient")
    assert origins.of("weight_gradients.norm2", ["first"], 7) == (1,)
    assert origins.of("parameter_gradients.norm2", ["first.weight"], 7) == (1,)
    for topic in ("weights.norm2", "bias_gradients.norm2", "raw_gradients.norm2", "uw_ratio", "my_own"):
        assert origins.of(topic, ["first"], 7) == ()
    assert origins.of("weight_gradients.norm2", ["first"], 6) == ()


def test_losses_have_no_layer_and_states_have_a_dot_in_their_topic() -> None:
    assert merged(2, {1: [2]}, label="loss/0").of("loss", [""], 7) == (1,)
    assert merged(2, {1: [2]}, label="exp_avg").of("optimizer_state.exp_avg.norm2", ["third"], 7) == (1,)


def test_a_part_without_elements_is_not_to_blame() -> None:
    values = torch.tensor([[torch.nan, torch.nan, 1.0], [0.0, 4.0, 4.0]], dtype=torch.float64)
    item = Origins(1, 2).item([item_of(1, 2, values, label="gradient")])
    assert item is not None
    assert item.rows.values.tolist() == [[0.0, 2.0, 0.0]]


def test_numbers_that_were_counted_are_told_though_the_count_is_finite() -> None:
    counted = torch.tensor([[0.0, 3.0, 0.0], [4.0, 4.0, 4.0]], dtype=torch.float64)
    squares = torch.tensor([[1.0, 1.0, torch.inf], [4.0, 4.0, 4.0]], dtype=torch.float64)
    both = [
        item_of(0, 2, counted, label="gradient", what=(BAD,)),
        item_of(0, 2, squares, label="gradient", what=(SQUARES,)),
    ]
    item = Origins(0, 2).item(both)
    assert item is not None
    assert item.rows.values.tolist() == [[0.0, 1.0, 1.0]]
    assert (item.names, item.parts) == (both[0].names, both[0].parts)
    assert Origins(0, 2).item([]) is None


def test_a_reduction_that_tells_what_is_finite_names_ranks_and_any_other_does_not() -> None:
    values = torch.tensor([[0.0, torch.nan, 0.0]])
    item = Origins(1, 2).item([item_of(1, 2, values, label="activations/0/1", what=FiniteProbe())])
    assert item is not None
    assert item.rows.values.tolist() == [[0.0, 2.0, 0.0]]
    assert Origins(1, 2).item([item_of(1, 2, values, label="activations", what=DeadFraction())]) is None


def test_what_is_long_past_is_forgotten() -> None:
    origins = merged(2, {1: [0]}, step=7)
    origins.note(16, [])
    assert origins.of("activations.norm2", ["first"], 7) == ()


def test_without_a_process_group_a_process_alone_has_no_rank() -> None:
    assert OneRank().origins("activations.norm2", ["first"], 0) == ()
