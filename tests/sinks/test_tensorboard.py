"""TensorBoard: what it writes is what TensorBoard's own reader reads."""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reactivex.subject import Subject
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import crc32c as reference_crc32c
from tensorboard.util import tensor_util

from streamlens.delivery import Delivery
from streamlens.frame import Frame
from streamlens.operators import histogram
from streamlens.sink import RunInfo
from streamlens.sinks._event_file import crc32c
from streamlens.sinks.tensorboard import TensorBoard

RUN = RunInfo(id="f00d")


def written(logdir: Path, *frames: Frame, run: RunInfo = RUN) -> EventAccumulator:
    sink = TensorBoard(logdir)
    sink.open(run)
    sink.write(frames)
    sink.close()
    return read(logdir)


def read(logdir: Path) -> EventAccumulator:
    return EventAccumulator(str(logdir), size_guidance={"scalars": 0, "histograms": 0, "tensors": 0}).Reload()


def scalars(events: EventAccumulator, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in events.Scalars(tag)]


def norms(step: int, values: Sequence[float], **fields: Any) -> Frame:
    return Frame("norm", step, [f"layer{i}" for i in range(len(values))], torch.tensor(values), **fields)


def test_scalars_come_back_with_tags_steps_and_values(tmp_path: Path) -> None:
    frames = [norms(step, [0.1 * step, 7.0]) for step in range(3)]
    events = written(tmp_path, *frames, Frame("loss", 2, ("",), torch.tensor([0.5])))
    assert events.Tags()["scalars"] == ["norm/layer0", "norm/layer1", "loss"]
    expected = [(step, float(np.float32(0.1 * step))) for step in range(3)]
    assert scalars(events, "norm/layer0") == expected
    assert scalars(events, "loss") == [(2, 0.5)]


def test_nan_and_infinities_are_written_as_they_are(tmp_path: Path) -> None:
    events = written(tmp_path, norms(0, [float("nan"), float("inf"), -float("inf")]))
    values = [scalars(events, f"norm/layer{i}")[0][1] for i in range(3)]
    assert np.isnan(values[0])
    assert values[1:] == [float("inf"), -float("inf")]


def test_a_frame_is_one_event_holding_all_its_layers(tmp_path: Path) -> None:
    written(tmp_path, norms(0, [1.0] * 5), norms(1, [1.0] * 5))
    (path,) = tmp_path.iterdir()
    sizes = [len(event.summary.value) for event in LegacyEventFileLoader(str(path)).Load()]
    assert sizes == [0, 5, 5]


def test_named_components_are_scalars_of_their_own(tmp_path: Path) -> None:
    loss = Frame("loss", 4, ("",), torch.tensor([[1.0, 2.0]]), components=("a", "b"))
    quantiles = Frame("q", 4, ("fc",), (torch.tensor([3.0, 4.0]),), components=("5%", "95%"))
    events = written(tmp_path, loss, quantiles)
    tags = {tag: scalars(events, tag)[0][1] for tag in events.Tags()["scalars"]}
    assert tags == {"loss/_/a": 1.0, "loss/_/b": 2.0, "q/fc/5%": 3.0, "q/fc/95%": 4.0}


def test_names_that_hold_slashes_do_not_run_into_one_another(tmp_path: Path) -> None:
    frames = [
        Frame("G/norm", 0, ("G.fc",), torch.tensor([1.0])),
        Frame("G", 0, ("norm",), torch.tensor([[2.0]]), components=("G.fc",)),
        Frame("val/loss", 0, ("",), torch.tensor([3.0])),
        Frame("val", 0, ("loss",), torch.tensor([4.0])),
    ]
    events = written(tmp_path, *frames)
    tags = {tag: scalars(events, tag)[0][1] for tag in events.Tags()["scalars"]}
    assert tags == {"G:norm/G.fc": 1.0, "G/norm/G.fc": 2.0, "val:loss": 3.0, "val/loss": 4.0}


def test_micro_steps_are_written_at_their_step(tmp_path: Path) -> None:
    frames = [norms(7, [float(i)], micro_step=i) for i in range(3)]
    assert scalars(written(tmp_path, *frames), "norm/layer0") == [(7, 0.0), (7, 1.0), (7, 2.0)]


def test_changed_layers_do_not_mix_with_earlier_ones(tmp_path: Path) -> None:
    frames = [norms(0, [1.0, 2.0]), norms(1, [3.0]), norms(2, [4.0, 5.0])]
    events = written(tmp_path, *frames)
    assert scalars(events, "norm/layer0") == [(0, 1.0), (1, 3.0), (2, 4.0)]
    assert scalars(events, "norm/layer1") == [(0, 2.0), (2, 5.0)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool])
def test_every_type_of_number_is_written(tmp_path: Path, dtype: torch.dtype) -> None:
    events = written(tmp_path, Frame("norm", 0, ("a",), torch.ones(1, dtype=dtype)))
    assert scalars(events, "norm/a") == [(0, 1.0)]


def test_tensors_are_histograms_of_their_elements(tmp_path: Path) -> None:
    weights = torch.randn(50, 40, generator=torch.Generator().manual_seed(0)).double()
    events = written(tmp_path, Frame("weights", 3, ("a", "b"), (weights, torch.ones(7))))
    (event,) = events.Histograms("weights/a")
    histogram = event.histogram_value
    counts, edges = np.histogram(weights.numpy(), bins=64)
    assert event.step == 3
    assert np.array_equal(histogram.bucket, counts)
    assert np.allclose(histogram.bucket_limit, edges[1:])
    assert (histogram.min, histogram.max, histogram.num) == (weights.min(), weights.max(), 2000)
    assert histogram.sum == pytest.approx(weights.sum().item())
    assert histogram.sum_squares == pytest.approx(weights.square().sum().item())
    (constant,) = events.Histograms("weights/b")
    assert (list(constant.histogram_value.bucket), list(constant.histogram_value.bucket_limit)) == (
        [7],
        [1.0],
    )


def test_histograms_show_what_is_finite_and_count_the_rest(tmp_path: Path) -> None:
    nan, inf = float("nan"), float("inf")
    values = (torch.tensor([1.0, nan, 2.0, inf]), torch.tensor([nan, nan]))
    events = written(tmp_path, Frame("weights", 0, ("a", "b"), values))
    assert events.Histograms("weights/a")[0].histogram_value.num == 2
    assert scalars(events, "weights/a/non_finite") == [(0, 2.0)]
    assert scalars(events, "weights/b/non_finite") == [(0, 2.0)]
    assert events.Tags()["histograms"] == ["weights/a"]


def test_unnamed_vectors_are_histograms_too(tmp_path: Path) -> None:
    events = written(tmp_path, Frame("singular_values", 0, ("a",), torch.rand(1, 30)))
    assert events.Histograms("singular_values/a")[0].histogram_value.num == 30


def test_a_sentence_is_a_text_beside_the_values(tmp_path: Path) -> None:
    alert = Frame("alerts.nan", 5, ("", "fc"), torch.tensor([2.0, 1.0]), meta={"text": "fc is NaN ☹"})
    events = written(tmp_path, alert)
    (text,) = events.Tensors("alerts.nan/_/text")
    assert text.step == 5
    assert tensor_util.make_ndarray(text.tensor_proto).tolist() == ["fc is NaN ☹".encode()]
    assert events.SummaryMetadata("alerts.nan/_/text").plugin_data.plugin_name == "text"
    assert scalars(events, "alerts.nan") == [(5, 2.0)]
    assert scalars(events, "alerts.nan/fc") == [(5, 1.0)]


def test_wall_times_are_those_of_emission(tmp_path: Path) -> None:
    sink = TensorBoard(tmp_path)
    sink.open(RUN)
    sink.received = [100.5, 200.5]
    sink.write([norms(0, [1.0]), norms(1, [1.0])])
    sink.close()
    assert [event.wall_time for event in read(tmp_path).Scalars("norm/layer0")] == [100.5, 200.5]


def test_events_can_be_read_while_the_run_goes_on(tmp_path: Path) -> None:
    sink = TensorBoard(tmp_path)
    sink.open(RUN)
    sink.write([norms(0, [1.0])])
    assert scalars(read(tmp_path), "norm/layer0") == [(0, 1.0)]
    sink.write([norms(1, [2.0])])
    assert scalars(read(tmp_path), "norm/layer0") == [(0, 1.0), (1, 2.0)]
    sink.close()


def age(folder: Path) -> None:
    """Have the newest event file precede those to come: they are read by their names, which count seconds."""
    aged = [path for path in folder.iterdir() if ".old" in path.name]
    (newest,) = set(folder.iterdir()) - set(aged)
    newest.rename(folder / f"events.out.tfevents.000000000{len(aged)}.old")


def test_a_resumed_run_hides_the_later_steps_of_an_earlier_attempt(tmp_path: Path) -> None:
    written(tmp_path, *(norms(step, [1.0]) for step in range(10)))
    age(tmp_path)
    events = written(tmp_path, norms(5, [2.0]), run=RunInfo(id="f00d", resumed_at=4))
    assert scalars(events, "norm/layer0") == [*((step, 1.0) for step in range(5)), (5, 2.0)]


def test_a_resumed_run_hides_nothing_that_it_wrote_itself(tmp_path: Path) -> None:
    run = RunInfo(id="f00d", resumed_at=4, resumption="a")
    written(tmp_path, norms(4, [1.0]), norms(5, [1.0]))
    age(tmp_path)
    written(tmp_path, norms(5, [2.0]), norms(6, [2.0]), run=run)
    age(tmp_path)
    # Its sink was subscribed again, or there are two of them.
    events = written(tmp_path, norms(7, [2.0]), run=run)
    assert scalars(events, "norm/layer0") == [(4, 1.0), (5, 2.0), (6, 2.0), (7, 2.0)]
    age(tmp_path)
    events = written(tmp_path, norms(5, [3.0]), run=RunInfo(id="f00d", resumed_at=4, resumption="b"))
    assert scalars(events, "norm/layer0") == [(4, 1.0), (5, 3.0)]


def test_a_failed_write_leaves_no_half_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sink = TensorBoard(tmp_path)
    sink.open(RUN)
    file = sink._file
    assert file is not None
    real = file._file._file

    class Full:
        def write(self, data: memoryview) -> int:
            real.write(data[:5])
            raise OSError(28, "No space left on device")

        def __getattr__(self, name: str) -> Any:
            return getattr(real, name)

    sink.write([norms(0, [1.0])])
    size = file.path.stat().st_size
    monkeypatch.setattr(file._file, "_file", Full())
    with pytest.raises(OSError, match="No space"):
        sink.write([norms(1, [2.0])])
    assert file.path.stat().st_size == size
    monkeypatch.setattr(file._file, "_file", real)
    sink.write([norms(1, [2.0])])
    sink.close()
    assert scalars(read(tmp_path), "norm/layer0") == [(0, 1.0), (1, 2.0)]


def test_a_folder_that_cannot_be_written_is_reported_and_training_goes_on(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    reports: list[str] = []
    delivery = Delivery(lambda: RUN, lambda error, where: reports.append(f"{where}: {error}"))
    sink = TensorBoard(tmp_path / "taken")
    sink.retries = 0
    delivery.connect(sink, "chain").on_next(norms(0, [1.0]))
    assert not delivery.flush(5)
    assert not delivery.close(5)
    (report,) = reports
    assert report.startswith(
        f"sink TensorBoard: TensorBoard cannot write to '{tmp_path / 'taken'}': File exists"
    )


def test_a_sink_subscribed_again_goes_on_in_a_new_file(tmp_path: Path) -> None:
    sink = TensorBoard(tmp_path)
    for step in range(2):
        sink.open(RUN)
        sink.write([norms(step, [float(step)])])
        sink.close()
    assert len(list(tmp_path.iterdir())) == 2
    assert scalars(read(tmp_path), "norm/layer0") == [(0, 0.0), (1, 1.0)]


@pytest.mark.parametrize("seconds", [0, -1, float("nan")])
def test_flush_secs_is_checked(seconds: float) -> None:
    with pytest.raises(ValueError, match="flush_secs"):
        TensorBoard("runs", flush_secs=seconds)


@pytest.mark.parametrize("size", [0, 1, 2, 3, 4, 5, 9, 1023, 1024, 1025, 1026, 1027, 1028, 3000])
def test_the_checksum_is_crc32c(size: int) -> None:
    data = os.urandom(size)
    assert crc32c(data) == reference_crc32c(data)
    assert crc32c(b"123456789") == 0xE3069283, "the check value of RFC 3720"
    assert struct.pack("<I", crc32c(bytes(32))) == bytes.fromhex("aa36918a")


def test_counts_in_bins_are_a_histogram_with_these_bins(tmp_path: Path) -> None:
    elements = torch.tensor([-9.0, 0.25, 0.5, 0.75, 1.0, 1.5, float("nan"), float("inf")])
    counted: list[Frame] = []
    source: Subject[Frame] = Subject()
    source.pipe(histogram(bins=2, range=(0, 1))).subscribe(counted.append)
    source.on_next(Frame("w", 3, ("a", "b"), (elements, torch.tensor([0.1]))))
    events = written(tmp_path, *counted)
    (event,) = events.Histograms("w.histogram/a")
    shown = event.histogram_value
    # What lies beyond the range is drawn as wide as the bin beside it.
    assert (event.step, shown.min, shown.max, shown.num) == (3, -0.5, 1.5, 6)
    assert (shown.bucket_limit, shown.bucket) == ([0, 0.5, 1, 1.5], [1, 1, 3, 1])
    assert scalars(events, "w.histogram/a/non_finite") == [(3, 2.0)]
    (other,) = events.Histograms("w.histogram/b")
    assert (other.histogram_value.bucket_limit, other.histogram_value.bucket) == ([0.5], [1])
    assert events.Tags()["scalars"] == ["w.histogram/a/non_finite"]


def test_counts_of_nothing_finite_are_no_histogram(tmp_path: Path) -> None:
    names = ("-inf", "(-inf,0)", "[0,1]", "(1,inf)", "inf", "nan")
    frame = Frame("h", 0, ("a",), torch.tensor([[0.0, 0, 0, 0, 0, 4]]), components=names)
    assert written(tmp_path, frame).Tags()["histograms"] == []
