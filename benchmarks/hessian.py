"""What the five largest eigenvalues of a loss's Hessian cost in training, in gradients of the same batch."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch
from reactivex.subject import Subject
from torch import Tensor, nn

import streamlens as sl

__all__ = ["HessianCost", "hessian_cost"]


@dataclass(frozen=True)
class HessianCost:
    """Medians over the evaluations.

    Attributes:
        gradient: CPU seconds of one gradient over the batch.
        evaluation: CPU seconds of an evaluation.
        products: Hessian-vector products taken.
        error: The largest relative error of an eigenvalue that is said to have converged, beside three times
            as many products.
    """

    gradient: float
    evaluation: float
    products: float
    error: float


def hessian_cost(evaluations: int = 4) -> HessianCost:
    """A convolutional network of 38,000 parameters under Adam, evaluated on 256 examples every 50 steps."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10)),
    )
    loss = nn.CrossEntropyLoss()
    teacher = torch.randn(64, 10)

    def batch(examples: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(examples, 1, 8, 8)
        return x, (x.flatten(1) @ teacher).argmax(1)

    fixed = batch(256)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    source: Subject[sl.Frame] = Subject()
    found: list[sl.Frame] = []
    closer: list[sl.Frame] = []
    for products, tolerance, into in ((40, 1e-3, found), (120, 1e-5, closer)):
        chain = sl.hessian_eigenvalues(
            5, loss=loss, batch=fixed, products=products, tolerance=tolerance, model=model
        )
        source.pipe(sl.topic(f"at most {products}"), chain).subscribe(into.append)
    gradient: list[float] = []
    evaluation: list[float] = []
    for step in range(50 * evaluations):
        x, y = batch(64)
        optimizer.zero_grad()
        loss(model(x), y).backward()
        optimizer.step()
        if step % 50 != 49:
            continue
        start = time.process_time()
        torch.autograd.grad(loss(model.eval()(fixed[0]), fixed[1]), list(model.parameters()))
        gradient.append(time.process_time() - start)
        model.train()
        start = time.process_time()
        source.on_next(sl.Frame("at most 40", step, ("",), torch.zeros(1)))
        evaluation.append(time.process_time() - start)
        source.on_next(sl.Frame("at most 120", step, ("",), torch.zeros(1)))
    errors = [
        abs(ours - theirs) / theirs
        for frame, reference in zip(found, closer, strict=True)
        for ours, theirs, residual in zip(
            frame[""].tolist(), reference[""].tolist(), frame.meta["residuals"], strict=True
        )
        if residual <= 1e-3 * ours
    ]
    return HessianCost(
        statistics.median(gradient),
        statistics.median(evaluation),
        statistics.median(frame.meta["products"] for frame in found),
        max(errors),
    )
