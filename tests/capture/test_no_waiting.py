"""Nothing waits for a device: on one that has no values, whoever asks for a value gets an exception.

PyTorch's `meta` device computes shapes only. A model trains there, and everything that would make the host
wait for an accelerator (`.item()`, a branch on a tensor, a copy to the host, a mask) raises. The tests
marked `gpu` say the same of CUDA, which knows of waits that are no reads.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import streamlens as sl
from streamlens.chain import ErrorReport
from streamlens.delivery.transfer import Burst
from tests.helpers import shipped
from tests.helpers.shipped import NAMES, chains_of

EVALUATES = {
    "adversarial_susceptibility",
    "fisher",
    "generalisation_gap",
    "gradient_covariance",
    "hessian_eigenvalues",
    "hessian_trace",
    "linear_cka",
    "loss_surface",
    "ntk",
    "sharpness",
    "svcca",
    "test_accuracy",
}
"""Operators that run the model themselves when they are due, and read what it gives."""
WHOLE = [name for name in NAMES if name not in EVALUATES]


@pytest.fixture(autouse=True)
def nothing_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies to the host never arrive, so that alerts, which are made of them, wait for ever."""
    monkeypatch.setattr(Burst, "arrived", False)
    # So is one topic of each moment.
    monkeypatch.setattr(
        shipped, "REDUCIBLE", ["activations", "layer_gradients", "weight_gradients", "weights"]
    )


def train(model: nn.Module, criterion: nn.Module, steps: int) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    x, y = torch.empty(6, 4, device="meta"), torch.empty(6, dtype=torch.long, device="meta")
    for step in range(steps):
        optimizer.zero_grad()
        # One step of two micro-batches is enough: shapes are computed slowly there.
        for part in (slice(0, 3), slice(3, 6))[: 1 if step else 2]:
            criterion(model(x[part]), y[part]).backward()
        optimizer.step()


def watched(*names: str, with_chain: Any = None) -> tuple[dict[str, int], list[ErrorReport]]:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU())
    criterion = nn.CrossEntropyLoss()
    reports: list[ErrorReport] = []
    counts = dict.fromkeys(names, 0)
    lens = sl.observe(model, loss=criterion)
    lens.errors.subscribe(reports.append)

    def note(_: object, name: str) -> None:
        counts[name] += 1

    for name in names:
        for chain in [with_chain] if with_chain else chains_of(name, lens, inputs=4):
            lens.pipe(*chain).subscribe(lambda frame, name=name: note(frame, name))
    train(model, criterion, 3)
    # As long as the model lives: the end of streams may read.
    return counts, list(reports)


def test_no_operator_reads_a_value_while_training() -> None:
    counts, reports = watched(*WHOLE)
    # An optimizer that lacks a state says so, and so does what needs micro-batches at every step.
    said = ("momentum_buffer", "this run has one a step")
    assert [str(r) for r in reports if not any(text in str(r) for text in said)] == []
    silent = {name for name, count in counts.items() if not count}
    waiting = {*sl.operators.alerts.__all__, "when", "flight_recorder", "per_epoch"}
    assert silent <= waiting, "an operator gives something, unless it waits for an alert or an epoch"


@pytest.mark.parametrize(
    "read",
    [
        lambda value: value.sum().item(),
        lambda value: 1.0 if value.sum() > 0 else 0.0,
        lambda value: value.sum().cpu(),
        lambda value: value[value > 0].sum(),
        lambda value: torch.tensor(value.norm().tolist()),
    ],
    ids=["item", "branch", "copy", "mask", "tolist"],
)
def test_the_device_tells_who_reads(read: Any) -> None:
    _, reports = watched("x", with_chain=[sl.reduce(read, "weights", name="x")])
    assert reports
