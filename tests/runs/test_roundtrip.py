"""What goes into a run store comes back as it was."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import cast

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from streamlens.frame import Frame, Kind
from streamlens.runs import RunWriter, read_run
from tests.runs.strategies import content, frames


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file for all examples: each is a run of its own, and none may disturb another."""
    return tmp_path_factory.mktemp("runs") / "run.db"


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(sent=st.lists(frames(), max_size=6), cut=st.integers(0, 6))
def test_any_frames_come_back_bit_for_bit_in_the_order_in_which_they_were_stored(
    path: Path, sent: list[Frame], cut: int
) -> None:
    run_id = uuid.uuid4().hex
    with RunWriter(path, run_id) as writer:
        writer.write(sent[:cut])
        writer.write(sent[cut:])
    with read_run(path, run_id) as run:
        assert list(map(content, run.frames())) == list(map(content, sent))
        assert run.topics == list(dict.fromkeys(frame.topic for frame in sent))
        for topic in run.topics:
            expected = [content(frame) for frame in sent if frame.topic == topic]
            assert list(map(content, run.frames(topic))) == expected
            assert set(run.layers(topic)) == {
                name for frame in sent if frame.topic == topic for name in frame.layers
            }


def test_views_of_every_sort_are_stored_as_their_values(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    views = {
        "transposed": base.t(),
        "strided": base[::2, 1::2],
        "expanded": torch.tensor([[1.0], [2.0]]).expand(2, 3),
        "conjugated": torch.tensor([[1 + 2j], [3 - 4j]]).conj(),
        "negated": torch.tensor([[1 + 2j], [3 - 4j]]).conj().imag,
        "sparse": torch.tensor([[0.0, 1.0], [2.0, 0.0]]).to_sparse(),
        "requires grad": torch.ones(2, 2, requires_grad=True),
        "half, strided": base.to(torch.bfloat16)[:, ::3],
    }
    with RunWriter(tmp_path / "run.db", "a") as writer:
        writer.write([Frame(name, 0, map(str, range(len(v))), v) for name, v in views.items()])  # type: ignore[arg-type]
    with read_run(tmp_path / "run.db") as run:
        for name, view in views.items():
            (frame,) = run.frames(name)
            dense = view.to_dense() if view.is_sparse else view
            assert torch.equal(cast("torch.Tensor", frame.values), dense.detach()), name


def test_a_frame_that_was_read_can_be_changed_and_kept(tmp_path: Path) -> None:
    with RunWriter(tmp_path / "run.db", "a") as writer:
        writer.write([Frame("weights", 0, ("a", "b"), (torch.ones(3), torch.ones(2)))])
    with read_run(tmp_path / "run.db") as run:
        first, second = (next(iter(run.frames())) for _ in range(2))
    first["a"].zero_()
    assert first["b"].tolist() == [1.0, 1.0]
    assert second["a"].tolist() == [1.0, 1.0, 1.0]


def test_meta_that_json_lacks_is_stored_as_the_nearest_plain_value(tmp_path: Path) -> None:
    meta = {
        "tensor": torch.tensor([1, 2]),
        "array": torch.tensor([1.5]).numpy(),
        "number": torch.tensor(2.5).numpy()[()],
        "tuple": (1, 2),
        "set": {2, 1},
        "path": Path("a/b"),
        "infinite": float("inf"),
    }
    with RunWriter(tmp_path / "run.db", "a", metadata={"device": torch.device("cpu"), 3: (4,)}) as writer:  # type: ignore[dict-item]
        writer.write([Frame("alerts", 0, ("",), torch.zeros(1), meta=meta)])
    with read_run(tmp_path / "run.db") as run:
        (frame,) = run.frames()
        assert run.metadata == {"device": "cpu", "3": [4]}
    assert dict(frame.meta) == {
        "tensor": [1, 2],
        "array": [1.5],
        "number": 2.5,
        "tuple": [1, 2],
        "set": [1, 2],
        "path": "a/b",
        "infinite": float("inf"),
    }


def test_more_layouts_than_are_remembered_are_still_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streamlens.runs.writer._CACHED", 3)
    sent = [
        Frame("activations", step, (f"l{step % 5}",), (torch.full((step % 7, 2), float(step)),))
        for step in range(40)
    ]
    with RunWriter(tmp_path / "run.db", "a") as writer:
        for start in range(0, len(sent), 4):
            writer.write(sent[start : start + 4])
            assert len(writer._layouts) <= 3 + 4
            assert len(writer._name_lists) <= 3 + 4 + 1
    with read_run(tmp_path / "run.db") as run:
        assert list(map(content, run.frames())) == list(map(content, sent))


def test_equal_layer_names_in_new_tuples_make_no_new_layout(tmp_path: Path) -> None:
    with RunWriter(tmp_path / "run.db", "a") as writer:
        for step in range(20):
            writer.write([Frame("loss", step, [f"layer{i}" for i in range(3)], torch.ones(3))])
        layouts = writer._db.execute("SELECT count(*) FROM layouts").fetchone()
        assert layouts == (1,)
        # Nor do they pile up in memory.
        assert len(writer._layouts) == 1


def test_frames_that_share_their_names_and_differ_in_one_respect_are_told_apart(tmp_path: Path) -> None:
    names, pair = ("a", "b"), ("x", "y")
    first = Frame("t", 0, names, torch.ones(2, 2), components=pair)
    sent = [
        first,
        first.replace(source="G"),
        first.replace(kind=Kind.EVENT),
        first.replace(components=()),
        first.replace(topic="u"),
        first.replace(values=torch.ones(2, 2, dtype=torch.float64)),
        first.replace(values=torch.ones(2, 2, 1)),
        first.replace(values=(torch.ones(2), torch.ones(2))),
        first.replace(layers=("a", "c")),
    ]
    with RunWriter(tmp_path / "run.db", "a") as writer:
        writer.write(sent)
    with read_run(tmp_path / "run.db") as run:
        assert list(map(content, run.frames())) == list(map(content, sent))
