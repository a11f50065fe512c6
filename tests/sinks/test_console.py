"""Console: shows the latest values, and leaves the terminal as it found it."""

from __future__ import annotations

import io
import os
import re
import sys
import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from rich.console import Console as RichConsole

from streamlens.delivery import Delivery
from streamlens.frame import Frame
from streamlens.sink import RunInfo
from streamlens.sinks.console import Console

RUN = RunInfo(id="f00d")
HIDE, SHOW = "\x1b[?25l", "\x1b[?25h"


def frame(topic: str, step: int, layers: Sequence[str], values: Sequence[Any], **fields: Any) -> Frame:
    return Frame(topic, step, layers, torch.tensor(values), **fields)


def terminal(width: int = 100) -> RichConsole:
    return RichConsole(file=io.StringIO(), force_terminal=True, width=width, height=60, _environ={})


def plain() -> RichConsole:
    return RichConsole(file=io.StringIO(), force_terminal=False, width=200, _environ={})


def text_of(console: RichConsole) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def drawn(sink: Console, *frames: Frame, width: int = 100) -> list[str]:
    """The lines of the live display once it has these frames."""
    sink.write(frames)
    console = RichConsole(file=io.StringIO(), width=width, _environ={})
    console.print(sink._render())
    return [line.rstrip() for line in text_of(console).splitlines()]


@pytest.fixture
def live() -> Any:
    sink = Console(total=200, console=terminal())
    sink.open(RUN)
    yield sink
    sink.close()


def test_a_layer_is_a_row_a_topic_a_column_and_the_last_value_counts(live: Console) -> None:
    lines = drawn(
        live,
        frame("uw_ratio", 0, ("conv1", "fc"), [9.0, 9.0]),
        frame("uw_ratio", 1, ("conv1", "fc"), [1.5e-4, float("nan")]),
        frame("norm", 1, ("fc",), [12.25]),
    )
    assert any(line.split() == ["layer", "uw_ratio", "norm"] for line in lines)
    assert any(line.split() == ["conv1", "1.50e-04"] for line in lines)
    assert any(line.split() == ["fc", "nan", "12.25"] for line in lines)


def test_the_models_own_values_come_first_losses_before_accuracies(live: Console) -> None:
    lines = drawn(
        live,
        frame("norm", 0, ("fc",), [1.0]),
        frame("step_time", 0, ("",), [0.5]),
        frame("train_accuracy", 0, ("",), [0.875]),
        frame("loss", 0, ("",), [[0.25]], components=("cross_entropy",)),
    )
    first = [line.split()[0] for line in lines if line.strip()]
    assert first[:4] == ["loss", "train_accuracy", "step_time", "layer"]


def test_progress_counts_steps(live: Console) -> None:
    live.write([frame("loss", 49, ("",), [1.0])])
    live.flush()
    assert "50/200 steps" in re.sub(r"\x1b\[[0-9;]*m", "", text_of(live._console))


def test_progress_of_a_resumed_run_starts_where_it_went_on() -> None:
    sink = Console(total=200, console=terminal())
    sink.open(RunInfo(id="f00d", resumed_at=99))
    assert any("100/200 steps" in line for line in drawn(sink))
    sink.close()


def test_rows_and_columns_are_bounded_and_say_what_is_missing(live: Console) -> None:
    layers = [f"layer{i}" for i in range(300)]
    frames = [frame(f"topic{k}", 0, layers, [1.0] * 300) for k in range(20)]
    lines = drawn(live, *frames)
    assert sum(line.strip().startswith("layer") and line.split()[0] != "layer" for line in lines) == 20
    assert any("280 more layers and 14 more topics" in line for line in lines)
    assert max(map(len, lines)) <= 100


def test_closing_restores_the_cursor_and_the_output() -> None:
    stdout, stderr = sys.stdout, sys.stderr
    sink = Console(console=terminal())
    sink.open(RUN)
    assert HIDE in text_of(sink._console)
    sink.write([frame("loss", 0, ("",), [1.0])])
    sink.close()
    output = text_of(sink._console)
    assert output.rindex(SHOW) > output.rindex(HIDE)
    assert (sys.stdout, sys.stderr) == (stdout, stderr)


def test_the_terminal_is_restored_though_drawing_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    stdout = sys.stdout
    sink = Console(console=terminal())
    sink.open(RUN)
    monkeypatch.setattr(sink, "_render", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sink.close()
    assert text_of(sink._console).endswith(SHOW)
    assert sys.stdout is stdout


def test_what_the_program_prints_appears_whole() -> None:
    # Opened here: pytest puts its own standard output in place after a fixture's set-up.
    sink = Console(console=terminal())
    sink.open(RUN)
    sink.write([frame("loss", 0, ("",), [1.0])])
    sink.flush()
    print("a line of the user's own")
    sink.flush()
    sink.close()
    assert "a line of the user's own\n" in text_of(sink._console)


def test_it_draws_without_a_thread_of_its_own(live: Console) -> None:
    before = threading.active_count()
    live.write([frame("loss", 0, ("",), [1.0])])
    live.flush()
    assert threading.active_count() == before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs POSIX processes")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_prints_past_the_live_table() -> None:
    sink = Console(console=terminal())
    sink.open(RUN)
    pid = os.fork()
    if pid == 0:
        os._exit(0 if not hasattr(sys.stdout, "rich_proxied_file") else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert hasattr(sys.stdout, "rich_proxied_file")
    sink.close()


def test_without_a_terminal_it_prints_plain_lines() -> None:
    sink = Console(total=10, console=plain())
    sink.open(RUN)
    sink.write(
        [
            frame("loss", 3, ("",), [0.25], epoch=1),
            frame("uw_ratio", 3, ("a", "b", "c"), [1.0, float("nan"), 3.0], epoch=1),
        ]
    )
    sink.flush()
    assert text_of(sink._console) == "step 4/10  epoch 1  loss 0.25  uw_ratio 2 (median of 3)\n"
    sink.close()


def test_plain_lines_come_once_a_second_at_most_and_the_last_always() -> None:
    sink = Console(console=plain())
    sink.open(RUN)
    for step in range(50):
        sink.write([frame("loss", step, ("",), [1.0])])
        sink.flush()
    assert text_of(sink._console).splitlines() == ["step 1  epoch 0  loss 1"]
    sink.close()
    assert text_of(sink._console).splitlines()[1:] == ["step 50  epoch 0  loss 1"]


def test_plain_lines_every_n_steps_hold_all_of_their_step() -> None:
    sink = Console(every=10, console=plain())
    sink.open(RUN)
    frames = []
    for step in range(25):
        frames += [frame("loss", step, ("",), [float(step)]), frame("accuracy", step, ("",), [step + 0.5])]
    sink.write(frames)
    sink.flush()
    lines = text_of(sink._console).splitlines()
    assert lines == [
        "step 1  epoch 0  loss 0  accuracy 0.5",
        "step 11  epoch 0  loss 10  accuracy 10.5",
        "step 21  epoch 0  loss 20  accuracy 20.5",
    ]
    sink.close()
    assert text_of(sink._console).splitlines()[-1].startswith("step 25")


def test_lines_go_to_the_standard_output_of_the_moment(capsys: pytest.CaptureFixture[str]) -> None:
    sink = Console()
    sink.open(RUN)
    sink.write([frame("loss", 0, ("",), [1.0])])
    sink.close()
    assert capsys.readouterr().out == "step 1  epoch 0  loss 1\n"


def test_tensors_are_refused_with_the_remedy() -> None:
    reports: list[str] = []
    delivery = Delivery(lambda: RUN, lambda error, where: reports.append(str(error)))
    delivery.connect(Console(console=plain()), "chain").on_next(
        Frame("weights", 0, ("a",), (torch.ones(2, 2),))
    )
    assert delivery.flush(5)
    assert delivery.close(5)
    (report,) = reports
    assert report.startswith(
        "Console shows scalar and text values, and 'weights' holds vector values: reduce them"
    )


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (1.0, "1"),
        (0.123456, "0.1235"),
        (1.23456e-4, "1.23e-04"),
        (12345.678, "12346"),
        (-1.5e7, "-1.50e+07"),
        (float("inf"), "inf"),
        (float("nan"), "nan"),
    ],
)
def test_numbers_are_compact(value: float, text: str) -> None:
    sink = Console(console=plain())
    sink.open(RUN)
    sink.write([Frame("x", 0, ("",), torch.tensor([value], dtype=torch.float64))])
    sink.close()
    assert text_of(sink._console) == f"step 1  epoch 0  x {text}\n"


@pytest.mark.parametrize("argument", ["total", "max_rows", "every"])
def test_numbers_below_one_are_refused(argument: str) -> None:
    arguments: dict[str, Any] = {argument: 0}
    with pytest.raises(ValueError, match=rf"Console\({argument}=\)"):
        Console(**arguments)


def alert(step: int, state: str, severity: str = "warning") -> Frame:
    meta = {"rule": "dead_units", "severity": severity, "state": state, "text": f"[b]Units[/b] {state}."}
    return frame("alerts.dead_units", step, ("act",), [0.9], meta=meta)


def test_an_alert_is_a_line_of_its_own_at_once_and_no_column() -> None:
    console = plain()
    sink = Console(console=console)
    sink.open(RUN)
    sink.write([alert(7, "start"), alert(9, "end")])
    assert text_of(console).splitlines() == [
        "step 7  WARNING dead_units: [b]Units[/b] start.",
        "step 9  OVER dead_units: [b]Units[/b] end.",
    ]
    sink.close()
    assert "alerts.dead_units" not in text_of(console)


def test_an_alert_appears_above_the_live_table_in_the_colour_of_its_severity(live: Console) -> None:
    lines = drawn(live, frame("norm", 1, ("fc",), [1.0]), alert(7, "start", "critical"))
    assert not any("alerts" in line for line in lines)
    output = text_of(live._console)
    assert "step 7  CRITICAL dead_units: [b]Units[/b] start." in output
    assert "\x1b[1;31m" in output


def test_a_sentence_that_is_no_alert_is_printed_with_its_topic() -> None:
    console = plain()
    sink = Console(console=console)
    sink.open(RUN)
    sink.write([frame("note", 3, ("",), [0.0], meta={"text": "hello"})])
    assert text_of(console) == "step 3  note: hello\n"
