"""What compiled models return, and what else is done with them while they are observed."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import streamlens as sl
from tests._runs import ARCHITECTURES, small_model
from tests.helpers.compiling import Graphs, batches, fresh_compiler, train_compiled
from tests.helpers.recording import numbers, observed, record, record_errors

X, Y = torch.ones(2, 4), torch.tensor([0, 1])


@pytest.fixture(autouse=True)
def compiler() -> Iterator[None]:
    with fresh_compiler():
        yield


@dataclass
class Output:
    """What models of the field return."""

    loss: Tensor
    logits: Tensor


class Opaque:
    """A container that the compiler cannot look into."""

    def __init__(self, value: Tensor) -> None:
        self.value = value


class Body(nn.Module):
    """A part that returns something else than a tensor."""

    def __init__(self, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.wrap = wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(self.layer(x))


class Net(nn.Module):
    """A model that takes the tensor out of what its part returns."""

    def __init__(self, wrap: Callable[[Tensor], Any], unwrap: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.body, self.unwrap = Body(wrap), unwrap

    def forward(self, x: Tensor) -> Tensor:
        return self.unwrap(self.body(x)) * 2


def compiled(module: Any, **options: Any) -> Any:
    return torch.compile(module, **{"backend": "aot_eager", "fullgraph": True, **options})


NESTED: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]] = {
    "tuple": (lambda y: (None, y, 3), lambda out: out[1]),
    "list in a dict": (lambda y: {"a": [y], "b": "text"}, lambda out: out["a"][0]),
    "dataclass": (lambda y: Output(y.sum(), y), lambda out: out.logits),
}


@pytest.mark.parametrize("kind", NESTED)
def test_the_first_tensor_of_a_nested_output_is_taken(kind: str) -> None:
    model = Net(*NESTED[kind])
    with observed(model) as lens:
        frames = record(lens, sl.topic("activations"), sl.layers("body"))
        gradients = record(lens, sl.topic("layer_gradients"), sl.layers("body"))
        compiled(model)(X).sum().backward()
    expected = model.body.layer(X).detach()
    (frame,) = frames
    if kind == "dataclass":
        torch.testing.assert_close(frame["body"], expected.sum())
    else:
        (gradient,) = gradients
        torch.testing.assert_close(frame["body"], expected)
        torch.testing.assert_close(gradient["body"], torch.full((2, 3), 2.0))


def test_an_output_that_the_compiler_cannot_look_into_is_reported_once_and_the_others_are_taken() -> None:
    model = Net(Opaque, lambda out: out.value)
    lens = sl.observe(model)
    errors = record_errors(lens)
    frames = record(lens, sl.norm("activations"), sl.layers("body*"))
    call = compiled(model)
    for _ in range(2):
        call(X).sum().backward()
    lens.close()
    assert [frame.layers for frame in frames] == [("body.layer",)] * 2
    (report,) = errors
    assert "layer 'body' is compiled and returns something that has no tensor" in str(report.error)
    assert "have it return a tensor" in str(report.error)


def test_a_gradient_that_belongs_to_a_parameter_is_reported() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

        def forward(self) -> Tensor:
            return self.scale

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.own, self.layer = Own(), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.layer(x) * self.own()
            return out

    model = Scaled()
    lens = sl.observe(model)
    errors = record_errors(lens)
    frames = record(lens, sl.norm("layer_gradients"))
    call = compiled(model)
    for _ in range(3):
        call(X).sum().backward()
    lens.close()
    assert [frame.layers for frame in frames] == [("layer",)] * 3
    assert not model.own.scale._backward_hooks
    (report,) = errors
    assert "layer 'own'" in str(report.error)
    assert "take parameter_gradients instead" in str(report.error)


@pytest.mark.parametrize("as_dict", [False, True])
def test_the_loss_and_labels_that_a_compiled_models_output_carries_are_taken(as_dict: bool) -> None:
    class Labelled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x: Tensor, labels: Tensor) -> Any:
            logits = self.layer(x)
            loss = cross_entropy(logits, labels)
            return {"loss": loss, "logits": logits} if as_dict else Output(loss, logits)

    model = Labelled()
    call: Any = model
    model.compile(backend="aot_eager", fullgraph=True)
    with observed(model) as lens:
        losses, labels = record(lens, sl.topic("loss")), record(lens, sl.topic("input_labels"))
        out = call(X, labels=Y)
        loss = out["loss"] if as_dict else out.loss
        loss.backward()
    assert numbers(losses) == [pytest.approx(loss.item())]
    assert [frame[""].tolist() for frame in labels] == [[0, 1]]


def test_a_watched_function_may_be_compiled() -> None:
    model = small_model()
    with observed(model) as lens:
        criterion = lens.watch_loss(cross_entropy)
        losses, labels = record(lens, sl.topic("loss")), record(lens, sl.topic("input_labels"))
        ends = record(lens, sl.topic("batch_finished"))

        @torch.compile(backend="aot_eager", fullgraph=True)
        def loss_of(x: Tensor, y: Tensor) -> Tensor:
            return criterion(model(x), y)

        values = []
        for _ in range(2):
            loss = loss_of(X, Y)
            loss.backward()
            values.append(loss.item())
    assert numbers(losses) == pytest.approx(values)
    assert [frame[""].tolist() for frame in labels] == [[0, 1]] * 2
    assert len(ends) == 2


@pytest.mark.parametrize("transform", ["grad", "vmap"])
def test_function_transforms_within_compiled_code_are_left_alone(transform: str) -> None:
    model = small_model()
    parameters = {name: value.detach() for name, value in model.named_parameters()}

    def total(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        out: Tensor = torch.func.functional_call(model, parameters, (x,))
        return out.sum()

    def value() -> Any:
        if transform == "grad":
            return compiled(torch.func.grad(total))(parameters, X)["0.weight"]
        return compiled(torch.func.vmap(model))(torch.stack([X, 2 * X]))

    expected = value()
    with observed(model) as lens:
        frames = record(lens, sl.norm("activations"))
        assert torch.equal(value(), expected)
    assert frames == []


def test_a_backward_within_compiled_code_is_taken_at_the_update() -> None:
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    logits = model(X)
    expected = torch.autograd.grad(cross_entropy(logits, Y), logits)[0]

    def backward(x: Tensor) -> None:
        cross_entropy(model(x), Y).backward()

    with torch._dynamo.config.patch(trace_autograd_ops=True), observed(model) as lens:
        gradients = record(lens, sl.topic("layer_gradients"), sl.layers("2"))
        ends = record(lens, sl.topic("batch_finished"))
        step = compiled(backward)
        step(X)
        optimizer.step()
        step(X)
    torch.testing.assert_close(gradients[0]["2"], expected)
    assert [frame.step for frame in gradients] == [0, 1]
    assert len(ends) == 2


def test_under_compiled_autograd_gradients_of_layers_are_refused_by_name_and_training_goes_on() -> None:
    model = small_model()
    lens = sl.observe(model)
    errors = record_errors(lens)
    activations, gradients = record(lens, sl.norm("activations")), record(lens, sl.norm("layer_gradients"))
    call = compiled(model)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
        call(X).sum().backward()
    lens.close()
    assert len(activations) == 1
    assert gradients == []
    assert ["compiled autograd is on" in str(report.error) for report in errors] == [True] * 3
    assert all(p.grad is not None for p in model.parameters())


def test_an_exported_program_has_nothing_of_ours() -> None:
    model = small_model()
    bare = str(torch.export.export(model, (X,)).graph)
    with observed(model) as lens:
        frames = record(lens, sl.norm("activations"))
        for strict in (False, True):
            assert str(torch.export.export(model, (X,), strict=strict).graph) == bare
    assert frames == []


def test_a_model_that_only_parameters_are_taken_of_has_two_taps_and_a_closed_one_has_none() -> None:
    model, graphs = small_model(), Graphs()
    call = torch.compile(model, backend=graphs)
    with observed(model) as lens:
        lens.pipe(sl.uw_ratio()).subscribe(lambda frame: None)
        call(X)
        assert graphs.taps == ["begin", "end"]
    call(X)
    assert graphs.taps == []


@pytest.mark.soak
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs g++")
@pytest.mark.parametrize("architecture", ["linear", "attention", "checkpointed", "convolutions"])
def test_training_compiled_by_inductor_is_bit_identical(architecture: str) -> None:
    def run(observing: bool) -> tuple[list[float], list[Tensor]]:
        lenses = []
        kept: list[list[sl.Frame]] = []

        def observe(model: nn.Module, criterion: nn.Module) -> None:
            lenses.append(sl.observe(model, loss=criterion))
            topics = ("activations", "layer_gradients", "network_output", "loss", "parameter_updates")
            kept.extend(record(lenses[0], sl.topic(topic)) for topic in topics)

        torch.manual_seed(0)
        model = ARCHITECTURES[architecture]()
        with fresh_compiler():
            losses = train_compiled(
                model, batches(3), backend="inductor", observe=observe if observing else None
            )
        for lens in lenses:
            lens.close()
        assert [len(frames) for frames in kept] == [3] * len(kept)
        return losses, [p.detach() for p in model.parameters()]

    (bare, parameters), (seen, others) = run(False), run(True)
    assert seen == bare
    assert all(map(torch.equal, parameters, others))
