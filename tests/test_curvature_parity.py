"""Equal to curvlinops, where it is installed (requirements/peers.txt)."""

import pytest
import torch
from cases import F64, generator, normal
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from nestopt_ext.curvature import EmpiricalFisher, GaussNewton, Hessian, OverBatches


def classes(seed, *shape, high=3):
    return torch.randint(high, shape, generator=generator(seed))


class LayerNorm(nn.LayerNorm):
    """Written out: ``jvp`` of ``jacrev``, which curvlinops uses, loses a part of the native one's in torch 2.13."""

    def forward(self, x):
        centred = x - x.mean(-1, keepdim=True)
        return centred * (centred.square().mean(-1, keepdim=True) + self.eps).rsqrt() * self.weight + self.bias


class Transformer(nn.Module):
    def __init__(self, norm=LayerNorm):
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.block = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True, activation="gelu")
        self.block.norm1, self.block.norm2 = norm(4), norm(4)
        self.head = nn.Linear(4, 3)

    def forward(self, tokens):
        with sdpa_kernel(SDPBackend.MATH):
            return self.head(self.block(self.embed(tokens))).transpose(1, 2)


def mlp():
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.Sigmoid(), nn.Linear(5, 3))


def cnn():
    convolutions = [nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3)]
    model = nn.Sequential(*convolutions, nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(3, 3)).double()
    for batch in (normal(7, 8, 1, 6, 6), 2 + normal(8, 8, 1, 6, 6)):
        model(batch)
    return model.eval()


CASES = {
    "logistic regression": (lambda: nn.Linear(4, 3), nn.CrossEntropyLoss, normal(0, 7, 4), classes(1, 7)),
    "logistic regression, binary": (
        lambda: nn.Linear(4, 1),
        nn.BCEWithLogitsLoss,
        normal(0, 7, 4),
        classes(1, 7, 1, high=2).double(),
    ),
    "mlp": (mlp, nn.CrossEntropyLoss, normal(0, 7, 4), classes(1, 7)),
    "mlp, regression": (mlp, nn.MSELoss, normal(0, 7, 4), normal(1, 7, 3)),
    "mlp, labels": (mlp, nn.BCEWithLogitsLoss, normal(0, 7, 4), classes(1, 7, 3, high=2).double()),
    "cnn": (cnn, nn.CrossEntropyLoss, normal(0, 7, 1, 6, 6), classes(1, 7)),
    "transformer": (Transformer, nn.CrossEntropyLoss, classes(0, 3, 4, high=6), classes(1, 3, 4)),
}


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("case", CASES)
def test_equal_to_curvlinops(case, reduction):
    curvlinops = pytest.importorskip("curvlinops")
    make, criterion_type, x, y = CASES[case]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make().double()
    criterion = criterion_type(reduction=reduction)
    params = dict(model.named_parameters())
    size = sum(p.numel() for p in params.values())
    batches = [(x[:2], y[:2]), (x[2:], y[2:])]
    weights = "examples" if reduction == "mean" else "sum"

    def hessian(x, y):
        return Hessian(lambda: criterion(model(x), y), params)

    def gauss_newton(x, y):
        return GaussNewton(model, criterion, x, y)

    def empirical_fisher(x, y):
        return EmpiricalFisher(model, criterion, x, y)

    v = normal(5, size)
    parts = [t.view_as(p) for t, p in zip(v.split([p.numel() for p in params.values()]), params.values(), strict=True)]
    for ours, theirs in (
        (hessian, curvlinops.HessianLinearOperator),
        (gauss_newton, curvlinops.GGNLinearOperator),
        (empirical_fisher, curvlinops.EFLinearOperator),
    ):
        peer = theirs(model, criterion, list(params.values()), [(x, y)], check_deterministic=False)
        wanted = peer @ torch.eye(size, dtype=F64)
        scale = float(wanted.norm())
        assert scale > 0
        operators = [ours(x, y), OverBatches(batches, lambda batch, ours=ours: ours(*batch), params, weights=weights)]
        for operator in operators:
            assert float((operator.dense() - wanted).norm()) < 1e-10 * scale
            product = operator(dict(zip(params, parts, strict=True)))
            found = torch.cat([t.reshape(-1) for t in product.values()])
            assert float((found - wanted @ v).norm()) < 1e-10 * float((wanted @ v).norm())


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("mode", ["double-backward", "forward-over-reverse"])
def test_the_native_layer_norm_is_differentiated_like_the_one_written_out(mode):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        models = [Transformer(norm).double() for norm in (LayerNorm, nn.LayerNorm)]
    models[1].load_state_dict(models[0].state_dict())
    x, y = classes(0, 3, 4, high=6), classes(1, 3, 4)
    wanted, found = (
        Hessian(lambda m=m: nn.functional.cross_entropy(m(x), y), list(m.parameters()), mode=mode)(
            [normal(i, *p.shape) for i, p in enumerate(m.parameters())]
        )
        for m in models
    )
    for f, w in zip(found, wanted, strict=True):
        torch.testing.assert_close(f, w, rtol=1e-10, atol=1e-12)
