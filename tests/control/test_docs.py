"""The page on controllers: it has all of them, and its lines run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import streamlens as sl
from tests._runs import small_model, steps_of
from tests.control._cases import CONTROLLERS

PAGE = (Path(__file__).parents[2] / "docs" / "control.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
LINES = [line for line in BLOCKS[1].splitlines() if line]


@pytest.mark.parametrize("name", CONTROLLERS)
def test_each_controller_has_a_row_and_a_line(name: str) -> None:
    assert re.search(rf"^\| `{name}[`(]", PAGE, re.MULTILINE)
    assert any(f"subscribe(sl.control.{name}(" in line for line in LINES)


@pytest.mark.parametrize("line", LINES, ids=lambda line: line.split("sl.control.")[-1].partition("(")[0])
def test_each_line_runs_in_training(line: str) -> None:
    model, criterion = small_model(), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with sl.observe(model, loss=criterion, emits=["validation_loss"], on_error="raise") as lens:
        exec(line, {"lens": lens, "sl": sl})
        for _ in range(2):
            optimizer.zero_grad()
            for _ in range(2):
                (criterion(model(torch.ones(4, 4)), torch.tensor([0, 1, 2, 0])) / 2).backward()
            optimizer.step()


def test_its_example_of_freezing_freezes_nothing_that_moves_and_runs() -> None:
    (block,) = (block for block in BLOCKS if "svcca" in block)
    model, probe = small_model(), torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
    with sl.observe(model, on_error="raise") as lens:
        exec(block, {"lens": lens, "sl": sl, "probe": probe})
        list(steps_of(model, torch.optim.SGD(model.parameters(), lr=0.1), 2))
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_its_first_example_runs() -> None:
    exec(BLOCKS[0], {"sl": sl, "model": small_model(), "criterion": nn.CrossEntropyLoss()})
