from __future__ import annotations

from typing import Any

import pytest
import reactivex as rx
import torch
from hypothesis import given
from hypothesis import strategies as st
from reactivex import operators as ops
from reactivex.subject import Subject
from torch import nn

from streamlens import observe
from streamlens.errors import StreamlensError
from streamlens.frame import Frame, Kind, Lease
from streamlens.operators import (
    AlignedFrame,
    align,
    combine,
    ema,
    every,
    norm,
    per_epoch,
    rename,
    topic,
    window,
)
from streamlens.runtime import default_runtime
from streamlens.stream import Stream
from tests.operators.support import Run, chain_of, frame, ragged, saved_and_loaded


def pairs(out: list[Any]) -> dict[tuple[int, str], tuple[float, ...]]:
    """What was joined, by (step, layer); a pair that comes twice fails."""
    found: dict[tuple[int, str], tuple[float, ...]] = {}
    for aligned in out:
        assert all(f.layers == aligned.layers for f in aligned.frames)
        for layer in aligned.layers:
            assert (aligned.step, layer) not in found
            found[aligned.step, layer] = tuple(float(f[layer]) for f in aligned.frames)
    return found


@st.composite
def two_topics(draw: st.DrawFn, *, reach: int) -> list[Frame]:
    """Frames of two topics: dropped, repeated, layers split over frames, each at most `reach` steps late."""
    frames: list[tuple[float, Frame]] = []
    for name in ("p", "q"):
        for step in draw(st.sets(st.integers(0, 12))):
            layers = draw(st.lists(st.sampled_from("abc"), min_size=1, max_size=3, unique=True))
            cut = draw(st.integers(0, len(layers) - 1))
            for part in (sorted(layers[:cut]), sorted(layers[cut:])):
                for _ in range(draw(st.integers(1, 2))):
                    if part:
                        values = {layer: step + ord(layer) / 1000 for layer in part}
                        shift = draw(st.floats(0, reach + 0.9)) if reach else 0.0
                        frames.append((step + shift, frame(step, values, name)))
    return [f for _, f in sorted(frames, key=lambda pair: pair[0])]


@given(two_topics(reach=0))
def test_equals_a_dict_join_under_dropped_repeated_and_split_frames(frames: list[Frame]) -> None:
    assert pairs(_joined(frames, 0)) == dict_join(frames)


@given(two_topics(reach=3))
def test_equals_a_dict_join_under_permuted_frames_within_the_allowed_lateness(frames: list[Frame]) -> None:
    assert pairs(_joined(frames, 4)) == dict_join(frames)


@given(two_topics(reach=6))
def test_never_joins_what_does_not_belong_together(frames: list[Frame]) -> None:
    joined = pairs(_joined(frames, 0))
    everything = dict_join(frames)
    assert joined.items() <= everything.items()


def _joined(frames: list[Frame], lateness: int) -> list[AlignedFrame]:
    source: Subject[Frame] = Subject()
    out: list[Any] = []
    source.pipe(align("p", "q", allowed_lateness=lateness)).subscribe(out.append)
    for item in frames:
        source.on_next(item)
    source.on_completed()
    return out


def dict_join(frames: list[Frame]) -> dict[tuple[int, str], tuple[float, ...]]:
    table: dict[str, dict[tuple[int, str], float]] = {"p": {}, "q": {}}
    for item in frames:
        for layer, value in item.to_dict().items():
            table[item.topic].setdefault((item.step, layer), value)
    return {key: (table["p"][key], table["q"][key]) for key in table["p"].keys() & table["q"].keys()}


@given(two_topics(reach=3), st.integers(0, 30))
def test_interrupted_and_resumed_equals_uninterrupted(frames: list[Frame], at: int) -> None:
    at = min(at, len(frames))
    out: list[Any] = []
    first: Subject[Frame] = Subject()
    before = chain_of(first.pipe(align("p", "q", allowed_lateness=4)), out.append)
    for item in frames[:at]:
        first.on_next(item)
    state = saved_and_loaded(before.state_dict())
    second: Subject[Frame] = Subject()
    after = chain_of(second.pipe(align("p", "q", allowed_lateness=4)), out.append)
    for cell, saved in zip(after.cells, state, strict=True):
        cell.load_state_dict(saved["state"])
    for item in frames[at:]:
        second.on_next(item)
    second.on_completed()
    first.on_completed()
    assert pairs(out) == dict_join(frames)


def test_an_aligned_frame_is_a_mapping_from_topic_to_frame() -> None:
    (aligned,) = _joined([frame(3, {"a": 1.0}, "p", epoch=2), frame(3, {"a": 2.0}, "q", epoch=2)], 0)
    assert list(aligned) == ["p", "q"]
    assert (aligned.step, aligned.epoch, aligned.micro_step, aligned.layers) == (3, 2, 0, ("a",))
    assert float(aligned["q"]["a"]) == 2.0
    assert aligned[0] is aligned["p"]
    with pytest.raises(KeyError, match="no frame of topic 'r' at step 3"):
        aligned["r"]


def test_two_inputs_of_one_topic_are_read_by_place() -> None:
    source: Subject[Frame] = Subject()
    out: list[Any] = []
    source.pipe(align("p", lambda s: s.pipe(topic("p"), ops.map(lambda f: f)))).subscribe(out.append)
    source.on_next(frame(0, {"a": 1.0}, "p"))
    assert float(out[0][1]["a"]) == 1.0
    with pytest.raises(KeyError, match="by place"):
        out[0]["p"]
    source.on_completed()


def same_twice(lens: Any) -> list[tuple[Any, ...]]:
    stream = lens.pipe(norm("weights"))
    mapped = lens.pipe(norm("weights"), ops.map(lambda f: f))
    return [
        (norm("weights"), norm("weights")),
        ("loss", norm("weights"), topic("loss")),
        (lambda s: s.pipe(norm("weights"), ema(0.9)),) * 2,
        (stream, lens.pipe(norm("weights"))),
        (mapped, mapped),
    ]


@pytest.mark.parametrize("case", range(5))
def test_one_input_twice_is_refused_with_the_remedy(case: int) -> None:
    model = nn.Linear(2, 1)
    with observe(model) as lens:
        with pytest.raises(StreamlensError, match=r"inputs 0 and [12] are the same.*rename\("):
            lens.pipe(align(*same_twice(lens)[case]))
        for inputs in (
            (norm("weights"), lambda s: s.pipe(norm("weights"), rename("again"))),
            (norm("weights"), norm("weights", order=1)),
            (norm("weights"), lambda s: s.pipe(norm("weights"), ema(0.9))),
        ):
            lens.pipe(align(*inputs))
        lens.pipe(combine(norm("weights"), norm("weights"), fn=torch.mul, name="square"))


def test_plain_streams_are_no_twins_because_they_look_alike() -> None:
    first, second = Subject[Frame](), Subject[Frame]()
    out: list[Any] = []
    rx.never().pipe(align(first, second)).subscribe(out.append)
    first.on_next(frame(0, {"a": 1.0}, "p"))
    second.on_next(frame(0, {"a": 2.0}, "p"))
    assert [float(out[0][i]["a"]) for i in range(2)] == [1.0, 2.0]
    with pytest.raises(StreamlensError, match="are the same"):
        rx.never().pipe(align(first, first))
    first.on_completed()
    second.on_completed()


def test_the_models_own_frame_joins_every_layer() -> None:
    loss, norms = frame(0, {"": 0.5}, "p"), frame(0, {"a": 1.0, "b": 2.0}, "q")
    for order in ([loss, norms], [norms, loss]):
        (aligned,) = _joined(order, 0)
        assert aligned.layers == ("a", "b")
        assert aligned["p"].layers == ("",)


def test_layers_that_come_later_are_joined_with_the_models_own_frame_too() -> None:
    out = _joined([frame(0, {"": 0.5}, "p"), frame(0, {"a": 1.0}, "q"), frame(0, {"b": 2.0}, "q")], 0)
    assert [aligned.layers for aligned in out] == [("a",), ("b",)]


def test_what_is_left_out_late_or_repeated_is_counted() -> None:
    source: Subject[Frame] = Subject()
    out: list[Any] = []
    counts = default_runtime().counts
    before = dict(counts)
    chain = chain_of(source.pipe(align("p", "q")), out.append)
    source.on_next(frame(0, {"a": 1.0, "b": 1.0}, "p"))
    source.on_next(frame(0, {"a": 1.0, "c": 1.0}, "q"))  # b and c stay without a partner
    source.on_next(frame(0, {"a": 9.0}, "p"))  # repeated
    source.on_next(frame(1, {"a": 1.0}, "p"))
    source.on_next(frame(1, {"a": 1.0}, "q"))
    source.on_next(frame(0, {"d": 1.0}, "p"))  # late
    assert (chain.counts["incomplete"], chain.counts["duplicate"], chain.counts["late"]) == (2, 1, 1)
    assert counts["incomplete"] - before.get("incomplete", 0) == 2
    assert pairs(out) == {(0, "a"): (1.0, 1.0), (1, "a"): (1.0, 1.0)}
    source.on_completed()


def test_a_partner_that_never_comes_holds_a_bounded_number_of_steps() -> None:
    source: Subject[Frame] = Subject()
    out: list[Any] = []
    chain = chain_of(source.pipe(align("p", "q")), out.append)
    for step in range(1030):
        source.on_next(frame(step, {"a": 1.0}, "p"))
    assert chain.counts["incomplete"] == 6
    source.on_next(frame(6, {"a": 1.0}, "q"))
    source.on_next(frame(5, {"a": 1.0}, "q"))
    assert list(pairs(out)) == [(6, "a")]
    source.on_completed()


def test_a_step_that_closes_lets_go_of_what_a_filter_dropped() -> None:
    training = Run()
    out: list[Any] = []
    source = training.stream()
    chain_of_run = source.pipe(align(topic("p"), lambda s: s.pipe(topic("q"), every(2))))
    chain_of_run.subscribe(out.append)
    for step in range(4):
        training.push(frame(step, {"a": 1.0}, "p"), frame(step, {"a": 2.0}, "q"))
        training.close_step(step)
        assert training.runtime.counts["incomplete"] == (step + 1) // 2
    assert [aligned.step for aligned in out] == [0, 2]


def test_raw_frames_of_different_moments_are_copied_while_they_wait() -> None:
    values, lease = torch.ones(2), Lease()
    source: Subject[Frame] = Subject()
    out: list[Any] = []
    source.pipe(
        combine("p", "q", fn=lambda p, q: [a * b for a, b in zip(p, q, strict=True)], name="r")
    ).subscribe(out.append)
    source.on_next(ragged(0, {"a": values}, "p", lease=lease))
    values.fill_(7)
    lease.end()
    source.on_next(ragged(0, {"a": torch.full((2,), 3.0)}, "q"))
    assert out[0].values[0].tolist() == [3.0, 3.0]
    source.on_completed()


def test_raw_parameter_frames_of_one_burst_are_not_copied() -> None:
    training = Run()
    out: list[Any] = []
    inputs = [training.stream(raw=True, topic=name) for name in ("p", "q")]
    rx.never().pipe(align(*inputs)).subscribe(out.append)
    values, lease = torch.ones(2), Lease()
    training.push(
        ragged(0, {"a": values}, "p", lease=lease), ragged(0, {"a": torch.zeros(2)}, "q", lease=lease)
    )
    assert out[0]["p"].values[0] is values


def test_micro_step_topics_pair_by_micro_step() -> None:
    training = Run()
    out: list[Any] = []
    inputs = [training.stream(Kind.MICRO_STEP, topic=name) for name in ("p", "q")]
    rx.never().pipe(align(*inputs)).subscribe(out.append)
    for micro in (0, 1):
        training.push(frame(0, {"a": float(micro)}, "p", micro_step=micro, kind=Kind.MICRO_STEP))
    for micro in (0, 1):
        training.push(frame(0, {"a": micro + 10.0}, "q", micro_step=micro, kind=Kind.MICRO_STEP))
    assert [(a.micro_step, float(a["p"]["a"]), float(a["q"]["a"])) for a in out] == [
        (0, 0.0, 10.0),
        (1, 1.0, 11.0),
    ]


def test_a_micro_step_topic_joined_to_a_step_topic_is_averaged_over_the_step() -> None:
    training = Run()
    out: list[Any] = []
    loss = training.stream(Kind.MICRO_STEP, topic="loss")
    rx.never().pipe(align(loss, training.stream(topic="q"))).subscribe(out.append)
    for micro, x in enumerate([1.0, 3.0]):
        training.push(frame(0, {"": x}, "loss", micro_step=micro, kind=Kind.MICRO_STEP))
    training.update(0)
    training.push(frame(0, {"a": 5.0}, "q", micro_step=1))
    assert [float(a["loss"][""]) for a in out] == [2.0]


def test_a_raw_micro_step_topic_joined_to_a_parameter_topic_is_refused_when_applied() -> None:
    training = Run()
    activations = training.stream(Kind.MICRO_STEP, raw=True)
    with pytest.raises(StreamlensError, match="reduce them first"):
        rx.never().pipe(align(activations, training.stream()))


def test_epochs_are_joined_although_they_come_after_their_last_step_has_closed() -> None:
    training = Run()
    out: list[Any] = []
    source = training.stream()
    source.pipe(align(per_epoch("mean"), per_epoch("max"))).subscribe(out.append)
    for step, x in enumerate([1.0, 3.0]):
        training.push(frame(step, {"a": x}))
        training.close_step(step)
    training.end_epoch(1, 0)
    assert pairs(out) == {(1, "a"): (2.0, 3.0)}


def test_windows_that_are_joined_are_still_counted_as_windows() -> None:
    source: Subject[Frame] = Subject()
    out: list[Any] = []
    source.pipe(align(window(2), window(2, reduce="max")), every(2)).subscribe(out.append)
    for step in range(8):
        source.on_next(frame(step, {"a": float(step)}))
    assert [aligned.step for aligned in out] == [1, 5]
    source.on_completed()


def test_the_stream_in_front_is_subscribed_once_for_all_inputs() -> None:
    subscriptions: list[int] = []

    def subscribe(observer: Any, scheduler: Any = None) -> Any:
        subscriptions.append(1)
        return rx.from_iterable(
            [frame(s, {"a": float(s)}, name) for s in range(2000) for name in "pq"]
        ).subscribe(observer)

    out: list[Any] = []
    rx.create(subscribe).pipe(align("p", topic("q"), lambda s: s.pipe(topic("p"), ema(0.5)))).subscribe(
        out.append
    )
    assert len(subscriptions) == 1
    assert [aligned.step for aligned in out] == list(range(2000))


def test_an_input_that_ends_with_nothing_waiting_ends_the_join() -> None:
    done: list[bool] = []
    p: Subject[Frame] = Subject()
    q: Subject[Frame] = Subject()
    rx.never().pipe(align(p, q)).subscribe(lambda _: None, on_completed=lambda: done.append(True))
    p.on_next(frame(0, {"a": 1.0}, "p"))
    p.on_completed()
    assert not done
    q.on_next(frame(0, {"a": 1.0}, "q"))
    q.on_next(frame(1, {"a": 1.0}, "q"))
    assert done


def test_on_a_lens_topics_are_captured_together() -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    out: list[list[float]] = []
    with observe(model, on_error="raise") as lens:
        lens.pipe(align("weights", "weight_gradients")).subscribe(
            lambda a: out.append([float(a["weights"][""].norm()), float(a["weight_gradients"][""].norm())])
        )
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.ones(3, 2)).sum().backward()
            optimizer.step()
        weight, gradient = model.weight.detach(), model.weight.grad
        assert gradient is not None
        assert out[-1] == pytest.approx([float(weight.norm()), float(gradient.norm())])
    assert len(out) == 2


def test_combine_is_given_the_values_in_order_and_names_the_result() -> None:
    source: Subject[Frame] = Subject()
    out: list[Frame] = []
    source.pipe(combine("p", "q", fn=torch.sub)).subscribe(out.append)
    source.on_next(frame(0, {"a": 5.0, "b": 6.0}, "p", epoch=4))
    source.on_next(frame(0, {"b": 1.0, "a": 2.0}, "q", epoch=4))
    assert (out[0].topic, out[0].epoch, out[0].to_dict()) == ("sub", 4, {"a": 3.0, "b": 5.0})
    source.on_completed()


def test_combine_broadcasts_the_models_own_values() -> None:
    source: Subject[Frame] = Subject()
    out: list[Frame] = []
    source.pipe(combine("p", "q", fn=torch.mul, name="r")).subscribe(out.append)
    source.on_next(frame(0, {"": 2.0}, "p"))
    source.on_next(frame(0, {"a": 3.0, "b": 4.0}, "q"))
    assert out[0].to_dict() == {"a": 6.0, "b": 8.0}
    source.on_completed()


def test_a_function_that_raises_costs_that_frame_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(default_runtime(), "on_error", "report")
    reported: list[str] = []
    subscription = default_runtime().errors.subscribe(lambda report: reported.append(str(report.error)))

    def fragile(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        if float(p[0]) == 1.0:
            raise ArithmeticError("one is too much")
        return p + q

    source: Subject[Frame] = Subject()
    out: list[Frame] = []
    source.pipe(combine("p", "q", fn=fragile)).subscribe(out.append)
    for step in range(3):
        source.on_next(frame(step, {"a": float(step)}, "p"))
        source.on_next(frame(step, {"a": 0.0}, "q"))
    assert [f.step for f in out] == [0, 2]
    assert reported == ["one is too much"]
    subscription.dispose()
    source.on_completed()


def test_works_between_operators_of_reactivex() -> None:
    source: Subject[Frame] = Subject()
    out: list[float] = []

    def value(aligned: Any) -> float:
        return float(aligned["p"]["a"])

    source.pipe(ops.skip(2), align("p", "q"), ops.map(value)).subscribe(out.append)
    for step in range(3):
        source.on_next(frame(step, {"a": float(step)}, "p"))
        source.on_next(frame(step, {"a": 0.0}, "q"))
    assert out == [1.0, 2.0]
    source.on_completed()


def test_the_result_remembers_the_lens_of_its_inputs() -> None:
    model = nn.Linear(2, 1)
    with observe(model) as lens:
        stream = lens.pipe(align("weights", "biases"), ops.skip(1))
        assert isinstance(stream, Stream)
        assert id(stream.lens) == id(lens)
        plan = lens.pipe(combine(norm("weights"), "loss", fn=torch.mul, name="r")).plan_text
        assert "combine[r](" in plan
        assert "per_step()" in plan


@pytest.mark.parametrize("build", [align, lambda *a: combine(*a, fn=torch.add)])
def test_bad_inputs_are_named(build: Any) -> None:
    with pytest.raises(TypeError, match="two inputs or more"):
        build("weights")
    with pytest.raises(TypeError, match="got 3"):
        build("weights", 3)


def test_bad_options_are_named() -> None:
    with pytest.raises(ValueError, match="allowed_lateness=-1"):
        align("p", "q", allowed_lateness=-1)
    with pytest.raises(TypeError, match="fn=3"):
        combine("p", "q", fn=3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="needs name="):
        combine("p", "q", fn=lambda p, q: p + q)
