"""The run store among processes: kills, readers beside a writer, full and read-only disks."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from streamlens.runs import RunWriter
from streamlens.runs.lock import is_written
from tests.runs.scripts import batch

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="kills and mounts as Unix knows them")

ROOT = Path(__file__).parents[2]
NAMESPACE = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-ec"]
"""Runs a shell command where what it mounts is seen by nobody else and gone with it."""


def run_script(name: str, folder: Path, setup: str = "") -> dict[str, Any]:
    """Run a script of `tests.runs.scripts`; after `setup`, in a mount namespace of its own."""
    command = [sys.executable, "-m", "tests.runs.scripts", name, str(folder)]
    if setup:
        command = [*NAMESPACE, f"{setup}\n{shlex.join(command)}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def may_mount() -> bool:
    if shutil.which("unshare") is None:
        return False
    trial = f"mount -t tmpfs tmpfs {shlex.quote(tempfile.gettempdir())}"
    return subprocess.run([*NAMESPACE, trial], capture_output=True, check=False).returncode == 0


needs_mounts = pytest.mark.skipif(not may_mount(), reason="needs to mount file systems of its own")


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_script("killed", tmp_path_factory.mktemp("killed"))


def test_after_any_kill_every_committed_frame_is_there_and_whole(killed: dict[str, Any]) -> None:
    for kill in killed["kills"]:
        # The process may have died between committing a batch and saying so.
        assert kill["found"] in (kill["committed"], kill["committed"] + 10)


def test_after_any_kill_the_next_run_begins_in_the_same_file(killed: dict[str, Any]) -> None:
    assert killed["runs"] == [f"run{i}" for i in range(len(killed["kills"]))]


def test_a_reader_sees_a_growing_run_whole_while_another_process_writes_it(killed: dict[str, Any]) -> None:
    for kill in killed["kills"]:
        assert kill["seen"] == sorted(kill["seen"])
        assert all(count > 0 for count in kill["seen"])
    assert any(len(set(kill["seen"])) > 1 for kill in killed["kills"])


def test_a_second_process_is_refused_with_the_first_ones_number(killed: dict[str, Any]) -> None:
    assert all(kill["refused"] for kill in killed["kills"])


@needs_mounts
def test_a_disk_that_is_full_loses_what_was_refused_and_nothing_else(tmp_path: Path) -> None:
    seen = run_script("full", tmp_path, f"mount -t tmpfs -o size=3m tmpfs {shlex.quote(str(tmp_path))}")
    assert len(set(seen["errors"])) == 1
    assert "the disk is full" in seen["errors"][0]
    assert seen["while full"] == seen["written"] > 0
    assert seen["after"] == seen["written"] + 10


@needs_mounts
def test_a_folder_that_cannot_be_written_is_read_whole_and_not_written(tmp_path: Path) -> None:
    with RunWriter(tmp_path / "closed.db", "a") as writer:
        writer.write(batch(0))
    with RunWriter(tmp_path / "open.db", "a") as writer:
        writer.write(batch(0))
        writer.write(batch(1))
        # What a kill would leave: the file and its log, not yet merged.
        for suffix in ("", "-wal"):
            shutil.copy(f"{tmp_path / 'open.db'}{suffix}", f"{tmp_path / 'killed.db'}{suffix}")
    folder = shlex.quote(str(tmp_path))
    seen = run_script(
        "read_only", tmp_path, f"mount --bind {folder} {folder}\nmount -o remount,ro,bind {folder}"
    )
    assert seen["closed.db"] == 10
    assert seen["killed.db"] == 20
    assert seen["unchanged"]
    for name in ("closed.db", "new.db"):
        assert f"cannot write {tmp_path / name}: Read-only file system" in seen[f"refusal of {name}"]
        assert "another path" in seen[f"refusal of {name}"]


def test_whether_a_store_is_written_is_seen_without_keeping_a_writer_out(tmp_path: Path) -> None:
    path = tmp_path / "run.db"
    assert not is_written(path)
    with RunWriter(path, "first"):
        assert is_written(path)
    assert not is_written(path)
    # A note that a killed writer left: of a process that is no more, and of nobody.
    command = [sys.executable, "-c", "import os; print(os.getpid())"]
    said = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    lock = Path(f"{path}-lock")
    for note, written in (
        (f"{said.stdout.decode().strip()} {socket.gethostname()}", False),
        (f"{os.getpid()} {socket.gethostname()}", True),
        ("1 another-machine", True),
        ("", False),
        ("x y", False),
        (f"{10**30} {socket.gethostname()}", False),
    ):
        lock.write_text(note)
        assert is_written(path) is written, note
