"""Rules of a recording: matrix products of operands either of which may depend on the params."""

import pytest
import torch
import torch.nn.functional as F
from rules import Wrapped, check_example_gradients, check_mixes, check_rule

F64 = torch.float64


def normal(*shape, seed=3):
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


#: Of a hidden [6, 4, 5] and a param: the function, the param's shape.
WITH_PARAM = {
    "matrix": (lambda h, p: h @ p, (5, 3)),
    "matrix of the features alone": (lambda h, p: h[:, 0] @ p, (5, 3)),
    "mm": (lambda h, p: torch.mm(h[:, 0], p), (5, 3)),
    "mm of what is transposed": (lambda h, p: p.mm(h[:, 0].t()).t(), (3, 5)),
    "addmm": (lambda h, p: torch.addmm(p[0], h[:, 0], p, beta=2, alpha=0.5), (5, 5)),
    "vector": (lambda h, p: h @ p, (5,)),
    "mv": (lambda h, p: torch.mv(h[:, 0], p), (5,)),
    "vector before": (lambda h, p: p @ h, (4,)),
    "matrix before": (lambda h, p: torch.matmul(p, h), (3, 4)),
    "matrix before examples at the end": (lambda h, p: (p @ h.movedim(0, -1)).movedim(-1, 0), (3, 5)),
    "one matrix": (lambda h, p: h @ p, (1, 5, 3)),
    "several matrices": (lambda h, p: (h.transpose(0, 1) @ p).transpose(0, 1), (4, 5, 3)),
    "several matrices for each example": (lambda h, p: h.unsqueeze(1) @ p, (2, 5, 3)),
    "several matrices before": (lambda h, p: p @ h.unsqueeze(1), (2, 3, 4)),
    "bmm": (lambda h, p: torch.bmm(h, h.mT) @ p, (4, 3)),
    "transposed param": (lambda h, p: h @ p.T, (3, 5)),
    "param computed from the param": (lambda h, p: h @ (p @ p.T), (5, 3)),
}


@pytest.mark.parametrize("name", WITH_PARAM)
def test_products_with_a_param(name):
    f, shape = WITH_PARAM[name]
    model = Wrapped(lambda x, w, p: f(F.linear(x, w), p).tanh(), normal(5, 3), normal(*shape, seed=4))
    check_rule(model, normal(6, 4, 3))
    check_example_gradients(model, normal(6, 4, 3))


#: Of two hidden tensors [6, 4, 5] that both depend on the params.
OF_BOTH = {
    "matmul": lambda a, b: a @ b.mT,
    "bmm": lambda a, b: a.bmm(b.transpose(1, 2)),
    "baddbmm": lambda a, b: torch.baddbmm(a, a @ a.mT, b, beta=0.5, alpha=2),
    "baddbmm onto nothing": lambda a, b: torch.baddbmm(a, a @ a.mT, b, beta=0),
    "broadcast": lambda a, b: a.unsqueeze(1) @ torch.stack([b, b * b], 1).mT,
    "broadcast the other": lambda a, b: torch.stack([a, a * a], 1) @ b.mT.unsqueeze(1),
    "four dimensions": lambda a, b: a.unsqueeze(1) @ b.mT.unsqueeze(1),
    "inner products": lambda a, b: (a.unsqueeze(-2) @ b.unsqueeze(-1)).flatten(1),
    "the same": lambda a, b: a @ a.mT,
}


@pytest.mark.parametrize("name", OF_BOTH)
def test_products_of_two_that_depend_on_params(name):
    def f(x, w, v):
        return OF_BOTH[name](F.linear(x, w), F.linear(x, v)).tanh()

    check_rule(Wrapped(f, normal(5, 3), normal(5, 3, seed=4)), normal(6, 4, 3))
    check_example_gradients(Wrapped(f, normal(5, 3), normal(5, 3, seed=4)), normal(6, 4, 3))


@pytest.mark.parametrize("name", ["data first", "param first", "dot"])
def test_products_with_data(name):
    f = {
        "data first": lambda x, p: x @ p,
        "param first": lambda x, p: (p.T @ x.mT).mT,
        "dot": lambda x, p: x[:, 0] * p[0].dot(p[1]),
    }[name]
    check_rule(Wrapped(f, normal(3, 5)), normal(6, 4, 3))
    check_example_gradients(Wrapped(f, normal(3, 5)), normal(6, 4, 3))


@pytest.mark.parametrize("name", ["over examples", "over columns of examples", "of all examples with all"])
def test_examples_mixed(name):
    f = {
        "over examples": lambda h: h.T @ h,
        "over columns of examples": lambda h: h.T @ torch.ones(6, 2, dtype=F64),
        "of all examples with all": lambda h: h @ h.T,
    }[name]
    check_rule(Wrapped(lambda x, w: f(F.linear(x, w)), normal(5, 3)), normal(6, 3))
    check_mixes(Wrapped(lambda x, w: f(F.linear(x, w)), normal(5, 3)), normal(6, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision(dtype):
    model = Wrapped(lambda x, p, q: (x @ p) @ q, normal(3, 5).to(dtype), normal(5, 2, seed=4).to(dtype))
    check_rule(model, normal(6, 4, 3).to(dtype), rtol=16 * torch.finfo(dtype).eps)


#: Of a hidden [6, 4, 5] and a param.
EINSUMS = {
    "features": ("btd,dk->btk", (5, 3)),
    "features by their other name": ("btd,kd->btk", (3, 5)),
    "positions": ("btd,ts->bsd", (4, 3)),
    "both": ("btd,td->b", (4, 5)),
    "a scale": ("btd,d->btd", (5,)),
    "several matrices": ("btd,tdk->btk", (4, 5, 2)),
    "implicit": ("abd,dc", (5, 3)),
    "outer": ("btd,k->btdk", (3,)),
    "a sum besides": ("btd,dk->bk", (5, 3)),
}


@pytest.mark.parametrize("name", EINSUMS)
def test_einsum_with_a_param(name):
    equation, shape = EINSUMS[name]
    model = Wrapped(lambda x, w, p: torch.einsum(equation, F.linear(x, w), p), normal(5, 3), normal(*shape, seed=4))
    check_rule(model, normal(6, 4, 3))
    if name not in ("implicit",):
        check_example_gradients(model, normal(6, 4, 3))


@pytest.mark.parametrize(
    "equation",
    ["btd,bsd->bts", "bts,bsd->btd", "btd,bsd -> bst", "btd,btd->b", "btd,btd->btd", "btd,bsd,bse->bte", "btd->bdt"],
)
def test_einsum_of_what_depends_on_params(equation):
    def f(x, w, v):
        tensors = [F.linear(x, w), F.linear(x, v), F.linear(x, w * v)][: equation.count(",") + 1]
        if equation.startswith("bts"):
            tensors[0] = tensors[0] @ tensors[0].mT
        return torch.einsum(equation, *tensors).tanh()

    check_rule(Wrapped(f, normal(5, 3), normal(5, 3, seed=4)), normal(6, 4, 3))
    check_example_gradients(Wrapped(f, normal(5, 3), normal(5, 3, seed=4)), normal(6, 4, 3))


@pytest.mark.parametrize("equation", ["...d,dk->...k", "btt,tk->bk"])
def test_einsum_of_other_forms_goes_by_autograd(equation):
    def f(x, w, p):
        h = F.linear(x, w)
        return torch.einsum(equation, h if "..." in equation else h @ h.mT, p)

    shape = (5, 3) if "..." in equation else (4, 3)
    check_rule(Wrapped(f, normal(5, 3), normal(*shape, seed=4)), normal(6, 4, 3), opaque=("einsum",))
