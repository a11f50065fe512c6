"""Units are counted along the dimension that a module's class says."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import streamlens as sl
from streamlens.frame import Frame
from streamlens.operators._layout import unit_dimensions


class _Sequences(nn.Module):
    """A convolution over sequences and its ReLU, a matrix over images, and an activation used by both."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv1d(2, 5, 3), nn.ReLU(), nn.Dropout(0.0), nn.BatchNorm1d(5))
        self.matrix = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.LayerNorm(7))
        self.shared = nn.ReLU()
        self.first = nn.Sequential(nn.Conv1d(7, 4, 1), self.shared)
        self.second = nn.Sequential(nn.Linear(4, 3), self.shared)

    def forward(self, x: Tensor) -> Tensor:
        x = self.matrix(self.conv(x).mT)
        out: Tensor = self.second(self.first(x.mT).mT).mean(1)
        return out


def test_classes_say_where_units_are_and_activations_follow_what_comes_before_them() -> None:
    dims = unit_dimensions(dict(_Sequences().named_modules()))
    assert dims == {
        "conv": 1, "conv.0": 1, "conv.1": 1, "conv.2": 1, "conv.3": 1,
        "matrix": -1, "matrix.0": -1, "matrix.1": -1, "matrix.2": -1,
        "first": 1, "first.0": 1,
        "second": -1, "second.0": -1,
    }  # fmt: skip


def test_images_are_left_to_their_shape_and_no_activation_looks_past_them() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Flatten(2), nn.ReLU())
    assert unit_dimensions(dict(model.named_modules())) == {"0": -1}


def _watched(*operators: Any) -> tuple[list[Frame], dict[str, np.ndarray[Any, Any]]]:
    """What a chain gives over two steps, and the outputs of all layers in them."""
    torch.manual_seed(0)
    model, found = _Sequences(), list[Frame]()
    outputs: dict[str, list[np.ndarray[Any, Any]]] = {}
    for name in ("conv.0", "conv.1", "conv.2", "conv.3", "matrix.0", "matrix.1", "matrix.2"):
        model.get_submodule(name).register_forward_hook(
            lambda _m, _i, out, name=name: outputs.setdefault(name, []).append(out.detach().numpy().copy())
        )
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with sl.observe(model, on_error="raise") as lens:
        lens.pipe(*operators).subscribe(found.append)
        for _ in range(2):
            model(torch.randn(20, 2, 6)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    return found, {name: np.concatenate(batches) for name, batches in outputs.items()}


def _needed(rows: np.ndarray[Any, Any]) -> float:
    """Of how many directions 99% of the variance are made, by singular values."""
    energy = np.linalg.svd(rows - rows.mean(0), compute_uv=False) ** 2
    return float((np.searchsorted(np.cumsum(energy), 0.99 * energy.sum()) + 1) / int(rows.shape[1]))


def test_saturation_counts_channels_of_a_convolution_over_sequences_and_features_of_a_matrix() -> None:
    (frame,), outputs = _watched(sl.layers("conv.*", "matrix.*"), sl.saturation(window=2))
    for layer, value in frame.to_dict().items():
        places = outputs[layer].swapaxes(1, 2) if layer.startswith("conv") else outputs[layer]
        assert value == pytest.approx(_needed(places.reshape(-1, places.shape[-1]).astype(float))), layer


def test_dead_units_of_a_window_are_channels_there_too() -> None:
    (frame,), outputs = _watched(sl.layers("conv.1"), sl.dead_fraction(window=2))
    assert frame.to_dict()["conv.1"] == pytest.approx((outputs["conv.1"] == 0).all((0, 2)).mean())
    assert len(outputs["conv.1"][0]) == 5


@pytest.mark.parametrize("metric", [sl.svcca, sl.linear_cka])
def test_representations_have_a_column_a_channel_there(metric: Any) -> None:
    probe = torch.randn(20, 2, 6, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(5)
    other = _Sequences()
    by_class, given, last = (
        [
            frame.to_dict()
            for frame in _watched(
                sl.layers("conv.1"), metric(probe, reference=other, places="each", unit_dim=dim)
            )[0]
        ]
        for dim in (None, 1, 2)
    )
    assert by_class == given
    assert by_class != last


def test_a_dimension_that_is_given_is_taken() -> None:
    (frame,), outputs = _watched(sl.layers("conv.0"), sl.saturation(window=2, unit_dim=2))
    rows = outputs["conv.0"].reshape(-1, outputs["conv.0"].shape[2]).astype(float)
    assert frame.to_dict()["conv.0"] == pytest.approx(_needed(rows))
