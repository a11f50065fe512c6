"""`Session`: one training run of the command line, from its first step to its report."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
import webbrowser
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from reactivex import Observable
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import streamlens as sl
from streamlens.chain import Chain
from streamlens.errors import StreamlensError
from streamlens.frame import Frame, Kind
from streamlens.lab.recording import Recording
from streamlens.lab.trainer import EpochResult, Trainer
from streamlens.operators._windowed import Epochs, StepWindows, Windowed
from streamlens.sink import Sink

if TYPE_CHECKING:
    from streamlens.views.web.process import PageProcess

__all__ = ["Session", "can_open_browser"]

_INTERRUPTED: Final = 130
"""The exit status of a process that Ctrl-C ended, as shells have it."""

_PATIENCE: Final = 30.0
"""Seconds that slow sinks get in the end to write what they were given."""


class Session:
    """Trains, shows how far it is, records, and reports.

    Results go to the standard output; progress and warnings to the standard error.

    Args:
        trainer: What to run. Its lens is closed in the end.
        folder: What the run leaves goes here.
        show: Any of `"tb"` for TensorBoard events, `"console"` for a live table, `"mpl"` for charts of
            matplotlib, `"altair"` for the live page, `"csv"`, `"jsonl"` and `"parquet"`; `"none"` is none
            of them.
        verbose: Print a line an epoch, the tracebacks of failures and, in the end, the plan.
    """

    def __init__(
        self, trainer: Trainer, folder: Path, *, show: Collection[str] = ("tb",), verbose: bool = False
    ) -> None:
        self.trainer = trainer
        self.folder = folder
        self.show = show
        self.verbose = verbose
        self.results: list[EpochResult] = []
        self._recorded: list[tuple[sl.Stream, Chain]] = []
        self._failures = 0
        self._out = Console(soft_wrap=True, highlight=False, markup=False, emoji=False)
        self._err = Console(soft_wrap=True, highlight=False, markup=False, emoji=False, stderr=True)

    def run(self, streams: Sequence[Observable[Frame]]) -> int:
        """Train to the end, or until interrupted.

        Args:
            streams: What to record, out of the trainer's lens.

        Returns:
            The exit status: 0, 1 if something could not be recorded, 130 if interrupted.
        """
        lens = self.trainer.lens
        interrupted = False
        with self._warnings():
            lens.errors.subscribe(lambda _: self._failed())
            recording = Recording(self.folder, show=self.show, warn=self._warn)
            sinks = list(recording.sinks)
            if "console" in self.show:
                sinks.append(sl.sinks.Console(total=self.trainer.steps))
            for stream in streams:
                for sink in sinks:
                    self._subscribe(stream, sink)
            page = self._page(recording) if "altair" in self.show else None
            start = time.perf_counter()
            try:
                self._train()
            except KeyboardInterrupt:
                interrupted = True
            finally:
                seconds = time.perf_counter() - start
                if self.verbose:  # now, since the plan ends with the lens
                    self._out.print(lens.explain())
                if not lens.close(timeout=_PATIENCE):
                    self._warn(f"not everything was written: a sink failed or took over {_PATIENCE:.0f} s")
                if page is not None:
                    page.close()
            if lens.engine.inert:
                self._err.print("STREAMLENS_DISABLED is set: nothing was recorded")
            else:
                self._tell_silent(lens.engine.next_step)
            report = None if lens.engine.inert else recording.write_report()
        self._summarise(recording, report, seconds, interrupted=interrupted)
        if interrupted:
            return _INTERRUPTED
        return 1 if self._failures else 0

    def _page(self, recording: Recording) -> PageProcess | None:
        """The live page, served beside the training for as long as that takes."""
        from streamlens.views.web.process import PageProcess

        if not recording.writable:
            return None
        try:
            return PageProcess(self.folder, on_url=self._tell_page, on_failure=self._warn_of_page)
        except (ImportError, OSError) as error:
            self._warn_of_page(str(error))
            return None

    def _tell_page(self, url: str) -> None:
        self._err.print(f"Live page: {url}")
        if can_open_browser() and self._err.is_terminal:
            webbrowser.open(url)

    def _warn_of_page(self, reason: str) -> None:
        self._warn(f"no live page: {reason}")

    def _subscribe(self, stream: Observable[Frame], sink: Sink) -> None:
        try:
            if isinstance(stream, sl.Stream):
                # Named, since chains with operators of reactivex cannot be told apart by their plan.
                name = f"{stream.plan_text} in {type(sink).__name__}"
                stream.subscribe(sink, name=name)
                known = self.trainer.lens.engine.chains
                self._recorded += [(stream, chain) for chain in known if chain.key == name]
            else:
                stream.subscribe(sink)
        except StreamlensError as error:
            self._warn(f"{error}; it is left out there")

    def _tell_silent(self, steps: int) -> None:
        """Say of which metrics nothing came, and why; alerts are silent where all is well."""
        silent: dict[str, sl.Stream] = {}
        for stream, chain in self._recorded:
            if stream.kind is not Kind.EVENT and not chain.counts["frames"]:
                silent[stream.plan_text] = stream
        for plan, stream in silent.items():
            # Without what the command line itself has put in front and behind.
            shown = plan.removeprefix("observe() | ").removesuffix(" | <_compose>")
            self._err.print(f"warning: {shown} gave nothing: {_why_silent(stream, steps)}")

    def _train(self) -> None:
        steps = self.trainer.steps
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        # The console sink draws a bar of its own; two live displays would overwrite each other.
        drawn = self._err.is_terminal and "console" not in self.show
        with Progress(*columns, console=self._err, transient=True, disable=not drawn) as progress:
            task = progress.add_task("training", total=steps)

            def on_epoch(result: EpochResult) -> None:
                self.results.append(result)
                line = self._line(result)
                progress.update(task, description=line)
                if self.verbose or not self._err.is_terminal:
                    self._err.print(line)

            self.trainer.fit(on_step=lambda done: progress.update(task, completed=done), on_epoch=on_epoch)

    def _line(self, result: EpochResult) -> str:
        parts = [f"epoch {result.epoch + 1}/{self.trainer.epochs}", f"loss {result.loss:.4f}"]
        return "  ".join(parts + _accuracies(result))

    def _summarise(
        self, recording: Recording, report: Path | None, seconds: float, *, interrupted: bool
    ) -> None:
        verb = "Interrupted" if interrupted else "Trained"
        counted = (
            f"{len(self.results)} of {self.trainer.epochs} epochs"
            if interrupted
            else f"{self.trainer.steps} steps"
        )
        self._out.print(f"{verb} after {counted} in {seconds:.1f} s")
        if self.results:
            self._out.print("  ".join([f"loss {self.results[-1].loss:.4f}", *_accuracies(self.results[-1])]))
        if recording.run_db.exists():
            self._out.print(f"Run store: {recording.run_db}")
        if "altair" in self.show and recording.run_db.exists():
            self._out.print(f"Live page: streamlens ui {recording.folder}")
        for name, path in recording.shown.items():
            if path.exists():
                told = f"tensorboard --logdir {recording.folder}" if name == "TensorBoard" else path
                self._out.print(f"{name}: {told}")
        if report is not None:
            self._out.print(f"Report: {report}")

    def _failed(self) -> None:
        self._failures += 1

    def _warn(self, line: str) -> None:
        self._failed()
        self._err.print(f"warning: {line}")

    @contextlib.contextmanager
    def _warnings(self) -> Iterator[None]:
        """Print what streamlens logs as lines between those of the progress."""
        logger = logging.getLogger("streamlens")
        handler = _ConsoleHandler(self._err, tracebacks=self.verbose)
        propagate, logger.propagate = logger.propagate, False
        logger.addHandler(handler)
        try:
            yield
        finally:
            logger.removeHandler(handler)
            logger.propagate = propagate


class _ConsoleHandler(logging.Handler):
    """Log records as one line each, written past a live display."""

    def __init__(self, console: Console, *, tracebacks: bool) -> None:
        super().__init__(logging.WARNING)
        self._console = console
        self._tracebacks = tracebacks
        self.setFormatter(logging.Formatter("warning: %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record."""
        line = self.format(record) if self._tracebacks else f"warning: {record.getMessage()}"
        self._console.print(line)


def _why_silent(stream: sl.Stream, steps: int) -> str:
    """Why nothing came of a stream in a run of so many steps."""
    windows = stream.windows if isinstance(stream, Windowed) else None
    counted = f"{steps} step{'s' * (steps != 1)}"
    if isinstance(windows, StepWindows) and windows.size > steps:
        return (
            f"its first window is over after {windows.size} steps, and the run had {counted}; "
            "train for longer, or give it a shorter window"
        )
    if isinstance(windows, Epochs):
        return f"no epoch was over after {counted}"
    return f"nothing that it is made of came in {counted}; --verbose shows the plan"


def can_open_browser() -> bool:
    """Whether a browser that is opened from here appears before the user's eyes."""
    if os.environ.get("SSH_CONNECTION"):
        return False
    return sys.platform in {"darwin", "win32"} or bool(
        os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    )


def _accuracies(result: EpochResult) -> list[str]:
    measured = {"training accuracy": result.train_accuracy, "test accuracy": result.test_accuracy}
    return [f"{name} {accuracy:.1%}" for name, accuracy in measured.items() if accuracy is not None]
