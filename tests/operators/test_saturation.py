"""`saturation`, against NumPy's singular values of all outputs of a window at once."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reactivex.subject import Subject
from torch import Tensor, nn

import streamlens as sl
from streamlens.frame import Frame, Kind
from tests.helpers.recording import observed, record
from tests.operators.support import chain_of, ragged, resumed, run


def by_svd(rows: np.ndarray[Any, Any], share: float = 0.99) -> float:
    """From the singular values of the centred data, with a loop."""
    rows = rows[np.isfinite(rows).all(1)].astype(np.float64)
    if len(rows) < 2:
        return math.nan
    squares = np.linalg.svd(rows - rows.mean(0), compute_uv=False) ** 2
    if squares.sum() == 0:
        return math.nan
    held, k = 0.0, 0
    while held < share * squares.sum():
        held += float(squares[k])
        k += 1
    return k / float(rows.shape[1])


def acts(step: int, values: dict[str, Tensor], **fields: Any) -> Frame:
    return ragged(step, values, "activations", kind=Kind.MICRO_STEP, **fields)


def low_rank(n: int, d: int, rank: int, seed: int, offset: float = 0.0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    basis = torch.randn(rank, d, generator=torch.Generator().manual_seed(7))
    scales = torch.tensor([2.0**-k for k in range(rank)])
    return (torch.randn(n, rank, generator=g) * scales) @ basis + offset


def one(frames: list[Frame], **options: Any) -> Frame:
    (only,) = run(sl.saturation(**options), frames)
    return only


@given(st.integers(1, 8), st.integers(0, 50), st.sampled_from([0.5, 0.9, 0.99]), st.integers(1, 3))
def test_equals_the_singular_values_of_all_rows_at_once(
    rank: int, seed: int, share: float, batches: int
) -> None:
    parts = [low_rank(5 + k, 8, rank, seed + k, offset=30.0) for k in range(batches)]
    frames = [acts(k, {"a": part}) for k, part in enumerate(parts)]
    got = one(frames, window=batches, share=share)
    assert (got.topic, got.step, got.kind) == ("activations.saturation", batches - 1, Kind.STEP)
    assert float(got["a"]) == pytest.approx(by_svd(torch.cat(parts).numpy(), share))


@pytest.mark.parametrize(
    ("shape", "places", "unit_dim", "matrix"),
    [
        ((6, 4, 3, 3), "each", None, lambda x: x.transpose(0, 2, 3, 1).reshape(-1, 4)),
        ((30, 4, 3, 3), "mean", None, lambda x: x.mean((2, 3))),
        ((30, 2, 2, 2), "flatten", None, lambda x: x.reshape(30, -1)),
        ((6, 5, 4), "each", None, lambda x: x.reshape(-1, 4)),
        ((30, 5, 4), "mean", None, lambda x: x.mean(1)),
        ((6, 4, 5), "each", 1, lambda x: x.transpose(0, 2, 1).reshape(-1, 4)),
        ((9,), "each", None, lambda x: x[:, None]),
        ((30, 4), "mean", None, lambda x: x),
        ((9,), "mean", None, lambda x: x[:, None]),
    ],
)
def test_places_are_rows_or_means_or_columns(
    shape: tuple[int, ...], places: Any, unit_dim: int | None, matrix: Any
) -> None:
    # Units of very different spread, so that few of them hold most of the variance.
    g = torch.Generator().manual_seed(1)
    x = torch.randn(shape, generator=g)
    if x.ndim > 1:
        dim = unit_dim or (1 if x.ndim >= 4 else x.ndim - 1)
        spread = torch.logspace(0, -2, x.shape[dim])
        x = x * spread.reshape([-1 if d == dim else 1 for d in range(x.ndim)])
    got = one([acts(0, {"a": x})], window=1, places=places, unit_dim=unit_dim)
    assert float(got["a"]) == pytest.approx(by_svd(matrix(x.numpy())))


def test_float64_keeps_a_small_spread_beside_a_large_mean() -> None:
    x = low_rank(400, 6, 2, 3).double() + 1e6
    parts = x.split(25)
    frames = [acts(k, {"a": part}) for k, part in enumerate(parts)]
    got = one(frames, window=len(parts))
    assert float(got["a"]) == pytest.approx(by_svd(x.numpy())) == pytest.approx(2 / 6)


@given(st.integers(0, 50), st.sampled_from([1e-3, -4.0, 1e4]))
def test_is_unchanged_by_scale_shift_and_rotation(seed: int, c: float) -> None:
    x = low_rank(30, 6, 4, seed).double()
    rotation = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q
    plain, moved = (
        float(one([acts(0, {"a": v})], window=1)["a"]) for v in (x, c * (x @ rotation) + torch.arange(6))
    )
    assert plain == moved


def test_rows_that_are_not_finite_are_left_out_and_counted() -> None:
    x = low_rank(20, 5, 3, 0)
    x[3, 1], x[7, 0] = math.nan, math.inf
    source: Subject[Frame] = Subject()
    got: list[Frame] = []
    chain = chain_of(source.pipe(sl.saturation(window=1)), got.append)
    source.on_next(acts(0, {"a": x}))
    source.on_completed()
    assert float(got[0]["a"]) == pytest.approx(by_svd(x.numpy()))
    assert chain.cells[0].skipped == 2


def test_nothing_that_varies_is_nan() -> None:
    values = {
        "constant": torch.ones(9, 3),
        "one row": torch.randn(1, 3),
        "no row": torch.empty(0, 3),
        "no unit": torch.empty(3, 0),
        "all nan": torch.full((4, 2), math.nan),
        "one unit": torch.randn(9, 1),
        "half": low_rank(40, 4, 1, 0).half(),
    }
    got = one([acts(0, values)], window=1)
    assert all(math.isnan(float(got[n])) for n in list(values)[:5])
    assert float(got["one unit"]) == 1
    assert float(got["half"]) == 0.25


def test_all_of_the_variance_does_not_count_directions_of_rounding() -> None:
    x = low_rank(50, 6, 2, 0).double()
    assert float(one([acts(0, {"a": x})], window=1, share=1)["a"]) == pytest.approx(2 / 6)


def test_rows_can_be_bounded_and_are_of_every_place() -> None:
    # Each column of the images varies in a channel of its own.
    x = torch.zeros(32, 8, 8, 8)
    for k in range(8):
        x[:, k, :, k] = torch.randn(32, 8)
    got = one([acts(0, {"a": x})], window=1, max_rows=64, share=1)
    assert float(got["a"]) == 1
    # That many rows have that many directions, less one for their mean.
    got = one([acts(0, {"a": x})], window=1, max_rows=4, share=1)
    assert float(got["a"]) <= 3 / 8


def test_a_wide_layer_is_left_out_and_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    source: Subject[Frame] = Subject()
    stream = sl.saturation(window=1, max_units=5)(source)
    assert isinstance(stream, sl.Stream)
    reports: list[Any] = []
    monkeypatch.setattr(stream.runtime, "on_error", "report")
    stream.runtime.errors.subscribe(reports.append)
    got: list[Frame] = []
    stream.subscribe(got.append)
    for k in range(3):
        source.on_next(acts(k, {"wide": torch.randn(9, 6), "a": torch.randn(9, 2)}))
    source.on_completed()
    assert [f.layers for f in got] == [("a",)] * 3
    assert len(reports) == 1
    assert "6 columns, above max_units=5" in str(reports[0].error)


def test_on_a_lens_over_micro_steps_in_a_convolutional_net() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 2), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(27, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    outputs: dict[str, list[Tensor]] = {"0": [], "1": [], "3": []}
    for name, kept in outputs.items():
        model.get_submodule(name).register_forward_hook(
            lambda m, i, o, kept=kept: kept.append(o.detach().clone())
        )
    with sl.observe(model) as lens:
        got = record(lens, sl.layers(nn.Conv2d, nn.ReLU, nn.Linear), sl.saturation(window=2))
        for _ in range(4):
            for _ in range(2):
                model(torch.randn(3, 1, 4, 4)).sum().backward()
            optimizer.step()
    assert [f.step for f in got] == [1, 3]
    for w, frame in enumerate(got):
        for name in frame.layers:
            x = torch.cat(outputs[name][4 * w : 4 * w + 4]).numpy()
            x = x.transpose(0, 2, 3, 1).reshape(-1, 3) if x.ndim == 4 else x
            # The first frame of an overwritten activation is left out: it is copied from then on.
            if w or name != "0":
                assert float(frame[name]) == pytest.approx(by_svd(x)), (w, name)
    assert got[1].layers == ("0", "1", "3")


@pytest.mark.parametrize("at", [1, 2, 5])
def test_a_resumed_run_goes_on_with_its_covariances(at: int) -> None:
    frames = [acts(k, {"a": low_rank(4, 8, 5, k)}) for k in range(6)]
    wanted = [f.to_dict() for f in run(sl.saturation(window=3), frames)]
    assert [f.to_dict() for f in resumed(lambda: sl.saturation(window=3), frames, at)] == wanted
    assert len(wanted) == 2


def test_a_saved_state_is_not_changed_by_what_follows() -> None:
    source: Subject[Frame] = Subject()
    chain = chain_of(source.pipe(sl.saturation(window=4)), lambda _: None)
    source.on_next(acts(0, {"a": torch.randn(4, 3)}))
    saved = chain.state_dict()[0]["state"]["topics"][0]["layers"]["a"]
    before = {k: v.clone() for k, v in saved.items()}
    source.on_next(acts(1, {"a": torch.randn(4, 3)}))
    assert all(torch.equal(before[k], saved[k]) for k in saved)


def test_means_over_layers_of_any_metric() -> None:
    values = {"a": low_rank(40, 8, 1, 0), "b": low_rank(40, 8, 6, 1), "c": torch.ones(4, 2)}
    (each,) = run(sl.saturation(window=1), [acts(0, values)])
    source: Subject[Frame] = Subject()
    got: list[Frame] = []
    source.pipe(sl.saturation(window=1), sl.across_layers()).subscribe(got.append)
    source.on_next(acts(0, values))
    source.on_completed()
    assert got[0].topic == "activations.saturation.layer_mean"
    assert float(got[0][""]) == pytest.approx((float(each["a"]) + float(each["b"])) / 2)


def test_means_over_layers_on_a_lens() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3), nn.Sigmoid())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with observed(model) as lens:
        both = [
            (record(lens, metric), record(lens, metric, sl.across_layers()))
            for metric in (sl.saturation(window=2), sl.dead_fraction(), sl.dead_fraction(window=2))
        ]
        for _ in range(4):
            model(torch.randn(12, 4)).sum().backward()
            optimizer.step()
    for each, mean in both:
        assert [float(f[""]) for f in mean] == pytest.approx(
            [float(np.nanmean([float(v) for _, v in f.items()])) for f in each]
        )
        assert each


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"window": 0}, ValueError, r"saturation\(window=0\)"),
        ({"share": 0}, ValueError, "share=0"),
        ({"share": 1.1}, ValueError, "share=1.1"),
        ({"places": "some"}, ValueError, "places='some'.*'each'.*'mean'.*'flatten'"),
        ({"unit_dim": 0}, ValueError, "unit_dim=0"),
        ({"unit_dim": 1.5}, ValueError, "unit_dim=1.5"),
        ({"max_units": 0}, ValueError, "max_units=0"),
        ({"max_rows": True}, ValueError, "max_rows=True"),
        ({"topic": 4}, TypeError, "saturation"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        sl.saturation(**options)(Subject())


def test_numbers_are_refused_with_the_remedy() -> None:
    model = nn.Linear(2, 2)
    with sl.observe(model) as lens, pytest.raises(sl.StreamlensError, match=r"needs whole tensors.*while"):
        lens.pipe(sl.mean("activations"), sl.saturation(None))
    source: Subject[Frame] = Subject()
    source.pipe(sl.saturation()).subscribe(lambda _: None)
    with pytest.raises(sl.StreamlensError, match="needs whole tensors"):
        source.on_next(Frame("activations", 0, ("a",), torch.ones(1)))
