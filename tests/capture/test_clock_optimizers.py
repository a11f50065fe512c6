"""Steps of several optimizers, wrapped ones, failing ones, and ones that change on the way."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable

import pytest
import torch
from reactivex import Observable
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

import streamlens as sl
from tests.helpers.by_hand import (
    Batch,
    HandStep,
    norms,
    of_role,
    regression,
    snapshot,
    squared_error,
    train_by_hand,
    update_by_hand,
)
from tests.helpers.recording import assert_steps_equal, layer_sets, observed, record

BATCHES = regression(1, 6, (4, 5))
LAYERS = ("0", "2", "4")


def perceptron() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))


def optimizer_of(model: nn.Module, *layers: str) -> SGD:
    return SGD([p for layer in layers for p in model.get_submodule(layer).parameters()], lr=0.1)


def run_together(model: nn.Module, optimizers: Iterable[Optimizer], batches: Iterable[Batch]) -> None:
    optimizers = list(optimizers)
    for batch in batches:
        squared_error(model, batch).backward()
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()


def expected_updates(layers: tuple[str, ...], batches: Iterable[Batch]) -> list[dict[str, Tensor]]:
    """Weight updates of a twin whose given layers one optimizer trains."""
    twin = perceptron()
    steps = train_by_hand(twin, optimizer_of(twin, *layers), list(batches), squared_error)
    return [of_role(s.updates(), "weight") for s in steps]


def test_optimizers_that_step_together_give_one_reduced_frame_from_their_second_step_on() -> None:
    model = perceptron()
    first, second = optimizer_of(model, "4", "0"), optimizer_of(model, "2")
    with observed(model) as lens:
        updates, weights = record(lens, sl.norm("weight_updates")), record(lens, sl.norm("weights"))
        run_together(model, (first, second), BATCHES[:3])
    truth = [norms(u) for u in expected_updates(LAYERS, BATCHES[:3])]
    assert [(f.step, f.layers) for f in updates] == [
        (0, ("0", "4")),
        (0, ("2",)),
        (1, LAYERS),
        (2, LAYERS),
    ]
    assert layer_sets(weights) == layer_sets(updates)
    assert_steps_equal(updates[2:], truth[1:], steps=[1, 2], rtol=1e-5)
    for frame in updates[:2]:
        for layer in frame:
            assert float(frame[layer]) == pytest.approx(float(truth[0][layer]), rel=1e-5)


def test_the_weights_of_an_optimizer_that_has_not_stepped_are_not_taken_before_its_update() -> None:
    model = perceptron()
    first, second = optimizer_of(model, "0"), optimizer_of(model, "2")
    with observed(model) as lens:
        raw, reduced = record(lens, sl.topic("weights")), record(lens, sl.norm("weights"))
        run_together(model, (first, second), BATCHES[:1])
        after = of_role(snapshot(model), "weight")
        run_together(model, (first, second), BATCHES[1:2])
    # Layer 4 is nobody's, which shows at the end of the first step.
    assert [f.layers for f in raw if f.step == 0] == [("0",), ("2",), ("4",)]
    assert [f.layers for f in raw if f.step == 1] == [("0", "4"), ("2",)]
    assert layer_sets(reduced) == [("0",), ("2",), ("4",), LAYERS]
    for frame in raw[:3]:
        assert all(torch.equal(frame[layer], after[layer]) for layer in frame)
    for frame in reduced[:3]:
        assert all(float(frame[k]) == pytest.approx(float(after[k].norm())) for k in frame)


@pytest.mark.parametrize("chain", [sl.topic("weights"), sl.norm("weights")], ids=["raw", "reduced"])
@pytest.mark.parametrize("made", [0, 3], ids=["made at once", "made late"])
def test_an_optimizer_whose_first_step_comes_late_gives_each_weight_once_and_as_updated(
    chain: Callable[[Observable[sl.Frame]], Observable[sl.Frame]], made: int
) -> None:
    model = perceptron()
    early = optimizer_of(model, "0")
    late: SGD | None = None
    truth: list[dict[str, Tensor]] = []
    with observed(model) as lens:
        weights = record(lens, chain)
        for k, batch in enumerate(BATCHES[:5]):
            if k == made:
                late = optimizer_of(model, "4")
            squared_error(model, batch).backward()
            early.step()
            if k == 3:
                assert late is not None
                late.step()
            model.zero_grad()
            truth.append(of_role(snapshot(model), "weight"))
    seen = [(frame.step, layer) for frame in weights for layer in frame]
    assert len(seen) == len(set(seen)), "no layer twice in a step"
    assert {(k, layer) for k in range(4) for layer in LAYERS} <= set(seen)
    for frame in weights:
        for layer in frame:
            value = truth[frame.step][layer]
            assert torch.allclose(frame[layer], value if frame[layer].dim() else value.norm())
    # Layer 2 is nobody's: that it comes apart shows only at the first step of all.
    assert all({"0", "2"} <= set(frame.layers) for frame in weights if frame.step and "0" in frame.layers)


def test_where_nobody_can_find_a_late_optimizer_its_weights_still_come_once_a_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gc, "get_objects", list)
    model = perceptron()
    early, late = optimizer_of(model, "0", "2"), optimizer_of(model, "4")
    with observed(model) as lens:
        weights, ratios = record(lens, sl.topic("weights")), record(lens, sl.uw_ratio())
        run_together(model, (early,), BATCHES[:2])
        run_together(model, (early, late), BATCHES[2:4])
    for frames in (weights, ratios):
        seen = [(frame.step, layer) for frame in frames for layer in frame]
        assert len(seen) == len(set(seen))
    assert {layer for frame in ratios if frame.step == 2 for layer in frame} == set(LAYERS)


def test_a_layer_of_an_optimizer_that_never_steps_has_weights_at_every_step_and_is_told_of() -> None:
    model = perceptron()
    steps, never = optimizer_of(model, "2", "4"), optimizer_of(model, "0")
    with observed(model) as lens:
        weights = record(lens, sl.norm("weights"))
        alerts = record(lens, sl.unchanged_weights(every=1))
        run_together(model, (steps,), BATCHES[:6])
    assert [frame.step for frame in weights if "0" in frame.layers] == list(range(6))
    assert [(alert.meta["state"], alert.layers) for alert in alerts] == [("start", ("0",))]
    del never


def test_a_parameter_that_two_optimizers_own_is_updated_in_a_step_of_each(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = perceptron()
    both = optimizer_of(model, "0", "2"), optimizer_of(model, "2", "4")
    truth: list[HandStep] = []
    twin = perceptron()
    twins = optimizer_of(twin, "0", "2"), optimizer_of(twin, "2", "4")
    for batch in BATCHES[:3]:
        squared_error(twin, batch).backward()
        truth += [update_by_hand(twin, optimizer) for optimizer in twins]
        twin.zero_grad()
    with observed(model) as lens:
        weights, updates = record(lens, sl.topic("weights")), record(lens, sl.norm("weight_updates"))
        run_together(model, both, BATCHES[:3])
    for frames in (weights, updates):
        seen = [(frame.step, layer) for frame in frames for layer in frame]
        assert len(seen) == len(set(seen))
    assert [(frame.step, frame.layers) for frame in updates] == [
        (step, ("2", "4") if step % 2 else ("0", "2")) for step in range(6)
    ]
    for frame in weights:
        after = of_role(truth[frame.step].after, "weight")
        assert all(torch.equal(frame[layer], after[layer]) for layer in frame)
    for frame in updates:
        changes = norms(of_role(truth[frame.step].updates(), "weight"))
        assert {k: float(v) for k, v in frame.items()} == pytest.approx(
            {k: float(changes[k]) for k in frame}, rel=1e-5
        )
    assert caplog.records == [], "no forward is missing"


def test_optimizers_given_are_known_from_the_first_step_on() -> None:
    model = perceptron()
    first, second = optimizer_of(model, "0"), optimizer_of(model, "2", "4")
    with observed(model, optimizers=[first, second]) as lens:
        weights = record(lens, sl.topic("weights"))
        run_together(model, (first, second), BATCHES[:1])
    assert layer_sets(weights) == [("0",), ("2", "4")]


def test_raw_frames_come_one_an_optimizer_with_its_own_layers() -> None:
    model = perceptron()
    first, second = optimizer_of(model, "4", "0"), optimizer_of(model, "2")
    with observed(model) as lens:
        updates = record(lens, sl.topic("weight_updates"))
        run_together(model, (first, second), BATCHES[:2])
    truth = expected_updates(LAYERS, BATCHES[:2])
    assert [(f.step, f.layers) for f in updates] == [
        (0, ("0", "4")),
        (0, ("2",)),
        (1, ("0", "4")),
        (1, ("2",)),
    ]
    for frame in updates:
        for layer in frame:
            assert torch.equal(frame[layer], truth[frame.step][layer])


def test_a_reduction_that_waits_is_there_when_the_last_partner_has_stepped() -> None:
    model = perceptron()
    first, second = optimizer_of(model, "0", "2"), optimizer_of(model, "4")
    with observed(model) as lens:
        updates = record(lens, sl.norm("weight_updates"))
        run_together(model, (first, second), BATCHES[:1])
        squared_error(model, BATCHES[1]).backward()
        before = len(updates)
        first.step()
        assert len(updates) == before
        second.step()
        assert [f.layers for f in updates[before:]] == [LAYERS]


def test_an_optimizer_at_half_the_rate_leaves_out_its_layers_where_it_did_not_step() -> None:
    model = perceptron()
    fast, slow = optimizer_of(model, "0", "2"), optimizer_of(model, "4")
    truth: list[dict[str, Tensor]] = []
    with observed(model) as lens:
        updates = record(lens, sl.norm("weight_updates"))
        for k, batch in enumerate(BATCHES):
            squared_error(model, batch).backward()
            step = update_by_hand(model, fast)
            changed = of_role(step.updates(), "weight")
            if k % 2:
                changed.update(of_role(update_by_hand(model, slow).updates(), "weight"))
            truth.append(changed)
            model.zero_grad()
    got: dict[int, dict[str, Tensor]] = {}
    for frame in updates:
        for layer, value in frame.items():
            assert layer not in got.setdefault(frame.step, {}), "one value a layer and step"
            got[frame.step][layer] = value
    assert sorted(got) == list(range(6))
    for k, changed in enumerate(truth):
        assert set(got[k]) == set(changed)
        for layer, value in changed.items():
            assert float(got[k][layer]) == pytest.approx(float(value.norm()), rel=1e-5)
    assert [f.layers for f in updates if f.step in (3, 5)] == [LAYERS] * 2


def test_what_waited_for_an_optimizer_that_did_not_step_comes_when_the_step_closes() -> None:
    model = perceptron()
    first, second = optimizer_of(model, "0", "2"), optimizer_of(model, "4")
    with observed(model) as lens:
        updates = record(lens, sl.norm("weight_updates"))
        run_together(model, (first, second), BATCHES[:2])
        run_together(model, (first,), BATCHES[2:3])
        assert updates[-1].step == 1
        squared_error(model, BATCHES[3])
        assert (updates[-1].step, updates[-1].layers) == (2, ("0", "2"))


def test_with_optimizers_given_a_step_closes_when_all_of_them_have_stepped() -> None:
    model = perceptron()
    first, second = optimizer_of(model, "0", "2"), optimizer_of(model, "4")
    with observed(model, optimizers=[first, second]) as lens:
        weights = record(lens, sl.norm("weights"))
        for k, batch in enumerate(BATCHES[:2]):
            squared_error(model, batch).backward()
            first.step()
            assert lens.current_step == k
            second.step()
            assert lens.current_step == k + 1
    assert {f.step for f in weights} == {0, 1}


def test_an_optimizer_that_steps_again_opens_a_step_of_its_own() -> None:
    model = perceptron()
    optimizer = optimizer_of(model, *LAYERS)
    with observed(model) as lens:
        raw, reduced = record(lens, sl.topic("weight_updates")), record(lens, sl.norm("weight_updates"))
        squared_error(model, BATCHES[0]).backward()
        steps = [update_by_hand(model, optimizer) for _ in range(3)]
    truth = [of_role(s.updates(), "weight") for s in steps]
    assert_steps_equal(raw, truth)
    assert_steps_equal(reduced, [norms(t) for t in truth], rtol=1e-5)


class Gan(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.generator = nn.Linear(5, 3)
        self.discriminator = nn.Linear(3, 1)


def train_gan(
    gan: Gan, batches: Iterable[Batch], after: Callable[[], object] = lambda: None
) -> list[HandStep]:
    """Alternating updates: discriminator, generator, discriminator, ..."""
    of_generator = Adam(gan.generator.parameters(), lr=0.01)
    of_discriminator = Adam(gan.discriminator.parameters(), lr=0.01)
    steps: list[HandStep] = []
    for noise, real in batches:
        fake = gan.generator(noise)
        gan.zero_grad()
        (gan.discriminator(fake.detach()) - gan.discriminator(real)).mean().backward()
        steps.append(update_by_hand(gan, of_discriminator))
        after()
        gan.zero_grad()
        (-gan.discriminator(gan.generator(noise))).mean().backward()
        steps.append(update_by_hand(gan, of_generator))
        after()
    return steps


def test_a_frame_does_not_wait_longer_for_a_partner_that_has_no_part_in_it() -> None:
    model = perceptron()
    matrices = SGD([p for p in model.parameters() if p.ndim > 1], lr=0.1)
    vectors = SGD([p for p in model.parameters() if p.ndim == 1], lr=0.1)
    after: list[list[int]] = []
    with observed(model) as lens:
        weights = record(lens, sl.norm("weights"))
        for batch in BATCHES[:4]:
            run_together(model, (matrices, vectors), [batch])
            after.append([f.step for f in weights])
    assert after[1:] == [[0, 1], [0, 1, 2], [0, 1, 2, 3]]


def test_a_gan_in_one_module_makes_a_step_of_each_update_and_delays_nothing() -> None:
    gan, twin = Gan(), Gan()
    steps = train_gan(twin, BATCHES[:3])
    counts: list[int] = []
    with observed(gan) as lens:
        updates, gradients = (
            record(lens, sl.norm("weight_updates")),
            record(lens, sl.topic("weight_gradients")),
        )
        train_gan(gan, BATCHES[:3], lambda: counts.append(len(updates)))
    truth = [norms(of_role(s.updates(), "weight")) for s in steps]
    assert_steps_equal(updates, truth, rtol=1e-5)
    assert layer_sets(updates) == [("discriminator",), ("generator",)] * 3
    assert counts == [1, 2, 3, 4, 5, 6]
    assert [f.step for f in gradients] == list(range(6))
    for frame, step in zip(gradients, steps, strict=True):
        for layer in frame:
            assert torch.equal(frame[layer], step.gradients[f"{layer}.weight"])


def test_two_modules_with_a_lens_each_keep_their_own_clocks() -> None:
    gan, twin = Gan(), Gan()
    steps = train_gan(twin, BATCHES[:3])
    with observed(gan.generator, name="G") as of_generator, observed(gan.discriminator, name="D") as of_other:
        made, judged = (
            record(of_generator, sl.norm("weight_updates")),
            record(of_other, sl.norm("weight_updates")),
        )
        losses = record(of_other, sl.norm("activations"))
        train_gan(gan, BATCHES[:3])
    for frames, name, start in ((made, "generator", 1), (judged, "discriminator", 0)):
        truth = [norms({"": s.updates()[f"{name}.weight"]}) for s in steps[start::2]]
        assert_steps_equal(frames, truth, rtol=1e-5)
    assert {f.source for f in made} == {"G"}
    assert {f.source for f in judged} == {"D"}
    # The generator's backward runs through the discriminator: a micro-step of its next update.
    assert {(f.step, f.micro_step) for f in losses} == {(0, 0), (1, 0), (1, 1), (2, 0), (2, 1), (3, 0)}
