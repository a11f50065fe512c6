"""What `make` would do, on checkouts in every state."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# As typed into a new terminal, whatever make and variables run this test.
ENVIRONMENT = {
    name: value
    for name, value in os.environ.items()
    if not name.startswith(("MAKE", "MFLAGS")) and name not in ("PYTHON", "PYTEST_ARGS", "TORCH_INDEX_URL")
}

TORCH = "--constraint constraints.txt torch"
LAB = '".[lab]"'
DEV = '".[dev]"'


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for name in ("Makefile", "constraints.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
        os.utime(tmp_path / name, (1000, 1000))
    return tmp_path


def make_venv(checkout: Path, *stamps: str) -> None:
    interpreter = checkout / ".venv" / "bin" / "python"
    interpreter.parent.mkdir(parents=True)
    interpreter.touch()
    os.utime(interpreter, (500, 500))
    for age, stamp in enumerate(stamps):
        path = checkout / ".venv" / f".{stamp}-installed"
        path.touch()
        os.utime(path, (2000 + age, 2000 + age))


def plan(checkout: Path, target: str, *variables: str) -> list[str]:
    """The commands that `make` would run."""
    run = subprocess.run(
        ["make", "--no-print-directory", "-n", target, *variables],
        cwd=checkout,
        env=ENVIRONMENT,
        check=True,
        capture_output=True,
        text=True,
    )
    return [line for line in run.stdout.splitlines() if not line.startswith(("echo", "touch"))]


def steps(commands: list[str]) -> list[str]:
    """What of the set-up is among them, in order."""
    known = {
        "-m venv": "venv",
        TORCH: "torch",
        LAB: "lab",
        DEV: "dev",
        " train ": "train",
        "/pytest ": "pytest",
    }
    return [known[key] for line in commands for key in known if key in line]


def test_the_demo_on_a_fresh_checkout_sets_up_what_it_needs_and_no_more(checkout: Path) -> None:
    assert steps(plan(checkout, "demo")) == ["venv", "torch", "lab", "train"]


def test_the_tests_on_a_fresh_checkout_set_up_everything(checkout: Path) -> None:
    assert steps(plan(checkout, "test")) == ["venv", "torch", "dev", "pytest"]


def test_a_virtual_environment_of_unknown_contents_is_brought_up_to_date(checkout: Path) -> None:
    make_venv(checkout)
    assert steps(plan(checkout, "demo")) == ["torch", "lab", "train"]
    assert steps(plan(checkout, "test")) == ["torch", "dev", "pytest"]


def test_a_complete_set_up_is_left_alone(checkout: Path) -> None:
    make_venv(checkout, "torch", "lab", "dev")
    assert steps(plan(checkout, "demo")) == ["train"]
    assert steps(plan(checkout, "test")) == ["pytest"]


def test_the_tests_add_to_what_the_demo_set_up(checkout: Path) -> None:
    make_venv(checkout, "torch", "lab")
    assert steps(plan(checkout, "test")) == ["dev", "pytest"]


def test_a_change_of_the_requirements_updates_the_set_up(checkout: Path) -> None:
    make_venv(checkout, "torch", "lab", "dev")
    os.utime(checkout / "pyproject.toml", (3000, 3000))
    assert steps(plan(checkout, "demo")) == ["lab", "train"]
    assert steps(plan(checkout, "test")) == ["dev", "pytest"]
    os.utime(checkout / "constraints.txt", (3000, 3000))
    assert steps(plan(checkout, "test")) == ["torch", "dev", "pytest"]


def test_a_virtual_environment_whose_interpreter_is_gone_is_made_anew(checkout: Path) -> None:
    make_venv(checkout, "torch", "lab", "dev")
    interpreter = checkout / ".venv" / "bin" / "python"
    interpreter.unlink()
    interpreter.symlink_to("/nowhere/python3.11")
    assert steps(plan(checkout, "demo")) == ["venv", "torch", "lab", "train"]


def test_a_variable_names_the_index_torch_comes_from_and_only_torch(checkout: Path) -> None:
    commands = plan(checkout, "test", "TORCH_INDEX_URL=https://index.example/cpu")
    with_index = [line for line in commands if "--index-url https://index.example/cpu" in line]
    assert steps(with_index) == ["torch"]
    assert not any("index-url" in line for line in plan(checkout, "test"))


def test_the_demo_trains_alexnet_mini_on_digits_into_a_visible_folder(checkout: Path) -> None:
    command = " ".join(plan(checkout, "demo")[-2:])
    for option in (
        "--model AlexNetMini", "--dataset digits", "--epochs 10", "--optimizer Adam", "--learning-rate 3e-3",
        "--ratio", "--norm", "--train-accuracy", "--test-accuracy", "--out runs/demo",
    ):  # fmt: skip
        assert option in command


def test_the_experiments_are_all_run_with_the_arguments_given(checkout: Path) -> None:
    make_venv(checkout, "torch", "lab", "dev")
    [loop] = plan(checkout, "experiments", "EXPERIMENT_ARGS=--smoke")[:1]
    for name in ("adam_moments", "ratio_schedule", "ratio_vs_loss", "curvature", "layer_freezing"):
        assert name in loop
    assert "open_questions" in loop
    assert "--smoke || exit 1" in "".join(plan(checkout, "experiments", "EXPERIMENT_ARGS=--smoke"))


def test_lint_checks_style_format_and_types(checkout: Path) -> None:
    make_venv(checkout, "torch", "lab", "dev")
    commands = plan(checkout, "lint")
    assert [line.removeprefix(".venv/bin/") for line in commands] == [
        "ruff check .",
        "ruff format --check .",
        "mypy",
    ]


def test_a_failing_tool_fails_make(checkout: Path) -> None:
    make_venv(checkout, "torch", "lab", "dev")
    tool = checkout / ".venv" / "bin" / "ruff"
    tool.write_text("#!/bin/sh\nexit 3\n")
    tool.chmod(0o755)
    run = subprocess.run(["make", "lint"], cwd=checkout, env=ENVIRONMENT, capture_output=True, check=False)
    assert run.returncode != 0
