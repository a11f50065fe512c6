"""After `close()` nothing of a lens is left: no hook, no thread, no file; while it is open, several agree."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import optimizer as torch_optimizer

import streamlens as sl
from streamlens.capture.optimizers import step_watch
from streamlens.capture.orphans import close_orphans
from streamlens.frame import Frame
from streamlens.sink import RunInfo, Sink
from streamlens.topics import TOPICS
from tests._runs import small_model, steps_of


class ToFile(Sink):
    """Writes one line a frame."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file: IO[str] | None = None

    def open(self, run: RunInfo) -> None:
        self.file = self.path.open("a")

    def write(self, frames: Sequence[Frame]) -> None:
        assert self.file is not None
        self.file.writelines(f"{frame.topic} {frame.step}\n" for frame in frames)

    def close(self) -> None:
        assert self.file is not None
        self.file.close()


HOOK_TABLES = [
    name for name in vars(nn.Module()) if name.endswith(("_hooks", "_hooks_with_kwargs", "_always_called"))
]


def hooks_of(model: nn.Module) -> list[object]:
    """Every hook on the modules and parameters of a model."""
    found: list[object] = []
    for module in model.modules():
        for table in HOOK_TABLES:
            found += list(vars(module)[table].values())
    for parameter in model.parameters():
        found += list((parameter._backward_hooks or {}).values())
        found += list((parameter._post_accumulate_grad_hooks or {}).values())
    return found


def optimizer_hooks() -> list[object]:
    """Every global optimizer hook of the process."""
    return [
        *torch_optimizer._global_optimizer_pre_hooks.values(),
        *torch_optimizer._global_optimizer_post_hooks.values(),
    ]


@pytest.fixture(autouse=True)
def _nothing_left_by_others() -> Iterator[None]:
    # Models that other tests left in reference cycles take their lenses along, at the next safe moment.
    gc.collect()
    close_orphans()
    step_watch().tidy()
    assert optimizer_hooks() == []
    yield
    assert optimizer_hooks() == []


def ignore(frame: Frame) -> None:
    pass


def test_close_leaves_no_hook_no_thread_and_no_open_file(tmp_path: Path) -> None:
    threads = set(threading.enumerate())
    model, criterion = small_model(), nn.CrossEntropyLoss()
    sink = ToFile(tmp_path / "frames")
    lens = sl.observe(model, loss=criterion)
    for topic in TOPICS:
        lens.pipe(sl.topic(topic)).subscribe(ignore)
    lens.pipe(sl.norm("weights")).subscribe(sink)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in steps_of(model, optimizer, 3):
        pass
    assert hooks_of(model)
    assert optimizer_hooks()
    assert set(threading.enumerate()) - threads

    assert lens.close(timeout=5)

    assert hooks_of(model) == []
    assert hooks_of(criterion) == []
    assert optimizer_hooks() == []
    assert set(threading.enumerate()) <= threads
    assert sink.file is not None
    assert sink.file.closed
    assert len(sink.path.read_text().splitlines()) == 3


def test_closing_completes_every_stream_once() -> None:
    model = small_model()
    completed: list[str] = []
    lens = sl.observe(model)
    lens.pipe(sl.norm("weights")).subscribe(ignore, on_completed=lambda: completed.append("lens"))
    lens.pipe(sl.norm("weights"), sl.ema(0.5)).subscribe(
        ignore, on_completed=lambda: completed.append("chain")
    )
    lens.errors.subscribe(on_completed=lambda: completed.append("errors"))
    lens.close()
    lens.close()
    assert sorted(completed) == ["chain", "errors", "lens"]
    assert lens.closed


def test_a_with_block_closes_also_when_training_raises() -> None:
    model = small_model()
    lens = sl.observe(model)

    def run() -> None:
        with lens:
            lens.pipe(sl.norm("weights")).subscribe(ignore)
            raise RuntimeError("diverged")

    with pytest.raises(RuntimeError, match="diverged"):
        run()
    assert lens.closed
    assert hooks_of(model) == []


def test_unsubscribing_takes_its_hooks_along() -> None:
    model = small_model()
    with sl.observe(model) as lens:
        idle = len(hooks_of(model))
        subscriptions = [lens.pipe(sl.topic(topic)).subscribe(ignore) for topic in TOPICS]
        assert len(hooks_of(model)) > idle
        for subscription in subscriptions:
            subscription.dispose()
            subscription.dispose()
        assert len(hooks_of(model)) == idle


def test_a_module_that_returns_its_own_parameter_keeps_no_hook_on_it() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self) -> Tensor:
            return self.weight

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.positions = Positions()
            self.head = nn.Linear(3, 1)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(x + self.positions())
            return out

    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    norms: list[float] = []
    with sl.observe(model) as lens:
        lens.pipe(sl.topic("layer_gradients"), sl.layers("positions"), sl.norm()).subscribe(
            lambda frame: norms.append(frame["positions"].item())
        )
        for _ in range(4):
            optimizer.zero_grad()
            model(torch.ones(2, 3)).sum().backward()
            assert model.positions.weight.grad is not None
            assert norms[-1] == pytest.approx(model.positions.weight.grad.norm().item())
            optimizer.step()
            assert len(model.positions.weight._backward_hooks or {}) <= 1
    assert len(norms) == 4
    assert hooks_of(model) == []


def test_a_model_that_returns_a_parameter_keeps_no_hook_on_it() -> None:
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self) -> Tensor:
            return self.weight

    model = Constant()
    with sl.observe(model) as lens:
        lens.pipe(sl.topic("loss")).subscribe(ignore)
        for _ in range(4):
            model().sum().backward()
            assert len(model.weight._backward_hooks or {}) <= 1
    assert hooks_of(model) == []


MOMENTS: dict[str, str] = {
    "activations": "forward",
    "layer_gradients": "backward",
    "weight_gradients": "before the update",
    "weights": "after the update",
    "batch_started": "start of the forward",
}


@pytest.mark.parametrize("topic", list(MOMENTS), ids=list(MOMENTS.values()))
def test_close_in_a_callback_silences_at_once_and_leaves_nothing_after_the_next_forward(topic: str) -> None:
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    lens = sl.observe(model)
    seen: list[Frame] = []

    def close(frame: Frame) -> None:
        seen.append(frame)
        lens.close()

    lens.pipe(sl.topic(topic)).subscribe(close)
    for other in ("weights", "layer_gradients", "activations"):
        lens.pipe(sl.norm(other)).subscribe(lambda frame: seen.append(frame) if lens.closed else None)
    losses = list(steps_of(model, optimizer, 3))

    twin = small_model()
    assert losses == list(steps_of(twin, torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9), 3))
    assert [frame.topic for frame in seen] == [topic]
    assert all(frame.expired for frame in seen if frame.borrowed)
    assert hooks_of(model) == []
    assert optimizer_hooks() == []


@pytest.mark.parametrize("told", [False, True], ids=["by the loop", "by batches"])
def test_a_loop_over_epochs_ends_also_where_the_lens_is_closed_within_it(told: bool) -> None:
    model = small_model()
    lens = sl.observe(model)
    epochs: list[int] = []
    for epoch in lens.epochs(4):
        epochs.append(epoch)
        batches = lens.batches([1, 2]) if told and not lens.closed else [1, 2]
        assert len(epochs) <= 4, "the loop never ends"
        for batch in batches:
            if (epoch, batch) == (1, 2):
                lens.close()
    assert epochs == [0, 1, 2, 3]


def test_close_during_a_forward_lets_the_forward_finish() -> None:
    class Closing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            lens.close()
            out: Tensor = self.second(x)
            return out

    model = Closing()
    lens = sl.observe(model)
    frames: list[Frame] = []
    lens.pipe(sl.norm("activations")).subscribe(frames.append)
    model(torch.ones(2, 4)).sum().backward()
    assert all("second" not in frame for frame in frames)
    assert hooks_of(model) == []
    with sl.observe(model) as lens:
        lens.pipe(sl.norm("weights")).subscribe(frames.append)


def test_closing_one_of_several_lenses_leaves_the_others() -> None:
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    first, second = sl.observe(model), sl.observe(model)
    completed: list[str] = []
    seen: dict[str, list[int]] = {"first": [], "second": []}
    first.pipe(sl.norm("weights")).subscribe(
        lambda frame: seen["first"].append(frame.step), on_completed=lambda: completed.append("first")
    )
    second.pipe(sl.norm("weights")).subscribe(
        lambda frame: seen["second"].append(frame.step), on_completed=lambda: completed.append("second")
    )
    list(steps_of(model, optimizer, 2))
    first.close()
    assert completed == ["first"]
    with pytest.raises(sl.ClosedLensError):
        first.pipe(sl.norm("weights"))
    list(steps_of(model, optimizer, 2))
    second.close()
    assert seen == {"first": [0, 1], "second": [0, 1, 2, 3]}
    assert hooks_of(model) == []


def test_two_lenses_on_one_model_install_the_same_hooks_as_one() -> None:
    model = small_model()
    with sl.observe(model) as first:
        first.pipe(sl.norm("activations")).subscribe(ignore)
        once = len(hooks_of(model)), len(optimizer_hooks())
        with sl.observe(model) as second:
            second.pipe(sl.norm("activations")).subscribe(ignore)
            assert (len(hooks_of(model)), len(optimizer_hooks())) == once


def test_a_closed_lens_opens_again_and_goes_on_counting() -> None:
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    steps: list[int] = []
    for _ in range(2):
        with sl.observe(model) as lens:
            lens.pipe(sl.norm("weights")).subscribe(lambda frame: steps.append(frame.step))
            list(steps_of(model, optimizer, 2))
    assert steps == [0, 1, 2, 3]
    with sl.observe(model, start=0) as lens:
        lens.pipe(sl.norm("weights")).subscribe(lambda frame: steps.append(frame.step))
        list(steps_of(model, optimizer, 1))
    assert steps[-1] == 0


def test_a_watched_loss_function_goes_on_working_after_close() -> None:
    def squared(prediction: Tensor, target: Tensor) -> Tensor:
        return (prediction - target).square().mean()

    model = nn.Linear(2, 1)
    lens = sl.observe(model)
    criterion: Callable[..., Any] = lens.watch_loss(squared)
    lens.close()
    x = torch.ones(3, 2)
    assert torch.equal(criterion(model(x), x[:, :1]), squared(model(x), x[:, :1]))


def test_disabled_by_the_environment_nothing_is_installed_and_nothing_is_emitted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("STREAMLENS_DISABLED", "1")
    threads = set(threading.enumerate())
    model, criterion = small_model(), nn.CrossEntropyLoss()
    frames: list[Frame] = []
    sink = ToFile(tmp_path / "frames")
    with sl.observe(model, loss=criterion, emits=["accuracy"]) as lens:
        for topic in (*TOPICS, "accuracy"):
            lens.pipe(sl.topic(topic)).subscribe(frames.append)
        lens.pipe(sl.norm("weights"), sl.ema(0.9)).subscribe(sink)
        for _ in lens.epochs(2):
            list(steps_of(model, torch.optim.SGD(model.parameters(), lr=0.1), 2))
            lens.emit("accuracy", 0.5)
        lens.step()
        assert hooks_of(model) == hooks_of(criterion) == optimizer_hooks() == []
        assert "STREAMLENS_DISABLED" in lens.explain()
    assert frames == []
    assert not sink.path.exists()
    assert set(threading.enumerate()) <= threads


@pytest.mark.parametrize("value", ["", "0", "false"])
def test_an_environment_that_does_not_disable_is_ignored(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STREAMLENS_DISABLED", value)
    model = small_model()
    with sl.observe(model):
        assert hooks_of(model)


def test_paused_silences_a_region_and_spends_no_step() -> None:
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    steps: list[int] = []
    with sl.observe(model) as lens:
        lens.pipe(sl.topic("activations", "weights"), sl.norm()).subscribe(
            lambda frame: steps.append(frame.step)
        )
        list(steps_of(model, optimizer, 1))
        with lens.paused():
            model(torch.ones(2, 4)).sum().backward()
            optimizer.zero_grad()
        list(steps_of(model, optimizer, 1))
    assert steps == [0, 0, 1, 1]
