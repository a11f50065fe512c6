"""What a lens gives besides its streams: derived and emitted topics, the plan, the counts, the epochs."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from reactivex import operators as ops
from torch import nn

import streamlens as sl
from streamlens.frame import Frame, Kind
from streamlens.sink import Sink
from tests._runs import small_model, steps_of


class Kept(Sink):
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.frames: list[Frame] = []

    def write(self, frames: Sequence[Frame]) -> None:
        self.frames += frames


@pytest.fixture
def model() -> nn.Sequential:
    return small_model()


def train(model: nn.Module, steps: int) -> None:
    list(steps_of(model, torch.optim.SGD(model.parameters(), lr=0.1), steps))


def ignore(frame: object) -> None:
    pass


# -- emit ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "layers", "expected"),
    [
        (0.5, ("",), [0.5]),
        (3, ("",), [3.0]),
        (True, ("",), [1.0]),
        (np.float64(0.25), ("",), [0.25]),
        (torch.tensor(2.0), ("",), [2.0]),
        (torch.tensor([1.0, 2.0]), ("",), [[1.0, 2.0]]),
        (torch.ones(2, dtype=torch.int64), ("",), [[1.0, 1.0]]),
        ({"a": 1.0, "b": 2}, ("a", "b"), [1.0, 2.0]),
        (float("inf"), ("",), [math.inf]),
    ],
)
def test_emit_gives_a_frame_of_the_value_at_the_open_step(
    model: nn.Sequential, value: Any, layers: tuple[str, ...], expected: list[Any]
) -> None:
    frames: list[Frame] = []
    with sl.observe(model, emits=["mine"]) as lens:
        lens.pipe(sl.topic("mine")).subscribe(frames.append)
        train(model, 3)
        lens.emit("mine", value)
    (frame,) = frames
    assert (frame.topic, frame.step, frame.layers, frame.kind) == ("mine", 2, layers, Kind.EVENT)
    assert isinstance(frame.values, torch.Tensor)
    assert frame.values.tolist() == expected


def test_an_emitted_tensor_is_copied_and_detached(model: nn.Sequential) -> None:
    frames: list[Frame] = []
    with sl.observe(model, emits=["mine"]) as lens:
        lens.pipe(sl.topic("mine")).subscribe(frames.append)
        value = torch.ones(2, requires_grad=True)
        lens.emit("mine", value)
        value.data.zero_()
    assert frames[0][""].tolist() == [1.0, 1.0]
    assert not frames[0][""].requires_grad


def test_a_topic_can_be_selected_once_it_was_emitted_or_announced(model: nn.Sequential) -> None:
    with sl.observe(model, emits=["announced"]) as lens:
        lens.pipe(sl.topic("announced"))
        lens.emit("emitted", 1.0)
        values: list[float] = []
        lens.pipe(sl.topic("emitted"), sl.ema(0.5)).subscribe(lambda f: values.append(f[""].item()))
        lens.emit("emitted", 2.0)
        lens.emit("emitted", 4.0)
    assert values == [2.0, 3.0]


def test_what_was_emitted_at_evaluation_belongs_to_the_step_before(model: nn.Sequential) -> None:
    steps: list[int] = []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with sl.observe(model, emits=["accuracy"]) as lens:
        lens.pipe(sl.topic("accuracy")).subscribe(lambda frame: steps.append(frame.step))
        for _ in steps_of(model, optimizer, 3):
            with torch.no_grad():
                model.eval()(torch.ones(1, 4))
            lens.emit("accuracy", 0.5)
            model.train()
    assert steps == [0, 1, 2]


# -- derive ----------------------------------------------------------------------------------


def test_a_derived_topic_is_computed_once_and_only_while_somebody_selects_it(model: nn.Sequential) -> None:
    computed: list[int] = []
    received: list[list[int]] = [[], []]

    def note(frame: Frame) -> bool:
        computed.append(frame.step)
        return True

    with sl.observe(model) as lens:
        stream = lens.derive("mine", lens.pipe(sl.norm("weights"), sl.where(note)))
        assert isinstance(stream, sl.Stream)
        train(model, 1)
        assert computed == []
        first = lens.pipe(sl.topic("mine")).subscribe(lambda frame: received[0].append(frame.step))
        second = stream.subscribe(lambda frame: received[1].append(frame.step))
        train(model, 2)
        first.dispose()
        train(model, 1)
        second.dispose()
        train(model, 1)
    assert computed == [1, 2, 3]
    assert received == [[1, 2], [1, 2, 3]]


def test_a_derived_topic_has_its_name_and_what_is_derived_from_it_goes_on(model: nn.Sequential) -> None:
    topics: list[str] = []
    with sl.observe(model) as lens:
        lens.derive("spread", lens.pipe(sl.norm("weights"), sl.across_layers("max")))
        lens.pipe(sl.topic("spread"), sl.ema(0.5)).subscribe(lambda frame: topics.append(frame.topic))
        lens.derive("calm", lens.pipe(sl.topic("spread"), sl.window(2)))
        lens.pipe(sl.topic("calm")).subscribe(lambda frame: topics.append(frame.topic))
        train(model, 2)
    assert topics == ["spread.ema", "spread.ema", "calm"]


def test_several_topics_of_one_derived_chain_stay_apart_under_its_name(model: nn.Sequential) -> None:
    topics: list[str] = []
    with sl.observe(model) as lens:
        chain = lens.pipe(
            sl.topic("weights", "biases"), sl.norm(), sl.rename(lambda topic: f"alerts.{topic.split('.')[0]}")
        )
        lens.derive("alerts", chain)
        lens.pipe(sl.topic("alerts")).subscribe(lambda frame: topics.append(frame.topic))
        train(model, 1)
    assert sorted(topics) == ["alerts.biases", "alerts.weights"]


def test_a_failing_derived_chain_is_contained(model: nn.Sequential) -> None:
    weights: list[int] = []
    with sl.observe(model) as lens:
        lens.derive("mine", lens.pipe(sl.norm("weights"), ops.map(lambda frame: 1 / 0)))
        lens.pipe(sl.topic("mine")).subscribe(ignore)
        lens.pipe(sl.norm("weights")).subscribe(lambda frame: weights.append(frame.step))
        train(model, 3)
        assert lens.stats()["errors"] == 1
    assert weights == [0, 1, 2]


# -- explain ---------------------------------------------------------------------------------


def test_explain_says_what_runs_what_is_captured_and_what_is_shared(model: nn.Sequential) -> None:
    with sl.observe(model) as lens:
        assert "nothing is captured" in lens.explain()
        lens.pipe(sl.uw_ratio(), sl.ema(0.9)).subscribe(ignore)
        lens.pipe(sl.norm("weights")).subscribe(ignore)
        lens.pipe(sl.topic("activations"), sl.layers("0"), sl.every(5), sl.std()).subscribe(Kept())
        lens.pipe(sl.topic("weights"), sl.between(2, 9)).subscribe(ignore)
        assert "not run yet" in lens.explain()
        train(model, 3)
        text = lens.explain()
    assert text.startswith("Sequential (43 parameters), step 2")
    assert len(re.findall(r"^chain ", text, re.MULTILINE)) == 4
    assert "weights norm2, all layers: optimizer hook, every step, shared by 2" in text
    assert "weight_updates norm2, all layers: optimizer hook, every step" in text
    assert "weights raw" in text
    assert "activations std, 1 layer (0): module hooks, every 5 steps" in text
    assert "of 1 layer," in text
    assert "steps 2 to 9" in text
    assert "ends in Kept" in text
    assert "ends in ignore: 3 frames" in text
    assert re.search(r"\d+ us a step", text)
    assert f"bytes held: {(5 * 4 + 3 * 5) * 4:,}" in text
    assert "uw_ratio" in text
    assert "ema(0.9)" in text


def test_explain_tells_cadences_that_differ_apart(model: nn.Sequential) -> None:
    with sl.observe(model) as lens:
        for n in (1, 10):
            lens.pipe(sl.norm("weights"), sl.every(n)).subscribe(ignore)
        assert "optimizer hook, every step, every 10 steps, shared by 2" in lens.explain()


def test_explain_gives_a_mermaid_flowchart_whose_edges_join_known_nodes(model: nn.Sequential) -> None:
    with sl.observe(model) as lens:
        lens.pipe(sl.uw_ratio(), sl.ema(0.9), sl.window(2)).subscribe(Kept())
        lens.pipe(sl.norm("weights")).subscribe(lambda frame: None)
        lens.pipe(sl.norm("weights"), sl.where(lambda f: True)).subscribe(ignore, name='a "name" <b>')
        text = lens.explain("mermaid")
    lines = text.splitlines()
    assert lines[0] == "flowchart LR"
    nodes = set()
    edges = []
    for line in lines[1:]:
        edge = re.fullmatch(r"\s+(\w+) --> (\w+)(\(.*\))?", line)
        node = re.fullmatch(r"\s+(\w+)[\[(].*[\])]", line)
        assert edge or node, line
        if edge:
            edges.append((edge[1], edge[2]))
            nodes |= {edge[2]} if edge[3] else set()
        elif node:
            nodes.add(node[1])
    assert {end for edge in edges for end in edge} <= nodes
    reached = {"run"}
    for _ in edges:
        reached |= {b for a, b in edges if a in reached}
    assert reached == nodes, "every node is reached from the run"
    for word in (
        "Sequential",
        "weights norm2",
        "weight_updates norm2",
        "ema(0.9)",
        "window(2",
        "Kept",
        "ignore",
    ):
        assert word in text
    assert "<b>" not in text
    assert text.count("weights norm2") == 1, "what is shared is one node"


# -- stats -----------------------------------------------------------------------------------


def test_stats_counts_what_was_emitted_written_skipped_and_lost(model: nn.Sequential) -> None:
    sink = Kept()
    with sl.observe(model, emits=["mine"]) as lens:
        assert {"emitted", "late", "dropped", "skipped_nan", "errors"} <= lens.stats().keys()
        assert set(lens.stats().values()) == {0}
        lens.pipe(sl.norm("weights")).subscribe(sink)
        lens.pipe(sl.topic("mine"), sl.ema(0.5)).subscribe(ignore)
        lens.pipe(sl.topic("mine"), sl.where(lambda frame: 1 / 0 > 0)).subscribe(ignore)
        train(model, 3)
        lens.emit("mine", float("nan"))
        lens.emit("mine", 1.0)
        lens.flush()
        stats = lens.stats()
    assert stats["emitted"] == 3 + 2
    assert stats["written"] == len(sink.frames) == 3
    assert stats["skipped_nan"] == 1
    assert stats["errors"] == 2
    assert stats["dropped"] == stats["late"] == 0


def test_nan_passes_through_and_never_sticks(model: nn.Sequential) -> None:
    with torch.no_grad():
        model.get_parameter("0.weight")[0, 0] = math.nan
    raw: list[float] = []
    smooth: list[float] = []
    with sl.observe(model, emits=["mine"]) as lens:
        lens.pipe(sl.norm("weights")).subscribe(lambda frame: raw.append(frame["0"].item()))
        lens.pipe(sl.topic("mine"), sl.ema(0.5)).subscribe(lambda frame: smooth.append(frame[""].item()))
        train(model, 1)
        for value in (1.0, math.nan, 3.0, math.inf, 3.0):
            lens.emit("mine", value)
    assert math.isnan(raw[0])
    assert smooth[-1] == 2.5
    assert all(math.isfinite(value) for value in (smooth[0], smooth[2], smooth[4]))


# -- epochs and batches ----------------------------------------------------------------------


def test_epochs_and_batches_mark_where_they_are(model: nn.Sequential) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    marks: list[tuple[str, int, float]] = []
    epochs: list[tuple[int, int]] = []
    loader = [torch.ones(2, 4)] * 2
    with sl.observe(model) as lens:
        lens.pipe(sl.topic("epoch_started", "epoch_finished", "batch_started", "batch_finished")).subscribe(
            lambda frame: marks.append((frame.topic, frame.step, frame[""].item()))
        )
        lens.pipe(sl.norm("weights")).subscribe(lambda frame: epochs.append((frame.step, frame.epoch)))
        for _ in lens.epochs(2):
            assert len(lens.batches(loader)) == 2  # type: ignore[arg-type]
            for x in lens.batches(loader):
                optimizer.zero_grad()
                model(x).sum().backward()
                optimizer.step()
        assert lens.epoch == 2
    assert epochs == [(0, 0), (1, 0), (2, 1), (3, 1)]
    assert [(topic, value) for topic, _, value in marks] == [
        (topic, value)
        for epoch in (0, 1)
        for topic, value in [
            ("epoch_started", epoch),
            ("batch_started", 0),
            ("batch_finished", 0),
            ("batch_started", 1),
            ("batch_finished", 1),
            ("epoch_finished", epoch),
        ]
    ]
    assert [step for topic, step, _ in marks if topic == "epoch_finished"] == [1, 3]


def test_batches_alone_end_an_epoch_and_leave_the_loader_as_it_is(model: nn.Sequential) -> None:
    with sl.observe(model) as lens:
        loader = [1, 2, 3]
        assert list(lens.batches(loader)) == loader
        assert lens.epoch == 1
        taken = next(iter(lens.batches(loader)))
        assert (taken, lens.epoch) == (1, 1), "a loop that was left early ended no epoch"


def test_a_step_without_its_update_stays_open_across_an_epochs_end(model: nn.Sequential) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    passes: list[tuple[int, int, int]] = []
    with sl.observe(model) as lens:
        lens.pipe(sl.norm("activations")).subscribe(
            lambda frame: passes.append((frame.step, frame.micro_step, frame.epoch))
        )
        for ends in (False, True, False):
            model(torch.ones(1, 4)).sum().backward()
            if ends:
                lens.epoch_finished()
        optimizer.step()
        model(torch.ones(1, 4)).sum().backward()
    assert passes == [(0, 0, 0), (0, 1, 0), (0, 2, 1), (1, 0, 1)]


def test_two_models_share_a_sink_under_their_names() -> None:
    sink = Kept()
    first, second = small_model(0), small_model(1)
    with sl.observe(first, name="G") as g, sl.observe(second, name="D") as d:
        for lens in (g, d):
            lens.pipe(sl.norm("weights")).subscribe(sink)
        train(first, 1)
        train(second, 1)
    assert {(frame.topic, frame.layers) for frame in sink.frames} == {
        ("G/weights.norm2", ("G.0", "G.2")),
        ("D/weights.norm2", ("D.0", "D.2")),
    }
