"""The live page beside a training, and on the command line: when it starts, what it says, how it ends."""

from __future__ import annotations

import queue
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from typer.testing import CliRunner

from streamlens.lab.commands import app
from streamlens.lab.session import can_open_browser
from streamlens.views.own import charts_of, own_views
from streamlens.views.web import serve
from streamlens.views.web.process import PageProcess
from tests.helpers.written_runs import write_run

ROOT = Path(__file__).parents[3]
needs_signals = pytest.mark.skipif(sys.platform == "win32", reason="signals as Unix knows them")


def fetched(url: str) -> bytes | None:
    """What is served there; None if nobody serves."""
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return bytes(answer.read())
    except (urllib.error.URLError, ConnectionError):
        return None


def started(*arguments: str | Path) -> subprocess.Popen[str]:
    """A command of the command line, in a process of its own."""
    command = [sys.executable, "-m", "streamlens.cli", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)


def gone(url: str) -> bool:
    """Whether within some seconds nobody serves there any more."""
    deadline = time.monotonic() + 20
    while fetched(url) is not None:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def test_a_page_in_a_process_of_its_own_serves_until_it_is_closed(tmp_path: Path) -> None:
    write_run(tmp_path / "run.db", 4)
    told: queue.Queue[tuple[str, str]] = queue.Queue()
    page = PageProcess(
        tmp_path, on_url=lambda url: told.put(("url", url)), on_failure=lambda why: told.put(("failed", why))
    )
    what, url = told.get(timeout=60)
    assert what == "url"
    assert urlsplit(url).hostname == "127.0.0.1"
    assert b'"steps":[0.0,4.0]' in (fetched(f"{url}api/charts") or b"")
    page.close()
    assert fetched(url) is None
    page.close()
    assert told.empty()


def test_a_page_closed_before_it_could_be_opened_is_ended_at_once_and_in_silence(tmp_path: Path) -> None:
    told: list[str] = []
    page = PageProcess(tmp_path, on_url=told.append, on_failure=told.append)
    page.close()
    assert told == []


PARENT = """
import sys, threading
from pathlib import Path
from streamlens.views.web.process import PageProcess
PageProcess(Path(sys.argv[1]), on_url=lambda url: print(url, flush=True), on_failure=print)
threading.Event().wait()
"""


@needs_signals
def test_a_page_ends_with_a_training_that_is_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PARENT, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as parent:
        assert parent.stdout is not None
        url = parent.stdout.readline().strip()
        assert fetched(url) is not None
        parent.kill()
    assert gone(url)


@needs_signals
def test_training_prints_the_address_of_its_page_and_ends_it_when_interrupted(tmp_path: Path) -> None:
    network = ("-m", "FullyConnected", "-e", "4000", "-b", "600")
    with started("train", *network, "-v", "altair", "--ratio", "--out", tmp_path / "out") as run:
        assert run.stderr is not None
        url = ""
        for line in run.stderr:
            if found := re.match(r"Live page: (http://127\.0\.0\.1:\d+/)$", line):
                url = found[1]
                break
        assert url
        deadline = time.monotonic() + 30
        while b'"update-to-weight-ratio"' not in (fetched(f"{url}api/charts") or b""):
            assert time.monotonic() < deadline
            time.sleep(0.2)
        run.send_signal(signal.SIGINT)
        out, _ = run.communicate(timeout=60)
    assert run.returncode == 130
    assert f"Live page: streamlens ui {tmp_path / 'out'}" in out
    assert fetched(url) is None


def test_a_browser_is_opened_only_where_somebody_sees_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    for name in ("SSH_CONNECTION", "DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    assert not can_open_browser()
    monkeypatch.setenv("WAYLAND_DISPLAY", "wayland-0")
    assert can_open_browser()
    monkeypatch.setenv("SSH_CONNECTION", "10.0.0.1 1 10.0.0.2 22")
    assert not can_open_browser()


# -- streamlens ui -------------------------------------------------------------------------------------


def ui(*arguments: str | Path) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["ui", *map(str, arguments)])
    return result.exit_code, " ".join(result.output.split())


@needs_signals
def test_the_command_prints_the_address_and_ends_with_ctrl_c(tmp_path: Path) -> None:
    write_run(tmp_path / "run.db", 4)
    with started("ui", tmp_path / "run.db", "--port", "0", "--token") as run:
        assert run.stdout is not None
        url = run.stdout.readline().strip()
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/\?token=[\w-]{32}", url)
        assert b"<title>streamlens</title>" in (fetched(url) or b"")
        run.send_signal(signal.SIGINT)
        _, said = run.communicate(timeout=30)
    assert run.returncode == 0
    assert said == "Ctrl-C ends it.\n"


def test_the_command_says_in_one_line_what_is_wrong(tmp_path: Path) -> None:
    code, said = ui(tmp_path / "absent")
    assert code == 1
    assert re.fullmatch(r"streamlens: there is no run store and no folder at \S+: check the path", said)
    code, said = ui(tmp_path, "--host", "no.such.host.invalid")
    assert code == 1
    assert "choose another --port or --host" in said
    code, said = ui(tmp_path, "--views", tmp_path / "absent.py")
    assert code == 2
    assert "there is no file" in said


def test_without_its_packages_it_names_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    code, said = ui(tmp_path)
    assert code == 1
    assert said == "streamlens: uvicorn is not installed; the live page needs: pip install 'streamlens[ui]'"
    with pytest.raises(ImportError, match=r"streamlens\[ui\]"):
        PageProcess(tmp_path, on_url=print, on_failure=print)


def test_the_help_names_the_port_that_is_tried_first() -> None:
    assert f"{serve.PORT}, or the next free one" in ui("--help")[1]


# -- charts of the user's own --------------------------------------------------------------------------

VIEWS = """
import altair as alt
import streamlens as sl
first = alt.Chart(sl.views.data("loss")).mark_line().encode(x="step:Q", y="value:Q")
second_one = first.encode(color="layer:N")
_hidden = first
other = alt.Chart(alt.Data(values=[])).mark_point()
number = 3
"""


def test_the_charts_of_a_file_are_those_over_topics_by_their_names(tmp_path: Path) -> None:
    file = tmp_path / "my_views.py"
    file.write_text(VIEWS)
    assert list(charts_of(str(file))) == ["first", "second one"]
    assert list(charts_of(f"{file}:second_one")) == ["second one"]
    assert [view.name for view in own_views(charts_of(str(file)))] == ["first", "second one"]


@pytest.mark.parametrize(
    ("text", "names", "words"),
    [
        ("x = 1", "", r"my_views\.py makes no chart over streamlens\.views\.data"),
        ("1/0", "", r"my_views\.py failed: ZeroDivisionError: division by zero"),
        (VIEWS, ":third", r"has no chart called 'third'"),
    ],
)
def test_a_file_without_charts_says_why(tmp_path: Path, text: str, names: str, words: str) -> None:
    file = tmp_path / "my_views.py"
    file.write_text(text)
    with pytest.raises(ValueError, match=words):
        charts_of(f"{file}{names}")


def test_what_is_no_chart_over_a_topic_is_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "my_views.py"
    file.write_text(VIEWS)
    with pytest.raises(ValueError, match="'number' is no Altair chart but int"):
        own_views(charts_of(f"{file}:number"))
    with pytest.raises(ValueError, match="'other' draws no topic"):
        own_views(charts_of(f"{file}:other"))
