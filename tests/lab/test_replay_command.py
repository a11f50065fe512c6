"""`streamlens replay`, run as people run it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from streamlens.frame import Frame
from streamlens.lab.commands import app
from streamlens.runs import RunWriter, read_run

RATIOS = [[0.001, 0.004], [0.003, 0.002], [0.5, 0.7], [0.002, 0.006]]


def streamlens(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["replay", *(str(argument) for argument in arguments)])


def record(path: Path, run_id: str, factor: float = 1.0) -> None:
    with RunWriter(path, run_id) as writer:
        frames = [
            Frame("uw_ratio", step, ("a", "b"), factor * torch.tensor(row)) for step, row in enumerate(RATIOS)
        ]
        writer.write(frames, [1000.0 + step for step in range(len(frames))])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two runs in a folder each."""
    record(tmp_path / "runs" / "first" / "run.db", "aa" * 16)
    record(tmp_path / "runs" / "second" / "run.db", "bb" * 16, factor=10.0)
    return tmp_path / "runs"


def rows(result: Result) -> list[list[str]]:
    """The lines of a table, by what two spaces part."""
    assert result.exit_code == 0, result.output
    return [
        [cell.strip() for cell in line.split("  ") if cell.strip()] for line in result.stdout.splitlines()
    ]


def test_metrics_of_a_run_are_told_by_their_last_value_and_range(folder: Path) -> None:
    chains = ["topic(uw_ratio) | ema(0.5)", "topic(uw_ratio) | across_layers(max)"]
    result = streamlens("first", "--in", folder, *(w for c in chains for w in ("--metric", c)))
    # (0.5, 0.25, 0.125 weights) by hand: the average starts at the first value.
    smoothed = [torch.tensor(RATIOS[0])]
    for row in RATIOS[1:]:
        smoothed.append(0.5 * smoothed[-1] + 0.5 * torch.tensor(row))
    low, high = float(torch.stack(smoothed).min()), float(torch.stack(smoothed).max())
    last = float(smoothed[-1].mean())
    assert rows(result) == [
        ["Topic", "Frames", "Last (lowest to highest)"],
        ["uw_ratio.ema", "4", f"{last:.4g} ({low:.4g} to {high:.4g})"],
        ["uw_ratio.layer_max", "4", "0.006 (0.003 to 0.7)"],
    ]


def test_several_runs_are_told_apart(folder: Path) -> None:
    result = streamlens("first", "bb", "--in", folder, "--metric", "topic(uw_ratio) | across_layers(max)")
    assert rows(result)[1:] == [
        ["first", "uw_ratio.layer_max", "4", "0.006 (0.003 to 0.7)"],
        ["second", "uw_ratio.layer_max", "4", "0.06 (0.03 to 7)"],
    ]


def test_rules_judge_an_old_run_anew_and_those_that_lack_something_are_named(folder: Path) -> None:
    told = streamlens(
        "first", "--in", folder, "--metric", "ratio_out_of_band(band=(1e-4, 1e-2), start=(1, 1), every=1)"
    )
    assert "step 2: The update-to-weight ratio of a (0.5), b (0.7) is outside 0.0001 to 0.01" in told.stdout
    assert told.exit_code == 0
    default = streamlens(folder / "first", "--health")
    assert "left out loss_spike: it looks at 'loss', which was not stored" in default.stderr
    calm = streamlens("first", "--in", folder, "--metric", "ratio_out_of_band(band=(1e-9, 10.0))")
    assert calm.stdout == "nothing came of it: no alert, and no number\n"


def test_of_named_lenses_in_one_store_one_is_named(tmp_path: Path) -> None:
    with RunWriter(tmp_path / "gan" / "run.db", "cc" * 16, name="G") as writer:
        for name, value in {"G": 1.0, "D": 2.0}.items():
            writer.write([Frame(f"{name}/uw_ratio", 0, (f"{name}.a",), torch.tensor([value]))], [1000.0])
    # By the folder, though the run has a name of its own.
    asked = "gan", "--in", tmp_path, "--metric"
    assert rows(streamlens(*asked, "topic(uw_ratio)", "--lens", "D"))[1][:2] == ["D", "uw_ratio"]
    assert rows(streamlens(*asked, "topic(D/uw_ratio)"))[1][-1].startswith("2")
    wrong = streamlens(*asked, "topic(uw_ratio)", "--lens", "E")
    assert wrong.exit_code == 2
    assert "no lens of that name stored anything; lenses: 'G', 'D'" in " ".join(wrong.output.split())


def test_what_comes_of_it_is_recorded_where_a_folder_is_named(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "what"
    chain = "topic(uw_ratio) | across_layers(max)"
    result = streamlens("first", "--in", folder, "--metric", chain, "--out", out, "-v", "csv")
    assert result.exit_code == 0, result.output
    with read_run(out / "run.db") as run:
        stored = [float(frame.values[0]) for frame in run.frames("uw_ratio.layer_max")]
    assert stored == pytest.approx([max(row) for row in RATIOS])
    assert sorted(path.name for path in out.iterdir()) == ["report.html", "run.csv", "run.db"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["first"], "say what to run over it, or pass --health"),
        (["first", "--metric", "topic(uw_rati) | ema(0.9)"], "did you mean 'uw_ratio'"),
        (["first", "--metric", "emma(0.9)"], "did you mean 'ema'"),
        (["first", "--metric", "ema(0.9)"], "topic"),
        (["first", "--health", "-v", "csv"], "'csv' leaves a file: say where with --out"),
        (["third", "--health"], "no run 'third'"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line(folder: Path, arguments: list[str], message: str) -> None:
    result = streamlens(*arguments, "--in", folder)
    assert result.exit_code in (1, 2)
    assert message in " ".join(result.output.split())
    assert "Traceback" not in result.output
