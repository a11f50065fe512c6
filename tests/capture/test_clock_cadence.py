"""Cadence, ranges and layer selections: less of the same values."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam

import streamlens as sl
from tests.helpers.by_hand import regression, squared_error, train_by_hand
from tests.helpers.recording import layer_sets, observed, points, record

BATCHES = regression(1, 12, (4, 5))
REDUCED = ("weights", "weight_updates", "weight_gradients", "activations", "layer_gradients", "raw_gradients")
RAW = (*REDUCED, "network_output", "input_data")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.features = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Sequential(nn.Linear(4, 4), nn.Tanh()))
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.features(x))
        return out


def run(*narrowing: Callable[..., object], fused: bool = False) -> dict[str, list[sl.Frame]]:
    """A full run's frames, by topic, raw and reduced, of a lens narrowed first."""
    model = Net()
    with observed(model) as lens:
        narrowed: sl.Lens = lens.pipe(*narrowing)
        frames = {name: record(narrowed, sl.topic(name)) for name in RAW}
        frames |= {f"{name}.norm2": record(narrowed, sl.norm(name)) for name in REDUCED}
        train_by_hand(
            model, Adam(model.parameters(), lr=0.01, fused=fused), BATCHES, squared_error, accumulate=2
        )
    return frames


def same(frame: sl.Frame, other: sl.Frame) -> bool:
    return frame.layers == other.layers and all(torch.equal(frame[k], other[k]) for k in frame)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    ("narrowing", "due"),
    [
        ((sl.every(2),), [0, 2, 4]),
        ((sl.every(3),), [0, 3]),
        ((sl.between(2, 4),), [2, 3]),
        ((sl.between(3),), [3, 4, 5]),
        ((sl.every(2), sl.between(1, 5)), [2, 4]),
        ((sl.every(2), sl.every(3)), [0]),
    ],
)
def test_a_cadence_gives_the_frames_of_the_full_run_at_its_due_steps(
    narrowing: tuple[Callable[..., object], ...], due: list[int], fused: bool
) -> None:
    full, some = run(fused=fused), run(*narrowing, fused=fused)
    for name, frames in full.items():
        wanted = [f for f in frames if f.step in due]
        assert points(some[name]) == points(wanted), name
        assert all(same(a, b) for a, b in zip(some[name], wanted, strict=True)), name


def test_updates_at_a_cadence_alone_are_those_of_one_step() -> None:
    model, twin = Net(), Net()
    truth = train_by_hand(twin, SGD(twin.parameters(), lr=0.1), BATCHES, squared_error)
    with observed(model) as lens:
        updates = record(lens, sl.every(5), sl.norm("weight_updates"))
        train_by_hand(model, SGD(model.parameters(), lr=0.1), BATCHES, squared_error)
    assert [f.step for f in updates] == [0, 5, 10]
    for frame in updates:
        change = truth[frame.step].updates()
        for layer in frame:
            assert float(frame[layer]) == pytest.approx(float(change[f"{layer}.weight"].norm()), rel=1e-5)


def test_chains_with_different_cadences_do_not_disturb_each_other() -> None:
    model = Net()
    with observed(model) as lens:
        often, seldom = (
            record(lens, sl.norm("weight_updates")),
            record(lens, sl.every(4), sl.norm("weight_updates")),
        )
        outputs = record(lens, sl.every(3), sl.norm("activations"))
        train_by_hand(model, SGD(model.parameters(), lr=0.1), BATCHES, squared_error)
    assert [f.step for f in often] == list(range(12))
    assert [f.step for f in outputs] == [0, 3, 6, 9]
    assert all(same(frame, often[frame.step]) for frame in seldom)
    assert [f.step for f in seldom] == [0, 4, 8]


SELECTIONS: dict[str, tuple[Callable[..., object], tuple[str, ...], tuple[str, ...]]] = {
    # The narrowing; the layers of weights; the layers of activations.
    "glob": (
        sl.layers("features.*"),
        ("features.0", "features.2.0"),
        ("features.0", "features.1", "features.2.0", "features.2.1", "features.2"),
    ),
    "class": (
        sl.layers(nn.Linear),
        ("features.0", "features.2.0", "head"),
        ("features.0", "features.2.0", "head"),
    ),
    "leaves": (
        sl.layers(depth=-1),
        ("features.0", "features.2.0", "head"),
        ("features.0", "features.1", "features.2.0", "features.2.1", "head"),
    ),
    "depth 1": (sl.layers(depth=1), ("head",), ("features", "head")),
    "depth 2": (
        sl.layers(depth=2),
        ("features.0", "head"),
        ("features.0", "features.1", "features.2", "head"),
    ),
    "one": (sl.layers("head"), ("head",), ("head",)),
}


@pytest.mark.parametrize("name", SELECTIONS)
def test_layers_are_selected_by_glob_class_and_depth_with_the_values_of_the_full_run(name: str) -> None:
    narrowing, weights, activations = SELECTIONS[name]
    full, some = run(), run(narrowing)
    for topic in ("weights", "weight_updates", "weight_gradients", "weights.norm2", "weight_updates.norm2"):
        assert layer_sets(some[topic]) == [weights] * 6, topic
        for frame, whole in zip(some[topic], full[topic], strict=True):
            torch.testing.assert_close(dict(frame.items()), {k: whole[k] for k in frame}, rtol=1e-6, atol=0.0)
    for topic in ("activations", "activations.norm2", "layer_gradients", "layer_gradients.norm2"):
        assert [set(f.layers) for f in some[topic]] == [set(activations)] * 12, topic
        for frame, whole in zip(some[topic], full[topic], strict=True):
            assert all(torch.equal(frame[layer], whole[layer]) for layer in frame if layer in whole)


def test_a_selection_of_layers_narrows_raw_gradients_too() -> None:
    some = run(sl.layers("features.*"))
    names = ("features.0.weight", "features.0.bias", "features.2.0.weight", "features.2.0.bias")
    assert layer_sets(some["raw_gradients"]) == [names] * 12


def test_a_chain_that_ends_leaves_the_others_their_frames() -> None:
    model = Net()
    optimizer = SGD(model.parameters(), lr=0.1)
    with observed(model) as lens:
        kept = record(lens, sl.norm("weight_updates"))
        ended: list[sl.Frame] = []
        subscription = lens.pipe(sl.topic("weight_updates")).subscribe(lambda f: ended.append(f.clone()))
        train_by_hand(model, optimizer, BATCHES[:2], squared_error)
        subscription.dispose()
        truth = train_by_hand(model, optimizer, BATCHES[2:4], squared_error)
    assert [f.step for f in ended] == [0, 1]
    assert [f.step for f in kept] == [0, 1, 2, 3]
    assert float(kept[3]["head"]) == pytest.approx(float(truth[1].updates()["head.weight"].norm()), rel=1e-5)


def test_a_chain_subscribed_between_forward_and_update_gets_the_update_of_that_step() -> None:
    model = Net()
    optimizer = SGD(model.parameters(), lr=0.1)
    with observed(model) as lens:
        train_by_hand(model, optimizer, BATCHES[:1], squared_error)
        squared_error(model, BATCHES[1]).backward()
        updates = record(lens, sl.topic("weight_updates"))
        before = model.head.weight.detach().clone()
        optimizer.step()
    assert [f.step for f in updates] == [1]
    assert torch.equal(updates[0]["head"], model.head.weight.detach() - before)
