"""Readers of the published file formats: idx, CIFAR-10 batches (Python and binary), class folders in a tar archive.

Every reader checks what it reads (magic numbers, sizes, counts, labels) and raises `FormatError` with the path. None of
them writes or extracts a file, and none of them can be made to execute code by a file.
"""

import gzip
import io
import pickle
import tarfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]
Labels = NDArray[np.int64]

#: The types that an idx file can hold are named by its third byte; the image sets use unsigned bytes alone.
_IDX_UINT8 = 0x08
_CIFAR_SHAPE = (3, 32, 32)
_CIFAR_BYTES = 3 * 32 * 32
_PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png")


class FormatError(ValueError):
    """A file does not hold what its format promises; the message starts with the path."""


def read_idx(path: Path, dims: int) -> Pixels:
    """Reads an idx file of unsigned bytes, gzipped or not, into an array of ``dims`` dimensions.

    Raises FormatError when the magic number, the number of dimensions or the length is not right.
    """
    try:
        raw = path.read_bytes()
        data = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    except (OSError, EOFError, zlib.error) as error:
        raise FormatError(f"{path}: cannot be read: {_one_line(error)}.") from error
    header = 4 + 4 * dims
    magic = int.from_bytes(data[:4], "big")
    wanted = _IDX_UINT8 << 8 | dims
    if len(data) < header or magic != wanted:
        raise FormatError(f"{path}: idx magic number must be {wanted}; got {magic}. It is another file, or damaged.")
    shape = tuple(int.from_bytes(data[4 + 4 * i : 8 + 4 * i], "big") for i in range(dims))
    size = 1
    for extent in shape:
        size *= extent
    if len(data) != header + size:
        raise FormatError(
            f"{path}: must hold {header + size} bytes for shape {shape}; got {len(data)}. Fetch the file again."
        )
    pixels: Pixels = np.frombuffer(data, np.uint8, offset=header).reshape(shape)
    return pixels


def read_idx_pair(images: Path, labels: Path, classes: int) -> tuple[Pixels, Labels]:
    """Reads images [N, 1, height, width] and labels [N] from a pair of idx files."""
    pixels, answers = read_idx(images, 3), read_idx(labels, 1)
    if len(pixels) != len(answers):
        raise FormatError(
            f"{labels}: must hold a label for each of {len(pixels)} images of {images.name}; got {len(answers)}."
        )
    return pixels[:, None], _labels(labels, answers, classes)


def read_cifar_python(path: Path, stream: IO[bytes] | None = None) -> tuple[Pixels, Labels]:
    """Reads one batch of the "python version" of CIFAR-10: images [N, 3, 32, 32] and labels [N].

    ``stream`` holds the bytes when the batch is a member of an archive. The pickle is read by an unpickler that knows
    numpy arrays and nothing else.
    """
    try:
        with stream or path.open("rb") as file:
            batch = _ArrayUnpickler(file, encoding="bytes").load()
    except (OSError, MemoryError, *_PICKLE_FAULTS) as error:
        raise FormatError(f"{path}: is not a CIFAR-10 batch of the Python version: {_one_line(error)}.") from error
    data = _entry(batch, "data")
    answers = _entry(batch, "labels")
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != _CIFAR_BYTES:
        raise FormatError(f"{path}: entry 'data' must be an array of bytes [N, {_CIFAR_BYTES}]; got {_describe(data)}.")
    if not isinstance(answers, list) or len(answers) != len(data) or not all(type(a) is int for a in answers):
        raise FormatError(f"{path}: entry 'labels' must be a list of {len(data)} integers; got {_describe(answers)}.")
    return data.reshape(-1, *_CIFAR_SHAPE), _labels(path, answers, 10)


def read_cifar_binary(path: Path, stream: IO[bytes] | None = None) -> tuple[Pixels, Labels]:
    """Reads one batch of the "binary version" of CIFAR-10: images [N, 3, 32, 32] and labels [N]."""
    try:
        with stream or path.open("rb") as file:
            data = file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise FormatError(f"{path}: cannot be read: {_one_line(error)}.") from error
    record = 1 + _CIFAR_BYTES
    if not data or len(data) % record:
        raise FormatError(f"{path}: must hold records of {record} bytes; got {len(data)} bytes. Fetch the file again.")
    rows = np.frombuffer(data, np.uint8).reshape(-1, record)
    return rows[:, 1:].reshape(-1, *_CIFAR_SHAPE), _labels(path, rows[:, 0], 10)


def read_tar_batches(path: Path, names: Iterable[str]) -> tuple[Pixels, Labels]:
    """Reads CIFAR-10 batches out of a published archive, by the last part of their names, in the order asked for."""
    wanted = list(names)
    found: dict[str, tuple[Pixels, Labels]] = {}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                name = Path(member.name).name
                stream = archive.extractfile(member) if member.isfile() and name in wanted else None
                if stream is not None:
                    read = read_cifar_binary if name.endswith(".bin") else read_cifar_python
                    found[name] = read(path / name, stream)
    except _TAR_FAULTS as error:
        raise FormatError(f"{path}: cannot be read as a tar archive: {_one_line(error)}.") from error
    missing = [name for name in wanted if name not in found]
    if missing:
        raise FormatError(f"{path}: must hold {missing[0]}; it does not. Fetch the file again.")
    return join([found[name] for name in wanted])


def read_class_folders(path: Path, classes: Iterable[str]) -> tuple[Pixels, Labels]:
    """Reads pictures ``<anything>/<class>/<name>.jpg|png`` out of a tar archive: images [N, 3, 32, 32] and labels [N].

    The label is the place of the class in ``classes``. Pictures come in the order of their names, whatever the order in
    the archive. Needs Pillow; raises ModuleNotFoundError naming it otherwise.
    """
    from PIL import Image

    place = {name: label for label, name in enumerate(classes)}
    pictures: list[tuple[str, Pixels, int]] = []
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                if not member.isfile() or not member.name.lower().endswith(_PICTURE_SUFFIXES):
                    continue
                folder = Path(member.name).parent.name
                if folder not in place:
                    raise FormatError(
                        f"{path}: {member.name} must lie in a folder named after a class; got {folder!r}."
                    )
                stream = archive.extractfile(member)
                if stream is None:
                    continue
                content = io.BytesIO(stream.read())
                try:
                    with Image.open(content) as image:
                        pixels = np.asarray(image.convert("RGB"), np.uint8)
                except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
                    raise FormatError(f"{path}: {member.name} is not a picture: {_one_line(error)}.") from error
                if pixels.shape != (32, 32, 3):
                    got = f"{pixels.shape[1]}x{pixels.shape[0]}"
                    raise FormatError(f"{path}: {member.name} must have 32x32 pixels; got {got}.")
                pictures.append((member.name, pixels, place[folder]))
    except _TAR_FAULTS as error:
        raise FormatError(f"{path}: cannot be read as a tar archive: {_one_line(error)}.") from error
    if not pictures:
        raise FormatError(f"{path}: must hold pictures <class>/<name>.jpg or .png; got none.")
    pictures.sort(key=lambda picture: picture[0])
    images = np.stack([pixels for _, pixels, _ in pictures]).transpose(0, 3, 1, 2)
    return np.ascontiguousarray(images), np.array([label for _, _, label in pictures], np.int64)


def join(batches: Iterable[tuple[Pixels, Labels]]) -> tuple[Pixels, Labels]:
    """Concatenates batches in order."""
    pixels, labels = zip(*batches, strict=True)
    return np.concatenate(pixels), np.concatenate(labels)


class _ArrayUnpickler(pickle.Unpickler):
    """Knows how to rebuild a numpy array, and refuses to look up anything else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("numpy", "ndarray"):
            return np.ndarray
        if (module, name) == ("numpy", "dtype"):
            return np.dtype
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return _empty_array
        if (module, name) == ("_codecs", "encode"):
            return _encode_latin1
        raise pickle.UnpicklingError(f"it refers to {module}.{name}, which a batch of pictures has no use for")


def _empty_array(kind: type, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
    """What numpy's own pickles ask for first: an empty array, filled by the state that follows."""
    if kind is not np.ndarray or shape != (0,):
        raise pickle.UnpicklingError("it does not start its arrays empty")
    empty: NDArray[Any] = np.ndarray((0,), np.uint8)
    return empty


def _encode_latin1(text: str, encoding: str) -> bytes:
    """How Python 3 writes bytes in an old protocol; one encoding is enough for that."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it encodes bytes as {encoding!r}")
    return text.encode("latin1")


#: What a damaged or foreign pickle can raise while it is taken apart.
_PICKLE_FAULTS = (
    pickle.UnpicklingError,
    AttributeError,
    EOFError,
    ImportError,
    IndexError,
    KeyError,
    OverflowError,
    TypeError,
    ValueError,
    zlib.error,
)
#: What a damaged archive can raise; lzma and bz2 raise EOFError, OSError or their own subclass of Exception.
_TAR_FAULTS: tuple[type[Exception], ...] = (tarfile.TarError, OSError, EOFError, zlib.error)
try:
    import lzma

    _TAR_FAULTS = (*_TAR_FAULTS, lzma.LZMAError)
except ImportError:  # a Python built without lzma refuses .tar.xz through tarfile.CompressionError
    pass


def _entry(batch: object, name: str) -> Any:
    if not isinstance(batch, Mapping):
        return None
    return batch.get(name.encode(), batch.get(name))


def _labels(path: Path, answers: Any, classes: int) -> Labels:
    try:
        labels = np.asarray(answers, np.int64)
    except OverflowError as error:
        raise FormatError(f"{path}: labels must lie in 0..{classes - 1}; got a larger number.") from error
    if labels.size and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise FormatError(f"{path}: labels must lie in 0..{classes - 1}; got {int(labels.min())}..{int(labels.max())}.")
    return labels


def _describe(value: object) -> str:
    shape = getattr(value, "shape", None)
    return type(value).__name__ if shape is None else f"{type(value).__name__} of shape {tuple(shape)}"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__
