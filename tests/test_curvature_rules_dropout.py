"""Rules of a recording: dropout."""

import pytest
import torch
import torch.nn.functional as F
from rules import Wrapped, check_rule

F64 = torch.float64


def normal(*shape):
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(3))


FUNCTIONS = {
    "dropout": F.dropout,
    "dropout of a third": lambda h: F.dropout(h, 1 / 3),
    "nothing dropped": lambda h: F.dropout(h, 0.0),
    "all dropped": lambda h: F.dropout(h, 1.0),
    "in eval mode": lambda h: F.dropout(h, training=False),
    "in place": lambda h: F.dropout(h, inplace=True),
    "in eval mode, in place": lambda h: F.dropout(h, training=False, inplace=True),
    "in eval mode, then in place": lambda h: torch.relu_(F.dropout(h, training=False)),
    "twice": lambda h: F.dropout(F.dropout(h), 0.3, True, True),
    "of sequences": F.dropout1d,
    "of images": F.dropout2d,
    "of volumes": F.dropout3d,
    "of sequences, in place": lambda h: F.dropout1d(h, 0.3, True, True),
    "of images, in place": lambda h: F.dropout2d(h, 0.3, True, True),
    "of volumes, in place": lambda h: F.dropout3d(h, 0.3, inplace=True),
    "of images, in eval mode": lambda h: F.dropout2d(h, training=False),
}
SHAPES = {"of sequences": (6, 3, 4), "of images": (6, 3, 2, 4), "of volumes": (6, 3, 2, 2, 4)}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_dropout(name):
    x = normal(*SHAPES.get(name.split(",")[0], (6, 2, 4)))
    model = Wrapped(lambda x, w, v: F.linear(FUNCTIONS[name](F.linear(x, w)), v), normal(5, 4), normal(3, 5))
    check_rule(model, x)
