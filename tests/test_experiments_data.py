"""Data sets: the published formats read right, damaged files refused by name, splits disjoint and seeded."""

import gzip
import io
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from nestopt_ext.experiments import data, formats
from nestopt_ext.experiments.data import DataError
from nestopt_ext.experiments.formats import FormatError

RNG = np.random.default_rng(0)


def idx_bytes(array: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    return header + array.astype(np.uint8).tobytes()


def write_mnist(folder: Path, *, compress: bool = True, train: int = 30, test: int = 10) -> dict[str, np.ndarray]:
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {
        "train-images-idx3-ubyte": RNG.integers(0, 256, (train, 28, 28)),
        "train-labels-idx1-ubyte": np.arange(train) % 10,
        "t10k-images-idx3-ubyte": RNG.integers(0, 256, (test, 28, 28)),
        "t10k-labels-idx1-ubyte": np.arange(test) % 10,
    }
    for name, array in arrays.items():
        raw = idx_bytes(array)
        if compress:
            (folder / f"{name}.gz").write_bytes(gzip.compress(raw))
        else:
            (folder / name).write_bytes(raw)
    return arrays


def cifar_batch(count: int = 4) -> tuple[np.ndarray, list[int]]:
    return RNG.integers(0, 256, (count, 3072)).astype(np.uint8), [int(i) % 10 for i in range(count)]


BATCHES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]


def python_batch(pixels: np.ndarray, labels: list[int]) -> bytes:
    return pickle.dumps({b"batch_label": b"training batch", b"labels": labels, b"data": pixels}, protocol=2)


def binary_batch(pixels: np.ndarray, labels: list[int]) -> bytes:
    return b"".join(bytes([label]) + row.tobytes() for label, row in zip(labels, pixels, strict=True))


def write_tar(path: Path, members: dict[str, bytes], mode: str) -> None:
    with tarfile.open(path, mode) as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


# idx


@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize("below", ["", "raw", "MNIST/raw"])
def test_idx_files_are_read_as_written(tmp_path, compress, below):
    arrays = write_mnist(tmp_path / below, compress=compress)
    read = data.load("mnist", tmp_path)
    assert read.images.shape == (30, 1, 28, 28) and read.test_images.shape == (10, 1, 28, 28)
    assert (read.images[:, 0] == arrays["train-images-idx3-ubyte"]).all()
    assert (read.test_labels == arrays["t10k-labels-idx1-ubyte"]).all()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda raw: raw[:-1], "must hold"),
        (lambda raw: raw + b"x", "must hold"),
        (lambda raw: b"", "magic number"),
        (lambda raw: b"\x00\x00\x08\x01" + raw[4:], "magic number"),
        (lambda raw: b"<html>not found</html>" * 9, "magic number"),
        (lambda raw: gzip.compress(raw)[:-9], "cannot be read"),
        (lambda raw: gzip.compress(raw)[:40] + b"\xff" * 40, "cannot be read"),
        (lambda raw: raw[:4] + b"\xff" * 12 + raw[16:], "must hold"),
    ],
)
def test_damaged_idx_is_refused_with_its_path(tmp_path, damage, message):
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(damage(idx_bytes(RNG.integers(0, 256, (3, 5, 5)))))
    with pytest.raises(FormatError, match=message) as caught:
        formats.read_idx(path, 3)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def test_idx_counts_and_labels_must_agree(tmp_path):
    images, labels = tmp_path / "images", tmp_path / "labels"
    images.write_bytes(idx_bytes(np.zeros((3, 4, 4))))
    labels.write_bytes(idx_bytes(np.zeros(2)))
    with pytest.raises(FormatError, match="a label for each of 3 images"):
        formats.read_idx_pair(images, labels, 10)
    labels.write_bytes(idx_bytes(np.array([0, 1, 10])))
    with pytest.raises(FormatError, match=r"labels must lie in 0\.\.9; got 0\.\.10"):
        formats.read_idx_pair(images, labels, 10)


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "cifar10"])
def test_missing_files_say_where_to_get_them(tmp_path, name):
    for folder in (None, tmp_path, tmp_path / "absent"):
        with pytest.raises(DataError, match=r"(yann\.lecun\.com|zalandoresearch|cs\.toronto\.edu)"):
            data.load(name, folder)


# CIFAR-10


@pytest.mark.parametrize("layout", ["python", "binary", "python folder", "python archive", "binary archive"])
def test_cifar10_layouts_give_the_same_pictures(tmp_path, layout):
    batches = {name: cifar_batch() for name in BATCHES}
    write, suffix, folder = (
        (python_batch, "", "cifar-10-batches-py")
        if "python" in layout
        else (binary_batch, ".bin", "cifar-10-batches-bin")
    )
    files = {f"{name}{suffix}": write(*batch) for name, batch in batches.items()}
    if "archive" in layout:
        archive = tmp_path / f"cifar-10-{layout.split()[0]}.tar.gz"
        write_tar(archive, {f"{folder}/{name}": content for name, content in files.items()}, "w:gz")
    else:
        place = tmp_path / folder if "folder" in layout else tmp_path
        place.mkdir(exist_ok=True)
        for name, content in files.items():
            (place / name).write_bytes(content)
    read = data.load("cifar10", tmp_path)
    assert read.images.shape == (20, 3, 32, 32) and read.test_images.shape == (4, 3, 32, 32)
    expected = np.concatenate([batches[name][0] for name in BATCHES[:-1]]).reshape(-1, 3, 32, 32)
    assert (read.images == expected).all()
    assert read.test_labels.tolist() == batches["test_batch"][1]


def test_pickled_batch_cannot_execute_code(tmp_path):
    marker = tmp_path / "executed"

    class Bomb:
        def __reduce__(self):
            return Path.touch, (marker,)

    for bomb in (Bomb(), {b"data": Bomb(), b"labels": []}):
        path = tmp_path / "data_batch_1"
        path.write_bytes(pickle.dumps(bomb, protocol=2))
        with pytest.raises(FormatError, match="refers to"):
            formats.read_cifar_python(path)
    assert not marker.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not a pickle",
        pickle.dumps([1, 2]),
        pickle.dumps({b"data": [1], b"labels": [1]}),
        pickle.dumps({b"data": np.zeros((2, 7), np.uint8), b"labels": [0, 1]}, protocol=2),
        pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"labels": [0]}, protocol=2),
        pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"labels": [0, "x"]}, protocol=2),
        pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"labels": [0, 10]}, protocol=2),
        pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"labels": [0, 10**30]}, protocol=2),
        pickle.dumps({b"data": np.zeros((2, 3072), np.float64), b"labels": [0, 1]}, protocol=2),
        python_batch(np.zeros((2, 3072), np.uint8), [0, 1])[:-50],
    ],
)
def test_damaged_python_batch_is_refused(tmp_path, content):
    path = tmp_path / "data_batch_1"
    path.write_bytes(content)
    with pytest.raises(FormatError) as caught:
        formats.read_cifar_python(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def test_damaged_binary_batch_and_archive_are_refused(tmp_path):
    path = tmp_path / "data_batch_1.bin"
    for content in (b"", bytes(3072), binary_batch(np.zeros((1, 3072), np.uint8), [11])):
        path.write_bytes(content)
        with pytest.raises(FormatError, match=r"data_batch_1\.bin: "):
            formats.read_cifar_binary(path)
    path.unlink()
    archive = tmp_path / "cifar-10-binary.tar.gz"
    write_tar(archive, {"a/data_batch_1.bin": binary_batch(*cifar_batch())}, "w:gz")
    with pytest.raises(FormatError, match=r"must hold data_batch_2\.bin"):
        data.load("cifar10", tmp_path)
    archive.write_bytes(archive.read_bytes()[:200])
    with pytest.raises(FormatError, match="cannot be read"):
        data.load("cifar10", tmp_path)


def picture(colour: int, size: int = 32) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (size, size), (colour, 0, 255 - colour)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("mode", ["w:xz", "w:gz", "w"])
def test_class_folders_are_read_out_of_the_archive(tmp_path, mode):
    pytest.importorskip("PIL")
    suffix = {"w:xz": ".tar.xz", "w:gz": ".tar.gz", "w": ".tar"}[mode]
    members = {
        "train/truck/0001.png": picture(9),
        "train/airplane/0000.png": picture(0),
        "train/cat/0000.png": picture(3),
    }
    write_tar(tmp_path / f"cifar10-train{suffix}", members, mode)
    write_tar(tmp_path / f"cifar10-test{suffix}", {"test/ship/0000.png": picture(8)}, mode)
    read = data.load("cifar10", tmp_path)
    assert read.labels.tolist() == [0, 3, 9] and read.test_labels.tolist() == [8]
    assert read.images[:, 0, 0, 0].tolist() == [0, 3, 9] and (read.images[:, 2] == 255 - read.images[:, 0]).all()
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"cifar10-test{suffix}", f"cifar10-train{suffix}"]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({}, "must hold pictures"),
        ({"train/zebra/0.png": b""}, "named after a class; got 'zebra'"),
        ({"train/cat/0.png": b"nonsense"}, "is not a picture"),
        ({"train/cat/0.png": "small"}, "32x32 pixels; got 8x8"),
        ({"train/cat/0.png": "cut"}, "is not a picture"),
    ],
)
def test_bad_class_folders_are_refused(tmp_path, members, message):
    pytest.importorskip("PIL")
    made = {"small": picture(1, 8), "cut": picture(1)[:60]}
    path = tmp_path / "x-train.tar"
    write_tar(path, {name: made[c] if isinstance(c, str) else c for name, c in members.items()}, "w")
    with pytest.raises(FormatError, match=message):
        formats.read_class_folders(path, data.CIFAR10_CLASSES)


# Splits


@pytest.fixture(scope="module")
def digits() -> data.Dataset:
    pytest.importorskip("sklearn")
    return data.load("digits")


def identities(part: data.Part, split: data.Split) -> set[bytes]:
    return {row.tobytes() for row in (part.x * split.scale + split.shift).round().to(torch.uint8).numpy()}


def test_split_is_disjoint_complete_and_seeded(digits):
    split = data.make_split(digits, 300, 200, 0.0, seed=3)
    again = data.make_split(digits, 300, 200, 0.0, seed=3)
    other = data.make_split(digits, 300, 200, 0.0, seed=4)
    assert [len(p) for p in (split.train, split.valid, split.test)] == [300, 200, 1297]
    train, valid, test = (identities(p, split) for p in (split.train, split.valid, split.test))
    assert not (train & valid or train & test or valid & test)
    assert torch.equal(split.train.x, again.train.x) and torch.equal(split.test.y, again.test.y)
    assert not torch.equal(split.train.x, other.train.x)
    assert abs(float(split.train.x.mean())) < 1e-5 and abs(float(split.train.x.std()) - 1) < 1e-4


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.4, 0.95])
def test_label_noise_flips_exactly_that_share_and_only_in_training(digits, rate):
    clean = data.make_split(digits, 500, 100, 0.0, seed=1)
    noisy = data.make_split(digits, 500, 100, rate, seed=1)
    assert int(noisy.flipped.sum()) == round(500 * rate)
    assert torch.equal(noisy.flipped, noisy.train.y != clean.train.y)
    assert torch.equal(noisy.true_y, clean.train.y)
    assert torch.equal(noisy.valid.y, clean.valid.y) and torch.equal(noisy.test.y, clean.test.y)


def test_published_test_part_is_used_whole(tmp_path):
    write_mnist(tmp_path)
    split = data.make_split(data.load("mnist", tmp_path), 20, 10, 0.0, seed=0)
    assert [len(p) for p in (split.train, split.valid, split.test)] == [20, 10, 10]


def test_too_large_split_is_refused_with_the_remedy(digits):
    with pytest.raises(DataError, match=r"fit into the 1797 examples of digits.*--train-size"):
        data.make_split(digits, 1000, 797, 0.0, seed=0)
