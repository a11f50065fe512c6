"""The README's examples are run as they stand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)


class Attention(nn.Module):
    """A module with the names that the README's globs select."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.ModuleDict({"q": nn.Linear(4, 4)})
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.attn["q"](x)))  # type: ignore[no-any-return]


def test_the_examples_run_in_the_order_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    model = nn.Sequential(nn.ModuleDict({"encoder": Attention()})["encoder"])
    optimizer = torch.optim.Adam(model.parameters())
    x, y = torch.randn(8, 4), torch.randint(0, 3, (8,))
    names: dict[str, Any] = {"model": model, "optimizer": optimizer, "loader": [(x, y)] * 50, "nn": nn}
    assert len(BLOCKS) >= 4
    for block in BLOCKS:
        exec(compile(block, "README.md", "exec"), names)
        if not names["lens"].closed:
            for _ in range(12):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x), y).backward()
                optimizer.step()
        else:
            import streamlens as sl

            names["lens"] = sl.observe(model)
    names["lens"].close()
    assert next(iter((tmp_path / "runs" / "mine").glob("events*"))).stat().st_size > 0
    assert "weights.sparsity" in capsys.readouterr().out
