"""A lens with nothing selected, a closed one and a wrong subscriber are errors that say how to go on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from reactivex import operators as ops
from torch import nn

import streamlens as sl
from tests._runs import small_model


@pytest.fixture
def model() -> nn.Sequential:
    return small_model()


@pytest.fixture
def lens(model: nn.Sequential) -> sl.Lens:
    return sl.observe(model)


NEEDS_FRAMES: dict[str, Callable[[], sl.Operator]] = {
    "ema": lambda: sl.ema(0.9),
    "window": lambda: sl.window(3),
    "diff": lambda: sl.diff(),
    "scan": lambda: sl.scan(lambda total, frame: frame),
    "where": lambda: sl.where(lambda frame: True),
    "rename": lambda: sl.rename("x"),
    "per_layer": lambda: sl.per_layer(),
    "norm": lambda: sl.norm(),
    "across_layers": lambda: sl.across_layers(),
    "per_epoch": lambda: sl.per_epoch(),
}


@pytest.mark.parametrize("name", list(NEEDS_FRAMES))
def test_a_lens_with_nothing_selected_is_an_error_at_the_first_operator_that_needs_frames(
    lens: sl.Lens, name: str
) -> None:
    with pytest.raises(sl.StreamlensError, match=r"no topic selected.*topic\('weights'\)"):
        lens.pipe(NEEDS_FRAMES[name]())


def test_a_lens_with_nothing_selected_is_an_error_at_subscribe(lens: sl.Lens) -> None:
    for nothing in (lens, lens.pipe(sl.layers("0")), lens.pipe(sl.every(3))):
        with pytest.raises(sl.StreamlensError, match=r"no topic selected.*uw_ratio\(\).*Topics: weights"):
            nothing.subscribe(print)
    with pytest.raises(sl.StreamlensError, match="no topic selected"):
        lens.pipe(ops.map(lambda frame: frame)).subscribe(print)


def test_what_fails_while_subscribing_is_raised_by_subscribe_and_leaves_no_chain(lens: sl.Lens) -> None:
    with pytest.raises(sl.StreamlensError, match="no topic selected"):
        lens.pipe(ops.filter(lambda frame: True), ops.map(lambda frame: frame)).subscribe(print)
    assert "no chain is subscribed" in lens.explain()


@pytest.mark.parametrize("end", [3, "TensorBoard", [], object()])
def test_a_subscriber_that_is_none_is_refused(lens: sl.Lens, end: Any) -> None:
    with pytest.raises(TypeError, match="sink, an observer or a callable"):
        lens.pipe(sl.norm("weights")).subscribe(end)
    assert "no chain is subscribed" in lens.explain()


def test_a_sink_class_in_place_of_a_sink_is_refused(lens: sl.Lens) -> None:
    with pytest.raises(TypeError, match=r"the class Table.*Table\("):
        lens.pipe(sl.norm("weights")).subscribe(sl.sinks.Table)


CLOSED: dict[str, Callable[[sl.Lens], object]] = {
    "topic": lambda lens: lens.pipe(sl.topic("weights")),
    "every": lambda lens: lens.pipe(sl.every(2)),
    "norm": lambda lens: lens.pipe(sl.norm("weights")),
    "uw_ratio": lambda lens: lens.pipe(sl.uw_ratio()),
    "subscribe": lambda lens: lens.subscribe(print),
    "emit": lambda lens: lens.emit("x", 1.0),
    "derive": lambda lens: lens.derive("x", lens),
    "step": lambda lens: lens.step(),
    "epochs": lambda lens: lens.epochs(3),
    "batches": lambda lens: lens.batches([1]),
    "epoch_finished": lambda lens: lens.epoch_finished(),
    "watch_loss": lambda lens: lens.watch_loss(nn.functional.mse_loss),
    "load_state_dict": lambda lens: lens.load_state_dict({}),
}


@pytest.mark.parametrize("name", list(CLOSED))
@pytest.mark.parametrize("beside", [False, True], ids=["the only lens", "beside an open lens"])
def test_a_closed_lens_says_so_and_how_to_go_on(model: nn.Sequential, name: str, beside: bool) -> None:
    other = sl.observe(model) if beside else None
    lens = sl.observe(model)
    lens.close()
    with pytest.raises(sl.ClosedLensError, match=r"closed: call streamlens\.observe\(model\) again"):
        CLOSED[name](lens)
    if other is not None:
        other.pipe(sl.norm("weights")).subscribe(print)
        other.close()


@pytest.mark.parametrize("beside", [False, True], ids=["the only lens", "beside an open lens"])
def test_a_stream_of_a_closed_lens_cannot_be_subscribed(model: nn.Sequential, beside: bool) -> None:
    other = sl.observe(model) if beside else None
    lens = sl.observe(model)
    streams = [
        lens.pipe(sl.norm("weights")),
        lens.pipe(sl.norm("weights"), sl.ema(0.9)),
        lens.pipe(sl.uw_ratio()),
        lens.pipe(sl.norm("weights"), ops.map(lambda frame: frame)),
    ]
    lens.close()
    for stream in streams:
        with pytest.raises(sl.ClosedLensError, match="closed"):
            stream.subscribe(print)
    if other is not None:
        other.close()
