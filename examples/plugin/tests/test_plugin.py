"""What the package brings does what it says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn

import streamlens as sl
from streamlens_example import CsvFile, crest_factor


def test_the_crest_factor_of_gradients_is_numpys_and_the_file_holds_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with sl.observe(model) as lens:
        lens.pipe(crest_factor()).subscribe(CsvFile(tmp_path / "out.csv"))
        model(torch.randn(4, 3)).square().sum().backward()
        optimizer.step()
        assert model.weight.grad is not None
        gradient = model.weight.grad.numpy().astype(np.float64)
    expected = np.abs(gradient).max() / np.sqrt(np.mean(gradient**2))
    [(topic, layer, step, value)] = [
        line.split(",") for line in (tmp_path / "out.csv").read_text().splitlines()
    ]
    assert (topic, layer, step) == ("weight_gradients.crest_factor", "", "0")
    np.testing.assert_allclose(float(value), expected, rtol=1e-6)
