"""The problem on text: a word-level LSTM on the Penn Treebank."""

import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...response import (
    ActivationRegularization,
    DeltaStnEmbedding,
    DeltaStnLSTM,
    HyperParameters,
    StnEmbedding,
    StnLSTM,
    StnModel,
    StnVariationalDropout,
)
from . import space, text
from .batches import Chunks
from .config import SelfTuneConfig
from .problem import Regularizer, SelfTuningProblem

#: Columns of the texts that are only scored.
_EVALUATION_COLUMNS = 10
_RATES = ("dropout_output", "dropout_hidden", "dropout_input", "dropout_embedding", "dropconnect")
State = tuple[Tensor, Tensor]


class WordModel(nn.Module):
    """Two LSTM layers between an embedding and a decoder that is tied to its plain table.

    Words are dropped in the embedding, whole units in what goes into, between and out of the layers, and recurrent
    weights within them.
    """

    def __init__(self, words: int, width: int, num_hparams: int, *, centred: bool) -> None:
        super().__init__()
        embedding, lstm = (DeltaStnEmbedding, DeltaStnLSTM) if centred else (StnEmbedding, StnLSTM)
        options: dict[str, Any] = {"num_hparams": num_hparams, "batch_dim": 1}
        self.embedding = embedding(words, width, word_dropout="dropout_embedding", **options)
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        nn.init.uniform_(self.embedding.response_weight, -0.1, 0.1)
        self.input_dropout = StnVariationalDropout("dropout_input")
        self.first = lstm(width, width, weight_dropout="dropconnect", **options)
        self.hidden_dropout = StnVariationalDropout("dropout_hidden")
        self.second = lstm(width, width, weight_dropout="dropconnect", **options)
        self.output_dropout = StnVariationalDropout("dropout_output")
        self.bias = nn.Parameter(torch.zeros(words))

    def forward(self, words: Tensor, states: tuple[State, State] | None) -> tuple[Any, ...]:
        """Words [T, B] to logits [T, B, words], activations after and before dropout [T, B, width], and states."""
        first, second = states or (None, None)
        x = self.input_dropout(self.embedding(words))
        x, first = self.first(x, first)
        raw, second = self.second(self.hidden_dropout(x), second)
        dropped = self.output_dropout(raw)
        logits = nn.functional.linear(dropped, self.embedding.weight, self.bias)
        return logits, dropped, raw, (first, second)


class LanguageProblem(SelfTuningProblem):
    """Seven hyperparameters: five rates, and the coefficients of activation regularization and its temporal form.

    SGD without momentum, gradients clipped to 0.25, states carried from chunk to chunk.
    """

    max_norm = 0.25
    batch_dim = 1

    def __init__(self, config: SelfTuneConfig, device: torch.device) -> None:
        self.config = config
        self.device = device
        corpus = text.read_corpus(Path(config.data_dir) if config.data_dir else None)
        self.words = len(corpus.vocabulary)
        self.train, self.valid = (
            text.columns(words, config.batch_size or 1).to(device) for words in (corpus.train, corpus.valid)
        )
        self.scored = {
            name: text.columns(words, _EVALUATION_COLUMNS).to(device)
            for name, words in (("valid", corpus.valid), ("test", corpus.test))
        }
        for name, columns in (("train", self.train), ("valid", self.valid), *self.scored.items()):
            text.require_length(name, columns)
        self.space = [*space.rates(_RATES, config.start_rate), *space.activation(), *self.extras()]

    def network(self, hparams: HyperParameters, *, centred: bool) -> StnModel:
        """See `SelfTuningProblem`."""
        module = WordModel(self.words, self.config.width or 0, len(hparams), centred=centred)
        return StnModel(module, hparams, centred=centred)

    def train_batches(self) -> Chunks:
        """See `SelfTuningProblem`."""
        return Chunks(self.train, self.config.bptt)

    def valid_batches(self) -> Chunks:
        """See `SelfTuningProblem`."""
        return Chunks(self.valid, self.config.bptt)

    def forward(self, model: Callable[..., Any], batch: Any, carry: Any) -> tuple[Any, Tensor, Any]:
        """Logits and activations; the states are carried on. See `SelfTuningProblem`."""
        words, targets = batch
        *outputs, states = model(words, carry)
        return tuple(outputs), targets, states

    def scores(self, answer: Callable[..., Any]) -> dict[str, float]:
        """Mean cross-entropy of a word, the logarithm of the perplexity. See `SelfTuningProblem`."""
        found = {}
        for name, columns in self.scored.items():
            loss, right, count, carry = 0.0, 0, 0, None
            for batch in Chunks(columns, self.config.bptt):
                (logits, *_), targets, carry = self.forward(answer, batch, carry)
                flat, wanted = logits.flatten(0, 1), targets.flatten()
                loss += float(nn.functional.cross_entropy(flat, wanted, reduction="sum"))
                right += int((flat.argmax(1) == wanted).sum())
                count += len(wanted)
            found[f"{name}_loss"], found[f"{name}_accuracy"] = loss / count, right / count
        return found

    def criterion(self) -> Callable[[Any, Tensor], Tensor]:
        """See `SelfTuningProblem`."""
        return _of_logits(super().criterion())

    def valid_criterion(self) -> Callable[[Any, Tensor], Tensor]:
        """See `SelfTuningProblem`."""
        return _of_logits(nn.functional.cross_entropy)

    def penalties(self, model: StnModel) -> dict[str, Regularizer]:
        """See `SelfTuningProblem`."""
        activations = {
            "alpha": ActivationRegularization("alpha", select=lambda outputs: outputs[1]),
            "beta": ActivationRegularization(None, "beta", select=lambda outputs: outputs[2]),
        }
        return {**activations, **super().penalties(model)}

    def optimizer(self, params: Iterable[Tensor]) -> torch.optim.Optimizer:
        """See `SelfTuningProblem`."""
        return torch.optim.SGD(params, lr=self.config.lr or 0.0)

    def differentiable(self) -> set[str]:
        """See `SelfTuningProblem`; dropped words and weights have no Gaussian form here."""
        names = {"dropout_output", "dropout_hidden", "dropout_input", "alpha", "beta"}
        return names | {d.name for d in self.extras()}

    def fingerprint(self) -> int:
        """See `SelfTuningProblem`."""
        total = 0
        for columns in (self.train, *self.scored.values()):
            total = zlib.crc32(columns.cpu().numpy().tobytes(), total)
        return total


def _of_logits(criterion: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    """A loss of words: examples are the columns [T, B, words], targets [T, B]."""
    return lambda outputs, targets: criterion(outputs[0].permute(1, 2, 0), targets.t())
