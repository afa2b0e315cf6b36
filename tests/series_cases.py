"""Models, criteria and data whose Neumann series are held against the plain loop, whatever way they are summed."""

import functools

import torch
import torch.nn.functional as F
from cases import F64, flat, generator, normal
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from nestopt_ext.curvature import EmpiricalFisher, GaussNewton

TERMS = (0, 1, 2, 5, 20, 100)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}
BOTH = [EmpiricalFisher, GaussNewton]


def seeded(make, dtype=F64, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make().to(dtype)


def classes(seed, *shape, high=3):
    return torch.randint(high, shape, generator=generator(seed))


class Tied(nn.Module):
    """One layer in two places, another one that nothing depends on."""

    def __init__(self):
        super().__init__()
        self.first, self.twice, self.last = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3, bias=False)
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, x):
        return self.last(torch.tanh(self.twice(torch.sigmoid(self.twice(self.first(x))))))


def mlp():
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))


WEIGHT = torch.tensor([1.0, 2.0, 0.5], dtype=F64)
IGNORED = torch.tensor([0, -100, 2, 1, -100, 2, 0])


class PositionsFirst(nn.Module):
    """A layer that takes the tokens of all examples at a position together: examples are not first in memory."""

    def __init__(self):
        super().__init__()
        self.embed, self.block = nn.Embedding(6, 4), nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0)

    def forward(self, tokens):
        return self.block(self.embed(tokens).transpose(0, 1)).mean(0)


class Tokens(nn.Module):
    """A transformer block whose outputs are a row of logits for each token, [B T, V], by the table of the tokens."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.block = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True, activation="gelu")

    def forward(self, tokens):
        with sdpa_kernel(SDPBackend.MATH):
            return F.linear(self.block(self.embed(tokens)), self.embed.weight).reshape(-1, 6)


def cnn():
    """Many positions and a few, groups, statistics of the past and of each example, a transposed layer."""
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, stride=2, groups=2),
        nn.GroupNorm(2, 4), nn.SiLU(), nn.ConvTranspose2d(4, 2, 2), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(8, 3),
    ).eval()  # fmt: skip


class Own(nn.Module):
    """A criterion that is not known, a mean over examples."""

    def forward(self, z, t):
        return (z - t).pow(4).flatten(1).sum(1).mean()


def problem(name, dtype):
    """A model, a criterion, inputs and targets. Outputs are [B, 3], or [B, 3, 2] and [B, 5, 3] with positions."""
    x, sequence = normal(0, 7, 4).to(dtype), normal(0, 4, 3, 4).to(dtype)
    weight = WEIGHT.to(dtype)
    one_hot = F.one_hot(classes(1, 7), 3).to(dtype)
    positions = functools.partial(nn.Sequential, nn.Linear(4, 5), nn.Tanh())
    found = {
        "cross entropy": (mlp, nn.CrossEntropyLoss(), x, classes(1, 7)),
        "sum": (mlp, nn.CrossEntropyLoss(reduction="sum"), x, classes(1, 7)),
        "masked": (mlp, nn.CrossEntropyLoss(weight, label_smoothing=0.1), x, IGNORED),
        "probabilities": (mlp, nn.CrossEntropyLoss(weight), x, normal(2, 7, 3).softmax(1).to(dtype)),
        "squares": (mlp, nn.MSELoss(), x, one_hot),
        "logistic": (mlp, nn.BCEWithLogitsLoss(weight, pos_weight=weight), x, one_hot),
        "poisson": (mlp, nn.PoissonNLLLoss(), x, one_hot),
        "tied": (Tied, nn.CrossEntropyLoss(), x, classes(1, 7)),
        "classes at positions": (lambda: positions(nn.Linear(5, 2)), nn.CrossEntropyLoss(), sequence, classes(1, 4, 2)),
        "squares at positions": (
            lambda: positions(nn.Linear(5, 3)), nn.MSELoss(), sequence, normal(3, 4, 3, 3).to(dtype)
        ),
        "one example": (mlp, nn.CrossEntropyLoss(), x[:1], classes(1, 1)),
        "images": (cnn, nn.CrossEntropyLoss(), normal(0, 4, 2, 9, 9).to(dtype), classes(1, 4)),
        "positions first": (PositionsFirst, nn.CrossEntropyLoss(), classes(0, 3, 2, high=6), classes(1, 3, high=4)),
        "tokens": (Tokens, nn.CrossEntropyLoss(), classes(0, 3, 2, high=6), classes(1, 6, high=6)),
    }  # fmt: skip
    make, criterion, inputs, targets = found[name]
    return seeded(make, dtype), criterion, inputs, targets


PROBLEMS = [
    "cross entropy", "sum", "masked", "probabilities", "squares", "logistic", "poisson", "tied",
    "classes at positions", "squares at positions", "one example", "images", "positions first",
    "tokens",
]  # fmt: skip


def like(operator, seed, *leading):
    return [normal(seed + i, *leading, *p.shape).to(p.dtype) for i, p in enumerate(operator.flat_params)]


def packed(operator, v):
    return operator.structure.pack(v)


def plain_loop(operator, v, num_terms, alpha, damping):
    """Algorithm 3, with its norms: [sum after each number of terms], [squared norm of each term]."""
    term, total = [t.clone() for t in v], [t.clone() for t in v]
    sums, norms = [], []
    for _ in range(num_terms + 1):
        sums.append([alpha * t for t in total])
        norms.append(float(flat(term).double().square().sum()))
        product = operator.flat_product(term)
        term = [t - alpha * (p + damping * t) for t, p in zip(term, product, strict=True)]
        total = [s + t for s, t in zip(total, term, strict=True)]
    return sums, norms


def largest(operator):
    return float(torch.linalg.eigvalsh(operator.dense().double())[-1])
