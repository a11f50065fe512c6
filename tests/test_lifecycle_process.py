"""How a lens ends with the process, and with the notebook cell that made it."""

from __future__ import annotations

import logging
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn

import streamlens as sl
from tests._runs import small_model, steps_of

TRAIN = """
import sys
import torch
from torch import nn
import streamlens as sl
from streamlens.sink import Sink

class Slow(Sink):
    def write(self, frames):
        self.held = getattr(self, "held", []) + [f"{frame.topic} {frame.step}" for frame in frames]
    def close(self):
        open(sys.argv[1], "a").write("\\n".join(self.held) + "\\n")

model = nn.Linear(3, 2)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
lens = sl.observe(model)
lens.pipe(sl.norm("weights")).subscribe(Slow())
lens.pipe(sl.norm("weight_gradients"), sl.window(3, partial=True)).subscribe(Slow())
for step in range(5):
    optimizer.zero_grad()
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
"""

ENDINGS = {
    "falls off the end": ("", 0),
    "sys.exit": ("sys.exit(3)", 3),
    "exception": ("raise ValueError('diverged')", 1),
    "model is gone": ("del model, optimizer", 0),
    "lens is gone": ("del model, optimizer, lens", 0),
}


@pytest.mark.parametrize("ending", list(ENDINGS))
def test_sinks_have_written_everything_however_the_process_ends(ending: str, tmp_path: Path) -> None:
    code, expected = ENDINGS[ending]
    done = subprocess.run(
        [sys.executable, "-c", TRAIN + code, str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == expected, done.stderr
    lines = (tmp_path / "out").read_text().split("\n")
    assert [line for line in lines if line.startswith("weights.norm2")] == [
        f"weights.norm2 {step}" for step in range(5)
    ]
    assert [line.split()[-1] for line in lines if "gradients" in line] == ["2", "4"]
    if not code.startswith("raise"):
        assert done.stderr == ""


class Shell:
    """As much of an IPython shell as says which cell is running."""

    def __init__(self) -> None:
        self.execution_count = 1
        self.parent_header: dict[str, object] = {}

    def run(self, cell: str | None = None) -> None:
        """Begin the execution of a cell."""
        self.execution_count += 1
        self.parent_header = {"metadata": {"cellId": cell}} if cell else {}


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch) -> Shell:
    ipython, shell = types.ModuleType("IPython"), Shell()
    ipython.get_ipython = lambda: shell  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    return shell


def test_a_cell_run_again_closes_its_earlier_lens(shell: Shell, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="streamlens")
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    steps: list[int] = []
    lenses: list[sl.Lens] = []
    for _ in range(3):
        shell.run("abc")
        lens = sl.observe(model)
        lens.pipe(sl.norm("weights")).subscribe(lambda frame: steps.append(frame.step))
        lenses.append(lens)
        list(steps_of(model, optimizer, 1))
    assert [lens.closed for lens in lenses] == [True, True, False]
    assert steps == [0, 1, 2]
    assert len([r for r in caplog.records if "notebook cell" in r.getMessage()]) == 2
    lenses[-1].close()


def test_a_cell_run_again_closes_its_earlier_lens_of_a_model_made_anew(shell: Shell) -> None:
    models = [small_model(), small_model()]
    lenses = []
    for model in models:
        shell.run("abc")
        lenses.append(sl.observe(model))
    assert [lens.closed for lens in lenses] == [True, False]
    lenses[-1].close()


def test_two_lenses_of_one_execution_and_lenses_of_other_cells_stay(shell: Shell) -> None:
    first, second = small_model(), small_model()
    shell.run("abc")
    lenses = [sl.observe(first), sl.observe(first), sl.observe(second)]
    shell.run("def")
    lenses.append(sl.observe(first))
    assert not any(lens.closed for lens in lenses)
    for lens in lenses:
        lens.close()


def test_without_a_cell_id_the_cells_code_tells_it(shell: Shell) -> None:
    def run(code: str) -> sl.Lens:
        """Run code as ipykernel does: its hash is in the file name."""
        shell.run()
        scope: dict[str, object] = {"sl": sl, "model": model}
        exec(compile(code, f"/tmp/ipykernel_4711/{abs(hash(code))}.py", "exec"), scope)
        lens = scope["lens"]
        assert isinstance(lens, sl.Lens)
        return lens

    model = nn.Linear(2, 2)
    first = run("lens = sl.observe(model)")
    other = run("lens = sl.observe(model)  # another cell")
    assert [lens.closed for lens in (first, other)] == [False, False]
    again = run("lens = sl.observe(model)")
    assert [lens.closed for lens in (first, other)] == [True, False]
    for lens in (other, again):
        lens.close()


def test_outside_a_notebook_every_lens_stays() -> None:
    model = small_model()
    lenses = [sl.observe(model) for _ in range(2)]
    assert not any(lens.closed for lens in lenses)
    for lens in lenses:
        lens.close()
