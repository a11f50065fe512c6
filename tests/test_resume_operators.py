"""Interrupted and resumed is uninterrupted, for chains of every operator that is shipped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import streamlens as sl
from tests._runs import small_model
from tests.helpers.interrupting import CALM, TROUBLES, Chains, Run
from tests.helpers.labelled import CHAINS, RULES
from tests.helpers.shipped import NAMES


def check(chains: Chains, parts: Sequence[int], micro_steps: int, epoch: int, **options: Any) -> Run:
    """Train once through, and once interrupted between the parts."""
    troubles = options.get("troubles", CALM)
    whole = Run(chains, micro_steps, troubles=troubles)
    whole.go_on(sum(parts), epoch)
    run = Run(chains, micro_steps, **options)
    for i, part in enumerate(parts):
        if i:
            run.interrupt()
        run.go_on(part, epoch)
    for some in (whole, run):
        for recorder in some.recorders:
            recorder.dump()
    assert run.told() == whole.told()
    assert [str(r) for r in run.reports if r.where.endswith("state_dict")] == []
    run.lens.close()
    whole.lens.close()
    return whole


def _holding_state() -> list[str]:
    """The labels of chains of which a snapshot holds something."""
    model, criterion = small_model(), nn.CrossEntropyLoss()
    with sl.observe(model, loss=criterion) as lens:
        for label, make in CHAINS.items():
            lens.pipe(*make(lens)).subscribe(lambda frame: None, name=label)
        chains = lens.state_dict()["chains"]
    return [label for label in CHAINS if any(cell["state"] for cell in chains.get(label, ()))]


HOLDING_STATE = _holding_state()


def test_the_operators_that_remember_are_among_them() -> None:
    """The list is found by what snapshots hold; these at least must be in it."""
    known = {"adam_moments", "cosine", "distance_from_start", "ema 1", "gradient_noise_scale", "gradient_snr"}
    known |= {"flight_recorder 1", "generalisation_gap", "loss_decrease", "per_epoch", "scan", "smooth"}
    known |= {"spectral_norm", "stable_rank", "train_accuracy", "when", "window 1", "health", *RULES}
    assert known <= set(HOLDING_STATE)
    assert {rule for rule in sl.operators.alerts.__all__ if rule in NAMES} <= set(HOLDING_STATE)


@pytest.mark.parametrize("label", HOLDING_STATE)
def test_every_operator_with_state_goes_on_where_it_was(label: str) -> None:
    """Interrupted twice within a step: no micro-step is counted twice, none is lost."""
    troubles = ("calm", "broken", "calm", "calm", "huge", "calm", "nothing")
    parts = (13, 8, 39) if label in RULES else (7, 4, 7)
    run = check({label: CHAINS[label]}, parts, micro_steps=2, epoch=3, troubles=troubles)
    if label in RULES:
        assert run.frames, "where neither run says anything nothing is compared"


CASES = {
    "labels": st.sets(st.sampled_from(list(CHAINS)), min_size=1, max_size=4),
    "parts": st.lists(st.integers(0, 5), min_size=2, max_size=4),
    "micro_steps": st.integers(1, 3),
    "epoch": st.integers(1, 4),
    "troubles": st.lists(st.sampled_from(list(TROUBLES)), min_size=1, max_size=5),
    "late": st.booleans(),
}


def check_case(
    labels: set[str], parts: list[int], micro_steps: int, epoch: int, troubles: list[str], late: bool
) -> None:
    chains = {label: CHAINS[label] for label in sorted(labels)}
    check(chains, parts, micro_steps, epoch, troubles=troubles, subscribe_after_loading=late)


@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(**CASES)
def test_any_chains_interrupted_anywhere_and_resumed_are_uninterrupted(**case: Any) -> None:
    check_case(**case)


@pytest.mark.soak
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(**CASES)
def test_any_chains_in_a_wide_search_resume_where_they_were(**case: Any) -> None:
    check_case(**case)
