"""Compiled models are observed as the eager ones are: same values, same training, same graphs."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn
from torch._dynamo.utils import counters

import streamlens as sl
from streamlens.topics import TOPICS
from tests._runs import ARCHITECTURES
from tests.helpers.by_hand import norms
from tests.helpers.compiling import WAYS, Graphs, batches, by_hand, fresh_compiler, train_compiled
from tests.helpers.recording import assert_steps_equal, numbers, observed, record, record_errors

# The compiler looks at the `.grad` of what it resumes with after a graph break.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")


@pytest.fixture(autouse=True)
def compiler() -> Iterator[None]:
    with fresh_compiler():
        yield


def made(architecture: str) -> nn.Module:
    torch.manual_seed(3)
    return ARCHITECTURES[architecture]()


def subscribe_all(lens: sl.Lens) -> list[sl.Frame]:
    """Every topic, raw and reduced where that is possible."""
    frames: list[sl.Frame] = []
    for name, spec in TOPICS.items():
        lens.pipe(sl.topic(name)).subscribe(frames.append)
        if spec.raw:
            lens.pipe(sl.norm(name), sl.ema(0.5)).subscribe(frames.append)
    return frames


CASES = [
    ("linear", "torch.compile(model)"),
    ("linear", "compiled, then observed"),
    ("linear", "the loss too"),
    ("linear", "the whole step"),
    ("reused", "torch.compile(model)"),
    ("reused", "model.compile()"),
    ("convolutions", "the loss too"),
    ("checkpointed", "torch.compile(model)"),
    ("embedding", "compiled, then observed"),
]


@pytest.mark.parametrize(("architecture", "way"), CASES)
def test_activations_gradients_and_losses_are_those_of_the_eager_model(architecture: str, way: str) -> None:
    data = batches(2)
    torch.manual_seed(0)
    expected = by_hand(made(architecture), data)
    kept: dict[str, list[sl.Frame]] = {}
    errors = []

    def observe(model: nn.Module, criterion: nn.Module) -> None:
        lens = sl.observe(model, loss=criterion)
        errors.append(record_errors(lens))
        for topic in ("activations", "layer_gradients"):
            kept[topic] = record(lens, sl.topic(topic))
            kept[f"norm of {topic}"] = record(lens, sl.norm(topic))
        for topic in ("loss", "input_data", "input_labels", "network_output", "batch_finished"):
            kept[topic] = record(lens, sl.topic(topic))

    torch.manual_seed(0)
    losses = train_compiled(made(architecture), data, way, observe=observe)
    assert errors == [[]]
    assert losses == pytest.approx(expected.losses, rel=1e-5)
    assert numbers(kept["loss"]) == pytest.approx(expected.losses, rel=1e-5)
    assert_steps_equal(kept["activations"], expected.outputs, rtol=1e-5)
    assert_steps_equal(kept["norm of activations"], [norms(v) for v in expected.outputs], rtol=1e-5)
    assert_steps_equal(kept["layer_gradients"], expected.gradients, rtol=1e-4)
    assert_steps_equal(kept["norm of layer_gradients"], [norms(v) for v in expected.gradients], rtol=1e-4)
    assert_steps_equal(kept["input_data"], [{"": x} for x, _ in data])
    assert_steps_equal(kept["input_labels"], [{"": y} for _, y in data])
    last = "head" if "head" in expected.outputs[0] else "2"
    assert_steps_equal(kept["network_output"], [{"": v[last]} for v in expected.outputs], rtol=1e-5)
    assert numbers(kept["batch_finished"]) == [0.0, 1.0]


@pytest.mark.parametrize(("architecture", "way"), [*CASES, ("attention", WAYS[0])])
def test_compiled_training_is_bit_identical_with_everything_subscribed_and_breaks_no_graph(
    architecture: str, way: str
) -> None:
    def run(observing: bool) -> tuple[list[float], dict[str, Tensor], int, int]:
        frames: list[list[sl.Frame]] = []
        lenses = []

        def observe(model: nn.Module, criterion: nn.Module) -> None:
            lenses.append(sl.observe(model, loss=criterion))
            frames.append(subscribe_all(lenses[0]))

        model = made(architecture)
        with fresh_compiler():
            torch.manual_seed(1)
            losses = train_compiled(model, batches(3), way, observe=observe if observing else None)
            graphs, breaks = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
        for lens in lenses:
            lens.close()
        assert all(map(len, frames))
        return losses, {n: p.detach() for n, p in model.named_parameters()}, graphs, breaks

    bare, seen = run(False), run(True)
    assert seen[0] == bare[0]
    assert all(torch.equal(value, seen[1][name]) for name, value in bare[1].items())
    assert seen[2] == bare[2]
    # A compiled step has one break where the optimizer begins, ours or that of PyTorch, or one of each.
    assert seen[3] <= bare[3]


def test_parameter_topics_change_neither_graphs_nor_breaks() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(16, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.first(x)
            torch._dynamo.graph_break()
            out: Tensor = self.second(hidden)
            return out

    x = torch.ones(2, 16)
    model = Broken()
    bare = torch._dynamo.explain(model)(x)
    torch._dynamo.reset()
    with observed(model) as lens:
        lens.pipe(sl.uw_ratio()).subscribe(lambda frame: None)
        lens.pipe(sl.norm("parameter_gradients")).subscribe(lambda frame: None)
        seen = torch._dynamo.explain(model)(x)
    assert (seen.graph_count, seen.graph_break_count) == (bare.graph_count, bare.graph_break_count) == (2, 1)
    assert seen.op_count == bare.op_count


def test_nothing_is_compiled_again_once_it_runs() -> None:
    model, counts = made("attention"), []

    def observe(model: nn.Module, criterion: nn.Module) -> None:
        lens = sl.observe(model, loss=criterion)
        lens.pipe(sl.norm("activations"), sl.every(2)).subscribe(lambda frame: counts.append(frame.step))
        lens.pipe(sl.norm("layer_gradients"), sl.ema(0.9)).subscribe(lambda frame: None)

    def freeze() -> None:
        torch._dynamo.config.error_on_recompile = True

    with torch._dynamo.config.patch(error_on_recompile=False):
        train_compiled(model, batches(5), observe=observe, after_first=freeze)
    assert counts == [0, 2, 4]


def test_a_module_that_runs_twice_keeps_its_calls_and_their_gradients_apart() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Linear(16, 16)
            self.head = nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(self.mix(x) + self.mix(x * 2).tanh())
            return out

    torch.manual_seed(0)
    model = Twice()
    expected = by_hand(copy.deepcopy(model), batches(2))
    frames: dict[str, list[sl.Frame]] = {}

    def observe(model: nn.Module, criterion: nn.Module) -> None:
        lens = sl.observe(model, on_error="raise")
        for topic in ("activations", "layer_gradients"):
            frames[topic] = record(lens, sl.topic(topic))

    train_compiled(model, batches(2), observe=observe)
    assert frames["activations"][0].layers == ("mix", "mix@1", "head")
    assert_steps_equal(frames["activations"], expected.outputs, rtol=1e-5)
    assert_steps_equal(frames["layer_gradients"], expected.gradients, rtol=1e-4)


def test_evaluation_and_paused_regions_of_a_compiled_model_emit_nothing() -> None:
    model = made("linear")
    with observed(model) as lens:
        frames = record(lens, sl.norm("activations"))
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        x = torch.ones(2, 16)
        model.eval()
        compiled(x)
        model.train()
        with torch.no_grad():
            compiled(x)
        with lens.paused():
            compiled(x).sum().backward()
        assert frames == []
        compiled(x).sum().backward()
        assert [frame.step for frame in frames] == [0]


def test_two_micro_steps_of_a_compiled_model_are_two_frames() -> None:
    model = made("linear")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with observed(model) as lens:
        frames = record(lens, sl.norm("layer_gradients"))
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        for _ in range(2):
            for _ in range(2):
                compiled(torch.ones(2, 16)).sum().backward()
            optimizer.step()
    assert [(f.step, f.micro_step) for f in frames] == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_raw_activations_of_compiled_code_are_copies_that_outlive_its_memory() -> None:
    """Compiled code uses the memory of what it handed out again; a raw frame comes when the model returns."""
    model = made("convolutions")
    expected = by_hand(copy.deepcopy(model.eval()), batches(1))
    with observed(model, count="grad") as lens:
        frames = record(lens, sl.topic("activations"))
        x, y = batches(1)[0]
        nn.functional.cross_entropy(torch.compile(model, backend="aot_eager")(x), y).backward()
    assert_steps_equal(frames, expected.outputs, rtol=1e-5)


def test_closing_takes_the_taps_out_of_compiled_code() -> None:
    model, graphs = made("linear"), Graphs()
    compiled = torch.compile(model, backend=graphs)
    x = torch.ones(2, 16)
    lens = sl.observe(model)
    lens.pipe(sl.norm("activations"), sl.layers("0")).subscribe(lambda frame: None)
    compiled(x).sum().backward()
    assert graphs.taps == ["begin", "output", "end"]
    lens.close()
    compiled(x).sum().backward()
    assert graphs.taps == []
    assert len(graphs.kept) == 2


def test_layers_that_nobody_asked_for_are_not_tapped() -> None:
    model, graphs = made("linear"), Graphs()
    with observed(model) as lens:
        lens.pipe(sl.norm("weights")).subscribe(lambda frame: None)
        torch.compile(model, backend=graphs)(torch.ones(2, 16))
        assert graphs.taps == ["begin", "end"]
        lens.pipe(sl.norm("activations"), sl.layers("2")).subscribe(lambda frame: None)
        torch.compile(model, backend=graphs)(torch.ones(2, 16))
        assert graphs.taps == ["begin", "output", "end"]
