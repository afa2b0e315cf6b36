"""Words for a language model: the published files of the Penn Treebank, as columns and chunks of word numbers.

``ptb`` is the Penn Treebank of Marcus, Santorini and Marcinkiewicz (1993) as prepared by Mikolov et al. (2010); its
text is licensed by the Linguistic Data Consortium. It is read from files that the caller has.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..data import DataError
from ..formats import FormatError

_END = "<eos>"
_UNKNOWN = "<unk>"
_PARTS = ("train", "valid", "test")
_HOME = "ptb.train.txt, ptb.valid.txt and ptb.test.txt are in simple-examples.tgz at Mikolov's page, fit.vutbr.cz"


@dataclass(frozen=True)
class Corpus:
    """Three texts as numbers of words, int64 [words] each; ``vocabulary[n]`` is the word of number n."""

    train: Tensor
    valid: Tensor
    test: Tensor
    vocabulary: tuple[str, ...]


def read_corpus(data_dir: Path | None) -> Corpus:
    """Reads ``ptb.train.txt``, ``ptb.valid.txt`` and ``ptb.test.txt``: words between blanks, ``<eos>`` behind a line.

    The vocabulary is that of the training text, in the order of its first use. Raises DataError when there are no such
    files and FormatError when one is not a text, has no word, or has one that training lacks where that has no <unk>.
    """
    if data_dir is None:
        raise DataError(f"data ptb needs --data-dir, the folder with its files; {_HOME}.")
    texts = {part: _words(_find(data_dir, f"ptb.{part}.txt")) for part in _PARTS}
    place: dict[str, int] = {}
    for word in texts["train"][1]:
        place.setdefault(word, len(place))
    train, valid, test = (_numbers(*texts[part], place) for part in _PARTS)
    return Corpus(train, valid, test, tuple(place))


def columns(words: Tensor, batch_size: int) -> Tensor:
    """A text cut into ``batch_size`` pieces of equal length side by side, [words] to [words // batch_size, batch_size].

    >>> columns(torch.arange(7), 3).tolist()
    [[0, 2, 4], [1, 3, 5]]
    """
    length = len(words) // batch_size
    return words[: length * batch_size].view(batch_size, length).t().contiguous()


def chunks(text: Tensor, length: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Goes down the columns [T, B] in chunks of ``length`` words: words, and the words that follow, [<= length, B].

    >>> [(x.flatten().tolist(), y.flatten().tolist()) for x, y in chunks(torch.arange(6).view(6, 1), 3)]
    [([0, 1, 2], [1, 2, 3]), ([3, 4], [4, 5])]
    """
    for start in range(0, len(text) - 1, length):
        stop = min(start + length, len(text) - 1)
        yield text[start:stop], text[start + 1 : stop + 1]


def _find(data_dir: Path, name: str) -> Path:
    for place in (data_dir, data_dir / "data", data_dir / "simple-examples" / "data"):
        if (place / name).is_file():
            return place / name
    raise DataError(f"--data-dir {data_dir} has no {name}; {_HOME}.")


def _words(path: Path) -> tuple[Path, list[str]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise FormatError(f"{path}: must be a text; got bytes that are none at {error.start}.") from error
    words = [word for line in lines for word in (*line.split(), _END)]
    if all(word == _END for word in words):
        raise FormatError(f"{path}: must hold words; got none.")
    return path, words


def _numbers(path: Path, words: list[str], place: dict[str, int]) -> Tensor:
    unknown = place.get(_UNKNOWN)
    numbers = [place.get(word, unknown) for word in words]
    if None in numbers:
        word = words[numbers.index(None)][:40]
        raise FormatError(f"{path}: words must be among those of the training text, which has no <unk>; got {word!r}.")
    return torch.tensor(numbers, dtype=torch.int64)


def require_length(name: str, text: Tensor) -> None:
    """Raises DataError unless the columns [T, B] of part ``name`` hold a word and one that follows."""
    if len(text) < 2:
        raise DataError(f"the {name} text is too short for {text.shape[1]} columns of 2 words. Lower --batch-size.")
