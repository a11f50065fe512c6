"""`linear_cka`, against the alignment of Gram matrices."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import streamlens as sl
from streamlens.operators import linear_cka
from tests.helpers.recording import observed, record
from tests.operators.support import resumed
from tests.operators.support import run as run_frames
from tests.operators.when import chained, moving, outputs_of, when

Array = np.ndarray[Any, Any]


def by_gram(x: Array, y: Array) -> float:
    """HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)), with the centring matrix."""
    n = len(x)
    x, y = x.reshape(n, -1).astype(np.float64), y.reshape(n, -1).astype(np.float64)
    centring = np.eye(n) - np.ones((n, n)) / n
    k, m = x @ x.T, y @ y.T

    def hsic(a: Array, b: Array) -> float:
        return float(np.trace(a @ centring @ b @ centring))

    return hsic(k, m) / math.sqrt(hsic(k, k) * hsic(m, m))


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(27, 4))


def probe(n: int = 12) -> Tensor:
    return torch.randn(n, 1, 4, 4, generator=torch.Generator().manual_seed(1))


def taken(model: nn.Module, inputs: Any, **options: Any) -> dict[str, float]:
    (frame,) = run_frames(linear_cka(inputs, model=model, **options), [when(3)])
    assert (frame.topic, frame.step) == ("linear_cka", 3)
    return {name: float(value) for name, value in frame.items()}


@pytest.mark.parametrize("n", [12, 60])
def test_equals_the_alignment_of_gram_matrices_with_more_units_than_examples_and_fewer(n: int) -> None:
    before, after, x = net(0), net(5), probe(n)
    got = taken(after, x, reference=before)
    old, new = outputs_of(before, x), outputs_of(after, x)
    assert list(got) == ["0", "1", "2", "3"]
    for name, value in got.items():
        assert value == pytest.approx(by_gram(new[name].numpy(), old[name].numpy()), rel=1e-5), name
        assert value < 0.99


@pytest.mark.parametrize(
    ("places", "matrix"),
    [
        ("mean", lambda a: a.astype(np.float64).mean((2, 3))),
        ("each", lambda a: a.transpose(0, 2, 3, 1).reshape(-1, a.shape[1])),
    ],
)
def test_places_can_be_averaged_or_be_data_points(places: Any, matrix: Any) -> None:
    before, after, x = net(0), net(5), probe(20)
    got = taken(after, x, reference=before, places=places)["0"]
    pair = [matrix(outputs_of(m, x)["0"].numpy()) for m in (after, before)]
    assert got == pytest.approx(by_gram(*pair), rel=1e-4)


@given(st.integers(0, 30), st.sampled_from([1e-60, -3.0, 1e60]))
def test_is_unchanged_by_scale_shift_and_rotation(seed: int, scale: float) -> None:
    torch.manual_seed(seed)
    x = torch.randn(20, 6).double()
    before, after = nn.Linear(6, 5).double(), nn.Linear(6, 5).double()
    wanted = taken(after, x, reference=before)[""]
    rotation = torch.linalg.qr(torch.randn(5, 5).double()).Q
    with torch.no_grad():
        after.weight.copy_(scale * rotation @ after.weight)
        after.bias.add_(3).mul_(scale)
    assert taken(after, x, reference=before)[""] == pytest.approx(wanted, rel=1e-6)
    assert 0 < wanted < 1


def test_layers_with_each_other_are_a_symmetric_matrix_under_their_names() -> None:
    model, x = net(), probe()
    (frame,) = run_frames(linear_cka(x, between="layers", model=model), [when(1)])
    outputs = outputs_of(model, x)
    assert frame.topic == "linear_cka.layers"
    assert frame.layers == frame.components == ("0", "1", "2", "3")
    values = torch.as_tensor(frame.values)
    for i, a in enumerate(frame.layers):
        for j, b in enumerate(frame.components):
            wanted = by_gram(outputs[a].numpy(), outputs[b].numpy())
            assert float(values[i, j]) == pytest.approx(wanted, rel=1e-5)
    assert torch.equal(values, values.T)


def test_layers_with_those_of_another_architecture() -> None:
    torch.manual_seed(0)
    other = nn.Sequential(nn.Flatten(), nn.Linear(16, 5))
    model, x = net(), probe()
    (frame,) = run_frames(linear_cka(x, between="layers", reference=other, model=model), [when(1)])
    assert (frame.layers, frame.components) == (("0", "1", "2", "3"), ("0", "1"))
    wanted = by_gram(outputs_of(model, x)["3"].numpy(), outputs_of(other, x)["1"].numpy())
    assert float(frame["3"][1]) == pytest.approx(wanted, rel=1e-5)


def test_layers_of_a_run_are_compared_with_each_other_at_each_step() -> None:
    model, x = net(), probe()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with observed(model) as lens:
        chosen = (sl.layers("0", "3"), sl.every(2))
        got = record(lens, *chosen, linear_cka(x, between="layers"))
        kept = record(lens, *chosen, linear_cka(x))
        for _ in range(3):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    outputs = outputs_of(model, x)
    assert [f.step for f in got] == [f.step for f in kept] == [0, 2]
    assert got[1].layers == got[1].components == kept[1].layers == ("0", "3")
    wanted = by_gram(outputs["0"].numpy(), outputs["3"].numpy())
    assert float(got[1]["0"][1]) == pytest.approx(wanted, rel=1e-5)
    assert float(kept[0]["3"]) == pytest.approx(1)
    assert float(kept[1]["3"]) < 0.999


def test_what_does_not_vary_or_is_not_finite_is_nan_and_so_are_layers_of_other_lengths() -> None:
    class Half(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[: len(x) // 2]

    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3), nn.Linear(3, 2), Half())
    with torch.no_grad():
        model[1].weight.zero_()  # type: ignore[operator]
        model[2].bias.fill_(math.nan)  # type: ignore[operator]
    x = torch.randn(20, 6)
    got = taken(model, x)
    assert got["0"] == pytest.approx(1)
    assert all(math.isnan(got[name]) for name in "123")
    model = nn.Sequential(nn.Linear(6, 4), Half())
    (frame,) = run_frames(linear_cka(x, between="layers", model=model), [when(0)])
    assert torch.as_tensor(frame.values).isnan().tolist() == [[False, True], [True, False]]


@pytest.mark.parametrize("reference", [None, "previous"])
@pytest.mark.parametrize("between", ["checkpoints", "layers"])
def test_a_resumed_run_is_compared_with_the_same_checkpoint(between: Any, reference: Any) -> None:
    model, x = net(), probe()

    move = moving(model)

    def operator() -> Any:
        return chained(move, linear_cka(x, between=between, reference=reference, model=model))

    frames = [when(k) for k in range(4)]
    wanted = [torch.as_tensor(f.values) for f in run_frames(operator(), frames)]
    got = [torch.as_tensor(f.values) for f in resumed(operator, frames, 2)]
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    assert len(wanted) == (4 if reference is None else 3)
    assert not torch.equal(wanted[-1], wanted[0])


def test_the_model_is_as_it_was_bit_by_bit_also_its_batch_norm() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    taken(model, torch.randn(20, 6, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(module.training and not module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"between": "steps"}, r"linear_cka\(between='steps'\): 'checkpoints' or 'layers'"),
        ({"between": "layers", "places": "each"}, r"places='each'.*'flatten' and 'mean'"),
        ({"max_rows": 0}, r"max_rows=0"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear_cka(probe(), **options)
