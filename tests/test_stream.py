"""`Stream.pipe`, `topic` and `Lens.derive` refuse what they cannot work with, and say what to write."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
from reactivex import operators as ops
from torch import nn

import streamlens as sl


@pytest.fixture
def lens() -> Iterator[sl.Lens]:
    model = nn.Linear(1, 1)
    with sl.observe(model) as lens:
        yield lens


def test_a_sink_among_the_operators_is_refused_and_shown_where_it_goes(lens: sl.Lens) -> None:
    table: Any = sl.sinks.Table()
    with pytest.raises(TypeError, match=r"pipe\(\) takes operators.*\.subscribe\(Table"):
        lens.pipe(sl.norm("weights"), table)


@pytest.mark.parametrize("thing", [3, None, "ema"])
def test_what_is_no_operator_is_refused_by_name(lens: sl.Lens, thing: Any) -> None:
    with pytest.raises(TypeError, match=rf"pipe\(\) takes operators.*got {thing!r}$"):
        lens.pipe(sl.norm("weights"), thing)


@pytest.mark.parametrize("name", ["", 3, None])
def test_a_derived_topic_needs_a_name(lens: sl.Lens, name: Any) -> None:
    with pytest.raises(TypeError, match=r"derive\(\) needs a topic's name"):
        lens.derive(name, lens.pipe(sl.norm("weights")))


def test_a_topic_that_is_emitted_only_later_is_refused_with_the_way_to_announce_it(lens: sl.Lens) -> None:
    with pytest.raises(sl.UnknownTopicError, match=r"'validation_loss'.*observe\(emits=\[\.\.\.\]\)"):
        lens.pipe(sl.topic("validation_loss"))


def test_operators_of_reactivex_stand_in_the_plan_under_their_own_names(lens: sl.Lens) -> None:
    norms = lens.pipe(sl.norm("weights"))
    stream = norms.pipe(
        ops.map(lambda f: f), ops.filter(lambda f: True), ops.take(3), lambda s: ops.skip(1)(s)
    )
    assert stream.plan[-4:] == ("<map>", "<filter>", "<take>", "<<lambda>>")


def test_chains_that_differ_in_foreign_operators_are_not_taken_for_equal(lens: sl.Lens) -> None:
    norms = lens.pipe(sl.norm("weights"))
    norms.pipe(ops.take(3)).subscribe(lambda frame: None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        norms.pipe(ops.skip(3)).subscribe(lambda frame: None)
    with pytest.warns(UserWarning, match=r"<skip>.*name="):
        norms.pipe(ops.skip(5)).subscribe(lambda frame: None)
