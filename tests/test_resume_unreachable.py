"""State that a snapshot cannot hold is said to be missing from it, never left out in silence."""

from __future__ import annotations

import torch
from reactivex import operators as ops

import streamlens as sl
from streamlens.chain import ErrorReport
from tests._runs import small_model, steps_of


def _reports(lens: sl.Lens) -> list[ErrorReport]:
    reports: list[ErrorReport] = []
    lens.errors.subscribe(reports.append)
    return reports


def test_state_in_front_of_share_is_missed_when_its_first_subscriber_goes() -> None:
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with sl.observe(model) as lens:
        reports = _reports(lens)
        shared = lens.pipe(sl.norm("weights"), sl.ema(0.5), ops.share())
        first = shared.subscribe(lambda frame: None, name="first")
        shared.subscribe(lambda frame: None, name="second")
        list(steps_of(model, optimizer, 1))
        assert "first" in lens.state_dict()["chains"]
        assert reports == []
        first.dispose()
        lens.state_dict()
    assert len(reports) == 1
    assert "ema(0.5) is not in the snapshot" in str(reports[0])


def test_state_within_flat_map_is_missed() -> None:
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with sl.observe(model) as lens:
        reports = _reports(lens)
        inner = lens.pipe(sl.norm("weights"), sl.ema(0.9))
        lens.pipe(sl.topic("step_time"), ops.take(1), ops.flat_map(lambda _: inner)).subscribe(lambda _: None)
        list(steps_of(model, optimizer, 4))
        lens.state_dict()
    assert [type(report.error) for report in reports] == [sl.StreamlensError]


def test_state_of_chains_that_were_disposed_is_not_missed() -> None:
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with sl.observe(model) as lens:
        reports = _reports(lens)
        chain = lens.pipe(sl.uw_ratio(), sl.ema(0.9)).subscribe(lambda frame: None)
        list(steps_of(model, optimizer, 2))
        chain.dispose()
        assert lens.state_dict()["chains"] == {}
    assert reports == []
