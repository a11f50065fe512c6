"""Whatever happens to one rank, none hangs and none is harmed."""

from __future__ import annotations

from typing import Any

import pytest

from tests.helpers.ranks import launch

Found = list[dict[str, Any]]
ALL = list(range(12))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return launch("tests.distributed.trouble", "trouble", tmp_path_factory.mktemp("trouble"))


@pytest.mark.parametrize(
    "work",
    [
        "on_rank_0_only",
        "on_rank_0_only_whole",
        "closes_early",
        "raises",
        "skips_an_update",
        "resumes_elsewhere",
        "is_late",
        "one_layer_fails",
    ],
)
def test_training_is_what_it_would_be_without(found: Found, work: str) -> None:
    assert [mine[work]["unharmed"] for mine in found] == [True, True]


def test_observing_on_one_rank_is_an_error_there_with_the_remedy_and_training_goes_on(found: Found) -> None:
    mine, other = (rank["on_rank_0_only"] for rank in found)
    assert other["errors"] == []
    (message,) = mine["errors"]
    assert "rank 0 waited 1 s for rank 1, which observed no such model" in message
    assert "call streamlens.observe(model) on every rank" in message
    assert mine["places"] == ["merging over ranks (rank 0)"]
    # What every rank has whole goes on, and nothing that takes all ranks was delivered.
    assert mine["steps"] == {"weights.norm2": ALL}


def test_observing_on_one_rank_what_it_has_whole_waits_for_nobody_and_says_so_once(found: Found) -> None:
    mine = found[0]["on_rank_0_only_whole"]
    assert mine["steps"] == {"weights.norm2": ALL}
    (message,) = mine["errors"]
    assert "rank 0 observes the model, and after 0.2 s rank 1 not" in message
    assert "streamlens.observe(model) on every rank" in message


@pytest.mark.parametrize(
    ("work", "last"), [("closes_early", 5), ("raises", 4), ("is_late", 4), ("ends_early", 4)]
)
def test_a_rank_that_is_lost_ends_what_takes_all_ranks_and_nothing_else(
    found: Found, work: str, last: int
) -> None:
    mine = found[0][work]
    merged = list(range(last + 1))
    assert mine["steps"] == {"weights.norm2": ALL, "loss": merged, "activations.std": merged}
    (message,) = mine["errors"]
    assert message.startswith("rank 0 lost the other ranks (")
    assert f"left out from step {last + 1} on, and training goes on" in message


def test_fewer_updates_on_one_rank_end_it_where_the_others_go_on(found: Found) -> None:
    mine, other = (rank["skips_an_update"] for rank in found)
    assert mine["steps"]["loss"] == other["steps"]["loss"] == ALL[:-1]
    assert "rank 0 lost the other ranks" in mine["errors"][0]
    assert other["errors"] == []


def test_ranks_at_different_steps_all_see_it_at_once(found: Found) -> None:
    for rank, mine in enumerate(found):
        (message,) = mine["resumes_elsewhere"]["errors"]
        assert f"not at the same update: this one is at step {(5, 7)[rank]}" in message
        assert mine["resumes_elsewhere"]["steps"]["loss"] == ALL[:5]


def test_a_layer_that_fails_on_one_rank_is_left_out_on_all(found: Found) -> None:
    mine, other = (rank["one_layer_fails"] for rank in found)
    assert mine["layers"] == other["layers"]
    assert [set(values) for values in mine["layers"]] == [{"first", "act"}] * 2
    assert mine["errors"] == []
    assert set(other["places"]) == {"layer 'second' (rank 1)"}
    # The other chains of that layer have all of it.
    assert mine["steps"]["activations.std"] == [0, 1]


def test_a_pipelines_stage_is_refused_by_name_and_its_module_observed(found: Found) -> None:
    for mine in (rank["pipeline_stages"] for rank in found):
        stage, schedule = mine["said"]
        assert "given a torch.distributed.pipelining.stage.PipelineStage" in stage
        assert "given a torch.distributed.pipelining.schedules.ScheduleGPipe" in schedule
        assert "observe(stage.submod, distributed=False)" in stage
        assert mine["errors"] == []
        assert mine["norms"] == [pytest.approx(mine["change"], rel=1e-5)]


EVALUATING = {
    "test_accuracy",
    "generalisation_gap",
    "adversarial_susceptibility",
    "svcca",
    "linear_cka",
    "hessian_eigenvalues",
    "hessian_trace",
    "sharpness",
}


def test_what_evaluates_a_sharded_model_is_refused_since_its_forward_waits_for_all_ranks(
    found: Found,
) -> None:
    said = found[0]["on_shards"]["said"]
    for name in EVALUATING:
        assert f"{name}() evaluates the model on this process alone, and parameter 'first." in said[name]
        assert f"give the result to lens.emit('{name}', value)" in said[name]


def test_what_takes_a_whole_matrix_of_shards_is_refused_where_it_is_asked_for(found: Found) -> None:
    said = found[0]["on_shards"]["said"]
    matrices = set(said) - EVALUATING
    assert len(matrices) == 7
    for name in matrices:
        assert "2 ranks holds a part of the parameters" in said[name], name
        assert "distributed=False" in said[name], name


def test_a_model_sharded_after_a_metric_was_applied_on_one_rank_hangs_nobody(found: Found) -> None:
    mine, other = (rank["on_shards"] for rank in found)
    assert (mine["evaluated"], other["errors"]) == (0, [])
    assert mine["errors"]
    assert all("test_accuracy() evaluates the model on this process alone" in e for e in mine["errors"])
    assert mine["steps"]["loss"] == other["steps"]["loss"] == [0, 1]
