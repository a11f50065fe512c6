"""`svcca`, against NumPy's singular vectors and scikit-learn's CCA."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.cross_decomposition import CCA
from torch import Tensor, nn

import streamlens as sl
from streamlens.operators import svcca
from tests.helpers.recording import observed, record, record_errors
from tests.operators.support import resumed
from tests.operators.support import run as run_frames
from tests.operators.when import chained, moving, outputs_of, when

Array = np.ndarray[Any, Any]


def reduced(rows: Array, share: float = 0.99) -> Array:
    """The data in its leading singular directions, from NumPy's decomposition."""
    rows = rows.astype(np.float64) - rows.mean(0, dtype=np.float64)
    u, s, _ = np.linalg.svd(rows, full_matrices=False)
    rank = int(np.sum(s > 1e-6 * s[0]))
    k = int(np.searchsorted(np.cumsum(s**2) / np.sum(s**2), share) + 1)
    return np.asarray((u * s)[:, : min(k, rank)])


def by_numpy(x: Array, y: Array, share: float = 0.99) -> float:
    """Mean canonical correlation by whitening with covariances, as CCA is defined."""
    x, y = reduced(x, share), reduced(y, share)

    def whitened(a: Array) -> Array:
        values, vectors = np.linalg.eigh(a.T @ a)
        return np.asarray(a @ vectors / np.sqrt(values))

    correlations = np.linalg.svd(whitened(x).T @ whitened(y), compute_uv=False)
    return float(np.mean(correlations[: min(x.shape[1], y.shape[1])]))


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    # The first layer keeps few of its input's directions, and so which ones depends on its weights.
    return nn.Sequential(nn.Linear(6, 3), nn.Tanh(), nn.Linear(3, 8))


def probe(n: int = 60, seed: int = 1) -> Tensor:
    return torch.randn(n, 6, generator=torch.Generator().manual_seed(seed))


def taken(model: nn.Module, inputs: Any, **options: Any) -> dict[str, float]:
    (frame,) = run_frames(svcca(inputs, model=model, **options), [when(3)])
    assert (frame.topic, frame.step) == ("svcca", 3)
    return {name: float(value) for name, value in frame.items()}


@pytest.mark.parametrize("share", [0.7, 0.99, 1.0])
def test_equals_canonical_correlations_of_the_leading_singular_directions(share: float) -> None:
    before, after, x = net(0), net(5), probe()
    got = taken(after, x, reference=before, share=share)
    old, new = outputs_of(before, x), outputs_of(after, x)
    for name in ("0", "1", "2"):
        wanted = by_numpy(new[name].numpy(), old[name].numpy(), share)
        assert got[name] == pytest.approx(wanted, rel=1e-5), name
        assert got[name] < 0.99


def test_equals_scikit_learn_where_that_converges() -> None:
    before, after, x = net(0), net(5), probe(200)
    got = taken(after, x, reference=before, share=0.9)
    old, new = outputs_of(before, x), outputs_of(after, x)
    for name in ("1", "2"):
        a, b = reduced(new[name].numpy(), 0.9), reduced(old[name].numpy(), 0.9)
        k = min(a.shape[1], b.shape[1])
        scores = CCA(n_components=k, max_iter=5000, tol=1e-12).fit(a, b).transform(a, b)
        wanted = np.mean([np.corrcoef(scores[0][:, i], scores[1][:, i])[0, 1] for i in range(k)])
        assert got[name] == pytest.approx(wanted, rel=1e-4), name


@given(st.integers(0, 30), st.sampled_from([1e-4, -3.0, 1e5]))
def test_a_layer_is_like_any_invertible_image_of_itself(seed: int, scale: float) -> None:
    g = torch.Generator().manual_seed(seed)
    before = nn.Linear(6, 6).double()
    after = copy.deepcopy(before)
    with torch.no_grad():
        after.weight.copy_(scale * torch.randn(6, 6, generator=g).double() @ before.weight)
        after.bias.add_(scale * 7)
    assert taken(after, probe().double(), reference=before, share=1)[""] == pytest.approx(1, abs=1e-4)


def test_directions_that_are_gone_count_as_nothing() -> None:
    # Of four independent directions, the later layer keeps two and has two new ones.
    x = torch.linalg.qr(torch.randn(64, 7, generator=torch.Generator().manual_seed(0)).double()).Q
    x = torch.linalg.qr(x - x.mean(0)).Q.float()[:, :6]
    before, after = nn.Linear(6, 4, bias=False), nn.Linear(6, 4, bias=False)
    with torch.no_grad():
        before.weight.copy_(torch.eye(6)[:4])
        after.weight.copy_(torch.eye(6)[2:])
    assert taken(after, x, reference=before, share=1)[""] == pytest.approx(0.5, abs=1e-5)


@pytest.mark.parametrize(
    ("places", "matrix"),
    [
        ("each", lambda a: a.transpose(0, 2, 3, 1).reshape(-1, a.shape[1])),
        ("mean", lambda a: a.mean((2, 3))),
        ("flatten", lambda a: a.reshape(len(a), -1)),
    ],
)
def test_places_of_a_convolution_are_data_points_unless_told_otherwise(places: Any, matrix: Any) -> None:
    torch.manual_seed(0)
    before, after, x = nn.Conv2d(2, 3, 2), nn.Conv2d(2, 3, 2), torch.randn(40, 2, 3, 3)
    options = {} if places == "each" else {"places": places}
    got = taken(after, x, reference=before, **options)[""]
    pair = [matrix(layer(x).detach().numpy()) for layer in (after, before)]
    assert got == pytest.approx(by_numpy(*pair), rel=1e-5)


def test_bounded_data_points_are_the_same_ones_of_both_and_of_every_column_of_an_image() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 1, 8, 8)
    before, after = nn.Conv2d(1, 2, 1), nn.Conv2d(1, 2, 1)
    assert taken(after, x, reference=after, max_rows=50)[""] == pytest.approx(1, abs=1e-6)
    # One channel has all of its variance in one column of the images: it is seen.
    x = torch.zeros(64, 2, 8, 8)
    x[:, 0], x[:, 1, :, 5] = torch.randn(64, 8, 8), 10 * torch.randn(64, 8)
    before, after = nn.Conv2d(2, 1, 1), nn.Conv2d(2, 1, 1)
    with torch.no_grad():
        before.weight.copy_(torch.tensor([1.0, 0]).reshape(1, 2, 1, 1))
        after.weight.copy_(torch.tensor([1.0, 1]).reshape(1, 2, 1, 1))
    assert taken(after, x, reference=before, max_rows=64)[""] < 0.7


def test_the_reference_is_the_first_evaluation_unless_given() -> None:
    model, x = net(), probe()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    kept: list[dict[str, Tensor]] = []
    with observed(model) as lens:
        got = record(lens, sl.every(2), svcca(x))
        for _ in range(5):
            optimizer.zero_grad()
            model(x).square().sum().sqrt().backward()
            optimizer.step()
            kept.append(outputs_of(copy.deepcopy(model), x))
    assert [f.step for f in got] == [0, 2, 4]
    assert got[0].layers == ("0", "1", "2")
    for frame in got:
        for name, value in frame.items():
            wanted = by_numpy(kept[frame.step][name].numpy(), kept[0][name].numpy())
            assert float(value) == pytest.approx(wanted, rel=1e-5)
    assert float(got[0]["1"]) == pytest.approx(1)
    assert float(got[2]["1"]) < 0.9999


def test_with_previous_each_evaluation_is_compared_with_the_one_before() -> None:
    model, x = net(), probe()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    kept: list[dict[str, Tensor]] = []
    with observed(model) as lens:
        got = record(lens, sl.every(2), svcca(x, reference="previous"))
        for _ in range(7):
            optimizer.zero_grad()
            model(x).square().sum().sqrt().backward()
            optimizer.step()
            kept.append(outputs_of(copy.deepcopy(model), x))
    assert [f.step for f in got] == [2, 4, 6]
    for frame in got:
        for name, value in frame.items():
            wanted = by_numpy(kept[frame.step][name].numpy(), kept[frame.step - 2][name].numpy())
            assert float(value) == pytest.approx(wanted, rel=1e-5)


def test_a_state_dict_is_copied_when_it_is_given() -> None:
    model, x = net(), probe()
    operator = svcca(x, model=model, reference=model.state_dict())
    before = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape))
    (frame,) = run_frames(operator, [when(0)])
    assert {n: float(v) for n, v in frame.items()} == taken(model, x, reference=before)
    assert float(frame["0"]) < 0.999


def test_a_state_of_the_model_in_a_wrapper_is_understood() -> None:
    model, x = net(), probe()
    wrapped = nn.DataParallel(copy.deepcopy(model))
    got = taken(model, x, reference=wrapped.state_dict())
    assert got["0"] == pytest.approx(1)
    assert taken(wrapped, x, reference=model.state_dict()) == got


def test_layers_in_front_choose() -> None:
    model, x = net(), probe()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with observed(model) as lens:
        got = record(lens, sl.layers(nn.Linear), sl.every(1), svcca(x))
        model(x).sum().backward()
        optimizer.step()
    assert got[0].layers == ("0", "2")


def by_hand(linear: Any, x: Tensor) -> tuple[Array, Array]:
    """A linear layer's first outputs, and those for the first ones cut at zero."""
    first = linear(x).detach()
    return first.numpy(), linear(first.relu()).detach().numpy()


def test_modules_called_again_and_outputs_overwritten_in_place() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 6)
            self.act = nn.ReLU(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.act(self.linear(self.act(self.linear(x))))
            return out

    torch.manual_seed(0)
    before, after, x = Twice(), Twice(), probe()
    got = taken(after, x, reference=before)
    assert list(got) == ["linear", "linear@1", "act", "act@1"]
    old, new = by_hand(before.linear, x), by_hand(after.linear, x)
    assert got["linear"] == pytest.approx(by_numpy(new[0], old[0]), rel=1e-5)
    assert got["linear@1"] == pytest.approx(by_numpy(new[1], old[1]), rel=1e-5)


def test_nothing_that_varies_and_what_is_not_finite_is_nan() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3), nn.Linear(3, 2))
    with torch.no_grad():
        model[1].weight.zero_()  # type: ignore[operator]
        model[2].bias.fill_(math.inf)  # type: ignore[operator]
    got = taken(model, probe())
    assert got["0"] == pytest.approx(1)
    assert math.isnan(got["1"])
    assert math.isnan(got["2"])
    assert math.isnan(taken(nn.Linear(6, 4), probe(1))[""])


def test_half_precision_and_mappings_and_functions() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 4), nn.Linear(6, 4)

        def forward(self, left: Tensor, *, right: Tensor) -> dict[str, Tensor]:
            return {"out": self.a(left) * self.b(right)}

    torch.manual_seed(0)
    model, x = Named().half(), probe().half()
    assert taken(model, {"left": x, "right": x}) == pytest.approx({"a": 1.0, "b": 1.0})
    through = taken(model, x, forward=lambda m, given: m(given, right=given))
    assert through == pytest.approx({"a": 1.0, "b": 1.0})


def test_a_layer_that_cannot_be_compared_is_left_out_and_said_once() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.total = nn.Linear(6, 4), Total()

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.total(self.linear(x))
            return out

    class Total(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.sum()

    model = Odd()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    lens = sl.observe(model)
    reports = record_errors(lens)
    got = record(lens, svcca(probe()))
    for _ in range(3):
        model(probe()).backward()
        optimizer.step()
    lens.close()
    assert [f.layers for f in got] == [("linear",)] * 3
    assert len(reports) == 1
    assert "neither examples nor units" in str(reports[0].error)


@pytest.mark.parametrize("reference", [None, "previous"])
def test_a_resumed_run_is_compared_with_the_same_checkpoint(reference: Any) -> None:
    model, x = net(), probe()

    move = moving(model)

    def operator() -> Any:
        return chained(move, svcca(x, model=model, reference=reference))

    frames = [when(k) for k in range(5)]
    wanted = [f.to_dict() for f in run_frames(operator(), frames)]
    for at in (1, 3):
        assert [f.to_dict() for f in resumed(operator, frames, at)] == wanted
    assert wanted[-1]["0"] < 0.99


def test_a_probe_that_is_changed_later_stays_what_it_was() -> None:
    x, model = probe(), net(5)
    operator = svcca(x, model=model, reference=net(0))
    x[:30] = 0
    (got,) = run_frames(operator, [when(0)])
    assert {n: float(v) for n, v in got.items()} == taken(model, probe(), reference=net(0))
    assert taken(model, x, reference=net(0)) != taken(model, probe(), reference=net(0))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"share": 0}, ValueError, r"svcca\(share=0\)"),
        ({"share": True}, ValueError, "share=True"),
        ({"places": "some"}, ValueError, "places='some'.*'each'"),
        ({"unit_dim": 0}, ValueError, "unit_dim=0"),
        ({"max_rows": 1}, ValueError, "max_rows=1"),
        ({"forward": 3}, TypeError, "forward=3"),
        ({"reference": 3}, TypeError, r"reference=.*model\.state_dict\(\).*got int"),
        ({"reference": "last"}, TypeError, r"reference=.*'previous', got 'last'"),
        ({"probe": "x"}, TypeError, "takes a probe.*got str"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        svcca(**{"probe": probe(), **options})


def test_what_does_not_fit_the_model_is_said_when_it_is_applied() -> None:
    with observed(net()) as lens:
        with pytest.raises(sl.StreamlensError, match=r"not what the model is called with.*without labels"):
            lens.pipe(svcca((probe(), torch.zeros(60))))
        state = net().state_dict()
        del state["2.bias"]
        with pytest.raises(sl.StreamlensError, match=r"the state has no entry '2\.bias'"):
            lens.pipe(svcca(probe(), reference=state))
        with pytest.raises(sl.StreamlensError, match=r"pass svcca\(\.\.\., model=model\)"):
            svcca(probe())(sl.Feed())


def test_a_model_without_parameters_is_compared_with_another_one() -> None:
    x = probe()
    got = taken(nn.Sequential(nn.Tanh()), x, reference=nn.Sequential(nn.ReLU()))
    wanted = by_numpy(x.tanh().numpy(), x.relu().numpy())
    assert got["0"] == pytest.approx(wanted, rel=1e-5)
    assert got["0"] < 0.99
