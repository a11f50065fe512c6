"""When an alert starts and when it ends."""

from __future__ import annotations

from collections import deque

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamlens.operators.alerts._hysteresis import Hysteresis
from tests.operators.support import saved_and_loaded


def play(hysteresis: Hysteresis, looks: list[bool | None], layer: str = "a") -> list[tuple[int, str]]:
    """What becomes of one layer over some looks; None is a look that knows nothing."""
    events = []
    for i, bad in enumerate(looks):
        starts, ends = hysteresis.look((layer,), np.array([bool(bad)]), np.array([bad is not None]))
        events += [(i, "start")] * bool(starts[0]) + [(i, "end")] * bool(ends[0])
    return events


def by_hand(looks: list[bool | None], n: int, m: int, end: int) -> list[tuple[int, str]]:
    """The definition, look by look."""
    events: list[tuple[int, str]] = []
    recent: deque[bool] = deque(maxlen=m)
    good, is_open = 0, False
    for i, bad in enumerate(looks):
        if bad is None:
            continue
        recent.append(bad)
        good = 0 if bad else good + 1
        if not is_open and sum(recent) >= n:
            is_open = True
            events.append((i, "start"))
        elif is_open and good >= end:
            is_open = False
            recent.clear()
            events.append((i, "end"))
    return events


@given(
    st.lists(st.sampled_from([True, False, None]), max_size=60),
    st.integers(1, 4),
    st.integers(0, 4),
    st.integers(1, 4),
)
def test_starts_after_n_of_m_bad_looks_and_ends_after_some_good_ones(
    looks: list[bool | None], n: int, more: int, end: int
) -> None:
    assert play(Hysteresis(n, n + more, end), looks) == by_hand(looks, n, n + more, end)


def test_layers_start_and_end_by_themselves() -> None:
    hysteresis = Hysteresis(1, 1, 1)
    known = np.array([True, True])
    starts, _ = hysteresis.look(("a", "b"), np.array([True, False]), known)
    assert starts.tolist() == [True, False]
    starts, ends = hysteresis.look(("b", "a"), np.array([True, False]), known)
    assert (starts.tolist(), ends.tolist()) == ([True, False], [False, True])
    assert hysteresis.open == ("b",)


def test_a_layer_that_is_missing_from_a_look_stays_as_it_is() -> None:
    hysteresis = Hysteresis(2, 2, 1)
    assert play(hysteresis, [True], "a") == []
    assert play(hysteresis, [True, False, True], "b") == []
    assert play(hysteresis, [True], "a") == [(0, "start")]


@pytest.mark.parametrize("at", [1, 2, 4])
def test_goes_on_from_its_saved_state(at: int) -> None:
    looks: list[bool | None] = [True, True, False, True, False, False, True, True]
    first, second = Hysteresis(2, 3, 2), Hysteresis(2, 3, 2)
    events = play(first, looks[:at])
    second.load_state_dict(saved_and_loaded(first.state_dict()))
    events += [(i + at, what) for i, what in play(second, looks[at:])]
    assert events == by_hand(looks, 2, 3, 2)
