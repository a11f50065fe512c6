"""Every shipped operator on two ranks against one process with the global batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.distributed.operators import UNEVEN, curvature, fresh, normalised, watched
from tests.helpers.ranks import launch
from tests.helpers.shipped import NAMES

Found = list[dict[str, Any]]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return launch("tests.distributed.operators", "operators", tmp_path_factory.mktemp("operators"))


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    """The same in one process."""
    return watched(fresh(), [0, 1], lambda model: model)


def close(topic: str, value: Tensor, expected: Tensor) -> bool:
    if topic.endswith("histogram"):
        # A value at the edge of a bin may be rounded into the next one.
        return bool((value - expected).abs().sum() <= 2)
    return torch.allclose(value, expected, rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("work", ["ddp", "sharded_later"])
def test_no_operator_gives_the_number_of_a_part(
    found: Found, alone: dict[str, Any], work: str, rank: int
) -> None:
    mine, expected = found[rank][work]["values"], alone["values"]
    assert set(mine) <= set(expected)
    wrong = {
        key[:2]
        for key, value in mine.items()
        # Gradients before they are reduced are each rank's own, as their topic says.
        if "raw_gradients" not in key[1] and not close(key[1], value, expected[key])
    }
    assert wrong == set()
    steps = {key[:4] for key in mine}
    assert {key for key in expected if key[:4] in steps} == set(mine), "all layers or none"
    assert len(mine) > 1000


def gone(rank: dict[str, Any], alone: dict[str, Any]) -> set[str]:
    """The chains that give numbers in one process and none on a rank."""
    return {plan for plan, *_ in alone["values"]} - {plan for plan, *_ in rank["values"]}


WORDS = {"smooth": "combine[uw_ratio.parameters.before]", "reduce": "size"}
"""What a chain is called by, where that is not its last operator."""


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("work", ["ddp", "sharded_later"])
def test_what_cannot_be_had_of_a_whole_is_refused_or_reported_by_name(
    found: Found, alone: dict[str, Any], work: str, rank: int
) -> None:
    mine = found[rank][work]
    missing = gone(mine, alone)
    assert len(missing) > 10
    for plan in missing:
        name = plan.partition(":")[0]
        if plan in mine["plans"]:
            word = WORDS.get(name, name)
            assert any(error.startswith((f"{word}(", f"{word} of")) for error in mine["errors"]), plan
        else:
            assert any("does not follow from that of its parts" in text for text in mine["said"][name]), plan


def test_what_gives_nothing_once_a_model_is_sharded_is_refused_where_it_is_applied_to_a_sharded_one(
    found: Found, alone: dict[str, Any]
) -> None:
    for rank in found:
        missing = gone(rank["sharded_later"], alone)
        assert missing.isdisjoint(rank["sharded_before"]["plans"])
        assert {plan.partition(":")[0] for plan in missing} >= {"cosine", "effective_lr", "spectral_norm"}


def test_every_operator_was_tried(alone: dict[str, Any]) -> None:
    assert {plan.partition(":")[0] for plan in alone["plans"]} == set(NAMES)


def by_hand(k: int, ignored: int) -> list[tuple[int, int, float]]:
    """Right and counted predictions of both ranks, which train on the mean of their gradients, by step.

    The third is the share of right ones after the update, of the first rank's first batch.
    """

    def score(outputs: Tensor, labels: Tensor) -> tuple[int, int]:
        counted = [(r, y) for r, y in zip(outputs.tolist(), labels.tolist(), strict=True) if y != ignored]
        return sum(y in sorted(range(3), key=row.__getitem__)[-k:] for row, y in counted), len(counted)

    model = fresh()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    steps: list[tuple[int, int, float]] = []
    for micro_batches in zip(UNEVEN[::2], UNEVEN[1::2], strict=True):
        optimizer.zero_grad()
        right = counted = 0
        for x, y in (part for ranks in micro_batches for part in ranks):
            outputs = model(x)
            (nn.functional.cross_entropy(outputs, y, ignore_index=2) / 2).backward()
            scored = score(outputs, y)
            right, counted = right + scored[0], counted + scored[1]
        optimizer.step()
        x, y = UNEVEN[0][0]
        held_back = score(model(x), y)
        steps.append((right, counted, held_back[0] / held_back[1]))
    return steps


@pytest.mark.parametrize(
    ("name", "k", "ignored"), [("all", 1, 2), ("top 1", 1, -100), ("top 2", 2, -100), ("rank 0", 1, -100)]
)
def test_training_accuracy_is_that_of_the_global_batch_however_uneven(
    found: Found, name: str, k: int, ignored: int
) -> None:
    # At step 0 rank 1 did not know yet what rank 0 alone asks for.
    expected = [(step, right / counted) for step, (right, counted, _) in enumerate(by_hand(k, ignored))][1:]
    for rank, mine in enumerate(found):
        seen = mine["accuracies"]["found"].get(name, [])
        assert seen == ([] if (name, rank) == ("rank 0", 1) else [(s, pytest.approx(v)) for s, v in expected])
        assert mine["accuracies"]["errors"] == []


def test_the_gap_is_to_the_training_accuracy_of_the_global_batch(found: Found) -> None:
    steps = by_hand(1, 2)
    right, counted = (steps[1][i] + steps[2][i] for i in range(2))
    for mine in found:
        assert mine["accuracies"]["found"]["gap"] == [(2, pytest.approx(right / counted - steps[2][2]))]


def test_a_metric_that_other_ranks_cannot_be_told_of_is_refused_with_the_remedy(found: Found) -> None:
    for mine in found:
        assert "train_accuracy(metric=...) is of the batches of all ranks" in mine["accuracies"]["said"]
        assert "pass a function at the top level of a module" in mine["accuracies"]["said"]


def test_actions_are_taken_on_every_rank_and_written_on_rank_0_alone(found: Found) -> None:
    assert [mine["actions"] for mine in found] == [
        {"written": 3, "told": [0, 1, 2]},
        {"written": 0, "told": [0, 1, 2]},
    ]


def test_synchronised_batch_norm_waits_for_nobody_where_one_rank_evaluates_in_training_mode(
    found: Found,
) -> None:
    expected = curvature(normalised(nn.BatchNorm1d))
    assert set(expected) == {"hessian_eigenvalues", "hessian_trace", "sharpness"}
    assert found[0]["synchronised"] == pytest.approx(expected, rel=1e-4)
