"""Delivery and its process: exit, SIGTERM and forks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from reactivex import Subject

from streamlens.delivery import Delivery
from streamlens.frame import Frame
from streamlens.sink import RunInfo, Sink

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs POSIX processes"),
    # Python 3.12 and later warn of the very thing that is tested here.
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]


class File(Sink):
    """Appends `<process> <step>` lines to a file."""

    def __init__(self, path: Path, latency: float = 60.0) -> None:
        self.path = path
        self.max_latency = latency

    def write(self, frames: Sequence[Frame]) -> None:
        with self.path.open("a") as file:
            file.writelines(f"{os.getpid()} {frame.step}\n" for frame in frames)

    def close(self) -> None:
        with self.path.open("a") as file:
            file.write(f"{os.getpid()} closed\n")


def frame(step: int) -> Frame:
    return Frame("loss", step, ("",), torch.zeros(1))


def make_delivery() -> Delivery:
    return Delivery(lambda: RunInfo("id"), lambda error, where: None)


def in_child(body: Callable[[], Any]) -> int:
    """Run `body` in a forked child; its wait status. A failure exits with 70."""
    pid = os.fork()
    if pid == 0:
        try:
            body()
        except BaseException:
            os._exit(70)
        os._exit(0)
    return os.waitpid(pid, 0)[1]


def lines(path: Path) -> list[tuple[int, str]]:
    if not path.exists():
        return []
    return [(int(pid), what) for pid, what in (line.split() for line in path.read_text().splitlines())]


@pytest.fixture
def delivery() -> Iterator[Delivery]:
    delivery = make_delivery()
    yield delivery
    delivery.close(5)


def test_a_fork_exports_only_its_own(delivery: Delivery, tmp_path: Path) -> None:
    inherited, own = File(tmp_path / "inherited"), File(tmp_path / "own")
    proxy = delivery.connect(inherited, "chain")
    proxy.on_next(frame(0))

    def child() -> None:
        assert threading.active_count() == 1
        proxy.on_next(frame(1))
        assert delivery.flush(1)
        assert delivery.close(1)
        assert threading.active_count() == 1, "what was inherited starts no thread"
        mine = make_delivery()
        mine.connect(own, "chain").on_next(frame(2))
        assert mine.close(5)

    assert in_child(child) == 0
    assert lines(inherited.path) == []
    assert [what for _, what in lines(own.path)] == ["2", "closed"]
    proxy.on_next(frame(3))
    assert delivery.close(5)
    assert lines(inherited.path) == [(os.getpid(), "0"), (os.getpid(), "3"), (os.getpid(), "closed")]


def test_a_plain_observable_of_the_parent_is_silent_in_a_child(tmp_path: Path) -> None:
    sink, subject = File(tmp_path / "file"), Subject[Frame]()
    subject.subscribe(sink)
    subject.on_next(frame(0))

    def child() -> None:
        subject.on_next(frame(1))
        assert sink.drain(1)
        subject.on_completed()

    assert in_child(child) == 0
    subject.on_completed()
    deadline = time.monotonic() + 5
    while len(lines(sink.path)) < 2 and time.monotonic() < deadline:
        time.sleep(0.002)
    assert [what for _, what in lines(sink.path)] == ["0", "closed"]


def test_a_fork_in_the_middle_of_everything_does_not_hang(delivery: Delivery, tmp_path: Path) -> None:
    proxy = delivery.connect(File(tmp_path / "busy", latency=0.0), "chain")
    stop = threading.Event()

    def emit() -> None:
        step = 0
        while not stop.is_set():
            proxy.on_next(frame(step))
            step += 1

    def child() -> None:
        signal.alarm(5)
        mine = make_delivery()
        mine.connect(File(tmp_path / "own"), "chain").on_next(frame(0))
        assert mine.close(3)
        assert delivery.close(3)

    emitter = threading.Thread(target=emit)
    emitter.start()
    try:
        assert [in_child(child) for _ in range(3)] == [0, 0, 0]
    finally:
        stop.set()
        emitter.join()


def test_sigterm_flushes_closes_and_still_terminates(tmp_path: Path) -> None:
    path = tmp_path / "file"

    def child() -> None:
        proxy = make_delivery().connect(File(path), "chain")
        for step in range(3):
            proxy.on_next(frame(step))
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    status = in_child(child)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGTERM
    assert [what for _, what in lines(path)] == ["0", "1", "2", "closed"]


def test_sigterm_terminates_in_time_though_a_sink_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Hanging(File):
        def write(self, frames: Sequence[Frame]) -> None:
            time.sleep(30)

    monkeypatch.setattr("streamlens.delivery.process._SIGTERM_TIMEOUT", 0.1)

    def child() -> None:
        make_delivery().connect(Hanging(tmp_path / "file"), "chain").on_next(frame(0))
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    start = time.monotonic()
    assert os.WTERMSIG(in_child(child)) == signal.SIGTERM
    assert time.monotonic() - start < 3


def test_sigterm_keeps_a_handler_of_the_user() -> None:
    def child() -> None:
        caught: list[int] = []
        signal.signal(signal.SIGTERM, lambda signum, _: caught.append(signum))
        delivery = make_delivery()
        delivery.connect(Discard(), "chain").on_next(frame(0))
        os.kill(os.getpid(), signal.SIGTERM)
        assert caught == [signal.SIGTERM]
        assert delivery.close(5)

    assert in_child(child) == 0


def test_the_sigterm_handler_goes_with_the_last_worker() -> None:
    def child() -> None:
        first, second = make_delivery(), make_delivery()
        for delivery in (first, second):
            delivery.connect(Discard(), "chain").on_next(frame(0))
        assert callable(signal.getsignal(signal.SIGTERM))
        first.close(5)
        assert callable(signal.getsignal(signal.SIGTERM))
        second.close(5)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL

    assert in_child(child) == 0


class Discard(Sink):
    def write(self, frames: Sequence[Frame]) -> None:
        pass


def test_a_program_that_fails_has_written_everything_also_what_exit_handlers_emit(tmp_path: Path) -> None:
    program = textwrap.dedent(
        """
        import atexit
        import sys
        import torch
        from streamlens.frame import Frame
        from streamlens.sink import RunInfo, Sink

        @atexit.register
        def emit_the_last():
            emit(3)

        from streamlens.delivery import Delivery

        class File(Sink):
            max_latency = 60.0
            def write(self, frames):
                with open(sys.argv[1], "a") as file:
                    file.writelines(f"{frame.step}\\n" for frame in frames)
            def close(self):
                with open(sys.argv[1], "a") as file:
                    file.write("closed\\n")

        delivery = Delivery(lambda: RunInfo("id"), lambda error, where: None)
        proxy = delivery.connect(File(), "chain")
        def emit(step):
            proxy.on_next(Frame("loss", step, ("",), torch.zeros(1)))
        for step in range(3):
            emit(step)
        raise ValueError("training failed")
        """
    )
    path = tmp_path / "file"
    done = subprocess.run(
        [sys.executable, "-c", program, str(path)], check=False, capture_output=True, text=True, timeout=60
    )
    assert "training failed" in done.stderr
    assert path.read_text().split() == ["0", "1", "2", "3", "closed"]
