"""A fused optimizer under GradScaler on a device: whether a step was one, only the device knows.

There need be no device: it is enough that the overflow's flag counts as unknown to the host, and that
frames travel to sinks as those of a device do.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

import streamlens as sl
from streamlens.capture import updates
from streamlens.capture.update_frames import masked
from streamlens.delivery import Delivery
from streamlens.frame import Frame, Kind
from streamlens.sink import RunInfo, Sink
from tests._runs import same, small_model
from tests.helpers.by_hand import snapshot

OVERFLOWS = {1, 4}
STEPS = 6


@pytest.fixture(autouse=True)
def unknown_to_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(updates, "known_on_host", lambda found_inf: False)


class Recorder(Sink):
    max_latency = 0.01

    def __init__(self) -> None:
        self.frames: list[Frame] = []

    def write(self, frames: Sequence[Frame]) -> None:
        self.frames += frames


def train(model: nn.Module, overflows: set[int] = OVERFLOWS) -> Iterator[dict[str, Tensor]]:
    """Parameters after each call of `step`; at an overflow they stay what they are."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, fused=True)
    scaler = GradScaler("cpu", init_scale=64.0, growth_interval=1000)
    data = torch.Generator().manual_seed(0)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = model(torch.randn(4, 4, generator=data)).square().sum()
        scaler.scale(loss * (float("inf") if step in overflows else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        yield snapshot(model)


def observed(*chain: Any, **options: Any) -> tuple[list[Frame], Recorder, Any]:
    model = small_model()
    frames: list[Frame] = []
    sink = Recorder()
    with sl.observe(model, on_error="raise", **options) as lens:
        lens.pipe(*chain).subscribe(lambda frame: frames.append(frame.clone()))
        lens.pipe(*chain).subscribe(sink)
        list(train(model))
        assert lens.flush(5)
        counts = lens.engine.sink_stats()["Recorder"]
    return frames, sink, counts


def is_nan(frame: Frame) -> bool:
    return all(bool(value.isnan().all()) for _, value in frame.items())


@pytest.mark.parametrize(
    "chain",
    [
        (sl.norm("weights"),),
        (sl.norm("weight_gradients"),),
        (sl.norm("parameter_updates"),),
        (sl.topic("learning_rate"),),
        (sl.histogram("weights", bins=4, range=(-1, 1)),),
        (sl.topic("weights"),),
        (sl.topic("weight_gradients"),),
        (sl.topic("weight_updates"),),
        (sl.norm(sl.optimizer_state("exp_avg")),),
        (sl.uw_ratio(),),
        (sl.topic("weights"), sl.rename("kept")),
    ],
    ids=lambda chain: getattr(chain[0], "__name__", "") + str(len(chain)),
)
def test_frames_of_an_overflow_are_nan_and_reach_no_sink(chain: Any) -> None:
    frames, sink, counts = observed(*chain)
    assert [f.step for f in frames] == list(range(STEPS)), "the clock advances"
    assert [f.step for f in frames if is_nan(f)] == sorted(OVERFLOWS)
    assert [f.step for f in sink.frames] == [s for s in range(STEPS) if s not in OVERFLOWS]
    assert (counts.emitted, counts.written, counts.dropped) == (STEPS, STEPS - 2, 2)


def test_what_is_left_is_what_the_updates_did() -> None:
    twin = small_model()
    states = [snapshot(twin), *train(twin)]
    frames, _, _ = observed(sl.topic("parameter_updates"))
    for k, (before, after) in enumerate(itertools.pairwise(states)):
        for name in before:
            expected = after[name] - before[name]
            if k in OVERFLOWS:
                assert torch.count_nonzero(expected) == 0
                assert frames[k][name].isnan().all()
            else:
                torch.testing.assert_close(frames[k][name], expected, rtol=1e-4, atol=1e-7)


def test_gradients_are_unscaled() -> None:
    frames, _, _ = observed(sl.topic("weight_gradients"))
    model = small_model()
    data = torch.Generator().manual_seed(0)
    model(torch.randn(4, 4, generator=data)).square().sum().backward()
    for layer, value in frames[0].items():
        torch.testing.assert_close(value, model.get_submodule(layer).weight.grad)


def test_what_remembers_skips_the_overflow_and_goes_on() -> None:
    frames, sink, _ = observed(sl.norm("weight_gradients"), sl.ema(0.5))
    alone, _, _ = observed(sl.norm("weight_gradients"))
    smoothed: float | None = None
    for frame, norm in zip(frames, alone, strict=True):
        value = float(norm["0"])
        if not math.isnan(value):
            smoothed = value if smoothed is None else 0.5 * smoothed + 0.5 * value
            assert float(frame["0"]) == pytest.approx(smoothed, rel=1e-6)
    assert all(not is_nan(frame) for frame in sink.frames)


def test_forward_topics_of_the_step_are_kept() -> None:
    """The loss of an overflow is a loss, and is written, as infinite as it may be."""
    _, sink, _ = observed(sl.norm("activations"))
    assert [frame.step for frame in sink.frames] == list(range(STEPS))


def test_a_window_over_an_overflow_is_written() -> None:
    _, sink, _ = observed(sl.norm("weights"), sl.window(2))
    assert [frame.step for frame in sink.frames] == [1, 3, 5]
    assert not any(map(is_nan, sink.frames))


def test_nan_of_a_step_that_was_one_is_data_and_is_written() -> None:
    model = small_model()
    sink = Recorder()
    with sl.observe(model, on_error="raise") as lens:
        lens.pipe(sl.reduce(lambda value: value.sum() * float("nan"), "weights", name="broken")).subscribe(
            sink
        )
        list(train(model, overflows=set()))
    assert [frame.step for frame in sink.frames] == list(range(STEPS))
    assert all(map(is_nan, sink.frames))


def test_observing_leaves_the_run_bit_identical() -> None:
    alone = list(train(small_model()))
    model = small_model()
    with sl.observe(model) as lens:
        for topic in ("weights", "weight_gradients", "weight_updates", "learning_rate"):
            lens.pipe(sl.topic(topic)).subscribe(Recorder())
        assert same(alone, list(train(model)))


@pytest.mark.parametrize(
    "value",
    [
        torch.ones(3),
        torch.ones(3, dtype=torch.bfloat16),
        torch.ones(2, dtype=torch.complex64),
        torch.ones(0),
        torch.tensor(1.0),
        torch.eye(3).to_sparse(),
        torch.sparse_coo_tensor(torch.tensor([[1, 1]]), torch.ones(2), (3,), check_invariants=True),
    ],
    ids=["float", "bfloat16", "complex", "empty", "0-dim", "sparse", "uncoalesced"],
)
def test_a_mask_covers_every_number_or_changes_none(value: Tensor) -> None:
    def numbers(tensor: Tensor) -> Tensor:
        return tensor._values() if tensor.is_sparse else tensor

    assert numbers(masked(value, torch.ones(()))).isnan().all()
    assert same(numbers(masked(value, torch.zeros(()))), numbers(value))
    assert masked(value, torch.ones(())).shape == value.shape
    assert masked(value, torch.ones(())).dtype == value.dtype


def test_whole_numbers_hold_no_nan_and_stay() -> None:
    assert masked(torch.tensor([3]), torch.ones(())).tolist() == [3]


@pytest.mark.parametrize("first", [0.0, 1.0])
def test_of_two_updates_in_a_step_either_may_be_none(first: float) -> None:
    """What is NaN is left out as soon as one of them was; what has a number is written."""
    delivery = Delivery(lambda: RunInfo("id"), lambda error, where: None)
    sink = Recorder()
    proxy = delivery.connect(sink, "chain")
    delivery.doubt(3, torch.tensor(first))
    delivery.doubt(3, torch.tensor(1.0 - first))
    for topic, values in (("a", [math.nan, math.nan]), ("b", [math.nan, 1.0]), ("c", [1.0, 2.0])):
        proxy.on_next(Frame(topic, 3, ("x", "y"), torch.tensor(values)))
    proxy.on_next(Frame("d", 4, ("x",), torch.tensor([math.nan])))
    proxy.on_next(Frame("e", 3, ("x",), torch.tensor([math.nan]), kind=Kind.EVENT))
    assert delivery.close(5)
    assert [frame.topic for frame in sink.frames] == ["b", "c", "d", "e"]
