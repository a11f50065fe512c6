"""What happens on other threads, and in models that call themselves, does not disturb what counts."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import Queue
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

import streamlens as sl
from streamlens.capture.optimizers import step_watch
from tests.helpers.by_hand import norms, regression, squared_error, train_by_hand
from tests.helpers.recording import assert_steps_equal, numbers, observed, record, record_errors

BATCHES = regression(1, 6, (4, 3))


def elsewhere(work: Callable[[], object]) -> None:
    """Do something on another thread, whose failure is raised here."""
    failures: list[BaseException] = []

    def guarded() -> None:
        try:
            work()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=guarded, name="other")
    thread.start()
    thread.join(20)
    assert not thread.is_alive()
    if failures:
        raise failures[0]


class Waiting(nn.Module):
    """Has another thread evaluate the model in the middle of its training forward."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 3)
        self.evaluate = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.evaluate:
            self.evaluate = False
            with torch.no_grad():
                thread = threading.Thread(target=self, args=(torch.ones(1, 3),))
                thread.start()
                thread.join()
        out: Tensor = self.second(x)
        return out


def test_an_evaluation_on_another_thread_leaves_the_pass_alone() -> None:
    model = Waiting()
    with observed(model) as lens:
        frames, outputs = record(lens, sl.norm("activations")), record(lens, sl.norm("network_output"))
        model.evaluate = True
        x = torch.randn(2, 3)
        out = model(x)
        out.sum().backward()
    assert [frame.layers for frame in frames] == [("first", "second")]
    assert outputs[0][""].item() == pytest.approx(out.norm().item())


class Recursive(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor, depth: int = 0) -> Tensor:
        out: Tensor = self.layer(x)
        return self(out, depth - 1) if depth else out


def test_a_model_that_calls_itself_gives_one_output_and_its_layers_as_repeated() -> None:
    model = Recursive()
    with observed(model) as lens:
        frames, outputs = record(lens, sl.norm("activations")), record(lens, sl.norm("network_output"))
        model(torch.ones(2, 3), 2).sum().backward()
    assert [frame.layers for frame in frames] == [("layer", "layer@1", "layer@2")]
    assert [frame.layers for frame in outputs] == [("",)]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_process_emits_nothing() -> None:
    model = nn.Linear(3, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with observed(model) as lens:
        frames = record(lens, sl.norm("weights"))
        child = os.fork()
        if child == 0:
            model(torch.ones(2, 3)).sum().backward()
            optimizer.step()
            os._exit(len(frames))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        model(torch.ones(2, 3)).sum().backward()
        optimizer.step()
    assert len(frames) == 1


# -- subscribing ---------------------------------------------------------------------------------


@pytest.mark.parametrize("trained", [False, True])
def test_subscribing_from_another_thread_is_refused_with_the_remedy(trained: bool) -> None:
    model = nn.Linear(3, 3)
    optimizer = SGD(model.parameters(), lr=0.1)
    with observed(model) as lens:
        mine = record(lens, sl.norm("weights"))
        if trained:
            train_by_hand(model, optimizer, BATCHES[:1], squared_error)
        for chain in (lens.pipe(sl.norm("weights")), lens.pipe(sl.uw_ratio(), sl.ema(0.9))):
            with pytest.raises(
                sl.StreamlensError, match=r"thread 'other'.*'MainThread'.*queue\.put"
            ) as caught:
                elsewhere(lambda chain=chain: chain.subscribe(print))  # type: ignore[misc]
            assert "subscribe there" in str(caught.value)
        assert len(lens.engine.chains) == 1
        train_by_hand(model, optimizer, BATCHES[1:2], squared_error)
    assert len(mine) == 1 + trained, "what is subscribed goes on"


def test_the_remedies_work_a_queue_and_observing_where_the_training_is() -> None:
    model = nn.Linear(3, 3)
    queue: Queue[sl.Frame] = Queue()
    seen: list[sl.Frame] = []
    with observed(model) as lens:
        lens.pipe(sl.norm("weights")).subscribe(lambda frame: queue.put(frame.clone()))
        optimizer = SGD(model.parameters(), lr=0.1)
        train_by_hand(model, optimizer, BATCHES[:2], squared_error)
        elsewhere(lambda: seen.extend(queue.get(timeout=5) for _ in range(2)))
    assert [f.step for f in seen] == [0, 1]

    def observe_and_train() -> None:
        other = nn.Linear(3, 3)
        with observed(other) as lens:
            frames = record(lens, sl.norm("weights"))
            train_by_hand(other, SGD(other.parameters(), lr=0.1), BATCHES[:2], squared_error)
            late = record(lens, sl.norm("weights"))
            train_by_hand(other, SGD(other.parameters(), lr=0.1), BATCHES[:1], squared_error)
        assert (len(frames), len(late)) == (3, 1)

    elsewhere(observe_and_train)


def test_whoever_trains_may_subscribe_also_where_another_thread_has_observed() -> None:
    model, twin = nn.Linear(3, 3), nn.Linear(3, 3)
    twin.load_state_dict(model.state_dict())
    truth = train_by_hand(twin, SGD(twin.parameters(), lr=0.1), BATCHES[:4], squared_error)
    with observed(model) as lens:
        frames = record(lens, sl.norm("parameter_updates"))
        optimizer = SGD(model.parameters(), lr=0.1)

        def work() -> None:
            train_by_hand(model, optimizer, BATCHES[:2], squared_error)
            record(lens, sl.norm("weights"))

        elsewhere(work)
        # One thread after another: that one is over, so this one takes its place.
        record(lens, sl.norm("weights"))
        train_by_hand(model, optimizer, BATCHES[2:4], squared_error)
    assert_steps_equal(frames, [norms(s.updates()) for s in truth], rtol=1e-5)


# -- several threads that train ------------------------------------------------------------------


class Slow(SGD):
    """Has others at work in the middle of its step."""

    meanwhile: Callable[[], object] | None = None

    def step(self, closure: Any = None) -> Any:
        meanwhile, self.meanwhile = self.meanwhile, None
        result = super().step(closure)
        if meanwhile is not None:
            meanwhile()
        return result


def iteration(model: nn.Module, optimizer: SGD, before_step: Callable[[], object] = lambda: None) -> None:
    squared_error(model, BATCHES[0]).backward()
    before_step()
    optimizer.step()


@contextmanager
def contended(model: nn.Module) -> Iterator[list[sl.Frame]]:
    """Expect one report of threads that train at once, and no frame from then on."""
    with observed(model, on_error="report") as lens:
        reports = record_errors(lens)
        frames = record(lens, sl.norm("parameter_updates"))
        yield frames
        assert len(reports) == 1
        assert "several threads train this model at once" in str(reports[0].error)
        assert "a lens each" in str(reports[0].error)
        count = len(frames)
        train_by_hand(model, SGD(model.parameters(), lr=0.1), BATCHES[:1], squared_error)
        assert len(frames) == count


def test_an_update_within_another_threads_update_is_refused_and_measured_by_nobody() -> None:
    model = nn.Linear(3, 3)
    slow, other = Slow(model.parameters(), lr=0.1), SGD(model.parameters(), lr=0.1)
    with contended(model) as frames:
        train_by_hand(model, slow, BATCHES[:1], squared_error)
        slow.meanwhile = lambda: elsewhere(lambda: iteration(model, other))
        iteration(model, slow)
        assert [f.step for f in frames] == [0]


def test_an_update_between_another_threads_forward_and_its_update_is_refused() -> None:
    model = nn.Linear(3, 3)
    ours, other = SGD(model.parameters(), lr=0.1), SGD(model.parameters(), lr=0.1)
    with contended(model) as frames:
        train_by_hand(model, ours, BATCHES[:1], squared_error)
        for _ in range(2):
            iteration(model, ours, lambda: elsewhere(lambda: iteration(model, other)))
        assert {f.step for f in frames} <= {0, 1}


def test_threads_that_train_in_turn_are_one_run() -> None:
    model, twin = nn.Linear(3, 3), nn.Linear(3, 3)
    twin.load_state_dict(model.state_dict())
    truth = train_by_hand(twin, SGD(twin.parameters(), lr=0.1), BATCHES, squared_error)
    optimizer = SGD(model.parameters(), lr=0.1)
    with observed(model) as lens:
        frames = record(lens, sl.norm("parameter_updates"))
        for k, batch in enumerate(BATCHES):

            def work(batch: Any = batch) -> None:
                train_by_hand(model, optimizer, [batch], squared_error)

            elsewhere(work) if k % 2 else work()
    assert_steps_equal(frames, [norms(s.updates()) for s in truth], rtol=1e-5)


def test_a_loss_on_another_thread_during_a_forward_is_not_of_that_forward() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            value = torch.ones(3, requires_grad=True)
            elsewhere(lambda: criterion(value, torch.zeros(3)))
            out: Tensor = self.layer(x)
            return out

    model = Model()
    with observed(model) as lens:
        criterion = lens.watch_loss(nn.functional.mse_loss)
        losses = record(lens, sl.topic("loss"))
        loss = criterion(model(BATCHES[0][0]), BATCHES[0][1])
        loss.backward()
    assert numbers(losses) == pytest.approx([loss.item()])


def test_closing_a_lens_takes_no_hook_from_under_another_threads_step() -> None:
    """PyTorch goes through its hooks before and after a step, and would raise if one went meanwhile."""
    observed_model, other = nn.Linear(3, 3), nn.Linear(3, 3)
    watch, lens = step_watch(), sl.observe(observed_model)
    begun, go_on = threading.Event(), threading.Event()

    def wait() -> None:
        begun.set()
        assert go_on.wait(10)

    slow = Slow(other.parameters(), lr=0.1)
    slow.meanwhile = wait
    thread = threading.Thread(target=lambda: iteration(other, slow))
    thread.start()
    try:
        assert begun.wait(10)
        lens.close()
        assert watch._handles, "they stay while a step is under way"
    finally:
        go_on.set()
        thread.join(10)
    assert watch.tidy()
    assert not watch._handles
