"""ZCA whitening, against NumPy and by what it promises."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from streamlens.lab import ZCA, load_dataset, whiten


def correlated(examples: int = 400) -> Tensor:
    """Images whose 2 x 3 x 3 pixels are mixed, with means of their own."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(18, 18, generator=generator)
    return (torch.randn(examples, 18, generator=generator) @ mixing + 3).reshape(examples, 2, 3, 3)


def covariance(images: Tensor) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    return np.cov(images.flatten(1).double().numpy(), rowvar=False, bias=True)


def test_the_covariance_becomes_the_identity_and_the_mean_0() -> None:
    images = correlated()
    white = ZCA.fit(images, epsilon=0)(images)
    assert white.shape == images.shape
    np.testing.assert_allclose(covariance(white), np.eye(18), atol=1e-3)
    np.testing.assert_allclose(white.mean(0).numpy(), 0, atol=1e-4)


def test_the_map_is_the_inverse_square_root_of_the_covariance() -> None:
    images = correlated()
    values, vectors = np.linalg.eigh(covariance(images))
    expected = vectors @ np.diag((values + 0.5) ** -0.5) @ vectors.T
    zca = ZCA.fit(images, epsilon=0.5)
    np.testing.assert_allclose(zca.matrix.numpy(), expected, atol=1e-4)
    np.testing.assert_allclose(zca.matrix.numpy(), zca.matrix.T.numpy(), atol=1e-6)


def test_of_all_maps_that_whiten_it_changes_images_the_least() -> None:
    images = correlated()
    zca = ZCA.fit(images, epsilon=0)
    flat = images.flatten(1) - zca.mean
    turn = torch.linalg.qr(torch.randn(18, 18, generator=torch.Generator().manual_seed(1)))[0]
    change = (flat @ zca.matrix - flat).square().sum()
    assert change < (flat @ zca.matrix @ turn - flat).square().sum()


def test_epsilon_leaves_directions_a_variance_of_l_over_l_plus_epsilon() -> None:
    images = correlated()
    values = np.linalg.eigvalsh(covariance(images))
    white = np.linalg.eigvalsh(covariance(ZCA.fit(images, epsilon=2.0)(images)))
    np.testing.assert_allclose(white, values / (values + 2.0), atol=1e-3)


def test_images_in_blocks_have_the_covariance_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    images = correlated()
    whole = ZCA.fit(images)
    monkeypatch.setattr("streamlens.lab.data.whitening._BLOCK", 7)
    torch.testing.assert_close(ZCA.fit(images).matrix, whole.matrix)


def test_directions_without_variance_need_an_epsilon() -> None:
    with pytest.raises(ValueError, match="10 images do not vary in all 18 directions: give an epsilon"):
        ZCA.fit(correlated(10), epsilon=0)
    assert torch.isfinite(ZCA.fit(correlated(10))(correlated(10))).all()


@pytest.mark.parametrize("epsilon", [-0.1, float("nan"), float("inf")])
def test_a_bad_epsilon_is_an_error(epsilon: float) -> None:
    with pytest.raises(ValueError, match="epsilon must be finite and at least 0"):
        ZCA.fit(correlated(), epsilon)


def test_no_images_are_an_error() -> None:
    with pytest.raises(ValueError, match="at least 1 image"):
        ZCA.fit(torch.zeros(0, 1, 2, 2))


def test_a_whitened_data_set_is_whitened_by_its_training_images_and_the_original_stays() -> None:
    data = load_dataset("digits", image_size=8)
    before = data.train.tensors[0].clone()
    white = whiten(data, epsilon=1e-2)
    assert torch.equal(data.train.tensors[0], before)
    zca = ZCA.fit(before, epsilon=1e-2)
    for split, original in ((white.train, data.train), (white.test, data.test)):
        torch.testing.assert_close(split.tensors[0], zca(original.tensors[0]))
        assert torch.equal(split.tensors[1], original.tensors[1])
    assert (white.name, white.classes, white.channels, white.image_size) == ("digits", 10, 3, 8)
