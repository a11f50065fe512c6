"""Interrupted and resumed is uninterrupted, for chains of every operator that is shipped."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import streamlens as sl
from tests._runs import small_model
from tests.helpers.interrupting import CALM, TROUBLES, Chains, Run
from tests.helpers.shipped import NAMES, chains_of

Make = Callable[[sl.Lens], Sequence[Any]]

SOON: dict[str, Any] = {"every": 1, "start": (1, 1), "end": 2}
"""Of every rule: looks at each step, and has something to say at once."""

RULES: dict[str, Make] = {
    "dead_units, soon": lambda lens: (sl.dead_units(share=0.1, **SOON),),
    "diverging, soon": lambda lens: (sl.diverging(rise=0.01, **SOON),),
    "exploding_gradients, soon": lambda lens: (sl.exploding_gradients(factor=1.1, above=0.2, **SOON),),
    "layer_oversized, soon": lambda lens: (
        sl.layer_oversized(below=0.9, rank=1.01, window=3, start=(2, 3), end=1),
    ),
    "learning_rate_too_high, soon": lambda lens: (
        sl.learning_rate_too_high(above=1e-3, at_once=2e-3, fall=0.9, **SOON),
    ),
    "learning_rate_too_low, soon": lambda lens: (sl.learning_rate_too_low(below=0.05, fall=0.9, **SOON),),
    "loss_spike, soon": lambda lens: (sl.loss_spike(window=20, share=0.01, factor=1e-3, **SOON),),
    "loss_not_decreasing, soon": lambda lens: (sl.loss_not_decreasing(patience=2, **SOON),),
    "nonfinite_values, soon": lambda lens: (sl.nonfinite_values(**SOON),),
    "ratio_out_of_band, soon": lambda lens: (sl.ratio_out_of_band(band=(1e-3, 2e-3), **SOON),),
    "vanishing_gradients, soon": lambda lens: (sl.vanishing_gradients(**SOON),),
    "health, soon": lambda lens: (
        sl.health(sl.ratio_out_of_band(band=(1e-3, 2e-3), **SOON), sl.nonfinite_values(**SOON)),
    ),
    "when, on and off": lambda lens: (
        sl.when(lens.pipe(sl.nonfinite_values(every=1, end=2))),
        sl.norm("weights"),
        sl.ema(0.5),
    ),
    "when on a stream, on and off": lambda lens: (
        sl.norm("weights"),
        sl.ema(0.5),
        sl.when(lens.pipe(sl.nonfinite_values(every=1, end=2))),
    ),
    "flight_recorder, let go": lambda lens: (
        sl.norm("weights"),
        sl.flight_recorder(4, on=lens.pipe(sl.nonfinite_values(every=1, end=1)), after=3),
    ),
}
"""What ordinarily remembers for hundreds of steps and says nothing, made to speak up within thirty."""


def _shipped() -> Chains:
    """Every chain of the helper, by the operator's name and an ordinal."""

    def made(name: str, ordinal: int, lens: sl.Lens) -> Sequence[Any]:
        return chains_of(name, lens, inputs=4, every=2)[ordinal]

    model, criterion = small_model(), nn.CrossEntropyLoss()
    with sl.observe(model, loss=criterion) as lens:
        counts = {name: len(chains_of(name, lens, inputs=4)) for name in NAMES}
    return {
        f"{name} {ordinal + 1}" if count > 1 else name: functools.partial(made, name, ordinal)
        for name, count in counts.items()
        for ordinal in range(count)
    }


CHAINS: Chains = {**_shipped(), **RULES}


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
