"""IDX and the binary CIFAR, read from small files in exactly those formats, and from damaged ones."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch

from streamlens.errors import DatasetError
from streamlens.lab.data.cifar import read_cifar
from streamlens.lab.data.idx import read_idx
from tests.helpers.archives import drawn, idx, records, write_idx, write_tar


def test_idx_files_give_back_what_was_written(tmp_path: Path) -> None:
    images, labels = drawn(0, 5, 4, 3), drawn(1, 5, below=10)
    for array in (images, labels):
        read = read_idx(write_idx(tmp_path / "file.gz", array), dimensions=array.ndim)
        assert read.dtype == torch.uint8
        assert np.array_equal(read.numpy(), array)


def test_the_last_dimension_of_an_idx_file_is_the_fastest_and_sizes_are_big_endian(tmp_path: Path) -> None:
    # Written out, byte by byte, as the format's description has it.
    header = b"\x00\x00\x08\x03" + b"\x00\x00\x00\x01" + b"\x00\x00\x00\x02" + b"\x00\x00\x00\x03"
    (tmp_path / "file.gz").write_bytes(packed(header + bytes([1, 2, 3, 4, 5, 6])))
    assert read_idx(tmp_path / "file.gz", dimensions=3).tolist() == [[[1, 2, 3], [4, 5, 6]]]


def packed(data: bytes) -> bytes:
    return gzip.compress(data, mtime=0)


GOOD = idx(drawn(0, 2, 3, 3))
NOISE = packed(idx(drawn(0, 40, 28, 28)))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (packed(idx(drawn(0, 2, 3, 3), kind=0x0D)), "magic number is 0x00000d03, not 0x00000803"),
        (packed(idx(drawn(0, 18))), "magic number is 0x00000801, not 0x00000803"),
        (packed(b"\x01" + GOOD[1:]), "magic number is 0x01000803"),
        (packed(GOOD[:-1]), "its header tells of 18 bytes, it has 17"),
        (packed(GOOD + b"x"), "its header tells of 18 bytes, it has more"),
        (packed(GOOD[:10]), "it ends within its header"),
        (packed(b""), "it ends within its header"),
        (packed(GOOD[:4] + b"\xff" * 12), r"its header tells of \d{20,} bytes"),
        (NOISE[: len(NOISE) // 2], "is no whole gzip file"),
        (NOISE[:-6] + b"\x00\x00" + NOISE[-4:], "is no whole gzip file: CRC check failed"),
        (GOOD, "is no whole gzip file: Not a gzipped file"),
        (NOISE[:200] + bytes(200) + NOISE[400:], "is no whole gzip file|ends|tells of"),
    ],
    ids=[
        "floats",
        "one dimension",
        "magic",
        "one byte short",
        "one byte over",
        "half a header",
        "empty",
        "boundless",
        "truncated gzip",
        "checksum",
        "not compressed",
        "changed within",
    ],
)
def test_a_damaged_idx_file_is_an_error_that_names_it_and_the_damage(
    data: bytes, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "images.gz"
    path.write_bytes(data)
    with pytest.raises(DatasetError, match=rf"images.gz .*({message})"):
        read_idx(path, dimensions=3)


def test_an_idx_file_without_examples_is_an_empty_array(tmp_path: Path) -> None:
    assert read_idx(write_idx(tmp_path / "file.gz", drawn(0, 0, 28, 28)), dimensions=3).shape == (0, 28, 28)


def test_cifar_members_are_read_in_the_order_asked_for_whatever_theirs(tmp_path: Path) -> None:
    first, second = drawn(0, 3, 3, 32, 32), drawn(1, 2, 3, 32, 32)
    labels = drawn(2, 5, below=10)
    path = write_tar(
        tmp_path / "cifar.tar.gz",
        {
            "batches/readme.html": b"<html>",
            "batches/2.bin": records([labels[3:]], second),
            "batches/1.bin": records([labels[:3]], first),
        },
    )
    split = read_cifar(path, ["batches/1.bin", "batches/2.bin"], label_bytes=1)
    assert np.array_equal(split.images.numpy(), np.concatenate([first, second]))
    assert split.labels.tolist() == labels.tolist()


def test_a_record_is_red_green_blue_row_by_row_behind_its_label(tmp_path: Path) -> None:
    record = bytes([7]) + b"".join(bytes([colour]) * 1024 for colour in (10, 20, 30))
    record = record[:2] + bytes([99]) + record[3:]  # red, row 0, column 1
    split = read_cifar(write_tar(tmp_path / "a.tar.gz", {"x.bin": record}), ["x.bin"], label_bytes=1)
    assert split.labels.tolist() == [7]
    assert split.images[0, :, 5, 5].tolist() == [10, 20, 30]
    assert split.images[0, 0, 0, :3].tolist() == [10, 99, 10]


def test_of_two_labels_the_fine_one_is_taken(tmp_path: Path) -> None:
    coarse, fine, images = drawn(0, 4, below=20), drawn(1, 4, below=100), drawn(2, 4, 3, 32, 32)
    path = write_tar(tmp_path / "a.tar.gz", {"train.bin": records([coarse, fine], images)})
    split = read_cifar(path, ["train.bin"], label_bytes=2)
    assert split.labels.tolist() == fine.tolist()
    assert np.array_equal(split.images.numpy(), images)


RECORDS = records([drawn(0, 2, below=10)], drawn(1, 2, 3, 32, 32))


@pytest.mark.parametrize(
    ("members", "links", "message"),
    [
        ({"y.bin": RECORDS}, {}, "has no x.bin"),
        ({"x.bin": RECORDS[:-1]}, {}, "x.bin has 6145 bytes, which are no whole records of 3073"),
        ({"x.bin": b""}, {}, "x.bin has 0 bytes"),
        ({"y.bin": RECORDS}, {"x.bin": "y.bin"}, "x.bin is not one plain file"),
        ({"y.bin": RECORDS}, {"x.bin": "/etc/passwd"}, "x.bin is not one plain file"),
    ],
    ids=["missing", "half a record", "empty", "link within", "link outside"],
)
def test_a_damaged_cifar_archive_is_an_error_that_names_it_and_the_damage(
    members: dict[str, bytes], links: dict[str, str], message: str, tmp_path: Path
) -> None:
    path = write_tar(tmp_path / "cifar.tar.gz", members, links=links)
    with pytest.raises(DatasetError, match=rf"cifar.tar.gz is damaged: .*{message}"):
        read_cifar(path, ["x.bin"], label_bytes=1)


@pytest.mark.parametrize("damage", ["truncated", "not compressed", "changed", "empty"])
def test_an_archive_that_is_none_is_an_error(damage: str, tmp_path: Path) -> None:
    path = write_tar(tmp_path / "cifar.tar.gz", {"x.bin": RECORDS})
    data = path.read_bytes()
    half = len(data) // 2
    path.write_bytes(
        {
            "truncated": data[:half],
            "not compressed": gzip.decompress(data),
            "changed": data[:half] + bytes(500) + data[half + 500 :],
            "empty": b"",
        }[damage]
    )
    with pytest.raises(DatasetError, match=r"cifar.tar.gz (is no whole tar.gz archive|is damaged)"):
        read_cifar(path, ["x.bin"], label_bytes=1)


def test_an_archive_that_reaches_outside_writes_nothing_anywhere(tmp_path: Path) -> None:
    inner = tmp_path / "data" / "CIFAR10"
    path = write_tar(
        inner / "cifar.tar.gz",
        {"../../escaped.bin": RECORDS, f"{tmp_path}/absolute.bin": RECORDS, "x.bin": RECORDS},
        links={"link": str(tmp_path)},
    )
    assert len(read_cifar(path, ["x.bin"], label_bytes=1).labels) == 2
    assert [found for found in tmp_path.rglob("*") if found.is_file()] == [path]
    # Even a member that is asked for by such a name is only read.
    assert len(read_cifar(path, ["../../escaped.bin"], label_bytes=1).labels) == 2
    assert [found for found in tmp_path.rglob("*") if found.is_file()] == [path]
