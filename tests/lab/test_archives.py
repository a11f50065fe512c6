"""Published files: found, checked and downloaded; and the data sets made of them."""

from __future__ import annotations

import functools
import http.server
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from streamlens.errors import DatasetError
from streamlens.lab.data import DATASETS, ImageDataset, load_dataset
from streamlens.lab.data.archives import Published, obtain
from tests.helpers.archives import drawn, md5, publish, records, write_mnist, write_tar

CIFAR = {"CIFAR10": "cifar-10-binary.tar.gz", "CIFAR100": "cifar-100-binary.tar.gz"}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A folder that is served over HTTP on this machine."""
    folder = tmp_path / "served"
    folder.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{httpd.server_port}/", folder
    httpd.shutdown()
    thread.join()
    httpd.server_close()


def unreachable() -> str:
    """A server's address at which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}/"


def published(data: bytes = b"the data", *folders: str) -> Published:
    return Published("Things", "things.gz", md5(data), folders or ("https://example.org/",))


@pytest.mark.parametrize("place", ["Things/things.gz", "Things/raw/things.gz", "things.gz"])
def test_a_file_is_found_where_people_keep_it(place: str, tmp_path: Path) -> None:
    path = tmp_path / place
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"the data")
    assert obtain(published(), tmp_path, download=False) == path


def test_of_two_files_of_one_name_the_one_with_the_right_checksum_is_taken(tmp_path: Path) -> None:
    (tmp_path / "Things").mkdir()
    (tmp_path / "Things" / "things.gz").write_bytes(b"something else")
    (tmp_path / "things.gz").write_bytes(b"the data")
    assert obtain(published(), tmp_path, download=False) == tmp_path / "things.gz"


def test_a_missing_file_is_an_error_that_says_where_it_goes_and_where_it_is(tmp_path: Path) -> None:
    with pytest.raises(DatasetError) as error:
        obtain(published(), tmp_path, download=False)
    assert str(error.value) == (
        f"Things: there is no things.gz in {tmp_path}: put it into {tmp_path}/Things, or have it downloaded "
        "(download=True, --download) from https://example.org/things.gz"
    )


def test_a_wrong_checksum_is_an_error_that_tells_both(tmp_path: Path) -> None:
    (tmp_path / "things.gz").write_bytes(b"damaged")
    with pytest.raises(
        DatasetError, match=rf"whose MD5 is {md5(b'the data')}: .*MD5 {md5(b'damaged')}.*--download"
    ):
        obtain(published(), tmp_path, download=False)


def test_a_download_takes_its_place_whole_shows_its_progress_and_is_not_repeated(
    server: tuple[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url, served = server
    (served / "things.gz").write_bytes(b"the data")
    file = published(b"the data", url)
    path = obtain(file, tmp_path / "home" / "data", download=True)
    assert path == tmp_path / "home" / "data" / "Things" / "things.gz"
    assert path.read_bytes() == b"the data"
    assert list(path.parent.iterdir()) == [path]
    shown = capsys.readouterr()
    assert "Things: things.gz" in shown.err
    assert "8/8 bytes" in shown.err
    assert not shown.out
    (served / "things.gz").unlink()
    assert obtain(file, tmp_path / "home" / "data", download=True) == path


def test_an_interrupted_download_leaves_nothing_behind(
    server: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, served = server
    (served / "things.gz").write_bytes(b"the data")

    def interrupted(*_: Any) -> bytes:
        assert list((tmp_path / "Things").iterdir()), "it has begun"
        raise KeyboardInterrupt

    monkeypatch.setattr("http.client.HTTPResponse.read", interrupted)
    with pytest.raises(KeyboardInterrupt):
        obtain(published(b"the data", url), tmp_path, download=True)
    assert not list((tmp_path / "Things").iterdir())


def test_a_damaged_file_is_replaced_by_a_download(server: tuple[str, Path], tmp_path: Path) -> None:
    url, served = server
    (served / "things.gz").write_bytes(b"the data")
    (tmp_path / "Things").mkdir()
    (tmp_path / "Things" / "things.gz").write_bytes(b"half of the d")
    assert obtain(published(b"the data", url), tmp_path, download=True).read_bytes() == b"the data"


def test_a_second_address_is_tried_when_the_first_fails(server: tuple[str, Path], tmp_path: Path) -> None:
    url, served = server
    (served / "things.gz").write_bytes(b"the data")
    file = published(b"the data", unreachable(), url + "elsewhere/", url)
    assert obtain(file, tmp_path, download=True).read_bytes() == b"the data"


def test_without_a_network_the_error_names_reason_remedy_and_what_needs_none(tmp_path: Path) -> None:
    url = unreachable()
    with pytest.raises(DatasetError) as error:
        obtain(published(b"the data", url), tmp_path / "data", download=True)
    text = str(error.value)
    assert f"{url}things.gz: [Errno" in text
    assert "refused" in text
    assert f"put things.gz (MD5 {md5(b'the data')}) into {tmp_path}/data/Things" in text
    assert "digits, which need no download" in text
    assert not list((tmp_path / "data" / "Things").iterdir())


def test_what_a_server_sends_instead_is_not_kept(server: tuple[str, Path], tmp_path: Path) -> None:
    url, served = server
    (served / "things.gz").write_bytes(b"<html>please log in</html>")
    with pytest.raises(DatasetError, match=rf"what came has MD5 [0-9a-f]{{32}}, not {md5(b'the data')}"):
        obtain(published(b"the data", url), tmp_path, download=True)
    (served / "things.gz").unlink()
    with pytest.raises(DatasetError, match=r"things.gz: Not Found|File not found"):
        obtain(published(b"the data", url), tmp_path, download=True)
    assert not list((tmp_path / "Things").iterdir())


def test_a_folder_that_cannot_be_made_is_an_error_of_the_data_set(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DatasetError, match=r"Things could not be downloaded \(.*Not a directory|File exists"):
        obtain(published(), tmp_path / "file", download=True)


def normalised(images: Any, like: Any) -> Any:
    """Each channel's mean and deviation taken out, in float64 by NumPy."""
    pixels, model = (array.astype(np.float64) / 255 for array in (images, like))
    return (pixels - model.mean((0, 2, 3), keepdims=True)) / model.std((0, 2, 3), keepdims=True, ddof=1)


def check(data: ImageDataset, name: str, arrays: list[Any]) -> None:
    train, train_labels, test, test_labels = arrays
    assert data.name == name
    for split, images, labels in ((data.train, train, train_labels), (data.test, test, test_labels)):
        pixels, marks = split.tensors
        assert (pixels.dtype, marks.dtype) == (torch.float32, torch.int64)
        assert marks.tolist() == labels.tolist()
        np.testing.assert_allclose(pixels.numpy(), normalised(images, train), atol=1e-4)
    assert (data.channels, data.image_size) == (train.shape[1], train.shape[-1])


@pytest.mark.parametrize("name", ["MNIST", "FashionMNIST"])
def test_the_mnists_are_read_from_their_four_files(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrays = [drawn(0, 9, 28, 28), drawn(1, 9, below=10), drawn(2, 4, 28, 28), drawn(3, 4, below=10)]
    write_mnist(monkeypatch, name, tmp_path / name, arrays)
    data = load_dataset(name.lower(), data_dir=tmp_path)
    assert data.classes == 10
    check(data, name, [arrays[0][:, None], arrays[1], arrays[2][:, None], arrays[3]])
    assert load_dataset(name, data_dir=tmp_path, image_size=8).train.tensors[0].shape == (9, 1, 8, 8)


@pytest.mark.parametrize(("name", "classes"), [("CIFAR10", 10), ("CIFAR100", 100)])
def test_the_cifars_are_read_from_their_archives(
    name: str, classes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, test = drawn(0, 10, 3, 32, 32), drawn(1, 3, 3, 32, 32)
    labels, test_labels = drawn(2, 10, below=classes), drawn(3, 3, below=classes)
    if name == "CIFAR10":
        members = {
            f"cifar-10-batches-bin/data_batch_{n + 1}.bin": records([labels[2 * n :][:2]], train[2 * n :][:2])
            for n in range(5)
        }
        members["cifar-10-batches-bin/test_batch.bin"] = records([test_labels], test)
    else:
        coarse = drawn(4, 10, below=20)
        members = {
            "cifar-100-binary/train.bin": records([coarse, labels], train),
            "cifar-100-binary/test.bin": records([coarse[:3], test_labels], test),
        }
    publish(monkeypatch, name, write_tar(tmp_path / CIFAR[name], members))
    data = load_dataset(name, data_dir=tmp_path)
    assert data.classes == classes
    check(data, name, [train, labels, test, test_labels])


def test_labels_beyond_the_classes_and_counts_that_differ_are_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrays = [drawn(0, 9, 28, 28), np.full(9, 10, np.uint8), drawn(2, 4, 28, 28), drawn(3, 4, below=10)]
    write_mnist(monkeypatch, "MNIST", tmp_path / "a", arrays)
    with pytest.raises(DatasetError, match=r"train-labels-idx1-ubyte.gz is damaged: label 10 of 10 classes"):
        load_dataset("MNIST", data_dir=tmp_path / "a")
    arrays[1] = drawn(1, 8, below=10)
    write_mnist(monkeypatch, "MNIST", tmp_path / "b", arrays)
    with pytest.raises(DatasetError, match=r"has 9 images, but .* has 8 labels"):
        load_dataset("MNIST", data_dir=tmp_path / "b")


@pytest.mark.parametrize("name", [name for name in DATASETS if name != "digits"])
def test_a_data_set_that_is_not_there_says_how_to_get_it(name: str, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=rf"{name}: there is no .*gz in {tmp_path}: put it .*--download"):
        load_dataset(name, data_dir=tmp_path)


def test_data_is_looked_for_in_the_users_cache_unless_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(DatasetError, match=rf"in {tmp_path}/streamlens:"):
        load_dataset("CIFAR10")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(DatasetError, match=rf"in {tmp_path}/.cache/streamlens:"):
        load_dataset("CIFAR10")
