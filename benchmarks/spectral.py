"""What the spectral norm of a 1024 x 1024 matrix costs while it trains, beside the exact decomposition."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch
from reactivex.subject import Subject
from torch.nn import functional

import streamlens as sl
from benchmarks.models import mlp

__all__ = ["SpectralCost", "spectral_cost"]


@dataclass(frozen=True)
class SpectralCost:
    """Median CPU seconds a step, and the largest error.

    Attributes:
        exact: Of `torch.linalg.svdvals`.
        followed: Of `spectral_norm`.
        first: Of the first step, from a cold start.
        error: The largest relative error at the steps where both were computed.
    """

    exact: float
    followed: float
    first: float
    error: float


def spectral_cost(steps: int = 60) -> SpectralCost:
    """The middle layer of the MLP under Adam, its matrix out of the cache at each step."""
    torch.manual_seed(0)
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    teacher = torch.randn(784, 10)
    matrix = model.get_parameter("2.weight").detach()
    source: Subject[sl.Frame] = Subject()
    found: list[sl.Frame] = []
    source.pipe(sl.spectral_norm(residual=False)).subscribe(found.append)
    exact: list[float] = []
    followed: list[float] = []
    errors: list[float] = []
    for step in range(steps):
        x = torch.randn(128, 784)
        optimizer.zero_grad()
        functional.cross_entropy(model(x), (x @ teacher).argmax(1)).backward()
        optimizer.step()
        start = time.process_time()
        source.on_next(sl.Frame("weights", step, ("2",), (matrix,)))
        followed.append(time.process_time() - start)
        if step % 5 == 0 or step < 5:
            start = time.process_time()
            largest = float(torch.linalg.svdvals(matrix)[0])
            exact.append(time.process_time() - start)
            errors.append(abs(float(found[-1]["2"]) - largest) / largest)
    return SpectralCost(statistics.median(exact), statistics.median(followed), followed[0], max(errors))
