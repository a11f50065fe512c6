"""On every rank, the numbers are those of one process with the global batch."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.distributed.whole import batches, numbers, train
from tests.distributed.work import BATCH_TOPICS, METRICS, PARAMETER_TOPICS, adam, model_of
from tests.helpers.ranks import launch

Found = list[dict[str, Any]]
EVERYTHING = (*PARAMETER_TOPICS, *BATCH_TOPICS)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return launch("tests.distributed.work", "whole", tmp_path_factory.mktemp("whole"))


def by_topic(frames: list[tuple[str, int, int, Any]], topic: str) -> dict[int, Any]:
    return {step: values for name, step, _, values in frames if name == topic}


def compare(found: Any, steps: list[dict[str, Any]], topics: tuple[str, ...]) -> None:
    """Every metric of every topic against NumPy, layer by layer and step by step."""
    compared = 0
    for topic in topics:
        for metric in METRICS:
            values = by_topic(found["frames"], f"{topic}.{metric}")
            assert len(values) == len(steps), f"{topic}.{metric}"
            for step, record in enumerate(steps):
                assert set(values[step]) == set(record[topic])
                for layer, tensor in record[topic].items():
                    expected = numbers(tensor)[metric]
                    close = pytest.approx(
                        expected, rel=5e-5, abs=1e-3 if metric == "kurtosis" else 1e-6, nan_ok=True
                    )
                    assert values[step][layer] == close, f"{topic}.{metric} of {layer!r} at step {step}"
                    compared += not math.isnan(expected)
    assert compared > 100


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("work", "sizes", "hidden", "topics"),
    [
        ("ddp", (5, 3), 7, EVERYTHING),
        ("fsdp2", (4, 4), 7, EVERYTHING),
        ("sharded_later", (4, 4), 7, PARAMETER_TOPICS),
        ("tensor_parallel", (6,), 8, (*PARAMETER_TOPICS, "input_data")),
        ("on_a_device", (4, 4), 7, EVERYTHING),
        ("in_rounds", (4, 4), 7, EVERYTHING),
        ("in_rounds_on_a_device", (4, 4), 7, EVERYTHING),
    ],
)
def test_every_rank_has_the_numbers_of_one_process(
    found: Found, rank: int, work: str, sizes: tuple[int, ...], hidden: int, topics: tuple[str, ...]
) -> None:
    mine = found[rank][work]
    steps = train(model_of(hidden), batches(3, sizes), adam)
    assert mine["errors"] == []
    compare(mine, steps, topics)
    losses = by_topic(mine["frames"], "loss")
    ratios = by_topic(mine["frames"], "uw_ratio.parameters")
    counts = by_topic(mine["frames"], f"{topics[0]}.histogram")
    for step, record in enumerate(steps):
        assert losses[step][""] == pytest.approx(record["loss"], rel=1e-6)
        for name, weights in record["parameters"].items():
            updates = record["parameter_updates"][name]
            ratio = np.linalg.norm(updates.numpy()) / np.linalg.norm(weights.numpy())
            assert ratios[step][name] == pytest.approx(ratio, rel=1e-5)
            bins = np.histogram(weights.numpy(), bins=8, range=(-1.0, 1.0))[0]
            assert np.array_equal(counts[step][name][2:10], bins)


@pytest.mark.parametrize("work", ["ddp", "fsdp2", "tensor_parallel"])
def test_sinks_write_on_rank_0_alone(found: Found, work: str) -> None:
    assert [mine[work]["rows"] for mine in found] == [12, 0]  # 4 parameters, 3 steps


def test_one_rank_may_subscribe_for_all(found: Found) -> None:
    steps = train(model_of(), batches(40, (5, 3)), adam)
    mine, other = (rank["subscribed_on_rank_0"] for rank in found)
    assert (mine["errors"], other["errors"], other["frames"]) == ([], [], [])
    means = by_topic(mine["frames"], "activations.mean")
    assert sorted(means) == list(range(2, 40, 2))  # at step 0 the other rank did not know of it yet
    for step, values in means.items():
        expected = {layer: numbers(t)["mean"] for layer, t in steps[step]["activations"].items()}
        assert values == pytest.approx(expected, rel=1e-4)


def test_what_is_subscribed_later_begins_and_ends_at_one_step_on_all(found: Found) -> None:
    steps = train(model_of(), batches(40, (5, 3)), adam)
    mine, other = (rank["subscribed_on_rank_0"] for rank in found)
    stds = by_topic(mine["frames"], "layer_gradients.std")
    # Told at step 4, which is the first one due to all after step 3, where it was subscribed.
    assert sorted(stds) == list(range(5, 35))
    for step, values in stds.items():
        expected = {layer: numbers(t)["std"] for layer, t in steps[step]["layer_gradients"].items()}
        assert values == pytest.approx(expected, rel=1e-4)
    assert mine["demands"] == other["demands"] == 1  # what was disposed of is not taken on any rank


def test_a_message_has_a_header_and_a_few_numbers_a_layer(found: Found) -> None:
    # The mean of three layers' activations: their sums and counts, and who had something not finite.
    assert [rank["subscribed_on_rank_0"]["sent"] for rank in found] == [8 * (6 + 3 * (2 + 1))] * 2


def test_micro_steps_are_merged_each_and_averaged_at_the_update(found: Found) -> None:
    data = batches(6, (5, 3))
    model, losses = model_of(), []
    optimizer = adam(list(model.parameters()))
    for step in range(3):
        optimizer.zero_grad()
        for ranks in data[2 * step : 2 * step + 2]:
            for x, y in ranks:
                (nn.functional.cross_entropy(model(x), y) / 2).backward()
            x, y = (torch.cat(both) for both in zip(*ranks, strict=True))
            losses.append(nn.functional.cross_entropy(model(x), y).item())
        optimizer.step()
    for mine in found:
        frames = mine["micro_steps"]["frames"]
        seen = [(step, micro, v[""]) for topic, step, micro, v in frames if topic == "loss"]
        assert [(step, micro) for step, micro, _ in seen] == [(s, m) for s in range(3) for m in range(2)]
        assert [value for *_, value in seen] == pytest.approx(losses, rel=1e-6)
        averages = by_topic(frames, "loss.step")
        expected = [(losses[2 * step] + losses[2 * step + 1]) / 2 for step in range(3)]
        assert [averages[step][""] for step in range(3)] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("kind", "loss"),
    [
        ("sum", nn.CrossEntropyLoss(reduction="sum")),
        ("ignored", nn.CrossEntropyLoss(ignore_index=1)),
        ("weighted", nn.CrossEntropyLoss(weight=torch.tensor([0.2, 1.0, 3.0]))),
    ],
)
def test_losses_count_as_they_would_in_one_process(found: Found, kind: str, loss: nn.Module) -> None:
    (record,) = train(model_of(), batches(1, (5, 3)), adam, loss_of=loss)
    for mine in found:
        values = dict(mine["losses"][kind])
        assert values.pop("loss") == pytest.approx(record["loss"], rel=1e-6)
        expected = {layer: numbers(t)["norm2"] for layer, t in record["layer_gradients"].items()}
        assert values == pytest.approx(expected, rel=1e-5)


def test_a_layer_that_some_ranks_call_has_the_numbers_of_their_examples(found: Found) -> None:
    model = model_of()
    (x, _), (other, _) = batches(1, (5, 3))[0]
    act = model.act(model.first(other)).detach()
    second = torch.cat([model.second(model.first(x)), model.second(act)]).detach()
    first = model.first(torch.cat([x, other])).detach()
    expected = {"first": first.mean().item(), "act": act.mean().item(), "second": second.mean().item()}
    for mine in found:
        assert mine["sometimes"]["frames"][0] == pytest.approx(expected, rel=1e-5)


def test_observing_changes_no_bit_of_training_under_ddp(found: Found) -> None:
    for mine in found:
        assert mine["bit_identity"] == {"equal": True, "tensors": 4 + 4 + 12 + 1}


def test_what_does_not_merge_says_so_where_it_is_asked_for(found: Found) -> None:
    said = found[0]["refusals"]
    allowed = {what for what, message in said.items() if not message}
    assert allowed == {
        "norm of shards",
        "median of copies",
        "histogram of activations",
        "median of activations, this rank alone",
    }
    for what, message in said.items():
        if what not in allowed:
            assert "does not follow from that of its parts" in message, what
            assert "distributed=False" in message
    assert "'weights'" in said["medians of shards"]
    assert "2 ranks holds a part of the parameters" in said["medians of shards"]
    assert "2 ranks holds its part of the batch" in said["median of activations"]


def test_outputs_of_unknown_parts_are_left_out_and_reported_once_a_layer(found: Found) -> None:
    mine = found[1]["tensor_parallel"]
    assert mine["activations"] == 0
    assert len(mine["activation_errors"]) == 3
    assert all("use_local_output=False" in message for message in mine["activation_errors"])


def test_a_rank_can_look_at_itself_alone(found: Found) -> None:
    for rank, mine in enumerate(found):
        x, y = batches(2, (5, 3))[0][rank]
        loss = nn.functional.cross_entropy(model_of()(x), y).item()
        assert mine["alone"]["losses"][0] == pytest.approx(loss, rel=1e-6)
        assert len(mine["alone"]["losses"]) == 2


def test_an_alert_names_the_rank_that_the_values_come_from(found: Found) -> None:
    for mine in found:
        told = {name: watched["rows"][0] for name, watched in mine["alerts"].items()}
        assert {row["step"] for row in told.values()} == {1}
        assert (told["rank 1"]["rank"], told["rank 1"]["layers"]) == (1, ("first",))
        assert "first in the output of first (phase: forward), on rank 1. Look" in told["rank 1"]["text"]
        assert told["both"]["rank"] == [0, 1]
        assert "(phase: forward), on ranks 0, 1. Look" in told["both"]["text"]
        assert (told["a shard"]["rank"], told["a shard"]["layers"]) == (1, ("second",))
        assert told["a shard"]["phase"] == "backward"
    assert [mine["alerts"]["alone"]["rows"][0]["rank"] for mine in found] == [0, 1]


def test_alerts_are_written_on_rank_0_alone_and_by_each_rank_that_looks_alone(found: Found) -> None:
    for name in ("rank 1", "both", "a shard"):
        assert [mine["alerts"][name]["written"] for mine in found] == [1, 0]
    assert [mine["alerts"]["alone"]["written"] for mine in found] == [1, 1]


@pytest.fixture(scope="module")
def meshes(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return launch("tests.distributed.work", "meshes", tmp_path_factory.mktemp("meshes"), ranks=4)


@pytest.mark.parametrize("rank", range(4))
def test_replicas_of_shards_count_once(meshes: Found, rank: int) -> None:
    mine = meshes[rank]["hsdp"]
    assert mine["errors"] == []
    compare(mine, train(model_of(), batches(3, (2, 2, 2, 2)), adam), EVERYTHING)


@pytest.mark.parametrize("rank", range(4))
def test_shards_over_two_dimensions_make_one_whole(meshes: Found, rank: int) -> None:
    mine = meshes[rank]["fsdp_and_tensor_parallel"]
    assert mine["errors"] == []
    compare(mine, train(model_of(8), batches(3, (4, 4)), adam), (*PARAMETER_TOPICS, "input_data"))
