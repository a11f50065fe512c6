"""On every rank, the numbers are those of one process with the global batch."""

from __future__ import annotations

import math
from typing import Any

import pytest

from tests.distributed.whole import batches, numbers, train
from tests.distributed.work import BATCH_TOPICS, METRICS, PARAMETER_TOPICS, adam, model_of
from tests.helpers.ranks import launch

Found = list[dict[str, Any]]


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
def test_ddp_has_the_numbers_of_one_process_on_every_rank(found: Found, rank: int) -> None:
    mine = found[rank]["ddp"]
    assert mine["errors"] == []
    compare(mine, train(model_of(), batches(3, (5, 3)), adam), (*PARAMETER_TOPICS, *BATCH_TOPICS))


@pytest.mark.parametrize("rank", [0, 1])
def test_fsdp2_has_the_numbers_of_one_process_on_every_rank(found: Found, rank: int) -> None:
    mine = found[rank]["fsdp2"]
    assert mine["errors"] == []
    compare(mine, train(model_of(), batches(3, (4, 4)), adam), (*PARAMETER_TOPICS, *BATCH_TOPICS))


@pytest.mark.parametrize(("name", "sizes"), [("ddp", (5, 3)), ("fsdp2", (4, 4))])
def test_losses_are_weighted_by_examples(found: Found, name: str, sizes: tuple[int, int]) -> None:
    steps = train(model_of(), batches(3, sizes), adam)
    for rank in (0, 1):
        losses = by_topic(found[rank][name]["frames"], "loss")
        for step, record in enumerate(steps):
            assert losses[step][""] == pytest.approx(record["loss"], rel=1e-6)
