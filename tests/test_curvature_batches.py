# ruff: noqa: NPY002  the global generator of numpy is what is tested
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import F64, flat, generator, leaf, normal
from solver_cases import matrix_of
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from nestopt_ext.curvature import EmpiricalFisher, GaussNewton, Hessian, OverBatches

X = normal(0, 11, 4)
Y = torch.randint(3, (11,), generator=generator(1))


def net():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5), nn.Tanh(), nn.Linear(5, 3)).double().eval()


def close(found, wanted):
    assert float((found - wanted).norm()) <= 1e-12 * float(wanted.norm())


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("kind", [GaussNewton, EmpiricalFisher, Hessian])
def test_all_batches_are_the_whole(kind, reduction):
    model = net()
    params = dict(model.named_parameters())
    criterion = nn.CrossEntropyLoss(reduction=reduction)

    def make(batch):
        x, y = batch
        if kind is Hessian:
            return Hessian(lambda: criterion(model(x), y), params)
        return kind(model, criterion, x, y)

    wanted = make((X, Y)).dense()
    weights = "examples" if reduction == "mean" else "sum"
    loader = DataLoader(TensorDataset(X, Y), batch_size=4)
    for batches in (loader, list(loader), [(X, Y)]):
        whole = OverBatches(batches, make, params, weights=weights)
        close(whole.dense(), wanted)
        v = {n: normal(3, *p.shape) for n, p in params.items()}
        close(flat(whole(v)), wanted @ flat(v))
    if kind is not Hessian:
        close(matrix_of(whole.flat_low_rank()), wanted)
    listed = OverBatches(loader, make, list(params.values())[::-1], weights=weights)
    close(flat(listed([v[n] for n in reversed(params)])[::-1]), wanted @ flat(v))


def test_weights_by_a_function_give_the_mean_over_what_is_not_ignored():
    model, y = net(), Y.clone()
    y[:5] = -100
    y[8] = -100
    criterion = nn.CrossEntropyLoss()
    wanted = GaussNewton(model, criterion, X, y).dense()
    whole = OverBatches(
        DataLoader(TensorDataset(X, y), batch_size=4),
        lambda batch: GaussNewton(model, criterion, *batch),
        dict(model.named_parameters()),
        weights=lambda batch: (batch[1] != -100).sum(),
    )
    close(whole.dense(), wanted)


def test_sums_and_dampings_of_a_batch_go_through():
    model = net()
    params = dict(model.named_parameters())
    whole = OverBatches(
        [(X[:4], Y[:4]), (X[4:], Y[4:])],
        lambda b: (
            GaussNewton(model, nn.CrossEntropyLoss(), *b).damped(0.5)
            + Hessian(sum(p.square().sum() for p in params.values()), params)
        ),
        params,
    )
    wanted = GaussNewton(model, nn.CrossEntropyLoss(), X, Y).dense()
    close(whole.dense(), wanted + 2.5 * torch.eye(len(wanted), dtype=F64))
    assert whole.flat_low_rank() is None


class Augmented(torch.utils.data.Dataset):
    """Draws from three generators for each example."""

    def __len__(self):
        return len(X)

    def __getitem__(self, i):
        return X[i] * torch.rand(()) + random.random() + np.random.rand(), Y[i]


@pytest.mark.parametrize("own", [False, True])
def test_shuffling_augmentation_and_dropout_repeat_themselves_and_all_states_are_put_back(own):
    model = net().train()
    sampler = torch.Generator().manual_seed(1) if own else None
    loader = DataLoader(Augmented(), batch_size=4, shuffle=True, drop_last=True, generator=sampler)
    whole = OverBatches(loader, lambda b: GaussNewton(model, nn.CrossEntropyLoss(), *b), dict(model.named_parameters()))
    v = {n: normal(3, *p.shape) for n, p in model.named_parameters()}

    def states():
        kept = [torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()]
        return [*kept, sampler.get_state().tolist()] if own else kept

    before = states()
    first = flat(whole(v))
    assert states() == before
    torch.rand(5), random.random(), np.random.rand()
    if own:
        torch.rand(5, generator=sampler)
    before = states()
    assert torch.equal(flat(whole(v)), first)
    assert states() == before
    another = OverBatches(
        loader, lambda b: GaussNewton(model, nn.CrossEntropyLoss(), *b), dict(model.named_parameters())
    )
    assert not torch.equal(flat(another(v)), first)


def test_dropout_masks_differ_between_batches():
    masks, model = [], leaf(normal(0, 4))

    def make(x):
        def loss():
            masks.append(F.dropout(torch.ones(64)))
            return (x @ model).square().mean()

        return Hessian(loss, model)

    OverBatches([X[:4], X[4:8]], make, model)(torch.ones(4, dtype=F64))
    assert not torch.equal(*masks)


def test_a_loader_may_reuse_its_memory():
    w, buffer = leaf(normal(0, 4)), torch.empty(1, 4, dtype=F64)

    class Reusing:
        def __iter__(self):
            for row in X:
                yield buffer.copy_(row)

    whole = OverBatches(Reusing(), lambda x: Hessian(0.5 * (x @ w).square().mean(), w), w)
    close(whole.dense(), X.T @ X / len(X))


class Boom(Exception):
    pass


@pytest.mark.parametrize("where", ["loader", "make", "product"])
def test_states_are_put_back_after_an_exception(where):
    w = leaf(normal(0, 4))

    class Failing(Hessian):
        def flat_product(self, v):
            raise Boom

    def batches():
        yield X
        torch.rand(3), random.random(), np.random.rand()
        raise Boom

    class Loader:
        def __iter__(self):
            return batches()

    def make(x):
        torch.rand(3), random.random(), np.random.rand()
        if where == "make":
            raise Boom
        return (Failing if where == "product" else Hessian)((x @ w).square().mean(), w)

    whole = OverBatches(Loader(), make, w)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    with pytest.raises(Boom):
        whole(torch.ones(4, dtype=F64))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1] and np.random.get_state()[1].tolist() == before[2]


def test_bad_arguments_are_refused_by_name():
    w = leaf(normal(0, 4))

    def make(x):
        return Hessian((x @ w).square().mean(), w)

    v = torch.ones(4, dtype=F64)
    for batches in (iter([X]), (x for x in [X])):
        with pytest.raises(TypeError, match=r"OverBatches: batches must be iterable again and again; got an iterator"):
            OverBatches(batches, make, w)
    with pytest.raises(TypeError, match="OverBatches: batches must be an iterable of batches; got int"):
        OverBatches(3, make, w)
    with pytest.raises(TypeError, match="OverBatches: make must be a callable"):
        OverBatches([X], 3, w)
    with pytest.raises(ValueError, match="OverBatches: weights must be 'examples', 'sum' or a function"):
        OverBatches([X], make, w, weights="mean")
    with pytest.raises(ValueError, match="OverBatches: params must require grad"):
        OverBatches([X], make, w.detach())
    with pytest.raises(ValueError, match="OverBatches: batches must hold at least one batch; got none"):
        OverBatches([], make, w)(v)
    with pytest.raises(TypeError, match="OverBatches: make must give a curvature operator; got Tensor"):
        OverBatches([X], lambda x: x, w)(v)
    with pytest.raises(ValueError, match="Hessian: params must be the 1 tensors the operator was made for"):
        OverBatches([X], make, leaf(w))(v)
    with pytest.raises(ValueError, match=r"OverBatches: batches must hold a tensor with a batch .*weights='sum'"):
        OverBatches([3], make, w)(v)
    with pytest.raises(ValueError, match="OverBatches: weights must add up to more than 0; got 0"):
        OverBatches([X], make, w, weights=lambda batch: 0)(v)
