"""What every operator promises, whatever it computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import reactivex as rx
import torch
from hypothesis import given
from hypothesis import strategies as st
from reactivex.abc import ObserverBase
from reactivex.subject import Subject
from torch.nn.functional import mse_loss

import streamlens.operators
import streamlens.operators.alerts
from streamlens.errors import StreamlensError
from streamlens.frame import Frame
from streamlens.nodes import Node, frame_operator, stateful
from streamlens.operators import (
    absmax,
    across_layers,
    adam_moments,
    adversarial_susceptibility,
    align,
    between,
    combine,
    condition_number,
    cosine,
    dead_fraction,
    diff,
    distance_from_start,
    effective_lr,
    effective_rank,
    ema,
    every,
    generalisation_gap,
    gradient_noise_scale,
    gradient_snr,
    hessian_eigenvalues,
    hessian_trace,
    histogram,
    kurtosis,
    layers,
    linear_cka,
    loss,
    loss_decrease,
    maximum,
    mean,
    median,
    minimum,
    nonfinite,
    norm,
    per_epoch,
    per_layer,
    per_step,
    percentile_bands,
    quantiles,
    ratio,
    reduce,
    rename,
    rms,
    saturation,
    scan,
    sharpness,
    singular_values,
    skewness,
    smooth,
    spectral_norm,
    stable_rank,
    std,
    svcca,
    test_accuracy,
    topic,
    total,
    train_accuracy,
    unit_saturation,
    uw_ratio,
    var,
    where,
    window,
    zero_fraction,
)
from streamlens.runtime import default_runtime
from streamlens.stream import Operator, Stream
from tests.operators.support import chain_of, saved_and_loaded

MODEL = torch.nn.Linear(2, 1)
BATCH = (torch.ones(3, 2), torch.zeros(3, 1))


def fed(operator: Operator) -> Operator:
    """An operator of what a forward pass gives, on streams that have topics of parameters."""

    def more(frame: Frame) -> list[Frame]:
        if frame.topic != "weights" or not len(frame):
            return [frame]
        batch = (torch.eye(2) + frame.step,)
        topics = ("network_output", "input_labels")
        return [
            Frame("loss", frame.step, ("",), torch.tensor([1.0 + frame.step])),
            *(Frame(name, frame.step, ("",), batch) for name in topics),
            frame,
        ]

    return lambda source: operator(frame_operator(source, more, "fed"))


OPERATORS: dict[str, Callable[[], Operator]] = {
    "absmax": absmax,
    "across_layers": across_layers,
    "adam_moments": adam_moments,
    "adversarial_susceptibility": lambda: adversarial_susceptibility(
        [BATCH], 0.1, model=MODEL, metric=mse_loss, loss=mse_loss
    ),
    "align": lambda: align("weights", "weight_updates"),
    "between": lambda: between(0),
    "combine": lambda: combine("weights", "weight_updates", fn=torch.add),
    "condition_number": condition_number,
    "cosine": cosine,
    "dead_fraction": lambda: dead_fraction(None),
    "diff": diff,
    "distance_from_start": lambda: distance_from_start("weights"),
    "effective_lr": effective_lr,
    "ema": lambda: ema(0.5),
    "effective_rank": effective_rank,
    "every": lambda: every(1),
    "generalisation_gap": lambda: fed(generalisation_gap([BATCH], model=MODEL, metric=mse_loss)),
    "gradient_noise_scale": lambda: gradient_noise_scale(batch_size=1),
    "gradient_snr": gradient_snr,
    "hessian_eigenvalues": lambda: hessian_eigenvalues(
        1, loss=torch.nn.functional.mse_loss, batch=BATCH, model=MODEL
    ),
    "hessian_trace": lambda: hessian_trace(loss=torch.nn.functional.mse_loss, batch=BATCH, model=MODEL),
    "histogram": histogram,
    "kurtosis": kurtosis,
    "layers": lambda: layers("*"),
    "linear_cka": lambda: linear_cka(BATCH[0], model=MODEL),
    "loss": lambda: fed(loss()),
    "loss_decrease": lambda: fed(loss_decrease(1)),
    "maximum": maximum,
    "mean": mean,
    "median": median,
    "minimum": minimum,
    "nonfinite": nonfinite,
    "norm": norm,
    "per_epoch": per_epoch,
    "per_layer": per_layer,
    "per_step": per_step,
    "percentile_bands": percentile_bands,
    "quantiles": quantiles,
    "ratio": lambda: ratio("weights", "weight_updates"),
    "reduce": lambda: reduce(torch.sum, name="sum"),
    "rename": lambda: rename("y"),
    "rms": rms,
    "saturation": lambda: saturation(None, window=1),
    "scan": lambda: scan(lambda total, item: total),
    "singular_values": singular_values,
    "skewness": skewness,
    "sharpness": lambda: sharpness(loss=torch.nn.functional.mse_loss, batch=BATCH, model=MODEL, lr=0.1),
    "smooth": lambda: smooth(1),
    "spectral_norm": spectral_norm,
    "stable_rank": stable_rank,
    "std": std,
    "test_accuracy": lambda: test_accuracy([BATCH], model=MODEL, metric=mse_loss),
    "svcca": lambda: svcca(BATCH[0], model=MODEL),
    "topic": lambda: topic("weights", "weight_updates"),
    "total": total,
    "train_accuracy": lambda: fed(train_accuracy()),
    "unit_saturation": lambda: unit_saturation(None, lower=0, upper=1),
    "uw_ratio": uw_ratio,
    "var": var,
    "where": lambda: where(lambda _: True),
    "window": lambda: window(2),
    "zero_fraction": zero_fraction,
}

# They say so where an operator in front has already made numbers of them.
OF_TENSORS = {
    "adam_moments",
    "effective_lr",
    "gradient_noise_scale",
    "gradient_snr",
    "condition_number",
    "cosine",
    "distance_from_start",
    "effective_rank",
    "saturation",
    "singular_values",
    "spectral_norm",
    "stable_rank",
}

every_operator = pytest.mark.parametrize("make", OPERATORS.values(), ids=OPERATORS)


class Log(ObserverBase[Any]):
    """What an observer is told."""

    def __init__(self) -> None:
        self.frames: list[Any] = []
        self.ends: list[str] = []

    def on_next(self, value: Any) -> None:
        assert not self.ends
        self.frames.append(value)

    def on_error(self, error: Exception) -> None:
        self.ends.append(str(error))

    def on_completed(self) -> None:
        self.ends.append("completed")


def two(step: int) -> list[Frame]:
    """Topics of matrices, so that operators of numbers and of whole tensors can take them."""
    values = torch.tensor([[[1.0, 2.0], [3.0, 5.0]], [[2.0, 0.0], [1.0, 1.0]]], dtype=torch.float64)
    topics = ("weights", "weight_updates", "weight_gradients", "raw_gradients")
    frames = [Frame(name, step, ("a", "b"), values + step, epoch=step) for name in topics]
    return [*frames, frames[-1].replace(micro_step=1, values=values * 3 + step)]


def test_every_public_operator_is_held_to_these_contracts() -> None:
    # Rules give frames only where something is wrong, and these two only when told to: they have
    # tests of their own.
    others = {
        "AlignedFrame",
        "FlightRecorder",
        "flight_recorder",
        "when",
        *streamlens.operators.alerts.__all__,
    }
    assert set(OPERATORS) == set(streamlens.operators.__all__) - others


@every_operator
def test_gives_nothing_on_a_stream_that_never_does_anything(make: Callable[[], Operator]) -> None:
    log = Log()
    rx.never().pipe(make()).subscribe(log).dispose()
    assert (log.frames, log.ends) == ([], [])


@every_operator
def test_completes_at_once_on_an_empty_stream(make: Callable[[], Operator]) -> None:
    log = Log()
    rx.empty().pipe(make()).subscribe(log)
    assert (log.frames, log.ends) == ([], ["completed"])


@every_operator
def test_passes_the_sources_error_on_and_ends(
    make: Callable[[], Operator], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(default_runtime(), "on_error", "report")
    source: Subject[Frame] = Subject()
    log = Log()
    source.pipe(make()).subscribe(log)
    for item in two(0):
        source.on_next(item)
    source.on_error(OSError("the source broke"))
    assert log.ends == ["the source broke"]


@every_operator
def test_a_source_that_fails_while_subscribing_raises(make: Callable[[], Operator]) -> None:
    with pytest.raises(OSError, match="broken from the start"):
        rx.throw(OSError("broken from the start")).pipe(make()).subscribe(Log())


@every_operator
def test_gives_nothing_more_once_disposed_and_lets_go_of_the_source(make: Callable[[], Operator]) -> None:
    source: Subject[Frame] = Subject()
    log = Log()
    subscription = source.pipe(make()).subscribe(log)
    for item in two(0) + two(1):
        source.on_next(item)
    seen = len(log.frames)
    subscription.dispose()
    for item in two(2) + two(3):
        source.on_next(item)
    assert len(log.frames) == seen
    assert not source.observers


@every_operator
def test_gives_frames_and_completes_with_its_source(make: Callable[[], Operator]) -> None:
    source: Subject[Frame] = Subject()
    log = Log()
    source.pipe(make()).subscribe(log)
    for step in range(4):
        for item in two(step):
            source.on_next(item)
    source.on_completed()
    assert log.frames
    assert log.ends == ["completed"]


@every_operator
def test_two_subscriptions_share_no_state(make: Callable[[], Operator]) -> None:
    source: Subject[Frame] = Subject()
    stream = source.pipe(make())
    early, late = Log(), Log()
    stream.subscribe(early)
    for item in two(0):
        source.on_next(item)
    stream.subscribe(late)
    fresh: Subject[Frame] = Subject()
    alone = Log()
    fresh.pipe(make()).subscribe(alone)
    for step in (2, 3):
        for item in two(step):
            source.on_next(item)
            fresh.on_next(item)
    source.on_completed()
    fresh.on_completed()
    assert [repr(f) for f in late.frames] == [repr(f) for f in alone.frames]


@every_operator
def test_a_frame_without_layers_does_no_harm(make: Callable[[], Operator]) -> None:
    source: Subject[Frame] = Subject()
    log = Log()
    source.pipe(make()).subscribe(log)
    source.on_next(Frame("weights", 0, (), torch.empty(0)))
    for step in (1, 2, 3):
        for item in two(step):
            source.on_next(item)
    source.on_completed()
    assert any(len(f.layers) for f in log.frames)


@every_operator
def test_its_result_is_a_stream_with_a_plan(make: Callable[[], Operator]) -> None:
    stream = make()(Subject())
    assert isinstance(stream, Stream)
    assert len(stream.plan_text) > len("Subject | ")


@every_operator
def test_its_state_survives_the_safe_loader(make: Callable[[], Operator]) -> None:
    source: Subject[Frame] = Subject()
    chain = chain_of(source.pipe(make()), lambda _: None)
    for item in two(0) + two(1)[:1]:
        source.on_next(item)
    for cell, saved in zip(chain.cells, saved_and_loaded(chain.state_dict()), strict=True):
        cell.load_state_dict(saved["state"])
    source.on_completed()


@given(
    st.lists(
        st.sampled_from(sorted(set(OPERATORS) - OF_TENSORS - {"align", "combine", "ratio", "uw_ratio"})),
        max_size=3,
    )
)
def test_operators_follow_each_other_in_any_order(names: list[str]) -> None:
    source: Subject[Frame] = Subject()
    log = Log()
    chain: Any = source
    for name in names:
        if name == "topic":
            continue
        chain = OPERATORS[name]()(chain)
    chain.subscribe(log)
    for step in range(8):
        for item in two(step):
            source.on_next(item)
    source.on_completed()
    assert log.ends == ["completed"]


def test_an_operator_built_on_a_node_refuses_a_lens_with_nothing_selected() -> None:
    model = torch.nn.Linear(1, 1)
    with streamlens.observe(model) as lens, pytest.raises(StreamlensError, match="no topic selected"):
        stateful(lens, Node, "mine()")
