"""Compiling, observing and subscribing in any order: nothing stays silent or is compiled needlessly."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn

import streamlens as sl
from tests._runs import small_model
from tests.helpers.compiling import Graphs, fresh_compiler
from tests.helpers.recording import observed, record

X = torch.ones(2, 4)


@pytest.fixture(autouse=True)
def compiler() -> Iterator[None]:
    with fresh_compiler():
        yield


class Net(nn.Module):
    """A model whose forward is compiled by itself, its own hooks outside."""

    def __init__(self) -> None:
        super().__init__()
        self.body = small_model()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x)
        return out


MODELS: list[Callable[[], nn.Module]] = [small_model, Net]


def backward(compiled: Any) -> None:
    compiled(X).sum().backward()


@pytest.mark.parametrize("make", MODELS)
def test_a_model_that_ran_compiled_before_it_was_observed_is_compiled_again_and_observed(
    make: Callable[[], nn.Module], caplog: pytest.LogCaptureFixture
) -> None:
    model, graphs = make(), Graphs()
    compiled = torch.compile(model, backend=graphs, fullgraph=True)
    backward(compiled)
    caplog.set_level(logging.INFO, "streamlens")
    with observed(model) as lens:
        assert "compiled again at its next call" in caplog.text
        frames = record(lens, sl.norm("activations")), record(lens, sl.norm("layer_gradients"))
        backward(compiled)
        backward(compiled)
    assert [[frame.micro_step for frame in kept] for kept in frames] == [[0, 1], [0, 1]]
    assert len(graphs.kept) == 2


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("when", ["before", "after"])
def test_code_compiled_for_a_twin_that_nobody_observes_is_not_run_for_the_observed_model(
    make: Callable[[], nn.Module], when: str
) -> None:
    model, twin = make(), make()
    compiled, other = (torch.compile(m, backend="eager", fullgraph=True) for m in (model, twin))
    if when == "before":
        backward(other)
    with observed(model) as lens:
        frames = record(lens, sl.norm("activations"))
        backward(compiled)
        backward(other)
        backward(compiled)
        assert [frame.micro_step for frame in frames] == [0, 1]
        backward(other)
        assert len(frames) == 2


def test_two_observed_models_of_one_class_do_not_run_each_others_taps() -> None:
    model, twin = Net(), Net()
    compiled, other = (torch.compile(m, backend="eager", fullgraph=True) for m in (model, twin))
    with observed(model) as lens, observed(twin) as second:
        frames = record(lens, sl.norm("activations"))
        others = record(second, sl.norm("activations"))
        backward(compiled)
        assert (len(frames), len(others)) == (1, 0)
        backward(other)
        backward(other)
        assert (len(frames), len(others)) == (1, 2)


def test_what_else_has_been_compiled_stays_compiled() -> None:
    class Other(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.sin() + 1

    graphs = Graphs()
    other = torch.compile(Other(), backend=graphs)
    other(X)
    with observed(Net()):
        other(X)
    assert len(graphs.kept) == 1


def test_subscribing_and_unsubscribing_compile_once_each_and_no_more() -> None:
    model, graphs = Net(), Graphs()
    compiled = torch.compile(model, backend=graphs, fullgraph=True)
    with observed(model) as lens:
        backward(compiled)
        assert graphs.taps == []
        chain = lens.pipe(sl.norm("activations"), sl.layers("body.0"))
        subscription = chain.subscribe(lambda frame: None)
        lens.pipe(sl.norm("weights")).subscribe(lambda frame: None)
        for _ in range(3):
            backward(compiled)
        assert (len(graphs.kept), graphs.taps) == (2, ["begin", "output", "end"])
        lens.pipe(sl.norm("parameter_updates")).subscribe(lambda frame: None)
        lens.pipe(sl.rms("activations"), sl.layers("body.0")).subscribe(lambda frame: None)
        backward(compiled)
        assert len(graphs.kept) == 2
        subscription.dispose()
        backward(compiled)
        assert len(graphs.kept) == 2


def test_demands_may_change_more_often_than_the_compiler_compiles_a_function_again() -> None:
    model = Net()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    seen: list[int] = []
    with torch._dynamo.config.patch(recompile_limit=2), observed(model) as lens:
        for number in range(5):
            layer = f"body.{number % 3}"
            subscription = lens.pipe(sl.norm("activations"), sl.layers(layer)).subscribe(
                lambda frame: seen.append(len(frame))
            )
            backward(compiled)
            subscription.dispose()
    assert seen == [1] * 5


def test_observing_is_refused_where_compiling_again_is_forbidden() -> None:
    model = Net()
    compiled = torch.compile(model, backend="eager")
    backward(compiled)
    with torch.compiler.set_stance("fail_on_recompile"):
        with pytest.raises(sl.StreamlensError, match=r"'fail_on_recompile'.* before its first compiled call"):
            sl.observe(model)
        backward(compiled)
    with torch._dynamo.config.patch(error_on_recompile=True):
        with pytest.raises(sl.StreamlensError, match="error_on_recompile forbids"):
            sl.observe(model)
        backward(compiled)


def test_the_compilers_setting_is_as_it_was_once_nothing_is_observed() -> None:
    config: Any = torch._dynamo.config
    assert config.skip_nnmodule_hook_guards
    models = Net(), Net()
    first, second = map(sl.observe, models)
    assert not config.skip_nnmodule_hook_guards
    first.close()
    assert not config.skip_nnmodule_hook_guards
    second.close()
    assert config.skip_nnmodule_hook_guards
    with config.patch(skip_nnmodule_hook_guards=False):
        sl.observe(models[0]).close()
        assert not config.skip_nnmodule_hook_guards


def test_a_copy_of_an_observed_model_compiles_without_taps() -> None:
    model, graphs = Net(), Graphs()
    with observed(model) as lens:
        frames = record(lens, sl.norm("activations"))
        twin = copy.deepcopy(model)
        backward(torch.compile(twin, backend=graphs, fullgraph=True))
        assert frames == []
        assert graphs.taps == []


def test_a_compiled_forward_that_was_interrupted_does_not_hide_the_next_one() -> None:
    class Interrupted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x: Tensor, index: Tensor) -> Tensor:
            out: Tensor = self.layer(x)[:, index]
            return out

    model = Interrupted()
    model.compile(backend="aot_eager", fullgraph=True)
    with observed(model) as lens:
        frames = record(lens, sl.norm("layer_gradients"))
        model(X, torch.tensor([0, 1])).sum().backward()
        with pytest.raises(IndexError):
            model(X, torch.tensor([0, 7]))
        model(X, torch.tensor([0, 2])).sum().backward()
    assert [frame.micro_step for frame in frames] == [0, 1]


def test_a_compiled_part_of_an_eager_model_is_observed_with_the_rest() -> None:
    model = Net()
    expected = copy.deepcopy(model)
    model.body.compile(backend="aot_eager")
    with observed(model) as lens:
        kept = record(lens, sl.topic("activations"))
        backward(model)
    (frame,) = kept
    assert frame.layers == ("body.0", "body.1", "body.2")
    values = X
    for name, layer in expected.body.named_children():
        values = layer(values)
        torch.testing.assert_close(frame[f"body.{name}"], values.detach())


def test_parts_that_are_called_without_the_model_are_observed_when_they_are_compiled() -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    body = torch.compile(model.body, backend="aot_eager", fullgraph=True)
    with observed(model) as lens:
        activations = record(lens, sl.norm("activations"))
        outputs = record(lens, sl.topic("network_output"))
        for _ in range(2):
            result = body(X)
            result.sum().backward()
            optimizer.step()
        lens.step()
    assert [(frame.step, len(frame)) for frame in activations] == [(0, 3), (1, 3)]
    torch.testing.assert_close(outputs[-1][""], result.detach())


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_updates_and_gradients_of_a_compiled_optimizer_are_taken(kind: Any) -> None:
    model, graphs = small_model(), Graphs()
    optimizer = kind(model.parameters(), lr=torch.tensor(0.1))
    step: Any = torch.compile(optimizer.step, backend=graphs)
    names = [name for name, _ in model.named_parameters()]
    wanted: dict[str, list[list[float]]] = {"parameter_updates": [], "parameter_gradients": []}
    with observed(model) as lens:
        frames = {topic: record(lens, sl.norm(topic)) for topic in wanted}
        for scale in (1, 2, 3):
            optimizer.zero_grad()
            (model(X * scale) ** 2).sum().backward()
            before = [p.detach().clone() for p in model.parameters()]
            gradients = [cast("Tensor", p.grad) for p in model.parameters()]
            wanted["parameter_gradients"].append([gradient.norm().item() for gradient in gradients])
            step()
            moved = [
                (p.detach() - old).norm().item() for p, old in zip(model.parameters(), before, strict=True)
            ]
            wanted["parameter_updates"].append(moved)
    assert len(graphs.kept) == 1
    for topic, values in wanted.items():
        assert [frame.step for frame in frames[topic]] == [0, 1, 2]
        for frame, numbers in zip(frames[topic], values, strict=True):
            assert [float(frame[name]) for name in names] == pytest.approx(numbers, rel=1e-5)
