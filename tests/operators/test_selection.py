from __future__ import annotations

from typing import Any

import pytest
import torch
from reactivex import operators as ops
from reactivex.subject import Subject
from torch import nn

from streamlens import observe
from streamlens.errors import ExpiredFrameError, LayerNotFoundError, StreamlensError, UnknownTopicError
from streamlens.frame import Frame, Lease
from streamlens.lens import Lens
from streamlens.operators import (
    across_layers,
    between,
    ema,
    every,
    layers,
    mean,
    norm,
    per_layer,
    rename,
    topic,
    uw_ratio,
    where,
)
from streamlens.stream import Operator
from tests.operators.support import frame, ragged, run


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4))
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(x))  # type: ignore[no-any-return]


def trained(*operators: Any, steps: int = 3, topic_name: str | None = None) -> list[Frame]:
    """What a chain on a Lens gives while a small net is trained."""
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    out: list[Frame] = []
    with observe(model, on_error="raise") as lens:
        lens.pipe(*operators).subscribe(out.append)
        for _ in range(steps):
            optimizer.zero_grad()
            model(torch.ones(2, 3)).sum().backward()
            optimizer.step()
    return out


NAMES = ("features.0", "features.2", "head")
FRAME = frame(0, dict.fromkeys(NAMES, 1.0))


def test_on_a_stream_topic_keeps_the_topics_named() -> None:
    frames = [frame(0, {"a": 1.0}, name) for name in ("p", "q", "r")]
    assert [f.topic for f in run(topic("r", "p"), frames)] == ["p", "r"]


def test_on_a_lens_topic_layers_every_and_between_give_a_narrower_lens() -> None:
    model = Net()
    with observe(model) as lens:
        for narrowing in (topic("weights"), layers("features.*"), every(2), between(1, 5)):
            assert isinstance(lens.pipe(narrowing), Lens)
        assert not isinstance(lens.pipe(topic("weights"), where(lambda _: True)), Lens)


def test_an_unknown_topic_of_a_lens_is_an_error_when_applied() -> None:
    model = Net()
    with observe(model) as lens, pytest.raises(UnknownTopicError, match="did you mean 'weights'"):
        lens.pipe(topic("weight"))


@pytest.mark.parametrize("operator", [where(lambda _: True), rename("x"), per_layer(), mean()])
def test_a_lens_with_nothing_selected_is_an_error_when_applied(operator: Operator) -> None:
    model = Net()
    with observe(model) as lens, pytest.raises(StreamlensError, match="no topic selected"):
        lens.pipe(operator)


def test_layers_by_glob_keep_the_frames_order_and_drop_frames_without_any() -> None:
    frames = [FRAME, frame(1, {"other": 2.0}), frame(2, {"head": 3.0})]
    out = run(layers("head", "features.2"), frames)
    assert [(f.step, f.layers) for f in out] == [(0, ("features.2", "head")), (2, ("head",))]


def test_layers_by_glob_find_later_calls_of_a_module() -> None:
    (out,) = run(layers("act"), [frame(0, {"act": 1.0, "act@1": 2.0, "fc": 3.0})])
    assert out.to_dict() == {"act": 1.0, "act@1": 2.0}


def test_layers_select_the_rows_that_belong_to_the_names() -> None:
    values = frame(0, {"a": [1.0, 2.0], "b": [3.0, 4.0], "c": [5.0, 6.0]}, components=("p", "q"))
    (out,) = run(layers("c", "a"), [values])
    assert out.components == ("p", "q")
    assert {k: v.tolist() for k, v in out.to_dict().items()} == {"a": [1.0, 2.0], "c": [5.0, 6.0]}


def test_layers_of_raw_frames_are_lent_and_not_copied() -> None:
    lease = Lease()
    tensors = {"a": torch.ones(2), "b": torch.ones(3)}
    (out,) = run(layers("b"), [ragged(0, tensors, lease=lease)])
    assert out.values[0] is tensors["b"]
    lease.end()
    with pytest.raises(ExpiredFrameError):
        _ = out.values


@pytest.mark.parametrize(
    ("selection", "wanted"),
    [
        (layers("features.*"), ("features.0", "features.2")),
        (layers(nn.Linear), NAMES),
        (layers(nn.ReLU, "head"), ("head",)),
        (layers(depth=1), ("head",)),
        (layers(depth=-1), NAMES),
        (layers("features.*", depth=2), ("features.0", "features.2")),
    ],
)
def test_layers_mean_the_same_before_and_after_a_reduction_and_behind_other_operators(
    selection: Operator, wanted: tuple[str, ...]
) -> None:
    pushed = trained(selection, norm("weights"), steps=1)
    filtered = trained(norm("weights"), where(lambda _: True), ops.skip(0), selection, steps=1)
    assert pushed[0].layers == filtered[0].layers == wanted
    assert pushed[0].to_dict().keys() == filtered[0].to_dict().keys()


def test_layers_of_parameter_topics_count_as_their_module() -> None:
    (out,) = trained(norm("parameters"), where(lambda _: True), layers(nn.Linear, depth=1), steps=1)
    assert out.layers == ("head.weight", "head.bias")


def test_classes_or_depth_without_a_lens_are_an_error_when_applied() -> None:
    for selection in (layers(nn.Linear), layers(depth=1)):
        with pytest.raises(StreamlensError, match="comes from no lens"):
            run(selection, [])


def test_a_layer_that_no_model_has_is_an_error_when_applied() -> None:
    model = Net()
    with observe(model) as lens, pytest.raises(LayerNotFoundError, match="no layer matches"):
        lens.pipe(topic("weights"), layers("feature.*"))


def test_every_keeps_steps_that_n_divides() -> None:
    frames = [frame(s, {"a": 1.0}) for s in (1, 2, 3, 4, 6, 9)]
    assert [f.step for f in run(every(3), frames)] == [3, 6, 9]
    assert [f.step for f in trained(topic("weights"), every(2), steps=5)] == [0, 2, 4]
    assert [f.step for f in trained(norm("weights"), every(2), every(3), steps=7)] == [0, 6]


def test_between_includes_the_start_and_excludes_the_stop() -> None:
    frames = [frame(s, {"a": 1.0}) for s in range(6)]
    assert [f.step for f in run(between(2, 4), frames)] == [2, 3]
    assert [f.step for f in run(between(4), frames)] == [4, 5]
    assert [f.step for f in trained(topic("weights"), between(1, 3), steps=5)] == [1, 2]


def test_where_keeps_the_frames_for_which_the_predicate_holds() -> None:
    frames = [frame(s, {"a": float(s)}) for s in range(4)]
    assert [f.step for f in run(where(lambda f: float(f["a"]) > 1), frames)] == [2, 3]


def test_rename_sets_a_name_or_maps_the_old_one() -> None:
    frames = [frame(0, {"a": 1.0}, "p"), frame(0, {"a": 2.0}, "q")]
    assert [f.topic for f in run(rename("r"), frames)] == ["r", "r"]
    assert [f.topic for f in run(rename(lambda old: f"my.{old}"), frames)] == ["my.p", "my.q"]


def test_rename_of_raw_frames_keeps_them_lent() -> None:
    lease = Lease()
    (out,) = run(rename("y"), [ragged(0, {"a": torch.ones(2)}, lease=lease)])
    lease.end()
    assert out.expired


@pytest.mark.parametrize("raw", [False, True])
def test_per_layer_gives_one_frame_a_layer_in_order(raw: bool) -> None:
    values = {"a": torch.tensor([1.0]), "b": torch.tensor([2.0])}
    item = ragged(3, values, epoch=1) if raw else frame(3, {"a": [1.0], "b": [2.0]}, epoch=1)
    out = run(per_layer(), [item])
    assert [(f.layers, f.step, f.epoch, float(f.values[0])) for f in out] == [
        (("a",), 3, 1, 1.0),
        (("b",), 3, 1, 2.0),
    ]


def test_selection_works_between_operators_of_reactivex() -> None:
    source: Subject[Frame] = Subject()
    out: list[int] = []

    def step_of(item: Frame) -> int:
        return item.step

    source.pipe(ops.distinct_until_changed(step_of), layers("a"), ops.map(step_of)).subscribe(out.append)
    for step in (0, 0, 1):
        source.on_next(frame(step, {"a": 1.0, "b": 2.0}))
    assert out == [0, 1]
    source.on_completed()


BAD: list[tuple[Any, type[Exception], str]] = [
    (lambda: topic(), TypeError, "at least one"),
    (lambda: topic(3), TypeError, "got 3"),  # type: ignore[arg-type]
    (lambda: layers(), TypeError, "needs globs"),
    (lambda: layers(3), TypeError, "got 3"),  # type: ignore[arg-type]
    (lambda: layers(depth=-2), ValueError, "depth=-2"),
    (lambda: every(0), ValueError, r"every\(0\)"),
    (lambda: every(2.5), ValueError, r"every\(2.5\)"),  # type: ignore[arg-type]
    (lambda: between(-1), ValueError, r"between\(-1, None\)"),
    (lambda: between(3, 3), ValueError, r"between\(3, 3\)"),
    (lambda: where(3), TypeError, "got 3"),  # type: ignore[arg-type]
    (lambda: rename(""), TypeError, "got ''"),
]


@pytest.mark.parametrize(("call", "kind", "message"), BAD)
def test_bad_arguments_are_errors_at_the_call(call: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        call()


@pytest.mark.parametrize("source", [uw_ratio(), uw_ratio(of="parameters")])
def test_layers_behind_a_join_refuse_a_glob_that_no_layer_of_the_model_matches(source: Operator) -> None:
    model = Net()
    with (
        observe(model) as lens,
        pytest.raises(LayerNotFoundError, match=r"'featurs\.\*': did you mean 'features"),
    ):
        lens.pipe(source, ema(0.9), layers("featurs.*"))


def relabelled(given: Frame) -> Frame:
    return given.replace(layers=("a", "b", "c"))


def test_layers_that_an_operator_or_the_user_has_named_are_not_looked_for_in_the_model() -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    out: list[Frame] = []
    with observe(model, emits=["accuracy"], on_error="raise") as lens:
        grouped = (norm("weights"), across_layers(by={"body": "features.*"}), layers("body"))
        emitted = (topic("accuracy"), ema(0.9), layers("train"))
        foreign = (norm("weights"), ops.map(relabelled), layers("b"))
        for operators in (grouped, emitted, foreign):
            lens.pipe(*operators).subscribe(out.append)
        model(torch.ones(2, 3)).sum().backward()
        optimizer.step()
        lens.emit("accuracy", {"train": 0.5, "test": 0.25})
    assert sorted(f.layers for f in out) == [("b",), ("body",), ("train",)]
