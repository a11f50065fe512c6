"""A lens keeps nothing alive: not the model, not its optimizer, not a tensor of a step that is over."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import streamlens as sl
from streamlens.frame import Frame
from streamlens.sink import Sink
from streamlens.topics import TOPICS
from tests._runs import small_model, steps_of


class Kept(Sink):
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.frames: list[Frame] = []
        self.closed = 0

    def write(self, frames: Sequence[Frame]) -> None:
        self.frames += frames

    def close(self) -> None:
        self.closed += 1


def references(model: nn.Module, optimizer: object) -> dict[str, weakref.ref[Any]]:
    """Weak references to the model, each module and parameter, and the optimizer."""
    found: dict[str, weakref.ref[Any]] = {"optimizer": weakref.ref(optimizer)}
    found |= {f"module {name}": weakref.ref(module) for name, module in model.named_modules()}
    found |= {f"parameter {name}": weakref.ref(p) for name, p in model.named_parameters()}
    return found


def alive(found: dict[str, weakref.ref[Any]]) -> list[str]:
    gc.collect()
    return [name for name, reference in found.items() if reference() is not None]


@pytest.fixture(autouse=True)
def _cycles_of_others() -> None:
    gc.collect()


def ignore(frame: object) -> None:
    pass


Subscribe = Callable[[sl.Lens, nn.Module], None]


def raw(lens: sl.Lens, model: nn.Module) -> None:
    for topic in TOPICS:
        lens.pipe(sl.topic(topic)).subscribe(ignore)


def reduced(lens: sl.Lens, model: nn.Module) -> None:
    lens.pipe(sl.uw_ratio(), sl.ema(0.9)).subscribe(ignore)
    lens.pipe(sl.norm("activations"), sl.per_step(), sl.layers(nn.Linear)).subscribe(ignore)
    lens.pipe(sl.norm("layer_gradients"), sl.across_layers(by=[nn.Linear, nn.ReLU])).subscribe(ignore)
    lens.pipe(sl.topic("weights"), sl.ema(0.5)).subscribe(ignore)


def closing_over_the_model(lens: sl.Lens, model: nn.Module) -> None:
    lens.pipe(sl.norm("weights")).subscribe(lambda frame: model.train())
    lens.derive("mine", lens.pipe(sl.norm("weights"), sl.where(lambda frame: model.training)))
    lens.pipe(sl.topic("mine")).subscribe(ignore)


def into_a_sink(lens: sl.Lens, model: nn.Module) -> None:
    lens.pipe(sl.topic("weights", "activations")).subscribe(Kept())


def into_a_sink_beside_a_callback_that_closes_over_the_model(lens: sl.Lens, model: nn.Module) -> None:
    into_a_sink(lens, model)
    closing_over_the_model(lens, model)


ALL: list[Subscribe] = [
    raw,
    reduced,
    closing_over_the_model,
    into_a_sink,
    into_a_sink_beside_a_callback_that_closes_over_the_model,
]
NOT_CLOSING_OVER_IT: list[Subscribe] = [raw, reduced, into_a_sink]


def trained(subscribe: Subscribe) -> tuple[sl.Lens, dict[str, weakref.ref[Any]]]:
    """A lens of a model that nobody else holds, after some steps."""
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    lens = sl.observe(model)
    subscribe(lens, model)
    list(steps_of(model, optimizer, 3))
    return lens, references(model, optimizer)


@pytest.mark.parametrize("subscribe", ALL)
def test_a_closed_lens_that_is_kept_keeps_no_model(subscribe: Subscribe) -> None:
    lens, found = trained(subscribe)
    lens.close()
    assert alive(found) == []
    assert "SGD" not in lens.explain()


@pytest.mark.parametrize("subscribe", ALL)
def test_a_model_that_nobody_closes_dies_with_its_lens(subscribe: Subscribe) -> None:
    lens, found = trained(subscribe)
    del lens
    gc.collect()
    sl.observe(nn.Linear(1, 1)).close()
    assert alive(found) == []


@pytest.mark.parametrize("subscribe", NOT_CLOSING_OVER_IT)
def test_a_model_dies_although_its_open_lens_is_kept_and_closes_it(subscribe: Subscribe) -> None:
    lens, found = trained(subscribe)
    gc.collect()
    # What the collector found is closed at a safe moment, of which the next `observe` is one.
    sl.observe(nn.Linear(1, 1)).close()
    assert alive(found) == []
    assert lens.closed
    with pytest.raises(sl.ClosedLensError):
        lens.pipe(sl.norm("weights"))


def test_a_model_in_a_reference_cycle_dies_without_close() -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = small_model()
            self.itself = [self]

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.body(x)
            return out

    model = Holder()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    lens = sl.observe(model)
    raw(lens, model)
    list(steps_of(model, optimizer, 2))
    found = references(model, optimizer)
    del model, optimizer
    gc.collect()
    sl.observe(nn.Linear(1, 1)).close()
    assert alive(found) == []
    assert lens.closed


def test_a_sink_gets_everything_of_a_model_that_nobody_closed() -> None:
    sink = Kept()

    def run() -> None:
        model = small_model()
        sl.observe(model).pipe(sl.norm("weights")).subscribe(sink)
        list(steps_of(model, torch.optim.SGD(model.parameters(), lr=0.1), 4))

    run()
    gc.collect()
    sl.observe(nn.Linear(1, 1)).close()
    assert [frame.step for frame in sink.frames] == [0, 1, 2, 3]
    assert sink.closed == 1


def test_no_tensor_of_a_step_outlives_it() -> None:
    """Also where a raw subscriber keeps the frames, and while the run goes on."""
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    frames: list[Frame] = []
    found: list[weakref.ref[Tensor]] = []

    def keep(frame: Frame) -> None:
        frames.append(frame)
        found.extend(weakref.ref(value) for _, value in frame.items())

    outputs: list[weakref.ref[Tensor]] = []
    model[0].register_forward_hook(lambda module, args, output: outputs.append(weakref.ref(output)))
    with sl.observe(model) as lens:
        lens.pipe(sl.topic("activations", "layer_gradients", "network_output", "input_data")).subscribe(keep)
        lens.pipe(sl.topic("weight_gradients", "raw_gradients")).subscribe(keep)
        lens.pipe(sl.norm("activations")).subscribe(ignore)
        for _ in steps_of(model, optimizer, 3):
            optimizer.zero_grad()
        assert len({frame.topic for frame in frames}) == 6
        assert all(frame.expired for frame in frames)
        assert [reference for reference in (*found, *outputs) if reference() is not None] == []


def tensors_alive() -> int:
    gc.collect()
    return sum(issubclass(type(found), Tensor) for found in gc.get_objects())


@pytest.mark.parametrize("operators", [(), (sl.uw_ratio(),)], ids=["nothing", "parameters only"])
def test_a_watched_loss_that_nobody_asked_for_gathers_nothing(operators: tuple[Any, ...]) -> None:
    model, criterion = small_model(), torch.nn.MSELoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = torch.randn(2, 4), torch.randn(2, 3)
    counts: list[int] = []
    with sl.observe(model, loss=criterion, on_error="raise") as lens:
        if operators:
            lens.pipe(*operators).subscribe(ignore)
        for _ in range(8):
            criterion(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
            counts.append(tensors_alive())
    assert counts[-1] == counts[1]


def test_layers_skipped_at_random_leave_nothing_behind() -> None:
    """Each step has another set of layers, of which something could be kept."""

    class Skips(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(10))

        def forward(self, x: Tensor, chosen: int) -> Tensor:
            for i, block in enumerate(self.blocks):
                x = block(x) if chosen >> i & 1 else x
            return x

    model = Skips()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def containers_alive() -> int:
        gc.collect()
        found = [o for o in gc.get_objects() if type(o) in (tuple, dict) or issubclass(type(o), Tensor)]
        return len(found) + sum(len(o) for o in found if type(o) is dict)

    with sl.observe(model, on_error="raise") as lens:
        for operator in (sl.norm("activations"), sl.mean("weight_gradients"), sl.rms("weight_gradients")):
            lens.pipe(operator).subscribe(ignore)
        for chosen in range(1, 1024):
            if chosen == 500:
                before = containers_alive()
            model(torch.ones(1, 2), chosen).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert containers_alive() - before < 500


def test_a_disposed_subscription_lets_go_of_its_callback() -> None:
    class Callback:
        def __call__(self, frame: Frame) -> None:
            pass

    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with sl.observe(model) as lens:
        callback = Callback()
        found = weakref.ref(callback)
        subscription = lens.pipe(sl.topic("activations", "weights"), sl.norm()).subscribe(callback)
        list(steps_of(model, optimizer, 2))
        subscription.dispose()
        del callback, subscription
        list(steps_of(model, optimizer, 1))
        gc.collect()
        assert found() is None


def test_an_interrupted_update_lets_its_raw_gradients_go() -> None:
    model = small_model()

    class Failing(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            raise RuntimeError("out of memory")

    frames: list[Frame] = []
    with sl.observe(model) as lens:
        lens.pipe(sl.topic("weight_gradients")).subscribe(frames.append)
        with pytest.raises(RuntimeError, match="out of memory"):
            list(steps_of(model, Failing(model.parameters(), lr=0.1), 1))
        list(steps_of(model, torch.optim.SGD(model.parameters(), lr=0.1), 1))
        assert len(frames) == 2
        assert all(frame.expired for frame in frames)


def test_a_raw_frame_is_readable_in_its_callback_only_and_its_clone_for_ever() -> None:
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    kept: list[Frame] = []
    clones: list[Frame] = []
    expected: list[Tensor] = []

    def keep(frame: Frame) -> None:
        kept.append(frame)
        clones.append(frame.clone())
        expected.append(model.get_parameter("0.weight").detach().clone())

    with sl.observe(model) as lens:
        lens.pipe(sl.topic("weights")).subscribe(keep)
        list(steps_of(model, optimizer, 3))
    for frame in kept:
        assert frame.expired
        assert "expired" in repr(frame)
        with pytest.raises(sl.ExpiredFrameError, match=r"'weights' at step \d.*frame\.clone\(\)"):
            frame["0"]
    assert len({value.sum().item() for value in expected}) == 3
    assert all(torch.equal(clone["0"], value) for clone, value in zip(clones, expected, strict=True))


def test_a_stacked_frame_may_be_kept() -> None:
    model = small_model()
    kept: list[tuple[Frame, dict[str, Any]]] = []
    with sl.observe(model) as lens:
        lens.pipe(sl.norm("weights")).subscribe(lambda frame: kept.append((frame, frame.to_dict())))
        list(steps_of(model, torch.optim.SGD(model.parameters(), lr=0.1), 3))
    assert [frame.to_dict() for frame, _ in kept] == [values for _, values in kept]
    assert len({tuple(values.values()) for _, values in kept}) == 3
