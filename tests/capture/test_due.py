"""Which demands are due at a step: as if each were asked, and the same ones as the same tuple."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from streamlens.capture.due import Schedule
from streamlens.capture.view import Demand, View


@st.composite
def views(draw: st.DrawFn) -> View:
    start = draw(st.integers(0, 30))
    stop = draw(st.none() | st.integers(start, 60))
    return View(("loss",), every=draw(st.sampled_from([1, 2, 3, 7, 10, 20])), start=start, stop=stop)


def demand(view: View) -> Demand:
    return Demand(view, lambda _: None, None)


@given(st.lists(views(), max_size=6), st.permutations(range(80)))
def test_what_is_due_is_what_each_demand_says_at_any_step(asked: list[View], steps: list[int]) -> None:
    demands = [demand(view) for view in asked]
    schedule = Schedule(demands)
    for step in steps:
        assert list(schedule.at(step)) == [d for d in demands if d.view.due(step)]


def test_cadences_that_hardly_ever_meet_are_told_right_too() -> None:
    demands = [demand(View(("loss",), every=every)) for every in (997, 1009, 1013)]
    schedule = Schedule(demands)
    for step in (0, 997, 1009, 1013, 997 * 1009, 997 * 1009 * 1013, 5):
        assert list(schedule.at(step)) == [d for d in demands if step % d.view.every == 0]


def test_the_same_demands_are_one_tuple_at_all_steps() -> None:
    schedule = Schedule([demand(View(("loss",))), demand(View(("loss",), every=10))])
    assert schedule.at(3) is schedule.at(17)
    assert schedule.at(10) is schedule.at(20)
    assert schedule.at(3) is not schedule.at(10)


def test_only_what_is_admitted_is_due() -> None:
    everything, some = demand(View(("loss",))), demand(View(("weights",)))
    schedule = Schedule([everything, some])
    assert schedule.admitted(4, lambda view: view.topics == ("weights",)) == (some,)
    assert schedule.at(4) == (everything, some)


def test_the_steps_before_which_demands_end_are_known() -> None:
    assert Schedule([demand(View(stop=4)), demand(View(stop=9)), demand(View())]).ends == {4, 9}
