"""`optimizer.step(closure)`: LBFGS, and every optimizer as Lightning calls it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.optim import LBFGS, SGD, Adam, Optimizer

import streamlens as sl
from tests.helpers.by_hand import Batch, HandStep, gradients, norms, regression, snapshot
from tests.helpers.recording import assert_steps_equal, layer_sets, numbers, observed, points, record

BATCHES = regression(1, 3, (8, 5))


def perceptron() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))


MAKERS: dict[str, Callable[..., Optimizer]] = {
    "lbfgs": partial(LBFGS, lr=0.5, max_iter=5),
    "lbfgs-line-search": partial(LBFGS, line_search_fn="strong_wolfe", max_iter=4),
    "sgd": partial(SGD, lr=0.1),
    "momentum": partial(SGD, lr=0.1, momentum=0.9),
    "adam": partial(Adam, lr=0.01),
}


def run(
    model: nn.Module,
    optimizer: Optimizer,
    criterion: Callable[[Tensor, Tensor], Tensor] = mse_loss,
    *,
    by_keyword: bool = False,
) -> tuple[list[HandStep], int]:
    """Steps whose forward and backward run inside the optimizer; and how often they did."""
    steps: list[HandStep] = []
    evaluations = 0
    for x, y in BATCHES:
        step = HandStep(before=snapshot(model))

        def evaluate(batch: Batch, step: HandStep) -> Tensor:
            nonlocal evaluations
            evaluations += 1
            optimizer.zero_grad()
            loss = criterion(model(batch[0]), batch[1])
            loss.backward()
            step.losses.append(loss.item())
            step.gradients = step.gradients or gradients(model)
            return loss

        # PyTorch's annotation asks for a float; a tensor is what everybody returns.
        closure = cast("Callable[[], float]", partial(evaluate, (x, y), step))
        if by_keyword:
            optimizer.step(closure=closure)
        else:
            optimizer.step(closure)
        step.after = snapshot(model)
        steps.append(step)
    return steps, evaluations


@pytest.mark.parametrize("by_keyword", [False, True])
@pytest.mark.parametrize("name", MAKERS)
def test_a_step_with_a_closure_is_one_step_and_one_micro_step(name: str, by_keyword: bool) -> None:
    model, twin = perceptron(), perceptron()
    truth, evaluations = run(twin, MAKERS[name](twin.parameters()), by_keyword=by_keyword)
    assert (evaluations > 3) == name.startswith("lbfgs")
    with observed(model) as lens:
        raw = {
            n: record(lens, sl.topic(n)) for n in ("parameters", "parameter_gradients", "parameter_updates")
        }
        reduced = {n: record(lens, sl.norm(n)) for n in ("parameter_gradients", "parameter_updates")}
        passes = [record(lens, sl.norm(n)) for n in ("activations", "layer_gradients", "raw_gradients")]
        rates = record(lens, sl.topic("learning_rate"))
        run(model, MAKERS[name](model.parameters()), by_keyword=by_keyword)
    changes = [s.updates(owned=False) for s in truth]
    assert_steps_equal(raw["parameters"], [s.after for s in truth])
    assert_steps_equal(raw["parameter_gradients"], [s.gradients for s in truth])
    assert_steps_equal(raw["parameter_updates"], changes)
    assert_steps_equal(reduced["parameter_gradients"], [norms(s.gradients) for s in truth], rtol=1e-5)
    assert_steps_equal(reduced["parameter_updates"], [norms(c) for c in changes], rtol=1e-5)
    assert [points(f) for f in passes] == [[(0, 0), (1, 0), (2, 0)]] * 3
    assert layer_sets(passes[0]) == [("0", "1", "2")] * 3
    assert len(rates) == 3


def test_norms_alone_of_a_closure_step_are_right() -> None:
    model, twin = perceptron(), perceptron()
    truth, _ = run(twin, MAKERS["lbfgs"](twin.parameters()))
    with observed(model) as lens:
        updates = record(lens, sl.norm("parameter_updates"))
        run(model, MAKERS["lbfgs"](model.parameters()))
    assert_steps_equal(updates, [norms(s.updates(owned=False)) for s in truth], rtol=1e-5)


@pytest.mark.parametrize("name", ["lbfgs", "adam"])
def test_the_loss_of_a_closure_is_that_of_its_first_evaluation(name: str) -> None:
    model = perceptron()
    with observed(model) as lens:
        losses = record(lens, sl.topic("loss"))
        truth, _ = run(model, MAKERS[name](model.parameters()))
    assert numbers(losses) == pytest.approx([s.losses[0] for s in truth])
    assert points(losses) == [(0, 0), (1, 0), (2, 0)]


def test_a_watched_loss_goes_before_what_the_closure_returns() -> None:
    model = perceptron()
    with observed(model) as lens:
        watched = lens.watch_loss(mse_loss)
        losses = record(lens, sl.topic("loss"))

        def doubled(output: Tensor, target: Tensor) -> Tensor:
            return 2 * watched(output, target)

        truth, _ = run(model, MAKERS["lbfgs"](model.parameters()), doubled)
    assert numbers(losses) == pytest.approx([s.losses[0] / 2 for s in truth])


def test_the_gradient_of_a_closure_that_clips_is_the_clipped_one() -> None:
    model = perceptron()
    optimizer = SGD(model.parameters(), lr=0.1)
    seen: list[dict[str, Tensor]] = []
    with observed(model) as lens:
        consumed = record(lens, sl.topic("parameter_gradients"))
        for x, y in BATCHES:

            def closure(x: Tensor = x, y: Tensor = y) -> float:
                optimizer.zero_grad()
                loss = mse_loss(model(x), y)
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 0.01)
                seen.append(gradients(model))
                return loss.item()

            optimizer.step(closure)
    assert_steps_equal(consumed, seen)


def test_accumulation_outside_and_a_last_pass_inside_the_closure_count_together() -> None:
    model = perceptron()
    optimizer = SGD(model.parameters(), lr=0.1)
    with observed(model) as lens:
        outputs, weights = record(lens, sl.norm("activations")), record(lens, sl.norm("weights"))
        for _ in range(2):
            for x, y in BATCHES[:2]:
                mse_loss(model(x), y).backward()

            def closure() -> Tensor:
                loss = mse_loss(model(BATCHES[2][0]), BATCHES[2][1])
                loss.backward()
                return loss

            optimizer.step(closure)
            optimizer.zero_grad()
    assert points(outputs) == [(s, m) for s in range(2) for m in range(3)]
    assert points(weights) == [(0, 2), (1, 2)]


def test_two_optimizers_with_closures_make_a_step_each() -> None:
    model = perceptron()
    first = SGD(model.get_submodule("0").parameters(), lr=0.1)
    second = SGD(model.get_submodule("2").parameters(), lr=0.1)
    with observed(model) as lens:
        updates, outputs = record(lens, sl.norm("weight_updates")), record(lens, sl.norm("activations"))
        for x, y in BATCHES[:2]:
            for optimizer in (first, second):

                def closure(x: Tensor = x, y: Tensor = y, optimizer: Optimizer = optimizer) -> Tensor:
                    optimizer.zero_grad()
                    loss = mse_loss(model(x), y)
                    loss.backward()
                    return loss

                optimizer.step(closure)
    assert [(f.step, f.layers) for f in updates] == [(k, ("0",) if k % 2 == 0 else ("2",)) for k in range(4)]
    assert points(outputs) == [(k, 0) for k in range(4)]


def test_what_a_closure_returns_and_raises_reaches_the_caller() -> None:
    model = perceptron()
    optimizer = SGD(model.parameters(), lr=0.1)
    with observed(model) as lens:
        updates = record(lens, sl.norm("weight_updates"))

        def fails() -> Tensor:
            raise KeyError("the user's own")

        with pytest.raises(KeyError, match="the user's own"):
            optimizer.step(fails)
        assert cast("object", optimizer.step(lambda: 7.5)) == 7.5
        truth, _ = run(model, optimizer)
    wanted = [
        norms({k[:-7]: v for k, v in s.updates(owned=False).items() if k.endswith("weight")}) for s in truth
    ]
    got = updates[-3:]
    assert_steps_equal(got, wanted, steps=[f.step for f in got], rtol=1e-5)


def test_closures_of_steps_that_nobody_watches_count_one_step_each() -> None:
    model = perceptron()
    with observed(model) as lens:
        run(model, MAKERS["lbfgs"](model.parameters()))
        frames = record(lens, sl.norm("weights"))
        run(model, MAKERS["lbfgs"](model.parameters()))
    assert [f.step for f in frames] == [3, 4, 5]
