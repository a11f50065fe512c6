"""Two gloo ranks take one decision, also when only one of them sees a NaN, or is not there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import torch.distributed as dist

SCRIPT = Path(__file__).with_name("_ranks.py")

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")

Outcomes: TypeAlias = dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """What came of every scenario, by rank."""
    root, store = SCRIPT.parents[2], tmp_path_factory.mktemp("ranks") / "store"
    bootstrap = "import runpy, sys; sys.path.insert(0, sys.argv[1]); sys.argv = sys.argv[2:]; "
    bootstrap += "runpy.run_path(sys.argv[0], run_name='__main__')"
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", bootstrap, str(root), str(SCRIPT), str(rank), str(store)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=120)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [0, 0]
    first, second = (json.loads(output.splitlines()[-1]) for output in outputs)
    return {name: [first[name], second[name]] for name in first}


@pytest.mark.parametrize(
    ("scenario", "acted"),
    [
        ("ratio", [0, 1, 2, 3]),
        ("ratio, NaN on rank 0", [0, 2, 3]),
        ("ratio, NaN on rank 1", [0, 2, 3]),
    ],
)
def test_a_nan_on_any_rank_holds_the_decision_on_both(
    outcomes: Outcomes, scenario: str, acted: list[int]
) -> None:
    first, second = outcomes[scenario]
    assert first == second
    assert first["steps"] == acted
    assert len(set(first["rates"])) == len(acted)


def test_a_rank_without_the_controllers_makes_all_stand_back_in_time_and_training_goes_on(
    outcomes: Outcomes,
) -> None:
    first, second = outcomes["ratio, none on rank 1"]
    assert first["rates"] == second["rates"] == [0.1] * 4
    assert first["weights"] == second["weights"]
    assert first["steps"] == []
    reports = first["reports"]
    assert [report.partition(" (rank 0) at step 0")[0] for report in reports] == ["RatioLR", "Freeze"]
    for report in reports:
        # The second one does not wait again: what is lost is lost for all.
        assert "stands back: rank 0 lost the other ranks" in report
        assert "within the 2 s of observe(distributed_timeout=)" in report


def test_what_one_rank_sees_stops_both_after_one_step(outcomes: Outcomes) -> None:
    first, second = outcomes["stop"]
    assert first == second == {"seen": [False, True, True], "causes": ["1: x is nan at step 0"]}


def test_layers_freeze_under_ddp_on_both_ranks_by_one_decision_and_only_the_update_is_skipped(
    outcomes: Outcomes,
) -> None:
    first, second = outcomes["freeze"]
    assert first == second
    # At step 1 one rank had no input; frozen after step 2, thawed after step 4.
    assert first["steps"] == [2, 4]
    assert first["gradients"] == [True] * 6
    layer = [weights[:2] for weights in first["weights"]]
    for held in (layer, first["momenta"]):
        assert held[2] == held[3] == held[4]
        assert len({str(entry) for entry in held}) == 4
    assert len({str(weights[2:]) for weights in first["weights"]}) == 6


@pytest.mark.parametrize("scenario", ["clip", "fixed ratio"])
def test_gradients_of_each_rank_are_scaled_by_what_rank_0_makes_of_its_own(
    outcomes: Outcomes, scenario: str
) -> None:
    first, second = outcomes[scenario]
    assert first["factors"] == pytest.approx(second["factors"], rel=1e-3)
    assert any(abs(factor - 1) > 0.05 for factor in first["factors"])


def test_what_one_rank_sees_puts_the_model_back_on_both(outcomes: Outcomes) -> None:
    first, second = outcomes["rollback"]
    assert first == second
    (text,) = first["texts"]
    assert text.startswith(
        "4: Rollback put back the model as it was after step 2 and lowered the learning rate "
    )
    assert text.endswith("from 0.1 to 0.05: x is nan at step 3")
    assert first["weights"][4] == first["weights"][2]
    assert first["weights"][5] != first["weights"][3]


def test_shards_of_the_model_and_of_moments_are_put_back_on_both(outcomes: Outcomes) -> None:
    ranks = outcomes["rollback, shards"]
    for rank in ranks:
        weights, moments = rank["weights"], rank["moments"]
        (text,) = rank["texts"]
        assert text.startswith("4: Rollback put back the model as it was after step 2 and lowered")
        # What is seen after step 4 is that of step 2, and neither that of 3 nor what 4 would have been.
        assert weights[4] == weights[2]
        assert moments[4] == moments[2]
        assert moments[6] == moments[5]
        assert len({str(entry) for entry in weights}) == len({str(entry) for entry in moments}) == 5
    assert [len(rank["weights"][0][0]) for rank in ranks] == [12, 8]


def test_controllers_of_gradients_refuse_shards_at_subscribe_and_stand_back_from_later_ones(
    outcomes: Outcomes,
) -> None:
    for rank in outcomes["gradients, shards"]:
        names = ("ClipAt", "FixedRatio")
        assert rank["said"] == [
            f"{name} needs whole gradients, and of '0.weight' this process holds a shard: use the means of "
            "what shards it (torch.nn.utils.clip_grad_norm_ takes DTensors), or steer the rate with RatioLR"
            for name in names
        ]
        (report,) = rank["later"]
        assert report == f"ClipAt stands back: {rank['said'][0]}"


def test_steps_of_shards_are_scaled_as_those_of_the_whole_model(outcomes: Outcomes) -> None:
    whole, spread = outcomes["steps, whole"], outcomes["steps, shards"]
    assert spread[0] == spread[1]
    for found, wanted in zip(spread[0]["scales"], whole[0]["scales"], strict=True):
        assert found == pytest.approx(wanted, rel=1e-5)
    for found, wanted in zip(spread[0]["weights"], whole[0]["weights"], strict=True):
        assert found == pytest.approx(wanted, rel=1e-4, abs=1e-6)
