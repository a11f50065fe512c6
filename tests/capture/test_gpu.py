"""On CUDA: nothing waits, nothing changes the run, and values are the host's to rounding.

`torch.cuda.set_sync_debug_mode("error")` raises where the host would wait for the device, on whichever
thread does so. Sinks' own threads wait on purpose: they stand still while the mode is on.
"""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import streamlens as sl
from streamlens.chain import ErrorReport
from streamlens.delivery.transfer import Burst
from streamlens.frame import Frame
from streamlens.sink import Sink
from tests._runs import small_model
from tests.helpers.shipped import NAMES, REDUCIBLE, chains_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

EVALUATES = {
    "adversarial_susceptibility",
    "generalisation_gap",
    "hessian_eigenvalues",
    "hessian_trace",
    "linear_cka",
    "sharpness",
    "svcca",
    "test_accuracy",
}
"""Operators that run the model themselves when they are due, and read what it gives."""


class Recorder(Sink):
    max_latency = 0.01

    def __init__(self) -> None:
        self.frames: list[Frame] = []

    def write(self, frames: Sequence[Frame]) -> None:
        self.frames += frames


class Held(Recorder):
    """Its worker stands still until it is let go."""

    max_latency = 3600.0
    capacity = 10**6
    max_bytes = 2**40

    def __init__(self) -> None:
        super().__init__()
        self.let_go = threading.Event()

    def write(self, frames: Sequence[Frame]) -> None:
        self.let_go.wait(60)
        super().write(frames)


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def on_device(seed: int = 0) -> nn.Sequential:
    model = small_model(seed).cuda()
    model.insert(1, nn.BatchNorm1d(5, device="cuda"))
    return model


def batches(count: int, size: int = 6) -> list[tuple[Tensor, Tensor]]:
    data = torch.Generator().manual_seed(1)
    return [
        (torch.randn(size, 4, generator=data).cuda(), torch.randint(0, 3, (size,), generator=data).cuda())
        for _ in range(count)
    ]


Optimizers = dict[str, Callable[[Any], torch.optim.Optimizer]]
OPTIMIZERS: Optimizers = {
    "sgd": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9),
    "sgd, fused": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, fused=True),
    "adam, foreach": lambda ps: torch.optim.Adam(ps, lr=0.01, foreach=True),
    "adam, fused": lambda ps: torch.optim.Adam(ps, lr=0.01, fused=True),
    "adam, capturable": lambda ps: torch.optim.Adam(ps, lr=torch.tensor(0.01).cuda(), capturable=True),
}


def step(
    model: nn.Module,
    criterion: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: tuple[Tensor, Tensor],
    scaler: torch.amp.GradScaler | None = None,
    factor: float = 1.0,
) -> None:
    """One step in two micro-steps."""
    optimizer.zero_grad()
    for x, y in zip(batch[0].chunk(2), batch[1].chunk(2), strict=True):
        loss = criterion(model(x), y) * factor
        (loss if scaler is None else scaler.scale(loss)).backward()
    if scaler is None:
        optimizer.step()
    else:
        scaler.step(optimizer)
        scaler.update()


# -- nothing waits -----------------------------------------------------------------------------


def test_the_mode_tells_who_waits() -> None:
    x = torch.ones(3, device="cuda")
    with no_waiting(), pytest.raises(RuntimeError, match="synchroniz"):
        x.sum().item()


@pytest.mark.parametrize("optimizer", ["sgd", "adam, fused"])
def test_no_step_waits_with_every_operator_subscribed(optimizer: str) -> None:
    """The first steps compile plans and allocate; the ones after run under the mode."""
    model, criterion = on_device(), nn.CrossEntropyLoss()
    made = OPTIMIZERS[optimizer](model.parameters())
    data = batches(6)
    reports: list[ErrorReport] = []
    lens = sl.observe(model, loss=criterion)
    lens.errors.subscribe(reports.append)
    for name in NAMES:
        if name not in EVALUATES:
            for chain in chains_of(name, lens, inputs=4):
                lens.pipe(*chain).subscribe(lambda frame: None)
    for batch in data[:3]:
        step(model, criterion, made, batch)
    with no_waiting():
        for batch in data[3:]:
            step(model, criterion, made, batch)
    waits = [str(r) for r in reports if "synchroniz" in str(r.error)]
    lens.close(30)
    assert waits == []


@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
def test_no_step_waits_with_every_topic_subscribed(optimizer: str) -> None:
    model, criterion = on_device(), nn.CrossEntropyLoss()
    made = OPTIMIZERS[optimizer](model.parameters())
    data = batches(6)
    reports: list[ErrorReport] = []
    sink = Held()
    lens = sl.observe(model, loss=criterion)
    lens.errors.subscribe(reports.append)
    for topic in REDUCIBLE:
        lens.pipe(sl.topic(topic)).subscribe(sink)
        lens.pipe(sl.norm(topic)).subscribe(sink)
    for batch in data[:3]:
        step(model, criterion, made, batch)
    with no_waiting():
        for batch in data[3:]:
            step(model, criterion, made, batch)
    waits = [str(r) for r in reports if "synchroniz" in str(r.error)]
    sink.let_go.set()
    assert lens.close(30)
    assert waits == []
    assert {frame.step for frame in sink.frames} == set(range(6))
    assert all(value.is_cpu for frame in sink.frames for _, value in frame.items())


# -- nothing changes ---------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
@pytest.mark.parametrize("scaled", [False, True], ids=["single precision", "autocast and scaler"])
def test_observing_leaves_a_run_on_the_device_bit_identical(optimizer: str, scaled: bool) -> None:
    def run(observing: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model, criterion = on_device(), nn.CrossEntropyLoss()
        model.insert(3, nn.Dropout(0.3))
        made = OPTIMIZERS[optimizer](model.parameters())
        scaler = torch.amp.GradScaler("cuda", init_scale=256.0, enabled=scaled)
        with sl.observe(model, loss=criterion) if observing else contextlib.nullcontext() as lens:
            if lens is not None:
                for name in NAMES:
                    for chain in chains_of(name, lens, inputs=4):
                        lens.pipe(*chain).subscribe(lambda frame: None)
                lens.pipe(sl.norm("weights")).subscribe(Recorder())
            for i, batch in enumerate(batches(5)):
                with torch.autocast("cuda", torch.float16, enabled=scaled):
                    step(model, criterion, made, batch, scaler, float("inf") if scaled and i == 2 else 1.0)
        state = [p.detach().cpu() for p in (*model.parameters(), *model.buffers())]
        gradients = [p.grad.cpu() for p in model.parameters() if p.grad is not None]
        return [*state, *gradients, torch.get_rng_state(), torch.cuda.get_rng_state()]

    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        alone, again, watched = run(observing=False), run(observing=False), run(observing=True)
    finally:
        torch.use_deterministic_algorithms(deterministic)
    if not all(torch.equal(a, b) for a, b in zip(alone, again, strict=True)):
        pytest.skip("this device does not repeat itself without being observed")
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(alone, watched, strict=True))


# -- values ------------------------------------------------------------------------------------


@pytest.mark.parametrize("topic", [topic for topic in REDUCIBLE if not topic.startswith("optimizer_state")])
def test_values_are_those_of_the_host_to_rounding(topic: str) -> None:
    def run(device: str) -> list[Frame]:
        model, criterion = small_model().to(device), nn.CrossEntropyLoss().to(device)
        sink = Recorder()
        with sl.observe(model, loss=criterion, on_error="raise") as lens:
            lens.pipe(sl.topic(topic)).subscribe(sink)
            for reduced in (
                sl.norm(),
                sl.mean(),
                sl.std(),
                sl.quantiles(),
                sl.histogram(bins=5, range=(-9, 9)),
            ):
                lens.pipe(sl.topic(topic), reduced).subscribe(sink)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            for x, y in batches(3):
                step(model, criterion, optimizer, (x.to(device), y.to(device)))
        return sorted(sink.frames, key=lambda f: (f.topic, f.step, f.micro_step))

    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        host, device = run("cpu"), run("cuda")
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed
    assert [(f.topic, f.step, f.micro_step, f.layers) for f in host] == [
        (f.topic, f.step, f.micro_step, f.layers) for f in device
    ]
    for expected, found in zip(host, device, strict=True):
        for layer, value in expected.items():
            torch.testing.assert_close(found[layer], value, rtol=1e-4, atol=1e-5)


# -- a fused optimizer under GradScaler --------------------------------------------------------


@pytest.mark.parametrize("fused", ["sgd, fused", "adam, fused"])
def test_a_fused_overflow_is_masked_without_a_wait_and_reaches_no_sink(fused: str) -> None:
    model, criterion = on_device(), nn.CrossEntropyLoss()
    optimizer = OPTIMIZERS[fused](model.parameters())
    scaler = torch.amp.GradScaler("cuda", init_scale=256.0, growth_interval=1000)
    overflow, data = 4, batches(7)
    kept: list[Frame] = []
    reports: list[ErrorReport] = []
    sink = Held()
    topics = ("weights", "weight_gradients", "weight_updates", "learning_rate")
    lens = sl.observe(model, loss=criterion)
    lens.errors.subscribe(reports.append)
    for topic in topics:
        chain = lens.pipe(sl.topic(topic) if topic == "learning_rate" else sl.norm(topic))
        chain.subscribe(kept.append)
        chain.subscribe(sink)
    before: list[Tensor] = []
    for k, batch in enumerate(data):
        before.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        with no_waiting() if k >= 3 else contextlib.nullcontext():
            step(model, criterion, optimizer, batch, scaler, float("inf") if k == overflow else 1.0)
    assert torch.equal(before[overflow], before[overflow + 1]), "no update happened"
    sink.let_go.set()
    assert lens.close(30)
    assert [str(r) for r in reports] == []
    for topic in topics:
        mine = [f for f in kept if f.topic.startswith(topic)]
        assert [f.step for f in mine] == list(range(7)), "the clock advances"
        assert [f.step for f in mine if all(v.isnan().all() for _, v in f.items())] == [overflow]
        written = [f.step for f in sink.frames if f.topic.startswith(topic)]
        assert written == [k for k in range(7) if k != overflow]


def test_a_fused_gradient_is_seen_unscaled() -> None:
    model, criterion = on_device(), nn.CrossEntropyLoss()
    twin = copy.deepcopy(model)
    (batch,) = batches(1)
    for x, y in zip(batch[0].chunk(2), batch[1].chunk(2), strict=True):
        criterion(twin(x), y).backward()
    seen: list[Frame] = []
    with sl.observe(model, loss=criterion, on_error="raise") as lens:
        lens.pipe(sl.topic("parameter_gradients")).subscribe(lambda frame: seen.append(frame.clone()))
        scaler = torch.amp.GradScaler("cuda", init_scale=1024.0)
        step(model, criterion, OPTIMIZERS["adam, fused"](model.parameters()), batch, scaler)
    for name, parameter in twin.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(seen[0][name], parameter.grad, rtol=1e-4, atol=1e-6)


def test_an_overflow_of_an_optimizer_that_is_not_fused_is_no_step() -> None:
    model, criterion = on_device(), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cuda", init_scale=256.0)
    steps: list[int] = []
    with sl.observe(model, loss=criterion, on_error="raise") as lens:
        lens.pipe(sl.norm("weight_updates")).subscribe(lambda frame: steps.append(frame.step))
        for k, batch in enumerate(batches(4)):
            step(model, criterion, optimizer, batch, scaler, float("inf") if k == 1 else 1.0)
    assert steps == [0, 1, 2]


# -- controllers and alerts --------------------------------------------------------------------


def test_a_controller_sees_values_one_step_old_and_no_others() -> None:
    model, criterion = on_device(), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen: list[tuple[int, int]] = []

    def rule(frame: Frame, rate: float) -> float:
        seen.append((frame.step, lens.current_step))
        assert all(value.is_cpu for _, value in frame.items())
        return rate

    with sl.observe(model, loss=criterion, on_error="raise") as lens:
        lens.pipe(sl.norm("weights")).subscribe(sl.control.act(rule))
        for batch in batches(5):
            step(model, criterion, optimizer, batch)
    assert seen == [(k, k + 1) for k in range(4)]


def test_an_alert_comes_when_its_values_have_arrived_under_their_own_step() -> None:
    model, criterion = on_device(), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    alerts: list[Frame] = []
    with sl.observe(model, loss=criterion, on_error="raise") as lens:
        lens.pipe(sl.nonfinite_values(every=1, start=(1, 1))).subscribe(alerts.append)
        for k, batch in enumerate(batches(6)):
            step(model, criterion, optimizer, batch, factor=float("nan") if k == 2 else 1.0)
            torch.cuda.synchronize()
    assert alerts
    assert alerts[0].step == 2
    assert alerts[0].values[0].is_cpu


def test_one_burst_is_one_copy_a_type_and_owns_its_memory() -> None:
    frames = [Frame(f"t{i}", 0, ("a", "b"), torch.full((2,), float(i), device="cuda")) for i in range(5)]
    burst = Burst()
    tickets = [burst.add(frame) for frame in frames]
    with no_waiting():
        burst.settle()
    assert len(burst._events) == 1
    for i, ticket in enumerate(tickets):
        assert ticket is not None
        taken = ticket.take()
        assert taken["a"].is_cpu
        assert not taken["a"].is_pinned()
        assert taken.to_dict() == {"a": float(i), "b": float(i)}
    assert burst.arrived
