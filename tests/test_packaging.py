"""What is installed is what the project says it is."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import streamlens

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], list[str]]:
    """The names in the wheel, and in the source distribution without its leading folder."""
    out = tmp_path_factory.mktemp("dist")
    for target in ("sdist", "wheel"):
        # From the checkout both times: the wheel must not depend on the links being left out before.
        command = [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(out)]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    with zipfile.ZipFile(next(out.glob("*.whl"))) as wheel:
        in_wheel = wheel.namelist()
    with tarfile.open(next(out.glob("*.tar.gz"))) as sdist:
        assert not [m.name for m in sdist.getmembers() if m.issym() or m.islnk()]
        in_sdist = [name.partition("/")[2] for name in sdist.getnames()]
    return in_wheel, in_sdist


def package_files() -> set[str]:
    """Every file of the package that git knows, or would add."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "streamlens"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode:  # not a checkout
        files = [p for p in (ROOT / "streamlens").rglob("*") if p.is_file() and "__pycache__" not in p.parts]
        return {p.relative_to(ROOT).as_posix() for p in files}
    return {name for name in listed.stdout.splitlines() if (ROOT / name).exists()}


def test_the_wheel_holds_each_file_of_the_package_once_and_nothing_else(
    archives: tuple[list[str], list[str]],
) -> None:
    in_wheel, _ = archives
    assert [name for name, count in Counter(in_wheel).items() if count > 1] == []
    assert {name for name in in_wheel if ".dist-info/" not in name} == package_files()


def test_the_source_distribution_holds_each_file_once_and_not_the_links(
    archives: tuple[list[str], list[str]],
) -> None:
    _, in_sdist = archives
    assert [name for name, count in Counter(in_sdist).items() if count > 1] == []
    assert package_files() <= set(in_sdist)
    assert not [name for name in in_sdist if name.startswith(("operators/", "sinks/", ".venv/", "runs/"))]
    assert {"LICENSE", "Makefile", "README.md", "constraints.txt", "pyproject.toml"} <= set(in_sdist)


def test_the_wheel_carries_types_licence_and_the_vega_bundle_with_its_licences(
    archives: tuple[list[str], list[str]],
) -> None:
    in_wheel, _ = archives
    assert "streamlens/py.typed" in in_wheel
    assert any(name.endswith("licenses/LICENSE") for name in in_wheel)
    vega = [name for name in in_wheel if name.startswith("streamlens/views/vega/")]
    assert any(name.endswith(".js") for name in vega)
    assert any("licen" in name.lower() for name in vega)


def test_the_installed_version_is_the_one_the_package_names() -> None:
    assert metadata.version("streamlens") == streamlens.__version__


def test_the_root_links_lead_into_the_package() -> None:
    for name in ("operators", "sinks"):
        link = ROOT / name
        assert link.is_symlink()
        assert os.readlink(link) == f"streamlens/{name}"


@pytest.mark.parametrize(
    "command",
    [
        ["ruff", "check", ".", "--show-files"],
        [
            "pytest",
            "--collect-only",
            "-q",
            "-p",
            "no:cacheprovider",
            "tests/test_architecture.py",
            "operators",
        ],
    ],
    ids=["ruff", "pytest"],
)
def test_tools_see_nothing_through_the_root_links(command: list[str]) -> None:
    run = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.stdout
    seen = {line.removeprefix(f"{ROOT}/") for line in run.stdout.splitlines()}
    assert not [line for line in seen if line.startswith(("operators/", "sinks/"))]


def requirements(extra: str = "") -> dict[str, Requirement]:
    """What is required without an extra, or beyond that by one."""
    found = {}
    for line in metadata.requires("streamlens") or ():
        requirement = Requirement(line)
        with_extra = requirement.marker is None or requirement.marker.evaluate({"extra": extra})
        without = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if with_extra and (not extra or not without):
            found[requirement.name] = requirement
    return found


def test_the_package_asks_for_torch_from_2_6_and_no_particular_build() -> None:
    core = requirements()
    assert set(core) == {"torch", "reactivex", "numpy", "pandas", "altair"}
    assert str(core["torch"].specifier) == ">=2.6"
    assert core["reactivex"].specifier.contains("6.1.0")
    assert not core["reactivex"].specifier.contains("7.0.0")


def test_the_lab_extra_brings_what_the_command_line_imports() -> None:
    lab = requirements("lab")
    assert {"scikit-learn", "rich", "typer", "joblib"} <= set(lab)
    assert "tensorboard" in lab or "tensorboard" in lab["streamlens"].extras
    assert "pytest" not in lab


def test_the_development_set_up_pins_torch() -> None:
    pinned = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line[:1] not in "#"]
    assert "torch==2.13.0" in pinned


def test_continuous_integration_runs_lint_and_tests_and_nothing_else() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    commands = [line for line in script.read_text().splitlines() if line and not line.startswith("#")]
    assert commands[0] == "set -euo pipefail"
    assert commands[-2:] == ["make lint", "make test"]
    assert len(commands) == 4
