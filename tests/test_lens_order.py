"""Frames come in order, each once, also where callbacks emit, train, subscribe and dispose."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reactivex.abc import DisposableBase
from torch import Tensor, nn

import streamlens as sl
from streamlens.frame import Frame
from streamlens.topics import TOPICS
from tests._runs import small_model, steps_of

Place = tuple[int, int, int]


def places(frames: list[Frame]) -> dict[tuple[str, str], list[Place]]:
    """For each topic and layer, (step, micro-step, call) of its frames as they came."""
    found: dict[tuple[str, str], list[Place]] = {}
    for frame in frames:
        for layer in frame.layers:
            name, _, call = layer.partition("@")
            found.setdefault((frame.topic, name), []).append((frame.step, frame.micro_step, int(call or 0)))
    return found


def assert_strictly_increasing(frames: list[Frame]) -> None:
    assert frames
    for key, came in places(frames).items():
        assert all(a < b for a, b in itertools.pairwise(came)), (key, came)


class Repeating(nn.Module):
    """A model that runs one part several times a pass."""

    def __init__(self, calls: int) -> None:
        super().__init__()
        self.calls = calls
        self.act = nn.Tanh()
        self.body = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.calls):
            x = self.act(self.body(x))
        out: Tensor = self.head(x)
        return out


MICRO_STEP_AND_STEP = [name for name, spec in TOPICS.items() if spec.kind.value != "event"]


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    schedule=st.lists(st.tuples(st.integers(1, 3), st.booleans(), st.booleans()), min_size=1, max_size=4),
    calls=st.integers(1, 3),
)
def test_a_layers_frames_of_a_topic_are_strictly_increasing_in_any_loop(
    schedule: list[tuple[int, bool, bool]], calls: int
) -> None:
    """Each step: how many micro-steps, whether it evaluates, whether an epoch ends after it."""
    model, criterion = Repeating(calls), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    frames: list[Frame] = []
    x, y = torch.ones(2, 4), torch.tensor([0, 1])
    with sl.observe(model, loss=criterion) as lens:
        for topic in MICRO_STEP_AND_STEP:
            lens.pipe(sl.topic(topic)).subscribe(frames.append)
            if TOPICS[topic].raw:
                lens.pipe(sl.norm(topic)).subscribe(frames.append)
        for micro_steps, evaluates, ends in schedule:
            optimizer.zero_grad()
            for _ in range(micro_steps):
                criterion(model(x), y).backward()
            optimizer.step()
            if evaluates:
                with torch.no_grad():
                    model.eval()(x)
                model.train()
            if ends:
                lens.epoch_finished()
    assert_strictly_increasing(frames)
    updates = [frame.step for frame in frames if frame.topic == "weights.norm2"]
    assert updates == list(range(len(schedule)))
    passes = [(f.step, f.micro_step) for f in frames if f.topic == "loss"]
    assert passes == [(s, m) for s, (count, _, _) in enumerate(schedule) for m in range(count)]
    seen = Counter(f.layers for f in frames if f.topic == "activations.norm2")
    assert set(seen) == {tuple(name for name, _ in _calls(calls))}


def _calls(calls: int) -> list[tuple[str, int]]:
    """The keys of the model's layers in model order, calls of one layer together."""
    found = []
    for name, times in (("act", calls), ("body", calls), ("head", 1)):
        found += [(f"{name}@{call}" if call else name, call) for call in range(times)]
    return found


def test_what_a_callback_emits_comes_after_the_burst_under_way_to_everybody() -> None:
    model = small_model()
    came: dict[str, list[tuple[str, int]]] = {"before": [], "after": []}
    with sl.observe(model, emits=["note"]) as lens:

        def note(place: str) -> Callable[[Frame], None]:
            return lambda frame: came[place].append((frame.topic, frame.step))

        def reemit(frame: Frame) -> None:
            lens.emit("note", frame.step)

        lens.pipe(sl.topic("note")).subscribe(note("before"))
        lens.pipe(sl.topic("weights"), sl.norm()).subscribe(note("before"))
        lens.pipe(sl.topic("weights"), sl.norm()).subscribe(reemit)
        lens.pipe(sl.topic("weights"), sl.norm()).subscribe(note("after"))
        lens.pipe(sl.topic("note")).subscribe(note("after"))
        list(steps_of(model, torch.optim.SGD(model.parameters(), lr=0.1), 2))
    expected = [("weights.norm2", 0), ("note", 0), ("weights.norm2", 1), ("note", 1)]
    assert came == {"before": expected, "after": expected}


def test_an_emission_from_an_emission_does_not_overtake() -> None:
    model = small_model()
    values: list[float] = []
    second: list[float] = []
    with sl.observe(model, emits=["count"]) as lens:

        def again(frame: Frame) -> None:
            value = frame[""].item()
            values.append(value)
            if value < 3:
                lens.emit("count", value + 1)

        lens.pipe(sl.topic("count")).subscribe(again)
        lens.pipe(sl.topic("count")).subscribe(lambda frame: second.append(frame[""].item()))
        lens.emit("count", 0)
    assert values == second == [0, 1, 2, 3]


def test_a_forward_within_a_callback_under_paused_is_not_seen() -> None:
    model = small_model()
    frames: list[Frame] = []
    with sl.observe(model) as lens:

        def evaluate(frame: Frame) -> None:
            with lens.paused():
                model(torch.ones(1, 4)).sum()

        for topic in ("activations", "network_output", "layer_gradients", "weight_gradients", "weights"):
            lens.pipe(sl.topic(topic)).subscribe(evaluate)
            lens.pipe(sl.norm(topic)).subscribe(frames.append)
        list(steps_of(model, torch.optim.SGD(model.parameters(), lr=0.1), 3))
    assert_strictly_increasing(frames)
    assert Counter(frame.topic for frame in frames) == dict.fromkeys({f.topic for f in frames}, 3)
    assert all(frame.layers == ("0", "1", "2") for frame in frames if frame.topic == "activations.norm2")


def test_training_another_observed_model_within_a_callback_keeps_both_in_order() -> None:
    outer, inner = small_model(0), small_model(1)
    inner_optimizer = torch.optim.SGD(inner.parameters(), lr=0.1)
    frames: dict[str, list[Frame]] = {"outer": [], "inner": []}
    with sl.observe(outer) as lens, sl.observe(inner) as other:
        other.pipe(sl.topic("activations", "weights"), sl.norm()).subscribe(frames["inner"].append)
        lens.pipe(sl.norm("weights")).subscribe(lambda frame: list(steps_of(inner, inner_optimizer, 2)))
        lens.pipe(sl.topic("activations", "weights"), sl.norm()).subscribe(frames["outer"].append)
        list(steps_of(outer, torch.optim.SGD(outer.parameters(), lr=0.1), 2))
    for came in frames.values():
        assert_strictly_increasing(came)
    assert [frame.step for frame in frames["inner"] if frame.topic == "weights.norm2"] == [0, 1, 2, 3]


CHANGES = ["batch_started", "activations", "layer_gradients", "weight_gradients", "weights"]
WATCHED = ("activations", "layer_gradients", "weight_gradients", "weights")


def equal(some: list[Any], others: list[Any]) -> bool:
    """Whether two runs' chains received the same, to rounding: other demands may sum in another order."""
    return len(some) == len(others) and all(
        a[:2] == b[:2] and a[2] == pytest.approx(b[2], rel=1e-5) for a, b in zip(some, others, strict=True)
    )


def received(change: Callable[[sl.Lens], Callable[[Frame], None]], at: str) -> list[Any]:
    """What four chains receive while a fifth one changes the subscriptions at some event."""
    model = small_model()
    frames: list[Any] = []
    with sl.observe(model) as lens:
        for topic in WATCHED:
            lens.pipe(sl.norm(topic)).subscribe(lambda f: frames.append((f.topic, f.step, f.to_dict())))
        lens.pipe(sl.topic(at)).subscribe(change(lens))
        list(steps_of(model, torch.optim.SGD(model.parameters(), lr=0.1), 3))
    return frames


@pytest.mark.parametrize("at", CHANGES)
def test_subscribing_within_a_callback_costs_nobody_a_frame_and_starts_by_the_next_step(at: str) -> None:
    late: list[Frame] = []

    def subscribing(lens: sl.Lens) -> Callable[[Frame], None]:
        subscriptions: list[DisposableBase] = []

        def subscribe(frame: Frame) -> None:
            if not subscriptions:
                subscriptions.extend(lens.pipe(sl.norm(topic)).subscribe(late.append) for topic in WATCHED)

        return subscribe

    undisturbed = received(lambda lens: lambda frame: None, at)
    assert equal(received(subscribing, at), undisturbed)
    assert_strictly_increasing(late)
    for topic in WATCHED:
        steps = [frame.step for frame in late if frame.topic == f"{topic}.norm2"]
        assert steps in ([0, 1, 2], [1, 2]), topic


@pytest.mark.parametrize("at", CHANGES)
def test_disposing_within_a_callback_ends_that_chain_at_once_and_no_other(at: str) -> None:
    ended: list[Frame] = []
    after: list[Frame] = []

    def disposing(lens: sl.Lens) -> Callable[[Frame], None]:
        def note(frame: Frame) -> None:
            (after if gone else ended).append(frame)

        gone: list[bool] = []
        subscriptions = [lens.pipe(sl.topic(topic), sl.mean()).subscribe(note) for topic in WATCHED]

        def dispose(frame: Frame) -> None:
            if frame.step == 1:
                for subscription in subscriptions:
                    subscription.dispose()
                gone.append(True)

        return dispose

    undisturbed = received(lambda lens: lambda frame: None, at)
    assert equal(received(disposing, at), undisturbed)
    assert {frame.step for frame in ended} <= {0, 1}
    assert after == []


def test_a_chain_that_disposes_itself_gets_no_further_frame() -> None:
    model = small_model()
    steps: list[int] = []
    with sl.observe(model) as lens:
        subscriptions: list[DisposableBase] = []

        def once(frame: Frame) -> None:
            steps.append(frame.step)
            subscriptions[0].dispose()

        subscriptions.append(lens.pipe(sl.topic("weights", "weight_gradients")).subscribe(once))
        list(steps_of(model, torch.optim.SGD(model.parameters(), lr=0.1), 3))
        assert "nothing is captured" in lens.explain()
    assert steps == [0]


def test_derived_frames_come_after_the_whole_burst_that_made_them() -> None:
    model = small_model()
    came: list[tuple[str, int]] = []

    def note(frame: Frame) -> None:
        came.append((frame.topic, frame.step))

    with sl.observe(model) as lens:
        lens.derive("doubled", lens.pipe(sl.norm("weights"), sl.scan(lambda last, frame: frame)))
        lens.pipe(sl.topic("doubled")).subscribe(note)
        lens.derive("again", lens.pipe(sl.topic("doubled"), sl.rename("x")))
        lens.pipe(sl.topic("again")).subscribe(note)
        for topic in ("weight_gradients", "weights", "weight_updates"):
            lens.pipe(sl.norm(topic)).subscribe(note)
        list(steps_of(model, torch.optim.SGD(model.parameters(), lr=0.1), 2))
    burst = ["weight_gradients.norm2", "weights.norm2", "weight_updates.norm2"]
    for step in (0, 1):
        of_step = [topic for topic, s in came if s == step]
        assert sorted(of_step[:3]) == sorted(burst)
        assert of_step[3:] == ["doubled", "again"]


def test_a_steps_ratio_is_there_when_the_optimizer_returns() -> None:
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    steps: list[int] = []
    with sl.observe(model) as lens:
        lens.pipe(sl.uw_ratio(), sl.ema(0.9)).subscribe(lambda frame: steps.append(frame.step))
        for number, _ in enumerate(steps_of(model, optimizer, 3)):
            assert steps == list(range(number + 1))
