"""How soon the live page of a long run is drawn, and what an open page of a growing run costs the browser.

Needs Chromium at `/usr/bin/chromium`, and Playwright of the `dev` extra. `python -m benchmarks.page` writes
runs of 600 series of 100,000 steps, and for half a minute 50 layers at 50 steps a second;
`--steps 1000000` measures the long run, whose file takes 3.7 GB and some minutes to write.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from streamlens.frame import Frame
from streamlens.runs import RunWriter
from streamlens.views.web.serve import PageServer

__all__ = ["open_page", "watch_page"]

_LAYERS = 600
_BATCH = 500
_WATCHED = 50
_RATE = 50
_CHROMIUM = "/usr/bin/chromium"
_FIRST = "document.querySelector('.chart canvas') !== null"
_ALL = "document.documentElement.dataset.drawn > 0"


@contextmanager
def _browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        running = playwright.chromium.launch(
            executable_path=_CHROMIUM, args=["--no-sandbox", "--disable-gpu"]
        )
        yield running
        running.close()


@contextmanager
def _served(path: Path) -> Iterator[str]:
    server = PageServer(path, port=0)
    thread = server.start()
    yield server.url
    server.stop()
    thread.join()


def _drawn(page: Any, url: str) -> tuple[float, float]:
    """Seconds until the first of the charts is there, and until all are."""
    begin = time.perf_counter()
    page.goto(url, wait_until="commit")
    taken = []
    for condition in (_FIRST, _ALL):
        while not page.evaluate(condition):
            page.wait_for_timeout(10)
        taken.append(time.perf_counter() - begin)
    return taken[0], taken[1]


def open_page(steps: int = 100_000, visits: int = 5) -> dict[str, float]:
    """Open the page of a run of 600 series and a loss.

    Args:
        steps: How long the run is.
        visits: How often, each with a server that was started a moment ago and has built nothing yet.

    Returns:
        Seconds until the first chart is drawn and until all are, at the first visit and at one more;
        medians.
    """
    layers = tuple(f"blocks.{i}.weight" for i in range(_LAYERS))
    values = torch.rand(_BATCH, _LAYERS) * 1e-3
    taken: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder, _browser() as browser:
        path = Path(folder) / "run.db"
        with RunWriter(path, "benchmark", metadata={"model": "blocks"}) as writer:
            for start in range(0, steps, _BATCH):
                frames = [Frame("uw_ratio", start + i, layers, values[i]) for i in range(_BATCH)]
                frames += [Frame("loss", start + i, ("",), values[i, :1] + 1) for i in range(_BATCH)]
                writer.write(frames, [time.time()] * len(frames))
        for _ in range(visits):
            with _served(path) as url:
                for visit in ("first", "another"):
                    page = browser.new_page(viewport={"width": 1280, "height": 900})
                    for name, value in zip(("first chart", "all charts"), _drawn(page, url), strict=True):
                        taken.setdefault(f"{visit} visit, {name}, s", []).append(value)
                    page.close()
    return {name: statistics.median(times) for name, times in taken.items()}


def _browser_time() -> float:
    """CPU seconds of all processes of browsers that this process has started."""
    parents, spent = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            name, fields = (folder / "stat").read_text().rsplit(") ", 1)
        except OSError:
            continue  # it has ended meanwhile
        columns = fields.split()
        parents[int(folder.name)] = int(columns[1])
        spent[int(folder.name)] = (int(columns[11]) + int(columns[12])) if "chrom" in name else 0
    total = 0
    for process, ticks in spent.items():
        at = process
        while at not in (0, os.getpid()):
            at = parents.get(at, 0)
        total += ticks if at else 0
    return total / os.sysconf("SC_CLK_TCK")


def watch_page(seconds: float = 30) -> dict[str, float]:
    """Keep the page of a run open that is being written at 50 steps a second, with 50 layers.

    Args:
        seconds: How long, after ten seconds in which it settles.

    Returns:
        Processors that the browser keeps busy, how often a second it has drawn, and steps written a second.
    """
    layers = tuple(f"blocks.{i}.weight" for i in range(_WATCHED))
    ended = threading.Event()
    count = 0

    def write() -> None:
        nonlocal count
        with RunWriter(path, "benchmark", metadata={"model": "blocks"}) as writer:
            begin = time.monotonic()
            while not ended.wait(max(0.0, begin + count / _RATE - time.monotonic())):
                values = torch.rand(_WATCHED) * 1e-3
                topics = ("uw_ratio", "weights.norm2", "weight_gradients.norm2")
                frames = [Frame(topic, count, layers, values) for topic in topics]
                frames.append(Frame("loss", count, ("",), values[:1] + 1))
                writer.write(frames, [time.time()] * len(frames))
                count += 1

    with tempfile.TemporaryDirectory() as folder, _browser() as browser:
        path = Path(folder) / "run.db"
        thread = threading.Thread(target=write)
        thread.start()
        time.sleep(1)
        with _served(path) as url:
            page = browser.new_page(viewport={"width": 1280, "height": 900})
            _drawn(page, url)
            page.wait_for_timeout(10_000)
            updates = "Number(document.documentElement.dataset.updates)"
            before = (_browser_time(), page.evaluate(updates), count, time.perf_counter())
            page.wait_for_timeout(seconds * 1000)
            after = (_browser_time(), page.evaluate(updates), count, time.perf_counter())
            ended.set()
            thread.join()
    busy, drawn, steps, taken = (b - a for a, b in zip(before, after, strict=True))
    return {"processors busy": busy / taken, "updates/s": drawn / taken, "steps/s": steps / taken}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=100_000, help="length of the run that is opened")
    for name, value in (watch_page() | open_page(parser.parse_args().steps)).items():
        print(f"{name:32} {value:>8,.2f}")
