"""What the rules on losses share."""

from __future__ import annotations

import math

import numpy as np
import pytest

import streamlens as sl
from streamlens.operators.alerts._losses import LossTrack
from streamlens.operators.alerts._rule import Look, Rule


def _look(step: int, loss: float) -> Look:
    return Look("loss", step, ("",), np.array([loss]))


@pytest.mark.parametrize("rule", [sl.diverging(), sl.loss_spike(), sl.loss_not_decreasing(patience=30)])
def test_a_good_look_makes_no_verdict_where_it_would_change_nothing(rule: Rule) -> None:
    calm, anxious = rule.judge(), rule.judge()
    calm.calm = lambda group: True
    losses = [1.0 / (step + 1) for step in range(60)]
    told = [list(anxious.look(_look(step, loss))) for step, loss in enumerate(losses)]
    assert any(told)
    assert not any(verdict.bad.any() for verdicts in told for verdict in verdicts)
    assert not any(list(calm.look(_look(step, loss))) for step, loss in enumerate(losses))
    assert calm.state_dict() == anxious.state_dict()


def test_a_bad_look_and_one_that_knows_nothing_make_their_verdicts_always() -> None:
    judge = sl.diverging().judge()
    judge.calm = lambda group: True
    for step in range(5):
        assert not list(judge.look(_look(step, 1.0)))
    (bad,) = judge.look(_look(5, math.inf))
    assert bad.bad.all()
    (unknown,) = judge.look(_look(6, math.nan))
    assert np.isnan(unknown.values).all()


def test_the_loss_at_the_start_is_the_median_of_the_first_five_also_after_a_snapshot() -> None:
    track = LossTrack(half_life=5)
    assert math.isnan(track.initial)
    for n, loss in enumerate([5.0, 1.0, 4.0, 2.0, 3.0, 100.0], 1):
        track.take(loss)
        assert track.initial == np.median([5.0, 1.0, 4.0, 2.0, 3.0][:n])
        again = LossTrack(half_life=5)
        again.load_state_dict(track.state_dict())
        assert again.initial == track.initial
