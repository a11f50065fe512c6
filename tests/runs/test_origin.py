"""What a run store says of the process that began a run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from streamlens.frame import Frame
from streamlens.runs import read_run
from streamlens.runs.origin import git_commit, origin
from streamlens.sink import RunInfo
from streamlens.sinks.run_store import RunStore

needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")


def git(folder: Path, *arguments: str) -> str:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    identity = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
    done = subprocess.run(
        ["git", *identity, *arguments],
        cwd=folder, env=environment, capture_output=True, text=True, check=True, timeout=30,
    )  # fmt: skip
    return done.stdout.strip()


@needs_git
def test_the_commit_is_the_one_git_names_on_a_branch_packed_detached_and_in_a_worktree(
    tmp_path: Path,
) -> None:
    repository = tmp_path / "repository"
    (repository / "deep").mkdir(parents=True)
    git(repository, "init", "-q")
    git(repository, "commit", "-q", "--allow-empty", "-m", "first")
    first = git(repository, "rev-parse", "HEAD")
    assert git_commit(repository / "deep") == first
    git(repository, "pack-refs", "--all")
    assert git_commit(repository) == first
    git(repository, "worktree", "add", "-q", "-b", "other", str(tmp_path / "other"))
    git(tmp_path / "other", "commit", "-q", "--allow-empty", "-m", "second")
    second = git(tmp_path / "other", "rev-parse", "HEAD")
    assert second != first
    assert git_commit(tmp_path / "other") == second
    git(repository, "checkout", "-q", "--detach", second)
    assert git_commit(repository) == second


def test_there_is_no_commit_outside_a_repository_before_the_first_or_where_git_is_broken(
    tmp_path: Path,
) -> None:
    assert git_commit(tmp_path) is None
    (tmp_path / ".git").mkdir()
    assert git_commit(tmp_path) is None
    (tmp_path / ".git" / "HEAD").write_text("ref: refs/heads/main\n")
    assert git_commit(tmp_path) is None


def test_a_run_says_which_command_began_it_where_and_with_what(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train it.py", "--lr", "0.1"])
    store = RunStore("run.db")
    store.open(RunInfo(id="a"))
    store.write([Frame("loss", 0, ("",), torch.zeros(1))])
    store.close()
    with read_run("run.db") as run:
        found = run.origin
        assert dict(run.metadata) == {}
    assert found["command"] == f"{sys.executable} 'train it.py' --lr 0.1"
    assert found["folder"] == str(tmp_path)
    assert found["git_commit"] is None
    assert found["torch"] == str(torch.__version__)
    assert found["machine"]["cpus"] == os.cpu_count()
    assert found["machine"]["accelerators"] == []


def test_the_origin_is_known_also_where_the_working_folder_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone() -> Path:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "cwd", gone)
    monkeypatch.setattr(sys, "argv", [""])
    assert origin()["folder"] == ""
